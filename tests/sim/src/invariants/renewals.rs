//! Whoever renews a lease, or answers a read, led after it was asked: nobody had committed anything in a later term before.

use crate::world::{MS, World};

/// Checks an answer of the node that is about to be given, to what reached it at `received` on its clock, µs.
pub fn check(world: &mut World, node: usize, received: u64) {
    let host = &world.hosts[node];
    let ago = world.clock(node).saturating_sub(received);
    // A millisecond for the rounding of clocks that drift.
    let asked_at = (world.now + MS).saturating_sub(world.after(node, ago) - world.now);
    let own = host.raft.vote.term;
    let later = world.truth.terms.range(own + 1..).next();
    if let Some((term, committed_at)) = later
        && *committed_at + 2 * MS < asked_at
    {
        let what = format!(
            "n{} answers in term {own} what it was asked {} ms after term {term} had committed",
            node + 1,
            (asked_at - committed_at) / MS
        );
        world.violate("who answers leads", what);
    }
}
