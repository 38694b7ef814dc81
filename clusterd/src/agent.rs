//! The node agent: makes this host agree with the log, again and again.
//!
//! ```text
//!  applied state ─┐                      ┌─► flow of vm-1 (start, thaw, claim, permit, …)
//!  monitors      ─┼─► decide ─► acts ────┼─► flow of vm-2
//!  lease, tick   ─┘   (pure)             └─► …
//!        ▲                                     │ ends: what it did is in state and monitors by then
//!        └─────────────────────────────────────┘
//! ```
//! One task owns the memory below and starts flows; a flow is bounded, works on one machine and ends in
//! an [`Ended`]. A flow that failed is logged and, after a pause, decided anew. Nothing here matters for
//! safety: after a restart the memory is empty, and `decide` is written for that.

mod flows;
mod handover;
mod summary;
mod view;

pub use summary::{MigrationSummary, Part, Round};

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use cluster_model::agent::{Act, FlowKind, decide};
use cluster_model::{ClusterState, MigrationId, Token, VmId};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::member::Member;
use crate::monitors::Table;

/// The agent looks at everything at least this often.
const TICK: Duration = Duration::from_millis(500);
/// A failed flow pauses this long before its machine is decided anew, doubling...
const PAUSE_FIRST: Duration = Duration::from_millis(50);
/// ...up to this.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Flows that may end at once without waiting for the agent.
const ENDED_MAX: usize = 1_024;

/// What this life of the agent remembers; see [`cluster_model::agent::NodeView`].
#[derive(Debug, Default)]
struct Memory {
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

/// What a flow leaves behind.
#[derive(Debug)]
struct Ended {
    vm: VmId,
    /// The monitors that it ended.
    nonces: Vec<u64>,
    /// Whether it was its machine's one flow.
    is_flow: bool,
    failed: bool,
    learnt: Vec<Learnt>,
}

/// What the memory takes in from a flow.
#[derive(Debug)]
enum Learnt {
    Claimed(VmId, Token),
    StartFailed(VmId, Token, String),
}

/// Runs the agent until its task is dropped.
pub async fn run(member: Arc<Member>) {
    let (ended_tx, mut ended) = mpsc::channel(ENDED_MAX);
    let mut agent = Agent {
        member: member.clone(),
        memory: Memory::default(),
        tasks: JoinSet::new(),
        ended: ended_tx,
    };
    let mut state = member.raft.state();
    let mut table = member.monitors.table();
    let mut lease = member.lease.subscribe();
    let mut session = member.session_since.subscribe();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        // The table before the state: a monitor that is here knows no more than the log had then.
        let monitors = table.borrow_and_update().clone();
        let now = state.borrow_and_update().clone();
        session.mark_unchanged();
        lease.mark_unchanged();
        agent.look(&now, &monitors);
        tokio::select! {
            changed = state.changed() => if changed.is_err() {
                // The log has stopped: nothing may be decided any more.
                tracing::error!("the replicated log has stopped; this node's agent stops too");
                return std::future::pending().await;
            },
            _ = table.changed() => {}
            _ = lease.changed() => {}
            _ = session.changed() => {}
            Some(flow) = ended.recv() => agent.take_in(flow),
            Some(_) = agent.tasks.join_next() => {}
            _ = tick.tick() => {}
        }
        // Everything that is there already, before the next look.
        while let Ok(flow) = ended.try_recv() {
            agent.take_in(flow);
        }
    }
}

struct Agent {
    member: Arc<Member>,
    memory: Memory,
    tasks: JoinSet<()>,
    ended: mpsc::Sender<Ended>,
}

impl Agent {
    fn look(&mut self, state: &Arc<ClusterState>, monitors: &Table) {
        self.memory.notice(self.member.node, state, monitors);
        let view = view::build(&self.member, &self.memory, state, monitors);
        let mut machines: BTreeMap<VmId, Vec<Act>> = BTreeMap::new();
        for act in decide(state, &view) {
            machines.entry(act.vm()).or_default().push(act);
        }
        for (vm, acts) in machines {
            self.begin(vm, acts, state);
        }
    }

