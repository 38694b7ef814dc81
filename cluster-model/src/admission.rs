//! Whether the cluster would still run everything after a loss.

use std::collections::BTreeMap;

use crate::ids::NodeId;
use crate::placement::takes_machines;
use crate::state::{ClusterState, Vm};

/// Whether the machines of any one node that is lost fit on the others, the largest first.
///
/// Counts memory, volumes and rules' absence: a machine that a rule pins to the lost node does not fit.
///
/// # Errors
/// Which node's loss is not covered, and what would not fit.
pub fn tolerates_one_loss(state: &ClusterState) -> Result<(), String> {
    let takers: Vec<_> = state
        .nodes
        .values()
        .filter(|node| takes_machines(node).is_ok())
        .collect();
    let free: BTreeMap<NodeId, u64> = takers
        .iter()
        .map(|node| (node.id, state.memory_free_mib(node)))
        .collect();
    for lost in state.nodes.values() {
        let mut left: BTreeMap<NodeId, u64> = free
            .iter()
            .filter(|(node, _)| **node != lost.id)
            .map(|(&n, &f)| (n, f))
            .collect();
        let mut machines: Vec<&Vm> = state
            .owned_by(lost.id)
            .filter(|vm| vm.spec.failover)
            .collect();
        machines.sort_by_key(|vm| std::cmp::Reverse(vm.spec.memory_mib));
        for vm in machines {
            if !state.fence_allows_failover(vm) {
                return Err(format!(
                    "{} lies on a volume that cannot fence a lost owner ({} runs it)",
                    vm.name, lost.name
                ));
            }
            let reaches = |node: NodeId| {
                vm.spec.disks.iter().all(|disk| {
                    state
                        .volume_named(&disk.volume)
                        .is_some_and(|volume| volume.reaches(node))
                })
            };
            // The node with the most room takes it: what is left stays as even as it can be.
            let taker = left
                .iter_mut()
                .filter(|(node, room)| **room >= vm.spec.memory_mib && reaches(**node))
                .max_by_key(|(_, room)| **room);
            match taker {
                Some((_, room)) => *room -= vm.spec.memory_mib,
                None => {
                    return Err(format!(
                        "if {} were lost, {} ({} MiB) would fit nowhere",
                        lost.name, vm.name, vm.spec.memory_mib
                    ));
                }
            }
        }
    }
    Ok(())
}
