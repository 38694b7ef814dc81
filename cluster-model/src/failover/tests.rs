//! Restarting by priority, within the room, and never against a hold.

use super::*;
use crate::ids::{NodeId, Token};
use crate::state::FenceClass;
use crate::testing::{World, spec};

fn starts(commands: &[Command]) -> Vec<(VmId, NodeId)> {
    commands
        .iter()
        .filter_map(|command| match command {
            Command::StartVm { vm, node, .. } => Some((*vm, *node)),
            _ => None,
        })
        .collect()
}

fn with_priority(world: &mut World, label: &str, memory_mib: u64, priority: u16) -> VmId {
    let mut asked = spec(label, memory_mib);
    asked.priority = priority;
    let vm = world.create_with(label, asked);
    world.start(vm, NodeId(1));
    world.activate(vm);
    vm
}

#[test]
fn the_machines_of_a_lost_node_restart_elsewhere_the_important_ones_first() {
    let mut world = World::new(3, 1_024);
    let low = with_priority(&mut world, "low", 100, 100);
    let high = with_priority(&mut world, "high", 100, 900);
    let observed = Observed::default();
    assert_eq!(plan(&world.state, &observed), vec![]);
    world.lose(NodeId(1));
    let commands = plan(&world.state, &observed);
    assert_eq!(starts(&commands), vec![(high, NodeId(2)), (low, NodeId(3))]);
    for command in commands {
        world.done(command);
    }
    assert_eq!(plan(&world.state, &observed), vec![]);
    assert!(world.vm(high).ownership.settle);
}

#[test]
fn what_does_not_fit_waits_with_one_note_and_starts_when_there_is_room() {
    let mut world = World::new(2, 300);
    let high = with_priority(&mut world, "high", 200, 900);
    let low = with_priority(&mut world, "low", 100, 100);
    let waits = world.running("waits", 100, NodeId(2));
    world.lose(NodeId(1));
    let observed = Observed::default();
    let commands = plan(&world.state, &observed);
    assert_eq!(starts(&commands), vec![(high, NodeId(2))]);
    assert!(
        matches!(&commands[1], Command::Note { objects, kind, .. } if kind == HELD_KIND && objects[..] == [Object::Vm(low)])
    );
    for command in commands {
        world.done(command);
    }
    assert_eq!(
        plan(&world.state, &observed),
        vec![],
        "it is not said again"
    );
    let words = why_not_running(&world.state, world.vm(low)).expect("it waits");
    assert!(
        words.contains("low waits: no node can take it") && words.contains("no room"),
        "{words:?}"
    );
    world.desire(waits, Desired::Stopped);
    world.done(Command::Release {
        vm: waits,
        node: NodeId(2),
        expects: world.token(waits),
        reason: crate::ReleaseReason::Stopped,
    });
    assert_eq!(
        starts(&plan(&world.state, &observed)),
        vec![(low, NodeId(2))]
    );
}

#[test]
fn a_machine_whose_lost_owner_cannot_be_fenced_waits_for_a_person() {
    let mut world = World::with_fence(2, 1_024, FenceClass::None);
    let vm = world.running("a", 64, NodeId(1));
    world.lose(NodeId(1));
    let observed = Observed::default();
    assert_eq!(plan(&world.state, &observed), vec![]);
    let words = why_not_running(&world.state, world.vm(vm)).expect("it is held");
    assert!(words.contains("fence class none"), "{words:?}");
    world.desire(vm, Desired::Running);
    assert_eq!(
        starts(&plan(&world.state, &observed)),
        vec![(vm, NodeId(2))]
    );
}

#[test]
fn a_plan_names_the_token_it_saw_so_that_a_late_one_is_refused() {
    let mut world = World::new(2, 1_024);
    let vm = world.create("a", 64);
    let late = plan(&world.state, &Observed::default()).remove(0);
    let token = world.start(vm, NodeId(2));
    assert!(token > Token::NONE);
    assert!(matches!(
        world.refused(late),
        crate::Rejection::Stale { .. }
    ));
}

#[test]
fn one_plan_is_bounded() {
    let mut world = World::new(1, 1 << 20);
    for number in 0..STARTS_MAX + 5 {
        world.create(&format!("v{number}"), 16);
    }
    // Processors run out first on this node; every machine has its word all the same.
    let commands = plan(&world.state, &Observed::default());
    assert_eq!(starts(&commands).len(), 64);
    assert_eq!(commands.len(), STARTS_MAX + 5);

    world.settings(|settings| settings.cpu_overcommit = 64);
    let commands = plan(&world.state, &Observed::default());
    assert_eq!(
        (starts(&commands).len(), commands.len()),
        (STARTS_MAX, STARTS_MAX)
    );
}

#[test]
fn machines_without_a_place_keep_no_other_from_its_own() {
    let mut world = World::new(2, 1_024);
    world.lose(NodeId(1));
    let mut pinned = std::collections::BTreeSet::new();
    for number in 0..NOTES_MAX + 10 {
        let mut asked = spec(&format!("pinned-{number}"), 16);
        asked.priority = 900;
        let vm = world.create_with(&format!("pinned-{number}"), asked);
        world.done(Command::SetRule {
            name: crate::testing::name(&format!("rule-{number}")),
            rule: Some(crate::state::Rule::PossibleOwners {
                vm,
                nodes: std::collections::BTreeSet::from([NodeId(1)]),
            }),
        });
        pinned.insert(vm);
    }
    // Too large for any node, and without a rule: alike, and still each has its own word.
    let large: Vec<VmId> = (0..3)
        .map(|number| world.create(&format!("large-{number}"), 4_096))
        .collect();
    let free = world.create("free", 16);
    let observed = Observed::default();
    let commands = plan(&world.state, &observed);
    assert_eq!(starts(&commands), vec![(free, NodeId(2))]);
    assert_eq!(commands.len(), 1 + NOTES_MAX);
    for command in commands {
        world.done(command);
    }
    // The next plan says what the first had no room for, and nothing twice.
    let mut said: Vec<VmId> = Vec::new();
    for command in plan(&world.state, &observed) {
        if let Command::Note {
            objects, detail, ..
        } = &command
        {
            let [Object::Vm(vm)] = objects[..] else {
                panic!("{objects:?}");
            };
            assert!(detail.starts_with(world.vm(vm).name.as_str()), "{detail}");
            said.push(vm);
        }
        world.done(command);
    }
    assert_eq!(said.len(), 13, "{said:?}");
    assert!(large.iter().all(|vm| said.contains(vm)));
    assert_eq!(plan(&world.state, &observed), vec![]);
}
