//! A node that cannot use a lease is lost in bounded time, as long as one leader leads and its quorum answers.

use cluster_model::Liveness;

use crate::world::{S, World, node_id};

/// A leader that grants nothing, not even to itself, for this long has no quorum: the time of all begins anew.
const PAUSE_MAX: u64 = 2 * S;
/// A lease that was not used (5 s), the lost-time (6.5 s), both on clocks that run slow, a heartbeat, and what a loss
/// takes into the log when its first answer is lost.
const BOUND: u64 = 20 * S;
/// An absence that was announced counts on top, on the leader's clock.
const ABSENCE: u64 = 85 * S;

/// The leader grants a lease, to whomever.
pub fn granted(world: &mut World, node: usize) {
    let now = world.now;
    let steady = world
        .truth
        .steady
        .filter(|(leader, _, last)| *leader == node && now.saturating_sub(*last) <= PAUSE_MAX);
    let since = steady.map_or(now, |(_, since, _)| since);
    world.truth.steady = Some((node, since, now));
}

/// Looks at every node, after the leader did.
pub fn check(world: &mut World, leader: usize) {
    let now = world.now;
    for node in 0..world.hosts.len() {
        let clock = world.clock(node);
        let known = world.truth.state.nodes.get(&node_id(node));
        let up = known.is_some_and(|known| known.liveness == Liveness::Up);
        let bound = match known.and_then(|known| known.absence) {
            Some(_) => BOUND + ABSENCE,
            None => BOUND,
        };
        let holds = world.hosts[node].daemon.as_ref();
        let holds = holds.is_some_and(|daemon| clock < daemon.booked_until);
        if holds || !up {
            world.truth.without.remove(&node);
            continue;
        }
        let since = *world.truth.without.entry(node).or_insert(now);
        let led_since = match world.truth.steady {
            Some((steady, since, last)) if steady == leader && now - last <= PAUSE_MAX => since,
            _ => continue,
        };
        let waited = now - since.max(led_since);
        if waited > bound {
            let what = format!(
                "n{} has had no lease for {} s under one leader, and is up",
                node + 1,
                waited / S
            );
            world.violate("lost in bounded time", what);
        }
    }
}
