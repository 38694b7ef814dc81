//! Nodes agree about what is committed.

use crate::world::World;

/// Entries, from the last one back, in which a node is compared with the others.
const COMPARED: usize = 4;

/// Compares what a node has for committed with what others had.
pub fn check(world: &mut World, node: usize) -> bool {
    let raft = &world.hosts[node].raft;
    let known = raft.commit.min(world.truth.log.len());
    let differs = (0..known)
        .rev()
        .take(COMPARED)
        .find(|&at| raft.log[at] != world.truth.log[at]);
    if let Some(at) = differs {
        let what = format!("entry {} differs on n{}", at + 1, node + 1);
        world.violate("one log", what);
    }
    differs.is_none()
}
