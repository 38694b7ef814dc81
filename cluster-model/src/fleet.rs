//! One walk over the state that a planner makes at its beginning: who runs where, what is spoken for.
//!
//! A plan asks "is there room" for every machine on every node; asking the state each time would walk all
//! machines each time. A [`Fleet`] also remembers what the plan itself has given away so far, so that two
//! machines are not promised the same room.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::ids::{Name, NodeId, VmId};
use crate::state::{ClusterState, Liveness, Node, Rule, Vm, Volume};

/// What the leader heard in heartbeats, as plans are fed with it. Soft: it makes plans better, and nothing rests
/// on it. The leader makes it ([`Observed::of`]) for what it plans itself and for whoever asks what it would plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Observed {
    /// By node.
    pub nodes: BTreeMap<NodeId, NodeLoad>,
    /// Processor time that a machine uses, thousandths of one processor.
    pub vm_cpu_milli: BTreeMap<VmId, u32>,
}

/// What a node reported of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeLoad {
    /// Processor load, thousandths of all its processors.
    pub cpu_permille: u16,
    /// Volumes that it does not reach at the moment.
    pub volumes_down: BTreeSet<Name>,
}

/// What a plan wants to know of one node's last report.
#[derive(Clone, Copy, Debug)]
pub struct Reported<'r> {
    /// Processor load, thousandths of all its processors.
    pub cpu_permille: u16,
    /// Volumes that it does not reach.
    pub volumes_down: &'r BTreeSet<Name>,
    /// Processor time that each machine on it uses, thousandths of one processor.
    pub vm_cpu_milli: &'r BTreeMap<VmId, u32>,
}

impl Observed {
    /// What the last reports say of the nodes and machines in `state`.
    ///
    /// A report counts until its node is lost or removed, whatever its age: an older one says more than none. Of
    /// a machine its owner's word counts; while it moves both sides report one.
    pub fn of<'r>(
        state: &ClusterState,
        reports: impl IntoIterator<Item = (NodeId, Reported<'r>)>,
    ) -> Observed {
        let mut observed = Observed::default();
        for (id, report) in reports {
            let up = |node: &Node| node.liveness == Liveness::Up;
            if !state.nodes.get(&id).is_some_and(up) {
                continue;
            }
            observed.nodes.insert(
                id,
                NodeLoad {
                    cpu_permille: report.cpu_permille,
                    volumes_down: report.volumes_down.clone(),
                },
            );
            for (vm, milli) in report.vm_cpu_milli {
                let owner = state.vms.get(vm).and_then(|vm| vm.ownership.owner);
                if owner == Some(id) {
                    observed.vm_cpu_milli.insert(*vm, *milli);
                }
            }
        }
        observed
    }
}

/// Which migrations count as room spoken for at their destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// Those under way, as `apply` counts.
    Active,
    /// Those that wait, too: for whoever would queue more.
    Open,
}

/// What is spoken for on a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Virtual processors.
    pub vcpus: u64,
    /// Machines on it and on their way to it.
    pub machines: u32,
    /// Migrations out of it.
    pub moves_out: u32,
    /// Migrations into it.
    pub moves_in: u32,
}

/// The state, walked once, and a plan's own promises.
#[derive(Clone, Debug)]
pub struct Fleet<'s> {
    /// The state that it was made of.
    pub state: &'s ClusterState,
    /// What nodes reported.
    pub observed: &'s Observed,
    used: BTreeMap<NodeId, Use>,
    owned: BTreeMap<NodeId, Vec<&'s Vm>>,
    coming: BTreeMap<VmId, NodeId>,
    rules: BTreeMap<VmId, Vec<(&'s Name, &'s Rule)>>,
    volumes: BTreeMap<&'s Name, &'s Volume>,
}

