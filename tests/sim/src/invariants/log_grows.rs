//! What a node has promised, committed or written down never falls back, also not across its restarts; and whoever leads
//! has every entry that was committed before.

use crate::raft::Vote;
use crate::world::World;

/// Compares a node's log with what was seen of it before, whichever life of its daemon that was.
pub fn check(world: &mut World, node: usize) {
    let raft = &world.hosts[node].raft;
    let now = (raft.vote, raft.commit);
    let seen: (Vote, usize) = *world.truth.promised.entry(node).or_insert(now);
    if now.0 < seen.0 || now.1 < seen.1 || raft.log.len() < now.1 {
        let what = format!(
            "vote and commit of n{} were {seen:?} and are {now:?}, with {} entries",
            node + 1,
            raft.log.len()
        );
        return world.violate("log only grows", what);
    }
    world.truth.promised.insert(node, now);
}

/// Checks a node that was just elected. One that is elected late, below what others have led since, need not have their
/// entries: it can commit nothing.
pub fn elected(world: &mut World, node: usize) {
    let raft = &world.hosts[node].raft;
    let Some(last) = world.truth.log.last() else {
        return;
    };
    let count = world.truth.log.len();
    if raft.vote.leader() > last.leader && raft.log.get(count - 1) != Some(last) {
        let what = format!(
            "n{} leads in term {} without the committed entry {count}",
            node + 1,
            raft.vote.term
        );
        world.violate("a leader has what was acknowledged", what);
    }
}
