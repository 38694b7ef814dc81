//! Nobody runs under a token that its disk has not acknowledged.

use crate::world::World;

/// Checks a monitor that was just let run.
pub fn check(world: &mut World, node: usize, nonce: u64) {
    let Some(monitor) = world.hosts[node].monitors.get(&nonce) else {
        return;
    };
    let (vm, token) = (monitor.vm, monitor.token);
    if !world.truth.claimed.contains(&(vm, token)) {
        let what = format!(
            "{vm} runs on n{} under {token}, which no claim acknowledged",
            node + 1
        );
        world.violate("claim before run", what);
    }
}
