//! What the machine and its devices ask of each other.
//!
//! ```text
//!   vCPU thread ── exit ──► Bus ──► BusDevice::{read, write}        (may block in ExitContext::wait)
//!   ioeventfd ── DeviceContext::notify ──► EventFd ──► the device's tokio task
//!   device ── IrqLine::trigger ──► KVM's irqchip; also ends every ExitContext::wait
//!   machine ── Migratable::{quiesce, save, restore, resume} ──► device
//! ```
//!
//! A device is an `Arc` with interior mutability: the buses, its own tasks and the machine share it.
//! Devices write guest memory through vm-memory alone, whose bitmap then knows the page as dirty.
//! A disk's backend is `storage_broker::disk::Disk`: it pends and never fails; holding, draining and
//! re-keying it is the machine's part, not the device's. Each device is made by
//! `Device::new(&DeviceContext, …) -> Result<Arc<Device>, …>`; the machine puts it on its bus (see [`crate::layout`]).

pub mod i8042;
pub mod selfcheck;
pub mod serial;
#[cfg(test)]
pub(crate) mod testing;
pub mod virtio;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;
use vmm_sys_util::eventfd::EventFd;

/// The guest's memory: memfd-backed, shared by vCPUs and devices; its bitmap marks what devices wrote.
pub type GuestMemory = Arc<GuestMemoryMmap<AtomicBitmap>>;

/// A device behind ports or memory-mapped registers.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes (1, 2, 4 or 8; MMIO may be any up to 8) at `offset` from
    /// the range's start. `data` is all ones at first, which is what an absent register reads as.
    fn read(&self, offset: u64, data: &mut [u8], context: &ExitContext<'_>);
    /// The guest writes `data` at `offset` from the range's start.
    fn write(&self, offset: u64, data: &[u8], context: &ExitContext<'_>);
}

/// A device whose state travels with the machine.
///
/// The order of calls on a live machine: vCPUs stop, `quiesce` (all devices at once, while disks
/// are not held), the disks drain and are held, `save`; then either `resume` here (after the log's
/// word) or, elsewhere, `restore` on a device that never ran, then `resume`. A device is built
/// quiesced: it touches guest memory only after its first `resume`.
#[async_trait]
pub trait Migratable: Send + Sync {
    /// Which kind of device, with its place where there may be several: `serial`, `virtio-blk:0`.
    fn kind(&self) -> String;
    /// The version of the state that `save` writes.
    fn version(&self) -> u32;
    /// The state, of a quiesced device, as [`encode_state`] writes it.
    ///
    /// # Errors
    /// When the device is not quiesced or cannot be asked.
    fn save(&self) -> Result<Vec<u8>, StateError>;
    /// Takes up a state that the same kind of device saved.
    ///
    /// # Errors
    /// When the version is unknown, or anything in the state is unknown, missing or out of range.
    fn restore(&self, version: u32, state: &[u8]) -> Result<(), StateError>;
    /// Takes no new work from the guest's queues and returns when all work taken is complete: used
    /// rings written, interrupts raised. Work that is available and not taken stays in the queue.
    async fn quiesce(&self) {}
    /// Works on; looks at the queues by itself, since a notification may have been lost on the way.
    /// Called before every time the vCPUs are let go, so also on a device that was not quiesced (after a
    /// freeze), where it changes nothing.
    fn resume(&self) {}
}

/// Why a device's state could not be saved or restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// It still works.
    #[error("{kind} is not quiesced")]
    NotQuiesced {
        /// The device.
        kind: String,
    },
    /// It was saved by another version.
    #[error(
        "{kind} was saved in version {found}; this monitor knows {known}: upgrade it, or migrate to a newer one"
    )]
    Version {
        /// The device.
        kind: String,
        /// The version in the state.
        found: u32,
        /// The newest version known.
        known: u32,
    },
    /// The state does not read as one.
    #[error("the saved state of {kind} is not valid: {reason}")]
    Invalid {
        /// The device.
        kind: String,
        /// What is wrong.
        reason: String,
    },
}

/// Writes a state; its type should `deny_unknown_fields`, so that nothing is left unread at the other end.
///
/// # Errors
/// When the value has no JSON form.
pub fn encode_state<T: Serialize>(kind: &str, state: &T) -> Result<Vec<u8>, StateError> {
    serde_json::to_vec(state).map_err(|error| StateError::Invalid {
        kind: kind.into(),
        reason: error.to_string(),
    })
}

/// Reads what [`encode_state`] wrote.
///
/// # Errors
/// When it is not exactly one value of the type.
pub fn decode_state<T: DeserializeOwned>(kind: &str, state: &[u8]) -> Result<T, StateError> {
    serde_json::from_slice(state).map_err(|error| StateError::Invalid {
        kind: kind.into(),
        reason: error.to_string(),
    })
}

