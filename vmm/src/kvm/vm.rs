//! The VM in KVM: irqchip, timer, memory slots, interrupt lines, notifications, clock.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CLOCK_REALTIME, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data,
    kvm_enable_cap, kvm_irqchip, kvm_pit_config, kvm_pit_state2, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::pod;
use crate::devices::{GuestMemory, InterruptController, NotifyRegistry};
use crate::state::{Hex, StateFormatError};

/// Three pages that Intel's VMX needs, out of the way of RAM and devices.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page more for the same.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// KVM refused something, and what.
#[derive(Clone, Debug, thiserror::Error)]
#[error("KVM refused {what}: {source}")]
pub struct KvmError {
    /// What was asked.
    pub what: &'static str,
    /// Its answer.
    pub source: kvm_ioctls::Error,
}

/// Names what KVM was asked, for its error.
pub(crate) fn asked(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError { what, source }
}

/// The VM and the memory it maps.
#[derive(Debug)]
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    memory: GuestMemory,
    irqchip: bool,
    pit: bool,
    manual_dirty_log: bool,
}

/// Opens KVM.
///
/// # Errors
/// When /dev/kvm is not there or this user may not open it.
pub fn open() -> Result<Kvm, KvmError> {
    Kvm::new().map_err(asked(
        "to be opened (is /dev/kvm there, and may this user open it?)",
    ))
}

impl Vm {
    /// Makes the VM with `memory` as its RAM, and irqchip and PIT where KVM has them.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn new(kvm: Kvm, memory: GuestMemory) -> Result<Vm, KvmError> {
        let fd = kvm.create_vm().map_err(asked("a VM"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(asked("the identity map's address"))?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(asked("the TSS's address"))?;
        let irqchip = fd.create_irq_chip();
        if let Err(error) = irqchip {
            tracing::warn!(%error, "this KVM has no irqchip: guests that need interrupts will not work");
        }
        let pit_config = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        let pit = irqchip.is_ok() && fd.create_pit2(pit_config).is_ok();
        let manual = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [
                u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET),
                0,
                0,
                0,
            ],
            ..Default::default()
        };
        let manual_dirty_log = fd.enable_cap(&manual).is_ok();
        let vm = Vm {
            kvm,
            fd: Arc::new(fd),
            memory,
            irqchip: irqchip.is_ok(),
            pit,
            manual_dirty_log,
        };
        vm.set_slots(0)?;
        Ok(vm)
    }

    /// KVM itself.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Whether there is an irqchip in the kernel.
    pub fn has_irqchip(&self) -> bool {
        self.irqchip
    }

    /// Whether the dirty log is cleared by hand (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
    pub fn has_manual_dirty_log(&self) -> bool {
        self.manual_dirty_log
    }

    /// Makes vCPU `index`.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn create_vcpu(&self, index: u32) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(index))
            .map_err(asked("a vCPU"))
    }

    /// Begins or ends dirty logging. When it begins every page counts as dirty.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn log_dirty_pages(&self, on: bool) -> Result<(), KvmError> {
        self.set_slots(if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    fn set_slots(&self, flags: u32) -> Result<(), KvmError> {
        for (slot, region) in self.memory.iter().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is a whole mapping that `self.memory` keeps mapped as long as the VM
            // lives; its contents are only ever reached through volatile accesses.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(asked("a memory slot"))?;
        }
        Ok(())
    }

    /// Interrupt lines.
    pub fn interrupts(&self) -> Arc<dyn InterruptController> {
        Arc::new(Lines {
            fd: self.fd.clone(),
            irqchip: self.irqchip,
        })
    }

    /// ioeventfds.
    pub fn notifications(&self) -> Arc<dyn NotifyRegistry> {
        Arc::new(Notifications(self.fd.clone()))
    }

    /// The guest's clock as KVM counts it (kvmclock), nanoseconds.
    ///
    /// # Errors
    /// When KVM does not say.
    pub fn clock_ns(&self) -> Result<u64, KvmError> {
        Ok(self.fd.get_clock().map_err(asked("the clock"))?.clock)
    }

    /// Irqchip, PIT and clock; with the vCPUs stopped.
    ///
    /// # Errors
    /// When KVM does not say.
    pub fn save(&self) -> Result<VmState, KvmError> {
        let mut state = VmState::default();
        if self.irqchip {
            for chip_id in CHIPS {
                let mut chip = kvm_irqchip {
                    chip_id,
                    ..Default::default()
                };
                self.fd
                    .get_irqchip(&mut chip)
                    .map_err(asked("the irqchip's state"))?;
                state.irqchips.push(Hex(pod::to_bytes(&chip)));
            }
        }
        if self.pit {
            let pit = self.fd.get_pit2().map_err(asked("the PIT's state"))?;
            state.pit = Some(Hex(pod::to_bytes(&pit)));
        }
        state.clock_ns = self.clock_ns()?;
        Ok(state)
    }

    /// Puts back what [`Vm::save`] said. The clock is put `elapsed_ns` later.
    ///
    /// # Errors
    /// When the state is not one of such a VM, or KVM refuses it.
    pub fn restore(&self, state: &VmState, elapsed_ns: u64) -> Result<(), RestoreVmError> {
        let wanted_chips = if self.irqchip { CHIPS.len() } else { 0 };
        if state.irqchips.len() != wanted_chips || state.pit.is_some() != self.pit {
            return Err(RestoreVmError::OtherPlatform {
                saved: state.irqchips.len() + usize::from(state.pit.is_some()),
                here: wanted_chips + usize::from(self.pit),
            });
        }
        for (chip_id, bytes) in CHIPS.into_iter().zip(&state.irqchips) {
            let chip: kvm_irqchip = bytes.pod("irqchip")?;
            if chip.chip_id != chip_id {
                return Err(StateFormatError { part: "irqchip" }.into());
            }
            self.fd
                .set_irqchip(&chip)
                .map_err(asked("the irqchip's state"))?;
        }
        if let Some(bytes) = &state.pit {
            let pit: kvm_pit_state2 = bytes.pod("pit")?;
            self.fd.set_pit2(&pit).map_err(asked("the PIT's state"))?;
        }
        // The elapsed time is added here and not by KVM (KVM_CLOCK_REALTIME), which older hosts lack.
        debug_assert_ne!(KVM_CLOCK_REALTIME, 0);
        let clock = kvm_clock_data {
            clock: state.clock_ns.saturating_add(elapsed_ns),
            ..Default::default()
        };
        self.fd.set_clock(&clock).map_err(asked("the clock"))?;
        Ok(())
    }
}

