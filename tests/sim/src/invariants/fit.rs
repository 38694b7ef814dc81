//! Nothing is started on, or moved to, a node that is drained, lost or full; a drained node is empty.

use cluster_model::{ClusterState, Command, Duty, Liveness, NodeId, Reply};

use crate::setup::NODE_MEMORY_MIB;
use crate::world::World;

/// Checks the entry that was just committed.
pub fn check(world: &mut World, before: &ClusterState, command: &Command, reply: Option<&Reply>) {
    // A repeated request is answered as it was the first time, and does nothing.
    let now = world.truth.log.len() as u64;
    let done = matches!(reply, Some(Reply::Done { index, .. }) if index.0 == now);
    let state = &world.truth.state;
    let target: Option<NodeId> = match command {
        Command::StartVm { node, .. } => Some(*node),
        Command::StartMigration { migration, .. } => state
            .migrations
            .get(migration)
            .map(|migration| migration.to),
        Command::NodeLost { .. } if done => {
            world.counts.losses += 1;
            None
        }
        _ => None,
    };
    let state = &world.truth.state;
    let mut wrong = None;
    if let (Some(target), true) = (target, done)
        && let Some(node) = before.nodes.get(&target)
        && (node.liveness != Liveness::Up || node.duty != Duty::Active)
    {
        wrong = Some(format!(
            "{command:?} on a node that is {:?} and {:?}",
            node.liveness, node.duty
        ));
    }
    for node in state.nodes.values() {
        if state.memory_committed_mib(node.id) > NODE_MEMORY_MIB {
            wrong = Some(format!("{} is over its memory", node.name));
        }
        if node.duty == Duty::Drained
            && let Some(vm) = state.owned_by(node.id).next()
        {
            wrong = Some(format!("{} is drained and owns {}", node.name, vm.name));
        }
        if node.duty == Duty::Drained
            && let Some(lease) = state.leases().find(|lease| lease.holder == Some(node.id))
        {
            wrong = Some(format!("{} is drained and holds {lease:?}", node.name));
        }
    }
    if let Some(wrong) = wrong {
        world.violate("only where it may", wrong);
    }
}
