//! Hard constraints: whether a machine may be on a node at all.

use crate::command::Rejection;
use crate::ids::{Name, NodeId};
use crate::state::{ClusterState, Duty, Liveness, Node, NodeRole, Rule, Vm};

/// Whether a node takes machines at all.
///
/// # Errors
/// [`Rejection::NodeUnfit`] with the reason.
pub fn takes_machines(node: &Node) -> Result<(), Rejection> {
    let unfit = |reason: &str| {
        Err(Rejection::NodeUnfit {
            node: node.id,
            reason: reason.into(),
        })
    };
    match (node.role, node.liveness, node.duty) {
        (NodeRole::Witness, _, _) => unfit("it is a witness: it only votes"),
        (_, Liveness::Joining, _) => unfit("it has not started yet"),
        (_, Liveness::Lost, _) => unfit("it is lost; see: clusterctl why node"),
        (_, Liveness::Quarantined, _) => {
            unfit("it was lost too often and is quarantined; clear it: clusterctl node uncordon")
        }
        (_, _, Duty::Draining) => unfit("it is being drained"),
        (_, _, Duty::Drained) => unfit("it is drained; take it back: clusterctl node uncordon"),
        (_, Liveness::Up, Duty::Active) => Ok(()),
    }
}

/// Whether `vm` may run on `node`: duty, volumes, rules and room, counting what runs there now.
///
/// A machine that the node owns already is not counted twice.
///
/// # Errors
/// The first constraint that forbids it.
pub fn may_run(state: &ClusterState, vm: &Vm, node: &Node) -> Result<(), Rejection> {
    takes_machines(node)?;
    for disk in &vm.spec.disks {
        let reaches = state
            .volume_named(&disk.volume)
            .is_some_and(|volume| volume.reaches(node.id));
        if !reaches {
            return Err(Rejection::VolumeUnreachable {
                node: node.id,
                volume: disk.volume.clone(),
            });
        }
    }
    if let Some(rule) = forbidding_rule(state, vm, node.id) {
        return Err(Rejection::RuleForbids {
            rule: rule.clone(),
            vm: vm.id,
            node: node.id,
        });
    }
    if vm.ownership.owner == Some(node.id) {
        return Ok(());
    }
    let free = state.memory_free_mib(node);
    if vm.spec.memory_mib > free {
        return Err(Rejection::NoRoom {
            node: node.id,
            what: "memory (MiB)".into(),
            needs: vm.spec.memory_mib,
            free,
        });
    }
    let vcpus_free = vcpus_free(state, node);
    if u64::from(vm.spec.vcpus) > vcpus_free {
        return Err(Rejection::NoRoom {
            node: node.id,
            what: "virtual processors".into(),
            needs: u64::from(vm.spec.vcpus),
            free: vcpus_free,
        });
    }
    Ok(())
}

/// Virtual processors that a node may still take.
pub fn vcpus_free(state: &ClusterState, node: &Node) -> u64 {
    let all = u64::from(node.facts.cpus) * u64::from(state.settings.cpu_overcommit);
    let owned: u64 = state
        .owned_by(node.id)
        .map(|vm| u64::from(vm.spec.vcpus))
        .sum();
    let coming: u64 = state
        .migrations
        .values()
        .filter(|migration| migration.is_active() && migration.to == node.id)
        .filter_map(|migration| state.vms.get(&migration.vm))
        .map(|vm| u64::from(vm.spec.vcpus))
        .sum();
    all.saturating_sub(owned + coming)
}

/// The rule that keeps `vm` off `node`, if there is one.
///
/// Preferred owners forbid nothing. An affinity rule forbids a node only while another machine of the
/// rule runs elsewhere and none runs here.
pub fn forbidding_rule<'s>(state: &'s ClusterState, vm: &Vm, node: NodeId) -> Option<&'s Name> {
    // Where a machine is, or is on its way to.
    let places = |other: crate::VmId| {
        let owner = state
            .vms
            .get(&other)
            .and_then(|other| other.ownership.owner);
        let coming = state.active_migration(other).map(|migration| migration.to);
        (owner, coming)
    };
    state.rules.iter().find_map(|(name, rule)| {
        let forbids = match rule {
            Rule::PossibleOwners { vm: ruled, nodes } => *ruled == vm.id && !nodes.contains(&node),
            Rule::PreferredOwners { .. } => false,
            Rule::AntiAffinity { vms } => {
                vms.contains(&vm.id)
                    && vms.iter().filter(|&&other| other != vm.id).any(|&other| {
                        let (owner, coming) = places(other);
                        owner == Some(node) || coming == Some(node)
                    })
            }
            Rule::Affinity { vms } => {
                let others: Vec<NodeId> = vms
                    .iter()
                    .filter(|&&other| vms.contains(&vm.id) && other != vm.id)
                    .filter_map(|&other| {
                        let (owner, coming) = places(other);
                        coming.or(owner)
                    })
                    .collect();
                !others.is_empty() && !others.contains(&node)
            }
        };
        forbids.then_some(name)
    })
}
