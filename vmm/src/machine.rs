//! One machine's hardware put together: memory, vCPUs, devices, the gate; saved and restored as a whole.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{join_all, try_join_all};
use kvm_ioctls::Kvm;
use storage_broker::disk::{Disk, DrainError};
use tokio::sync::mpsc;

use crate::boot::start::{self, Start};
use crate::boot::{BootError, start::wire_local_interrupts};
use crate::clock;
use crate::devices::{
    DeviceContext, GuestMemory, MachineEvent, MachineEvents, Migratable, StateError, WakeHub,
};
use crate::gate::{Gate, Lapsed, OnLapse};
use crate::kvm::cpu::{self, HostCpu, RestoreCpuError};
use crate::kvm::cpuid;
use crate::kvm::vm::{KvmError, RestoreVmError, Vm, asked};
use crate::memory::{self, MemoryError};
use crate::run_log::RunLog;
use crate::state::{DeviceState, Hex, MachineState, ReadStateError, STATE_VERSION};
use crate::vcpu::{Buses, Vcpus};

/// Beyond this the two hosts' clocks disagree rather than the machine having been away so long: a
/// blackout lasts milliseconds. The guest's clock then goes on from where it was.
const ELAPSED_MAX: Duration = Duration::from_secs(60);

/// What a machine consists of.
#[derive(Debug)]
pub struct Config {
    /// KVM, open.
    pub kvm: Kvm,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Virtual processors.
    pub vcpus: u32,
    /// Opened disks.
    pub disks: Vec<Arc<dyn Disk>>,
    /// What follows when the lease runs out.
    pub on_lapse: OnLapse,
    /// Where its vCPUs write down when they executed, if a test asks for it.
    pub run_log: Option<Arc<RunLog>>,
}

/// The devices of a machine, built.
#[derive(Default)]
pub struct DeviceSet {
    /// Where the guest reaches them.
    pub buses: Buses,
    /// Those with a state, in an order that every monitor of this machine has.
    pub migratable: Vec<Arc<dyn Migratable>>,
}

/// A machine. It does not run until its gate is given a permit.
pub struct Machine {
    vm: Arc<Vm>,
    gate: Arc<Gate>,
    host: HostCpu,
    devices: Vec<Arc<dyn Migratable>>,
    disks: Vec<Arc<dyn Disk>>,
    events: MachineEvents,
    memory_mib: u64,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("memory_mib", &self.memory_mib)
            .finish_non_exhaustive()
    }
}

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// What it should boot cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device could not be built.
    #[error("cannot build the machine's devices: {0}")]
    Devices(Box<dyn std::error::Error + Send + Sync>),
    /// The host has no threads or timers left.
    #[error("the host refuses a thread or a timer: {0}")]
    Host(#[from] io::Error),
}

/// Why a machine could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// It runs.
    #[error("the machine's vCPUs are not stopped")]
    Running,
    /// KVM does not say.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A device cannot be saved.
    #[error(transparent)]
    Device(#[from] StateError),
}

