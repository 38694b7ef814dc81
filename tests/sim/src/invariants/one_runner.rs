//! At most one copy of a machine executes, and only where the committed log has it.

use cluster_model::VmId;

use crate::world::{World, node_id};

/// Checks every machine.
pub fn check(world: &mut World) {
    let vms: Vec<VmId> = world.truth.state.vms.keys().copied().collect();
    for vm in vms {
        let executing = world.executing(vm);
        if executing.len() > 1 {
            let what = format!("{vm} executes in {executing:?} (node from 0, monitor)");
            return world.violate("one running copy", what);
        }
        let Some(&(node, nonce)) = executing.first() else {
            continue;
        };
        let record = &world.truth.state.vms[&vm].ownership;
        let monitor = &world.hosts[node].monitors[&nonce];
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
            return world.violate("only the owner runs", what);
        }
        if monitor.said_quiet {
            let what = format!("{vm} executes on n{} and said quiet", node + 1);
            return world.violate("quiet binds", what);
        }
    }
}
