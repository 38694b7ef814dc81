//! Which pages were written since they were last sent: by the guest, as KVM's log says, and by
//! devices, as vm-memory's bitmap says.
//!
//! The order that loses nothing: [`DirtyLog::fetch`] learns what is dirty and clears nothing of
//! KVM's; before a chunk of pages is read, [`DirtyLog::clear`] clears that chunk, so that a write
//! after it is logged anew. The devices' bitmap is cleared as it is fetched, before any page is read.

use std::sync::Arc;

use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
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
}

/// The dirty pages of one region of RAM, a bit each, the lowest bit of the first word first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionBitmap {
    /// The region's number, in the order of addresses: KVM's slot.
    pub slot: u32,
    /// Its first page.
    pub first_page: u64,
    /// Its pages.
    pub pages: u64,
    /// The bits.
    pub words: Vec<u64>,
}

impl DirtyLog {
    /// Begins to log. All pages count as dirty at first.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn begin(vm: Arc<Vm>) -> Result<DirtyLog, KvmError> {
        vm.log_dirty_pages(true)?;
        Ok(DirtyLog { vm })
    }

    /// What is dirty, devices' writes included.
    ///
    /// # Errors
    /// When KVM does not say.
    pub fn fetch(&self) -> Result<Vec<RegionBitmap>, KvmError> {
        let mut regions = Vec::new();
        for (slot, region) in self.vm.memory().iter().enumerate() {
            let slot = slot as u32;
            // The devices' bits first: what a device writes from now on is in the next fetch.
            let bitmap: &AtomicBitmap = region.get_mmap_bitmap();
            let devices = bitmap.get_and_reset();
            let mut words = self
                .vm
                .fd()
                .get_dirty_log(slot, region.len() as usize)
                .map_err(asked("the dirty log"))?;
            for (word, device) in words.iter_mut().zip(devices) {
                *word |= device;
            }
            let pages = region.len() / PAGE_BYTES;
            // Bits beyond the end mean nothing and are not left to be misread.
            if let Some(last) = words.last_mut()
                && pages % PAGES_PER_WORD != 0
            {
                *last &= (1 << (pages % PAGES_PER_WORD)) - 1;
            }
            let first_page = region.start_addr().raw_value() / PAGE_BYTES;
            regions.push(RegionBitmap { slot, first_page, pages, words });
        }
        Ok(regions)
    }

    /// Clears pages `word × 64 ..` of a slot as far as `bits` says, so that the next write to them is logged.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn clear(&self, slot: u32, first_word: u64, bits: &[u64]) -> Result<(), KvmError> {
        if !self.vm.has_manual_dirty_log() || bits.is_empty() {
            // Without the capability fetching has cleared it all.
            return Ok(());
        }
        let Some(region) = self.vm.memory().iter().nth(slot as usize) else {
            return Ok(());
        };
        let first_page = first_word * PAGES_PER_WORD;
        let left = (region.len() / PAGE_BYTES).saturating_sub(first_page);
        let num_pages = left.min(bits.len() as u64 * PAGES_PER_WORD) as u32;
        let request = kvm_clear_dirty_log {
            slot,
            num_pages,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_ptr() as *mut _ },
        };
        // SAFETY: the descriptor is a VM's; the kernel reads `num_pages` bits, which `bits` holds.
        let answer = unsafe { ioctl_with_ref(self.vm.fd(), KVM_CLEAR_DIRTY_LOG(), &request) };
        if answer == 0 { Ok(()) } else { Err(asked("to clear the dirty log")(kvm_ioctls::Error::last())) }
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        if let Err(error) = self.vm.log_dirty_pages(false) {
            tracing::error!(%error, "dirty logging goes on: the guest runs slower");
        }
    }
}

/// The full bitmap of a region, which the `GuestMemoryRegion` trait shows only in slices.
trait MmapBitmap {
    fn get_mmap_bitmap(&self) -> &AtomicBitmap;
}

impl MmapBitmap for vm_memory::GuestRegionMmap<AtomicBitmap> {
    fn get_mmap_bitmap(&self) -> &AtomicBitmap {
        use std::ops::Deref;
        self.deref().bitmap()
    }
}
