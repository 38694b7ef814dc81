//! A machine's devices without KVM: a serial port, a keyboard controller, the self-check port, a disk in memory.

use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use cluster_model::Token;
use storage_broker::disk::{
    Disk, DiskError, DiskState, DiskStatistics, DiskStatus, DrainError, Drained, RekeyError,
};
use tokio::sync::{mpsc, watch};
use vm_memory::GuestAddress;
use vmm::console::Console;
use vmm::devices::i8042::I8042;
use vmm::devices::selfcheck::SelfCheck;
use vmm::devices::serial::Serial;
use vmm::devices::virtio::block::{Block, BlockConfig};
use vmm::devices::{
    Bus, DeviceContext, ExitContext, GuestMemory, InterruptController, MachineEvent, MachineEvents,
    Migratable, NotifyRegistry, WakeHub,
};
use vmm::layout::{virtio_irq, virtio_mmio_address};
use vmm_sys_util::eventfd::EventFd;

/// Memory of the machine, MiB.
pub const MEMORY_MIB: u64 = 8;
/// The size of its disk.
const DISK_BYTES: u64 = 1 << 18;
/// Where the self-checking guest would keep its report.
const REPORT_ADDRESS: u64 = 0x3000;
/// How often the devices' tasks get the chance to do what they can.
const TURNS: usize = 8;

/// The devices.
pub struct Bench {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// Those with a state.
    pub devices: Vec<Arc<dyn Migratable>>,
    ports: Bus,
    mmio: Bus,
    wake: Arc<WakeHub>,
    seen: AtomicU64,
    _events: mpsc::Receiver<MachineEvent>,
}

/// Interrupts go nowhere.
struct NoInterrupts;

impl InterruptController for NoInterrupts {
    fn set_line(&self, _: u32, _: bool) {}
}

/// Notifications come as writes to the register.
struct NoNotifications;

impl NotifyRegistry for NoNotifications {
    fn register_mmio(&self, _: u64, _: u32) -> io::Result<EventFd> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Bench {
    /// The devices of a machine, quiesced, within a runtime; `None` when the host gives no memory.
    pub fn new() -> Option<Bench> {
        let memory = vmm::memory::allocate(MEMORY_MIB).ok()?;
        let (sender, events) = mpsc::channel(4);
        let wake = Arc::new(WakeHub::default());
        let context = DeviceContext {
            memory: memory.clone(),
            interrupts: Arc::new(NoInterrupts),
            notify: Arc::new(NoNotifications),
            wake: wake.clone(),
            runtime: tokio::runtime::Handle::current(),
            events: MachineEvents::new(sender),
        };
        let serial = Serial::new(&context, 4, Arc::new(Console::default()));
        let keyboard = I8042::new(&context);
        let report = SelfCheck::new(&context, REPORT_ADDRESS, None);
        let config = BlockConfig {
            index: 0,
            address: virtio_mmio_address(0),
            irq: virtio_irq(0),
            serial: "vm7-disk0".into(),
            read_only: false,
        };
        let block = Block::new(&context, &config, Arc::new(MemoryDisk::default())).ok()?;
        let (mut ports, mut mmio) = (Bus::default(), Bus::default());
        ports.insert(0x3f8, 8, serial.clone()).ok()?;
        ports.insert(0x60, 5, keyboard.clone()).ok()?;
        ports.insert(0x510, 16, report.clone()).ok()?;
        mmio.insert(virtio_mmio_address(0), 0x1000, block.clone())
            .ok()?;
        Some(Bench {
            memory,
            devices: vec![serial, keyboard, report, block],
            ports,
            mmio,
            wake,
            seen: AtomicU64::new(0),
            _events: events,
        })
    }

    /// The guest writes to the disk's registers.
    pub fn write_register(&self, offset: u64, data: &[u8]) {
        self.mmio
            .write(virtio_mmio_address(0) + offset, data, &self.exit());
    }

    /// The guest reads one.
    pub fn read_register(&self, offset: u64, data: &mut [u8]) {
        self.mmio
            .read(virtio_mmio_address(0) + offset, data, &self.exit());
    }

    /// The guest writes to a port. What would make it wait does not.
    pub fn write_port(&self, port: u16, data: &[u8]) {
        self.wake.wake_all();
        self.ports.write(u64::from(port), data, &self.exit());
    }

    /// The guest reads from one.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        self.ports.read(u64::from(port), data, &self.exit());
    }

    fn exit(&self) -> ExitContext<'_> {
        ExitContext::new(0, &self.wake, &self.seen)
    }

    /// The guest writes to its own memory, as far as it has some there.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        use vm_memory::Bytes as _;
        let _ = self.memory.write_slice(data, GuestAddress(address));
    }

    /// Lets the devices' tasks do what they can without waiting for anything.
    pub async fn turn(&self) {
        for _ in 0..TURNS {
            tokio::task::yield_now().await;
        }
    }
}

/// A disk that answers at once, and refuses what a monitor must never ask.
#[derive(Debug)]
struct MemoryDisk {
    data: Mutex<Vec<u8>>,
    status: watch::Sender<DiskStatus>,
}

impl Default for MemoryDisk {
    fn default() -> MemoryDisk {
        MemoryDisk {
            data: Mutex::new(vec![0; DISK_BYTES as usize]),
            status: watch::Sender::new(DiskStatus {
                state: DiskState::Ready,
                token: Token(1),
            }),
        }
    }
}

impl MemoryDisk {
    fn range(offset: u64, length: u64) -> Result<std::ops::Range<usize>, DiskError> {
        match offset.checked_add(length) {
            Some(end) if end <= DISK_BYTES => Ok(offset as usize..end as usize),
            _ => Err(DiskError::OutOfRange {
                offset,
                length,
                size_bytes: DISK_BYTES,
            }),
        }
    }
}

#[async_trait]
impl Disk for MemoryDisk {
    fn size_bytes(&self) -> u64 {
        DISK_BYTES
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Bytes, DiskError> {
        let range = MemoryDisk::range(offset, u64::from(length))?;
        let data = self.data.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Bytes::copy_from_slice(&data[range]))
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
        let range = MemoryDisk::range(offset, data.len() as u64)?;
        self.data.lock().unwrap_or_else(PoisonError::into_inner)[range].copy_from_slice(&data);
        Ok(())
    }

    async fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn hold(&self) {}

    fn release(&self) {}

    fn is_held(&self) -> bool {
        false
    }

    fn watch(&self) -> watch::Receiver<DiskStatus> {
        self.status.subscribe()
    }

    fn writes_unanswered(&self) -> bool {
        false
    }

    async fn rekey(&self, _: Token, _: Duration) -> Result<(), RekeyError> {
        Ok(())
    }

    async fn drain(&self, _: Duration) -> Result<Drained, DrainError> {
        Ok(Drained)
    }

    fn statistics(&self) -> DiskStatistics {
        DiskStatistics::default()
    }
}
