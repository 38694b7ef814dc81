//! Plans, bounded retries, what stays, and a drain that another leader goes on with.

use super::*;
use crate::ids::MigrationId;
use crate::queue;
use crate::state::Duty;
use crate::testing::{World, spec};

const NODE: NodeId = NodeId(1);
const RATE: u64 = 1 << 30;

fn drain(world: &mut World) {
    world.done(Command::StartDrain {
        node: NODE,
        reason: "new fan".into(),
    });
}

/// What the controllers and the nodes would do next: drain, then the queue, then every migration under
/// way ends as `through` says.
fn turn(world: &mut World, through: &mut impl FnMut(&World, MigrationId) -> bool) -> bool {
    let observed = Observed::default();
    let commands = next(&world.state, &observed);
    let mut moved = !commands.is_empty();
    for command in commands {
        world.done(command);
    }
    for step in queue::next(&world.state, &observed) {
        moved = true;
        match step {
            queue::Next::Start { migration, .. } => {
                let command = world.start_command(migration);
                world.done(command);
            }
            queue::Next::Abort { migration, .. } => world.abort(migration),
        }
    }
    let active: Vec<MigrationId> = world
        .state
        .migrations
        .values()
        .filter(|migration| migration.is_active())
        .map(|migration| migration.id)
        .collect();
    for migration in active {
        moved = true;
        if through(world, migration) {
            world.cutover(migration);
            let vm = world.state.migrations[&migration].vm;
            world.activate(vm);
        } else {
            world.abort(migration);
        }
    }
    moved
}

fn run(world: &mut World, mut through: impl FnMut(&World, MigrationId) -> bool) {
    for _ in 0..200 {
        if !turn(world, &mut through) {
            return;
        }
        // Another leader: it knows the log, and nothing else.
        let bytes = serde_json::to_vec(&world.state).expect("a snapshot");
        world.state = serde_json::from_slice(&bytes).expect("a snapshot");
    }
    panic!("the drain never ended");
}

#[test]
fn a_plan_names_each_machine_its_destination_and_its_time() {
    let mut world = World::new(3, 4_096);
    let small = world.running("small", 1_024, NODE);
    let mut asked = spec("big", 2_048);
    asked.priority = 900;
    let big = world.create_with("big", asked);
    world.start(big, NODE);
    world.activate(big);
    let starting = world.create("starting", 64);
    world.start(starting, NODE);
    let planned = plan(&world.state, NODE, &Observed::default(), RATE).expect("a node");
    let vms: Vec<VmId> = planned.machines.iter().map(|machine| machine.vm).collect();
    assert_eq!(vms, vec![big, small, starting]);
    assert!(
        matches!(
            &planned.machines[0].step,
            Step::Move {
                to: NodeId(2),
                predicted_ms: 2_000,
                ..
            }
        ),
        "{planned:?}"
    );
    assert!(matches!(
        &planned.machines[1].step,
        Step::Move { to: NodeId(3), .. }
    ));
    assert!(matches!(&planned.machines[2].step, Step::Later { .. }));
    assert_eq!(planned.predicted_ms, 3_000);
    assert!(plan(&world.state, NodeId(99), &Observed::default(), RATE).is_err());
}

#[test]
fn a_plan_says_what_cannot_move_and_why() {
    let mut world = World::new(2, 1_000);
    let fits = world.running("a", 600, NODE);
    let stays = world.running("b", 300, NODE);
    world.running("c", 300, NodeId(2));
    let planned = plan(&world.state, NODE, &Observed::default(), RATE).expect("a node");
    assert!(matches!(planned.machines[0].step, Step::Move { .. }));
    assert_eq!(
        (planned.machines[0].vm, planned.machines[1].vm),
        (fits, stays)
    );
    match &planned.machines[1].step {
        Step::Stays { reason } => assert!(reason.contains("no room"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn everything_moves_and_the_node_is_drained_across_any_number_of_leaders() {
    let mut world = World::new(3, 4_096);
    for number in 0..12 {
        world.running(&format!("v{number}"), 128, NODE);
    }
    drain(&mut world);
    run(&mut world, |_, _| true);
    assert_eq!(world.state.nodes[&NODE].duty, Duty::Drained);
    assert_eq!(world.state.owned_by(NODE).count(), 0);
    assert_eq!(world.state.owned_by(NodeId(2)).count(), 6, "evenly");
    // Each asked for its move once.
    assert_eq!(world.state.migrations.len(), 12);
}

#[test]
fn a_drain_keeps_a_bounded_number_of_migrations_open() {
    let mut world = World::new(3, 4_096);
    for number in 0..12 {
        world.running(&format!("v{number}"), 128, NODE);
    }
    drain(&mut world);
    let commands = next(&world.state, &Observed::default());
    assert_eq!(commands.len(), AHEAD_MAX);
    for command in commands {
        world.done(command);
    }
    assert_eq!(next(&world.state, &Observed::default()), vec![]);
}

#[test]
fn a_failed_move_is_tried_elsewhere_and_a_bounded_number_of_times() {
    let mut world = World::new(3, 4_096);
    let stubborn = world.running("stubborn", 128, NODE);
    let other = world.running("other", 128, NODE);
    drain(&mut world);
    run(&mut world, |world, migration| {
        world.state.migrations[&migration].vm != stubborn
    });
    let tries: Vec<NodeId> = world
        .state
        .migrations
        .values()
        .filter(|migration| migration.vm == stubborn)
        .map(|migration| migration.to)
        .collect();
    assert_eq!(tries.len(), 3);
    assert_ne!(tries[0], tries[1]);
    let record = &world.state.drains[&NODE];
    assert!(record.stuck.contains_key(&stubborn) && record.ended_at_ms > 0);
    assert_eq!(
        world.state.nodes[&NODE].duty,
        Duty::Draining,
        "not empty, so not drained"
    );
    assert_ne!(world.vm(other).ownership.owner, Some(NODE));
}

#[test]
fn a_machine_with_no_place_is_stuck_at_once_when_nothing_else_moves() {
    let mut world = World::new(2, 1_000);
    let vm = world.running("a", 600, NODE);
    world.running("b", 600, NodeId(2));
    drain(&mut world);
    run(&mut world, |_, _| true);
    let record = &world.state.drains[&NODE];
    assert!(record.stuck[&vm].contains("no room"), "{record:?}");
    assert!(record.ended_at_ms > 0);
}

#[test]
fn an_empty_node_is_drained_at_once() {
    let mut world = World::new(2, 1_000);
    drain(&mut world);
    assert_eq!(
        next(&world.state, &Observed::default()),
        vec![Command::EndDrain { node: NODE }]
    );
}

#[test]
fn uncordon_takes_back_what_the_drain_had_queued() {
    let mut world = World::new(2, 1_000);
    world.running("a", 100, NODE);
    drain(&mut world);
    let command = next(&world.state, &Observed::default()).remove(0);
    world.done(command);
    world.done(Command::Uncordon {
        node: NODE,
        failback: false,
    });
    assert!(
        world
            .state
            .migrations
            .values()
            .all(|migration| !migration.is_open())
    );
    assert_eq!(next(&world.state, &Observed::default()), vec![]);
}
