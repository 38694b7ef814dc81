//! What comes next: the node agent's procedures, as steps out and answers in.
//!
//! `decide` says *what* a node should do; a [`Flow`] says *how*, one step at a time, and an executor does what the
//! step says and comes back with what came of it. There are two executors of these very steps: `clusterd`, where a
//! step is a call to a storage broker, a monitor or the log, and the simulation, where it may besides be late, be
//! stopped in the middle, or never come back.
//!
//! ```text
//!             ┌────────────── answer ───────────────┐
//!             ▼                                     │
//!  Work ─► Flow::next ─► Step ─► executor ─► broker, monitor, log
//!             │   ▲
//!             │   └─ Seen: state, lease, monitors, clock, as they are at that moment
//!             └─► Over: what the agent takes in
//! ```
//! The steps of each act stand in `flow/program.rs`. A flow collects the proofs that a [`RunPermit`] needs and makes
//! it itself; nobody else can. Whatever a flow holds is lost with the process, and nothing depends on it.

mod program;

use std::collections::VecDeque;
use std::sync::Arc;

use crate::agent::{Act, Ended, Learnt, MonitorPhase, MonitorView, Work, permit_allowed};
use crate::command::Command;
use crate::ids::{MigrationId, NodeId, Token, VmId};
use crate::permit::{ClaimAck, Confirm, RunPermit};
use crate::safeguards::{Safeguard, Safeguards};
use crate::settle::Settle;
use crate::state::{ClusterState, Migration, MigrationOptions, Vm};

use program::Op;

/// A flow that failed pauses this long before its machine is decided anew, ns, doubling...
const PAUSE_FIRST_NS: u64 = 50_000_000;
/// ...up to this.
const PAUSE_MAX_NS: u64 = 2_000_000_000;
/// A guest that was asked to stop may take this long before it is stopped, ns.
pub const STOP_PATIENCE_NS: u64 = 20_000_000_000;
/// How often a stopping monitor is looked at, ns.
const STOP_LOOK_NS: u64 = 50_000_000;
/// How long the destination may take to have its monitor ready, ns: it reserves the machine's memory.
pub const READY_PATIENCE_NS: u64 = 30_000_000_000;
/// A destination that is not ready is asked again after this pause, ns.
const READY_PAUSE_NS: u64 = 10_000_000;

/// The flow's surroundings at the moment of a call. **The lease is read before the state**: what the log said is good
/// for the lease that was held before it was asked, and no longer.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The end of the lease held now, absolute, ns on the clock of `now_ns`.
    pub lease_deadline_ns: u64,
    /// The newest state applied here.
    pub state: Arc<ClusterState>,
    /// The monitors of the flow's machine, as they last described themselves.
    pub monitors: Vec<MonitorView>,
    /// The host's clock that never stops, ns.
    pub now_ns: u64,
}

impl Seen {
    fn monitor(&self, nonce: u64) -> Option<&MonitorView> {
        self.monitors.iter().find(|monitor| monitor.nonce == nonce)
    }

    fn under(&self, token: Token) -> Option<&MonitorView> {
        self.monitors.iter().find(|monitor| monitor.token == token)
    }
}

