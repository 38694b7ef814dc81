//! Tokens only grow, and none is granted twice.

use cluster_model::ClusterState;

use crate::world::World;

/// Compares the state before an entry with the state after it.
pub fn check(world: &mut World, before: &ClusterState) {
    let state = &world.truth.state;
    let mut wrong = None;
    if state.token_last < before.token_last {
        wrong = Some(format!("the counter fell to {}", state.token_last));
    }
    for vm in state.vms.values() {
        let Some(known) = before.vms.get(&vm.id) else {
            continue;
        };
        let (old, new) = (&known.ownership, &vm.ownership);
        let moved = old.owner != new.owner || old.since != new.since;
        if new.token < old.token || (moved && new.token == old.token) {
            wrong = Some(format!(
                "{} went from {} to {}",
                vm.id, old.token, new.token
            ));
        }
        let reserved = before.migrations.values().any(|migration| {
            matches!(&migration.state, cluster_model::MigrationState::Active { reserved, .. } if *reserved == new.token && migration.vm == vm.id)
        });
        if new.token != old.token && new.token <= before.token_last && !reserved {
            wrong = Some(format!("{} was granted {} a second time", vm.id, new.token));
        }
    }
    if let Some(wrong) = wrong {
        world.violate("tokens only grow", wrong);
    }
}
