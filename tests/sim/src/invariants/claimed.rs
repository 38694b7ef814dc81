//! Nobody runs under a token that its disk has not acknowledged, and no machine is cut over to one.

use cluster_model::{Command, Reply};

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

/// Checks the entry that was just committed.
pub fn cut_over(world: &mut World, command: &Command, reply: Option<&Reply>) {
    let (
        Command::Cutover {
            migration, claimed, ..
        },
        Some(Reply::Done { .. }),
    ) = (command, reply)
    else {
        return;
    };
    let state = &world.truth.state;
    let Some(vm) = state.migrations.get(migration).map(|known| known.vm) else {
        return;
    };
    if !world.truth.claimed.contains(&(vm, *claimed)) {
        let what = format!("{vm} is cut over to {claimed}, which no claim acknowledged");
        world.violate("claim before cutover", what);
    }
}
