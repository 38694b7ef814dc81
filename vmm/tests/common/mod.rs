//! A machine with a guest of twelve bytes of code, for tests of the monitor itself.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod process;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use cluster_model::ids::{Token, VmId};
use cluster_model::settings::Settings;
use tokio::sync::mpsc;
use vm_memory::{Bytes, GuestAddress};
use vmm::boot::start::{Mode, Start, write_identity_map};
use vmm::clock;
use vmm::devices::{
    BusDevice, ExitContext, MachineEvent, Migratable, StateError, decode_state, encode_state,
};
use vmm::gate::{Lapsed, OnLapse};
use vmm::machine::{Config, DeviceSet, Machine};
use vmm::permit::{Expected, RunPermit};

/// Where the guest counts in memory.
pub const COUNTER: u64 = 0x40_0000;
/// Where the guest says its count.
pub const PORT: u64 = 0x600;
const CODE: u64 = 0x10_0000;

/// Counts for ever: in memory, and to a port.
const GUEST: &[u8] = &[
    0x48, 0xc7, 0xc3, 0x00, 0x00, 0x40, 0x00, // mov rbx, 0x400000
    0x48, 0xff, 0x03, // inc qword [rbx]
    0x8b, 0x03, // mov eax, [rbx]
    0x66, 0xba, 0x00, 0x06, // mov dx, 0x600
    0xef, // out dx, eax
    0xeb, 0xf4, // jmp to the inc
];

/// Whether the test can run; says so when it cannot.
pub fn kvm(test: &str) -> bool {
    let there = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if !there {
        proto::skip!(test, "/dev/kvm cannot be opened");
    }
    there
}

/// Takes the guest's counts; its state is the last one.
#[derive(Debug, Default)]
pub struct Counter {
    pub last: AtomicU64,
    pub skipped: AtomicU64,
    /// Keeps the vCPU inside the device.
    pub stuck: AtomicBool,
    /// How many are inside, stuck.
    pub inside: AtomicU64,
}

impl BusDevice for Counter {
    fn read(&self, _: u64, data: &mut [u8], _: &ExitContext<'_>) {
        data.fill(0);
    }
    fn write(&self, _: u64, data: &[u8], _: &ExitContext<'_>) {
        let count = u64::from(u32::from_le_bytes(data.try_into().unwrap_or_default()));
        let before = self.last.swap(count, Ordering::SeqCst);
        if count != before + 1 {
            self.skipped.fetch_add(1, Ordering::SeqCst);
        }
        if self.stuck.load(Ordering::SeqCst) {
            self.inside.fetch_add(1, Ordering::SeqCst);
            while self.stuck.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            self.inside.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

#[async_trait]
impl Migratable for Counter {
    fn kind(&self) -> String {
        "counter".into()
    }
    fn version(&self) -> u32 {
        1
    }
    fn save(&self) -> Result<Vec<u8>, StateError> {
        encode_state("counter", &self.last.load(Ordering::SeqCst))
    }
    fn restore(&self, _: u32, state: &[u8]) -> Result<(), StateError> {
        self.last
            .store(decode_state("counter", state)?, Ordering::SeqCst);
        Ok(())
    }
}

impl Counter {
    /// Waits until the guest has counted beyond `count`.
    pub fn wait_beyond(&self, count: u64) -> u64 {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let last = self.last.load(Ordering::SeqCst);
            if last > count {
                return last;
            }
            assert!(
                Instant::now() < deadline,
                "the guest does not count beyond {count}"
            );
            std::thread::yield_now();
        }
    }
}

/// A machine with the counting guest.
pub struct Counting {
    pub machine: Machine,
    pub counter: Arc<Counter>,
    pub events: mpsc::Receiver<MachineEvent>,
    pub lapses: mpsc::UnboundedReceiver<Lapsed>,
    /// Whoever holds it holds up the gate's own thread, after the lapse that it is about to tell of.
    pub lapse_hold: Arc<tokio::sync::Mutex<()>>,
}

/// Builds one; `empty` leaves it without a guest, for a restore.
pub fn counting(vcpus: u32, empty: bool) -> Counting {
    with_code(GUEST, vcpus, empty)
}

/// Builds one with other code.
pub fn with_code(code: &'static [u8], vcpus: u32, empty: bool) -> Counting {
    let counter = Arc::new(Counter::default());
    let (send_event, events) = mpsc::channel(16);
    let (send_lapse, lapses) = mpsc::unbounded_channel();
    let config = Config {
        kvm: vmm::kvm::vm::open().expect("KVM"),
        memory_mib: 16,
        vcpus,
        disks: Vec::new(),
        on_lapse: OnLapse::Freeze,
        run_log: None,
    };
    let on_bus = counter.clone();
    let lapse_hold = Arc::new(tokio::sync::Mutex::new(()));
    let held = lapse_hold.clone();
    let machine = Machine::assemble(
        config,
        send_event,
        |_| {
            let mut set = DeviceSet::default();
            set.buses.pio.insert(PORT, 4, on_bus.clone())?;
            set.migratable.push(on_bus);
            Ok(set)
        },
        (!empty).then_some(|memory: &vmm::devices::GuestMemory, _: u64| {
            write_identity_map(memory, 16 << 20, true)?;
            memory.write_slice(code, GuestAddress(CODE))?;
            Ok(Start {
                mode: Mode::User64,
                rip: CODE,
                rdi: 0,
                rsi: 0,
                rbx: 0,
                on_every_vcpu: false,
            })
        }),
        move |lapsed| {
            let _ = send_lapse.send(lapsed);
            drop(held.blocking_lock());
        },
    )
    .expect("a machine");
    Counting {
        machine,
        counter,
        events,
        lapses,
        lapse_hold,
    }
}

/// How late a guest was stopped (CLOCK_MONOTONIC) for its deadline (CLOCK_BOOTTIME).
pub fn late(stopped_ns: u64, deadline_ns: u64) -> Duration {
    let apart_ns = clock::boottime_ns().saturating_sub(clock::monotonic_ns());
    Duration::from_nanos((stopped_ns + apart_ns).saturating_sub(deadline_ns))
}

/// How late a freeze may come: as much as a lease's margin allows where it is smallest in practice.
pub fn margin() -> Duration {
    Duration::from_millis(Settings::fast().margin_ms().into())
}

/// A permit for the next `lease`.
pub fn permit(lease: Duration) -> RunPermit {
    let now = clock::boottime_ns();
    let wire = proto::monitor::RunPermit {
        vm_id: 1,
        token: 5,
        log_index: 1,
        lease_deadline_ns: now + lease.as_nanos() as u64,
        nonce: 3,
    };
    let expected = Expected {
        vm: VmId(1),
        nonce: 3,
        highest_token: Token(5),
        disk_token: Token(5),
    };
    RunPermit::new(&wire, &expected, now).expect("a valid permit")
}
