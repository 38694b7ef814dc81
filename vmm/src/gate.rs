//! The gate: the one place where the guest is let go and where it is stopped, with its lease deadline.
//!
//! [`Gate::run`] takes a [`RunPermit`] by value; nothing else lets vCPUs go. A thread of its own
//! watches the deadline on CLOCK_BOOTTIME and closes the gate without being told and without help
//! of the async runtime: vCPUs stopped, disks held. vCPUs look at the deadline too, before each entry into the guest.
//!
//! ```text
//!            run (permit)                   stop_vcpus
//!   closed ───────────────► open ────────────────────────► draining: vCPUs stopped, disks complete their I/O
//!     ▲                      │ deadline, close                │ deadline, hold, close
//!     └──────────────────────┴────────────────────────────────┘
//! ```
//!
//! A gate that drains still writes to its disks, so its deadline counts as an open gate's does: where nothing but time
//! protects a disk (a `dir:` volume behind a watchdog), another node may own it from the lease's end on.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use cluster_model::settings::MARGIN_MS_MIN;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use storage_broker::disk::Disk;

use crate::clock;
use crate::confine::{ThreadKind, narrow};
use crate::devices::{MachineEvents, Migratable};
use crate::permit::RunPermit;
use crate::vcpu::{PauseTimedOut, Vcpus};

/// How long vCPUs may take to stop: hundreds of times what is usual, and less than the smallest margin between a freeze
/// and a loss, so that a monitor that cannot stop its guest says so before another node may run it.
pub const PAUSE_TIMEOUT: Duration = Duration::from_millis(400);

const _: () = assert!(PAUSE_TIMEOUT.as_millis() < MARGIN_MS_MIN as u128);

/// How late a step of a clock that a test shifts is seen: the kernel's timers know nothing of it.
const STEP_LOOK: Duration = Duration::from_millis(10);

/// What follows when the lease runs out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLapse {
    /// The gate closes.
    #[default]
    Freeze,
    /// The guest runs on until the storage server refuses it.
    RunUntilFenced,
}

/// The gate of one machine.
pub struct Gate {
    vcpus: Vcpus,
    devices: Vec<Arc<dyn Migratable>>,
    disks: Vec<Arc<dyn Disk>>,
    events: MachineEvents,
    on_lapse: OnLapse,
    inner: Mutex<Inner>,
    timer: Arc<TimerFd>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The permit that the guest runs under; the gate is open exactly while there is one.
    permit: Option<RunPermit>,
    deadline_ns: u64,
    /// The life of `clusterd` that last moved the deadline back: earlier ones no longer move it.
    session: u64,
    /// The vCPUs were stopped and the disks left to complete their I/O.
    draining: bool,
}

/// The permit's deadline passed on its way here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the permit's lease ended before the guest could be let go: renew it first")]
pub struct TooLate;

/// A call of a life of `clusterd` that has ended: a later one has moved the deadline back since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the call is of an earlier life of clusterd, registered by entry {offered}, and this monitor obeys that of entry {known}"
)]
pub struct EarlierLife {
    /// The call's.
    pub offered: u64,
    /// Whom it obeys.
    pub known: u64,
}

/// The lease ran out and the gate closed by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lapsed {
    /// When the last vCPU stopped (CLOCK_MONOTONIC ns), or why not all did.
    pub stopped: Result<u64, PauseTimedOut>,
}

impl Inner {
    /// Whether the machine uses its lease: it executes, or its disks complete their I/O.
    fn is_used(&self) -> bool {
        self.permit.is_some() || self.draining
    }

