//! What only the leader does: the lease table, losses, plans, supervision.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cluster_model::fleet::Reported;
use cluster_model::queue::Next;
use cluster_model::{
    ClusterState, Command, Envelope, LeaseTable, Liveness, LogIndex, Observed, Reply, RequestId,
    Why, decision, drain, failback, failover, queue,
};

use crate::mutants::Mutant;
use crate::world::{MS, Message, Place, S, World, name, node_id};

/// The leader's table is made anew after it stood still for this long.
const STOOD_STILL: u64 = 1_500 * MS;

impl World {
    /// The leader's table and plans.
    pub fn lead(&mut self, node: usize) {
        let clock = self.clock(node);
        let raft = &self.hosts[node].raft;
        let term = raft.vote.term;
        // A leader that has not committed in its term does not know what its predecessors did.
        let knows = raft.knows();
        let early = self.mutant == Some(Mutant::LostTooEarly);
        let now = self.now;
        let wall_ms = self.wall_ms(node);
        let Some(daemon) = self.hosts[node].daemon.as_mut() else {
            return;
        };
        let stood_still = clock.saturating_sub(daemon.looked_at) > STOOD_STILL;
        daemon.looked_at = clock;
        if !knows {
            return;
        }
        let state = daemon.state.clone();
        let table = table_of(&mut daemon.table, term, clock * 1_000);
        if stood_still {
            table.1 = LeaseTable::new(clock * 1_000);
        }
        let mut lost = table.1.lost(&state, clock * 1_000);
        if early {
            let looks_ns = clock * 1_000 + 4 * S * 1_000;
            lost.extend(lost_early(&state, &table.1, node_id(node), looks_ns));
        }
        let mut due: Vec<(RequestId, Command)> = Vec::new();
        for command in lost {
            if let Command::NodeLost {
                node, incarnation, ..
            } = &command
            {
                let up_since = state
                    .nodes
                    .get(node)
                    .map_or(LogIndex(0), |known| known.up_since);
                // One loss is proposed once: it stays in this leader's log for as long as it leads.
                if table.2.insert((*node, up_since)) {
                    let id = format!("lost/{node}/{incarnation}/term-{term}/{}", state.applied.0);
                    due.push((RequestId(id), command));
                }
            }
        }
        // Of a node that was lost and came up again nothing is proposed.
        table.2.retain(|(node, up_since)| {
            let known = state.nodes.get(node);
            known.is_some_and(|known| known.up_since == *up_since && known.liveness == Liveness::Up)
        });
        if now >= daemon.planned_at {
            daemon.planned_at = now + 400 * MS;
            let observed = observed(&state, &daemon.volumes_down);
            let mut planned = plans(&state, &observed);
            let aborts = daemon.supervisor.aborts(&state, wall_ms, clock / MS);
            planned.extend(aborts.into_iter().map(|command| ("supervision", command)));
            due.extend(planned.into_iter().map(|(controller, command)| {
                let id = decision::request_id(controller, &command, &state);
                (id, command)
            }));
        }
        for (request, command) in due {
            let number = self.number();
            let envelope = Arc::new(Envelope {
                request,
                actor: "controller/sim".into(),
                at_ms: wall_ms,
                asked: None,
                command,
            });
            if self.mutant == Some(Mutant::LossHandedOn)
                && let Command::NodeLost { .. } = &envelope.command
                && let Some(daemon) = self.daemon(node)
            {
                daemon.handed_on.insert(number, envelope.clone());
            }
            self.leader_propose(node, Place::Daemon(node), number, envelope);
        }
    }

    /// The mutant's: a loss that was not written here is asked for where the leader is now.
    pub fn hand_on(&mut self, node: usize, rpc: u64, answer: Option<(usize, Reply)>) {
        let leader = self.hosts[node].raft.leader;
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        let Some(envelope) = daemon.handed_on.remove(&rpc) else {
            return;
        };
        match leader {
            _ if answer.is_some() => {}
            Some(leader) if leader != node => {
                let (from, to) = (Place::Daemon(node), Place::Daemon(leader));
                self.send(from, to, Message::Propose { rpc, envelope });
            }
            _ => {
                daemon.handed_on.insert(rpc, envelope);
                self.later(node, Message::Proposed { rpc, answer });
            }
        }
    }
}

/// The term, its table, and the nodes whose loss is proposed, by the entry they came up by.
pub type Table = Option<(u64, LeaseTable, BTreeSet<(cluster_model::NodeId, LogIndex)>)>;

/// The table of that term, made anew when the term is.
pub fn table_of(
    table: &mut Table,
    term: u64,
    now_ns: u64,
) -> &mut (u64, LeaseTable, BTreeSet<(cluster_model::NodeId, LogIndex)>) {
    if table.as_ref().is_none_or(|(known, ..)| *known != term) {
        *table = None;
    }
    table.get_or_insert_with(|| (term, LeaseTable::new(now_ns), BTreeSet::new()))
}

/// The mutant's: what the table would say later, though the answers of meanwhile are still to come.
fn lost_early(
    state: &ClusterState,
    table: &LeaseTable,
    leader: cluster_model::NodeId,
    looks_ns: u64,
) -> Vec<Command> {
    let silent = state.nodes.values().filter(|known| {
        known.id != leader
            && known.liveness == Liveness::Up
            && looks_ns >= table.lost_at_ns(state, known)
    });
    silent
        .map(|known| Command::NodeLost {
            node: known.id,
            incarnation: known.incarnation,
            why: Why::rule("too early, on purpose"),
        })
        .collect()
}

fn observed(state: &ClusterState, volumes_down: &BTreeSet<cluster_model::NodeId>) -> Observed {
    let (shared, no_loads) = (BTreeSet::from([name("shared")]), BTreeMap::new());
    let report = Reported {
        cpu_permille: 0,
        volumes_down: &shared,
        vm_cpu_milli: &no_loads,
    };
    Observed::of(state, volumes_down.iter().map(|node| (*node, report)))
}

fn plans(state: &ClusterState, observed: &Observed) -> Vec<(&'static str, Command)> {
    let starts = failover::plan(state, observed)
        .into_iter()
        .map(|command| ("failover", command));
    let moves = queue::next(state, observed).into_iter().map(|next| {
        let command = match next {
            Next::Start { migration, expects } => Command::StartMigration {
                migration,
                expects,
                ticket: "0".repeat(64),
            },
            Next::Abort { migration, reason } => Command::AbortMigration { migration, reason },
        };
        ("migrations", command)
    });
    let drains = drain::next(state, observed)
        .into_iter()
        .map(|command| ("drain", command));
    let returns = failback::next(state, observed)
        .into_iter()
        .map(|command| ("failback", command));
    starts.chain(moves).chain(drains).chain(returns).collect()
}
