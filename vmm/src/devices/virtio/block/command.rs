//! What a request in the queue asks of the disk (virtio 1.x, section 5.2.6).

use bytes::Bytes;
use vm_memory::GuestMemoryError;
use vm_memory::bitmap::AtomicBitmap;

use super::SECTOR_BYTES;
use crate::devices::virtio::buffers::REQUEST_BYTES_MAX;
use crate::devices::virtio::mmio::Request;

/// The header: type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// The length of a disk's name.
pub const ID_BYTES: usize = 20;

/// A valid request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read so many bytes.
    Read {
        /// From this byte on.
        offset: u64,
        /// How many; a multiple of the sector size.
        bytes: u32,
    },
    /// Write.
    Write {
        /// From this byte on.
        offset: u64,
        /// What; a multiple of the sector size.
        data: Bytes,
    },
    /// Make durable what was written.
    Flush,
    /// Tell the disk's name.
    GetId,
    /// Another type.
    Unknown(u32),
}

/// Why a request is no command.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// No whole header, or nowhere to put the status.
    #[error("it has no header or no place for the status")]
    Incomplete,
    /// Not whole sectors, or too many.
    #[error("{bytes} bytes are no whole number of sectors up to {REQUEST_BYTES_MAX} bytes")]
    Length {
        /// How many.
        bytes: usize,
    },
    /// Beyond the end.
    #[error("{bytes} bytes at sector {sector} are beyond the disk's {sectors} sectors")]
    OutOfRange {
        /// Where.
        sector: u64,
        /// How many.
        bytes: usize,
        /// The disk's size.
        sectors: u64,
    },
    /// A write to a disk under a shared lease.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The guest's memory did not give the data.
    #[error("its memory cannot be read: {0}")]
    Memory(#[from] GuestMemoryError),
}

impl Command {
    /// Reads and checks a request against a disk of `sectors` sectors.
    ///
    /// # Errors
    /// See [`CommandError`].
    pub fn parse(
        request: &Request,
        memory: &vm_memory::GuestMemoryMmap<AtomicBitmap>,
        sectors: u64,
        read_only: bool,
    ) -> Result<Command, CommandError> {
        let mut header = [0; HEADER_BYTES];
        if request.readable.read(memory, 0, &mut header)? < HEADER_BYTES
            || request.writable.is_empty()
        {
            return Err(CommandError::Incomplete);
        }
        let [kind, sector] = [&header[..4], &header[8..]].map(number);
        match kind {
            0 => {
                let bytes = request.writable.len() - 1;
                let offset = check(sector, bytes, sectors)?;
                Ok(Command::Read {
                    offset,
                    bytes: bytes as u32,
                })
            }
            1 if read_only => Err(CommandError::ReadOnly),
            1 => {
                let bytes = request.readable.len() - HEADER_BYTES;
                let offset = check(sector, bytes, sectors)?;
                let mut data = vec![0; bytes];
                request.readable.read(memory, HEADER_BYTES, &mut data)?;
                Ok(Command::Write {
                    offset,
                    data: data.into(),
                })
            }
            4 => Ok(Command::Flush),
            8 => Ok(Command::GetId),
            other => Ok(Command::Unknown(other as u32)),
        }
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn check(sector: u64, bytes: usize, sectors: u64) -> Result<u64, CommandError> {
    if !(bytes as u64).is_multiple_of(SECTOR_BYTES) || bytes as u64 > REQUEST_BYTES_MAX {
        return Err(CommandError::Length { bytes });
    }
    let end = sector.checked_add(bytes as u64 / SECTOR_BYTES);
    if end.is_none_or(|end| end > sectors) {
        return Err(CommandError::OutOfRange {
            sector,
            bytes,
            sectors,
        });
    }
    Ok(sector * SECTOR_BYTES)
}
