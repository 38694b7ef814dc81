//! The lease of a node, from its heartbeat to its monitors' deadlines, and the way into and out of a planned
//! absence. What is granted, what a deadline is and when an absence is over are `cluster_model::lease`'s to say.

use std::sync::Arc;

use cluster_model::{
    Command, Envelope, Grant, Heartbeat, Incarnation, Liveness, LogIndex, Reply, RequestId, Term,
};
use rand::Rng;

use crate::invariants;
use crate::mutants::Mutant;
use crate::setup;
use crate::world::{ConfirmFor, Event, MS, Message, Own, Place, S, World, node_id};

/// A registration that got no answer is sent again.
const REGISTER_PAUSE: u64 = 700 * MS;
/// How long a granted node waits for its replica to catch up with the grant.
const CATCH_UP: u64 = 2 * S;
/// The end of an absence that is not in the log is asked for again.
const RETURN_PAUSE: u64 = 2 * S;
/// How long a planned stop may take.
const STOP_PATIENCE: u64 = 8 * S;
/// A node looks this often whether it reaches the volume...
const VOLUME_LOOK: u64 = 5 * S;
/// ...and believes that it does not after so many failures.
const VOLUME_FAILURES: u32 = 2;
/// How long an absence is announced for, ms.
const ABSENCE_MS: u32 = 60_000;

impl World {
    /// A quorum has confirmed the leader since a heartbeat came.
    pub fn answer_heartbeat(&mut self, node: usize, asked: ConfirmFor, index: usize) {
        let ConfirmFor::Lease {
            node: peer,
            sequence,
            incarnation,
            applied,
            received,
        } = asked
        else {
            return;
        };
        let now_ns = self.clock(node) * 1_000;
        let number = self.hosts[node].raft.vote.term;
        let believes = self.mutant == Some(Mutant::BehindIsGranted);
        let applied = if believes { index } else { applied };
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        if daemon.applied < index {
            return;
        }
        let state = daemon.state.clone();
        let heartbeat = Heartbeat {
            node: node_id(peer),
            incarnation: Incarnation(incarnation),
            applied: LogIndex(applied as u64),
            received_ns: received * 1_000,
            // Asked in the same moment.
            confirmed_ns: received * 1_000,
            needs: LogIndex(index as u64),
        };
        let term = term_of(&mut daemon.term, number, now_ns);
        if let Ok(grant) = term.grant(&state, &heartbeat, now_ns) {
            invariants::answers(self, node, received);
            invariants::grants(self, node);
            let message = Message::Granted {
                sequence,
                grant,
                index,
                until: self.now + CATCH_UP,
            };
            self.send(Place::Daemon(node), Place::Daemon(peer), message);
        }
    }

    /// A node's heartbeat to whoever leads, as far as it knows.
    pub fn heartbeat(&mut self, node: usize) {
        let sent_ns = self.clock(node) * 1_000;
        let reaches = self.reaches(Place::Daemon(node), Place::Server) && self.server.up;
        let now = self.now;
        let (leader, incarnation) = (self.hosts[node].raft.leader, self.hosts[node].incarnation);
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        if daemon.leaving.is_some() {
            return;
        }
        let watch = &mut daemon.volume_watch;
        if now >= watch.next {
            watch.next = now + VOLUME_LOOK;
            watch.failures = if reaches { 0 } else { watch.failures + 1 };
        }
        let volume_down = watch.failures >= VOLUME_FAILURES;
        let life = daemon.life;
        let sequence = daemon.lease.sending(sent_ns);
        daemon.sent.insert(sequence, sent_ns / 1_000);
        let applied = daemon.applied;
        let interval = u64::from(daemon.state.settings.heartbeat_ms.max(300)) * MS;
        if let Some(leader) = leader {
            let message = Message::Heartbeat {
                sequence,
                incarnation,
                applied,
                volume_down,
            };
            self.send(Place::Daemon(node), Place::Daemon(leader), message);
        }
        let next = self.after(node, interval);
        self.at(next, Event::Beat { node, life });
    }

    /// A grant came; it is used once this replica has applied what it needs.
    pub fn granted(&mut self, node: usize, sequence: u64, grant: Grant, index: usize, until: u64) {
        let now_ns = self.clock(node) * 1_000;
        let now = self.now;
        let from_receipt = self.mutant == Some(Mutant::LeaseFromReceipt);
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        if daemon.leaving.is_some() {
            return;
        }
        if daemon.applied < index {
            if now < until {
                let again = Message::Granted {
                    sequence,
                    grant,
                    index,
                    until,
                };
                self.later(node, again);
            }
            return;
        }
        let granted = daemon.lease.granted(sequence, grant);
        let deadline_ns = match granted {
            _ if from_receipt => now_ns + u64::from(grant.lease_ms) * 1_000_000,
            Some(deadline_ns) => deadline_ns,
            None => return,
        };
        // The book of this node's leases, by its own clock: kept apart from what the code makes of it.
        if let Some(sent) = daemon.sent.get(&sequence).copied() {
            let until = sent + u64::from(grant.lease_ms) * MS;
            daemon.booked_until = daemon.booked_until.max(until);
        }
        self.extend_monitors(node, deadline_ns / 1_000);
        self.come_back(node);
    }

