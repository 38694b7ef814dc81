//! Emptying a node: the plan that a person reads first, and the next steps of a drain under way.
//!
//! A drain keeps nothing outside the log. Its tries are the aborted migrations with its cause that are younger
//! than it; its troubles are in its record; so any leader can go on where another stopped.

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::command::{Command, Rejection};
use crate::event::Why;
use crate::fleet::{Count, Fleet, Observed};
use crate::ids::{LogIndex, NodeId, VmId};
use crate::placement::{Choice, best_node_in};
use crate::state::{
    ClusterState, Desired, Drain, Migration, MigrationCause, MigrationOptions, MigrationState, Vm,
};

/// Migrations that a drain keeps open at once: enough to fill the slots, few enough that each destination
/// is chosen with what is known by then.
pub const AHEAD_MAX: usize = 4;

/// How a machine leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// By live migration.
    Live,
}

/// What is planned for one machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "plan")]
pub enum Step {
    /// It moves.
    Move {
        /// How.
        method: Method,
        /// Where to.
        to: NodeId,
        /// How long its memory takes at the given rate, ms.
        predicted_ms: u64,
        /// Why there.
        why: Why,
    },
    /// It is on its way already.
    Moving {
        /// Where to.
        to: NodeId,
    },
    /// It is starting or stopping; it is looked at again when it is through.
    Later {
        /// What it waits for.
        reason: String,
    },
    /// It cannot move.
    Stays {
        /// Why, and what to try.
        reason: String,
    },
}

/// One machine of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedMachine {
    /// Which.
    pub vm: VmId,
    /// Its priority; higher leaves first.
    pub priority: u16,
    /// Its memory, MiB.
    pub memory_mib: u64,
    /// What is planned.
    pub step: Step,
}

/// What a drain of a node would do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainPlan {
    /// Which node.
    pub node: NodeId,
    /// Its machines in the order in which they leave.
    pub machines: Vec<PlannedMachine>,
    /// How long all moves take, ms: the node's link is shared by those under way at once.
    pub predicted_ms: u64,
}

/// How long `memory_mib` takes at `rate_bytes_s`, ms; a rate of 0 counts as 1.
pub(crate) fn copy_ms(memory_mib: u64, rate_bytes_s: u64) -> u64 {
    let bytes = u128::from(memory_mib) << 20;
    u64::try_from(bytes * 1_000 / u128::from(rate_bytes_s.max(1))).unwrap_or(u64::MAX)
}

/// The machines of a node in the order in which they leave it.
fn leaving<'s>(fleet: &Fleet<'s>, node: NodeId) -> Vec<&'s Vm> {
    let mut machines = fleet.owned(node).to_vec();
    machines.sort_by_key(|vm| (Reverse(vm.spec.priority), vm.id));
    machines
}

/// The plan for emptying `node`, with `rate_bytes_s` as what a migration gets through its link.
///
/// # Errors
/// There is no such node.
pub fn plan(
    state: &ClusterState,
    node: NodeId,
    observed: &Observed,
    rate_bytes_s: u64,
) -> Result<DrainPlan, Rejection> {
    if !state.nodes.contains_key(&node) {
        return Err(Rejection::Unknown {
            kind: "node".into(),
            what: node.to_string(),
        });
    }
    let mut fleet = Fleet::new(state, observed, Count::Open);
    let mut machines = Vec::new();
    let mut predicted_ms = 0u64;
    for vm in leaving(&fleet, node) {
        let step = if let (_, Some(to)) = fleet.places(vm.id) {
            predicted_ms += copy_ms(vm.spec.memory_mib, rate_bytes_s);
            Step::Moving { to }
        } else if let Some(reason) = not_now(vm) {
            Step::Later {
                reason: reason.into(),
            }
        } else {
            match best_node_in(&fleet, vm, &BTreeSet::new()) {
                Ok(choice) => {
                    fleet.promise_move(vm, node, choice.node);
                    let copy = copy_ms(vm.spec.memory_mib, rate_bytes_s);
                    predicted_ms = predicted_ms.saturating_add(copy);
                    Step::Move {
                        method: Method::Live,
                        to: choice.node,
                        predicted_ms: copy,
                        why: choice.why("drain: the best other node with room", &fleet),
                    }
                }
                Err(no_place) => Step::Stays {
                    reason: no_place.in_words(state),
                },
            }
        };
        machines.push(PlannedMachine {
            vm: vm.id,
            priority: vm.spec.priority,
            memory_mib: vm.spec.memory_mib,
            step,
        });
    }
    Ok(DrainPlan {
        node,
        machines,
        predicted_ms,
    })
}