/// What an executor must do. Each is answered once.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// Have the storage broker run. Answer: [`Answer::Done`].
    EnsureBroker,
    /// Make the machine's disk files under `token`. Answer: [`Answer::Done`].
    MakeDisks {
        /// Whose.
        vm: VmId,
        /// Under which token.
        token: Token,
    },
    /// Propose a command of this node's own and wait until its entry is applied here. Answer: [`Answer::Done`].
    Propose(Box<Command>),
    /// Claim every file of the machine, each once. Answer: [`Answer::Done`] when every one acknowledged.
    Claim {
        /// Whose.
        vm: VmId,
        /// For which token.
        token: Token,
    },
    /// Wait. Answer: [`Answer::Done`].
    Wait {
        /// How long, ns.
        ns: u64,
        /// What for.
        why: Waits,
    },
    /// See that every file still carries `token`, and have the server write down what it holds. Answer:
    /// [`Answer::Done`].
    VerifyAndCommit {
        /// Whose.
        vm: VmId,
        /// Which token.
        token: Token,
    },
    /// Begin to make a monitor; it is waited for later. Answer: [`Answer::Done`] at once.
    Build {
        /// Whose.
        vm: VmId,
        /// The token that it stands under.
        token: Token,
        /// The migration that it receives.
        incoming: Option<MigrationId>,
    },
    /// Wait for the monitor that was begun. Answer: [`Answer::Monitor`].
    Built,
    /// A linearizable read of the log, begun after this step was given. Answer: [`Answer::Confirmed`].
    Confirm,
    /// Give a monitor a token that is claimed and confirmed. Answer: [`Answer::Monitor`], as it then describes itself.
    Rekey {
        /// Which monitor.
        nonce: u64,
        /// Which token.
        token: Token,
    },
    /// Hand the permit to its monitor. Answer: [`Answer::Done`] when the guest runs.
    Run(RunPermit),
    /// End a monitor, whatever it does. Answer: [`Answer::Done`] when its process is gone.
    End {
        /// Which.
        nonce: u64,
        /// Why.
        why: String,
    },
    /// Ask a monitor to stop its guest. Answer: [`Answer::Done`] when it was told.
    Stop {
        /// Which monitor.
        nonce: u64,
        /// Its token.
        token: Token,
        /// Leave behind what is not on disk yet.
        forced: bool,
    },
    /// Have a monitor describe itself anew, if it answers. Answer: [`Answer::Done`] in any case.
    Refresh {
        /// Which.
        nonce: u64,
    },
    /// Ask the destination whether its monitor is ready for this source. Answer: [`Answer::Ready`] or
    /// [`Answer::NotReady`].
    AskReady {
        /// Which node.
        to: NodeId,
        /// Which migration.
        migration: MigrationId,
        /// The monitor that will send.
        nonce: u64,
    },
    /// Have a monitor send its machine. Answer: [`Answer::Done`] when it has begun.
    Send {
        /// Which monitor.
        nonce: u64,
        /// Which migration.
        migration: MigrationId,
        /// Where to.
        ready: Ready,
        /// How.
        options: MigrationOptions,
    },
    /// Have a monitor end its sending. Answer: [`Answer::Done`].
    CancelSend {
        /// Which monitor.
        nonce: u64,
        /// Which migration.
        migration: MigrationId,
    },
    /// Put both sides' measurements together and propose them. Answer: [`Answer::Done`].
    Report {
        /// Whose.
        vm: VmId,
        /// Which migration.
        migration: MigrationId,
    },
}

/// What a flow waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waits {
    /// Writes of the last owner that the storage server has let in already.
    Settle(Settle),
    /// A guest that stops.
    Stop,
    /// A destination that is being built.
    Destination,
}

/// A destination whose monitor waits for this source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// Where it listens.
    pub addresses: Vec<String>,
    /// What its channel shows.
    pub fingerprint: Vec<u8>,
}

/// What came of a step.
#[derive(Clone, Debug)]
pub enum Answer {
    /// None was given yet.
    Begin,
    /// It was done.
    Done,
    /// A monitor, as it describes itself.
    Monitor(MonitorView),
    /// A quorum confirmed; the state, applied at least that far.
    Confirmed(Arc<ClusterState>),
    /// The destination waits for this source.
    Ready(Ready),
    /// The destination is not ready.
    NotReady {
        /// What it says.
        why: String,
        /// Whether it would say the same again.
        for_good: bool,
    },
    /// It was not done, or nobody knows.
    Failed(Failure),
}

/// Why a step was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What follows from it.
    pub kind: FailureKind,
    /// For people.
    pub why: String,
}

/// What follows from a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// A claim has no acknowledgement by every file, or a verified group was not the claimed one: the token is burnt.
    Burnt,
    /// The storage server refuses for good.
    RefusedForGood,
    /// The log did not answer, or not as needed: nothing is known to be wrong with the machine.
    Log,
    /// A monitor, the broker or the host could not do it.
    Host,
}

