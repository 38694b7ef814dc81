//! Evening out load: which machines would move where, what it gains and costs, and what is left alone.
//!
//! The levels are those of Windows Server 2016: *low* moves when a node is over 80 %, *medium* over 70 %,
//! *high* over 60 % or five points over the mean. Load is the fuller of memory spoken for and processors.
//! Every move has to pay: it must lower the fuller of the two nodes by a fair part of the memory that it
//! copies, must fit under the threshold where it goes, and must leave the destination clearly under what the
//! source was, which keeps a machine from going back and forth.

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::command::Command;
use crate::event::Why;
use crate::fleet::{Count, Fleet, Observed, permille};
use crate::ids::{NodeId, VmId};
use crate::placement::{best_node_in, takes_machines};
use crate::settings::BalanceLevel;
use crate::state::{ClusterState, Desired, MigrationCause, MigrationOptions, Node, Vm};

/// A move must lower the fuller of its two nodes by at least this part of the source's memory that it
/// copies: one in so many.
pub const COST_PER_GAIN_MAX: u16 = 2;
/// After a move the destination must be this far under what the source was before it, thousandths.
pub const HYSTERESIS_PERMILLE: u16 = 50;
/// At level *high*: this far over the mean counts as too full, thousandths.
pub const OVER_MEAN_PERMILLE: u16 = 50;
/// Moves in one plan: the next one, an interval later, sees what they did.
pub const MOVES_MAX: usize = 256;
/// Moves off one node in one plan.
pub const MOVES_OF_NODE_MAX: usize = 16;
/// Machines of a node that are looked at, smallest cost first.
const CANDIDATES_MAX: usize = 64;
/// Machines that one plan looks at: each is held against every node. Further nodes have their turn in the
/// next plan, the fullest first.
const CONSIDERED_MAX: usize = 1_024;
/// Machines left alone that a plan names.
const LEFT_ALONE_MAX: usize = 256;

/// How full a node is, thousandths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fill {
    /// Memory spoken for.
    pub memory: u16,
    /// Processor load.
    pub cpu: u16,
}

impl Fill {
    /// The fuller of the two.
    pub fn worst(self) -> u16 {
        self.memory.max(self.cpu)
    }
}

/// A move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// Which machine.
    pub vm: VmId,
    /// From where.
    pub from: NodeId,
    /// To where.
    pub to: NodeId,
    /// By how much the fuller of the two nodes is lowered, thousandths.
    pub gain_permille: u16,
    /// What it costs: memory to copy, MiB.
    pub cost_mib: u64,
    /// Why.
    pub why: Why,
}

impl Move {
    /// The command that queues it.
    pub fn command(&self) -> Command {
        Command::QueueMigration {
            vm: self.vm,
            to: self.to,
            options: MigrationOptions::default(),
            cause: MigrationCause::Balance,
            why: self.why.clone(),
        }
    }
}

/// A machine on a node that is too full, and why it does not move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftAlone {
    /// Which.
    pub vm: VmId,
    /// Where it is.
    pub node: NodeId,
    /// Why.
    pub reason: String,
}

/// What the balancer would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalancePlan {
    /// Every node that takes machines, and how full it is now.
    pub nodes: BTreeMap<NodeId, Fill>,
    /// Over this a node is too full, thousandths.
    pub threshold_permille: u16,
    /// The moves, in the order in which they pay.
    pub moves: Vec<Move>,
    /// Machines of nodes that are too full and do not move.
    pub left_alone: Vec<LeftAlone>,
}

