//! Migrations that take too long, and sides that are gone.

use super::*;
use crate::state::MigrationCause;
use crate::testing::World;

fn aborts(state: &ClusterState, wall_ms: u64) -> Vec<Command> {
    Supervisor::default().aborts(state, wall_ms, 0)
}

#[test]
fn a_migration_over_its_time_is_aborted_and_one_within_it_is_not() {
    let mut world = World::new(2, 1_024);
    let vm = world.running("a", 64, NodeId(1));
    let (migration, _) = world.migrate(vm, NodeId(2));
    let started = world.state.migrations[&migration].started_at_ms;
    let limit = u64::from(world.state.settings.migration_timeout_s) * 1_000;
    assert_eq!(aborts(&world.state, started + limit), vec![]);
    let found = aborts(&world.state, started + limit + 1);
    assert!(
        matches!(&found[..], [Command::AbortMigration { migration: id, .. }] if *id == migration)
    );
    world.cutover(migration);
    assert_eq!(aborts(&world.state, started + limit + 1), vec![]);
    // A clock that runs behind aborts nothing.
    assert_eq!(aborts(&world.state, 0), vec![]);
}

#[test]
fn the_queue_is_patient_but_not_for_ever() {
    let mut world = World::new(2, 1_024);
    let vm = world.running("a", 64, NodeId(1));
    let migration = world.queue(vm, NodeId(2), MigrationCause::Asked);
    let queued = world.state.migrations[&migration].queued_at_ms;
    let limit = u64::from(world.state.settings.migration_timeout_s) * 1_000;
    assert_eq!(aborts(&world.state, queued + limit + 1), vec![]);
    assert_eq!(
        aborts(&world.state, queued + QUEUE_TIMEOUTS * limit + 1).len(),
        1
    );
}

#[test]
fn a_lost_side_ends_a_migration() {
    let mut world = World::new(2, 1_024);
    let vm = world.running("a", 64, NodeId(1));
    world.queue(vm, NodeId(2), MigrationCause::Asked);
    // As if the entry that lost the node had not ended it.
    world
        .state
        .nodes
        .get_mut(&NodeId(2))
        .expect("a node")
        .liveness = Liveness::Lost;
    let found = aborts(&world.state, 0);
    assert!(
        matches!(&found[..], [Command::AbortMigration { reason, .. }] if reason.contains("n2"))
    );
}

#[test]
fn a_wall_clock_that_is_hours_behind_does_not_keep_a_migration_for_hours() {
    let mut world = World::new(2, 1_024);
    let vm = world.running("a", 64, NodeId(1));
    world.migrate(vm, NodeId(2));
    let limit = u64::from(world.state.settings.migration_timeout_s) * 1_000;
    let mut supervisor = Supervisor::default();
    assert_eq!(supervisor.aborts(&world.state, 0, 5_000), vec![]);
    assert_eq!(supervisor.aborts(&world.state, 0, 5_000 + limit), vec![]);
    assert_eq!(supervisor.aborts(&world.state, 0, 5_001 + limit).len(), 1);
}