impl Failure {
    /// A failure of that kind.
    pub fn new(kind: FailureKind, why: impl std::fmt::Display) -> Failure {
        Failure {
            kind,
            why: why.to_string(),
        }
    }
}

/// What a flow wants.
#[derive(Debug)]
pub enum Next {
    /// This.
    Do(Step),
    /// Nothing more: the agent takes `ended` in after a pause.
    Over {
        /// What came of the work.
        ended: Ended,
        /// The pause, ns.
        pause_ns: u64,
    },
}

/// One machine's work under way.
#[derive(Debug)]
pub struct Flow {
    me: NodeId,
    safeguards: Safeguards,
    work: Work,
    /// The state that the acts were decided in.
    state: Arc<ClusterState>,
    acts: VecDeque<Act>,
    act: Option<Act>,
    ops: VecDeque<Op>,
    /// What the last step was for.
    asked: Option<Op>,
    /// The present act's failure, while what it began is cleared away.
    failure: Option<Failure>,
    failures: Vec<(Act, Failure)>,
    proofs: Proofs,
    failed: bool,
    learnt: Vec<Learnt>,
}

/// What a flow has collected for its present act.
#[derive(Debug, Default)]
struct Proofs {
    claim: Option<ClaimAck>,
    confirm: Option<Confirm>,
    /// When the confirm was asked for, and the lease that was held then.
    confirm_begun: Option<(u64, u64)>,
    monitor: Option<MonitorView>,
    /// A monitor was begun and not waited for.
    building: bool,
    ready: Option<Ready>,
    /// Since when something is waited for.
    waits_since_ns: Option<u64>,
}

impl Flow {
    /// Work that was decided in `state` on node `me`.
    pub fn new(me: NodeId, work: Work, state: Arc<ClusterState>, safeguards: Safeguards) -> Flow {
        Flow {
            me,
            safeguards,
            acts: work.acts.iter().cloned().collect(),
            work,
            state,
            act: None,
            ops: VecDeque::new(),
            asked: None,
            failure: None,
            failures: Vec::new(),
            proofs: Proofs::default(),
            failed: false,
            learnt: Vec::new(),
        }
    }

    /// The machine.
    pub fn vm(&self) -> VmId {
        self.work.vm
    }

    /// The act under way.
    pub fn act(&self) -> Option<&Act> {
        self.act.as_ref()
    }

    /// The state that the acts were decided in.
    pub fn state(&self) -> &Arc<ClusterState> {
        &self.state
    }

    /// The failures of acts since it was last asked, for the executor's log.
    pub fn take_failures(&mut self) -> Vec<(Act, Failure)> {
        std::mem::take(&mut self.failures)
    }

    /// Takes in what came of the last step, and says what comes next.
    pub fn next(&mut self, answer: Answer, seen: &Seen) -> Next {
        if let Some(op) = self.asked.take() {
            self.take_in(op, answer, seen);
        }
        loop {
            while let Some(op) = self.ops.pop_front() {
                match self.begin(op, seen) {
                    Begun::Step(step) => return Next::Do(step),
                    Begun::Done => {}
                    Begun::Failed(failure) => self.fail(failure),
                }
            }
            self.conclude();
            let Some(act) = self.acts.pop_front() else {
                return self.over();
            };
            self.proofs = Proofs::default();
            self.ops = self.program(&act).into();
            self.act = Some(act);
        }
    }

    fn machine(&self) -> Option<&Vm> {
        self.state.vms.get(&self.work.vm)
    }