/// Address ranges and the device behind each; built once, then only read.
#[derive(Clone, Default)]
pub struct Bus {
    ranges: BTreeMap<u64, (u64, Arc<dyn BusDevice>)>,
}

/// A range that another device has already.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the range {base:#x}+{length:#x} is taken or empty")]
pub struct RangeTaken {
    /// Its first address.
    pub base: u64,
    /// Its length.
    pub length: u64,
}

impl Bus {
    /// Puts a device at `base`, over `length` addresses.
    ///
    /// # Errors
    /// When part of the range is taken already.
    pub fn insert(
        &mut self,
        base: u64,
        length: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), RangeTaken> {
        let taken = RangeTaken { base, length };
        let end = base
            .checked_add(length)
            .filter(|_| length > 0)
            .ok_or(taken.clone())?;
        if let Some((&before, (before_length, _))) = self.ranges.range(..end).next_back()
            && before + before_length > base
        {
            return Err(taken);
        }
        self.ranges.insert(base, (length, device));
        Ok(())
    }

    /// The device at `address` and the offset in its range; `None` where there is none.
    pub fn find(&self, address: u64) -> Option<(&dyn BusDevice, u64)> {
        let (&base, (length, device)) = self.ranges.range(..=address).next_back()?;
        let offset = address - base;
        (offset < *length).then_some((device.as_ref(), offset))
    }

    /// A guest's read; all ones where there is no device.
    pub fn read(&self, address: u64, data: &mut [u8], context: &ExitContext<'_>) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(address) {
            device.read(offset, data, context);
        }
    }

    /// A guest's write; without effect where there is no device.
    pub fn write(&self, address: u64, data: &[u8], context: &ExitContext<'_>) {
        if let Some((device, offset)) = self.find(address) {
            device.write(offset, data, context);
        }
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.ranges.iter().map(|(base, (length, _))| (base, length)))
            .finish()
    }
}

/// What a device is told about the exit it handles.
#[derive(Clone, Copy, Debug)]
pub struct ExitContext<'a> {
    /// The vCPU that exited.
    pub vcpu: u32,
    wake: &'a WakeHub,
    seen: &'a AtomicU64,
}

/// Why [`ExitContext::wait`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// Something happened: an interrupt line was triggered, or the machine is about to pause. It may
    /// be nothing the guest waits for: it looks and waits again.
    Woken,
    /// Nothing happened within the time.
    TimedOut,
}

impl<'a> ExitContext<'a> {
    /// The context of an exit of `vcpu`, whose last wait saw generation `seen` of the hub.
    pub fn new(vcpu: u32, wake: &'a WakeHub, seen: &'a AtomicU64) -> Self {
        ExitContext { vcpu, wake, seen }
    }

    /// Blocks the vCPU inside its exit until something happens, for `timeout` at most. What
    /// happened since this vCPU's last wait counts, so that nothing is missed between looking and waiting.
    pub fn wait(&self, timeout: Duration) -> Waited {
        let (generation, waited) = self.wake.wait(self.seen.load(Ordering::Relaxed), timeout);
        self.seen.store(generation, Ordering::Relaxed);
        waited
    }
}

/// Ends the waits of vCPUs that block inside an exit.
#[derive(Debug, Default)]
pub struct WakeHub {
    generation: Mutex<u64>,
    changed: Condvar,
}

impl WakeHub {
    /// Something happened.
    pub fn wake_all(&self) {
        *self
            .generation
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner()) += 1;
        self.changed.notify_all();
    }

    /// Waits until the generation is not `seen`; answers the generation then.
    fn wait(&self, seen: u64, timeout: Duration) -> (u64, Waited) {
        let deadline = Instant::now() + timeout;
        let mut generation = self
            .generation
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        while *generation == seen {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return (seen, Waited::TimedOut);
            }
            generation = self
                .changed
                .wait_timeout(generation, left)
                .unwrap_or_else(|poisoned| poisoned.into_inner())
                .0;
        }
        (*generation, Waited::Woken)
    }
}

/// Where interrupt lines end: KVM's irqchip, or a recorder in a test.
pub trait InterruptController: Send + Sync {
    /// Sets line `irq`; an edge is a `true` followed by a `false`. Done when it returns, so that a
    /// state saved afterwards has it.
    fn set_line(&self, irq: u32, high: bool);
}

/// One interrupt line of one device.
#[derive(Clone)]
pub struct IrqLine {
    controller: Arc<dyn InterruptController>,
    wake: Arc<WakeHub>,
    irq: u32,
}

impl IrqLine {
    /// The line's number.
    pub fn irq(&self) -> u32 {
        self.irq
    }

