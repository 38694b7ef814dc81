//! Where a machine may be (hard constraints), and where it is best (a score).

#[cfg(test)]
mod tests;

use std::cmp::Ordering;
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::command::Rejection;
use crate::event::{Why, counted};
use crate::fleet::{Fleet, permille};
use crate::ids::{Name, NodeId, VmId};
use crate::limits;
use crate::state::{ClusterState, Duty, Liveness, Node, NodeRole, Rule, Vm, Volume};

/// Nodes that a decision's [`Why`] names, best first, and as many of the refused: enough for a person,
/// small enough for the log.
const WHY_NODES_MAX: usize = 6;
/// Over this fill, thousandths, a node is crowded.
const CROWDED_PERMILLE: u16 = 800;
/// Fills within one step of this, thousandths, are alike, so that smaller matters decide between them.
const FILL_STEP_PERMILLE: u16 = 50;

/// Whether a node takes machines at all.
///
/// # Errors
/// [`Rejection::NodeUnfit`] with the reason.
pub fn takes_machines(node: &Node) -> Result<(), Rejection> {
    let unfit = |reason: &str| {
        Err(Rejection::NodeUnfit {
            node: node.id,
            reason: reason.into(),
        })
    };
    match (node.role, node.liveness, node.duty) {
        (NodeRole::Witness, _, _) => unfit("it is a witness: it only votes"),
        (_, Liveness::Joining, _) => unfit("it has not started yet"),
        (_, Liveness::Lost, _) => unfit("it is lost; see: clusterctl why node"),
        (_, Liveness::Quarantined, _) => {
            unfit("it was lost too often and is quarantined; clear it: clusterctl node uncordon")
        }
        (_, _, Duty::Draining) => unfit("it is being drained"),
        (_, _, Duty::Drained) => unfit("it is drained; take it back: clusterctl node uncordon"),
        (_, Liveness::Up, Duty::Active) => Ok(()),
    }
}

/// Whether a running machine can pass from one node's hardware and software to another's.
///
/// # Errors
/// [`Rejection::CpuDiffers`] or [`Rejection::VersionsDiffer`].
pub fn compatible(source: &Node, destination: &Node) -> Result<(), Rejection> {
    let (from, to) = (source.id, destination.id);
    let (ours, theirs) = (&source.facts, &destination.facts);
    if ours.cpu_vendor != theirs.cpu_vendor {
        return Err(Rejection::CpuDiffers {
            from,
            to,
            ours: ours.cpu_vendor.clone(),
            theirs: theirs.cpu_vendor.clone(),
        });
    }
    let (_, ours_newest) = ours.stream_versions;
    let (theirs_oldest, theirs_newest) = theirs.stream_versions;
    // A newer destination reads what an older source speaks; never the other way round.
    if !(theirs_oldest..=theirs_newest).contains(&ours_newest) {
        return Err(Rejection::VersionsDiffer {
            from,
            to,
            ours: ours.version.clone(),
            theirs: theirs.version.clone(),
        });
    }
    Ok(())
}

/// What is left on a node.
struct Room {
    memory_mib: u64,
    vcpus: u64,
}

/// The hard constraints; how each fact is looked up is the caller's.
fn constraints<'s>(
    vm: &Vm,
    node: &Node,
    volume_named: impl Fn(&Name) -> Option<&'s Volume>,
    forbidding: impl FnOnce() -> Option<&'s Name>,
    room: impl FnOnce() -> Room,
) -> Result<(), Rejection> {
    takes_machines(node)?;
    // One that was let in under other limits would fail on every node in turn.
    limits::check_spec(&vm.spec)?;
    for disk in &vm.spec.disks {
        if !volume_named(&disk.volume).is_some_and(|volume| volume.reaches(node.id)) {
            return Err(Rejection::VolumeUnreachable {
                node: node.id,
                volume: disk.volume.clone(),
            });
        }
    }
    if let Some(rule) = forbidding() {
        return Err(Rejection::RuleForbids {
            rule: rule.clone(),
            vm: vm.id,
            node: node.id,
        });
    }
    // What it owns already is not counted twice.
    if vm.ownership.owner == Some(node.id) {
        return Ok(());
    }
    let room = room();
    let no_room = |what: &str, needs: u64, free: u64| {
        Err(Rejection::NoRoom {
            node: node.id,
            what: what.into(),
            needs,
            free,
        })
    };
    if vm.spec.memory_mib > room.memory_mib {
        return no_room("memory (MiB)", vm.spec.memory_mib, room.memory_mib);
    }
    if u64::from(vm.spec.vcpus) > room.vcpus {
        return no_room("virtual processors", u64::from(vm.spec.vcpus), room.vcpus);
    }
    Ok(())
}