    fn begin(&mut self, vm: VmId, acts: Vec<Act>, state: &Arc<ClusterState>) {
        let nonces: Vec<u64> = acts.iter().filter_map(ends).collect();
        if nonces
            .iter()
            .any(|nonce| self.memory.ending.contains(nonce))
        {
            return;
        }
        // Ends alone go beside a flow; anything else is the machine's one flow.
        let kind = acts.iter().find_map(flow_kind);
        if kind.is_some() && self.memory.flows.contains_key(&vm) {
            return;
        }
        self.memory.ending.extend(&nonces);
        if let Some(kind) = kind {
            self.memory.flows.insert(vm, kind);
        }
        for act in &acts {
            self.memory.begin(act);
        }
        let failures = self.memory.failures.get(&vm).copied().unwrap_or(0);
        let flow = flows::Flow::new(self.member.clone(), state.clone());
        let ended = self.ended.clone();
        self.tasks.spawn(async move {
            let (failed, learnt) = carry_out(flow, acts).await;
            if failed {
                let pause = PAUSE_FIRST * 2u32.saturating_pow(failures.min(10));
                tokio::time::sleep(pause.min(PAUSE_MAX)).await;
            }
            let ended_now = Ended {
                vm,
                nonces,
                is_flow: kind.is_some(),
                failed,
                learnt,
            };
            // The agent is gone only when the daemon stops.
            let _ = ended.send(ended_now).await;
        });
    }

    fn take_in(&mut self, flow: Ended) {
        let memory = &mut self.memory;
        for nonce in &flow.nonces {
            memory.ending.remove(nonce);
        }
        if flow.is_flow {
            memory.flows.remove(&flow.vm);
        }
        if flow.failed {
            let failures = memory.failures.entry(flow.vm).or_default();
            *failures = failures.saturating_add(1);
        } else {
            memory.failures.remove(&flow.vm);
        }
        for learnt in flow.learnt {
            match learnt {
                Learnt::Claimed(vm, token) => {
                    memory.claimed.insert((vm, token));
                }
                Learnt::StartFailed(vm, token, why) => {
                    memory.start_failures.insert((vm, token), why);
                }
            }
        }
    }
}

/// Carries out the acts of one machine in their order; says whether one failed, and what was learnt.
async fn carry_out(mut flow: flows::Flow, acts: Vec<Act>) -> (bool, Vec<Learnt>) {
    let mut failed = false;
    for act in acts {
        let ends_a_monitor = ends(&act).is_some();
        tracing::debug!(?act, "begin");
        if let Err(error) = flow.act(&act).await {
            failed = true;
            tracing::warn!(vm = %act.vm(), act = name(&act), error = %chain(&error), "an act of the agent failed");
            // What follows an end takes the monitor for gone.
            if ends_a_monitor {
                break;
            }
        }
    }
    (failed, flow.into_learnt())
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// The monitor that an act ends.
fn ends(act: &Act) -> Option<u64> {
    match act {
        Act::Kill { nonce, .. } | Act::DiscardIncoming { nonce, .. } => Some(*nonce),
        _ => None,
    }
}

/// What kind of flow an act makes; `None` for ends, which go beside one.
fn flow_kind(act: &Act) -> Option<FlowKind> {
    match act {
        Act::Kill { .. } | Act::DiscardIncoming { .. } => None,
        Act::Start { .. } => Some(FlowKind::Start),
        Act::TakeUpToken { .. } => Some(FlowKind::TakeUpToken),
        Act::Thaw { .. } => Some(FlowKind::Thaw),
        Act::StopGuest { .. } => Some(FlowKind::StopGuest),
        Act::PrepareIncoming { .. } => Some(FlowKind::PrepareIncoming),
        Act::Send { .. } | Act::CancelSend { .. } => Some(FlowKind::Send),
        Act::ClaimForCutover { .. } => Some(FlowKind::ClaimForCutover),
        Act::RunAfterCutover { .. } => Some(FlowKind::RunAfterCutover),
        Act::Rekey { .. }
        | Act::Release { .. }
        | Act::Activated { .. }
        | Act::RenewToken { .. }
        | Act::ProposeCutover { .. }
        | Act::ProposeAbort { .. }
        | Act::ReportMigration { .. } => Some(FlowKind::Propose),
    }
}

fn name(act: &Act) -> &'static str {
    match act {
        Act::Start { .. } => "start",
        Act::Rekey { .. } => "rekey",
        Act::TakeUpToken { .. } => "take up token",
        Act::Thaw { .. } => "thaw",
        Act::Kill { .. } => "kill",
        Act::StopGuest { .. } => "stop guest",
        Act::Release { .. } => "release",
        Act::Activated { .. } => "activated",
        Act::PrepareIncoming { .. } => "prepare incoming",
        Act::Send { .. } => "send",
        Act::CancelSend { .. } => "cancel send",
        Act::ClaimForCutover { .. } => "claim for cutover",
        Act::RenewToken { .. } => "renew token",
        Act::ProposeCutover { .. } => "cutover",
        Act::ProposeAbort { .. } => "abort",
        Act::RunAfterCutover { .. } => "run after cutover",
        Act::DiscardIncoming { .. } => "discard incoming",
        Act::ReportMigration { .. } => "report migration",
    }
}
