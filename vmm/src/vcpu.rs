//! The vCPU threads: parked, let go, paused; and what each exit leads to.
//!
//! ```text
//!            let_go                      pause (signal + immediate_exit)
//!   parked ─────────► in KVM_RUN ⇄ exits ───────────────► last exit completed ──► parked
//!     └─ jobs: save, restore, first registers
//! ```

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, compiler_fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, mpsc as std_mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use tokio::sync::mpsc;

use crate::clock;
use crate::confine::{ThreadKind, narrow};
use crate::devices::{Bus, ExitContext, MachineEvent, WakeHub};
use crate::kvm::exits::{self, Exit};
use crate::kvm::kick::{Registration, Target};

/// How often a vCPU that has not stopped is kicked again: a signal is never lost, but a vCPU may
/// be inside a device that was woken just before it began to wait.
const KICK_AGAIN: Duration = Duration::from_millis(20);

/// Accesses that completing one instruction may still need; string I/O goes in bursts of a page.
const COMPLETING_EXITS_MAX: usize = 8192;

/// How long HLT lasts where no irqchip wakes the vCPU.
const HALT: Duration = Duration::from_millis(100);

/// The buses that exits lead to.
#[derive(Clone, Debug, Default)]
pub struct Buses {
    /// Ports.
    pub pio: Bus,
    /// Guest-physical addresses outside RAM.
    pub mmio: Bus,
}

/// vCPUs did not stop in time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("vCPU {index} did not stop within {waited:?}")]
pub struct PauseTimedOut {
    /// Which.
    pub index: usize,
    /// How long was waited.
    pub waited: Duration,
}

/// The vCPU threads of one machine.
#[derive(Debug)]
pub struct Vcpus {
    threads: Vec<Thread>,
    wake: Arc<WakeHub>,
}

type Job = Box<dyn FnOnce(&mut VcpuFd) + Send>;

#[derive(Debug)]
struct Thread {
    shared: Arc<Shared>,
    target: Target,
    handle: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    slot: Mutex<Slot>,
    changed: Condvar,
    pause: AtomicBool,
}

