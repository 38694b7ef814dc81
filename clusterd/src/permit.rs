//! The run permit: the one way by which this node lets a guest run (rule R7).
//!
//! ```text
//!  applied entry (the log's owner and token) ─┐
//!  claim acknowledgement (every file)        ─┼─► RunPermit::new ─► RunPermit::send ─► the monitor
//!  confirm (the log, after the claim)        ─┘        (refuses)      (consumes it)
//! ```
//! A [`RunPermit`] has private fields and one constructor, is not `Clone`, and is used up by being sent.

use std::sync::Arc;

use cluster_model::agent::{PermitRefusal, permit_allowed};
use cluster_model::{ClusterState, LogIndex, MigrationState, NodeId, OwnershipCause, Token, VmId};
use proto::monitor as wire;

use crate::broker::ClaimAck;
use crate::member::Member;
use crate::monitors::{Monitor, MonitorError};
use crate::raft::ReadError;

/// What the log says now, linearizably.
#[derive(Debug)]
pub struct Confirm {
    state: Arc<ClusterState>,
    /// When it was asked for, CLOCK_BOOTTIME; `None`: it stands by a cutover entry, which came after the
    /// acknowledged claim that it names.
    begun_boottime_ns: Option<u64>,
    /// The end of the lease that was held before the log was looked at: what was read is good that long. A later
    /// lease may have been granted after the machine went to another node.
    lease_deadline_ns: u64,
}

impl Confirm {
    /// A linearizable read that begins now.
    ///
    /// # Errors
    /// When no quorum confirms it in time.
    pub async fn read(member: &Member) -> Result<Confirm, ReadError> {
        let (raft, clock) = (&member.raft, &member.clock);
        let lease_deadline_ns = member.lease.borrow().deadline_ns;
        let begun = clock.boottime_ns();
        raft.read_index().await?;
        let state = raft.state().borrow().clone();
        Ok(Confirm {
            state,
            begun_boottime_ns: Some(begun),
            lease_deadline_ns,
        })
    }

    /// The applied cutover of `vm` to `node`, with the claim that it names: the destination proposes it
    /// only when every file has acknowledged that token, and `apply` compares the token. `None` when the
    /// machine is not owned by such an entry. `lease_deadline_ns` was read before `state`.
    pub fn by_cutover(
        state: &Arc<ClusterState>,
        vm: VmId,
        node: NodeId,
        lease_deadline_ns: u64,
    ) -> Option<(ClaimAck, Confirm)> {
        let record = &state.vms.get(&vm)?.ownership;
        let cut_over = record.cause == OwnershipCause::Cutover && record.owner == Some(node);
        cut_over.then(|| {
            let claim = ClaimAck::named_by_a_cutover(vm, record.token);
            let confirm = Confirm {
                state: state.clone(),
                begun_boottime_ns: None,
                lease_deadline_ns,
            };
            (claim, confirm)
        })
    }

    /// The state that was confirmed.
    pub fn state(&self) -> &ClusterState {
        &self.state
    }
}

/// The right to let one machine run, under one token, in one monitor, until one deadline.
#[derive(Debug, PartialEq, Eq)]
pub struct RunPermit {
    vm: VmId,
    token: Token,
    log_index: LogIndex,
    lease_deadline_ns: u64,
    nonce: u64,
}

