//! At most one copy of a machine executes, and only where the committed log has it.

use crate::monitor::Monitor;
use crate::world::{World, node_id};

/// Checks every machine.
pub fn check(world: &mut World) {
    let mut executing = world.executing();
    let wrong = executing.find_map(|(node, monitor)| judge(world, node, monitor));
    drop(executing);
    if let Some((invariant, what)) = wrong {
        world.violate(invariant, what);
    }
}

/// What is wrong with a guest that executes there.
fn judge(world: &World, node: usize, monitor: &Monitor) -> Option<(&'static str, String)> {
    let vm = monitor.vm;
    let another = world
        .executing()
        .find(|(at, other)| other.vm == vm && (*at, other.nonce) != (node, monitor.nonce));
    if let Some((other, _)) = another {
        let what = format!("{vm} executes on n{} and on n{}", node + 1, other + 1);
        return Some(("one running copy", what));
    }
    let Some(record) = world.truth.state.vms.get(&vm) else {
        let what = format!("{vm} executes on n{} and is not in the log", node + 1);
        return Some(("only the owner runs", what));
    };
    let record = &record.ownership;
    let owner = record.owner == Some(node_id(node));
    if !owner || monitor.token > record.token || monitor.token < record.image {
        let what = format!(
            "{vm} executes on n{} under {}; the log says {:?} under {} since {}",
            node + 1,
            monitor.token,
            record.owner,
            record.token,
            record.since
        );
        return Some(("only the owner runs", what));
    }
    monitor.said_quiet.then(|| {
        let what = format!("{vm} executes on n{} and said quiet", node + 1);
        ("quiet binds", what)
    })
}
