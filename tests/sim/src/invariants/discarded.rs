//! A monitor that the log lets run is not ended: only what the log has given elsewhere, or stopped, is.

use cluster_model::Desired;
use cluster_model::phase::Phase;

use crate::world::{World, node_id};

/// Checks a monitor that its node is about to end, as it believes, by the log.
pub fn check(world: &mut World, node: usize, nonce: u64) {
    let Some(monitor) = world.hosts[node].monitors.get(&nonce) else {
        return;
    };
    let Some(record) = world.truth.state.vms.get(&monitor.vm) else {
        return;
    };
    let has_guest = matches!(
        monitor.phase,
        Phase::Running | Phase::Frozen | Phase::Stopping | Phase::Quiet { .. } | Phase::Complete
    );
    let owner = record.ownership.owner == Some(node_id(node));
    let current = monitor.token == record.ownership.token;
    if has_guest && owner && current && record.desired == Desired::Running {
        let what = format!(
            "{} is {:?} on n{} under {}, the log's token, and is ended",
            monitor.vm,
            monitor.phase,
            node + 1,
            monitor.token
        );
        world.violate("ended by the log only", what);
    }
}
