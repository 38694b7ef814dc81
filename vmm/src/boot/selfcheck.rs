//! Loading the self-checking guest: program, parameters, identity map.

use std::io::Cursor;

use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Address, Bytes, GuestAddress};

use super::BootError;
use super::start::{Mode, Start, write_identity_map};
use crate::devices::GuestMemory;
use crate::guest::abi::{BootParams, LOAD_ADDRESS, PAGE_BYTES};
use crate::guest::{PARAMS_ADDRESS, PROGRAM, record_bytes};
use crate::layout::{VIRTIO_SLOTS_MAX, virtio_mmio_address};

/// Loads the guest with its parameters; answers where it begins, on every vCPU.
///
/// # Errors
/// See [`BootError`].
pub fn load(memory: &GuestMemory, params: &BootParams) -> Result<Start, BootError> {
    let bad = |reason: String| BootError::Kernel {
        path: "(the built-in guest)".into(),
        reason,
    };
    let loaded = Elf::load(
        memory.as_ref(),
        None,
        &mut Cursor::new(PROGRAM),
        Some(GuestAddress(LOAD_ADDRESS)),
    )
    .map_err(|error| bad(error.to_string()))?;
    // Devices are mapped too, also where the working set ends below them; memory that it does not use is not.
    let ends = [
        params.range0_start + params.range0_pages * PAGE_BYTES,
        params.range1_start + params.range1_pages * PAGE_BYTES,
        virtio_mmio_address(VIRTIO_SLOTS_MAX),
    ];
    let end = ends.into_iter().fold(0, u64::max);
    write_identity_map(memory, end, true)?;
    memory.write_slice(
        &record_bytes(&params.to_words()),
        GuestAddress(PARAMS_ADDRESS),
    )?;
    let rip = loaded.kernel_load.raw_value();
    Ok(Start {
        mode: Mode::User64,
        rip,
        rdi: PARAMS_ADDRESS,
        rsi: 0,
        rbx: 0,
        on_every_vcpu: true,
    })
}
