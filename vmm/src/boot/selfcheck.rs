//! Loading the embedded self-checking guest: program, parameters, identity map.

use std::io::Cursor;

use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::BootError;
use super::start::{Mode, Start, write_identity_map};
use crate::devices::GuestMemory;
use crate::guest_abi::{
    BootParams, DISK_BLOCKS_MAX, LOAD_ADDRESS, PAGE_BYTES, WORKING_SET_START,
};
use crate::layout::{HIGH_RAM_START, LOW_RAM_END, VIRTIO_MMIO_BASE, VIRTIO_MMIO_SLOT_BYTES};

/// The guest, as the build script made it.
static GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/selfcheck-guest.elf"));

const PARAMS_ADDRESS: u64 = 0x9_2000;

/// Where the guest keeps its report.
pub const REPORT_ADDRESS: u64 = 0x9_3000;

/// From one flush to the next.
const FLUSH_INTERVAL_US: u64 = 50_000;
/// Blocks written before each flush.
const BLOCKS_PER_FLUSH: u64 = 4;
/// From one step to the next.
const STEP_US: u64 = 1_000;

/// What the guest is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelfCheck {
    /// The machine's number, part of every pattern.
    pub vm_id: u64,
    /// Memory it dirties and checks, MiB.
    pub working_set_mib: u64,
    /// How fast, MiB/s.
    pub dirty_mib_s: u64,
    /// Registers and bytes of its disk, if it has one.
    pub disk: Option<(u64, u64)>,
    /// Rate of the time stamp counter.
    pub tsc_khz: u64,
}

/// Loads the guest; answers where it begins.
///
/// # Errors
/// See [`BootError`].
pub fn load(memory: &GuestMemory, check: &SelfCheck) -> Result<Start, BootError> {
    let memory_mib = memory.iter().map(|region| region.len()).sum::<u64>() >> 20;
    let bad = |reason: String| BootError::Kernel { path: "(the built-in guest)".into(), reason };
    let loaded =
        Elf::load(memory.as_ref(), None, &mut Cursor::new(GUEST), Some(GuestAddress(LOAD_ADDRESS)))
            .map_err(|error| bad(error.to_string()))?;
    let end = memory.last_addr().raw_value() + 1;
    // Its registers lie above RAM that ends below them.
    let mapped = end.max(VIRTIO_MMIO_BASE + 64 * VIRTIO_MMIO_SLOT_BYTES);
    write_identity_map(memory, mapped, true)?;
    let [first, second] = working_set(end, check.working_set_mib << 20)
        .ok_or(BootError::NoRoom { what: "the working set", memory_mib })?;
    let (disk_mmio, disk_bytes) = check.disk.unwrap_or_default();
    let params = BootParams {
        vm_id: check.vm_id,
        range0_start: first.0,
        range0_pages: first.1 / PAGE_BYTES,
        range1_start: second.0,
        range1_pages: second.1 / PAGE_BYTES,
        dirty_mib_s: check.dirty_mib_s,
        disk_mmio,
        disk_blocks: (disk_bytes / PAGE_BYTES).min(DISK_BLOCKS_MAX),
        flush_interval_us: FLUSH_INTERVAL_US,
        blocks_per_flush: BLOCKS_PER_FLUSH,
        tsc_khz: check.tsc_khz,
        step_us: STEP_US,
        report_address: REPORT_ADDRESS,
    };
    let bytes: Vec<u8> = params.to_words().iter().flat_map(|word| word.to_le_bytes()).collect();
    memory.write_slice(&bytes, GuestAddress(PARAMS_ADDRESS))?;
    let rip = loaded.kernel_load.raw_value();
    Ok(Start { mode: Mode::User64, rip, rdi: PARAMS_ADDRESS, rsi: 0, rbx: 0 })
}

/// The one or two ranges (start and bytes) of a working set of `bytes` in RAM that ends at `end`.
fn working_set(end: u64, bytes: u64) -> Option<[(u64, u64); 2]> {
    let low_room = end.min(LOW_RAM_END).checked_sub(WORKING_SET_START)?;
    let low = bytes.min(low_room);
    let high = bytes - low;
    let high_room = end.saturating_sub(HIGH_RAM_START);
    let second = if high == 0 { (0, 0) } else { (HIGH_RAM_START, high) };
    (bytes > 0 && high <= high_room).then_some([(WORKING_SET_START, low), second])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_working_set_lies_in_ram_around_the_devices() {
        let mib = 1 << 20;
        assert_eq!(working_set(64 * mib, 32 * mib), Some([(WORKING_SET_START, 32 * mib), (0, 0)]));
        assert_eq!(working_set(64 * mib, 61 * mib), None);
        assert_eq!(working_set(64 * mib, 0), None);
        assert_eq!(working_set(2 * mib, mib), None);
        let end = HIGH_RAM_START + 1024 * mib;
        let low = LOW_RAM_END - WORKING_SET_START;
        assert_eq!(
            working_set(end, low + 10 * mib),
            Some([(WORKING_SET_START, low), (HIGH_RAM_START, 10 * mib)])
        );
    }
}