/// The plan at this moment; `now_ms` as `at_ms` in commands.
pub fn plan(state: &ClusterState, observed: &Observed, now_ms: u64) -> BalancePlan {
    let mut fleet = Fleet::new(state, observed, Count::Open);
    let mut fills: BTreeMap<NodeId, Fill> = state
        .nodes
        .values()
        .filter(|node| takes_machines(node).is_ok())
        .map(|node| (node.id, fill(&fleet, node)))
        .collect();
    let mean = |pick: fn(&Fill) -> u16| {
        let sum: u64 = fills.values().map(|fill| u64::from(pick(fill))).sum();
        u16::try_from(sum / (fills.len() as u64).max(1)).unwrap_or(u16::MAX)
    };
    let (mean_memory, mean_cpu) = (mean(|fill| fill.memory), mean(|fill| fill.cpu));
    let threshold = match state.settings.balance_level {
        BalanceLevel::Low => 800,
        BalanceLevel::Medium => 700,
        BalanceLevel::High => 600,
    };
    let too_full = |fill: &Fill| {
        fill.worst() > threshold
            || state.settings.balance_level == BalanceLevel::High
                && (fill.memory > mean_memory + OVER_MEAN_PERMILLE
                    || fill.cpu > mean_cpu.saturating_add(OVER_MEAN_PERMILLE))
    };
    let mut plan = BalancePlan {
        nodes: fills.clone(),
        threshold_permille: threshold,
        ..BalancePlan::default()
    };
    let mut hot: Vec<NodeId> = fills
        .iter()
        .filter(|(_, fill)| too_full(fill))
        .map(|(node, _)| *node)
        .collect();
    hot.sort_by_key(|node| (Reverse(fills[node].worst()), *node));
    let full_destinations: BTreeSet<NodeId> = hot.iter().copied().collect();
    let mut considered = 0;
    for from in hot {
        let mut of_node = 0;
        for vm in candidates(&fleet, from) {
            if plan.moves.len() >= MOVES_MAX
                || of_node >= MOVES_OF_NODE_MAX
                || considered >= CONSIDERED_MAX
            {
                break;
            }
            considered += 1;
            if !fills.get(&from).is_some_and(too_full) {
                break;
            }
            let offer = match resting(vm, &fleet, now_ms) {
                Some(reason) => Err(reason),
                None => consider(&fleet, &fills, &full_destinations, vm, from, threshold),
            };
            match offer {
                Ok((found, source, destination)) => {
                    fills.insert(from, source);
                    fills.insert(found.to, destination);
                    fleet.promise_move(vm, from, found.to);
                    plan.moves.push(found);
                    of_node += 1;
                }
                Err(reason) if plan.left_alone.len() < LEFT_ALONE_MAX => {
                    plan.left_alone.push(LeftAlone {
                        vm: vm.id,
                        node: from,
                        reason,
                    });
                }
                Err(_) => {}
            }
        }
    }
    plan
}

fn fill(fleet: &Fleet<'_>, node: &Node) -> Fill {
    // Room promised to machines that leave is free as soon as they are gone.
    let leaving: u64 = fleet
        .owned(node.id)
        .iter()
        .filter(|vm| fleet.is_moving(vm.id))
        .map(|vm| vm.spec.memory_mib)
        .sum();
    let memory_mib = fleet.used(node.id).memory_mib.saturating_sub(leaving);
    Fill {
        memory: permille(memory_mib, fleet.memory_offered_mib(node)),
        cpu: fleet.cpu_permille(node.id),
    }
}

/// The machines of a node that could move, those that bring most for their copying first.
fn candidates<'s>(fleet: &Fleet<'s>, node: NodeId) -> Vec<&'s Vm> {
    let cpu = |vm: &Vm| {
        fleet
            .observed
            .vm_cpu_milli
            .get(&vm.id)
            .copied()
            .unwrap_or(0)
    };
    let cpu_matters = fleet.cpu_permille(node)
        > fleet
            .state
            .nodes
            .get(&node)
            .map_or(0, |node| fill(fleet, node).memory);
    let mut machines: Vec<&Vm> = fleet
        .owned(node)
        .iter()
        .copied()
        .filter(|vm| !fleet.is_moving(vm.id))
        .collect();
    // Where memory is short every MiB that moves is a MiB gained: fewer moves are better, so larger
    // machines first. Where processors are short: most processor time for each MiB first.
    machines.sort_by_key(|vm| {
        let worth = if cpu_matters {
            u64::from(cpu(vm)) * 1_024 / vm.spec.memory_mib.max(1)
        } else {
            vm.spec.memory_mib
        };
        (vm.spec.priority, Reverse(worth), vm.id)
    });
    machines.truncate(CANDIDATES_MAX);
    machines
}

