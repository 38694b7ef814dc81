//! The monitor: one machine, what it has been told, and what it may do next.
//!
//! ```text
//!  control socket ─► run · extend · rekey · send · cancel · stop · quit ─┐
//!  deadline thread ─► lapsed ──────────┐                                 ├─► phase, gate, status
//!  guest, devices ─► shut down, failed ┼─► one task, in order ───────────┤
//!  disks ─► needs re-key ──────────────┘                                 │
//!  migration ─► stop · quiet · gave up · arrived ────────────────────────┘
//! ```
//!
//! What changes the machine's phase holds `operation`, so that one such step ends before the next
//! begins; the state's own lock is held for moments only and never across an await. The promise of
//! *quiet* alone takes just the state's lock, because it may neither wait nor fail.

mod migration;
mod status;

pub use status::wire_phase;

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use cluster_model::ids::{MigrationId, Token, VmId};
use futures::future::try_join_all;
use migration_core::tls::Identity;
use proto::failpoint::{self, Tripped};
use proto::monitor as wire;
use storage_broker::disk::{DiskState, DrainError, RekeyError};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::console::Console;
use crate::devices::MachineEvent;
use crate::gate::{EarlierLife, Lapsed, TooLate};
use crate::handles::Handles;
use crate::permit::{Expected, PermitRefused, RunPermit};
use crate::phase::{Event, GuestEnd, NotNow, Phase};
use crate::platform::{self, BuildError, Platform};
use crate::spec::{Measure, ValidatedSpec};
use crate::vcpu::PauseTimedOut;

pub use migration::{CancelError, ExpectError, IncomingError, SendRefused, SendRequest};

/// Events of the guest, the disks and the deadline not looked at yet; a sender beyond it has said enough.
const HAPPENINGS_MAX: usize = 64;

/// How long sending again what was in doubt may take when the disks are re-keyed.
const REKEY_TIMEOUT: Duration = Duration::from_secs(30);

/// The pauses between announcements after a migration: a port whose link has just come up forwards nothing for a
/// moment, and a frame may be lost.
const ANNOUNCED_AFTER: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_millis(2),
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(250),
    Duration::from_millis(350),
];

/// How long a stop waits for the disks.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// One machine's monitor.
#[derive(Debug)]
pub struct Monitor {
    spec: ValidatedSpec,
    platform: Platform,
    nonce: u64,
    /// Who it is on memory channels: of this process alone, and of no use to anybody once it has ended.
    identity: Identity,
    /// What confines it.
    measures: Vec<wire::Measure>,
    state: Mutex<State>,
    operation: tokio::sync::Mutex<()>,
    changed: watch::Sender<u64>,
    ended: CancellationToken,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    failure: String,
    /// The highest token that any call has shown.
    highest_token: Token,
    /// The token that the disks are under.
    disk_token: Token,
    /// From the promise until a re-key and a permit.
    said_quiet: bool,
    /// Handed back by the gate; kept exactly while the machine stops for its cutover.
    cutover_permit: Option<RunPermit>,
    incoming_addresses: Vec<String>,
    migration: Option<migration::Migration>,
    /// It was told to stop.
    stop_asked: bool,
    /// It stopped without its disks drained.
    undrained: bool,
}

/// Something that happened to the machine by itself.
#[derive(Debug)]
enum Happening {
    Lapsed(Lapsed),
    Guest(MachineEvent),
    Disk(usize),
}