    /// Begins an operation: it is a step, or it needs nobody.
    fn begin(&mut self, op: Op, seen: &Seen) -> Begun {
        let vm = self.work.vm;
        let step = match &op {
            Op::EnsureBroker => Step::EnsureBroker,
            Op::MakeDisks(token) => Step::MakeDisks { vm, token: *token },
            Op::Propose(command) => Step::Propose(command.clone()),
            Op::Claim(token) => Step::Claim { vm, token: *token },
            Op::Settle => match self.settle_time() {
                Some(settle) => Step::Wait {
                    ns: settle.ms.saturating_mul(1_000_000),
                    why: Waits::Settle(settle),
                },
                None => return Begun::log("the log knows no such machine"),
            },
            Op::VerifyAndCommit(token) => Step::VerifyAndCommit { vm, token: *token },
            Op::Build(token, incoming) => {
                self.proofs.building = true;
                Step::Build {
                    vm,
                    token: *token,
                    incoming: *incoming,
                }
            }
            Op::Built => Step::Built,
            Op::Confirm => {
                self.proofs.confirm_begun = Some((seen.now_ns, seen.lease_deadline_ns));
                Step::Confirm
            }
            Op::ConfirmByDecision => {
                // The mutant's: what was decided in is taken for what the log says now.
                let (state, now) = (self.state.clone(), seen.now_ns);
                self.proofs.confirm = Some(Confirm::read(state, now, seen.lease_deadline_ns));
                return Begun::Done;
            }
            Op::Allowed(token) => return self.allowed(*token),
            Op::FindMonitor(nonce) => return self.find_monitor(*nonce, seen),
            Op::ClaimOfOneThatRan => return self.claim_of_one_that_ran(),
            Op::ClaimByCutover(token) => return self.claim_by_cutover(*token, seen),
            Op::Rekey(token) => match &self.proofs.monitor {
                Some(monitor) if monitor.token == *token && self.is_after_cutover() => {
                    return Begun::Done;
                }
                Some(monitor) => Step::Rekey {
                    nonce: monitor.nonce,
                    token: *token,
                },
                None => return Begun::host("it has no monitor to re-key"),
            },
            Op::Run => match self.permit(seen) {
                Ok(permit) => Step::Run(permit),
                Err(failure) => return Begun::Failed(failure),
            },
            Op::End(nonce, why) => {
                if seen.monitor(*nonce).is_none() {
                    return Begun::Done;
                }
                Step::End {
                    nonce: *nonce,
                    why: why.clone(),
                }
            }
            Op::EndBuilt(why) => match &self.proofs.monitor {
                Some(monitor) => Step::End {
                    nonce: monitor.nonce,
                    why: (*why).to_owned(),
                },
                None => return Begun::Done,
            },
            Op::Stop(token, forced) => match seen.under(*token) {
                Some(monitor) => Step::Stop {
                    nonce: monitor.nonce,
                    token: *token,
                    forced: *forced,
                },
                None => return Begun::Done,
            },
            Op::AwaitStop(token) => return self.await_stop(*token, seen),
            Op::Refresh(token) => match seen.under(*token) {
                Some(monitor) => Step::Refresh {
                    nonce: monitor.nonce,
                },
                None => return Begun::Done,
            },
            Op::RefreshOne(nonce) => Step::Refresh { nonce: *nonce },
            Op::UnlessRunning(token, command) => {
                // What was decided rests on an older status.
                let runs = seen.under(*token).map(|monitor| monitor.phase);
                if runs == Some(MonitorPhase::Running) {
                    return Begun::Done;
                }
                self.ops.push_front(Op::Propose(command.clone()));
                return Begun::Done;
            }
            Op::AskReady(migration) => return self.ask_ready(*migration, seen),
            Op::Send(migration) => return self.send(*migration),
            Op::CancelSend(migration) => {
                let part_of = |monitor: &&MonitorView| {
                    let part = monitor.migration.as_ref();
                    part.is_some_and(|part| part.id == *migration)
                };
                match seen.monitors.iter().find(part_of) {
                    Some(monitor) => Step::CancelSend {
                        nonce: monitor.nonce,
                        migration: *migration,
                    },
                    None => return Begun::Done,
                }
            }
            Op::LearnClaimed(token) => {
                self.learnt.push(Learnt::Claimed(vm, *token));
                return Begun::Done;
            }
            Op::Report(migration) => Step::Report {
                vm,
                migration: *migration,
            },
            Op::Pause => Step::Wait {
                ns: READY_PAUSE_NS,
                why: Waits::Destination,
            },
            Op::Waited => return Begun::Done,
        };
        self.asked = Some(op);
        Begun::Step(step)
    }

