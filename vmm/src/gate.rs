//! The gate: the one place where the guest is let go and where it is stopped, with its lease deadline.
//!
//! [`Gate::run`] takes a [`RunPermit`] by value; nothing else lets vCPUs go. A thread of its own
//! watches the deadline on CLOCK_BOOTTIME and closes the gate without being told and without help
//! of the async runtime: vCPUs stopped, disks held.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use storage_broker::disk::Disk;

use crate::clock;
use crate::confine::{ThreadKind, narrow};
use crate::devices::Migratable;
use crate::permit::RunPermit;
use crate::vcpu::{PauseTimedOut, Vcpus};

/// How long vCPUs may take to stop: a thousand times what is usual. The lease's margin must hold it.
pub const PAUSE_TIMEOUT: Duration = Duration::from_secs(2);

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
        inner.deadline_ns = deadline_ns;
        self.arm(inner.deadline_ns);
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
        }
        Ok(now)
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
        let passed = inner.permit.is_some() && clock::boottime_ns() >= inner.deadline_ns;
        if !passed || self.on_lapse == OnLapse::RunUntilFenced {
            inner.deadline_ns = inner.deadline_ns.max(deadline_ns);
            self.arm(inner.deadline_ns);
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
        if inner.deadline_ns > deadline_ns {
            inner.deadline_ns = deadline_ns;
            self.arm(deadline_ns);
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
        let stopped_ns = self.vcpus.pause(PAUSE_TIMEOUT)?;
        Ok((permit, stopped_ns))
    }

    /// Holds the disks of a closed gate; answers whether it is. Those of an open one are the guest's.
    pub fn hold(&self) -> bool {
        let inner = self.lock();
        if inner.permit.is_none() {
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
        // The disks first: a vCPU that is slow to stop writes no more.
        self.hold_disks();
        self.vcpus.pause(PAUSE_TIMEOUT)
    }

    /// The vCPUs, for jobs on parked ones.
    pub fn vcpus(&self) -> &Vcpus {
        &self.vcpus
    }

    fn arm(&self, deadline_ns: u64) {
        let at = TimeSpec::from_duration(Duration::from_nanos(deadline_ns.max(1)));
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

    /// Closes the gate if the deadline has passed and it is open.
    fn lapse(&self) -> Option<Lapsed> {
        let mut inner = self.lock();
        let due = inner.permit.is_some() && clock::boottime_ns() >= inner.deadline_ns;
        if !due || self.on_lapse == OnLapse::RunUntilFenced {
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