/// Why the guest was not let go.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The permit is not for this monitor now.
    #[error(transparent)]
    Permit(#[from] PermitRefused),
    /// The phase does not allow it.
    #[error(transparent)]
    NotNow(#[from] NotNow),
    /// The permit's lease ended on its way.
    #[error(transparent)]
    TooLate(#[from] TooLate),
    /// A test asked for it.
    #[error(transparent)]
    Tripped(#[from] Tripped),
}

/// A call carries a token or nonce that is not this monitor's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotForUs {
    /// Another life of the monitor.
    #[error(
        "the call carries the nonce of another monitor: ask this one for its own with Describe"
    )]
    OtherMonitor,
    /// An older token.
    #[error("the call carries {offered}, and this monitor has seen {highest}")]
    OlderToken {
        /// The call's.
        offered: Token,
        /// The highest seen.
        highest: Token,
    },
    /// A newer token than the disks'.
    #[error("the call carries {offered}, and the disks are under {disks}: re-key first")]
    NotRekeyed {
        /// The call's.
        offered: Token,
        /// The disks'.
        disks: Token,
    },
    /// A life of `clusterd` that has ended.
    #[error(transparent)]
    EarlierLife(#[from] EarlierLife),
}

/// Why a re-key did not complete.
#[derive(Debug, thiserror::Error)]
pub enum MonitorRekeyError {
    /// Not this monitor's token or nonce.
    #[error(transparent)]
    NotForUs(#[from] NotForUs),
    /// The phase does not allow it.
    #[error(transparent)]
    NotNow(#[from] NotNow),
    /// The machine ran, and its vCPUs did not stop.
    #[error(transparent)]
    Pause(#[from] PauseTimedOut),
    /// A disk did not take it up.
    #[error("disk {index}: {source}")]
    Disk {
        /// Which.
        index: usize,
        /// Why.
        source: RekeyError,
    },
}

/// Why a stop did not complete.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// An older token.
    #[error(transparent)]
    NotForUs(#[from] NotForUs),
    /// The phase does not allow it.
    #[error(transparent)]
    NotNow(#[from] NotNow),
    /// A vCPU does not stop.
    #[error(transparent)]
    Pause(#[from] PauseTimedOut),
    /// The disks do not complete their I/O.
    #[error(
        "the vCPUs are stopped, the disks do not drain: {0}; force the stop to leave unflushed writes behind"
    )]
    Drain(#[from] DrainError),
}

impl Monitor {
    /// Builds the machine and starts to watch over it. `measures` confine this process.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub async fn start(
        spec: ValidatedSpec,
        handles: Handles,
        measures: Vec<Measure>,
    ) -> Result<Arc<Monitor>, BuildError> {
        let identity = Identity::draw()?;
        let (happened, happenings) = mpsc::channel(HAPPENINGS_MAX);
        let (guest_events, mut guest) = mpsc::channel(HAPPENINGS_MAX);
        let lapses = happened.clone();
        let lapsed = move |lapsed| {
            if lapses.blocking_send(Happening::Lapsed(lapsed)).is_err() {
                tracing::debug!("the lease lapsed as the monitor ended");
            }
        };
        let platform = platform::build(&spec, handles, guest_events, lapsed).await?;
        let file = spec.file();
        let phase = if spec.incoming().is_some() {
            Phase::Incoming
        } else {
            Phase::Ready
        };
        let state = State {
            phase,
            failure: String::new(),
            highest_token: file.token,
            disk_token: file.token,
            said_quiet: false,
            cutover_permit: None,
            incoming_addresses: Vec::new(),
            migration: None,
            stop_asked: false,
            undrained: false,
        };
        let monitor = Arc::new(Monitor {
            nonce: draw_nonce(),
            identity,
            measures: measures.into_iter().map(Measure::into_wire).collect(),
            platform,
            spec,
            state: Mutex::new(state),
            operation: tokio::sync::Mutex::default(),
            changed: watch::Sender::new(0),
            ended: CancellationToken::new(),
        });
        for (index, disk) in monitor.platform.machine.disks().iter().enumerate() {
            let (mut watch, happened) = (disk.watch(), happened.clone());
            tokio::spawn(async move {
                while watch.changed().await.is_ok() {
                    if happened.send(Happening::Disk(index)).await.is_err() {
                        return;
                    }
                }
            });
        }
        tokio::spawn(async move {
            while let Some(event) = guest.recv().await {
                if happened.send(Happening::Guest(event)).await.is_err() {
                    return;
                }
            }
        });
        tokio::spawn(attend(Arc::downgrade(&monitor), happenings));
        Ok(monitor)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// What this monitor was told to be.
    pub fn spec(&self) -> &ValidatedSpec {
        &self.spec
    }

    /// The serial console.
    pub fn console(&self) -> &Arc<Console> {
        &self.platform.console
    }

    /// Tells of every change of the status.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Ends when the process should.
    pub fn ended(&self) -> &CancellationToken {
        &self.ended
    }

    fn tell(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Applies an event to the phase, and tells of it.
    fn step(&self, event: Event) -> Result<Phase, NotNow> {
        let mut state = self.lock();
        let before = state.phase;
        state.phase = before.after(event)?;
        let after = state.phase;
        if after != Phase::Stopping {
            // It was good for going on where the cutover is given up, and for nothing later.
            state.cutover_permit = None;
        }
        drop(state);
        if before != after {
            tracing::info!(%before, %after, %event, "phase");
        }
        self.tell();
        Ok(after)
    }

    fn fail(&self, reason: &str) {
        tracing::error!(reason, "the machine has failed");
        self.lock().failure = reason.to_owned();
        // A failure is possible in every phase.
        if let Err(error) = self.step(Event::Failed) {
            tracing::error!(%error, "a failure in a phase that knows none");
        }
    }

    /// Lets the guest run: start, resume, thaw, go on after a cancel. Answers since when (CLOCK_MONOTONIC ns).
    ///
    /// # Errors
    /// See [`RunError`].
    pub async fn run(&self, permit: &wire::RunPermit) -> Result<u64, RunError> {
        let _operation = self.operation.lock().await;
        failpoint::reach("run.before").await?;
        let permit_ns = clock::monotonic_ns();
        let (permit, was) = {
            let mut state = self.lock();
            let expected = Expected {
                vm: self.spec.file().vm_id,
                nonce: self.nonce,
                highest_token: state.highest_token,
                disk_token: state.disk_token,
            };
            let made = RunPermit::new(permit, &expected, clock::boottime_ns());
            if VmId(permit.vm_id) == expected.vm && permit.nonce == expected.nonce {
                state.highest_token = state.highest_token.max(Token(permit.token));
            }
            let made = made?;
            state.phase.after(Event::Permitted)?;
            (made, state.phase)
        };
        let log_index = permit.log_index();
        let running_ns = self.platform.machine.gate().run(permit)?;
        {
            let mut state = self.lock();
            state.said_quiet = false;
            if let Some(migration) = &mut state.migration {
                migration.ran(was, permit_ns, running_ns);
            }
        }
        self.step(Event::Permitted)?;
        tracing::info!(%log_index, from = %was, "the guest runs");
        if was == Phase::Complete {
            self.announce();
        }
        self.check_disks();
        failpoint::reach("run.after").await?;
        Ok(running_ns)
    }

    /// Tells the networks where the machine is now, as long as it is here.
    fn announce(&self) {
        for nic in &self.platform.nics {
            let (nic, gate) = (nic.clone(), self.platform.machine.gate().clone());
            tokio::spawn(async move {
                for pause in ANNOUNCED_AFTER {
                    tokio::time::sleep(pause).await;
                    if !gate.is_open() {
                        return;
                    }
                    if let Err(error) = nic.announce().await {
                        tracing::warn!(%error, "the network was not told where the machine is now");
                    }
                }
            });
        }
    }

    /// A disk may have wanted a re-key before the machine ran, when that did not count yet.
    fn check_disks(&self) {
        let refused = self
            .platform
            .machine
            .disks()
            .iter()
            .any(|disk| wants_rekey(&disk.watch().borrow().state));
        if refused {
            tracing::warn!("a disk wants a re-key");
            self.freeze(Event::DiskRefused);
        }
    }

    /// Moves the lease's deadline; answers the phase.
    ///
    /// # Errors
    /// When the call is not for this monitor or its token.
    pub fn extend(&self, request: &wire::ExtendLeaseRequest) -> Result<Phase, NotForUs> {
        self.check_call(Token(request.token), Some(request.nonce), true)?;
        self.platform
            .machine
            .gate()
            .extend(request.lease_deadline_ns, request.session)?;
        Ok(self.lock().phase)
    }

    /// Moves the lease's deadline back, and obeys no earlier life of `clusterd` from now on.
    ///
    /// # Errors
    /// When the call is not for this monitor, or of an earlier life itself.
    pub fn shorten(&self, request: &wire::ShortenLeaseRequest) -> Result<(), NotForUs> {
        if request.nonce != self.nonce {
            return Err(NotForUs::OtherMonitor);
        }
        let gate = self.platform.machine.gate();
        gate.shorten(request.lease_deadline_ns, request.session)?;
        Ok(())
    }

    /// Compares a call's token and nonce with this monitor's, and notes a higher token.
    fn check_call(
        &self,
        token: Token,
        nonce: Option<u64>,
        under_disks: bool,
    ) -> Result<(), NotForUs> {
        if nonce.is_some_and(|nonce| nonce != self.nonce) {
            return Err(NotForUs::OtherMonitor);
        }
        let mut state = self.lock();
        if token < state.highest_token {
            return Err(NotForUs::OlderToken {
                offered: token,
                highest: state.highest_token,
            });
        }
        state.highest_token = token;
        if under_disks && token != state.disk_token {
            return Err(NotForUs::NotRekeyed {
                offered: token,
                disks: state.disk_token,
            });
        }
        Ok(())
    }

    /// Puts the disks under a newer token, already claimed and confirmed. A permit for it may follow. A machine
    /// that runs under the older one is frozen first.
    ///
    /// # Errors
    /// See [`MonitorRekeyError`].
    pub async fn rekey(&self, token: Token, nonce: u64) -> Result<(), MonitorRekeyError> {
        let _operation = self.operation.lock().await;
        self.check_call(token, Some(nonce), false)?;
        let (present, running) = {
            let state = self.lock();
            (state.disk_token, state.phase == Phase::Running)
        };
        if running && present < token {
            let gate = self.platform.machine.gate().clone();
            blocking(move || gate.close()).await?;
            self.step(Event::LeaseLapsed)?;
        }
        self.lock().phase.after(Event::Rekeyed)?;
        let disks = self.platform.machine.disks().iter().enumerate();
        try_join_all(disks.map(|(index, disk)| async move {
            let under = disk.watch().borrow().token;
            let settled = under == token && !wants_rekey(&disk.watch().borrow().state);
            if settled {
                // A repeated call, or one that another disk's failure cut short.
                return Ok(());
            }
            disk.rekey(token, REKEY_TIMEOUT)
                .await
                .map_err(|source| MonitorRekeyError::Disk { index, source })
        }))
        .await?;
        self.lock().disk_token = token;
        tracing::info!(%present, %token, "re-keyed");
        self.step(Event::Rekeyed)?;
        Ok(())
    }

    /// Stops the machine: vCPUs, then, unless forced, its disks' I/O completed and committed.
    ///
    /// # Errors
    /// See [`StopError`].
    pub async fn stop(&self, token: Option<Token>, force: bool) -> Result<(), StopError> {
        if let Some(token) = token {
            self.check_call(token, None, false)?;
        }
        self.end_send("the machine is being stopped").await;
        let _operation = self.operation.lock().await;
        let phase = self.lock().phase;
        phase.after(Event::ShutDown)?;
        self.lock().stop_asked = true;
        self.shut_down(phase, force).await?;
        self.step(Event::ShutDown)?;
        Ok(())
    }

    /// Stops vCPUs; drains where the lease still lets the machine write.
    async fn shut_down(&self, phase: Phase, force: bool) -> Result<(), StopError> {
        let gate = self.platform.machine.gate().clone();
        let drains = phase.is_running() && !force;
        if !drains {
            self.lock().undrained = true;
            blocking(move || gate.close()).await?;
            return Ok(());
        }
        blocking(move || gate.stop_vcpus()).await?;
        let drained = self.platform.machine.drain(STOP_TIMEOUT).await;
        self.platform.machine.gate().hold();
        Ok(drained?)
    }

    /// Ends the process, unless the caller's token is older than any seen.
    ///
    /// # Errors
    /// When it is.
    pub fn quit(&self, token: Token, reason: &str) -> Result<(), NotForUs> {
        self.check_call(token, None, false)?;
        tracing::info!(%token, reason, "told to quit");
        self.ended.cancel();
        Ok(())
    }

    /// Closes the gate for good, at the end of the process.
    pub async fn end(&self) {
        let gate = self.platform.machine.gate().clone();
        if let Err(error) = blocking(move || gate.close()).await {
            tracing::error!(%error, "the machine ends with its process");
        }
    }

    /// Closes the gate and steps; for what cannot wait for anything.
    fn freeze(&self, event: Event) {
        if let Err(error) = self.platform.machine.gate().close() {
            self.fail(&error.to_string());
        }
        if let Err(error) = self.step(event) {
            tracing::error!(%error, "a freeze in a phase that knows none");
        }
    }

    /// Takes up what happened by itself.
    async fn happened(&self, happening: Happening) {
        let _operation = self.operation.lock().await;
        match happening {
            Happening::Lapsed(lapsed) => {
                // A permit may have opened the gate again since.
                if self.platform.machine.gate().is_open() {
                    return;
                }
                if let Err(error) = lapsed.stopped {
                    self.fail(&format!("the lease ran out and {error}"));
                    return;
                }
                tracing::warn!("the lease ran out: frozen");
                if let Err(error) = self.step(Event::LeaseLapsed) {
                    tracing::error!(%error, "a lapse in a phase that knows none");
                }
            }
            Happening::Guest(event) => self.guest_ended(event).await,
            Happening::Disk(index) => self.disk_changed(index),
        }
    }

    async fn guest_ended(&self, event: MachineEvent) {
        let phase = self.lock().phase;
        match (phase.guest_end(), event) {
            (GuestEnd::Over, _) => {}
            // The machine remembers it, saves it, and says it again when the guest is let go.
            (GuestEnd::WhereItRunsNext, event) => {
                tracing::info!(?event, %phase, "what the guest asked for waits for the cutover's end");
            }
            (GuestEnd::Now, MachineEvent::Failed(reason)) => {
                self.freeze(Event::Failed);
                self.fail(&reason);
            }
            (GuestEnd::Now, MachineEvent::ShutDown | MachineEvent::Reset) => {
                self.guest_shut_down(phase).await;
            }
        }
    }

    async fn guest_shut_down(&self, phase: Phase) {
        if phase.after(Event::ShutDown).is_err() {
            return;
        }
        tracing::info!("the guest has shut down");
        if let Err(error) = self.shut_down(phase, false).await {
            self.fail(&format!("the guest has shut down, and {error}"));
        } else if let Err(error) = self.step(Event::ShutDown) {
            tracing::error!(%error, "a shutdown in a phase that knows none");
        }
    }

    fn disk_changed(&self, index: usize) {
        let Some(disk) = self.platform.machine.disks().get(index) else {
            return;
        };
        let state = disk.watch().borrow().state.clone();
        match state {
            DiskState::Ready => self.tell(),
            DiskState::Reconnecting { error } => {
                tracing::warn!(
                    index,
                    error,
                    "a disk's server cannot be reached; its requests wait"
                );
            }
            DiskState::Stalled { reason } => {
                tracing::warn!(
                    index,
                    reason,
                    "a disk's server cannot do what is asked; its requests wait"
                );
            }
            DiskState::NeedsRekey {
                reason,
                writes_unanswered,
            } => {
                tracing::warn!(index, %reason, writes_unanswered, "a disk wants a re-key");
                let counts = !matches!(self.lock().phase, Phase::Incoming | Phase::Complete);
                if counts {
                    self.freeze(Event::DiskRefused);
                }
            }
            DiskState::Failed { reason } => {
                self.freeze(Event::Failed);
                self.fail(&format!("disk {index} has failed: {reason}"));
            }
        }
    }

    /// The migration under way or last, if it is `id`.
    fn is_migration(&self, id: MigrationId) -> bool {
        self.lock()
            .migration
            .as_ref()
            .is_some_and(|migration| migration.id == id)
    }
}

fn wants_rekey(state: &DiskState) -> bool {
    matches!(state, DiskState::NeedsRekey { .. })
}

/// Takes up what happens, in order, until the monitor is gone.
async fn attend(monitor: std::sync::Weak<Monitor>, mut happenings: mpsc::Receiver<Happening>) {
    while let Some(happening) = happenings.recv().await {
        let Some(monitor) = monitor.upgrade() else {
            return;
        };
        monitor.happened(happening).await;
    }
}

/// Runs what waits for threads where it holds up no task.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

fn draw_nonce() -> u64 {
    // The standard hasher's keys are the system's random numbers. A nonce tells lives of a monitor apart, it is no secret.
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one((std::process::id(), clock::boottime_ns())) | 1
}