    fn is_after_cutover(&self) -> bool {
        matches!(self.act, Some(Act::RunAfterCutover { .. }))
    }

    /// How long the takeover waits: see [`crate::settle`].
    fn settle_time(&self) -> Option<Settle> {
        let vm = self.machine()?;
        let latency_us = self
            .proofs
            .monitor
            .as_ref()
            .map_or(0, |monitor| monitor.write_latency_p999_us);
        Some(self.state.settle(vm, latency_us))
    }

    /// The monitor is told a token only after the log said that it is current.
    fn allowed(&self, token: Token) -> Begun {
        let Some(confirm) = &self.proofs.confirm else {
            return Begun::log("the log was not confirmed");
        };
        match permit_allowed(confirm.state(), self.work.vm, self.me, token) {
            Ok(_) => Begun::Done,
            Err(refusal) => Begun::log(&refusal),
        }
    }

    fn find_monitor(&mut self, nonce: u64, seen: &Seen) -> Begun {
        match seen.monitor(nonce) {
            Some(monitor) => {
                self.proofs.monitor = Some(monitor.clone());
                Begun::Done
            }
            None => Begun::host("its monitor is gone"),
        }
    }

    fn claim_of_one_that_ran(&mut self) -> Begun {
        let monitor = self.proofs.monitor.as_ref();
        self.proofs.claim = monitor.and_then(ClaimAck::of_a_machine_that_ran);
        // The mutant's quiet source is taken for a frozen one.
        if self.proofs.claim.is_none()
            && !self.safeguards.hold(Safeguard::QuietBinds)
            && let Some(monitor) = monitor
        {
            self.proofs.claim = Some(ClaimAck::acknowledged(monitor.vm, monitor.token, 0));
        }
        match self.proofs.claim {
            Some(_) => Begun::Done,
            None => Begun::host("the monitor's phase does not prove that its files were claimed"),
        }
    }

    /// The cutover is applied here; it is the confirm of the claim that it names.
    fn claim_by_cutover(&mut self, token: Token, seen: &Seen) -> Begun {
        let stands =
            Confirm::by_cutover(&seen.state, self.work.vm, self.me, seen.lease_deadline_ns);
        match stands.filter(|(claim, _)| claim.token() == token) {
            Some((claim, confirm)) => {
                self.proofs.claim = Some(claim);
                self.proofs.confirm = Some(confirm);
                Begun::Done
            }
            None => Begun::log("the log does not show the cutover here"),
        }
    }

    fn permit(&self, seen: &Seen) -> Result<RunPermit, Failure> {
        let missing = |what: &str| Failure::new(FailureKind::Log, what);
        let proofs = &self.proofs;
        let monitor = proofs.monitor.as_ref();
        let monitor = monitor.ok_or_else(|| missing("it has no monitor"))?;
        let claim = match proofs.claim {
            None if !self.safeguards.hold(Safeguard::ClaimBeforeRun) => {
                ClaimAck::acknowledged(monitor.vm, monitor.token, 0)
            }
            claim => claim.ok_or_else(|| missing("its files were not claimed"))?,
        };
        let confirm = proofs.confirm.as_ref();
        let confirm = confirm.ok_or_else(|| missing("the log was not confirmed"))?;
        let outlived;
        let confirm = if self.safeguards.hold(Safeguard::LeaseOfTheConfirm) {
            confirm
        } else {
            outlived = confirm.with_lease(seen.lease_deadline_ns);
            &outlived
        };
        RunPermit::new(
            self.me,
            claim,
            confirm,
            monitor,
            seen.now_ns,
            self.safeguards,
        )
        .map_err(|error| Failure::new(FailureKind::Log, format!("no permit: {error}")))
    }

