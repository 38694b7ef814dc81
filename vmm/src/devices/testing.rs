//! What device tests stand on: a machine without KVM that records interrupts.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::mpsc;
use vmm_sys_util::eventfd::EventFd;

use super::{
    BusDevice, DeviceContext, ExitContext, InterruptController, MachineEvent, MachineEvents,
    NotifyRegistry, WakeHub,
};
use crate::memory;

/// Memory of the test machine, MiB.
pub(crate) const MEMORY_MIB: u64 = 8;

/// A machine for devices.
pub(crate) struct Bench {
    pub(crate) context: DeviceContext,
    pub(crate) events: mpsc::Receiver<MachineEvent>,
    pub(crate) lines: Arc<Lines>,
    seen: AtomicU64,
}

/// Counts the edges of interrupt lines.
#[derive(Default)]
pub(crate) struct Lines(Mutex<Vec<u32>>);

impl Lines {
    /// How often line `irq` was raised.
    pub(crate) fn edges(&self, irq: u32) -> usize {
        self.0
            .lock()
            .unwrap()
            .iter()
            .filter(|line| **line == irq)
            .count()
    }
}

impl InterruptController for Lines {
    fn set_line(&self, irq: u32, high: bool) {
        if high {
            self.0.lock().unwrap().push(irq);
        }
    }
}

/// Keeps the events that were asked for, instead of KVM.
#[derive(Default)]
pub(crate) struct Notifications;

impl NotifyRegistry for Notifications {
    fn register_mmio(&self, _: u64, _: u32) -> io::Result<EventFd> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Bench {
    /// A machine on the current runtime.
    pub(crate) fn new() -> Self {
        let (sender, events) = mpsc::channel(16);
        let lines = Arc::new(Lines::default());
        let context = DeviceContext {
            memory: memory::allocate(MEMORY_MIB).unwrap(),
            interrupts: lines.clone(),
            notify: Arc::new(Notifications),
            wake: Arc::new(WakeHub::default()),
            runtime: tokio::runtime::Handle::current(),
            events: MachineEvents::new(sender),
        };
        Self {
            context,
            events,
            lines,
            seen: AtomicU64::new(0),
        }
    }

    /// The guest writes to a device.
    pub(crate) fn write(&self, device: &dyn BusDevice, offset: u64, data: &[u8]) {
        device.write(
            offset,
            data,
            &ExitContext::new(0, &self.context.wake, &self.seen),
        );
    }

    /// The guest reads one byte from a device.
    pub(crate) fn read_byte(&self, device: &dyn BusDevice, offset: u64) -> u8 {
        let mut data = [0xff];
        device.read(
            offset,
            &mut data,
            &ExitContext::new(0, &self.context.wake, &self.seen),
        );
        data[0]
    }
}

/// Waits until a condition holds, for 10 s at most.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !holds() {
        assert!(
            std::time::Instant::now() < deadline,
            "in vain waited until {what}"
        );
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
}

/// The count of an atomic, for conditions.
pub(crate) fn load(count: &AtomicU64) -> u64 {
    count.load(Ordering::SeqCst)
}
