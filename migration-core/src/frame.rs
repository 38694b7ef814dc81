//! The units of the stream: a checked header, a checked payload, and what each kind may hold.
//!
//! ```text
//!  0       4     5      6        8         12         16            24            32
//!  +-------+-----+------+--------+---------+----------+-------------+-------------+---------
//!  | magic | kind| zero |  zero  | length  | sequence | payload sum | header sum  | payload
//!  +-------+-----+------+--------+---------+----------+-------------+-------------+---------
//! ```
//!
//! All numbers are little-endian; the sums are xxh3-64, the header's over its first 24 bytes, so that
//! a length is believed only when it was not changed on its way. The sequence counts the frames of
//! one direction of one channel. The header is the same in all versions of the protocol; what the
//! payloads hold is agreed in *Hello* and *Accepted*.

mod pages;
mod payload;
mod totals;

pub use pages::{BatchBuilder, PageRun, decode_pages, decode_zero, encode_zero, push_run};
pub use payload::{
    DeviceStateChunk, Hello, RoundMark, Setup, accepted, decode_accepted, decode_error,
    encode_error,
};
pub use totals::{ChannelTotals, Final};

use crate::error::FrameError;
use crate::pages::PAGE_SIZE;
use xxhash_rust::xxh3::xxh3_64;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 32;
/// "BTNM", as the first four bytes of every frame.
pub const MAGIC: u32 = u32::from_le_bytes(*b"BTNM");
/// The oldest version this side understands; a release accepts its own and the one before.
pub const VERSION_MIN: u16 = 1;
/// The newest version this side understands.
pub const VERSION_MAX: u16 = 1;

/// Pages of one batch at most: 1 MiB, large enough that a frame's own cost vanishes, small
/// enough that a heartbeat or *Quiet* behind it does not wait.
pub const BATCH_PAGES_MAX: usize = 256;
/// Runs of one frame at most: a batch of single pages.
pub const RUNS_MAX: usize = 4096;
/// Bytes of a run in a payload: region, count, first page.
pub const RUN_BYTES: usize = 16;
/// Regions of a machine at most; real ones have a handful.
pub const REGIONS_MAX: usize = 64;
/// Bytes of one piece of device state.
pub const DEVICE_STATE_CHUNK_BYTES: usize = 256 << 10;
/// Bytes of a whole device state at most. A virtual processor needs about 11 KiB.
pub const DEVICE_STATE_BYTES_MAX: usize = 64 << 20;
/// Bytes of a reason in an *Error* at most; longer ones are cut.
pub const REASON_BYTES_MAX: usize = 1024;
/// The longest payload of any kind.
pub const PAYLOAD_BYTES_MAX: usize = BATCH_PAGES_MAX * PAGE_SIZE + RUNS_MAX * RUN_BYTES + 4;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $label:literal, $limit:expr;)*) => {
        /// What a frame is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Kind { $($(#[$doc])* $name = $number,)* }

        impl Kind {
            #[cfg(test)]
            pub const ALL: &'static [Kind] = &[$(Kind::$name,)*];

            fn from_number(kind: u8) -> Result<Kind, FrameError> {
                match kind { $($number => Ok(Kind::$name),)* _ => Err(FrameError::UnknownKind { kind }) }
            }

            /// Its name, for people.
            pub fn label(self) -> &'static str {
                match self { $(Kind::$name => $label,)* }
            }

            /// The longest payload it may have.
            pub fn limit(self) -> usize {
                match self { $(Kind::$name => $limit,)* }
            }
        }
    };
}

kinds! {
    /// Opens a connection: versions, role, channel, migration and ticket.
    Hello = 1, "Hello", 64;
    /// The memory that will be sent.
    Setup = 2, "Setup", 8 + REGIONS_MAX * 16;
    /// Page contents, then the runs that say where they go.
    Pages = 3, "Pages", PAYLOAD_BYTES_MAX;
    /// Runs of pages that are zero.
    Zero = 4, "Zero", 4 + RUNS_MAX * RUN_BYTES;
    /// All frames of a round on this channel have been sent.
    RoundEnd = 5, "RoundEnd", 8;
    /// The source's promise not to run the machine again.
    Quiet = 6, "Quiet", 16;
    /// A piece of the device state.
    DeviceState = 7, "DeviceState", 16 + DEVICE_STATE_CHUNK_BYTES;
    /// What must have arrived.
    Final = 8, "Final", 72 + crate::options::CHANNELS_MAX as usize * 32;
    /// Nothing to say, still here. Both directions.
    Heartbeat = 9, "Heartbeat", 0;
    /// Answer to Hello: the version to speak.
    Accepted = 16, "Accepted", 2;
    /// Answer to Setup: the regions fit.
    Ready = 17, "Ready", 0;
    /// Answer to RoundEnd: everything before it is in memory.
    RoundAck = 18, "RoundAck", 8;
    /// Answer to Final: everything verified and loaded.
    Complete = 19, "Complete", 0;
    /// Why this side gives up. Both directions.
    Error = 20, "Error", REASON_BYTES_MAX;
}

