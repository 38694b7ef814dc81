//! Every automatic act that changed something left a record that says why.

use cluster_model::{ClusterState, Command, Envelope};

use crate::world::World;

/// Checks the entry that was just committed.
pub fn check(world: &mut World, before: &ClusterState, envelope: &Envelope) {
    if !envelope.actor.starts_with("controller/") {
        return;
    }
    let changed = match &envelope.command {
        Command::NodeLost { node, .. } => {
            before.nodes.get(node).map(|node| node.liveness)
                != world.truth.state.nodes.get(node).map(|node| node.liveness)
        }
        Command::StartVm { vm, .. } => {
            before.vms.get(vm).map(|vm| vm.ownership.token)
                != world.truth.state.vms.get(vm).map(|vm| vm.ownership.token)
        }
        _ => false,
    };
    let index = world.truth.log.len() as u64;
    let said = world
        .truth
        .state
        .events
        .iter()
        .rev()
        .take_while(|event| event.index.0 == index)
        .any(|event| event.why.is_some());
    if changed && !said {
        let what = format!("{:?} has no reason", envelope.command);
        world.violate("every automatic act has a why", what);
    }
}
