//! A lease's holder is its machine's owner, under the owner's token.

use crate::world::World;

/// Checks every lease.
pub fn check(world: &mut World) {
    let state = &world.truth.state;
    let wrong = state.leases().find(|lease| {
        state.vms.get(&lease.vm).is_none_or(|vm| {
            vm.ownership.owner != lease.holder || vm.ownership.token != lease.token
        })
    });
    if let Some(lease) = wrong {
        world.violate("leases follow the owner", format!("{lease:?}"));
    }
}
