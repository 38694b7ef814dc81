//! Which machines that should run and have no owner are started now, and where.
//!
//! The same plan starts a machine for the first time, after a crash, and after its node was lost: what
//! differs is written in the ownership record (`settle`) and in the hold that `apply` put on a machine whose
//! lost owner nobody can stop from writing.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use crate::apply::{DETAIL_BYTES_MAX, clip};
use crate::command::Command;
use crate::event::{Object, Severity, Why};
use crate::fleet::{Count, Fleet, Observed};
use crate::ids::{Name, VmId};
use crate::placement::{NoPlace, best_node_in};
use crate::state::{ClusterState, Desired, OwnershipCause, Vm};

/// Machines that one plan places at most: its commands change the state that the next plan sees.
pub const STARTS_MAX: usize = 256;
/// Notes that one plan writes at most: those of a whole cluster that waits must not push everything else out of
/// the events. Who gets none now gets one by a later plan.
pub const NOTES_MAX: usize = 256;
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
    let mut fleet = Fleet::new(state, observed, Count::Open);
    let mut refusals = Refusals::default();
    let noted = last_notes(state);
    let (mut starts, mut notes) = (Vec::new(), Vec::new());
    // What has no place takes none from those after it, however many they are.
    for vm in waiting {
        if starts.len() == STARTS_MAX {
            break;
        }
        let refused = match refusals.known(&fleet, vm) {
            Some(refused) => refused,
            None => match best_node_in(&fleet, vm, &BTreeSet::new()) {
                Ok(choice) => {
                    starts.push(Command::StartVm {
                        vm: vm.id,
                        node: choice.node,
                        expects: vm.ownership.token,
                        why: choice
                            .why(rule(vm), &fleet)
                            .with("priority", vm.spec.priority),
                    });
                    fleet.promise_start(vm, choice.node);
                    continue;
                }
                Err(no_place) => refusals.learn(&fleet, vm, &no_place),
            },
        };
        let detail = clip(
            format!(
                "{} waits: no node can take it: {}",
                vm.name, refused.reasons
            ),
            DETAIL_BYTES_MAX,
        );
        if notes.len() < NOTES_MAX && noted.get(&vm.id) != Some(&detail.as_str()) {
            notes.push(Command::Note {
                objects: vec![Object::Vm(vm.id)],
                severity: Severity::Error,
                kind: HELD_KIND.to_owned(),
                detail,
                why: refused.why,
            });
        }
    }
    starts.extend(notes);
    starts
}

/// Why every node refused a machine.
#[derive(Clone, Debug)]
struct Refused {
    reasons: String,
    why: Why,
}

/// What was refused in this plan already. A plan only takes room, so a machine without rules that needs the same
/// has no place either: when the storage is away, every machine of the cluster waits for the same reason.
#[derive(Default)]
struct Refusals<'s> {
    by_needs: BTreeMap<(u64, u32, BTreeSet<&'s Name>), Refused>,
}

impl<'s> Refusals<'s> {
    fn needs(vm: &'s Vm) -> (u64, u32, BTreeSet<&'s Name>) {
        let volumes = vm.spec.disks.iter().map(|disk| &disk.volume).collect();
        (vm.spec.memory_mib, vm.spec.vcpus, volumes)
    }

    fn known(&self, fleet: &Fleet<'_>, vm: &'s Vm) -> Option<Refused> {
        if fleet.rules_of(vm.id).is_empty() {
            self.by_needs.get(&Refusals::needs(vm)).cloned()
        } else {
            None
        }
    }

    fn learn(&mut self, fleet: &Fleet<'_>, vm: &'s Vm, no_place: &NoPlace) -> Refused {
        let refused = Refused {
            reasons: no_place.reasons(fleet.state),
            why: no_place.why("a machine is started only where it fits", fleet),
        };
        if fleet.rules_of(vm.id).is_empty() {
            self.by_needs.insert(Refusals::needs(vm), refused.clone());
        }
        refused
    }
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

/// The same of every machine that was spoken of.
fn last_notes(state: &ClusterState) -> BTreeMap<VmId, &str> {
    let mut last = BTreeMap::new();
    for event in &state.events {
        for object in &event.objects {
            if let Object::Vm(vm) = object {
                last.insert(*vm, event);
            }
        }
    }
    last.into_iter()
        .filter(|(_, event)| event.kind == HELD_KIND)
        .map(|(vm, event)| (vm, event.detail.as_str()))
        .collect()
}

/// Why a machine has no owner, for people; `None`: it has one.
pub fn why_not_running(state: &ClusterState, vm: &Vm) -> Option<String> {
    if vm.ownership.owner.is_some() {
        return None;
    }
    if vm.desired == Desired::Stopped {
        return Some("it should be stopped".into());
    }
    if let Some(reason) = &vm.held {
        return Some(format!("it is held: {reason}"));
    }
    Some(match last_note(state, vm.id) {
        Some(detail) => detail.clone(),
        None => "it is about to be placed".into(),
    })
}
