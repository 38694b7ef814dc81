//! What one life of a node's agent remembers between two looks, and which work follows from a look.
//!
//! Nothing here matters for safety: after a restart the memory is empty, and `decide` is written for that.

use std::collections::{BTreeMap, BTreeSet};

use super::{Act, FlowKind, MonitorView, NodeView, Side, decide_under};
use crate::ids::{Incarnation, LogIndex, MigrationId, NodeId, Token, VmId};
use crate::safeguards::Safeguards;
use crate::state::{ClusterState, Migration};

/// What the node sees at one look, beside the log and its own memory; see [`NodeView`] for the fields.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sight {
    /// Which node.
    pub me: NodeId,
    /// The life of its host.
    pub incarnation: Incarnation,
    /// The entry by which this life of `clusterd` registered.
    pub session_since: Option<LogIndex>,
    /// Whether the node holds its lease now.
    pub lease_valid: bool,
    /// Every monitor process on the node.
    pub monitors: Vec<MonitorView>,
}

/// Acts of one machine, to be carried out in their order.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    /// Whose.
    pub vm: VmId,
    /// What to do.
    pub acts: Vec<Act>,
    /// The flow it makes; `None` for ends of monitors, which go beside one.
    pub kind: Option<FlowKind>,
    /// Failures in a row of this machine's flows: the pause after another grows with them.
    pub failures: u32,
}

/// What came of some [`Work`].
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// Whose it was.
    pub vm: VmId,
    /// The monitors that it ended.
    pub nonces: Vec<u64>,
    /// Whether it was its machine's one flow.
    pub is_flow: bool,
    /// Whether an act of it failed.
    pub failed: bool,
    /// What else it found out.
    pub learnt: Vec<Learnt>,
}

/// What a flow finds out that the log and the monitors do not show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Learnt {
    /// Every file of the machine acknowledged that token.
    Claimed(VmId, Token),
    /// The start under that token failed for another reason than its claim.
    StartFailed(VmId, Token, String),
}

/// One life's memory.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    safeguards: Safeguards,
    flows: BTreeMap<VmId, FlowKind>,
    /// Monitors that are being ended.
    ending: BTreeSet<u64>,
    begun: BTreeSet<(VmId, Token)>,
    claimed: BTreeSet<(VmId, Token)>,
    start_failures: BTreeMap<(VmId, Token), String>,
    prepared: BTreeSet<MigrationId>,
    /// Source monitors seen sending, and for which migration.
    sending_seen: BTreeMap<u64, MigrationId>,
    /// Migrations of those that are gone. A dead monitor may have sent everything before anybody heard
    /// that it was quiet, so the machine is given up only when the log has ended the migration: the
    /// destination cuts over if it is complete and aborts if it is not.
    quiet_lost: BTreeSet<MigrationId>,
    /// Failures in a row of a machine's flows.
    failures: BTreeMap<VmId, u32>,
}

impl Memory {
    /// An empty one of a life that has these safeguards; a daemon's has all of them, as [`Memory::default`] does.
    pub fn with(safeguards: Safeguards) -> Memory {
        Memory {
            safeguards,
            ..Memory::default()
        }
    }

    /// Looks at the node and says what is to be begun now; remembers that it is under way.
    pub fn look(&mut self, state: &ClusterState, sight: Sight) -> Vec<Work> {
        self.notice(state, &sight.monitors);
        let view = NodeView {
            me: sight.me,
            incarnation: sight.incarnation,
            session_since: sight.session_since,
            lease_valid: sight.lease_valid,
            monitors: sight.monitors,
            flows: self.flows.clone(),
            begun: self.begun.clone(),
            claimed: self.claimed.clone(),
            start_failures: self.start_failures.clone(),
            prepared: self.prepared.clone(),
            quiet_lost: self.quiet_lost.clone(),
        };
        let mut machines: BTreeMap<VmId, Vec<Act>> = BTreeMap::new();
        for act in decide_under(state, &view, self.safeguards) {
            machines.entry(act.vm()).or_default().push(act);
        }
        machines
            .into_iter()
            .filter_map(|(vm, acts)| self.begin(vm, acts))
            .collect()
    }

