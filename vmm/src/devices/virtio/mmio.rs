//! The transport: registers, feature negotiation, queues, interrupts (virtio 1.x, section 4.2, version 2).
//!
//! ```text
//!  reset ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► (queues ready) ─► DRIVER_OK ─► take / complete
//!    ▲                                                                    │
//!    └────────────── status := 0 ◄──── NEEDS_RESET ◄── a broken queue ────┘
//! ```

mod state;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::buffers::{Buffers, ChainError, collect};
use super::ready::watch_event;
use super::{FEATURE_EVENT_INDEX, FEATURE_VERSION_1, Tasks};
use crate::devices::{DeviceContext, GuestMemory, IrqLine, WakeHub};

pub use state::{QueueState, TransportState};

/// The registers, each 32 bits wide (virtio 1.x, table 4.1).
pub mod register {
    #![allow(missing_docs)] // The names are the specification's.
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESCRIPTORS_LOW: u64 = 0x80;
    pub const QUEUE_DESCRIPTORS_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHARED_MEMORY_LENGTH_LOW: u64 = 0xb0;
    pub const SHARED_MEMORY_BASE_HIGH: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// The bits of the status register.
pub mod status {
    #![allow(missing_docs)] // The names are the specification's.
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
    pub const ALL: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED;
}

const MAGIC_VALUE: u32 = 0x7472_6976;
const VENDOR: u32 = 0x6e74_6162;
const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;
const AVAILABLE_NO_INTERRUPT: u16 = 1;

/// What a device is, as its registers say it.
#[derive(Clone, Debug)]
pub struct Description {
    /// For the log and the saved state: `virtio-blk:0`.
    pub name: String,
    /// The specification's number for the kind of device.
    pub device_id: u32,
    /// Features offered; [`FEATURE_VERSION_1`] must be among them.
    pub features: u64,
    /// The largest size of each queue.
    pub queue_sizes: Vec<u16>,
    /// The device's configuration space.
    pub config: Vec<u8>,
}

/// A request that a device works on.
#[derive(Debug)]
pub struct Request {
    /// What the device reads.
    pub readable: Buffers,
    /// What the device writes.
    pub writable: Buffers,
    queue: usize,
    head: u16,
    /// Which life of the device it belongs to; after a reset the driver has forgotten it.
    epoch: u64,
}

/// The registers and queues of one device.
#[derive(Debug)]
pub struct Transport {
    description: Description,
    memory: GuestMemory,
    irq: IrqLine,
    wake: Arc<WakeHub>,
    kicks: Vec<Notify>,
    /// Told when the last request in flight is complete.
    idle: Notify,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    interrupt_status: u32,
    config_generation: u32,
    queues: Vec<Queue>,
    /// Whether requests may be taken: from the first resume on, and not while quiesced.
    running: bool,
    in_flight: usize,
    epoch: u64,
}

impl Transport {
    /// A transport whose registers lie at `address` and whose interrupt is `irq`. Quiesced until its first resume.
    pub(crate) fn new(
        context: &DeviceContext,
        address: u64,
        irq: u32,
        description: Description,
        tasks: &mut Tasks,
    ) -> Result<Arc<Self>, virtio_queue::Error> {
        let queues = description
            .queue_sizes
            .iter()
            .map(|&size| Queue::new(size))
            .collect::<Result<Vec<_>, _>>()?;
        let transport = Arc::new(Self {
            memory: context.memory.clone(),
            irq: context.irq_line(irq),
            wake: context.wake.clone(),
            kicks: queues.iter().map(|_| Notify::new()).collect(),
            idle: Notify::new(),
            description,
            state: Mutex::new(State {
                status: 0,
                device_features_select: 0,
                driver_features_select: 0,
                driver_features: 0,
                queue_select: 0,
                interrupt_status: 0,
                config_generation: 0,
                queues,
                running: false,
                in_flight: 0,
                epoch: 0,
            }),
        });
        for queue in 0..transport.kicks.len() {
            match context
                .notify
                .register_mmio(address + register::QUEUE_NOTIFY, queue as u32)
            {
                Ok(event) => {
                    tasks.spawn(&context.runtime, forward(transport.clone(), queue, event))
                }
                // Then the notification is an exit like any other write: slower, nothing else.
                Err(error) => tracing::debug!(device = transport.name(), %error, "no ioeventfd"),
            }
        }
        Ok(transport)
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.description.name
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The features that the driver has accepted.
    pub fn features(&self) -> u64 {
        self.lock().driver_features
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There may be work in a queue.
    pub fn kick(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue) {
            kick.notify_one();
        }
    }

    /// Waits until there may be work in a queue that has been looked through before.
    pub async fn kicked(&self, queue: usize) {
        self.kicks[queue].notified().await;
    }

    /// The next request of a queue. `None`: look again when kicked.
    ///
    /// What is no well-formed request is given back to the driver unserved.
    pub fn take(&self, queue: usize) -> Option<Request> {
        let mut state = self.lock();
        loop {
            if !state.running
                || state.status & (status::DRIVER_OK | status::NEEDS_RESET) != status::DRIVER_OK
            {
                return None;
            }
            let epoch = state.epoch;
            let rings = state.queues.get_mut(queue)?;
            if !rings.ready() {
                return None;
            }
            let chain = match rings.iter(self.memory.clone()) {
                Ok(mut chains) => chains.next(),
                Err(error) => {
                    self.fail(&mut state, &error);
                    return None;
                }
            };
            let Some(chain) = chain else {
                match rings.enable_notification(self.memory.as_ref()) {
                    Ok(true) => continue,
                    Ok(false) => return None,
                    Err(error) => {
                        self.fail(&mut state, &error);
                        return None;
                    }
                }
            };
            let head = chain.head_index();
            match collect(chain, &self.memory) {
                Ok((readable, writable)) => {
                    state.in_flight += 1;
                    return Some(Request {
                        readable,
                        writable,
                        queue,
                        head,
                        epoch,
                    });
                }
                Err(error) => self.give_back(&mut state, queue, head, error),
            }
        }
    }

    fn give_back(&self, state: &mut State, queue: usize, head: u16, error: ChainError) {
        tracing::warn!(device = self.name(), queue, head, %error, "the driver made no valid request");
        self.put_used(state, queue, head, 0);
    }

    /// Ends a request: `answer` writes guest memory and says how many bytes it wrote. After a reset it is not called.
    pub fn complete(
        &self,
        request: &Request,
        answer: impl FnOnce(&GuestMemoryMmap<AtomicBitmap>) -> usize,
    ) {
        let mut state = self.lock();
        if request.epoch == state.epoch {
            let bytes = answer(&self.memory);
            self.put_used(&mut state, request.queue, request.head, bytes as u32);
        }
        state.in_flight -= 1;
        if state.in_flight == 0 {
            self.idle.notify_waiters();
        }
    }

    fn put_used(&self, state: &mut State, queue: usize, head: u16, bytes: u32) {
        let rings = &mut state.queues[queue];
        let wanted = rings
            .add_used(self.memory.as_ref(), head, bytes)
            .and_then(|()| interrupt_wanted(rings, self.memory.as_ref()));
        match wanted {
            Ok(true) => self.interrupt(state, INTERRUPT_USED),
            // A guest that polls may block inside an exit until something happens: this is something.
            Ok(false) => self.wake.wake_all(),
            Err(error) => self.fail(state, &error),
        }
    }

    fn interrupt(&self, state: &mut State, bits: u32) {
        state.interrupt_status |= bits;
        self.irq.trigger();
    }

    /// The queue cannot be used any more until the driver resets the device.
    fn fail(&self, state: &mut State, error: &virtio_queue::Error) {
        tracing::warn!(device = self.name(), %error, "the driver broke a queue; it must reset the device");
        state.status |= status::NEEDS_RESET;
        if state.status & status::DRIVER_OK != 0 {
            self.interrupt(state, INTERRUPT_CONFIG);
        }
    }

    /// The guest reads.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= register::CONFIG {
            let config = &self.description.config;
            let from = ((offset - register::CONFIG) as usize).min(config.len());
            let length = data.len().min(config.len() - from);
            data[..length].copy_from_slice(&config[from..from + length]);
            return;
        }
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let state = self.lock();
        let queue = state.queues.get(state.queue_select as usize);
        match offset {
            register::MAGIC => MAGIC_VALUE,
            register::VERSION => 2,
            register::DEVICE_ID => self.description.device_id,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => {
                word(self.description.features, state.device_features_select)
            }
            register::QUEUE_SIZE_MAX => queue.map_or(0, |queue| u32::from(queue.max_size())),
            register::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready())),
            register::INTERRUPT_STATUS => state.interrupt_status,
            register::STATUS => state.status,
            register::SHARED_MEMORY_LENGTH_LOW..=register::SHARED_MEMORY_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => state.config_generation,
            _ => 0,
        }
    }

    /// The guest writes.
    pub fn write(&self, offset: u64, data: &[u8]) {
        // No device here has configuration that a driver may write, and registers are 32 bits wide.
        if let (true, Ok(data)) = (offset < register::CONFIG, <[u8; 4]>::try_from(data)) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let mut state = self.lock();
        match offset {
            register::DEVICE_FEATURES_SELECT => state.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => state.driver_features_select = value,
            register::DRIVER_FEATURES if state.status & status::FEATURES_OK == 0 => {
                let shift = match state.driver_features_select {
                    0 => 0,
                    1 => 32,
                    _ => return,
                };
                let kept = state.driver_features & !(u64::from(u32::MAX) << shift);
                state.driver_features = kept | u64::from(value) << shift;
            }
            register::QUEUE_SELECT => state.queue_select = value,
            register::QUEUE_NOTIFY => self.kick(value as usize),
            register::INTERRUPT_ACKNOWLEDGE => state.interrupt_status &= !value,
            register::STATUS => self.write_status(&mut state, value),
            _ => self.write_queue(&mut state, offset, value),
        }
    }

    fn write_status(&self, state: &mut State, value: u32) {
        if value == 0 {
            self.reset(state);
            return;
        }
        let mut accepted = (value | state.status) & status::ALL;
        if accepted & !state.status & status::FEATURES_OK != 0 {
            let features = state.driver_features;
            if features & !self.description.features != 0 || features & FEATURE_VERSION_1 == 0 {
                accepted &= !status::FEATURES_OK;
            }
            for queue in &mut state.queues {
                queue.set_event_idx(features & FEATURE_EVENT_INDEX != 0);
            }
        }
        if accepted & status::FEATURES_OK == 0 {
            accepted &= !status::DRIVER_OK;
        }
        let goes_live = accepted & !state.status & status::DRIVER_OK != 0;
        state.status = accepted;
        if goes_live {
            self.kicks.iter().for_each(Notify::notify_one);
        }
    }

    fn reset(&self, state: &mut State) {
        state.status = 0;
        state.device_features_select = 0;
        state.driver_features_select = 0;
        state.driver_features = 0;
        state.queue_select = 0;
        state.interrupt_status = 0;
        state.epoch += 1;
        for queue in &mut state.queues {
            queue.reset();
        }
    }

    fn write_queue(&self, state: &mut State, offset: u64, value: u32) {
        let select = state.queue_select as usize;
        let Some(queue) = state.queues.get_mut(select) else {
            return;
        };
        if queue.ready() {
            // A ready queue does not change but by being made unready.
            if offset == register::QUEUE_READY && value == 0 {
                queue.set_ready(false);
            }
            return;
        }
        match offset {
            register::QUEUE_SIZE => queue.set_size(u16::try_from(value).unwrap_or(0)),
            register::QUEUE_DESCRIPTORS_LOW => queue.set_desc_table_address(Some(value), None),
            register::QUEUE_DESCRIPTORS_HIGH => queue.set_desc_table_address(None, Some(value)),
            register::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            register::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            register::QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            register::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            register::QUEUE_READY if value == 1 => {
                queue.set_ready(true);
                if !queue.is_valid(self.memory.as_ref()) {
                    queue.set_ready(false);
                    self.fail(state, &virtio_queue::Error::QueueNotReady);
                } else {
                    self.kick(select);
                }
            }
            _ => {}
        }
    }

    /// Takes no new request and waits until those taken are complete.
    pub async fn quiesce(&self) {
        self.lock().running = false;
        loop {
            let mut idle = std::pin::pin!(self.idle.notified());
            idle.as_mut().enable();
            if self.lock().in_flight == 0 {
                return;
            }
            idle.await;
        }
    }

    /// Takes requests, those included that were left in the queues.
    pub fn resume(&self) {
        let mut state = self.lock();
        state.running = true;
        if state.interrupt_status != 0 {
            // The edge may have come before the interrupt controller's state was put back.
            self.irq.trigger();
        }
        self.kicks.iter().for_each(Notify::notify_one);
    }
}

/// Turns an ioeventfd's events into kicks.
async fn forward(transport: Arc<Transport>, queue: usize, event: EventFd) {
    let event = match watch_event(event) {
        Ok(event) => event,
        Err(error) => {
            // Without it the guest's notifications would be lost in silence.
            tracing::error!(device = transport.name(), %error, "cannot wait for the guest's notifications");
            return;
        }
    };
    while let Ok(mut ready) = event.readable().await {
        // Reading clears the count; an empty read is a spurious wake-up.
        let _ = event.get_ref().read();
        ready.clear_ready();
        transport.kick(queue);
    }
}

fn interrupt_wanted(
    queue: &mut Queue,
    memory: &GuestMemoryMmap<AtomicBitmap>,
) -> Result<bool, virtio_queue::Error> {
    if queue.event_idx_enabled() {
        return queue.needs_notification(memory);
    }
    // The used index must be seen before the driver's wish is read, or both sides would wait.
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    let flags: u16 = memory
        .load(
            GuestAddress(queue.avail_ring()),
            std::sync::atomic::Ordering::Relaxed,
        )
        .map_err(virtio_queue::Error::GuestMemory)?;
    Ok(u16::from_le(flags) & AVAILABLE_NO_INTERRUPT == 0)
}

fn word(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
