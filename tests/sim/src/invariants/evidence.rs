//! A node is declared lost only when its lease has run out, by its own clock.

use cluster_model::{ClusterState, Command, Liveness, Reply};

use crate::world::{World, node_of};

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
    let clock_ns = world.clock(at) * 1_000;
    let valid = host
        .daemon
        .as_ref()
        .is_some_and(|daemon| daemon.lease.valid(clock_ns));
    if valid {
        let what = format!("n{} is lost while its lease is valid", at + 1);
        world.violate("lost only without a lease", what);
    }
}
