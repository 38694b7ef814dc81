//! Slots, priority, room, and what can never start.

use super::*;
use crate::command::Command;
use crate::ids::NodeId;
use crate::state::MigrationCause;
use crate::testing::{World, spec};

fn started(steps: &[Next]) -> Vec<MigrationId> {
    steps
        .iter()
        .filter_map(|step| match step {
            Next::Start { migration, .. } => Some(*migration),
            Next::Abort { .. } => None,
        })
        .collect()
}

fn queued(world: &mut World, label: &str, priority: u16, from: u64, to: u64) -> MigrationId {
    let mut asked = spec(label, 16);
    asked.priority = priority;
    let vm = world.create_with(label, asked);
    world.start(vm, NodeId(from));
    world.activate(vm);
    world.queue(vm, NodeId(to), MigrationCause::Asked)
}

#[test]
fn two_leave_a_node_at_once_the_important_ones_first() {
    let mut world = World::new(3, 1_024);
    let low = queued(&mut world, "low", 1, 1, 2);
    let middle = queued(&mut world, "middle", 2, 1, 3);
    let high = queued(&mut world, "high", 3, 1, 2);
    let observed = Observed::default();
    assert_eq!(started(&next(&world.state, &observed)), vec![high, middle]);
    for migration in [high, middle] {
        let command = world.start_command(migration);
        world.done(command);
    }
    assert_eq!(next(&world.state, &observed), vec![]);
    let refused = world.start_command(low);
    assert!(matches!(
        world.refused(refused),
        Rejection::TooManyMigrations { .. }
    ));
    world.cutover(high);
    assert_eq!(started(&next(&world.state, &observed)), vec![low]);
}

#[test]
fn two_enter_a_node_at_once_and_others_pass_who_need_no_such_slot() {
    let mut world = World::new(4, 1_024);
    let first = queued(&mut world, "a", 9, 1, 4);
    let second = queued(&mut world, "b", 8, 2, 4);
    let third = queued(&mut world, "c", 7, 3, 4);
    let other = queued(&mut world, "d", 6, 3, 1);
    let steps = started(&next(&world.state, &Observed::default()));
    assert_eq!(steps, vec![first, second, other]);
    assert!(!steps.contains(&third));
}

#[test]
fn room_that_came_and_went_is_waited_for_and_a_drained_destination_is_not() {
    let mut world = World::new(3, 100);
    let waits = queued(&mut world, "a", 5, 1, 2);
    let filler = world.running("filler", 90, NodeId(2));
    assert_eq!(next(&world.state, &Observed::default()), vec![]);
    world.desire(filler, Desired::Stopped);
    world.done(Command::Release {
        vm: filler,
        node: NodeId(2),
        expects: world.token(filler),
        reason: crate::ReleaseReason::Stopped,
    });
    assert_eq!(
        started(&next(&world.state, &Observed::default())),
        vec![waits]
    );
    let vm = world.state.migrations[&waits].vm;
    world.done(Command::SetRule {
        name: crate::testing::name("rule"),
        rule: Some(crate::Rule::PossibleOwners {
            vm,
            nodes: [NodeId(1)].into(),
        }),
    });
    assert!(matches!(
        &next(&world.state, &Observed::default())[..],
        [Next::Abort { migration, .. }] if *migration == waits
    ));
}

#[test]
fn every_start_that_is_planned_is_accepted() {
    let mut world = World::new(4, 200);
    for number in 0..12u64 {
        queued(
            &mut world,
            &format!("v{number}"),
            u16::try_from(number).expect("small"),
            number % 4 + 1,
            (number + 1) % 4 + 1,
        );
    }
    for _ in 0..12 {
        let steps = next(&world.state, &Observed::default());
        for migration in started(&steps) {
            let command = world.start_command(migration);
            world.done(command);
            world.cutover(migration);
            let vm = world.state.migrations[&migration].vm;
            world.activate(vm);
        }
    }
    assert!(
        world
            .state
            .migrations
            .values()
            .all(|migration| !migration.is_open())
    );
}
