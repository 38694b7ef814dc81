//! The guest's memory: one memfd, mapped shared, with huge pages where the host gives them.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::devices::GuestMemory;
use crate::layout::{HIGH_RAM_START, LOW_RAM_END};

/// Why the guest's memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the memfd.
    #[error("cannot reserve {mib} MiB of guest memory: {source}")]
    Reserve {
        /// How much was asked for.
        mib: u64,
        /// Why not.
        source: io::Error,
    },
    /// The host refused the mapping.
    #[error("cannot map {mib} MiB of guest memory: {reason}")]
    Map {
        /// How much was asked for.
        mib: u64,
        /// Why not.
        reason: String,
    },
}

/// The regions of a guest with `bytes` of memory: first address and length.
pub fn regions(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= LOW_RAM_END {
        vec![(0, bytes)]
    } else {
        vec![(0, LOW_RAM_END), (HIGH_RAM_START, bytes - LOW_RAM_END)]
    }
}

/// Reserves and maps `mib` MiB; pages are filled in as they are touched.
///
/// # Errors
/// See [`MemoryError`].
pub fn allocate(mib: u64) -> Result<GuestMemory, MemoryError> {
    let reserve = |source: io::Error| MemoryError::Reserve { mib, source };
    let descriptor =
        memfd_create(c"guest-memory", MFdFlags::MFD_CLOEXEC).map_err(|e| reserve(e.into()))?;
    let file = File::from(descriptor);
    file.set_len(mib << 20).map_err(reserve)?;
    let file = Arc::new(file);
    let mut offset = 0;
    let ranges: Vec<_> = regions(mib << 20)
        .into_iter()
        .map(|(start, length)| {
            let place = FileOffset::from_arc(file.clone(), offset);
            offset += length;
            (GuestAddress(start), length as usize, Some(place))
        })
        .collect();
    let memory =
        GuestMemoryMmap::from_ranges_with_files(ranges).map_err(|error| MemoryError::Map {
            mib,
            reason: error.to_string(),
        })?;
    for region in memory.iter() {
        // Not in anybody's core dump.
        if let Err(error) = advise(region.as_ptr(), region.len() as usize, libc::MADV_DONTDUMP) {
            tracing::debug!(%error, "guest memory would be in a core dump");
        }
        // Refused where the host has no huge pages for shared memory; small pages serve as well.
        if let Err(error) = advise(region.as_ptr(), region.len() as usize, libc::MADV_HUGEPAGE) {
            tracing::debug!(%error, "no huge pages for guest memory");
        }
    }
    Ok(Arc::new(memory))
}

fn advise(start: *mut u8, length: usize, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: the range is a whole mapping that `GuestMemoryMmap` owns and keeps mapped while its
    // caller borrows it; the advice keeps the contents.
    let answer = unsafe { libc::madvise(start.cast(), length, advice) };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_the_devices_goes_on_above_four_gib() {
        assert_eq!(regions(64 << 20), [(0, 64 << 20)]);
        assert_eq!(regions(LOW_RAM_END), [(0, LOW_RAM_END)]);
        assert_eq!(
            regions(4 << 30),
            [(0, LOW_RAM_END), (1 << 32, (4 << 30) - LOW_RAM_END)]
        );
    }

    #[test]
    fn memory_is_shared_and_zero_and_a_write_marks_its_page() {
        use vm_memory::Bytes;
        use vm_memory::bitmap::Bitmap;
        let memory = allocate(4).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1234)).unwrap(), 0);
        memory.write_obj(7u64, GuestAddress(0x3000)).unwrap();
        let region = memory.iter().next().unwrap();
        assert!(region.bitmap().dirty_at(0x3000));
        assert!(!region.bitmap().dirty_at(0x4000));
    }
}