/// Why a machine cannot be moved yet.
pub(crate) fn not_now(vm: &Vm) -> Option<&'static str> {
    if vm.desired == Desired::Stopped {
        Some("it is stopping")
    } else if !vm.ownership.activated {
        Some("it is starting")
    } else {
        None
    }
}

/// The ended tries with `cause` of a machine that are younger than `since`, oldest first.
fn failed_tries<'s>(
    state: &'s ClusterState,
    vm: VmId,
    cause: &MigrationCause,
    since: LogIndex,
) -> Vec<(&'s Migration, &'s str)> {
    state
        .migrations
        .range(crate::ids::MigrationId(since.0)..)
        .filter(|(_, migration)| migration.vm == vm && migration.cause == *cause)
        .filter_map(|(_, migration)| match &migration.state {
            MigrationState::Aborted { reason, .. } => Some((migration, reason.as_str())),
            MigrationState::Queued
            | MigrationState::Active { .. }
            | MigrationState::CutOver { .. } => None,
        })
        .collect()
}

/// The next steps of every drain that is under way.
pub fn next(state: &ClusterState, observed: &Observed) -> Vec<Command> {
    let running: Vec<&Drain> = state
        .drains
        .values()
        .filter(|drain| drain.ended_at_ms == 0)
        .collect();
    if running.is_empty() {
        return Vec::new();
    }
    let mut fleet = Fleet::new(state, observed, Count::Open);
    let mut commands = Vec::new();
    for drain in running {
        commands.extend(next_of(&mut fleet, drain));
    }
    commands
}

fn next_of(fleet: &mut Fleet<'_>, drain: &Drain) -> Vec<Command> {
    let state = fleet.state;
    let node = drain.node;
    let cause = MigrationCause::Drain(node);
    let mut open = state
        .migrations
        .values()
        .filter(|migration| migration.is_open() && migration.from == node)
        .count();
    let mut commands = Vec::new();
    let mut left = 0usize;
    for vm in leaving(fleet, node) {
        if drain.stuck.contains_key(&vm.id) {
            continue;
        }
        left += 1;
        if fleet.is_moving(vm.id) || not_now(vm).is_some() {
            continue;
        }
        let tries = failed_tries(state, vm.id, &cause, drain.since);
        let counted = usize::from(drain.failures.get(&vm.id).copied().unwrap_or(0));
        if let Some((_, reason)) = tries.get(counted..).and_then(<[_]>::last) {
            commands.push(Command::DrainTrouble {
                node,
                vm: vm.id,
                reason: (*reason).to_owned(),
                stuck: false,
            });
            continue;
        }
        if open >= AHEAD_MAX {
            continue;
        }
        // The destination of the last failure is not tried again at once, if there is another.
        let avoid: BTreeSet<NodeId> = tries
            .last()
            .map(|(tried, _)| tried.to)
            .into_iter()
            .collect();
        let choice =
            best_node_in(fleet, vm, &avoid).or_else(|_| best_node_in(fleet, vm, &BTreeSet::new()));
        match choice {
            Ok(choice) => {
                let rule = "drain: the best other node with room";
                commands.push(queue(fleet, vm, node, &choice, cause.clone(), rule));
                open += 1;
            }
            // Room may come back while others still move.
            Err(no_place) if open > 0 && no_place.for_want_of_room() => {}
            Err(no_place) => commands.push(Command::DrainTrouble {
                node,
                vm: vm.id,
                reason: no_place.in_words(state),
                stuck: true,
            }),
        }
    }
    if left == 0 && open == 0 {
        commands.push(Command::EndDrain { node });
    }
    commands
}

/// Queues a move, and promises its room in the plan.
pub(crate) fn queue(
    fleet: &mut Fleet<'_>,
    vm: &Vm,
    from: NodeId,
    choice: &Choice,
    cause: MigrationCause,
    rule: &str,
) -> Command {
    let why = choice.why(rule, fleet);
    fleet.promise_move(vm, from, choice.node);
    Command::QueueMigration {
        vm: vm.id,
        to: choice.node,
        options: MigrationOptions::default(),
        cause,
        why,
    }
}
