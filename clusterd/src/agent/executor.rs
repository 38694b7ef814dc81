//! Carries out the steps of the agent's flows. What comes next is decided in `cluster_model::flow` alone; here each
//! step is one call, and its answer.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use cluster_model::agent::{Act, Ended};
use cluster_model::flow::{Answer, Failure, FailureKind, Flow, Next, Seen, Step, Waits};
use cluster_model::{ClusterState, Command, MigrationId, ReleaseReason, Token, Vm, VmId};
use proto::failpoint::{self, Tripped};
use tokio::task::JoinHandle;

use super::view;
use crate::broker::BrokerError;
use crate::machine_file::{self, Incoming, Place};
use crate::member::{CommandError, Member};
use crate::monitors::{self, Monitor, MonitorError};
use crate::permit;
use crate::raft::ReadError;

/// How long a monitor that is ended may take to say what it measured.
const LAST_WORD: Duration = Duration::from_millis(300);

/// Why a step was not carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum StepError {
    #[error("its command was not applied: {0}")]
    Command(#[from] CommandError),
    #[error("{0}")]
    Monitor(#[from] MonitorError),
    #[error("{0}")]
    Broker(#[from] BrokerError),
    #[error("the log was not confirmed: {0}")]
    Read(#[from] ReadError),
    #[error("{0}")]
    Tripped(#[from] Tripped),
    #[error("{vm} is not in the log any more")]
    NoMachine { vm: VmId },
    #[error("no monitor was being built")]
    NotBuilding,
    #[error("the making of its monitor was broken off")]
    BuildEnded,
    #[error("no port for a memory stream is free between {first} and {last}")]
    NoPort { first: u16, last: u16 },
    #[error("the migration's ticket is missing or malformed")]
    BadTicket,
}

impl StepError {
    /// What it means to the flow.
    fn failure(&self) -> Failure {
        let kind = match self {
            StepError::Broker(BrokerError::Burnt { .. }) => FailureKind::Burnt,
            StepError::Broker(BrokerError::ClaimRefused { .. }) => FailureKind::RefusedForGood,
            StepError::Command(_) | StepError::Read(_) | StepError::Tripped(_) => FailureKind::Log,
            StepError::Broker(
                BrokerError::NotStarted { .. }
                | BrokerError::TimedOut { .. }
                | BrokerError::Refused { .. }
                | BrokerError::NoVolume { .. },
            )
            | StepError::Monitor(_)
            | StepError::NoMachine { .. }
            | StepError::NotBuilding
            | StepError::BuildEnded
            | StepError::NoPort { .. }
            | StepError::BadTicket => FailureKind::Host,
        };
        Failure::new(kind, chain(self))
    }
}

/// Carries out one flow to its end. What the agent takes in comes after the flow's pause.
pub(super) async fn run(member: Arc<Member>, mut flow: Flow) -> Ended {
    let mut executor = Executor {
        state: flow.state().clone(),
        member,
        building: None,
        asked_ready: None,
    };
    let mut answer = Answer::Begin;
    loop {
        let next = flow.next(answer, &executor.seen(flow.vm()));
        for (act, failure) in flow.take_failures() {
            let (vm, act, why) = (act.vm(), name(&act), failure.why);
            tracing::warn!(%vm, act, error = why, "an act of the agent failed");
        }
        let step = match next {
            Next::Do(step) => step,
            Next::Over { ended, pause_ns } => {
                if pause_ns > 0 {
                    tokio::time::sleep(Duration::from_nanos(pause_ns)).await;
                }
                return ended;
            }
        };
        tracing::debug!(?step, "step");
        answer = match executor.step(flow.act(), step).await {
            Ok(answer) => answer,
            Err(error) => Answer::Failed(error.failure()),
        };
    }
}

/// One flow's means.
pub(super) struct Executor {
    pub(super) member: Arc<Member>,
    /// The state that the acts were decided in.
    pub(super) state: Arc<ClusterState>,
    building: Option<JoinHandle<Result<Monitor, StepError>>>,
    /// When a destination was first asked whether it is ready.
    pub(super) asked_ready: Option<(Instant, SystemTime)>,
}

impl Executor {
    fn seen(&self, vm: VmId) -> Seen {
        // The lease before the state: see `Seen`.
        let lease_deadline_ns = self.member.lease.borrow().deadline_ns;
        let state = self.member.state();
        let table = self.member.monitors.table().borrow().clone();
        let now_ns = self.member.clock.boottime_ns();
        let of_machine = table.values().filter(|monitor| monitor.vm() == vm);
        Seen {
            lease_deadline_ns,
            monitors: of_machine
                .map(|monitor| view::monitor_view(self.member.node, &state, monitor, now_ns))
                .collect(),
            state,
            now_ns,
        }
    }

    /// Carries out one step. When it returns, the state and the monitors show what it did.
    async fn step(&mut self, act: Option<&Act>, step: Step) -> Result<Answer, StepError> {
        let member = self.member.clone();
        match step {
            Step::EnsureBroker => member.broker.ensure().await?,
            Step::MakeDisks { vm, token } => {
                let vm = self.vm(vm)?;
                member.broker.create_disks(&self.state, vm, token).await?;
            }
            Step::Propose(command) => self.propose(act, *command).await?,
            Step::Claim { vm, token } => self.claim(act, vm, token).await?,
            Step::Wait { ns, why } => {
                if let Waits::Settle(settle) = why {
                    let (settle_ms, measured_ms) = (settle.ms, settle.measured_ms);
                    tracing::info!(act = act.map(name), settle_ms, "settling");
                    if settle.is_bounded() {
                        tracing::warn!(
                            measured_ms,
                            settle_ms,
                            "its writes were so slow that what was measured is not waited in full"
                        );
                    }
                }
                tokio::time::sleep(Duration::from_nanos(ns)).await;
            }
            Step::VerifyAndCommit { vm, token } => {
                let (vm, broker) = (self.vm(vm)?, &member.broker);
                broker.verify_and_commit(&self.state, vm, token).await?;
            }
            Step::Build {
                vm,
                token,
                incoming,
            } => self.begin_to_build(vm, token, incoming)?,
            Step::Built => {
                let building = self.building.take().ok_or(StepError::NotBuilding)?;
                let built = building.await.map_err(|_| StepError::BuildEnded)??;
                return Ok(Answer::Monitor(self.view(&built)));
            }
            Step::Confirm => {
                member.raft.read_index().await?;
                return Ok(Answer::Confirmed(member.state()));
            }
            Step::Rekey { nonce, token } => {
                let rekeyed = member.monitors.get(nonce)?.rekey(token).await;
                member.monitors.refresh(nonce).await;
                rekeyed?;
                return Ok(Answer::Monitor(self.view(&member.monitors.get(nonce)?)));
            }
            Step::Run(permit) => self.hand_over(act, permit).await?,
            Step::End { nonce, why } => self.end(nonce, &why).await?,
            Step::Stop {
                nonce,
                token,
                forced,
            } => member.monitors.get(nonce)?.stop(token, forced).await?,
            Step::Refresh { nonce } => member.monitors.refresh(nonce).await,
            Step::AskReady {
                to,
                migration,
                nonce,
            } => return self.ask_ready(to, migration, nonce).await,
            Step::Send {
                nonce,
                migration,
                ready,
                options,
            } => self.send(nonce, migration, ready, options).await?,
            Step::CancelSend { nonce, migration } => {
                let monitor = member.monitors.get(nonce)?;
                let cancelled = monitor
                    .cancel_migration(migration, "the migration was aborted")
                    .await;
                member.monitors.refresh(nonce).await;
                cancelled?;
            }
            Step::Report { vm, migration } => self.report(vm, migration).await?,
        }
        Ok(Answer::Done)
    }

    pub(super) fn vm(&self, vm: VmId) -> Result<&Vm, StepError> {
        self.state.vms.get(&vm).ok_or(StepError::NoMachine { vm })
    }

    fn view(&self, monitor: &Monitor) -> cluster_model::MonitorView {
        let now_ns = self.member.clock.boottime_ns();
        view::monitor_view(self.member.node, &self.member.state(), monitor, now_ns)
    }

    /// Proposes a command of this node's own; the failpoints stand around those that a cutover may race with.
    pub(super) async fn propose(
        &self,
        act: Option<&Act>,
        command: Command,
    ) -> Result<(), StepError> {
        let member = &self.member;
        match command {
            Command::Cutover { migration, .. } => {
                failpoint::reach("agent.before_cutover").await?;
                let proposed_ns = member.clock.monotonic_ns();
                member.propose_own(command).await?;
                let applied_ns = member.clock.monotonic_ns();
                member.measure(migration, |measured| {
                    measured.handover.proposed_ns = proposed_ns;
                    measured.handover.applied_ns = applied_ns;
                });
                failpoint::reach("agent.after_cutover").await?;
            }
            Command::AbortMigration { .. } => {
                failpoint::reach("agent.before_abort").await?;
                member.propose_own(command).await?;
                metrics::counter!("clusterd_migration_failed_total", "phase" => "active")
                    .increment(1);
                failpoint::reach("agent.after_abort").await?;
            }
            command => {
                member.propose_own(command).await?;
            }
        }
        if let Some(Act::Release {
            reason: ReleaseReason::MonitorEnded(_),
            ..
        }) = act
        {
            metrics::counter!("clusterd_monitor_ended_total").increment(1);
        }
        Ok(())
    }

    async fn claim(&self, act: Option<&Act>, vm: VmId, token: Token) -> Result<(), StepError> {
        let member = &self.member;
        let vm = self.vm(vm)?;
        failpoint::reach("agent.before_claim").await?;
        let begun_ns = member.clock.monotonic_ns();
        let claimed = member.broker.claim(&self.state, vm, token).await;
        if let Err(error @ BrokerError::Burnt { .. }) = &claimed {
            tracing::warn!(vm = %vm.id, %error, "the token is burnt");
        }
        claimed?;
        let claimed_ns = member.clock.monotonic_ns();
        failpoint::reach("agent.after_claim").await?;
        if let Some(Act::ClaimForCutover { migration, .. }) = act {
            member.measure(*migration, |measured| {
                measured.handover.claim_begun_ns = begun_ns;
                measured.handover.claimed_ns = claimed_ns;
            });
        }
        Ok(())
    }

    fn begin_to_build(
        &mut self,
        vm: VmId,
        token: Token,
        migration: Option<MigrationId>,
    ) -> Result<(), StepError> {
        let vm = self.vm(vm)?;
        let incoming = match migration {
            Some(migration) => Some(Incoming {
                migration_id: migration,
                ticket: self
                    .ticket(migration)
                    .ok_or(StepError::BadTicket)?
                    .to_owned(),
                listen: vec![self.free_address()?],
            }),
            None => None,
        };
        let name = match migration {
            Some(migration) => monitors::name_of_incoming(vm.id, migration),
            None => monitors::name_of_start(vm.id, token),
        };
        let place = Place {
            node: self.member.node,
            address: self.member.config.source_address(),
        };
        let bridges = &self.member.config.bridges;
        let file = machine_file::write(&self.state, vm, token, place, bridges, incoming)?;
        let monitors = self.member.monitors.clone();
        self.building = Some(tokio::spawn(async move {
            Ok(monitors.spawn(&name, file, migration.is_some()).await?)
        }));
        Ok(())
    }

    /// Uses the permit up; when it returns, the monitor's entry shows what came of it.
    async fn hand_over(
        &self,
        act: Option<&Act>,
        permit: cluster_model::permit::RunPermit,
    ) -> Result<(), StepError> {
        let (member, vm) = (&self.member, permit.vm());
        let permit_ns = member.clock.monotonic_ns();
        failpoint::reach("agent.before_permit").await?;
        let monitor = member.monitors.get(permit.nonce())?;
        let ran = permit::send(permit, &monitor).await;
        member.monitors.refresh(monitor.nonce()).await;
        ran?;
        failpoint::reach("agent.after_permit").await?;
        match act {
            Some(Act::RunAfterCutover { migration, .. }) => {
                member.measure(*migration, |measured| {
                    measured.handover.permit_ns = permit_ns
                });
            }
            Some(Act::Thaw { .. }) => {
                tracing::info!(%vm, "thawed: the lease is back and the token has not moved");
                metrics::counter!("clusterd_lease_thaws_total").increment(1);
            }
            _ => {}
        }
        Ok(())
    }

    async fn end(&self, nonce: u64, why: &str) -> Result<(), StepError> {
        let Ok(monitor) = self.member.monitors.get(nonce) else {
            return Ok(());
        };
        tracing::info!(vm = %monitor.vm(), pid = monitor.pid, why, "ending a monitor");
        self.keep_measurements(&monitor).await;
        Ok(self.member.monitors.end(nonce, why).await?)
    }

    /// A source's measurements go with its process; its summary still needs them.
    async fn keep_measurements(&self, monitor: &Monitor) {
        let described = tokio::time::timeout(LAST_WORD, monitor.describe()).await;
        let status = described.ok().and_then(Result::ok);
        let progress = status.as_ref().unwrap_or(&monitor.status).migration.clone();
        if let Some(progress) = progress {
            let migration = MigrationId(progress.migration_id);
            self.member
                .measure(migration, |measured| measured.source = Some(progress));
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

fn name(act: &Act) -> &'static str {
    match act {
        Act::Start { .. } => "start",
        Act::Rekey { .. } => "rekey",
        Act::TakeUpToken { .. } => "take up token",
        Act::Thaw { .. } => "thaw",
        Act::Kill { .. } => "kill",
        Act::StopGuest { .. } => "stop guest",
        Act::Release { .. } => "release",
        Act::Activated { .. } => "activated",
        Act::PrepareIncoming { .. } => "prepare incoming",
        Act::Send { .. } => "send",
        Act::CancelSend { .. } => "cancel send",
        Act::ClaimForCutover { .. } => "claim for cutover",
        Act::RenewToken { .. } => "renew token",
        Act::ProposeCutover { .. } => "cutover",
        Act::ProposeAbort { .. } => "abort",
        Act::RunAfterCutover { .. } => "run after cutover",
        Act::DiscardIncoming { .. } => "discard incoming",
        Act::ReportMigration { .. } => "report migration",
    }
}
