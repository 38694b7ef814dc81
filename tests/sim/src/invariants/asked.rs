//! Whether a machine should run is what was asked last: the simulated guests never shut themselves down.

use cluster_model::{ClusterState, Command};

use crate::world::World;

/// Checks the entry that was just committed.
pub fn check(world: &mut World, before: &ClusterState, command: &Command) {
    if matches!(command, Command::SetDesired { .. }) {
        return;
    }
    let state = &world.truth.state;
    let changed = state.vms.values().find(|vm| {
        let known = before.vms.get(&vm.id);
        known.is_some_and(|known| known.desired != vm.desired)
    });
    if let Some(vm) = changed {
        let what = format!("{} should be {:?} though nobody asked", vm.id, vm.desired);
        world.violate("what was asked last stands", what);
    }
}
