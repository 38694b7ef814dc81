//! No machine is taken from a node while something there may still run it: every monitor's own deadline has passed, and
//! so has the node's lease, by a book that is kept apart from what the code makes of grants.

use cluster_model::phase::Phase;
use cluster_model::{ClusterState, Command, Liveness, Reply};

use crate::world::{MS, World, node_of};

/// Checks the entry that was just committed, if a node that was up is lost by it.
pub fn check(world: &mut World, before: &ClusterState, command: &Command, reply: Option<&Reply>) {
    let now = world.truth.log.len() as u64;
    let (
        Command::NodeLost {
            node, incarnation, ..
        },
        Some(Reply::Done { index, .. }),
    ) = (command, reply)
    else {
        return;
    };
    let at = node_of(*node);
    let host = &world.hosts[at];
    let known = before.nodes.get(node);
    let was_up = known.is_some_and(|known| known.liveness == Liveness::Up);
    if index.0 != now || !was_up || host.incarnation != incarnation.0 {
        return;
    }
    let clock = world.clock(at);
    let ahead = host.monitors.values().find(|monitor| {
        let vm = before.vms.get(&monitor.vm);
        let owned = vm.is_some_and(|vm| vm.ownership.owner == Some(*node));
        owned && monitor.phase == Phase::Running && clock < monitor.deadline
    });
    let valid = host
        .daemon
        .as_ref()
        .is_some_and(|daemon| clock < daemon.booked_until);
    let what = match ahead {
        Some(monitor) => format!(
            "n{} is lost, and its monitor of {} may run for {} ms more",
            at + 1,
            monitor.vm,
            (monitor.deadline - clock) / MS
        ),
        None if valid => format!("n{} is lost while its lease is valid", at + 1),
        None => return,
    };
    world.violate("lost only without a lease", what);
}
