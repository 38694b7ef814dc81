//! What the kinds of frames hold, and how it is checked. Nothing here believes a number it has not compared.

use super::{
    DEVICE_STATE_BYTES_MAX, Frame, Kind, REASON_BYTES_MAX, REGIONS_MAX, Reader, VERSION_MAX,
    VERSION_MIN,
};
use crate::error::FrameError;
use crate::options::{CHANNELS_MAX, Credentials, Ticket};
use crate::pages::{PAGE_SIZE, Region};

/// Role byte of channel 0: control, and memory too.
const ROLE_CONTROL: u8 = 1;
/// Role byte of the other channels: memory only.
const ROLE_DATA: u8 = 2;

pub(super) fn malformed(kind: Kind, what: &'static str) -> FrameError {
    FrameError::Malformed {
        kind: kind.label(),
        what,
    }
}

/// How a connection introduces itself.
#[derive(Clone, Copy, Debug)]
pub struct Hello {
    /// The oldest version the source speaks.
    pub version_min: u16,
    /// The newest.
    pub version_max: u16,
    /// Which channel this is.
    pub channel: u16,
    /// How many there will be.
    pub channels: u16,
    /// Which migration, and the right to it.
    pub credentials: Credentials,
}

impl Hello {
    /// The introduction of one of this side's channels.
    pub fn new(channel: u16, channels: u16, credentials: Credentials) -> Hello {
        Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            channel,
            channels,
            credentials,
        }
    }

    /// As a frame.
    pub fn encode(&self) -> Frame {
        let mut out = vec![
            if self.channel == 0 {
                ROLE_CONTROL
            } else {
                ROLE_DATA
            },
            0,
        ];
        for number in [
            self.version_min,
            self.version_max,
            self.channel,
            self.channels,
        ] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.credentials.migration_id.to_le_bytes());
        out.extend_from_slice(&self.credentials.ticket.0);
        Frame::new(Kind::Hello, &out)
    }

    /// From a payload; the role must be that of the channel.
    pub fn decode(payload: &[u8]) -> Result<Hello, FrameError> {
        let mut reader = Reader::new(Kind::Hello.label(), payload);
        let [role, zero] = reader.array()?;
        let hello = Hello {
            version_min: reader.u16()?,
            version_max: reader.u16()?,
            channel: reader.u16()?,
            channels: reader.u16()?,
            credentials: Credentials {
                migration_id: reader.u64()?,
                ticket: Ticket(reader.array()?),
            },
        };
        reader.end()?;
        let role_due = if hello.channel == 0 {
            ROLE_CONTROL
        } else {
            ROLE_DATA
        };
        if role != role_due || zero != 0 {
            return Err(malformed(
                Kind::Hello,
                "the role is not that of the channel",
            ));
        }
        if hello.channels == 0
            || hello.channels > CHANNELS_MAX
            || hello.channel >= hello.channels
            || hello.version_min > hello.version_max
        {
            return Err(malformed(Kind::Hello, "impossible numbers"));
        }
        Ok(hello)
    }

    /// The newest version that both sides speak.
    pub fn pick_version(&self) -> Result<u16, FrameError> {
        pick(self.version_min, self.version_max, VERSION_MIN, VERSION_MAX)
    }
}

pub(super) fn pick(
    theirs_min: u16,
    theirs_max: u16,
    ours_min: u16,
    ours_max: u16,
) -> Result<u16, FrameError> {
    let version = theirs_max.min(ours_max);
    if version >= theirs_min.max(ours_min) {
        Ok(version)
    } else {
        Err(FrameError::Version {
            theirs_min,
            theirs_max,
            ours_min,
            ours_max,
        })
    }
}

/// The answer to Hello.
pub fn accepted(version: u16) -> Frame {
    Frame::new(Kind::Accepted, &version.to_le_bytes())
}

/// The version the destination picked, which must be one that was offered.
pub fn decode_accepted(payload: &[u8]) -> Result<u16, FrameError> {
    let mut reader = Reader::new(Kind::Accepted.label(), payload);
    let version = reader.u16()?;
    reader.end()?;
    pick(version, version, VERSION_MIN, VERSION_MAX)
}

