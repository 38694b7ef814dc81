//! Once trouble has ended, every machine that should run runs, every migration has ended, and no node keeps the process of
//! a machine that is not its own.

use cluster_model::Desired;

use crate::world::{World, node_id};

/// Checks the world at its end.
pub fn check(world: &mut World) {
    let state = world.truth.state.clone();
    if let Some(migration) = state
        .migrations
        .values()
        .find(|migration| migration.is_open())
    {
        return world.violate("every migration ends", format!("{migration:?}"));
    }
    let void = world.hosts.iter().enumerate().find_map(|(node, host)| {
        let monitors = host.monitors.values();
        let owner = |vm| state.vms.get(&vm).and_then(|known| known.ownership.owner);
        let mut void = monitors.filter(|monitor| owner(monitor.vm) != Some(node_id(node)));
        void.next().map(|monitor| (node, monitor.vm, monitor.phase))
    });
    if let Some((node, vm, phase)) = void {
        let what = format!(
            "n{} has one of {vm}, which is not its own: it is {phase}",
            node + 1
        );
        return world.violate("void monitors end", what);
    }
    for vm in state.vms.values() {
        let executes = world.executing().any(|(_, monitor)| monitor.vm == vm.id);
        if vm.desired == Desired::Running && vm.held.is_none() && !executes {
            let monitors: Vec<String> = world
                .hosts
                .iter()
                .enumerate()
                .flat_map(|(node, host)| {
                    host.monitors
                        .values()
                        .filter(|monitor| monitor.vm == vm.id)
                        .map(move |monitor| {
                            format!("n{}: {:?} under {}", node + 1, monitor.phase, monitor.token)
                        })
                })
                .collect();
            let what = format!(
                "{} does not run at the end, 60 s after the last trouble: {:?}; monitors {monitors:?}",
                vm.name, vm.ownership
            );
            return world.violate("every machine comes back", what);
        }
        if let Some(why) = &vm.held {
            return world.violate(
                "every machine comes back",
                format!("{} is held: {why}", vm.name),
            );
        }
    }
}
