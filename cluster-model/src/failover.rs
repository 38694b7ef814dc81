//! Which machines that should run and have no owner are started now, and where.
//!
//! The same plan starts a machine for the first time, after a crash, and after its node was lost: what
//! differs is written in the ownership record (`settle`) and in the hold that `apply` put on a machine whose
//! lost owner nobody can stop from writing.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use crate::apply::{DETAIL_BYTES_MAX, clip};
use crate::command::Command;
use crate::event::{Object, Severity, Why};
use crate::fleet::{Count, Fleet, Observed};
use crate::ids::VmId;
use crate::placement::best_node_in;
use crate::state::{ClusterState, Desired, OwnershipCause, Vm};

/// Machines that one plan places at most: its commands change the state that the next plan sees.
pub const STARTS_MAX: usize = 256;
/// The kind of the event that says why a machine is not started.
pub const HELD_KIND: &str = "failover.held";

/// The commands that start what should run, the most important machine first; and a note for each machine
/// that cannot be started, unless the last note about it says the same.
pub fn plan(state: &ClusterState, observed: &Observed) -> Vec<Command> {
    let mut waiting: Vec<&Vm> = state
        .vms
        .values()
        .filter(|vm| {
            vm.desired == Desired::Running && vm.ownership.owner.is_none() && vm.held.is_none()
        })
        .collect();
    if waiting.is_empty() {
        return Vec::new();
    }
    waiting.sort_by_key(|vm| (std::cmp::Reverse(vm.spec.priority), vm.id));
    waiting.truncate(STARTS_MAX);
    let mut fleet = Fleet::new(state, observed, Count::Open);
    let mut commands = Vec::with_capacity(waiting.len());
    for vm in waiting {
        match best_node_in(&fleet, vm, &BTreeSet::new()) {
            Ok(choice) => {
                commands.push(Command::StartVm {
                    vm: vm.id,
                    node: choice.node,
                    expects: vm.ownership.token,
                    why: choice
                        .why(rule(vm), &fleet)
                        .with("priority", vm.spec.priority),
                });
                fleet.promise_start(vm, choice.node);
            }
            Err(no_place) => {
                let detail = clip(
                    format!("{} waits: {}", vm.name, no_place.in_words(state)),
                    DETAIL_BYTES_MAX,
                );
                if last_note(state, vm.id) != Some(&detail) {
                    commands.push(Command::Note {
                        objects: vec![Object::Vm(vm.id)],
                        severity: Severity::Error,
                        kind: HELD_KIND.to_owned(),
                        detail,
                        why: no_place.why("a machine is started only where it fits", &fleet),
                    });
                }
            }
        }
    }
    commands
}

fn rule(vm: &Vm) -> &'static str {
    match vm.ownership.cause {
        OwnershipCause::NodeLost => {
            "failover: its node was lost; restarted by priority on the best node with room"
        }
        OwnershipCause::NodeRebooted => {
            "failover: its node came back as another life; restarted by priority on the best node with room"
        }
        OwnershipCause::Created
        | OwnershipCause::Start
        | OwnershipCause::Release
        | OwnershipCause::Cutover
        | OwnershipCause::Rekey => "start: it should run; placed on the best node with room",
    }
}

/// What was last said of a machine that waits, while nothing was said of it since.
fn last_note(state: &ClusterState, vm: VmId) -> Option<&String> {
    state
        .events
        .iter()
        .rev()
        .find(|event| event.objects.contains(&Object::Vm(vm)))
        .filter(|event| event.kind == HELD_KIND)
        .map(|event| &event.detail)
}

/// Why a machine does not run, in words; for `vm show`.
pub fn why_not_running(state: &ClusterState, vm: VmId) -> Option<Why> {
    let known = state.vms.get(&vm)?;
    if known.ownership.owner.is_some() {
        return None;
    }
    if known.desired == Desired::Stopped {
        return Some(Why::rule("it should be stopped"));
    }
    if let Some(reason) = &known.held {
        return Some(Why::rule("it is held").with("because", reason));
    }
    Some(match last_note(state, vm) {
        Some(detail) => Why::rule("no node can take it").with("because", detail),
        None => Why::rule("it is about to be placed"),
    })
}