    /// Looks until the guest has stopped, and stops it when its patience is over.
    fn await_stop(&mut self, token: Token, seen: &Seen) -> Begun {
        let Some(monitor) = seen.under(token) else {
            return Begun::Done;
        };
        if monitor.phase != MonitorPhase::Running {
            return Begun::Done;
        }
        let since = *self.proofs.waits_since_ns.get_or_insert(seen.now_ns);
        if seen.now_ns.saturating_sub(since) >= STOP_PATIENCE_NS {
            self.ops.push_front(Op::RefreshOne(monitor.nonce));
            self.ops.push_front(Op::Stop(token, true));
            return Begun::Done;
        }
        self.ops.push_front(Op::AwaitStop(token));
        self.asked = Some(Op::Waited);
        Begun::Step(Step::Wait {
            ns: STOP_LOOK_NS,
            why: Waits::Stop,
        })
    }

    /// Asks the destination until it is ready, the migration has ended, or it took too long.
    fn ask_ready(&mut self, id: MigrationId, seen: &Seen) -> Begun {
        let running = |monitor: &&MonitorView| monitor.phase == MonitorPhase::Running;
        let Some(migration) = self.state.migrations.get(&id) else {
            self.ops.clear();
            return Begun::Done;
        };
        if self.proofs.monitor.is_none() {
            // Gone or stopped meanwhile: the next look knows what to do.
            let Some(monitor) = seen.monitors.iter().find(running) else {
                self.ops.clear();
                return Begun::Done;
            };
            self.proofs.monitor = Some(monitor.clone());
        }
        self.proofs.waits_since_ns.get_or_insert(seen.now_ns);
        let step = Step::AskReady {
            to: migration.to,
            migration: id,
            nonce: self.proofs.monitor.as_ref().map_or(0, |found| found.nonce),
        };
        self.asked = Some(Op::AskReady(id));
        Begun::Step(step)
    }

    fn send(&mut self, id: MigrationId) -> Begun {
        let (Some(migration), Some(monitor), Some(ready)) = (
            self.state.migrations.get(&id),
            self.proofs.monitor.as_ref(),
            self.proofs.ready.take(),
        ) else {
            return Begun::host("the destination is not known");
        };
        let Some(machine) = self.machine() else {
            return Begun::host("the log knows no such machine");
        };
        let step = Step::Send {
            nonce: monitor.nonce,
            migration: id,
            ready,
            options: migration.options.in_force(machine, &self.state.settings),
        };
        self.asked = Some(Op::Send(id));
        Begun::Step(step)
    }

    /// Takes in what came of an operation.
    fn take_in(&mut self, op: Op, answer: Answer, seen: &Seen) {
        match (op, answer) {
            (op, Answer::Failed(failure)) => self.step_failed(op, failure),
            (Op::Claim(token), Answer::Done) => {
                let claim = ClaimAck::acknowledged(self.work.vm, token, seen.now_ns);
                self.proofs.claim = Some(claim);
            }
            (Op::Built, Answer::Monitor(monitor)) => {
                self.proofs.building = false;
                self.proofs.monitor = Some(monitor);
            }
            (Op::Rekey(_), Answer::Monitor(monitor)) => self.proofs.monitor = Some(monitor),
            (Op::Confirm, Answer::Confirmed(state)) => {
                if let Some((begun, lease)) = self.proofs.confirm_begun {
                    self.proofs.confirm = Some(Confirm::read(state, begun, lease));
                }
            }
            (Op::AskReady(_), Answer::Ready(ready)) => self.proofs.ready = Some(ready),
            (Op::AskReady(id), Answer::NotReady { why, for_good }) => {
                let since = self.proofs.waits_since_ns.unwrap_or(seen.now_ns);
                let open = seen.state.migrations.get(&id);
                let ended = !open.is_some_and(Migration::is_active);
                let late = seen.now_ns.saturating_sub(since) >= READY_PATIENCE_NS;
                if for_good || ended || late {
                    let why = format!("the destination has no monitor ready: {why}");
                    self.step_failed(Op::AskReady(id), Failure::new(FailureKind::Host, why));
                } else {
                    self.ops.push_front(Op::AskReady(id));
                    self.ops.push_front(Op::Pause);
                }
            }
            (op, Answer::Begin | Answer::Monitor(_) | Answer::Confirmed(_))
            | (op, Answer::Ready(_) | Answer::NotReady { .. }) => {
                // An executor's mistake; nothing may be built on it.
                let why = format!("{op:?} was answered with something else");
                self.fail(Failure::new(FailureKind::Host, why));
            }
            (_, Answer::Done) => {}
        }
    }
}