impl<'s> Fleet<'s> {
    /// Walks the state.
    pub fn new(state: &'s ClusterState, observed: &'s Observed, count: Count) -> Fleet<'s> {
        let mut fleet = Fleet {
            state,
            observed,
            used: state.nodes.keys().map(|&id| (id, Use::default())).collect(),
            owned: BTreeMap::new(),
            coming: BTreeMap::new(),
            rules: BTreeMap::new(),
            volumes: state
                .volumes
                .values()
                .map(|volume| (&volume.name, volume))
                .collect(),
        };
        for vm in state.vms.values() {
            if let Some(owner) = vm.ownership.owner {
                fleet.take(vm, owner);
                fleet.owned.entry(owner).or_default().push(vm);
            }
        }
        for migration in state.migrations.values() {
            let counts = match count {
                Count::Active => migration.is_active(),
                Count::Open => migration.is_open(),
            };
            if let Some(vm) = state.vms.get(&migration.vm).filter(|_| counts) {
                fleet.promise_move(vm, migration.from, migration.to);
            }
        }
        for (name, rule) in &state.rules {
            let ruled: Vec<VmId> = match rule {
                Rule::Affinity { vms } | Rule::AntiAffinity { vms } => {
                    vms.iter().copied().collect()
                }
                Rule::PossibleOwners { vm, .. } | Rule::PreferredOwners { vm, .. } => vec![*vm],
            };
            for vm in ruled {
                fleet.rules.entry(vm).or_default().push((name, rule));
            }
        }
        fleet
    }

    fn take(&mut self, vm: &Vm, node: NodeId) {
        let used = self.used.entry(node).or_default();
        used.memory_mib += vm.spec.memory_mib;
        used.vcpus += u64::from(vm.spec.vcpus);
        used.machines += 1;
    }

    /// Remembers that the plan starts `vm` on `node`.
    pub fn promise_start(&mut self, vm: &Vm, node: NodeId) {
        self.take(vm, node);
        self.coming.insert(vm.id, node);
    }

    /// Remembers that the plan moves `vm`. It holds its room on both nodes until it is through.
    pub fn promise_move(&mut self, vm: &Vm, from: NodeId, to: NodeId) {
        self.take(vm, to);
        self.used.entry(from).or_default().moves_out += 1;
        self.used.entry(to).or_default().moves_in += 1;
        self.coming.insert(vm.id, to);
    }

    /// What is spoken for on a node.
    pub fn used(&self, node: NodeId) -> Use {
        self.used.get(&node).copied().unwrap_or_default()
    }

    /// The machines that a node owns.
    pub fn owned(&self, node: NodeId) -> &[&'s Vm] {
        self.owned.get(&node).map_or(&[], Vec::as_slice)
    }

    /// Memory that a node offers to machines, MiB, after the reserve.
    pub fn memory_offered_mib(&self, node: &Node) -> u64 {
        node.facts
            .memory_mib
            .saturating_sub(self.state.settings.memory_reserve_mib)
    }

    /// Memory that a node still has for machines, MiB.
    pub fn memory_free_mib(&self, node: &Node) -> u64 {
        self.memory_offered_mib(node)
            .saturating_sub(self.used(node.id).memory_mib)
    }

    /// Virtual processors that a node still has for machines.
    pub fn vcpus_free(&self, node: &Node) -> u64 {
        (u64::from(node.facts.cpus) * u64::from(self.state.settings.cpu_overcommit))
            .saturating_sub(self.used(node.id).vcpus)
    }

    /// Where a machine is, and where it is on its way to.
    pub fn places(&self, vm: VmId) -> (Option<NodeId>, Option<NodeId>) {
        let owner = self.state.vms.get(&vm).and_then(|vm| vm.ownership.owner);
        (owner, self.coming.get(&vm).copied())
    }

    /// Whether the machine has a migration that counts, or the plan moves it.
    pub fn is_moving(&self, vm: VmId) -> bool {
        self.coming.contains_key(&vm)
    }

    /// The rules that name a machine.
    pub fn rules_of(&self, vm: VmId) -> &[(&'s Name, &'s Rule)] {
        self.rules.get(&vm).map_or(&[], Vec::as_slice)
    }

    /// The volume of that name.
    pub fn volume(&self, name: &Name) -> Option<&'s Volume> {
        self.volumes.get(name).copied()
    }

    /// A node's processor load, thousandths; 0 when it reported none.
    pub fn cpu_permille(&self, node: NodeId) -> u16 {
        self.observed
            .nodes
            .get(&node)
            .map_or(0, |load| load.cpu_permille)
    }

    /// Whether a node reported that it does not reach a volume.
    pub fn volume_down(&self, node: NodeId, volume: &Name) -> bool {
        self.observed
            .nodes
            .get(&node)
            .is_some_and(|load| load.volumes_down.contains(volume))
    }
}

/// `part` of `whole`, thousandths; a whole of nothing is full.
pub(crate) fn permille(part: u64, whole: u64) -> u16 {
    if whole == 0 {
        return 1_000;
    }
    u16::try_from(part.saturating_mul(1_000) / whole).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{World, name};

    #[test]
    fn a_report_counts_while_its_node_is_up_and_of_a_machine_the_owners_word() {
        let mut world = World::new(3, 1_024);
        let vm = world.running("a", 64, NodeId(1));
        let down = BTreeSet::from([name("shared")]);
        let milli = |milli| BTreeMap::from([(vm, milli)]);
        let (at_home, elsewhere) = (milli(700), milli(20));
        let reports = [
            (NodeId(1), 100, &down, &at_home),
            (NodeId(2), 200, &down, &elsewhere),
            // Nobody knows this one any more.
            (NodeId(99), 300, &down, &elsewhere),
        ];
        let observed = |world: &World| {
            let reports = reports.map(|(node, cpu_permille, volumes_down, vm_cpu_milli)| {
                let report = Reported {
                    cpu_permille,
                    volumes_down,
                    vm_cpu_milli,
                };
                (node, report)
            });
            Observed::of(&world.state, reports)
        };
        let now = observed(&world);
        let nodes: Vec<NodeId> = now.nodes.keys().copied().collect();
        assert_eq!(nodes, [NodeId(1), NodeId(2)]);
        assert_eq!(now.nodes[&NodeId(2)].volumes_down, down);
        assert_eq!(now.nodes[&NodeId(2)].cpu_permille, 200);
        assert_eq!(now.vm_cpu_milli, at_home);

        world.lose(NodeId(1));
        let after = observed(&world);
        assert_eq!(after.nodes.keys().collect::<Vec<_>>(), [&NodeId(2)]);
        assert_eq!(after.vm_cpu_milli, BTreeMap::new(), "nobody owns it now");
    }
}