/// PIC, PIC, IOAPIC.
const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// The VM's own part of a saved machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    irqchips: Vec<Hex>,
    pit: Option<Hex>,
    clock_ns: u64,
}

/// Why a VM's state could not be put back.
#[derive(Debug, thiserror::Error)]
pub enum RestoreVmError {
    /// It has other devices in the kernel.
    #[error(
        "the machine was saved with {saved} interrupt and timer chips in the kernel; this KVM has {here}"
    )]
    OtherPlatform {
        /// How many there were.
        saved: usize,
        /// How many there are.
        here: usize,
    },
    /// It does not read as one.
    #[error(transparent)]
    Format(#[from] StateFormatError),
    /// KVM refused it.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

struct Lines {
    fd: Arc<VmFd>,
    irqchip: bool,
}

impl InterruptController for Lines {
    fn set_line(&self, irq: u32, high: bool) {
        if !self.irqchip {
            return;
        }
        if let Err(error) = self.fd.set_irq_line(irq, high) {
            tracing::error!(irq, %error, "KVM refused an interrupt");
        }
    }
}

struct Notifications(Arc<VmFd>);

impl NotifyRegistry for Notifications {
    fn register_mmio(&self, address: u64, value: u32) -> io::Result<EventFd> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        self.0
            .register_ioevent(&event, &IoEventAddress::Mmio(address), value)?;
        Ok(event)
    }
}
