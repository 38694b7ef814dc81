//! What the agent sees when it looks.

use cluster_model::agent::{MonitorMigration, MonitorPhase, MonitorView, Side, Sight};
use cluster_model::{ClusterState, MigrationId, NodeId};
use proto::monitor as wire;

use crate::member::Member;
use crate::monitors::{Monitor, Table};

pub(super) fn sight(member: &Member, state: &ClusterState, monitors: &Table) -> Sight {
    let now_ns = member.clock.boottime_ns();
    Sight {
        me: member.node,
        incarnation: member.incarnation,
        session_since: *member.session_since.borrow(),
        lease_valid: member.lease_is_valid(),
        monitors: monitors
            .values()
            .map(|monitor| monitor_view(member.node, state, monitor, now_ns))
            .collect(),
    }
}

pub(super) fn monitor_view(
    me: NodeId,
    state: &ClusterState,
    monitor: &Monitor,
    now_ns: u64,
) -> MonitorView {
    let status = &monitor.status;
    let deadline = status.lease_deadline_ns;
    MonitorView {
        vm: monitor.vm(),
        token: monitor.token(),
        nonce: monitor.nonce(),
        phase: phase(status.phase()),
        said_quiet: status.said_quiet,
        writes_unanswered: status.writes_unanswered,
        write_latency_p999_us: status
            .usage
            .as_ref()
            .map_or(0, |usage| usage.write_latency_p999_us),
        stop_asked: status.stop_asked,
        undrained: status.undrained,
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