    /// Raises an edge-triggered interrupt, and ends the waits of vCPUs that block inside an exit.
    pub fn trigger(&self) {
        self.controller.set_line(self.irq, true);
        self.controller.set_line(self.irq, false);
        self.wake.wake_all();
    }
}

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IrqLine")
            .field("irq", &self.irq)
            .finish_non_exhaustive()
    }
}

/// Turns a guest's write to one address into an event without an exit to user space (ioeventfd).
pub trait NotifyRegistry: Send + Sync {
    /// An event for 4-byte writes of `value` at the guest-physical `address`; the bus never sees them.
    ///
    /// # Errors
    /// When KVM refuses.
    fn register_mmio(&self, address: u64, value: u32) -> io::Result<EventFd>;
}

/// What the guest or a device wants of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MachineEvent {
    /// The guest has shut itself down.
    ShutDown,
    /// The guest asked for a reset; a monitor ends as after a shutdown, and a reboot is a new start.
    Reset,
    /// The guest or a device cannot go on, and how.
    Failed(String),
}

/// Where the guest and the devices say what they want of the machine.
///
/// The first of it is remembered, in the vCPU's own thread: a guest says it once, and where its vCPUs stop for a
/// cutover right after, nobody may act on it here. It is part of what is saved, and is said again whenever the guest is
/// let go, wherever that is.
#[derive(Clone, Debug)]
pub struct MachineEvents {
    send: mpsc::Sender<MachineEvent>,
    first: Arc<Mutex<Option<MachineEvent>>>,
}

impl MachineEvents {
    /// Tells `send`.
    pub fn new(send: mpsc::Sender<MachineEvent>) -> MachineEvents {
        MachineEvents {
            send,
            first: Arc::default(),
        }
    }

    /// Says it.
    pub fn tell(&self, event: MachineEvent) {
        self.first().get_or_insert_with(|| event.clone());
        // Full: the machine has been told often enough.
        let _ = self.send.try_send(event);
    }

    /// What was said first, if anything was.
    pub fn said(&self) -> Option<MachineEvent> {
        self.first().clone()
    }

    /// Takes over what was said where the machine ran before.
    pub fn restore(&self, said: Option<MachineEvent>) {
        if said.is_some() {
            *self.first() = said;
        }
    }

    /// Says again what was said.
    pub fn repeat(&self) {
        if let Some(event) = self.said() {
            // Full: as above.
            let _ = self.send.try_send(event);
        }
    }

    fn first(&self) -> MutexGuard<'_, Option<MachineEvent>> {
        self.first
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// What every device is built with.
#[derive(Clone)]
pub struct DeviceContext {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// Where interrupt lines end; see [`DeviceContext::irq_line`].
    pub interrupts: Arc<dyn InterruptController>,
    /// Makes ioeventfds.
    pub notify: Arc<dyn NotifyRegistry>,
    /// Ends waits inside exits.
    pub wake: Arc<WakeHub>,
    /// Runs the devices' tasks.
    pub runtime: tokio::runtime::Handle,
    /// Takes what the guest wants of the machine.
    pub events: MachineEvents,
}

impl DeviceContext {
    /// The line numbered `irq`.
    pub fn irq_line(&self, irq: u32) -> IrqLine {
        IrqLine {
            controller: self.interrupts.clone(),
            wake: self.wake.clone(),
            irq,
        }
    }
}

impl fmt::Debug for DeviceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceContext").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl BusDevice for Nothing {
        fn read(&self, _: u64, data: &mut [u8], _: &ExitContext<'_>) {
            data.fill(0);
        }
        fn write(&self, _: u64, _: &[u8], _: &ExitContext<'_>) {}
    }

    #[test]
    fn ranges_do_not_overlap_and_gaps_read_as_ones() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, Arc::new(Nothing)).unwrap();
        bus.insert(0x14, 4, Arc::new(Nothing)).unwrap();
        for (base, length) in [
            (0x10, 1),
            (0x0f, 2),
            (0x17, 1),
            (0x00, 0x100),
            (0x20, 0),
            (u64::MAX, 2),
        ] {
            assert_eq!(
                bus.insert(base, length, Arc::new(Nothing)),
                Err(RangeTaken { base, length })
            );
        }
        let (wake, seen) = (WakeHub::default(), AtomicU64::new(0));
        let context = ExitContext::new(0, &wake, &seen);
        let mut data = [7];
        bus.read(0x17, &mut data, &context);
        assert_eq!(data, [0]);
        bus.read(0x18, &mut data, &context);
        assert_eq!(data, [0xff]);
    }

    #[test]
    fn a_wait_ends_by_what_happened_before_it_began() {
        let (wake, seen) = (WakeHub::default(), AtomicU64::new(0));
        let context = ExitContext::new(0, &wake, &seen);
        wake.wake_all();
        assert_eq!(context.wait(Duration::from_secs(60)), Waited::Woken);
        assert_eq!(context.wait(Duration::from_millis(1)), Waited::TimedOut);
    }
}
