//! Hard constraints one by one, and what the order of the score's fields means.

use super::*;
use crate::command::Command;
use crate::fleet::{Count, NodeLoad, Observed};
use crate::ids::Incarnation;
use crate::testing::{World, facts, name, spec};

fn best_node(
    state: &ClusterState,
    vm: &Vm,
    exclude: &BTreeSet<NodeId>,
    observed: &Observed,
) -> Result<Choice, NoPlace> {
    best_node_in(&Fleet::new(state, observed, Count::Open), vm, exclude)
}

fn chosen(world: &World, vm: VmId, observed: &Observed) -> Option<NodeId> {
    best_node(&world.state, world.vm(vm), &BTreeSet::new(), observed)
        .ok()
        .map(|choice| choice.node)
}

fn cpu(permille: u16) -> NodeLoad {
    NodeLoad {
        cpu_permille: permille,
        ..NodeLoad::default()
    }
}

#[test]
fn the_emptier_node_wins_and_of_two_alike_the_older() {
    let mut world = World::new(3, 1_024);
    let none = Observed::default();
    let vm = world.create("a", 64);
    assert_eq!(chosen(&world, vm, &none), Some(NodeId(1)));
    world.running("b", 512, NodeId(1));
    assert_eq!(chosen(&world, vm, &none), Some(NodeId(2)));
    let busy = Observed {
        nodes: [(NodeId(2), cpu(900))].into(),
        ..Observed::default()
    };
    assert_eq!(chosen(&world, vm, &busy), Some(NodeId(3)));
}

#[test]
fn a_preferred_node_wins_over_an_emptier_one_but_not_over_room() {
    let mut world = World::new(2, 1_024);
    let vm = world.create("a", 512);
    world.running("b", 400, NodeId(2));
    world.done(Command::SetRule {
        name: name("home"),
        rule: Some(Rule::PreferredOwners {
            vm,
            nodes: [NodeId(2)].into(),
        }),
    });
    assert_eq!(chosen(&world, vm, &Observed::default()), Some(NodeId(2)));
    world.running("c", 200, NodeId(2));
    assert_eq!(chosen(&world, vm, &Observed::default()), Some(NodeId(1)));
}

#[test]
fn a_node_that_could_not_start_it_comes_last() {
    let mut world = World::new(2, 1_024);
    let vm = world.create("a", 64);
    let token = world.start(vm, NodeId(1));
    world.done(Command::Release {
        vm,
        node: NodeId(1),
        expects: token,
        reason: crate::ReleaseReason::StartFailed("no kernel".into()),
    });
    assert_eq!(chosen(&world, vm, &Observed::default()), Some(NodeId(2)));
    world.lose(NodeId(2));
    assert_eq!(chosen(&world, vm, &Observed::default()), Some(NodeId(1)));
}

