//! The receiving side without its sockets, for the fuzzer: an interface for nobody else.

use std::sync::Arc;
use std::time::Duration;

use crate::error::{FrameError, ReceiveError};
use crate::frame::{HEADER_BYTES, Header, Hello, Kind, MAGIC};
use crate::machine::MemorySink;
use crate::net::BoxStream;
use crate::receive::{Intake, Shared};
use crate::wire::{WireError, split};
use xxhash_rust::xxh3::xxh3_64;

/// Longer than a stream whose bytes are all there can be silent.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// The channels of one migration, all admitted.
pub struct Receiver<S> {
    channels: Vec<Intake<S>>,
}

impl<S: MemorySink> Receiver<S> {
    /// As many channels into `sink`.
    pub fn new(sink: Arc<S>, channels: u16) -> Receiver<S> {
        let shared = Arc::new(Shared::new(sink.regions()));
        let intake =
            |channel| Intake::new(Arc::clone(&sink), Arc::clone(&shared), channel, channels);
        Receiver {
            channels: (0..channels).map(intake).collect(),
        }
    }

    /// Takes one whole frame that arrived on `channel`, whatever its sequence number.
    ///
    /// # Errors
    /// As a migration would fail.
    pub fn take(&mut self, channel: u16, frame: &[u8]) -> Result<(), ReceiveError> {
        let bad = |source| ReceiveError::Protocol { channel, source };
        let short = FrameError::Malformed {
            kind: "header",
            what: "too short",
        };
        let (header, payload) = frame.split_first_chunk().ok_or(bad(short))?;
        let header = Header::decode(header).map_err(bad)?;
        match self.channels.get_mut(usize::from(channel)) {
            Some(intake) => intake.take(&header, payload).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Takes all that a source sends on `channel` after it was let in, until the stream ends or breaks the rules.
    ///
    /// # Errors
    /// The one that every stream ends with; its end is one too.
    pub async fn listen(&mut self, channel: u16, stream: BoxStream) -> Result<(), ReceiveError> {
        let (mut reader, _writer) = split(stream, SILENCE_MAX);
        let mut buffer = Vec::new();
        let Some(intake) = self.channels.get_mut(usize::from(channel)) else {
            return Ok(());
        };
        loop {
            let header = reader
                .next(&mut buffer)
                .await
                .map_err(|error| error.at_destination(channel))?;
            intake.take(&header, &buffer[..header.length as usize])?;
        }
    }
}

/// What the door makes of a connection's first frame: which channel it wants to be, of how many, in which version.
///
/// # Errors
/// As someone is turned away.
pub async fn introduce(stream: BoxStream) -> Result<(u16, u16, u16), ReceiveError> {
    let (mut reader, _writer) = split(stream, SILENCE_MAX);
    let hello = match reader.expect(Kind::Hello).await {
        Ok(payload) => Hello::decode(&payload).map_err(WireError::Frame),
        Err(Ok(reason)) => return Err(ReceiveError::Source(reason)),
        Err(Err(error)) => Err(error),
    };
    let hello = hello.map_err(|error| error.at_destination(0))?;
    let version = hello
        .pick_version()
        .map_err(|error| WireError::Frame(error).at_destination(0))?;
    Ok((hello.channel, hello.channels, version))
}

/// A frame with right sums around anything at all: kinds that there are not, payloads that are too long.
pub fn seal(kind: u8, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len());
    frame.extend_from_slice(&MAGIC.to_le_bytes());
    frame.extend_from_slice(&[kind, 0, 0, 0]);
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(&sequence.to_le_bytes());
    frame.extend_from_slice(&xxh3_64(payload).to_le_bytes());
    let sum = xxh3_64(&frame);
    frame.extend_from_slice(&sum.to_le_bytes());
    frame.extend_from_slice(payload);
    frame
}