/// Why a machine is not to be moved now, whatever it would bring.
fn resting(vm: &Vm, fleet: &Fleet<'_>, now_ms: u64) -> Option<String> {
    let settings = &fleet.state.settings;
    let cooldown_ms = u64::from(settings.balance_cooldown_s) * 1_000;
    let rested_ms = now_ms.saturating_sub(vm.moved_at_ms);
    if vm.desired == Desired::Stopped {
        Some("it is stopping".into())
    } else if !vm.ownership.activated {
        Some("it is starting".into())
    } else if vm.moved_at_ms > 0 && rested_ms < cooldown_ms {
        Some(format!(
            "it moved {} s ago and rests for {} s",
            rested_ms / 1_000,
            settings.balance_cooldown_s
        ))
    } else {
        None
    }
}

/// The best move of `vm` off `from`, with both nodes' fills after it; or why there is none.
fn consider(
    fleet: &Fleet<'_>,
    fills: &BTreeMap<NodeId, Fill>,
    full: &BTreeSet<NodeId>,
    vm: &Vm,
    from: NodeId,
    threshold: u16,
) -> Result<(Move, Fill, Fill), String> {
    let choice =
        best_node_in(fleet, vm, full).map_err(|no_place| no_place.in_words(fleet.state))?;
    let to = choice.node;
    let nodes = &fleet.state.nodes;
    let (Some(source), Some(destination)) = (nodes.get(&from), nodes.get(&to)) else {
        return Err("a node left the cluster".into());
    };
    let before_from = fills.get(&from).copied().unwrap_or_default();
    let before_to = fills.get(&to).copied().unwrap_or_default();
    let share = |node: &Node| Fill {
        memory: permille(vm.spec.memory_mib, fleet.memory_offered_mib(node)),
        cpu: permille(
            u64::from(
                fleet
                    .observed
                    .vm_cpu_milli
                    .get(&vm.id)
                    .copied()
                    .unwrap_or(0),
            ),
            u64::from(node.facts.cpus) * 1_000,
        ),
    };
    let (here, there) = (share(source), share(destination));
    let after_from = Fill {
        memory: before_from.memory.saturating_sub(here.memory),
        cpu: before_from.cpu.saturating_sub(here.cpu),
    };
    let after_to = Fill {
        memory: before_to.memory.saturating_add(there.memory),
        cpu: before_to.cpu.saturating_add(there.cpu),
    };
    let label = fleet.state.node_label(to);
    if after_to.worst() > threshold {
        return Err(format!(
            "{label}, the best place, would be too full itself ({} %)",
            after_to.worst() / 10
        ));
    }
    let worst_before = before_from.worst().max(before_to.worst());
    let worst_after = after_from.worst().max(after_to.worst());
    let gain_permille = worst_before.saturating_sub(worst_after);
    let points = |permille: u16| format!("{}.{}", permille / 10, permille % 10);
    let gain_min = (here.memory / COST_PER_GAIN_MAX).max(1);
    if gain_permille < gain_min {
        return Err(format!(
            "moving it to {label}, the best place, would gain {} points for copying {} % of its node's memory",
            points(gain_permille),
            points(here.memory)
        ));
    }
    if after_to.worst() + HYSTERESIS_PERMILLE > before_from.worst() {
        return Err(format!(
            "{label}, the best place, would be as full ({} %) as its node is now",
            points(after_to.worst())
        ));
    }
    let why = choice
        .why("balance: its node is too full and the move pays", fleet)
        .with("threshold, %", threshold / 10)
        .with("source before, %", before_from.worst() / 10)
        .with("source after, %", after_from.worst() / 10)
        .with("destination after, %", after_to.worst() / 10)
        .with("memory to copy, MiB", vm.spec.memory_mib);
    let found = Move {
        vm: vm.id,
        from,
        to,
        gain_permille,
        cost_mib: vm.spec.memory_mib,
        why,
    };
    Ok((found, after_from, after_to))
}