    /// Tells the monitors of the machines that are this node's, as far as it knows.
    fn extend_monitors(&mut self, node: usize, deadline: u64) {
        let me = node_id(node);
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        let (state, session) = (daemon.state.clone(), daemon.session());
        let monitors = self.hosts[node].monitors.values();
        let own: Vec<u64> = monitors
            .filter(|monitor| {
                let vm = state.vms.get(&monitor.vm);
                vm.is_some_and(|vm| vm.ownership.owner == Some(me))
            })
            .map(|monitor| monitor.nonce)
            .collect();
        for nonce in own {
            let (from, to) = (Place::Daemon(node), Place::Monitor(node, nonce));
            self.send(from, to, Message::Extend { deadline, session });
        }
    }

    /// On the way back from an absence: moves back what was not yet, and says when nothing is left.
    fn come_back(&mut self, node: usize) {
        let now_ns = self.clock(node) * 1_000;
        let (now, at_ms, number) = (self.now, self.wall_ms(node), self.number());
        let nonces: Vec<u64> = self.hosts[node].monitors.keys().copied().collect();
        let leader = self.hosts[node].raft.leader;
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        let (state, life) = (daemon.state.clone(), daemon.life);
        let (Some(me), Some(session)) = (state.nodes.get(&node_id(node)), daemon.session_since)
        else {
            return;
        };
        daemon.lease.retain(|nonce| nonces.contains(&nonce));
        let deadline = daemon.lease.shorten_to(me, now_ns).map(|ns| ns / 1_000);
        let end = daemon.lease.returned(me, nonces.iter().copied(), now_ns);
        let due: Vec<u64> = nonces
            .into_iter()
            .filter(|nonce| daemon.lease.is_to_shorten(*nonce))
            .collect();
        let asks = end.filter(|_| daemon.returning < now);
        if let (Some(command), Some(leader)) = (asks, leader) {
            daemon.returning = now + RETURN_PAUSE;
            let envelope = Arc::new(Envelope {
                request: RequestId(format!("n{}/{number}", node + 1)),
                actor: format!("node/n{}", node + 1),
                at_ms,
                asked: None,
                command,
            });
            let message = Message::Propose {
                rpc: number,
                envelope,
            };
            self.send(Place::Daemon(node), Place::Daemon(leader), message);
        }
        if let Some(deadline) = deadline {
            for nonce in due {
                let message = Message::Shorten {
                    deadline,
                    session: session.0,
                    life,
                };
                let (from, to) = (Place::Daemon(node), Place::Monitor(node, nonce));
                self.send(from, to, message);
            }
        }
    }

    /// A monitor has moved its deadline back.
    pub fn shortened(&mut self, node: usize, nonce: u64, asked_by: u64) {
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        // The connection of a life that has ended is gone.
        if daemon.life == asked_by && daemon.leaving.is_none() {
            daemon.lease.shortened(nonce);
            self.come_back(node);
        }
    }

    /// What a monitor does about its deadline when it is told; it obeys no life of `clusterd` before the one that
    /// last moved it back. Says whether the message was such a one.
    pub fn deadline_told(&mut self, node: usize, nonce: u64, message: &Message) -> bool {
        let (deadline, session, answers) = match *message {
            Message::Extend { deadline, session } => (deadline, session, None),
            Message::Shorten {
                deadline,
                session,
                life,
            } => (deadline, session, Some(life)),
            _ => return false,
        };
        let clock = self.clock(node);
        let host = &mut self.hosts[node];
        let obeys = host.sessions.get(&nonce).copied().unwrap_or(0);
        let Some(monitor) = host.monitors.get_mut(&nonce) else {
            return true;
        };
        if session < obeys {
            return true;
        }
        if answers.is_some() {
            host.sessions.insert(nonce, session);
            monitor.deadline = monitor.deadline.min(deadline);
        } else {
            // One that has passed while the guest runs is not saved: the timer is about to stop it.
            let passed = monitor.in_guest && monitor.deadline <= clock;
            if !passed {
                monitor.deadline = monitor.deadline.max(deadline);
            }
        }
        let deadline = monitor.deadline;
        self.arm(node, nonce, deadline);
        if let Some(life) = answers {
            let (from, to) = (Place::Monitor(node, nonce), Place::Daemon(node));
            self.send(from, to, Message::Shortened { nonce, life });
        }
        true
    }

