//! The acts of the agent as bounded work: start, re-key, thaw, stop, end, release.

use std::sync::Arc;
use std::time::Duration;

use cluster_model::agent::{Act, Learnt};
use cluster_model::{ClusterState, Command, MigrationId, ReleaseReason, Token, Vm, VmId};
use proto::monitor as wire;

use crate::broker::{BrokerError, ClaimAck};
use crate::machine_file::{self, Incoming, Place};
use crate::member::{CommandError, Member};
use crate::monitors::{self, Monitor, MonitorError};
use crate::permit::{Confirm, PermitError, RunPermit};
use crate::raft::ReadError;
use proto::failpoint::{self, Tripped};

/// A guest that was asked to stop may take this long before it is stopped.
const STOP_PATIENCE: Duration = Duration::from_secs(20);
/// How often a stopping monitor is looked at.
const STOP_LOOK: Duration = Duration::from_millis(50);
/// How long a monitor that is ended may take to say what it measured.
const LAST_WORD: Duration = Duration::from_millis(300);

/// Why an act was not carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum ActError {
    #[error("its command was not applied: {0}")]
    Command(#[from] CommandError),
    #[error("{0}")]
    Monitor(#[from] MonitorError),
    #[error("{0}")]
    Broker(#[from] BrokerError),
    #[error("the log was not confirmed: {0}")]
    Read(#[from] ReadError),
    #[error("no permit: {0}")]
    Permit(#[from] PermitError),
    #[error("{0}")]
    Tripped(#[from] Tripped),
    #[error("{vm} is not in the log any more")]
    NoMachine { vm: VmId },
    #[error("the monitor's phase does not prove that its files were claimed")]
    NoClaim,
    #[error("the log does not show the cutover here")]
    NoCutover,
    #[error("the destination has no monitor ready: {why}")]
    NotReady { why: String },
    #[error("no port for a memory stream is free between {first} and {last}")]
    NoPort { first: u16, last: u16 },
    #[error("the migration's ticket is malformed")]
    BadTicket,
}

/// One machine's flow.
pub(super) struct Flow {
    pub(super) member: Arc<Member>,
    /// The state that the acts were decided in.
    pub(super) state: Arc<ClusterState>,
    learnt: Vec<Learnt>,
}

impl Flow {
    pub(super) fn new(member: Arc<Member>, state: Arc<ClusterState>) -> Flow {
        Flow {
            member,
            state,
            learnt: Vec::new(),
        }
    }

    pub(super) fn into_learnt(self) -> Vec<Learnt> {
        self.learnt
    }

    /// Carries out one act. When it returns, the state and the monitors show what it did.
    pub(super) async fn act(&mut self, act: &Act) -> Result<(), ActError> {
        match act {
            Act::Start { vm, token, settle } => self.start(*vm, *token, *settle).await,
            Act::TakeUpToken {
                vm,
                token,
                settle,
                nonce,
            } => self.take_up_token(*vm, *token, *settle, *nonce).await,
            Act::Thaw { vm, nonce, .. } => self.thaw(*vm, *nonce).await,
            Act::Kill { nonce, why, .. } => self.end(*nonce, why).await,
            Act::DiscardIncoming { nonce, .. } => {
                self.end(*nonce, "its migration was aborted").await
            }
            Act::StopGuest { vm, token, forced } => self.stop_guest(*vm, *token, *forced).await,
            Act::Rekey {
                vm,
                expects,
                settle,
                reason,
            } => {
                if self.runs_again(*vm, *expects).await {
                    return Ok(());
                }
                self.propose(Command::Rekey {
                    vm: *vm,
                    node: self.member.node,
                    expects: *expects,
                    settle: *settle,
                    reason: reason.clone(),
                })
                .await
            }
            Act::Release {
                vm,
                expects,
                reason,
            } => {
                self.propose(Command::Release {
                    vm: *vm,
                    node: self.member.node,
                    expects: *expects,
                    reason: reason.clone(),
                })
                .await?;
                if matches!(reason, ReleaseReason::MonitorEnded(_)) {
                    metrics::counter!("clusterd_monitor_ended_total").increment(1);
                }
                Ok(())
            }
            Act::Activated { vm, token } => self.activated(*vm, *token).await,
            Act::PrepareIncoming { vm, migration, .. } => {
                self.prepare_incoming(*vm, *migration).await
            }
            Act::Send { vm, migration, .. } => self.send(*vm, *migration).await,
            Act::CancelSend { vm, migration } => self.cancel_send(*vm, *migration).await,
            Act::ClaimForCutover {
                vm,
                migration,
                reserved,
            } => self.claim_for_cutover(*vm, *migration, *reserved).await,
            Act::RenewToken {
                migration, burnt, ..
            } => {
                self.propose(Command::RenewMigrationToken {
                    migration: *migration,
                    burnt: *burnt,
                })
                .await
            }
            Act::ProposeCutover {
                migration,
                expects,
                claimed,
                ..
            } => self.cutover(*migration, *expects, *claimed).await,
            Act::ProposeAbort {
                migration, reason, ..
            } => self.abort(*migration, reason).await,
            Act::RunAfterCutover {
                vm,
                token,
                migration,
                nonce,
            } => {
                self.run_after_cutover(*vm, *token, *migration, *nonce)
                    .await
            }
            Act::ReportMigration { vm, migration } => self.report(*vm, *migration).await,
        }
    }

    pub(super) async fn propose(&self, command: Command) -> Result<(), ActError> {
        self.member.propose_own(command).await?;
        Ok(())
    }

    pub(super) fn learn(&mut self, learnt: Learnt) {
        self.learnt.push(learnt);
    }

    pub(super) fn vm(&self, vm: VmId) -> Result<&Vm, ActError> {
        self.state.vms.get(&vm).ok_or(ActError::NoMachine { vm })
    }

    async fn start(&mut self, vm: VmId, token: Token, settle: bool) -> Result<(), ActError> {
        match self.try_start(vm, token, settle).await {
            Ok(()) => Ok(()),
            // The next decision re-keys: the token counts as begun.
            Err(ActError::Broker(error @ BrokerError::Burnt { .. })) => {
                tracing::warn!(%vm, %error, "the token is burnt");
                Err(error.into())
            }
            // Neither is the machine's fault; it is decided anew under a fresh token.
            Err(
                error @ (ActError::Read(_)
                | ActError::Permit(_)
                | ActError::Command(_)
                | ActError::Tripped(_)),
            ) => Err(error),
            Err(error) => {
                self.learn(Learnt::StartFailed(vm, token, error.to_string()));
                Err(error)
            }
        }
    }

    async fn try_start(&mut self, id: VmId, token: Token, settle: bool) -> Result<(), ActError> {
        let vm = self.vm(id)?;
        self.member.broker.ensure().await?;
        if !vm.disks_made {
            self.member
                .broker
                .create_disks(&self.state, vm, token)
                .await?;
            self.propose(Command::DisksMade { vm: id, token }).await?;
        }
        // The monitor only looks its disks up before its first permit, so it may be built meanwhile.
        let (claimed, monitor) = tokio::join!(
            self.claim_and_settle(vm, token, settle, 0),
            self.build_monitor(vm, token, None)
        );
        let (claim, monitor) = match (claimed, monitor) {
            (Ok(claim), Ok(monitor)) => (claim, monitor),
            (claimed, monitor) => {
                if let Ok(monitor) = &monitor {
                    let nonce = monitor.nonce();
                    self.member
                        .monitors
                        .end(nonce, "its token was not claimed")
                        .await?;
                }
                claimed?;
                return monitor.map(drop);
            }
        };
        let confirm = Confirm::read(&self.member).await?;
        self.permit(claim, &confirm, &monitor).await?;
        self.activated(id, token).await
    }

    /// Claims every file of a machine; after a takeover waits until nothing of the old owner is under way
    /// in the storage server, and has the server write down what it holds.
    async fn claim_and_settle(
        &self,
        vm: &Vm,
        token: Token,
        settle: bool,
        write_latency_p999_us: u64,
    ) -> Result<ClaimAck, ActError> {
        failpoint::reach("agent.before_claim").await?;
        let claim = self.member.broker.claim(&self.state, vm, token).await?;
        failpoint::reach("agent.after_claim").await?;
        if settle && !vm.spec.disks.is_empty() {
            let settle = self.state.settle(vm, write_latency_p999_us);
            tracing::info!(vm = %vm.id, %token, settle_ms = settle.ms, "settling");
            if settle.is_bounded() {
                tracing::warn!(
                    vm = %vm.id,
                    measured_ms = settle.measured_ms,
                    settle_ms = settle.ms,
                    "its writes were so slow that what was measured is not waited in full"
                );
            }
            tokio::time::sleep(Duration::from_millis(settle.ms)).await;
            self.member
                .broker
                .verify_and_commit(&self.state, vm, token)
                .await?;
        }
        Ok(claim)
    }

    pub(super) async fn build_monitor(
        &self,
        vm: &Vm,
        token: Token,
        incoming: Option<Incoming>,
    ) -> Result<Monitor, ActError> {
        let name = match &incoming {
            Some(incoming) => monitors::name_of_incoming(vm.id, incoming.migration_id),
            None => monitors::name_of_start(vm.id, token),
        };
        let is_incoming = incoming.is_some();
        let place = Place {
            node: self.member.node,
            address: self.member.config.source_address(),
        };
        let bridges = &self.member.config.bridges;
        let file = machine_file::write(&self.state, vm, token, place, bridges, incoming)?;
        Ok(self.member.monitors.spawn(&name, file, is_incoming).await?)
    }

    /// Makes the permit and uses it; when it returns, the monitor's entry shows what came of it.
    pub(super) async fn permit(
        &self,
        claim: ClaimAck,
        confirm: &Confirm,
        monitor: &Monitor,
    ) -> Result<wire::RunReply, ActError> {
        failpoint::reach("agent.before_permit").await?;
        let permit = RunPermit::new(
            self.member.node,
            claim,
            confirm,
            &monitor.status,
            self.member.clock.boottime_ns(),
        )?;
        let ran = permit.send(monitor).await;
        self.member.monitors.refresh(monitor.nonce()).await;
        let ran = ran?;
        failpoint::reach("agent.after_permit").await?;
        Ok(ran)
    }

    pub(super) async fn activated(&self, vm: VmId, token: Token) -> Result<(), ActError> {
        self.propose(Command::Activated {
            vm,
            node: self.member.node,
            token,
        })
        .await
    }

    async fn take_up_token(
        &mut self,
        id: VmId,
        token: Token,
        settle: bool,
        nonce: u64,
    ) -> Result<(), ActError> {
        self.member.broker.ensure().await?;
        let vm = self.vm(id)?;
        let before = self.member.monitors.get(nonce)?;
        let latency_us = before
            .status
            .usage
            .as_ref()
            .map_or(0, |usage| usage.write_latency_p999_us);
        let claim = match self.claim_and_settle(vm, token, settle, latency_us).await {
            Ok(claim) => claim,
            // A guest that waits does so until its disks can be claimed again.
            Err(ActError::Broker(
                error @ (BrokerError::Burnt { .. } | BrokerError::ClaimRefused { .. }),
            )) => {
                tracing::warn!(vm = %id, %error, "the token is burnt");
                return Err(error.into());
            }
            Err(error) => return Err(error),
        };
        let confirm = Confirm::read(&self.member).await?;
        // The monitor is told a token only after the log said that it is current.
        cluster_model::agent::permit_allowed(confirm.state(), id, self.member.node, token)
            .map_err(PermitError::from)?;
        let monitor = self.rekey(&before, token).await?;
        self.permit(claim, &confirm, &monitor).await?;
        self.activated(id, token).await
    }

    /// Gives a monitor a token that is claimed and confirmed; gives the monitor as it then describes itself.
    pub(super) async fn rekey(&self, monitor: &Monitor, token: Token) -> Result<Monitor, ActError> {
        let rekeyed = monitor.rekey(token).await;
        self.member.monitors.refresh(monitor.nonce()).await;
        rekeyed?;
        Ok(self.member.monitors.get(monitor.nonce())?)
    }

    async fn thaw(&self, vm: VmId, nonce: u64) -> Result<(), ActError> {
        let monitor = self.member.monitors.get(nonce)?;
        let claim = ClaimAck::of_a_machine_that_ran(&monitor.status).ok_or(ActError::NoClaim)?;
        let confirm = Confirm::read(&self.member).await?;
        self.permit(claim, &confirm, &monitor).await?;
        tracing::info!(%vm, "thawed: the lease is back and the token has not moved");
        metrics::counter!("clusterd_lease_thaws_total").increment(1);
        Ok(())
    }

    /// Whether the machine's monitor runs under that token by now: what was decided rests on an older status.
    async fn runs_again(&self, vm: VmId, token: Token) -> bool {
        let table = self.member.monitors.table().borrow().clone();
        let of = |monitor: &&Monitor| monitor.vm() == vm && monitor.token() == token;
        let Some(nonce) = table.values().find(of).map(Monitor::nonce) else {
            return false;
        };
        self.member.monitors.refresh(nonce).await;
        self.is_running(nonce)
    }

    async fn end(&self, nonce: u64, why: &str) -> Result<(), ActError> {
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

    async fn stop_guest(&self, vm: VmId, token: Token, forced: bool) -> Result<(), ActError> {
        let Some(monitor) = self
            .member
            .monitors
            .table()
            .borrow()
            .values()
            .find(|monitor| monitor.vm() == vm && monitor.token() == token)
            .cloned()
        else {
            return Ok(());
        };
        let nonce = monitor.nonce();
        monitor.stop(token, forced).await?;
        let deadline = tokio::time::Instant::now() + STOP_PATIENCE;
        while self.is_running(nonce) {
            if tokio::time::Instant::now() >= deadline {
                tracing::warn!(%vm, "the guest did not stop when asked; stopping it");
                monitor.stop(token, true).await?;
                self.member.monitors.refresh(nonce).await;
                return Ok(());
            }
            tokio::time::sleep(STOP_LOOK).await;
        }
        Ok(())
    }

    fn is_running(&self, nonce: u64) -> bool {
        self.member
            .monitors
            .get(nonce)
            .is_ok_and(|monitor| monitor.status.phase() == wire::Phase::Running)
    }
}
