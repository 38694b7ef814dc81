//! Which pages were written since they were last sent: by the guest, as KVM's log says, and by
//! devices, as vm-memory's bitmap says.
//!
//! The order that loses nothing: [`DirtyLog::fetch`] learns what is dirty and forgets nothing; before a
//! chunk of pages is read, [`DirtyLog::clear`] clears that chunk, so that a write after it is logged
//! anew. vm-memory's bitmap can only be read and reset in one, so what was read of it is kept here
//! until it is cleared: both halves of the log then behave alike, however often it is fetched.

use std::sync::{Arc, Mutex, MutexGuard};

use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::vm::{KvmError, Vm, asked};
use crate::layout::PAGE_BYTES;

mod numbers {
    //! Requests that kvm-ioctls does not offer.
    #![allow(missing_docs)]
    use super::*;
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}
use numbers::KVM_CLEAR_DIRTY_LOG;

/// Pages that one word of a bitmap stands for; ranges to clear begin at a multiple.
pub const PAGES_PER_WORD: u64 = 64;

/// Dirty logging under way; ends when dropped.
#[derive(Debug)]
pub struct DirtyLog {
    vm: Arc<Vm>,
    /// For each slot, the pages that devices wrote and that were not cleared since.
    written: Mutex<Vec<Vec<u64>>>,
}

impl DirtyLog {
    /// Begins to log; what was written before is not in it: whoever begins sends all pages once. (A machine that
    /// arrived here itself has had every page written by the receiver.)
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn begin(vm: Arc<Vm>) -> Result<DirtyLog, KvmError> {
        vm.log_dirty_pages(true)?;
        for region in vm.memory().iter() {
            region.bitmap_of_devices().reset();
        }
        let words = |pages: u64| vec![0; pages.div_ceil(PAGES_PER_WORD) as usize];
        let written = vm
            .memory()
            .iter()
            .map(|region| words(region.len() / PAGE_BYTES))
            .collect();
        Ok(DirtyLog {
            vm,
            written: Mutex::new(written),
        })
    }

    fn written(&self) -> MutexGuard<'_, Vec<Vec<u64>>> {
        self.written
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The dirty pages of a slot (a region of RAM, counted in the order of addresses), devices' writes
    /// included: a bit each, the lowest of the first word first. No bit beyond the slot's end is set.
    ///
    /// # Errors
    /// When KVM does not say, or there is no such slot.
    pub fn fetch(&self, slot: u32) -> Result<Vec<u64>, KvmError> {
        let region = self.region(slot)?;
        let kvm = self.vm.fd().get_dirty_log(slot, region.len() as usize);
        let mut words = kvm.map_err(asked("the dirty log"))?;
        let mut written = self.written();
        let written = written
            .get_mut(slot as usize)
            .map_or(&mut [][..], |words| &mut words[..]);
        let fresh = region.bitmap_of_devices().get_and_reset();
        for ((word, written), fresh) in words.iter_mut().zip(written).zip(fresh) {
            *written |= fresh;
            *word |= *written;
        }
        let used = region.len() / PAGE_BYTES % PAGES_PER_WORD;
        if let Some(last) = words.last_mut()
            && used != 0
        {
            *last &= (1 << used) - 1;
        }
        Ok(words)
    }

    /// Clears the pages of a slot that are set in `bits`, whose first bit is `first_page`, so that the
    /// next write to them is logged.
    ///
    /// # Errors
    /// When KVM refuses, or `first_page` is not a multiple of [`PAGES_PER_WORD`].
    pub fn clear(&self, slot: u32, first_page: u64, bits: &[u64]) -> Result<(), KvmError> {
        if bits.is_empty() {
            return Ok(());
        }
        if let Some(written) = self.written().get_mut(slot as usize) {
            let from = ((first_page / PAGES_PER_WORD) as usize).min(written.len());
            for (written, bits) in written[from..].iter_mut().zip(bits) {
                *written &= !bits;
            }
        }
        if !self.vm.has_manual_dirty_log() {
            // Then fetching has cleared KVM's half, and whoever fetches keeps what it says.
            return Ok(());
        }
        let left = (self.region(slot)?.len() / PAGE_BYTES).saturating_sub(first_page);
        let num_pages = left.min(bits.len() as u64 * PAGES_PER_WORD) as u32;
        let request = kvm_clear_dirty_log {
            slot,
            num_pages,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bits.as_ptr() as *mut _,
            },
        };
        // SAFETY: the descriptor is a VM's; the kernel reads `num_pages` bits, which `bits` holds.
        let answer = unsafe { ioctl_with_ref(self.vm.fd(), KVM_CLEAR_DIRTY_LOG(), &request) };
        if answer == 0 {
            Ok(())
        } else {
            Err(asked("to clear the dirty log")(kvm_ioctls::Error::last()))
        }
    }

    fn region(&self, slot: u32) -> Result<&GuestRegionMmap<AtomicBitmap>, KvmError> {
        let missing = || asked("a memory slot")(kvm_ioctls::Error::new(libc::ENOENT));
        self.vm
            .memory()
            .iter()
            .nth(slot as usize)
            .ok_or_else(missing)
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        if let Err(error) = self.vm.log_dirty_pages(false) {
            tracing::error!(%error, "dirty logging goes on: the guest runs slower");
        }
    }
}

/// The whole bitmap of a region, which the `GuestMemoryRegion` trait shows only in slices.
trait DeviceBitmap {
    fn bitmap_of_devices(&self) -> &AtomicBitmap;
}

impl DeviceBitmap for GuestRegionMmap<AtomicBitmap> {
    fn bitmap_of_devices(&self) -> &AtomicBitmap {
        use std::ops::Deref;
        self.deref().bitmap()
    }
}
