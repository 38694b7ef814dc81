//! The run permit: the one way by which a node lets a guest run (rule R7).
//!
//! ```text
//!  applied entry (the log's owner and token) ─┐
//!  claim acknowledgement (every file)        ─┼─► RunPermit ─► the monitor's Run call
//!  confirm (the log, after the claim)        ─┘  (refuses)     (consumes it)
//! ```
//! A [`RunPermit`] has private fields, is not `Clone`, and its one constructor is closed to other crates: only a
//! [`crate::flow::Flow`] makes one, out of the answers to its own steps. An executor can do nothing with it but
//! hand it to a monitor.

use std::sync::Arc;

use crate::agent::{MonitorPhase, MonitorView, PermitRefusal, permit_allowed};
use crate::ids::{LogIndex, NodeId, Token, VmId};
use crate::safeguards::{Safeguard, Safeguards};
use crate::state::{ClusterState, MigrationState, OwnershipCause};

/// Every file of a machine acknowledged a claim of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClaimAck {
    vm: VmId,
    token: Token,
    /// When the last acknowledgement had come, ns on the node's clock that never stops.
    at_ns: u64,
}

impl ClaimAck {
    pub(crate) fn acknowledged(vm: VmId, token: Token, at_ns: u64) -> ClaimAck {
        ClaimAck { vm, token, at_ns }
    }

    /// The claim that a stopped monitor stands on: it froze while it ran under its token, or was re-keyed to it
    /// after it had said quiet; both happen only after every file had acknowledged that token. `None` when its
    /// phase does not prove it.
    pub fn of_a_machine_that_ran(monitor: &MonitorView) -> Option<ClaimAck> {
        let proves = match monitor.phase {
            MonitorPhase::Frozen => true,
            // Under the token that it said quiet under it may not run: the permit refuses that.
            MonitorPhase::Quiet => monitor.said_quiet,
            MonitorPhase::Ready
            | MonitorPhase::Running
            | MonitorPhase::Refused
            | MonitorPhase::Incoming
            | MonitorPhase::Complete
            | MonitorPhase::Stopped
            | MonitorPhase::Failed => false,
        };
        proves.then_some(ClaimAck {
            vm: monitor.vm,
            token: monitor.token,
            at_ns: 0,
        })
    }

    /// The token that they acknowledged.
    pub fn token(&self) -> Token {
        self.token
    }
}

/// What the log says, linearizably.
#[derive(Clone, Debug)]
pub struct Confirm {
    state: Arc<ClusterState>,
    /// When it was asked for, on the clock of [`ClaimAck`]; `None`: it stands by a cutover entry, which came after
    /// the acknowledged claim that it names.
    begun_ns: Option<u64>,
    /// The end of the lease that was held before the log was looked at: what was read is good that long. A later
    /// lease may have been granted after the machine went to another node.
    lease_deadline_ns: u64,
}

impl Confirm {
    pub(crate) fn read(state: Arc<ClusterState>, begun_ns: u64, lease_deadline_ns: u64) -> Confirm {
        Confirm {
            state,
            begun_ns: Some(begun_ns),
            lease_deadline_ns,
        }
    }

    /// The applied cutover of `vm` to `node`, with the claim that it names: the destination proposes it only when
    /// every file has acknowledged that token, and `apply` compares the token. `None` when the machine is not owned
    /// by such an entry. `lease_deadline_ns` was read before `state`.
    pub fn by_cutover(
        state: &Arc<ClusterState>,
        vm: VmId,
        node: NodeId,
        lease_deadline_ns: u64,
    ) -> Option<(ClaimAck, Confirm)> {
        let record = &state.vms.get(&vm)?.ownership;
        let cut_over = record.cause == OwnershipCause::Cutover && record.owner == Some(node);
        cut_over.then(|| {
            let claim = ClaimAck::acknowledged(vm, record.token, 0);
            let confirm = Confirm {
                state: state.clone(),
                begun_ns: None,
                lease_deadline_ns,
            };
            (claim, confirm)
        })
    }

    /// The mutant's: good for another lease than the one that it was read under.
    pub(crate) fn with_lease(&self, lease_deadline_ns: u64) -> Confirm {
        Confirm {
            lease_deadline_ns,
            ..self.clone()
        }
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
    pub(crate) fn new(
        node: NodeId,
        claim: ClaimAck,
        confirm: &Confirm,
        monitor: &MonitorView,
        now_ns: u64,
        safeguards: Safeguards,
    ) -> Result<RunPermit, PermitError> {
        let ClaimAck { vm, token, at_ns } = claim;
        if monitor.vm != vm {
            return Err(PermitError::OtherMachine {
                claimed: vm,
                monitor: monitor.vm,
            });
        }
        if monitor.token != token {
            return Err(PermitError::OtherToken {
                vm,
                claimed: token,
                monitor: monitor.token,
            });
        }
        if confirm.begun_ns.is_some_and(|begun| begun < at_ns)
            && safeguards.hold(Safeguard::ConfirmAfterClaim)
        {
            return Err(PermitError::ConfirmTooEarly { vm });
        }
        let log_index = permit_allowed(&confirm.state, vm, node, token)?;
        if monitor.said_quiet
            && !token_is_after_abort(&confirm.state, vm, monitor)
            && safeguards.hold(Safeguard::QuietBinds)
        {
            return Err(PermitError::SaidQuiet { vm });
        }
        let lease_deadline_ns = confirm.lease_deadline_ns;
        if lease_deadline_ns <= now_ns {
            return Err(PermitError::LeasePassed {
                vm,
                late_ns: now_ns - lease_deadline_ns,
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

    /// The machine.
    pub fn vm(&self) -> VmId {
        self.vm
    }

    /// The token that it runs under.
    pub fn token(&self) -> Token {
        self.token
    }

    /// The entry that allows it.
    pub fn log_index(&self) -> LogIndex {
        self.log_index
    }

    /// Until when, absolute, ns on the host's clock that never stops.
    pub fn lease_deadline_ns(&self) -> u64 {
        self.lease_deadline_ns
    }

    /// The monitor that it is for.
    pub fn nonce(&self) -> u64 {
        self.nonce
    }
}

/// Whether the machine's token was granted by a re-key after the abort of the migration in which this monitor
/// said quiet.
fn token_is_after_abort(state: &ClusterState, vm: VmId, monitor: &MonitorView) -> bool {
    let Some(record) = state.vms.get(&vm).map(|vm| &vm.ownership) else {
        return false;
    };
    let migration = monitor
        .migration
        .as_ref()
        .and_then(|part| state.migrations.get(&part.id));
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