    /// Whether a lease that is used has run out.
    fn is_due(&self) -> bool {
        self.is_used() && clock::boottime_ns() >= self.deadline_ns
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

impl Gate {
    /// A closed gate; `lapsed` is called, from the deadline's thread, after the gate closed by itself.
    ///
    /// # Errors
    /// When the host has no timer or no thread left.
    pub fn new(
        vcpus: Vcpus,
        devices: Vec<Arc<dyn Migratable>>,
        disks: Vec<Arc<dyn Disk>>,
        events: MachineEvents,
        on_lapse: OnLapse,
        lapsed: impl Fn(Lapsed) + Send + 'static,
    ) -> io::Result<Arc<Gate>> {
        for disk in &disks {
            disk.hold();
        }
        let timer = Arc::new(TimerFd::new(
            ClockId::CLOCK_BOOTTIME,
            TimerFlags::TFD_CLOEXEC,
        )?);
        let inner = Mutex::default();
        let gate = Arc::new(Gate {
            vcpus,
            devices,
            disks,
            events,
            on_lapse,
            inner,
            timer: timer.clone(),
        });
        let watched = Arc::downgrade(&gate);
        std::thread::Builder::new()
            .name("lease".into())
            .spawn(move || {
                narrow(ThreadKind::Lease);
                watch(&watched, &timer, lapsed);
            })?;
        Ok(gate)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Lets the guest run, and uses the permit up; answers when (CLOCK_MONOTONIC ns). With the gate
    /// open already it moves the deadline.
    ///
    /// # Errors
    /// When the permit's deadline has passed since it was made.
    pub fn run(&self, permit: RunPermit) -> Result<u64, TooLate> {
        let mut inner = self.lock();
        // What a kept permit said of the lease may have been taken back since.
        let deadline_ns = if permit.is_kept() {
            inner.deadline_ns
        } else {
            inner.deadline_ns.max(permit.deadline_ns())
        };
        if clock::boottime_ns() >= permit.deadline_ns().min(deadline_ns) {
            return Err(TooLate);
        }
        self.set_deadline(&mut inner, deadline_ns);
        inner.draining = false;
        let mut now = clock::monotonic_ns();
        if inner.permit.replace(permit).is_none() {
            for disk in &self.disks {
                disk.release();
            }
            for device in &self.devices {
                device.resume();
            }
            now = clock::monotonic_ns();
            self.vcpus.let_go();
            // What the guest had asked for when it was stopped, here or where it came from.
            self.events.repeat();
        }
        Ok(now)
    }

    /// Sets the deadline, for the timer and for the vCPUs.
    fn set_deadline(&self, inner: &mut Inner, deadline_ns: u64) {
        inner.deadline_ns = deadline_ns;
        self.vcpus.set_deadline(match self.on_lapse {
            OnLapse::Freeze => inner.deadline_ns,
            OnLapse::RunUntilFenced => u64::MAX,
        });
        self.arm(inner.deadline_ns);
    }

    /// Moves the deadline; never lets a stopped guest run, and never moves it back.
    ///
    /// # Errors
    /// When a later life of `clusterd` than `session` has moved the deadline back.
    pub fn extend(&self, deadline_ns: u64, session: u64) -> Result<(), EarlierLife> {
        let mut inner = self.lock();
        inner.check(session)?;
        // A deadline already passed is not saved by an extension that came first to the lock: the
        // timer's thread closes the gate, and only a permit opens it.
        if !inner.is_due() || self.on_lapse == OnLapse::RunUntilFenced {
            let later = inner.deadline_ns.max(deadline_ns);
            self.set_deadline(&mut inner, later);
        }
        Ok(())
    }

    /// Moves the deadline back to `deadline_ns`, if it is later, and from now on obeys no earlier life of
    /// `clusterd` than `session`: one that has ended may have more time for the guest on its way.
    ///
    /// # Errors
    /// When it obeys a later one already.
    pub fn shorten(&self, deadline_ns: u64, session: u64) -> Result<(), EarlierLife> {
        let mut inner = self.lock();
        inner.check(session)?;
        inner.session = session;
        // Time that has passed was the guest's by the earlier deadline.
        let deadline_ns = deadline_ns.max(clock::boottime_ns());
        if inner.deadline_ns > deadline_ns {
            self.set_deadline(&mut inner, deadline_ns);
        }
        Ok(())
    }

    /// The deadline, CLOCK_BOOTTIME nanoseconds; 0 before the first.
    pub fn deadline_ns(&self) -> u64 {
        self.lock().deadline_ns
    }

    /// Whether the guest is let go.
    pub fn is_open(&self) -> bool {
        self.lock().permit.is_some()
    }

    /// Stops the vCPUs and leaves the disks as they are, so that they can drain; [`Gate::hold`] follows.
    ///
    /// The permit comes back, so that who gives up what it stopped the guest for can use it again,
    /// while its lease lasts; with the time when the last vCPU stopped (CLOCK_MONOTONIC ns).
    /// `None`: the gate was closed already.
    ///
    /// # Errors
    /// When a vCPU does not stop in time; the permit is gone then.
    pub fn stop_vcpus(&self) -> Result<(Option<RunPermit>, u64), PauseTimedOut> {
        let mut inner = self.lock();
        let permit = inner
            .permit
            .take()
            .map(|permit| permit.kept(inner.deadline_ns));
        inner.draining |= permit.is_some();
        let stopped_ns = self.vcpus.pause(PAUSE_TIMEOUT)?;
        Ok((permit, stopped_ns))
    }

    /// Holds the disks of a closed gate; answers whether it is. Those of an open one are the guest's.
    pub fn hold(&self) -> bool {
        let mut inner = self.lock();
        if inner.permit.is_none() {
            inner.draining = false;
            self.hold_disks();
        }
        inner.permit.is_none()
    }

    fn hold_disks(&self) {
        for disk in &self.disks {
            disk.hold();
        }
    }

    /// Stops vCPUs and holds disks: a freeze.
    ///
    /// # Errors
    /// When a vCPU does not stop in time; the disks are held even so.
    pub fn close(&self) -> Result<u64, PauseTimedOut> {
        let mut inner = self.lock();
        self.close_locked(&mut inner)
    }

    fn close_locked(&self, inner: &mut Inner) -> Result<u64, PauseTimedOut> {
        inner.permit = None;
        inner.draining = false;
        // The disks first: a vCPU that is slow to stop writes no more.
        self.hold_disks();
        self.vcpus.pause(PAUSE_TIMEOUT)
    }

    /// The vCPUs, for jobs on parked ones.
    pub fn vcpus(&self) -> &Vcpus {
        &self.vcpus
    }

    fn arm(&self, deadline_ns: u64) {
        let mut at_ns = clock::kernel_boottime_ns(deadline_ns);
        if clock::may_step() {
            let look_ns = clock::boottime_ns() + STEP_LOOK.as_nanos() as u64;
            at_ns = at_ns.min(clock::kernel_boottime_ns(look_ns));
        }
        let at = TimeSpec::from_duration(Duration::from_nanos(at_ns.max(1)));
        let armed = self.timer.set(
            Expiration::OneShot(at),
            TimerSetTimeFlags::TFD_TIMER_ABSTIME,
        );
        if let Err(error) = armed {
            // Cannot happen with a valid time; without a timer there is no lease.
            tracing::error!(%error, "the lease timer cannot be set: this monitor ends");
            std::process::abort();
        }
    }

    /// Closes the gate if the deadline has passed and it is open or drains.
    fn lapse(&self) -> Option<Lapsed> {
        let mut inner = self.lock();
        if self.on_lapse == OnLapse::RunUntilFenced {
            return None;
        }
        if !inner.is_due() {
            if inner.is_used() {
                // The timer came early, to look for a step of the clock.
                self.arm(inner.deadline_ns);
            }
            return None;
        }
        Some(Lapsed {
            stopped: self.close_locked(&mut inner),
        })
    }
}

impl Inner {
    fn check(&self, session: u64) -> Result<(), EarlierLife> {
        if session < self.session {
            return Err(EarlierLife {
                offered: session,
                known: self.session,
            });
        }
        Ok(())
    }
}

/// The deadline's thread: ends with its gate, whose `Drop` fires the timer.
fn watch(gate: &Weak<Gate>, timer: &TimerFd, lapsed: impl Fn(Lapsed)) {
    loop {
        match timer.wait() {
            Ok(()) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(%error, "the lease timer failed: this monitor ends");
                std::process::abort();
            }
        }
        let Some(gate) = gate.upgrade() else {
            return;
        };
        if let Some(event) = gate.lapse() {
            lapsed(event);
        }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.arm(1);
    }
}
