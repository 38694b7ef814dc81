//! What the agent sees when it decides, and what its memory takes in and forgets.

use std::collections::BTreeSet;

use cluster_model::agent::{Act, MonitorMigration, MonitorPhase, MonitorView, NodeView, Side};
use cluster_model::{ClusterState, MigrationId, NodeId, Token, VmId};
use proto::monitor as wire;

use super::Memory;
use crate::member::Member;
use crate::monitors::{Monitor, Table};

pub(super) fn build(
    member: &Member,
    memory: &Memory,
    state: &ClusterState,
    monitors: &Table,
) -> NodeView {
    let now_ns = member.clock.boottime_ns();
    NodeView {
        me: member.node,
        incarnation: member.incarnation,
        session_since: *member.session_since.borrow(),
        lease_valid: member.lease_is_valid(),
        monitors: monitors
            .values()
            .map(|monitor| monitor_view(member.node, state, monitor, now_ns))
            .collect(),
        flows: memory.flows.clone(),
        begun: memory.begun.clone(),
        claimed: memory.claimed.clone(),
        start_failures: memory.start_failures.clone(),
        prepared: memory.prepared.clone(),
        quiet_lost: memory.quiet_lost.clone(),
    }
}

fn monitor_view(me: NodeId, state: &ClusterState, monitor: &Monitor, now_ns: u64) -> MonitorView {
    let status = &monitor.status;
    let deadline = status.lease_deadline_ns;
    MonitorView {
        vm: monitor.vm(),
        token: monitor.token(),
        nonce: monitor.nonce(),
        phase: phase(status.phase()),
        said_quiet: status.said_quiet,
        writes_unanswered: status.writes_unanswered,
        migration: monitor.migration().map(|id| MonitorMigration {
            id,
            side: side(me, state, monitor, id),
            quiet_received: status
                .migration
                .as_ref()
                .and_then(|progress| progress.timings.as_ref())
                .is_some_and(|timings| timings.quiet_received_ns != 0),
            failed: status
                .migration
                .as_ref()
                .filter(|progress| progress.stage() == wire::MigrationStage::Failed)
                .map(|progress| progress.failure.clone()),
        }),
        failure: (!status.failure.is_empty()).then(|| status.failure.clone()),
        lease_deadline_passed: deadline != 0 && deadline <= now_ns,
    }
}

fn side(me: NodeId, state: &ClusterState, monitor: &Monitor, id: MigrationId) -> Side {
    match state.migrations.get(&id) {
        Some(migration) if migration.to == me => Side::Destination,
        Some(_) => Side::Source,
        // Not applied here yet, or forgotten: it receives what it was started to receive.
        None if monitor.incoming == Some(id) => Side::Destination,
        None => Side::Source,
    }
}

fn phase(phase: wire::Phase) -> MonitorPhase {
    match phase {
        // Before it knows better itself, it is not yet permitted.
        wire::Phase::Unspecified | wire::Phase::Ready => MonitorPhase::Ready,
        wire::Phase::Running => MonitorPhase::Running,
        wire::Phase::Frozen => MonitorPhase::Frozen,
        wire::Phase::Refused => MonitorPhase::Refused,
        wire::Phase::Quiet => MonitorPhase::Quiet,
        wire::Phase::Incoming => MonitorPhase::Incoming,
        wire::Phase::Complete => MonitorPhase::Complete,
        wire::Phase::Stopped => MonitorPhase::Stopped,
        wire::Phase::Failed => MonitorPhase::Failed,
    }
}

impl Memory {
    /// Notes what an act is about to begin, before it begins.
    pub(super) fn begin(&mut self, act: &Act) {
        match act {
            Act::Start { vm, token, .. } | Act::TakeUpToken { vm, token, .. } => {
                self.begun.insert((*vm, *token));
            }
            Act::ClaimForCutover { vm, reserved, .. } => {
                self.begun.insert((*vm, *reserved));
            }
            Act::PrepareIncoming { migration, .. } => {
                self.prepared.insert(*migration);
            }
            Act::Rekey { .. }
            | Act::Thaw { .. }
            | Act::Kill { .. }
            | Act::StopGuest { .. }
            | Act::Release { .. }
            | Act::Activated { .. }
            | Act::Send { .. }
            | Act::CancelSend { .. }
            | Act::RenewToken { .. }
            | Act::ProposeCutover { .. }
            | Act::ProposeAbort { .. }
            | Act::RunAfterCutover { .. }
            | Act::DiscardIncoming { .. }
            | Act::ReportMigration { .. } => {}
        }
    }

    /// Takes in which monitors send and which of those are gone, and forgets what the log has passed.
    pub(super) fn notice(&mut self, me: NodeId, state: &ClusterState, monitors: &Table) {
        for (&nonce, monitor) in monitors.iter() {
            // One that sends may have said quiet, and everything, since it was last heard.
            if let Some(id) = monitor.migration()
                && side(me, state, monitor, id) == Side::Source
            {
                self.sending_seen.insert(nonce, id);
            }
        }
        let gone: Vec<u64> = self
            .sending_seen
            .keys()
            .copied()
            .filter(|nonce| !monitors.contains_key(nonce))
            .collect();
        for nonce in gone {
            self.quiet_lost.extend(self.sending_seen.remove(&nonce));
        }
        let open = |id: &MigrationId| {
            id.0 > state.applied.0
                || state
                    .migrations
                    .get(id)
                    .is_some_and(|migration| migration.is_open())
        };
        self.quiet_lost.retain(open);
        self.prepared.retain(open);
        // A token below the record's is past; one above it is a migration's, or news to come.
        let counts = |&(vm, token): &(VmId, Token)| {
            state
                .vms
                .get(&vm)
                .map_or(vm.0 > state.applied.0, |vm| token >= vm.ownership.token)
        };
        self.begun.retain(counts);
        self.claimed.retain(counts);
        self.start_failures.retain(|key, _| counts(key));
        let known: BTreeSet<VmId> = state.vms.keys().copied().collect();
        self.failures.retain(|vm, _| known.contains(vm));
    }
}
