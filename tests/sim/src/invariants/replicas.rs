//! Replicas that applied the same log are equal, and a snapshot with the rest of the log is the same state.

use std::hash::{DefaultHasher, Hash, Hasher};

use cluster_model::ClusterState;

use crate::invariants::apply_entry;
use crate::mutants::Mutant;
use crate::world::World;

/// States are compared at every multiple of this index: the comparison costs more than the entry.
const EVERY: usize = 32;

fn digest(state: &ClusterState) -> u64 {
    let mut hasher = DefaultHasher::new();
    // A state always has a JSON; an error would differ from every digest.
    serde_json::to_string(state).ok().hash(&mut hasher);
    hasher.finish()
}

/// Checks a replica that applied the entry at `index`.
pub fn check(world: &mut World, node: usize, index: usize, state: &ClusterState) {
    if !index.is_multiple_of(EVERY) {
        return;
    }
    let digest = digest(state);
    let known = *world.truth.digests.entry(index).or_insert(digest);
    if known != digest {
        let what = format!("n{} differs at entry {index}", node + 1);
        world.violate("replicas are equal", what);
    }
}

/// Checks a snapshot taken half way.
pub fn at_end(world: &mut World) {
    let half = world.truth.log.len() / 2;
    let mut replayed = ClusterState::default();
    for (at, entry) in world.truth.log.iter().take(half).enumerate() {
        apply_entry(&mut replayed, at + 1, entry, world.mutant);
    }
    let json = serde_json::to_vec(&replayed).unwrap_or_default();
    let forgets = world.mutant == Some(Mutant::SnapshotForgets);
    let Ok(mut restored) = serde_json::from_slice::<ClusterState>(&json) else {
        return world.violate("snapshot and tail", "a snapshot does not read back".into());
    };
    if forgets {
        let records = restored.vms.values_mut();
        records.for_each(|vm| vm.ownership.owner = None);
    }
    for (at, entry) in world.truth.log.iter().enumerate().skip(half) {
        apply_entry(&mut restored, at + 1, entry, world.mutant);
    }
    if restored != world.truth.state {
        let what = format!("a snapshot at {half} and the rest give another state");
        world.violate("snapshot and tail", what);
    }
}