    /// Registers this life, and again when the log counts it as lost.
    pub fn register(&mut self, node: usize) {
        let (now, incarnation) = (self.now, self.hosts[node].incarnation);
        let at_ms = self.wall_ms(node);
        let number = self.number();
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        let known = daemon.state.nodes.get(&node_id(node)).filter(|known| {
            daemon.session_since.is_none()
                || known.incarnation != Incarnation(incarnation)
                || matches!(known.liveness, Liveness::Joining | Liveness::Lost)
        });
        // A life registers when it knows what runs on its host.
        let known = known.filter(|_| daemon.finding.is_empty());
        let Some(replaces) = known.map(|known| known.incarnation) else {
            return;
        };
        if now < daemon.registering || daemon.leaving.is_some() {
            return;
        }
        daemon.registering = now + REGISTER_PAUSE;
        let envelope = Envelope {
            request: RequestId(format!("n{}/{number}", node + 1)),
            actor: format!("node/n{}", node + 1),
            at_ms,
            asked: None,
            command: Command::RegisterNode {
                node: node_id(node),
                incarnation: Incarnation(incarnation),
                replaces,
                address: format!("127.0.0.{}:1", node + 1),
                facts: setup::facts(),
            },
        };
        let rpc = number;
        daemon.own.insert(rpc, Own::Registration);
        if let Some(leader) = self.hosts[node].raft.leader {
            let message = Message::Propose {
                rpc,
                envelope: Arc::new(envelope),
            };
            self.send(Place::Daemon(node), Place::Daemon(leader), message);
        }
    }

    /// Something that this daemon proposed for itself was answered. Says whether it was such a one.
    pub fn own_answered(&mut self, node: usize, rpc: u64, answer: &Option<(usize, Reply)>) -> bool {
        let Some(own) = self.daemon(node).and_then(|daemon| daemon.own.remove(&rpc)) else {
            self.hand_on(node, rpc, answer.clone());
            return false;
        };
        match own {
            Own::Registration => self.registered(node, answer.clone()),
            Own::Absence => {
                if matches!(answer, Some((_, Reply::Done { .. }))) {
                    self.absence_committed(node);
                }
                self.leave(node);
            }
            Own::Loss { loss, term, .. } => self.loss_answered(node, rpc, &loss, term, answer),
        }
        true
    }

    /// A registration was answered.
    fn registered(&mut self, node: usize, answer: Option<(usize, Reply)>) {
        let Some((index, Reply::Done { index: at, outcome })) = answer else {
            return;
        };
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        if daemon.applied >= index {
            // The entry that had the effect: a repeated one is answered as it was the first time.
            daemon.session_since.get_or_insert(at);
            return;
        }
        let rpc = self.number();
        if let Some(daemon) = self.daemon(node) {
            daemon.own.insert(rpc, Own::Registration);
        }
        let answer = Some((index, Reply::Done { index: at, outcome }));
        self.later(node, Message::Proposed { rpc, answer });
    }

    /// `clusterd` is told to stop: it does nothing more of itself, and announces that it will be away.
    pub fn stop_as_planned(&mut self, node: usize) {
        let (now, at_ms, rpc) = (self.now, self.wall_ms(node), self.number());
        let incarnation = Incarnation(self.hosts[node].incarnation);
        let leader = self.hosts[node].raft.leader;
        if self.hosts[node].paused_until > now {
            return;
        }
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        if daemon.leaving.is_some() {
            return;
        }
        daemon.leaving = Some(now + STOP_PATIENCE);
        daemon.flows.clear();
        daemon.rpcs.clear();
        daemon.own.clear();
        daemon.own.insert(rpc, Own::Absence);
        let envelope = Arc::new(Envelope {
            request: RequestId(format!("n{}/{rpc}", node + 1)),
            actor: format!("node/n{}", node + 1),
            at_ms,
            asked: None,
            command: Command::Absent {
                node: node_id(node),
                incarnation,
                duration_ms: ABSENCE_MS,
            },
        });
        self.say(|| format!("clusterd of n{} is told to stop", node + 1));
        let from = Place::Daemon(node);
        match leader {
            Some(leader) => self.send(
                from,
                Place::Daemon(leader),
                Message::Propose { rpc, envelope },
            ),
            None => self.leave(node),
        }
    }

    fn absence_committed(&mut self, node: usize) {
        let now_ns = self.clock(node) * 1_000;
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        if let Some(deadline_ns) = daemon.lease.absence_committed(now_ns, ABSENCE_MS) {
            self.say(|| format!("n{} announced its absence", node + 1));
            self.extend_monitors(node, deadline_ns / 1_000);
        }
    }

    /// A stop that takes too long goes on without the announcement.
    pub fn leave_in_time(&mut self, node: usize) {
        let now = self.now;
        let late = self
            .daemon(node)
            .is_some_and(|daemon| daemon.leaving.is_some_and(|until| until < now));
        if late {
            self.leave(node);
        }
    }

    /// Ends the process and starts another one a little later; it may be gone again soon after.
    fn leave(&mut self, node: usize) {
        self.end_daemon(node);
        let away = self.rng.random_range(200 * MS..9 * S);
        self.at(self.now + away, Event::StartDaemon { node });
        if self.rng.random_bool(0.6) {
            let again = self.now + away + self.rng.random_range(0..6 * S);
            self.at(again, Event::GoneAgain { node });
        }
    }
}

/// What is known in that term, made anew when the term is.
pub fn term_of(known: &mut Option<Term>, number: u64, now_ns: u64) -> &mut Term {
    if known.as_ref().is_none_or(|known| known.number() != number) {
        *known = None;
    }
    known.get_or_insert_with(|| Term::new(number, now_ns))
}