/// How an operation began.
enum Begun {
    /// It needs an executor.
    Step(Step),
    /// It is done.
    Done,
    /// It cannot be done.
    Failed(Failure),
}

impl Begun {
    fn log(why: &(impl std::fmt::Display + ?Sized)) -> Begun {
        Begun::Failed(Failure::new(FailureKind::Log, why))
    }

    fn host(why: &str) -> Begun {
        Begun::Failed(Failure::new(FailureKind::Host, why))
    }
}

impl Flow {
    /// What follows from a step that was not done.
    fn step_failed(&mut self, op: Op, failure: Failure) {
        if matches!(op, Op::Built) {
            self.proofs.building = false;
        }
        let claim_failed = match (&op, failure.kind) {
            (Op::Claim(_), FailureKind::Burnt) => Some(false),
            (Op::Claim(_), FailureKind::RefusedForGood) => Some(true),
            _ => None,
        };
        if claim_failed == Some(false) && !self.safeguards.hold(Safeguard::ClaimOnce) {
            return self.ops.push_front(op);
        }
        match (&self.act, claim_failed) {
            // The next decision renews the token.
            (Some(Act::ClaimForCutover { .. }), Some(false)) => self.ops.clear(),
            // No later token would help: the source runs on after the abort and a re-key.
            (Some(Act::ClaimForCutover { migration, .. }), Some(true)) => {
                self.ops = [program::abort(*migration, &failure.why)].into();
            }
            // Not tried for ever: whoever wants the move queues it again.
            (Some(Act::Send { migration, .. }), _)
                if matches!(op, Op::AskReady(_) | Op::Send(_)) =>
            {
                self.ops = [program::abort(*migration, &failure.why)].into();
                self.failure = Some(failure);
            }
            _ => self.fail(failure),
        }
    }

    /// The act is given up; a monitor that it has begun and not waited for goes first.
    fn fail(&mut self, failure: Failure) {
        self.ops.clear();
        if std::mem::take(&mut self.proofs.building) {
            self.ops.push_back(Op::Built);
            self.ops
                .push_back(Op::EndBuilt("its token was not claimed"));
        }
        self.failure.get_or_insert(failure);
    }

    /// The act is over.
    fn conclude(&mut self) {
        let Some(act) = self.act.take() else {
            return;
        };
        let Some(failure) = self.failure.take() else {
            return;
        };
        self.failed = true;
        if let Act::Start { vm, token, .. } = act
            && is_the_machines_fault(failure.kind)
        {
            let why = failure.why.clone();
            self.learnt.push(Learnt::StartFailed(vm, token, why));
        }
        // What follows an end takes the monitor for gone.
        if act.ends().is_some() {
            self.acts.clear();
        }
        self.failures.push((act, failure));
    }

    fn over(&mut self) -> Next {
        let doubled = PAUSE_FIRST_NS.saturating_mul(1 << self.work.failures.min(10));
        Next::Over {
            ended: Ended {
                vm: self.work.vm,
                nonces: self.work.acts.iter().filter_map(Act::ends).collect(),
                is_flow: self.work.kind.is_some(),
                failed: self.failed,
                learnt: std::mem::take(&mut self.learnt),
            },
            pause_ns: if self.failed {
                doubled.min(PAUSE_MAX_NS)
            } else {
                0
            },
        }
    }
}

/// Whether a failed start counts against the machine. A burnt token is answered with a fresh one, and a log that did
/// not answer is asked again.
fn is_the_machines_fault(kind: FailureKind) -> bool {
    match kind {
        FailureKind::Burnt | FailureKind::Log => false,
        FailureKind::RefusedForGood | FailureKind::Host => true,
    }
}

#[cfg(test)]
mod tests;
