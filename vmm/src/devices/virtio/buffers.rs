//! The buffers of one request: guest memory in pieces, every piece checked before it is used.

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

use crate::devices::GuestMemory;

/// Pieces of one request at most, readable and writable together. More than any driver uses with the segment limits
/// that the devices state.
pub const PIECES_MAX: usize = 256;

/// Bytes of one request at most: what the monitor may have to keep for it.
pub const REQUEST_BYTES_MAX: u64 = 4 << 20;

/// Pieces of guest memory that make up one run of bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buffers {
    pieces: Vec<(GuestAddress, usize)>,
    bytes: usize,
}

/// What a driver put into a queue that is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The chain breaks off: a loop, an index or table out of range.
    #[error("the descriptor chain does not end properly")]
    Broken,
    /// More than [`PIECES_MAX`].
    #[error("the descriptor chain has more than {PIECES_MAX} pieces")]
    TooManyPieces,
    /// More than [`REQUEST_BYTES_MAX`].
    #[error("the request is larger than {REQUEST_BYTES_MAX} bytes")]
    TooLarge,
    /// A piece is not in guest memory.
    #[error("{length} bytes at {address:#x} are not in guest memory")]
    OutOfRange {
        /// Guest-physical.
        address: u64,
        /// How many.
        length: u32,
    },
    /// The specification wants all that the device reads before all that it writes.
    #[error("a piece to read comes after a piece to write")]
    Order,
}

impl Buffers {
    /// How many bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    fn push(&mut self, piece: &Descriptor) {
        self.pieces.push((piece.addr(), piece.len() as usize));
        self.bytes += piece.len() as usize;
    }

    /// The pieces that hold the bytes from `from` on, for `length` at most.
    fn range(&self, from: usize, length: usize) -> impl Iterator<Item = (GuestAddress, usize)> {
        let mut skip = from;
        let mut left = length;
        self.pieces.iter().filter_map(move |&(address, bytes)| {
            let skipped = skip.min(bytes);
            skip -= skipped;
            let taken = (bytes - skipped).min(left);
            left -= taken;
            (taken > 0).then_some((GuestAddress(address.0 + skipped as u64), taken))
        })
    }

    /// Copies bytes from `from` on into `data`, as far as there are any; answers how many.
    ///
    /// # Errors
    /// When guest memory cannot be read.
    pub fn read(
        &self,
        memory: &GuestMemoryMmap<AtomicBitmap>,
        from: usize,
        data: &mut [u8],
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for (address, bytes) in self.range(from, data.len()) {
            memory.read_slice(&mut data[done..done + bytes], address)?;
            done += bytes;
        }
        Ok(done)
    }

    /// Copies `data` to the bytes from `from` on, as far as there is room; answers how many. The pages count as dirty.
    ///
    /// # Errors
    /// When guest memory cannot be written.
    pub fn write(
        &self,
        memory: &GuestMemoryMmap<AtomicBitmap>,
        from: usize,
        data: &[u8],
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for (address, bytes) in self.range(from, data.len()) {
            memory.write_slice(&data[done..done + bytes], address)?;
            done += bytes;
        }
        Ok(done)
    }
}

/// What the device reads and what it writes for one request.
///
/// # Errors
/// When the chain is no well-formed request; see [`ChainError`].
pub fn collect(
    chain: DescriptorChain<GuestMemory>,
    memory: &GuestMemory,
) -> Result<(Buffers, Buffers), ChainError> {
    let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
    // The iterator ends in silence on whatever is wrong; then the last piece it gave said that another follows.
    let mut ended = false;
    for (index, piece) in chain.enumerate() {
        if index == PIECES_MAX {
            return Err(ChainError::TooManyPieces);
        }
        ended = !piece.has_next();
        if piece.len() == 0 {
            continue;
        }
        if !memory.check_range(piece.addr(), piece.len() as usize) {
            return Err(ChainError::OutOfRange {
                address: piece.addr().0,
                length: piece.len(),
            });
        }
        if piece.is_write_only() {
            writable.push(&piece);
        } else if writable.is_empty() {
            readable.push(&piece);
        } else {
            return Err(ChainError::Order);
        }
        if (readable.bytes + writable.bytes) as u64 > REQUEST_BYTES_MAX + 4096 {
            return Err(ChainError::TooLarge);
        }
    }
    if ended {
        Ok((readable, writable))
    } else {
        Err(ChainError::Broken)
    }
}