/// The memory that will be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// In order.
    pub regions: Vec<Region>,
}

impl Setup {
    /// As a frame.
    pub fn encode(&self) -> Frame {
        let mut out = Vec::with_capacity(8 + self.regions.len() * 16);
        out.extend_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
        out.extend_from_slice(&(self.regions.len() as u32).to_le_bytes());
        for region in &self.regions {
            out.extend_from_slice(&region.guest_address.to_le_bytes());
            out.extend_from_slice(&region.pages.to_le_bytes());
        }
        Frame::new(Kind::Setup, &out)
    }

    /// From a payload. That the regions are the machine's own is for the caller to compare.
    pub fn decode(payload: &[u8]) -> Result<Setup, FrameError> {
        let mut reader = Reader::new(Kind::Setup.label(), payload);
        if reader.u32()? as usize != PAGE_SIZE {
            return Err(malformed(Kind::Setup, "another page size"));
        }
        let count = reader.u32()? as usize;
        if count == 0 || count > REGIONS_MAX {
            return Err(malformed(Kind::Setup, "no regions, or too many"));
        }
        let regions = (0..count)
            .map(|_| {
                Ok(Region {
                    guest_address: reader.u64()?,
                    pages: reader.u64()?,
                })
            })
            .collect::<Result<_, _>>()?;
        reader.end()?;
        Ok(Setup { regions })
    }
}

/// The end of a round on one channel, and its acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundMark {
    /// The round.
    pub round: u32,
    /// Nothing but the device state and *Final* follows.
    pub last: bool,
}

impl RoundMark {
    /// As a frame of `kind` RoundEnd or RoundAck.
    pub fn encode(&self, kind: Kind) -> Frame {
        let mut out = [0; 8];
        out[..4].copy_from_slice(&self.round.to_le_bytes());
        out[4] = u8::from(self.last);
        Frame::new(kind, &out)
    }

    /// From a payload of RoundEnd or RoundAck.
    pub fn decode(kind: Kind, payload: &[u8]) -> Result<RoundMark, FrameError> {
        let mut reader = Reader::new(kind.label(), payload);
        let mark = RoundMark {
            round: reader.u32()?,
            last: match reader.u32()? {
                0 => false,
                1 => true,
                _ => return Err(malformed(kind, "unknown flags")),
            },
        };
        reader.end()?;
        Ok(mark)
    }
}

/// A piece of the device state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceStateChunk<'a> {
    /// Length of the whole.
    pub total: u64,
    /// Where this piece begins; pieces come in order.
    pub offset: u64,
    /// Its bytes; never empty.
    pub bytes: &'a [u8],
}

impl<'a> DeviceStateChunk<'a> {
    /// As a frame.
    pub fn encode(&self) -> Frame {
        let mut out = Vec::with_capacity(16 + self.bytes.len());
        out.extend_from_slice(&self.total.to_le_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(self.bytes);
        Frame::new(Kind::DeviceState, &out)
    }

    /// From a payload; `arrived` bytes came before.
    pub fn decode(payload: &'a [u8], arrived: usize) -> Result<DeviceStateChunk<'a>, FrameError> {
        let kind = Kind::DeviceState;
        let mut reader = Reader::new(kind.label(), payload);
        let (total, offset) = (reader.u64()?, reader.u64()?);
        let bytes = reader.rest;
        if total > DEVICE_STATE_BYTES_MAX as u64 {
            return Err(malformed(kind, "larger than any device state"));
        }
        if offset != arrived as u64 || bytes.is_empty() || offset + bytes.len() as u64 > total {
            return Err(malformed(kind, "not the piece that was due"));
        }
        Ok(DeviceStateChunk {
            total,
            offset,
            bytes,
        })
    }
}

/// Says why this side gives up; a long reason is cut at a character.
pub fn encode_error(reason: &str) -> Frame {
    let mut end = reason.len().min(REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    Frame::new(Kind::Error, &reason.as_bytes()[..end])
}

/// The reason in an *Error*, safe to print: no control characters, whatever the peer sent.
pub fn decode_error(payload: &[u8]) -> String {
    String::from_utf8_lossy(payload)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
