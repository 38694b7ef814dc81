//! The self-checking guest that Baton carries: its program, and the parameters it is started with.
//!
//! ```text
//!  0x10_0000  program, rings, buffers (guest/link.ld)
//!  0x3f_0000  parameter record        (RDI at start; RSI: the number of the vCPU)
//!  0x3f_1000  report record
//!  0x40_0000  working set, going on above the hole for devices where it is large
//! ```

#[path = "../guest/abi.rs"]
pub mod abi;

use crate::layout::{HIGH_RAM_START, LOW_RAM_END};
use crate::memory;
use abi::{BootParams, DISK_BLOCKS_MAX, PAGE_BYTES, VCPUS_MAX, WORKING_SET_START};

/// The guest's program: a static ELF file, linked at [`abi::LOAD_ADDRESS`], identity-mapped, entered at its entry
/// point on every vCPU with RDI = [`PARAMS_ADDRESS`] and RSI = the vCPU's number.
pub const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/selfcheck-guest.elf"));

/// Where the parameter record lies.
pub const PARAMS_ADDRESS: u64 = 0x3f_0000;

/// Where the guest keeps its report record.
pub const REPORT_ADDRESS: u64 = 0x3f_1000;

/// µs from one step of the guest to the next. Bounds the error of its blackout figure, and its idle cost: one exit each.
pub const STEP_US: u64 = 2_000;

/// µs from one flush of the guest to the next.
pub const FLUSH_INTERVAL_US: u64 = 50_000;

/// Blocks that the guest writes before each flush.
pub const BLOCKS_PER_FLUSH: u64 = 4;

/// Blocks of the disk that the guest uses: 16 MiB, which it scans at boot in a fraction of a second.
pub const DISK_BLOCKS: u64 = 4_096;

/// Where a working set of `working_set_mib` ends in a machine that has memory on both sides of the devices.
pub const fn working_set_end(working_set_mib: u64) -> u64 {
    let bytes = working_set_mib << 20;
    let below = LOW_RAM_END - WORKING_SET_START;
    if bytes <= below {
        WORKING_SET_START + bytes
    } else {
        HIGH_RAM_START + bytes - below
    }
}

/// The smallest disk that the guest can use, in bytes: its ring must be longer than what may be unflushed.
pub const DISK_BYTES_MIN: u64 = (4 * abi::BLOCKS_PER_FLUSH_MAX + 1) * PAGE_BYTES;

/// The guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestDisk {
    /// Physical address of its registers.
    pub mmio_address: u64,
    /// Its size.
    pub bytes: u64,
}

/// Why the guest cannot be started so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GuestParamsError {
    /// No working set at all.
    #[error("the self-checking guest needs a working set of at least 1 MiB")]
    NoWorkingSet,
    /// It does not fit.
    #[error(
        "a working set of {working_set_mib} MiB does not fit into {memory_mib} MiB of memory: \
         the guest itself takes 4 MiB; use at most {most_mib}"
    )]
    WorkingSetTooLarge {
        /// What was asked for.
        working_set_mib: u64,
        /// The machine's memory.
        memory_mib: u64,
        /// What would fit.
        most_mib: u64,
    },
    /// It has no stack for so many processors.
    #[error("the self-checking guest runs on 1 to {VCPUS_MAX} virtual processors, not on {vcpus}")]
    TooManyVcpus {
        /// How many were asked for.
        vcpus: u32,
    },
    /// Its disk is too small.
    #[error(
        "a disk of {bytes} bytes is too small for the self-checking guest: use at least {DISK_BYTES_MIN}"
    )]
    DiskTooSmall {
        /// The disk's size.
        bytes: u64,
    },
    /// The clock would not run.
    #[error(
        "the frequency of the time stamp counter is not known; the self-checking guest cannot tell time"
    )]
    NoTscFrequency,
}

/// The parameter record for machine `vm_id` with `memory_mib` MiB.
///
/// `vcpus` share the working set. `dirty_mib_s` is the rate at which they dirty it together; 0: it only checks; `u32::MAX`: as fast as it can.
///
/// # Errors
/// When the guest would refuse them; see [`GuestParamsError`].
pub fn boot_params(
    vm_id: u64,
    memory_mib: u64,
    vcpus: u32,
    working_set_mib: u64,
    dirty_mib_s: u32,
    disk: Option<GuestDisk>,
    tsc_khz: u64,
) -> Result<BootParams, GuestParamsError> {
    if !(1..=VCPUS_MAX).contains(&u64::from(vcpus)) {
        return Err(GuestParamsError::TooManyVcpus { vcpus });
    }
    let most_mib = memory_mib.saturating_sub(WORKING_SET_START >> 20);
    if working_set_mib == 0 {
        return Err(GuestParamsError::NoWorkingSet);
    }
    if working_set_mib > most_mib {
        return Err(GuestParamsError::WorkingSetTooLarge {
            working_set_mib,
            memory_mib,
            most_mib,
        });
    }
    if let Some(GuestDisk { bytes, .. }) = disk
        && bytes < DISK_BYTES_MIN
    {
        return Err(GuestParamsError::DiskTooSmall { bytes });
    }
    if tsc_khz == 0 {
        return Err(GuestParamsError::NoTscFrequency);
    }
    let pages = (working_set_mib << 20) / PAGE_BYTES;
    let low_pages =
        (memory::regions(memory_mib << 20)[0].1.min(LOW_RAM_END) - WORKING_SET_START) / PAGE_BYTES;
    Ok(BootParams {
        vm_id,
        range0_start: WORKING_SET_START,
        range0_pages: pages.min(low_pages),
        range1_start: HIGH_RAM_START,
        range1_pages: pages.saturating_sub(low_pages),
        dirty_mib_s: u64::from(dirty_mib_s),
        disk_mmio: disk.map_or(0, |disk| disk.mmio_address),
        disk_blocks: disk.map_or(0, |disk| {
            (disk.bytes / PAGE_BYTES)
                .min(DISK_BLOCKS)
                .min(DISK_BLOCKS_MAX)
        }),
        flush_interval_us: FLUSH_INTERVAL_US,
        blocks_per_flush: BLOCKS_PER_FLUSH,
        tsc_khz,
        step_us: STEP_US,
        report_address: REPORT_ADDRESS,
        vcpus: u64::from(vcpus),
    })
}

/// A record's words as the bytes that lie in memory.
pub fn record_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests;
