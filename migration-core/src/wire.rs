//! Frames over a stream, with an end to patience.

use crate::error::{FrameError, ReceiveError, SendError};
use crate::frame::{Frame, HEADER_BYTES, Header, Kind};
use crate::net::BoxStream;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::timeout;

/// What can go wrong with a stream of frames, before it is known whose.
#[derive(Debug)]
pub enum WireError {
    /// The system's answer.
    Io(io::Error),
    /// Not a byte for the bound of silence.
    Silent(Duration),
    /// Bytes that are no frame.
    Frame(FrameError),
}

impl From<FrameError> for WireError {
    fn from(error: FrameError) -> WireError {
        WireError::Frame(error)
    }
}

impl WireError {
    /// As the source reports it.
    pub fn at_source(self, channel: u16) -> SendError {
        match self {
            WireError::Io(source) => SendError::Connection { channel, source },
            WireError::Silent(bound) => SendError::PeerSilent {
                channel,
                silent_ms: bound.as_millis() as u64,
            },
            WireError::Frame(source) => SendError::Protocol { channel, source },
        }
    }

    /// As the destination reports it.
    pub fn at_destination(self, channel: u16) -> ReceiveError {
        match self {
            WireError::Io(source) => ReceiveError::Connection { channel, source },
            WireError::Silent(bound) => ReceiveError::PeerSilent {
                channel,
                silent_ms: bound.as_millis() as u64,
            },
            WireError::Frame(source) => ReceiveError::Protocol { channel, source },
        }
    }
}

/// Both halves of a stream, each counting its own frames.
///
/// The halves share a lock, which a TLS stream holds while it seals or opens: they wait for each other. One direction
/// carries memory and the other an answer now and then, so neither notices.
pub fn split(stream: BoxStream, dead_after: Duration) -> (FrameReader, FrameWriter) {
    let (reader, writer) = tokio::io::split(stream);
    (
        FrameReader {
            stream: reader,
            sequence: 0,
            dead_after,
        },
        FrameWriter {
            stream: writer,
            sequence: 0,
        },
    )
}

/// Reads frames in their order.
pub struct FrameReader {
    stream: ReadHalf<BoxStream>,
    sequence: u32,
    dead_after: Duration,
}

impl FrameReader {
    /// The next frame: its header, checked, and its payload in the first `length` bytes of `buffer`,
    /// which grows to the largest payload seen and no further. The payload's sum is for the
    /// caller to verify, who may be on another thread by then.
    pub async fn next(&mut self, buffer: &mut Vec<u8>) -> Result<Header, WireError> {
        let mut bytes = [0; HEADER_BYTES];
        self.fill(&mut bytes).await?;
        let header = Header::decode(&bytes)?;
        if header.sequence != self.sequence {
            let (expected, found) = (self.sequence, header.sequence);
            return Err(FrameError::Sequence { expected, found }.into());
        }
        self.sequence = self.sequence.wrapping_add(1);
        let length = header.length as usize;
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        self.fill(&mut buffer[..length]).await?;
        Ok(header)
    }

    /// The next frame, which must be of `kind`, or an *Error*, whose reason becomes an `Err(Ok(..))`.
    pub async fn expect(&mut self, kind: Kind) -> Result<Vec<u8>, Result<String, WireError>> {
        let mut buffer = Vec::new();
        let header = self.next(&mut buffer).await.map_err(Err)?;
        buffer.truncate(header.length as usize);
        header.verify(&buffer).map_err(|error| Err(error.into()))?;
        match header.kind {
            found if found == kind => Ok(buffer),
            Kind::Error => Err(Ok(crate::frame::decode_error(&buffer))),
            other => Err(Err(FrameError::Unexpected {
                kind: other.label(),
                what: "the handshake is not done",
            }
            .into())),
        }
    }

    /// Changes the bound of silence, once the handshake is over.
    pub fn set_dead_after(&mut self, dead_after: Duration) {
        self.dead_after = dead_after;
    }

    /// Reads and throws away until the peer closes. The caller bounds it.
    pub async fn drain(&mut self) {
        let mut waste = vec![0; 64 << 10];
        while matches!(self.stream.read(&mut waste).await, Ok(read) if read > 0) {}
    }

    async fn fill(&mut self, mut rest: &mut [u8]) -> Result<(), WireError> {
        while !rest.is_empty() {
            // Any byte is a sign of life: a frame may take longer than the bound on a slow link.
            match timeout(self.dead_after, self.stream.read(rest)).await {
                Err(_) => return Err(WireError::Silent(self.dead_after)),
                Ok(Err(error)) => return Err(WireError::Io(error)),
                Ok(Ok(0)) => {
                    let closed = "the peer closed the connection";
                    return Err(WireError::Io(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        closed,
                    )));
                }
                Ok(Ok(read)) => rest = &mut rest[read..],
            }
        }
        Ok(())
    }
}

/// Writes frames and numbers them.
pub struct FrameWriter {
    stream: WriteHalf<BoxStream>,
    sequence: u32,
}

impl FrameWriter {
    /// Writes one frame to its last byte; returns how many there were.
    ///
    /// Must not be dropped half done if another frame is to follow.
    pub async fn write(&mut self, frame: &mut Frame) -> io::Result<u64> {
        let bytes = frame.seal(self.sequence);
        self.sequence = self.sequence.wrapping_add(1);
        self.stream.write_all(bytes).await?;
        // Plain TCP has nothing to flush; TLS may still hold the frame's last records.
        self.stream.flush().await?;
        Ok(bytes.len() as u64)
    }

    /// Says that nothing follows: over TLS in its own words (*close_notify*), so that an end is no cut.
    pub async fn close(&mut self) {
        let _ = self.stream.shutdown().await;
    }
}