/// Whether `vm` may run on `node`: duty, volumes, rules and room, counting what runs there now.
///
/// # Errors
/// The first constraint that forbids it.
pub fn may_run(state: &ClusterState, vm: &Vm, node: &Node) -> Result<(), Rejection> {
    constraints(
        vm,
        node,
        |name| state.volume_named(name),
        || forbidding_rule(state, vm, node.id),
        || {
            let (memory_mib, vcpus) = state.committed(node.id);
            let settings = &state.settings;
            let offered = node.facts.memory_mib;
            let processors = u64::from(node.facts.cpus) * u64::from(settings.cpu_overcommit);
            Room {
                memory_mib: offered
                    .saturating_sub(settings.memory_reserve_mib)
                    .saturating_sub(memory_mib),
                vcpus: processors.saturating_sub(vcpus),
            }
        },
    )
}

/// The same in a plan: counts what the plan has promised, and which volumes nodes report as unreachable.
///
/// # Errors
/// The first constraint that forbids it.
pub fn may_run_in(fleet: &Fleet<'_>, vm: &Vm, node: &Node) -> Result<(), Rejection> {
    constraints(
        vm,
        node,
        |name| {
            fleet
                .volume(name)
                .filter(|_| !fleet.volume_down(node.id, name))
        },
        || {
            let rules = fleet.rules_of(vm.id).iter().copied();
            first_forbidding(rules, vm.id, node.id, |other| fleet.places(other))
        },
        || Room {
            memory_mib: fleet.memory_free_mib(node),
            vcpus: fleet.vcpus_free(node),
        },
    )
}

/// The rule that keeps `vm` off `node`, if there is one.
///
/// Preferred owners forbid nothing. An affinity rule forbids a node only while another machine of the
/// rule runs elsewhere and none runs here.
pub fn forbidding_rule<'s>(state: &'s ClusterState, vm: &Vm, node: NodeId) -> Option<&'s Name> {
    first_forbidding(state.rules.iter(), vm.id, node, |other| {
        let owner = state
            .vms
            .get(&other)
            .and_then(|other| other.ownership.owner);
        let coming = state.active_migration(other).map(|migration| migration.to);
        (owner, coming)
    })
}

/// `places`: where a machine is, and where it is on its way to.
fn first_forbidding<'s>(
    mut rules: impl Iterator<Item = (&'s Name, &'s Rule)>,
    vm: VmId,
    node: NodeId,
    places: impl Fn(VmId) -> (Option<NodeId>, Option<NodeId>),
) -> Option<&'s Name> {
    rules.find_map(|(name, rule)| {
        let forbids = match rule {
            Rule::PossibleOwners { vm: ruled, nodes } => *ruled == vm && !nodes.contains(&node),
            Rule::PreferredOwners { .. } => false,
            Rule::AntiAffinity { vms } => {
                vms.contains(&vm)
                    && vms.iter().filter(|&&other| other != vm).any(|&other| {
                        let (owner, coming) = places(other);
                        owner == Some(node) || coming == Some(node)
                    })
            }
            Rule::Affinity { vms } => {
                let mut elsewhere = false;
                let mut here = false;
                for &other in vms.iter().filter(|&&other| other != vm) {
                    let (owner, coming) = places(other);
                    match coming.or(owner) {
                        Some(place) if place == node => here = true,
                        Some(_) => elsewhere = true,
                        None => {}
                    }
                }
                vms.contains(&vm) && elsewhere && !here
            }
        };
        forbids.then_some(name)
    })
}

/// How good a node is for a machine; smaller is better. The order of the fields is the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Score {
    /// It could not be started there since it last ran.
    pub failed_here: bool,
    /// A rule prefers other nodes.
    pub not_preferred: bool,
    /// Its memory or processors would be over 80 %.
    pub crowded: bool,
    /// The fuller of memory (with the machine) and processors, in steps of 5 %.
    pub fill_steps: u16,
    /// Migrations out of it and into it.
    pub migrations: u32,
    /// Memory with the machine, thousandths.
    pub memory_permille: u16,
    /// Machines.
    pub machines: u32,
    /// Two alike: the older node.
    pub node: NodeId,
}

impl Score {
    fn of(fleet: &Fleet<'_>, vm: &Vm, node: &Node) -> Score {
        let used = fleet.used(node.id);
        let own = if vm.ownership.owner == Some(node.id) {
            0
        } else {
            vm.spec.memory_mib
        };
        let memory_permille = permille(used.memory_mib + own, fleet.memory_offered_mib(node));
        let fill = memory_permille.max(fleet.cpu_permille(node.id));
        let not_preferred = fleet.rules_of(vm.id).iter().any(|(_, rule)| {
            matches!(rule, Rule::PreferredOwners { nodes, .. } if !nodes.contains(&node.id))
        });
        Score {
            failed_here: vm.failed_on.contains(&node.id),
            not_preferred,
            crowded: fill > CROWDED_PERMILLE,
            fill_steps: fill / FILL_STEP_PERMILLE,
            migrations: used.moves_in + used.moves_out,
            memory_permille,
            machines: used.machines,
            node: node.id,
        }
    }

