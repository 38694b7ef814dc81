//! Bringing the machines of a drained node back to it, once it takes machines again.
//!
//! As with a drain, nothing is kept outside the log: who is to return is written at each machine
//! ([`Vm::home`]), what failed and what stays away in the record that `uncordon --failback` made; so any leader
//! can go on where another stopped.
//!
//! ```text
//!  drain ──► home = node ── uncordon --failback ──► record ── next ──► QueueMigration … ── cutover ──► home = none
//!                       └─ uncordon ──► home = none      └── no place, or tried too often ──► stays away
//! ```

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::BTreeSet;

use crate::command::{Command, Rejection};
use crate::drain::{AHEAD_MAX, Method, PlannedMachine, Step, copy_ms, not_now, queue};
use crate::fleet::{Count, Fleet, Observed};
use crate::ids::NodeId;
use crate::placement::{Choice, NoPlace, best_node_in, takes_machines};
use crate::state::{ClusterState, Desired, Failback, MigrationCause, Vm};

const RULE: &str = "fail-back: a drain took it from here";

/// The machines that are to return to a node and are not back yet, the important ones first. One that stopped,
/// is held, or that a person moved is not among them.
pub fn away<'s>(state: &'s ClusterState, failback: &Failback) -> Vec<&'s Vm> {
    let mut away: Vec<&Vm> = state
        .vms
        .values()
        .filter(|vm| {
            vm.home == Some(failback.node)
                && vm.ownership.owner != Some(failback.node)
                && vm.desired == Desired::Running
                && vm.held.is_none()
                && !failback.stays.contains_key(&vm.id)
        })
        .collect();
    away.sort_by_key(|vm| (Reverse(vm.spec.priority), vm.id));
    away
}

/// The next steps of every fail-back that is under way.
pub fn next(state: &ClusterState, observed: &Observed) -> Vec<Command> {
    if state.failbacks.is_empty() {
        return Vec::new();
    }
    let mut fleet = Fleet::new(state, observed, Count::Open);
    let mut commands = Vec::new();
    for failback in state.failbacks.values() {
        commands.extend(next_of(&mut fleet, failback));
    }
    commands
}

fn next_of(fleet: &mut Fleet<'_>, failback: &Failback) -> Vec<Command> {
    let state = fleet.state;
    let node = failback.node;
    let away = away(state, failback);
    if away.is_empty() {
        return vec![Command::EndFailback { node }];
    }
    // It may be lost meanwhile, and come back.
    if !takes(state, node) {
        return Vec::new();
    }
    let cause = MigrationCause::Failback(node);
    let mut open = state
        .migrations
        .values()
        .filter(|migration| migration.is_open() && migration.cause == cause)
        .count();
    let mut commands = Vec::new();
    for vm in away {
        if open >= AHEAD_MAX {
            break;
        }
        let Some(owner) = vm.ownership.owner else {
            continue;
        };
        if not_now(vm).is_some() || fleet.is_moving(vm.id) {
            continue;
        }
        match home(fleet, vm, node) {
            Ok(choice) => {
                commands.push(queue(fleet, vm, owner, &choice, cause.clone(), RULE));
                open += 1;
            }
            Err(no_place) if may_pass(fleet, node, open, &no_place) => {}
            Err(no_place) => commands.push(Command::StayAway {
                node,
                vm: vm.id,
                reason: no_place.reasons(state),
            }),
        }
    }
    commands
}

fn takes(state: &ClusterState, node: NodeId) -> bool {
    state
        .nodes
        .get(&node)
        .is_some_and(|node| takes_machines(node).is_ok())
}

/// That node and no other, if it can take the machine.
fn home(fleet: &Fleet<'_>, vm: &Vm, node: NodeId) -> Result<Choice, NoPlace> {
    let others: BTreeSet<NodeId> = fleet
        .state
        .nodes
        .keys()
        .copied()
        .filter(|&other| other != node)
        .collect();
    best_node_in(fleet, vm, &others)
}

/// Whether what keeps a machine away may pass by itself: room, while others still move; a path to a volume that
/// is down, as on a node that has just started.
fn may_pass(fleet: &Fleet<'_>, node: NodeId, open: usize, no_place: &NoPlace) -> bool {
    no_place.considered.iter().any(|(_, rejection)| {
        matches!(rejection, Rejection::NoRoom { .. }) && open > 0
            || matches!(rejection, Rejection::VolumeUnreachable { volume, .. }
                if fleet.volume_down(node, volume))
    })
}

/// What the fail-back to a node will do, with `rate_bytes_s` as what a migration gets through its link; empty
/// where none is under way.
pub fn plan(
    state: &ClusterState,
    node: NodeId,
    observed: &Observed,
    rate_bytes_s: u64,
) -> Vec<PlannedMachine> {
    let Some(failback) = state.failbacks.get(&node) else {
        return Vec::new();
    };
    let mut fleet = Fleet::new(state, observed, Count::Open);
    away(state, failback)
        .into_iter()
        .map(|vm| PlannedMachine {
            vm: vm.id,
            priority: vm.spec.priority,
            memory_mib: vm.spec.memory_mib,
            step: step(&mut fleet, vm, node, rate_bytes_s),
        })
        .collect()
}

fn step(fleet: &mut Fleet<'_>, vm: &Vm, node: NodeId, rate_bytes_s: u64) -> Step {
    let later = |reason: &str| Step::Later {
        reason: reason.to_owned(),
    };
    if let (_, Some(to)) = fleet.places(vm.id) {
        return Step::Moving { to };
    }
    let Some(owner) = vm.ownership.owner else {
        return later("it waits for a node that can take it");
    };
    if let Some(reason) = not_now(vm) {
        return later(reason);
    }
    if !takes(fleet.state, node) {
        return later("its node is not up yet");
    }
    match home(fleet, vm, node) {
        Ok(choice) => {
            fleet.promise_move(vm, owner, node);
            Step::Move {
                method: Method::Live,
                to: node,
                predicted_ms: copy_ms(vm.spec.memory_mib, rate_bytes_s),
                why: choice.why(RULE, fleet),
            }
        }
        Err(no_place) => Step::Stays {
            reason: no_place.reasons(fleet.state),
        },
    }
}
