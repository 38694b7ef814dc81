//! The node agent: makes this host agree with the log, again and again.
//!
//! ```text
//!  applied state ─┐                      ┌─► flow of vm-1 (start, thaw, claim, permit, …)
//!  monitors      ─┼─► decide ─► acts ────┼─► flow of vm-2
//!  lease, tick   ─┘   (pure)             └─► …
//!        ▲                                     │ ends: what it did is in state and monitors by then
//!        └─────────────────────────────────────┘
//! ```
//! One task owns the [`Memory`] and starts flows; a flow is bounded, works on one machine and ends in
//! an [`Ended`]. A flow that failed is logged and, after a pause, decided anew. Nothing here matters for
//! safety: after a restart the memory is empty, and `decide` is written for that.

mod flows;
mod handover;
pub mod summary;
mod view;

pub use summary::{MigrationSummary, Part, Round};

use std::sync::Arc;
use std::time::Duration;

use cluster_model::ClusterState;
use cluster_model::agent::{Act, Ended, Learnt, Memory, Work};
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
            Some(flow) = ended.recv() => agent.memory.take_in(flow),
            Some(_) = agent.tasks.join_next() => {}
            _ = tick.tick() => {}
        }
        // Everything that is there already, before the next look.
        while let Ok(flow) = ended.try_recv() {
            agent.memory.take_in(flow);
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
        let sight = view::sight(&self.member, state, monitors);
        for work in self.memory.look(state, sight) {
            self.begin(work, state);
        }
    }

    fn begin(&mut self, work: Work, state: &Arc<ClusterState>) {
        let flow = flows::Flow::new(self.member.clone(), state.clone());
        let ended = self.ended.clone();
        self.tasks.spawn(async move {
            let nonces = work.acts.iter().filter_map(Act::ends).collect();
            let (failed, learnt) = carry_out(flow, work.acts).await;
            if failed {
                let pause = PAUSE_FIRST * 2u32.saturating_pow(work.failures.min(10));
                tokio::time::sleep(pause.min(PAUSE_MAX)).await;
            }
            let ended_now = Ended {
                vm: work.vm,
                nonces,
                is_flow: work.kind.is_some(),
                failed,
                learnt,
            };
            // The agent is gone only when the daemon stops.
            let _ = ended.send(ended_now).await;
        });
    }
}

/// Carries out the acts of one machine in their order; says whether one failed, and what was learnt.
async fn carry_out(mut flow: flows::Flow, acts: Vec<Act>) -> (bool, Vec<Learnt>) {
    let mut failed = false;
    for act in acts {
        let ends_a_monitor = act.ends().is_some();
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
