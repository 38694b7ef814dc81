//! A migration ends once: cut over or aborted, and never both.

use cluster_model::{ClusterState, MigrationState};

use crate::world::World;

/// Compares the migrations before an entry with those after it.
pub fn check(world: &mut World, before: &ClusterState) {
    let mut wrong = None;
    let mut ended = Vec::new();
    for migration in world.truth.state.migrations.values() {
        let how = match migration.state {
            MigrationState::CutOver { .. } => "cut over",
            MigrationState::Aborted { .. } => "aborted",
            MigrationState::Queued | MigrationState::Active { .. } => {
                if world.truth.ended.contains_key(&migration.id) {
                    wrong = Some(format!("{} began again", migration.id));
                }
                continue;
            }
        };
        match world.truth.ended.get(&migration.id) {
            Some(known) if *known != how => {
                wrong = Some(format!("{} was {known} and then {how}", migration.id));
            }
            Some(_) => {}
            None => ended.push((migration.id, how)),
        }
        if let MigrationState::CutOver { .. } = migration.state
            && before
                .migrations
                .get(&migration.id)
                .is_some_and(|known| matches!(known.state, MigrationState::Aborted { .. }))
        {
            wrong = Some(format!("{} was aborted before", migration.id));
        }
    }
    for (id, how) in ended {
        match how {
            "cut over" => world.counts.cutovers += 1,
            _ => world.counts.aborts += 1,
        }
        world.truth.ended.insert(id, how);
    }
    if let Some(wrong) = wrong {
        world.violate("a migration ends once", wrong);
    }
}