#[derive(Default)]
struct Slot {
    command: Command,
    parked: bool,
    /// CLOCK_MONOTONIC when KVM_RUN was left for good.
    stopped_ns: u64,
    job: Option<Job>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Command {
    #[default]
    Park,
    Run,
    Exit,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot")
            .field("command", &self.command)
            .field("parked", &self.parked)
            .finish()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wait<'a>(&self, slot: MutexGuard<'a, Slot>) -> MutexGuard<'a, Slot> {
        self.changed
            .wait(slot)
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Vcpus {
    /// Starts a parked thread for each vCPU.
    ///
    /// # Errors
    /// When the host has no thread left.
    pub fn start(
        vcpus: Vec<VcpuFd>,
        buses: &Buses,
        wake: Arc<WakeHub>,
        events: mpsc::Sender<MachineEvent>,
    ) -> std::io::Result<Vcpus> {
        let mut threads = Vec::with_capacity(vcpus.len());
        for (index, mut fd) in vcpus.into_iter().enumerate() {
            let shared = Arc::new(Shared::default());
            // Its thread is not in the guest, whether or not it has begun.
            shared.lock().parked = true;
            let (send_target, target) = std_mpsc::channel();
            let thread = Runner {
                index: index as u32,
                shared: shared.clone(),
                buses: buses.clone(),
                wake: wake.clone(),
                seen: AtomicU64::new(0),
                events: events.clone(),
            };
            let handle = std::thread::Builder::new()
                .name(format!("vcpu-{index}"))
                .spawn(move || {
                    narrow(ThreadKind::Vcpu);
                    let registration = Registration::of_this_thread(&mut fd);
                    // The receiver waits for it just below.
                    let _ = send_target.send(registration.target());
                    thread.serve(&mut fd);
                    drop(registration);
                })?;
            let target = target.recv().map_err(std::io::Error::other)?;
            threads.push(Thread {
                shared,
                target,
                handle: Some(handle),
            });
        }
        Ok(Vcpus { threads, wake })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// Lets the guest run. Only the gate calls this, with a permit in its hand.
    pub(crate) fn let_go(&self) {
        for thread in &self.threads {
            let mut slot = thread.shared.lock();
            thread.shared.pause.store(false, Ordering::SeqCst);
            slot.command = Command::Run;
            thread.shared.changed.notify_all();
        }
    }

    /// Stops the guest; answers when the last vCPU left it (CLOCK_MONOTONIC ns, 0 if none ever ran).
    /// Pausing what is paused changes nothing.
    ///
    /// # Errors
    /// When a vCPU does not stop within `timeout`; the others are stopped, and it will be.
    pub fn pause(&self, timeout: Duration) -> Result<u64, PauseTimedOut> {
        let begun = Instant::now();
        for thread in &self.threads {
            let mut slot = thread.shared.lock();
            slot.command = Command::Park;
            thread.shared.pause.store(true, Ordering::SeqCst);
        }
        self.wake.wake_all();
        for thread in &self.threads {
            thread.kick();
        }
        let mut stopped_ns = 0;
        for (index, thread) in self.threads.iter().enumerate() {
            let mut slot = thread.shared.lock();
            while !slot.parked {
                let waited = begun.elapsed();
                if waited > timeout {
                    return Err(PauseTimedOut { index, waited });
                }
                let (again, _) = thread
                    .shared
                    .changed
                    .wait_timeout(slot, KICK_AGAIN)
                    .unwrap_or_else(|poisoned| poisoned.into_inner());
                slot = again;
                if !slot.parked {
                    self.wake.wake_all();
                    thread.kick();
                }
            }
            stopped_ns = stopped_ns.max(slot.stopped_ns);
        }
        Ok(stopped_ns)
    }

    /// Whether every vCPU is parked.
    pub fn are_parked(&self) -> bool {
        self.threads
            .iter()
            .all(|thread| thread.shared.lock().parked)
    }

    /// Runs `job` on vCPU `index`, on its own thread, as soon as it is parked.
    pub fn on_vcpu<T: Send + 'static>(
        &self,
        index: usize,
        job: impl FnOnce(&mut VcpuFd) -> T + Send + 'static,
    ) -> Option<T> {
        let (send, answer) = std_mpsc::channel();
        let thread = self.threads.get(index)?;
        {
            let mut slot = thread.shared.lock();
            while slot.job.is_some() {
                slot = thread.shared.wait(slot);
            }
            slot.job = Some(Box::new(move |vcpu| {
                // A caller that is gone needs no answer.
                let _ = send.send(job(vcpu));
            }));
            thread.shared.changed.notify_all();
        }
        answer.recv().ok()
    }
}

impl Thread {
    fn kick(&self) {
        if let Err(error) = self.target.kick() {
            tracing::error!(%error, "cannot kick a vCPU");
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        for thread in &self.threads {
            let mut slot = thread.shared.lock();
            slot.command = Command::Exit;
            thread.shared.pause.store(true, Ordering::SeqCst);
            thread.shared.changed.notify_all();
        }
        self.wake.wake_all();
        for thread in &mut self.threads {
            if let Some(handle) = thread.handle.take() {
                while !handle.is_finished() {
                    // Joined only after it ended, so that the thread's id stays valid for kicks.
                    self.wake.wake_all();
                    if let Err(error) = thread.target.kick() {
                        tracing::debug!(%error, "a vCPU thread ended");
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
                if handle.join().is_err() {
                    tracing::error!("a vCPU thread panicked");
                }
            }
        }
    }
}

/// What one thread works with.
struct Runner {
    index: u32,
    shared: Arc<Shared>,
    buses: Buses,
    wake: Arc<WakeHub>,
    seen: AtomicU64,
    events: mpsc::Sender<MachineEvent>,
}

/// What an exit led to.
enum After {
    /// Into the guest again.
    Enter,
    /// The vCPU was interrupted: look whether to pause.
    Interrupted,
    /// The machine ends or fails.
    Ended(MachineEvent),
}

impl Runner {
    fn serve(&self, vcpu: &mut VcpuFd) {
        loop {
            let mut slot = self.shared.lock();
            slot.parked = true;
            self.shared.changed.notify_all();
            loop {
                if let Some(job) = slot.job.take() {
                    drop(slot);
                    job(vcpu);
                    slot = self.shared.lock();
                    self.shared.changed.notify_all();
                    continue;
                }
                match slot.command {
                    Command::Exit => return,
                    Command::Run => break,
                    Command::Park => slot = self.shared.wait(slot),
                }
            }
            slot.parked = false;
            drop(slot);
            let ended = self.run(vcpu);
            let stopped_ns = clock::monotonic_ns();
            let ended = ended.or_else(|| self.complete(vcpu));
            // Guests that watch their own stalls are told that they were stopped on purpose; a guest
            // without kvmclock has nothing to be told.
            if vcpu.kvmclock_ctrl().is_err() {
                tracing::trace!("the guest uses no kvmclock");
            }
            let mut slot = self.shared.lock();
            slot.stopped_ns = stopped_ns;
            if let Some(event) = ended {
                if slot.command == Command::Run {
                    slot.command = Command::Park;
                }
                // Full only when the machine has been told already.
                let _ = self.events.try_send(event);
            }
        }
    }

    /// In and out of the guest until a pause or an end.
    fn run(&self, vcpu: &mut VcpuFd) -> Option<MachineEvent> {
        loop {
            // In this order: a kick before the look at `pause` is seen there, one after it stays in
            // `immediate_exit` and ends the next KVM_RUN at once.
            vcpu.set_kvm_immediate_exit(0);
            compiler_fence(Ordering::SeqCst);
            if self.shared.pause.load(Ordering::SeqCst) {
                return None;
            }
            if let After::Ended(event) = self.step(vcpu) {
                return Some(event);
            }
        }
    }

    /// Completes the last exit's instruction without entering the guest, so that registers are whole.
    fn complete(&self, vcpu: &mut VcpuFd) -> Option<MachineEvent> {
        for _ in 0..COMPLETING_EXITS_MAX {
            vcpu.set_kvm_immediate_exit(1);
            match self.step(vcpu) {
                After::Interrupted => return None,
                After::Enter => {}
                After::Ended(event) => return Some(event),
            }
        }
        Some(MachineEvent::Failed(format!(
            "vCPU {} cannot complete its last instruction",
            self.index
        )))
    }

    fn step(&self, vcpu: &mut VcpuFd) -> After {
        let context = ExitContext::new(self.index, &self.wake, &self.seen);
        match exits::run(vcpu) {
            Exit::PioRead { port, size, data } => {
                for access in data.chunks_mut(size) {
                    self.buses.pio.read(port.into(), access, &context);
                }
            }
            Exit::PioWrite { port, size, data } => {
                for access in data.chunks(size) {
                    self.buses.pio.write(port.into(), access, &context);
                }
            }
            Exit::MmioRead { address, data } => self.buses.mmio.read(address, data, &context),
            Exit::MmioWrite { address, data } => self.buses.mmio.write(address, data, &context),
            Exit::Interrupted => return After::Interrupted,
            Exit::Halted => {
                context.wait(HALT);
            }
            Exit::ShutDown => return After::Ended(MachineEvent::ShutDown),
            Exit::Failed(reason) => {
                return After::Ended(MachineEvent::Failed(format!(
                    "vCPU {}: {reason}",
                    self.index
                )));
            }
        }
        After::Enter
    }
}