    fn words(&self) -> String {
        let mut words = format!(
            "memory {}.{} % with it, {}",
            self.memory_permille / 10,
            self.memory_permille % 10,
            counted(self.machines as usize, "machine")
        );
        for (is, word) in [
            (self.failed_here, "could not start it before"),
            (self.not_preferred, "not preferred"),
            (self.crowded, "crowded"),
            (self.migrations > 0, "busy migrating"),
        ] {
            if is {
                words.push_str(", ");
                words.push_str(word);
            }
        }
        words
    }
}

/// The node chosen for a machine, and every one that was looked at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// Which.
    pub node: NodeId,
    /// Its score.
    pub score: Score,
    /// All, best first, then the refused.
    pub considered: Vec<(NodeId, Result<Score, Rejection>)>,
}

/// No node can take a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("no node can take {vm}: {}", refusals(.considered, ToString::to_string))]
pub struct NoPlace {
    /// Which machine.
    pub vm: VmId,
    /// Each node's refusal.
    pub considered: Vec<(NodeId, Rejection)>,
}

fn refusals(considered: &[(NodeId, Rejection)], words: impl Fn(&Rejection) -> String) -> String {
    if considered.is_empty() {
        return "there is no other node; add one: clusterctl node add".into();
    }
    let mut texts: Vec<String> = considered
        .iter()
        .take(WHY_NODES_MAX)
        .map(|(_, rejection)| words(rejection))
        .collect();
    if considered.len() > WHY_NODES_MAX {
        texts.push(format!(
            "and {} more",
            counted(considered.len() - WHY_NODES_MAX, "node")
        ));
    }
    texts.join("; ")
}

impl NoPlace {
    /// The same as `Display`, with people's names.
    pub fn in_words(&self, state: &ClusterState) -> String {
        format!(
            "no node can take {}: {}",
            state.vm_label(self.vm),
            self.reasons(state)
        )
    }

    /// Each node's refusal, with people's names.
    pub fn reasons(&self, state: &ClusterState) -> String {
        refusals(&self.considered, |rejection| rejection.in_words(state))
    }

    /// Whether room alone is missing on some node: it may come back.
    pub fn for_want_of_room(&self) -> bool {
        self.considered
            .iter()
            .any(|(_, rejection)| matches!(rejection, Rejection::NoRoom { .. }))
    }

    /// As the inputs of a decision.
    pub fn why(&self, rule: &str, fleet: &Fleet<'_>) -> Why {
        let mut why = Why::rule(rule);
        for (node, rejection) in self.considered.iter().take(WHY_NODES_MAX) {
            why = why.with(
                &fleet.state.node_label(*node),
                rejection.in_words(fleet.state),
            );
        }
        why
    }
}

impl Choice {
    /// As the inputs of a decision.
    pub fn why(&self, rule: &str, fleet: &Fleet<'_>) -> Why {
        let mut why = Why::rule(rule).with("chosen", fleet.state.node_label(self.node));
        let (mut fit, mut unfit) = (0, 0);
        for (node, verdict) in &self.considered {
            let (count, words) = match verdict {
                Ok(score) => (&mut fit, score.words()),
                Err(rejection) => (&mut unfit, rejection.in_words(fleet.state)),
            };
            *count += 1;
            if *count <= WHY_NODES_MAX {
                why = why.with(&fleet.state.node_label(*node), words);
            }
        }
        why
    }
}

/// The best node for a machine in a plan, other than those of `exclude`.
///
/// A machine that has an owner is to move: its owner is left out, and the destination must be able to take
/// up its running state.
///
/// # Errors
/// Every node's refusal.
pub fn best_node_in(
    fleet: &Fleet<'_>,
    vm: &Vm,
    exclude: &BTreeSet<NodeId>,
) -> Result<Choice, NoPlace> {
    let source = vm
        .ownership
        .owner
        .and_then(|owner| fleet.state.nodes.get(&owner));
    let mut considered: Vec<(NodeId, Result<Score, Rejection>)> = fleet
        .state
        .nodes
        .values()
        .filter(|node| !exclude.contains(&node.id) && vm.ownership.owner != Some(node.id))
        .map(|node| {
            let verdict = may_run_in(fleet, vm, node)
                .and_then(|()| source.map_or(Ok(()), |source| compatible(source, node)))
                .map(|()| Score::of(fleet, vm, node));
            (node.id, verdict)
        })
        .collect();
    considered.sort_by(|(_, one), (_, other)| match (one, other) {
        (Ok(one), Ok(other)) => one.cmp(other),
        (Ok(_), Err(_)) => Ordering::Less,
        (Err(_), Ok(_)) => Ordering::Greater,
        (Err(_), Err(_)) => Ordering::Equal,
    });
    match considered.first() {
        Some((node, Ok(score))) => Ok(Choice {
            node: *node,
            score: *score,
            considered,
        }),
        _ => Err(NoPlace {
            vm: vm.id,
            considered: considered
                .into_iter()
                .filter_map(|(node, verdict)| verdict.err().map(|rejection| (node, rejection)))
                .collect(),
        }),
    }
}