/// Why no permit was made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PermitError {
    /// The log says otherwise.
    #[error(transparent)]
    Log(#[from] PermitRefusal),
    /// The confirm was begun before the claim was acknowledged: the log may have moved between.
    #[error("the confirm for {vm} began before its claim was acknowledged: ask again")]
    ConfirmTooEarly {
        /// Which machine.
        vm: VmId,
    },
    /// The monitor runs another machine.
    #[error("the claim is for {claimed}, and the monitor runs {monitor}")]
    OtherMachine {
        /// Whose files were claimed.
        claimed: VmId,
        /// Whose monitor it is.
        monitor: VmId,
    },
    /// The monitor has not taken up the claimed token.
    #[error("{vm}: {claimed} was claimed, and its monitor stands under {monitor}: re-key it first")]
    OtherToken {
        /// Which machine.
        vm: VmId,
        /// What was claimed.
        claimed: Token,
        /// What the monitor has.
        monitor: Token,
    },
    /// A source that said quiet runs again only after the applied abort, under a fresher token.
    #[error(
        "{vm} said quiet: it runs again only under a token granted after its migration's abort"
    )]
    SaidQuiet {
        /// Which machine.
        vm: VmId,
    },
    /// This node does not hold its lease.
    #[error("{vm} may not run: this node's lease ran out {} ms ago", late_ns / 1_000_000)]
    LeasePassed {
        /// Which machine.
        vm: VmId,
        /// How long ago.
        late_ns: u64,
    },
}

impl RunPermit {
    /// Makes a permit for `monitor` out of the three proofs, or says which one is missing.
    ///
    /// # Errors
    /// See [`PermitError`].
    pub fn new(
        node: NodeId,
        claim: ClaimAck,
        confirm: &Confirm,
        monitor: &wire::MonitorStatus,
        now_boottime_ns: u64,
    ) -> Result<RunPermit, PermitError> {
        let (vm, token) = (claim.vm(), claim.token());
        let lease_deadline_ns = confirm.lease_deadline_ns;
        if monitor.vm_id != vm.0 {
            return Err(PermitError::OtherMachine {
                claimed: vm,
                monitor: VmId(monitor.vm_id),
            });
        }
        if monitor.token != token.0 {
            return Err(PermitError::OtherToken {
                vm,
                claimed: token,
                monitor: Token(monitor.token),
            });
        }
        if confirm
            .begun_boottime_ns
            .is_some_and(|begun| begun < claim.at_boottime_ns())
        {
            return Err(PermitError::ConfirmTooEarly { vm });
        }
        let log_index = permit_allowed(&confirm.state, vm, node, token)?;
        if monitor.said_quiet && !token_is_after_abort(&confirm.state, vm, monitor) {
            return Err(PermitError::SaidQuiet { vm });
        }
        if lease_deadline_ns <= now_boottime_ns {
            return Err(PermitError::LeasePassed {
                vm,
                late_ns: now_boottime_ns - lease_deadline_ns,
            });
        }
        Ok(RunPermit {
            vm,
            token,
            log_index,
            lease_deadline_ns,
            nonce: monitor.nonce,
        })
    }

    /// Uses the permit up: the monitor lets its guest run.
    ///
    /// # Errors
    /// What the monitor says; whether the guest runs is then known from its next status only.
    pub async fn send(self, monitor: &Monitor) -> Result<wire::RunReply, MonitorError> {
        tracing::info!(vm = %self.vm, token = %self.token, entry = %self.log_index, "run permit");
        monitor
            .run(wire::RunPermit {
                vm_id: self.vm.0,
                token: self.token.0,
                log_index: self.log_index.0,
                lease_deadline_ns: self.lease_deadline_ns,
                nonce: self.nonce,
            })
            .await
    }
}

/// Whether the machine's token was granted by a re-key after the abort of the migration in which this
/// monitor said quiet.
fn token_is_after_abort(state: &ClusterState, vm: VmId, monitor: &wire::MonitorStatus) -> bool {
    let Some(record) = state.vms.get(&vm).map(|vm| &vm.ownership) else {
        return false;
    };
    let migration = monitor.migration.as_ref().and_then(|part| {
        state
            .migrations
            .get(&cluster_model::MigrationId(part.migration_id))
    });
    record.cause == OwnershipCause::Rekey
        && match migration.map(|migration| &migration.state) {
            Some(MigrationState::Aborted { at, .. }) => record.since > *at,
            Some(
                MigrationState::Queued
                | MigrationState::Active { .. }
                | MigrationState::CutOver { .. },
            ) => false,
            // Ended so long ago that it is forgotten; a cutover would have moved the token beyond this
            // monitor's, which was compared.
            None => true,
        }
}

#[cfg(test)]
mod tests;
