//! The vCPU threads: parked, let go, paused; and what each exit leads to.
//!
//! ```text
//!            let_go                      pause (signal + immediate_exit)
//!   parked ─────────► in KVM_RUN ⇄ exits ───────────────► last exit completed ──► parked
//!     │                 ▲      │ deadline passed                ▲
//!     │                 └── stands aside ───────────────────────┘
//!     └─ jobs: save, restore, first registers
//! ```
//!
//! A vCPU looks at the lease's deadline itself before each entry, so that no late timer and no thread that gets its
//! turn late lets it go on. What is left is one entry: between the look and KVM_RUN the thread may be preempted, or
//! its process stopped, for any time, and then it enters with a deadline that has passed meanwhile. It stays in the guest
//! until the gate's thread, whose timer has fired by then, gets its turn and kicks it, or until the guest's next exit; an
//! entry that was under way when the process was stopped does not count, for KVM_RUN answers a stop with EINTR and is
//! not restarted. So after a SIGCONT the guest may execute for as long as the host takes to wake one thread, and that
//! only where the stop came in the few instructions between look and entry.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, compiler_fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, mpsc as std_mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;

use crate::clock;
use crate::confine::{ThreadKind, narrow};
use crate::devices::{Bus, ExitContext, MachineEvent, MachineEvents, WakeHub};
use crate::kvm::exits::{self, Exit};
use crate::kvm::kick::{Registration, Target};
use crate::run_log::{RunLog, VcpuRunLog};

/// How often a vCPU that has not stopped is kicked again: a signal is never lost, but a vCPU may
/// be inside a device that was woken just before it began to wait.
const KICK_AGAIN: Duration = Duration::from_millis(20);

/// Accesses that completing one instruction may still need; string I/O goes in bursts of a page.
const COMPLETING_EXITS_MAX: usize = 8192;

/// How long HLT lasts where no irqchip wakes the vCPU.
const HALT: Duration = Duration::from_millis(100);

/// How long a vCPU whose deadline has passed stands aside before it looks again: the gate's thread, which is on its
/// way, ends the wait; what is looked for is an extension that was being entered when the vCPU looked.
const STAND_ASIDE: Duration = Duration::from_millis(5);

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
    /// CLOCK_BOOTTIME from which on no vCPU enters the guest; 0 until there is one.
    deadline_ns: Arc<AtomicU64>,
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
        events: MachineEvents,
        run_log: Option<&Arc<RunLog>>,
    ) -> std::io::Result<Vcpus> {
        let deadline_ns = Arc::new(AtomicU64::new(0));
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
                deadline_ns: deadline_ns.clone(),
                run_log: run_log.map(|log| log.of_vcpu(index as u32)),
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
        Ok(Vcpus {
            threads,
            wake,
            deadline_ns,
        })
    }

    /// Moves the deadline that every vCPU looks at. Only the gate calls this.
    pub(crate) fn set_deadline(&self, deadline_ns: u64) {
        self.deadline_ns.store(deadline_ns, Ordering::SeqCst);
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
    /// When a vCPU does not stop within `timeout`; the others are stopped, and it will be. Counted is the time in which
    /// vCPUs could have stopped: what the whole process stood still for is none of it.
    pub fn pause(&self, timeout: Duration) -> Result<u64, PauseTimedOut> {
        let begun = Instant::now();
        let mut looks = timeout.as_millis() / KICK_AGAIN.as_millis();
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
                if looks == 0 {
                    let waited = begun.elapsed();
                    return Err(PauseTimedOut { index, waited });
                }
                let (again, wait) = thread
                    .shared
                    .changed
                    .wait_timeout(slot, KICK_AGAIN)
                    .unwrap_or_else(|poisoned| poisoned.into_inner());
                slot = again;
                looks -= u128::from(wait.timed_out());
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
    events: MachineEvents,
    deadline_ns: Arc<AtomicU64>,
    run_log: Option<VcpuRunLog>,
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
                self.events.tell(event);
            }
        }
    }

    /// In and out of the guest until a pause or an end.
    fn run(&self, vcpu: &mut VcpuFd) -> Option<MachineEvent> {
        if let Some(log) = &self.run_log {
            log.begin_anew();
        }
        loop {
            // In this order: a kick before the look at `pause` is seen there, one after it stays in
            // `immediate_exit` and ends the next KVM_RUN at once.
            vcpu.set_kvm_immediate_exit(0);
            compiler_fence(Ordering::SeqCst);
            if self.shared.pause.load(Ordering::SeqCst) {
                if let Some(log) = &self.run_log {
                    // It may have been outside the guest, in a device, when the gate closed at its deadline.
                    let deadline_ns = self.deadline_ns.load(Ordering::SeqCst);
                    if clock::boottime_ns() >= deadline_ns {
                        log.stand(deadline_ns);
                    }
                }
                return None;
            }
            // Before the look at the deadline: whoever reads the log sees no entry after it that there was not.
            let entered_ns = self.run_log.as_ref().map(|_| clock::monotonic_ns());
            let deadline_ns = self.deadline_ns.load(Ordering::SeqCst);
            if clock::boottime_ns() >= deadline_ns {
                self.stand_aside(deadline_ns);
                continue;
            }
            if let After::Ended(event) = self.enter(vcpu, entered_ns, deadline_ns) {
                return Some(event);
            }
        }
    }

    /// Waits outside the guest for the gate, or for another deadline.
    fn stand_aside(&self, deadline_ns: u64) {
        if let Some(log) = &self.run_log {
            log.stand(deadline_ns);
        }
        ExitContext::new(self.index, &self.wake, &self.seen).wait(STAND_ASIDE);
    }

    /// Into the guest, and out of it again.
    fn enter(&self, vcpu: &mut VcpuFd, entered_ns: Option<u64>, deadline_ns: u64) -> After {
        let log = self.run_log.as_ref().zip(entered_ns);
        if let Some((log, entered_ns)) = log {
            log.enter(entered_ns, deadline_ns);
        }
        let exit = exits::run(vcpu);
        if let Some((log, _)) = log {
            let interrupted = matches!(exit, Exit::Interrupted);
            let left_ns = clock::monotonic_ns();
            // Read after the exit: the deadline never moves once it has passed, and is moved back no further than to
            // the moment itself.
            log.leave(
                left_ns,
                self.deadline_ns.load(Ordering::SeqCst),
                interrupted,
            );
        }
        self.follow(exit)
    }

    /// Completes the last exit's instruction without entering the guest, so that registers are whole.
    fn complete(&self, vcpu: &mut VcpuFd) -> Option<MachineEvent> {
        for _ in 0..COMPLETING_EXITS_MAX {
            vcpu.set_kvm_immediate_exit(1);
            match self.follow(exits::run(vcpu)) {
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

    fn follow(&self, exit: Exit<'_>) -> After {
        let context = ExitContext::new(self.index, &self.wake, &self.seen);
        match exit {
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