    fn begin(&mut self, vm: VmId, acts: Vec<Act>) -> Option<Work> {
        let ends: Vec<u64> = acts.iter().filter_map(Act::ends).collect();
        if ends.iter().any(|nonce| self.ending.contains(nonce)) {
            return None;
        }
        // Ends alone go beside a flow; anything else is the machine's one flow.
        let kind = acts.iter().find_map(Act::flow_kind);
        if kind.is_some() && self.flows.contains_key(&vm) {
            return None;
        }
        self.ending.extend(&ends);
        if let Some(kind) = kind {
            self.flows.insert(vm, kind);
        }
        for act in &acts {
            self.note_begun(act);
        }
        Some(Work {
            vm,
            acts,
            kind,
            failures: self.failures.get(&vm).copied().unwrap_or(0),
        })
    }

    /// Notes what an act is about to begin, before it begins.
    fn note_begun(&mut self, act: &Act) {
        match act {
            Act::Start { vm, token, .. } | Act::TakeUpToken { vm, token, .. } => {
                self.begun.insert((*vm, *token));
            }
            Act::ClaimForCutover { vm, reserved, .. } => {
                self.begun.insert((*vm, *reserved));
            }
            Act::PrepareIncoming { migration, .. } => {
                self.prepared.insert(*migration);
            }
            Act::Rekey { .. }
            | Act::Thaw { .. }
            | Act::Kill { .. }
            | Act::StopGuest { .. }
            | Act::Release { .. }
            | Act::Activated { .. }
            | Act::Send { .. }
            | Act::CancelSend { .. }
            | Act::RenewToken { .. }
            | Act::ProposeCutover { .. }
            | Act::ProposeAbort { .. }
            | Act::RunAfterCutover { .. }
            | Act::DiscardIncoming { .. }
            | Act::ReportMigration { .. } => {}
        }
    }

    /// Takes in what came of some work.
    pub fn take_in(&mut self, ended: Ended) {
        for nonce in &ended.nonces {
            self.ending.remove(nonce);
        }
        let kind = ended
            .is_flow
            .then(|| self.flows.remove(&ended.vm))
            .flatten();
        if ended.failed {
            let failures = self.failures.entry(ended.vm).or_default();
            *failures = failures.saturating_add(1);
        } else if kind != Some(FlowKind::Propose) {
            // A re-key between two claims that fail is no success: while a storage server is away, tokens are burnt
            // ever more slowly.
            self.failures.remove(&ended.vm);
        }
        for learnt in ended.learnt {
            match learnt {
                Learnt::Claimed(vm, token) => {
                    self.claimed.insert((vm, token));
                }
                Learnt::StartFailed(vm, token, why) => {
                    self.start_failures.insert((vm, token), why);
                }
            }
        }
    }

    /// Takes in which monitors send and which of those are gone, and forgets what the log has passed.
    fn notice(&mut self, state: &ClusterState, monitors: &[MonitorView]) {
        for monitor in monitors {
            // One that sends may have said quiet, and everything, since it was last heard.
            if let Some(part) = &monitor.migration
                && part.side == Side::Source
            {
                self.sending_seen.insert(monitor.nonce, part.id);
            }
        }
        let here: BTreeSet<u64> = monitors.iter().map(|monitor| monitor.nonce).collect();
        let gone: Vec<u64> = self
            .sending_seen
            .keys()
            .copied()
            .filter(|nonce| !here.contains(nonce))
            .collect();
        for nonce in gone {
            self.quiet_lost.extend(self.sending_seen.remove(&nonce));
        }
        let open = |id: &MigrationId| {
            id.0 > state.applied.0 || state.migrations.get(id).is_some_and(Migration::is_open)
        };
        self.quiet_lost.retain(open);
        self.prepared.retain(open);
        // A token below the record's is past; one above it is a migration's, or news to come.
        let counts = |&(vm, token): &(VmId, Token)| {
            state
                .vms
                .get(&vm)
                .map_or(vm.0 > state.applied.0, |vm| token >= vm.ownership.token)
        };
        self.begun.retain(counts);
        self.claimed.retain(counts);
        self.start_failures.retain(|key, _| counts(key));
        self.failures.retain(|vm, _| state.vms.contains_key(vm));
    }
}