/// Why a state could not be put into a machine.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// It does not read as one.
    #[error(transparent)]
    Read(#[from] ReadStateError),
    /// It is another machine's.
    #[error("the saved machine has {what} {saved}, and this one {here}")]
    OtherMachine {
        /// What differs.
        what: &'static str,
        /// As saved.
        saved: String,
        /// Here.
        here: String,
    },
    /// The VM's part.
    #[error(transparent)]
    Vm(#[from] RestoreVmError),
    /// A vCPU's part.
    #[error("cannot restore vCPU {index}: {source}")]
    Cpu {
        /// Which.
        index: usize,
        /// Why.
        source: RestoreCpuError,
    },
    /// A device's part.
    #[error(transparent)]
    Device(#[from] StateError),
    /// The machine is ending.
    #[error("the machine's vCPUs have ended")]
    Gone,
}

impl Machine {
    /// Builds a machine: `attach` builds the devices, `load` puts into memory what it boots, given
    /// the TSC's rate in kHz; without `load` it waits for a saved state.
    ///
    /// # Errors
    /// See [`AssembleError`].
    pub fn assemble(
        config: Config,
        events: mpsc::Sender<MachineEvent>,
        attach: impl FnOnce(
            &DeviceContext,
        ) -> Result<DeviceSet, Box<dyn std::error::Error + Send + Sync>>,
        load: Option<impl FnOnce(&GuestMemory, u64) -> Result<Start, BootError>>,
        lapsed: impl Fn(Lapsed) + Send + 'static,
    ) -> Result<Machine, AssembleError> {
        let memory = memory::allocate(config.memory_mib)?;
        let vm = Arc::new(Vm::new(config.kvm, memory.clone())?);
        let host = HostCpu::new(vm.kvm(), vm.has_irqchip())?;
        let mut vcpus = Vec::new();
        for index in 0..config.vcpus {
            let vcpu = vm.create_vcpu(index)?;
            let leaves = cpuid::for_vcpu(vm.kvm(), index, config.vcpus).map_err(asked("CPUID"))?;
            vcpu.set_cpuid2(&leaves).map_err(asked("CPUID"))?;
            if vm.has_irqchip() {
                wire_local_interrupts(&vcpu)?;
            }
            vcpus.push(vcpu);
        }
        let wake = Arc::new(WakeHub::default());
        let events = MachineEvents::new(events);
        let context = DeviceContext {
            memory: memory.clone(),
            interrupts: vm.interrupts(),
            notify: vm.notifications(),
            wake: wake.clone(),
            runtime: tokio::runtime::Handle::current(),
            events: events.clone(),
        };
        let devices = attach(&context).map_err(AssembleError::Devices)?;
        if let (Some(load), Some(first)) = (load, vcpus.first()) {
            let khz = first.get_tsc_khz().map_err(asked("the TSC's rate"))?;
            let start = load(&memory, u64::from(khz))?;
            start::apply(&vcpus, &memory, &start)?;
        }
        let run_log = config.run_log.as_ref();
        let vcpus = Vcpus::start(vcpus, &devices.buses, wake, events.clone(), run_log)?;
        let gate = Gate::new(
            vcpus,
            devices.migratable.clone(),
            config.disks.clone(),
            events.clone(),
            config.on_lapse,
            lapsed,
        )?;
        Ok(Machine {
            vm,
            gate,
            host,
            devices: devices.migratable,
            disks: config.disks,
            events,
            memory_mib: config.memory_mib,
        })
    }

    /// The VM.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// The gate.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// What the guest and the devices have asked of the machine.
    pub fn events(&self) -> &MachineEvents {
        &self.events
    }

    /// The disks.
    pub fn disks(&self) -> &[Arc<dyn Disk>] {
        &self.disks
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        self.vm.memory()
    }

    /// With the vCPUs stopped: devices take no new work and complete what they took, the disks
    /// complete all I/O and commit it. The caller then holds them, if the machine is still stopped.
    ///
    /// # Errors
    /// When a disk does not drain.
    pub async fn drain(&self, timeout: Duration) -> Result<(), DrainError> {
        let all = async {
            join_all(self.devices.iter().map(|device| device.quiesce())).await;
            try_join_all(self.disks.iter().map(|disk| disk.drain(timeout))).await
        };
        tokio::time::timeout(timeout, all)
            .await
            .map_err(|_| DrainError::TimedOut(timeout))??;
        Ok(())
    }

    /// Saves everything but the memory, of a machine whose vCPUs are stopped and which is drained.
    ///
    /// # Errors
    /// See [`SaveError`].
    pub fn save(&self) -> Result<MachineState, SaveError> {
        let vcpus = self.gate.vcpus();
        if !vcpus.are_parked() {
            return Err(SaveError::Running);
        }
        let mut cpus = Vec::with_capacity(vcpus.count());
        for index in 0..vcpus.count() {
            let host = self.host.clone();
            let saved = vcpus.on_vcpu(index, move |vcpu| cpu::save(vcpu, &host));
            cpus.push(saved.ok_or(SaveError::Running)??);
        }
        let mut devices = Vec::with_capacity(self.devices.len());
        for device in &self.devices {
            let (kind, version) = (device.kind(), device.version());
            devices.push(DeviceState {
                kind,
                version,
                state: Hex(device.save()?),
            });
        }
        Ok(MachineState {
            version: STATE_VERSION,
            memory_mib: self.memory_mib,
            cpus,
            vm: self.vm.save()?,
            devices,
            saved_at_realtime_ns: clock::realtime_ns(),
            ended: self.events.said(),
        })
    }

    /// Puts a saved state into a machine that never ran; the guest's clocks go on as if it had never stopped.
    ///
    /// # Errors
    /// See [`RestoreError`]. After one the machine is of no use.
    pub fn restore(&self, state: &MachineState) -> Result<(), RestoreError> {
        let differs = |what, saved: String, here: String| {
            if saved == here {
                Ok(())
            } else {
                Err(RestoreError::OtherMachine { what, saved, here })
            }
        };
        let vcpus = self.gate.vcpus();
        let kinds = |kinds: Vec<String>| format!("[{}]", kinds.join(", "));
        differs(
            "memory, MiB",
            state.memory_mib.to_string(),
            self.memory_mib.to_string(),
        )?;
        differs(
            "vCPUs",
            state.cpus.len().to_string(),
            vcpus.count().to_string(),
        )?;
        differs(
            "devices",
            kinds(
                state
                    .devices
                    .iter()
                    .map(|device| device.kind.clone())
                    .collect(),
            ),
            kinds(self.devices.iter().map(|device| device.kind()).collect()),
        )?;
        let elapsed_ns = elapsed_ns(state.saved_at_realtime_ns, clock::realtime_ns());
        for (index, saved) in state.cpus.iter().enumerate() {
            let (host, saved) = (self.host.clone(), saved.clone());
            let restored = vcpus.on_vcpu(index, move |vcpu| {
                cpu::restore(vcpu, &saved, elapsed_ns, &host)
            });
            restored
                .ok_or(RestoreError::Gone)?
                .map_err(|source| RestoreError::Cpu { index, source })?;
        }
        self.vm.restore(&state.vm, elapsed_ns)?;
        for (device, saved) in self.devices.iter().zip(&state.devices) {
            device.restore(saved.version, &saved.state.0)?;
        }
        self.events.restore(state.ended.clone());
        Ok(())
    }
}

/// How far the guest's clocks advance between two readings of CLOCK_REALTIME: never back.
fn elapsed_ns(saved_ns: u64, now_ns: u64) -> u64 {
    let elapsed = now_ns.saturating_sub(saved_ns);
    if u128::from(elapsed) <= ELAPSED_MAX.as_nanos() {
        elapsed
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_time_never_goes_back() {
        assert_eq!(elapsed_ns(1_000, 3_500), 2_500);
        assert_eq!(elapsed_ns(3_500, 1_000), 0);
        assert_eq!(elapsed_ns(0, 1 << 62), 0);
    }
}