/// A header that verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// Bytes that follow.
    pub length: u32,
    /// Place on its channel.
    pub sequence: u32,
    /// What the payload must hash to.
    pub payload_sum: u64,
}

impl Header {
    /// Writes it into the first [`HEADER_BYTES`] of a frame.
    pub fn encode(&self, out: &mut [u8; HEADER_BYTES]) {
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4] = self.kind as u8;
        out[5..8].fill(0);
        out[8..12].copy_from_slice(&self.length.to_le_bytes());
        out[12..16].copy_from_slice(&self.sequence.to_le_bytes());
        out[16..24].copy_from_slice(&self.payload_sum.to_le_bytes());
        let sum = xxh3_64(&out[..24]);
        out[24..32].copy_from_slice(&sum.to_le_bytes());
    }

    /// Reads and checks one: magic, sum, kind, length within its kind's limit.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, FrameError> {
        let mut reader = Reader::new("header", bytes);
        let magic = reader.u32()?;
        if magic != MAGIC {
            return Err(FrameError::Magic { found: magic });
        }
        let [kind, zeros @ ..] = reader.u32()?.to_le_bytes();
        let length = reader.u32()?;
        let sequence = reader.u32()?;
        let payload_sum = reader.u64()?;
        if xxh3_64(&bytes[..24]) != reader.u64()? {
            return Err(FrameError::HeaderChecksum);
        }
        let kind = Kind::from_number(kind)?;
        if zeros != [0; 3] {
            return Err(FrameError::Malformed {
                kind: kind.label(),
                what: "unknown flags",
            });
        }
        if length as usize > kind.limit() {
            return Err(FrameError::TooLong {
                kind: kind.label(),
                length,
                limit: kind.limit() as u32,
            });
        }
        Ok(Header {
            kind,
            length,
            sequence,
            payload_sum,
        })
    }

    /// Whether `payload` is what the header was made for.
    pub fn verify(&self, payload: &[u8]) -> Result<(), FrameError> {
        if payload.len() == self.length as usize && xxh3_64(payload) == self.payload_sum {
            Ok(())
        } else {
            Err(FrameError::PayloadChecksum {
                sequence: self.sequence,
            })
        }
    }
}

/// A frame to be sent: room for the header, the payload, and the payload's sum. The channel's writer
/// gives it its sequence number.
#[derive(Debug)]
pub struct Frame {
    kind: Kind,
    bytes: Vec<u8>,
    payload_sum: u64,
}

impl Frame {
    /// A frame around a payload.
    pub fn new(kind: Kind, payload: &[u8]) -> Frame {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        bytes.resize(HEADER_BYTES, 0);
        bytes.extend_from_slice(payload);
        Frame::around(kind, bytes)
    }

    /// A frame whose bytes already have room for the header in front.
    pub fn around(kind: Kind, bytes: Vec<u8>) -> Frame {
        debug_assert!(bytes.len() - HEADER_BYTES <= kind.limit());
        let payload_sum = xxh3_64(&bytes[HEADER_BYTES..]);
        Frame {
            kind,
            bytes,
            payload_sum,
        }
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its bytes on the wire.
    pub fn wire_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The payload's sum, which the channel's digest is made of.
    pub fn payload_sum(&self) -> u64 {
        self.payload_sum
    }

    /// The bytes to put on the wire as number `sequence` of its channel.
    pub fn seal(&mut self, sequence: u32) -> &[u8] {
        let header = Header {
            kind: self.kind,
            length: (self.bytes.len() - HEADER_BYTES) as u32,
            sequence,
            payload_sum: self.payload_sum,
        };
        if let Some(room) = self.bytes.first_chunk_mut() {
            header.encode(room);
        }
        &self.bytes
    }

    /// The buffer, for the next batch.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// Reads numbers off a payload and says which kind was too short.
struct Reader<'a> {
    kind: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn new(kind: &'static str, rest: &'a [u8]) -> Reader<'a> {
        Reader { kind, rest }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let short = FrameError::Malformed {
            kind: self.kind,
            what: "too short",
        };
        let (value, rest) = self.rest.split_first_chunk::<N>().ok_or(short)?;
        self.rest = rest;
        Ok(*value)
    }

    fn u16(&mut self) -> Result<u16, FrameError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, FrameError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, FrameError> {
        self.array().map(u64::from_le_bytes)
    }

    fn end(self) -> Result<(), FrameError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(FrameError::Malformed {
                kind: self.kind,
                what: "too long",
            })
        }
    }
}

#[cfg(test)]
mod tests;
