//! What only the leader does: losses, plans, supervision. Whom it takes for lost is `cluster_model::Term`'s to say.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cluster_model::fleet::Reported;
use cluster_model::queue::Next;
use cluster_model::{
    ClusterState, Command, Envelope, Liveness, Loss, LossOutcome, NodeId, Observed, Reply,
    RequestId, Term, Why, decision, drain, failback, failover, queue,
};
use rand::Rng;

use crate::invariants;
use crate::leases::term_of;
use crate::mutants::Mutant;
use crate::raft::Role;
use crate::world::{MS, Message, Own, Place, S, World, name, node_id};

/// How long a leader waits for what came of a proposal.
const PATIENCE: u64 = 3 * S;

impl World {
    /// The leader looks for lost nodes, and plans.
    pub fn lead(&mut self, node: usize) {
        let clock = self.clock(node);
        let raft = &self.hosts[node].raft;
        let (leads, knows, number) = (raft.role == Role::Leader, raft.knows(), raft.vote.term);
        let early = self.mutant == Some(Mutant::LostTooEarly);
        let now = self.now;
        let wall_ms = self.wall_ms(node);
        let Some(daemon) = self.daemon(node).filter(|daemon| daemon.leaving.is_none()) else {
            return;
        };
        if !leads {
            return;
        }
        let state = daemon.state.clone();
        let now_ns = clock * 1_000;
        let term = term_of(&mut daemon.term, number, now_ns);
        let mut losses = term.look(&state, now_ns).losses;
        if early {
            losses.extend(lost_early(
                &state,
                term,
                node_id(node),
                now_ns + 4 * S * 1_000,
            ));
        }
        for loss in losses {
            self.propose_loss(node, number, loss);
        }
        self.give_up_losses(node);
        invariants::looked(self, node);
        // A leader that has not committed in its term does not know what its predecessors did.
        let Some(daemon) = self.daemon(node).filter(|_| knows) else {
            return;
        };
        let mut due: Vec<(RequestId, Command)> = Vec::new();
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
            self.leader_propose(node, Place::Daemon(node), number, envelope);
        }
    }

    fn propose_loss(&mut self, node: usize, term: u64, loss: Loss) {
        let rpc = self.number();
        let envelope = Arc::new(Envelope {
            request: loss.request.clone(),
            actor: "controller/leases".into(),
            at_ms: self.wall_ms(node),
            asked: None,
            command: loss.command.clone(),
        });
        let hands_on = self.mutant == Some(Mutant::LossHandedOn);
        let until = self.now + PATIENCE;
        if let Some(daemon) = self.daemon(node) {
            if hands_on {
                daemon.handed_on.insert(rpc, envelope.clone());
            }
            let loss = Box::new(loss);
            daemon.own.insert(rpc, Own::Loss { loss, term, until });
        }
        self.leader_propose(node, Place::Daemon(node), rpc, envelope);
    }

    /// A proposal that has no answer for this long is given up: what comes later is not heard.
    fn give_up_losses(&mut self, node: usize) {
        let now = self.now;
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        let late = daemon.own.iter().filter_map(|(rpc, own)| match own {
            Own::Loss { until, .. } if *until < now => Some(*rpc),
            _ => None,
        });
        for rpc in late.collect::<Vec<u64>>() {
            self.own_answered(node, rpc, &None);
        }
    }

    /// A loss was answered, or not: seldom the answer is lost on its way back.
    pub fn loss_answered(
        &mut self,
        node: usize,
        rpc: u64,
        loss: &Loss,
        term: u64,
        answer: &Option<(usize, Reply)>,
    ) {
        let is_lost = self.rng.random_ratio(1, 8);
        let outcome = match answer {
            _ if is_lost => LossOutcome::Unknown,
            Some((_, Reply::Done { .. })) => LossOutcome::Recorded,
            Some((_, Reply::Rejected(_))) => LossOutcome::Refused,
            None => LossOutcome::Unknown,
        };
        let now_ns = self.clock(node) * 1_000;
        if let Some(daemon) = self.daemon(node)
            && let Some(known) = daemon.term.as_mut().filter(|known| known.number() == term)
        {
            known.loss_answered(loss, outcome, now_ns);
        }
        self.hand_on(node, rpc, answer.clone());
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

/// The mutant's: what the term would say later, though the answers of meanwhile are still to come.
fn lost_early(state: &ClusterState, term: &Term, leader: NodeId, looks_ns: u64) -> Vec<Loss> {
    let silent = state.nodes.values().filter(|known| {
        known.id != leader
            && known.liveness == Liveness::Up
            && term
                .lost_at_ns(state, known.id)
                .is_some_and(|lost_at| looks_ns >= lost_at)
    });
    silent
        .map(|known| Loss {
            node: known.id,
            up_since: known.up_since,
            request: RequestId(format!("early/{}/{}", known.id, known.up_since)),
            command: Command::NodeLost {
                node: known.id,
                incarnation: known.incarnation,
                why: Why::rule("too early, on purpose"),
            },
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