#[test]
fn every_hard_constraint_keeps_a_machine_off_and_says_why() {
    type Spoil = fn(&mut World, VmId);
    type Expected = fn(&Rejection) -> bool;
    let table: &[(&str, Spoil, Expected)] = &[
        (
            "lost",
            |world, _| world.lose(NodeId(2)),
            |why| matches!(why, Rejection::NodeUnfit { .. }),
        ),
        (
            "drained",
            |world, _| {
                world.done(Command::StartDrain {
                    node: NodeId(2),
                    reason: String::new(),
                });
            },
            |why| matches!(why, Rejection::NodeUnfit { .. }),
        ),
        (
            "memory",
            |world, _| {
                world.running("big", 1_000, NodeId(2));
            },
            |why| matches!(why, Rejection::NoRoom { .. }),
        ),
        (
            "reserve",
            |world, _| world.settings(|settings| settings.memory_reserve_mib = 1_000),
            |why| matches!(why, Rejection::NoRoom { .. }),
        ),
        (
            "possible owners",
            |world, vm| {
                world.done(Command::SetRule {
                    name: name("rule"),
                    rule: Some(Rule::PossibleOwners {
                        vm,
                        nodes: [NodeId(1)].into(),
                    }),
                });
            },
            |why| matches!(why, Rejection::RuleForbids { .. }),
        ),
        (
            "anti-affinity",
            |world, vm| {
                let other = world.running("other", 64, NodeId(2));
                world.done(Command::SetRule {
                    name: name("rule"),
                    rule: Some(Rule::AntiAffinity {
                        vms: [vm, other].into(),
                    }),
                });
            },
            |why| matches!(why, Rejection::RuleForbids { .. }),
        ),
        (
            "affinity",
            |world, vm| {
                let other = world.running("other", 64, NodeId(1));
                world.done(Command::SetRule {
                    name: name("rule"),
                    rule: Some(Rule::Affinity {
                        vms: [vm, other].into(),
                    }),
                });
            },
            |why| matches!(why, Rejection::RuleForbids { .. }),
        ),
        (
            "processor maker",
            |world, _| {
                world.done(Command::RegisterNode {
                    node: NodeId(2),
                    incarnation: Incarnation(1),
                    replaces: Incarnation(1),
                    address: "x:1".into(),
                    facts: crate::NodeFacts {
                        cpu_vendor: "GenuineIntel".into(),
                        ..facts(1_024)
                    },
                });
            },
            |why| matches!(why, Rejection::CpuDiffers { .. }),
        ),
        (
            "older stream",
            |world, _| {
                world.done(Command::RegisterNode {
                    node: NodeId(2),
                    incarnation: Incarnation(1),
                    replaces: Incarnation(1),
                    address: "x:1".into(),
                    facts: crate::NodeFacts {
                        stream_versions: (0, 0),
                        ..facts(1_024)
                    },
                });
            },
            |why| matches!(why, Rejection::VersionsDiffer { .. }),
        ),
        (
            "let in under wider limits",
            |world, vm| {
                let vm = world.state.vms.get_mut(&vm).expect("a machine");
                vm.spec.vcpus = 64;
            },
            |why| matches!(why, Rejection::BadSpec { field, .. } if field == "vcpus"),
        ),
    ];
    for (what, spoil, expected) in table {
        let mut world = World::new(2, 1_024);
        let vm = world.running("a", 64, NodeId(1));
        assert_eq!(
            chosen(&world, vm, &Observed::default()),
            Some(NodeId(2)),
            "{what}"
        );
        spoil(&mut world, vm);
        let no_place = best_node(
            &world.state,
            world.vm(vm),
            &BTreeSet::new(),
            &Observed::default(),
        )
        .expect_err(what);
        assert!(expected(&no_place.considered[0].1), "{what}: {no_place}");
        // The log says the same as the plan.
        let refusal = world.refused(World::queue_command(
            vm,
            NodeId(2),
            crate::MigrationCause::Asked,
        ));
        assert!(expected(&refusal), "{what}: {refusal}");
    }
}

#[test]
fn a_newer_destination_reads_the_older_stream() {
    let mut world = World::new(2, 1_024);
    world.done(Command::RegisterNode {
        node: NodeId(2),
        incarnation: Incarnation(1),
        replaces: Incarnation(1),
        address: "x:1".into(),
        facts: crate::NodeFacts {
            stream_versions: (1, 2),
            ..facts(1_024)
        },
    });
    let (old, new) = (
        &world.state.nodes[&NodeId(1)],
        &world.state.nodes[&NodeId(2)],
    );
    assert_eq!(compatible(old, new), Ok(()));
    assert!(compatible(new, old).is_err());
}

#[test]
fn a_node_that_reports_a_volume_as_down_is_passed_over() {
    let mut world = World::new(2, 1_024);
    let vm = world.create("a", 64);
    let mut observed = Observed::default();
    for node in [NodeId(1), NodeId(2)] {
        observed.nodes.insert(
            node,
            NodeLoad {
                volumes_down: [name("shared")].into(),
                ..NodeLoad::default()
            },
        );
    }
    assert_eq!(
        chosen(&world, vm, &observed),
        None,
        "no storm when nobody reaches it"
    );
    observed.nodes.remove(&NodeId(2));
    assert_eq!(chosen(&world, vm, &observed), Some(NodeId(2)));
}

#[test]
fn a_plan_does_not_promise_the_same_room_twice() {
    let mut world = World::new(1, 100);
    let one = world.create_with("a", spec("a", 60));
    let other = world.create_with("b", spec("b", 60));
    let observed = Observed::default();
    let mut fleet = Fleet::new(&world.state, &observed, Count::Open);
    assert!(best_node_in(&fleet, world.vm(one), &BTreeSet::new()).is_ok());
    fleet.promise_start(world.vm(one), NodeId(1));
    let no_place = best_node_in(&fleet, world.vm(other), &BTreeSet::new()).expect_err("no room");
    assert!(no_place.for_want_of_room());
}
