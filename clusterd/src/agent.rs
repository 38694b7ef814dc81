//! The node agent: makes this host agree with the log, again and again.
//!
//! ```text
//!  applied state ─┐                      ┌─► flow of vm-1 (start, thaw, claim, permit, …)
//!  monitors      ─┼─► decide ─► acts ────┼─► flow of vm-2
//!  lease, tick   ─┘   (pure)             └─► …
//!        ▲                                     │ ends: what it did is in state and monitors by then
//!        └─────────────────────────────────────┘
//! ```
//! One task owns the [`Memory`] and starts flows; a flow is bounded, works on one machine and ends in an [`Ended`].
//! Which steps it takes is decided in `cluster_model::flow`, for this agent and for the simulation; `executor.rs` carries
//! them out. A flow that failed is logged and, after a pause, decided anew. Nothing here matters for safety: after a
//! restart the memory is empty, and `decide` is written for that.

mod executor;
mod handover;
pub mod summary;
mod view;

pub use summary::{MigrationSummary, Part, Round};

use std::sync::Arc;
use std::time::Duration;

use cluster_model::ClusterState;
use cluster_model::agent::{Ended, Memory, Work};
use cluster_model::flow::Flow;
use cluster_model::safeguards::Safeguards;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::member::Member;
use crate::monitors::Table;

/// The agent looks at everything at least this often.
const TICK: Duration = Duration::from_millis(500);
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
        let flow = Flow::new(self.member.node, work, state.clone(), Safeguards::ALL);
        let (member, ended) = (self.member.clone(), self.ended.clone());
        self.tasks.spawn(async move {
            // The agent is gone only when the daemon stops.
            let _ = ended.send(executor::run(member, flow).await).await;
        });
    }
}
