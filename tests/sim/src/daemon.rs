//! A node's `clusterd`: its log, lease and agent, and while it leads the lease table and the planners.
//!
//! The decisions are the real ones (`cluster_model`); this file carries them out in the simulated world.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cluster_model::agent::{Memory, Sight};
use cluster_model::supervise::Supervisor;
use cluster_model::{
    ClusterState, Command, Envelope, Grant, Incarnation, Liveness, LogIndex, MonitorView,
    NodeLease, Reply, RequestId, Token,
};
use rand::Rng;

use crate::invariants;
use crate::leader::table_of;
use crate::monitor::MonitorCall;
use crate::mutants::{self, Mutant};
use crate::raft::Role;
use crate::setup;
use crate::world::{ConfirmFor, Daemon, Event, MS, Message, Place, S, World, node_id};

/// A daemon looks at everything this often.
const TICK: u64 = 100 * MS;
/// A registration that got no answer is sent again.
const REGISTER_PAUSE: u64 = 700 * MS;

/// A monitor of an earlier life that does not answer for this long is ended.
const FOUND_PATIENCE: u64 = 10 * S;
/// One look in this many hears how every monitor stands, changed or not.
const HEARD_ANYWAY: u32 = 10;

/// What the mutant's disk loses.
const ENTRIES_FORGOTTEN: usize = 6;

impl World {
    /// A daemon starts: everything but its log is new.
    pub fn start_daemon(&mut self, node: usize) {
        let host = &self.hosts[node];
        if !host.up || host.daemon.is_some() {
            return;
        }
        let life = self.number();
        let election_at = self.election_due(node);
        let looked_at = self.clock(node);
        let mutant = self.mutant;
        let forgets = self.mutant == Some(Mutant::LogForgotten);
        let host = &mut self.hosts[node];
        host.raft.restart();
        if forgets {
            host.raft.forget(ENTRIES_FORGOTTEN);
        }
        host.paused_until = 0;
        host.daemon = Some(Daemon {
            life,
            state: Arc::new(ClusterState::default()),
            applied: 0,
            memory: Memory::with(mutants::safeguards(mutant)),
            lease: NodeLease::default(),
            session_since: None,
            registering: 0,
            sight: BTreeMap::new(),
            finding: BTreeSet::new(),
            flows: BTreeMap::new(),
            rpcs: BTreeMap::new(),
            waiting: BTreeMap::new(),
            handed_on: BTreeMap::new(),
            confirms: BTreeMap::new(),
            table: None,
            volumes_down: BTreeSet::new(),
            looked_at,
            election_at,
            planned_at: 0,
            supervisor: Supervisor::default(),
        });
        self.say(|| format!("clusterd of n{} starts", node + 1));
        invariants::log_changed(self, node);
        self.find_monitors(node, life);
        self.apply(node);
        self.at(self.now, Event::Tick { node, life });
        self.at(self.now + 50 * MS, Event::Beat { node, life });
    }

    fn election_due(&mut self, node: usize) -> u64 {
        let wait = self.rng.random_range(1_050 * MS..1_500 * MS);
        self.after(node, wait)
    }

    /// The daemon, if there is one.
    pub fn daemon(&mut self, node: usize) -> Option<&mut Daemon> {
        self.hosts[node].daemon.as_mut()
    }

    /// A daemon's regular look.
    pub fn tick(&mut self, node: usize) {
        let Some(daemon) = self.hosts[node].daemon.as_ref() else {
            return;
        };
        let (life, election_at) = (daemon.life, daemon.election_at);
        let out = if self.hosts[node].raft.role == Role::Leader {
            self.hosts[node].raft.beat()
        } else if self.now >= election_at {
            let due = self.election_due(node);
            if let Some(daemon) = self.daemon(node) {
                daemon.election_at = due;
            }
            let out = self.hosts[node].raft.campaign();
            invariants::log_changed(self, node);
            let term = self.hosts[node].raft.vote.term;
            self.say(|| format!("n{} asks to lead in term {term}", node + 1));
            out
        } else {
            Vec::new()
        };
        self.raft_out(node, out);
        self.lead(node);
        self.register(node);
        if self.rng.random_ratio(1, HEARD_ANYWAY) {
            let now = self.now;
            let monitors = self.hosts[node].monitors.values();
            let awake = monitors.filter(|monitor| monitor.paused_until <= now);
            let awake: Vec<u64> = awake.map(|monitor| monitor.nonce).collect();
            for nonce in awake {
                self.publish(node, nonce);
            }
        }
        self.look(node);
        let next = self.after(node, TICK);
        self.at(next, Event::Tick { node, life });
    }

    /// Sends what the log says.
    pub fn raft_out(&mut self, node: usize, out: Vec<(usize, crate::raft::RaftMessage)>) {
        for (peer, message) in out {
            let (from, to) = (Place::Daemon(node), Place::Daemon(peer));
            self.send(from, to, Message::Raft(message));
        }
    }

    /// A message for the daemon.
    pub fn daemon_hears(&mut self, node: usize, from: Place, message: Message) {
        match message {
            Message::Raft(message) => {
                let Place::Daemon(peer) = from else { return };
                let leaders = match &message {
                    crate::raft::RaftMessage::Append { commit, .. } => Some(*commit),
                    _ => None,
                };
                let heard = leaders.is_some();
                let commit = self.hosts[node].raft.commit;
                let led = self.hosts[node].raft.role == Role::Leader;
                let out = self.hosts[node].raft.take_in(peer, message);
                if !led && self.hosts[node].raft.role == Role::Leader {
                    let term = self.hosts[node].raft.vote.term;
                    self.say(|| format!("n{} leads in term {term}", node + 1));
                    invariants::elected(self, node);
                }
                if let (Some(Mutant::CommitFallsBack), Some(leaders)) = (self.mutant, leaders) {
                    let raft = &mut self.hosts[node].raft;
                    raft.commit = raft.commit.min(leaders);
                }
                invariants::log_changed(self, node);
                if heard && self.hosts[node].raft.leader == Some(peer) {
                    let due = self.election_due(node);
                    if let Some(daemon) = self.daemon(node) {
                        daemon.election_at = due;
                    }
                }
                self.raft_out(node, out);
                self.apply(node);
                self.confirmed(node);
                // Followers hear of a commit at once.
                if self.hosts[node].raft.commit > commit {
                    let out = self.hosts[node].raft.beat();
                    self.raft_out(node, out);
                }
            }
            Message::Propose { rpc, envelope } => self.leader_propose(node, from, rpc, envelope),
            Message::Confirm { rpc } => {
                let received = self.clock(node);
                let to = from;
                self.leader_confirm(node, ConfirmFor::Read { to, rpc, received })
            }
            Message::Heartbeat {
                sequence,
                incarnation,
                volume_down,
            } => {
                let Place::Daemon(peer) = from else { return };
                let received = self.clock(node);
                if let Some(daemon) = self.daemon(node) {
                    if volume_down {
                        daemon.volumes_down.insert(node_id(peer));
                    } else {
                        daemon.volumes_down.remove(&node_id(peer));
                    }
                }
                self.leader_confirm(
                    node,
                    ConfirmFor::Lease {
                        node: peer,
                        sequence,
                        incarnation,
                        received,
                    },
                );
            }
            Message::Granted {
                sequence,
                grant,
                index,
            } => self.granted(node, sequence, grant, index),
            Message::AskReady { rpc, migration } => {
                let receives = |monitor: &&MonitorView| {
                    monitor.migration.as_ref().is_some_and(|part| {
                        part.id == migration && part.side == cluster_model::Side::Destination
                    })
                };
                let nonce = self.daemon(node).and_then(|daemon| {
                    let mut sight = daemon.sight.values().map(|(_, monitor)| monitor);
                    sight.find(receives).map(|monitor| monitor.nonce)
                });
                self.send(Place::Daemon(node), from, Message::Ready { rpc, nonce });
            }
            Message::Proposed { .. }
            | Message::Confirmed { .. }
            | Message::Ready { .. }
            | Message::Told { .. }
            | Message::Answer { .. } => self.flow_answered(node, message),
            Message::Status { said, view } => {
                if let Some(daemon) = self.daemon(node) {
                    daemon.finding.remove(&view.nonce);
                }
                self.described(node, said, *view);
            }
            Message::Gone { nonce } => {
                if let Some(daemon) = self.daemon(node) {
                    daemon.finding.remove(&nonce);
                    daemon.sight.remove(&nonce);
                }
            }
            Message::Call { .. }
            | Message::Ask { .. }
            | Message::Quiet { .. }
            | Message::Final { .. }
            | Message::Broken { .. } => {}
        }
        self.look(node);
    }

    /// The leader writes a command down, and tells whoever asked what came of it.
    pub fn leader_propose(&mut self, node: usize, from: Place, rpc: u64, envelope: Arc<Envelope>) {
        let raft = &mut self.hosts[node].raft;
        let asked_in = raft.vote;
        let Some(index) = raft.propose(Some(envelope)) else {
            self.send(
                Place::Daemon(node),
                from,
                Message::Proposed { rpc, answer: None },
            );
            return;
        };
        let out = raft.beat();
        if let Some(daemon) = self.daemon(node) {
            daemon
                .waiting
                .entry(index)
                .or_default()
                .push((from, rpc, asked_in));
        }
        self.raft_out(node, out);
    }

    fn leader_confirm(&mut self, node: usize, asked: ConfirmFor) {
        let number = self.number();
        // A mutant takes its own word for it.
        if matches!(asked, ConfirmFor::Read { .. }) && self.mutant == Some(Mutant::ConfirmIsLocal)
            || matches!(asked, ConfirmFor::Lease { .. })
                && self.mutant == Some(Mutant::LeaseWithoutQuorum)
        {
            let raft = &self.hosts[node].raft;
            if raft.role == Role::Leader {
                let index = raft.commit;
                if let Some(daemon) = self.daemon(node) {
                    daemon.confirms.insert(number, asked);
                }
                self.answer_confirm(node, number, index);
            }
            return;
        }
        match self.hosts[node].raft.confirm(number) {
            Some(out) => {
                if let Some(daemon) = self.daemon(node) {
                    daemon.confirms.insert(number, asked);
                }
                self.raft_out(node, out);
            }
            None => {
                if let ConfirmFor::Read { to, rpc, .. } = asked {
                    let message = Message::Confirmed { rpc, index: None };
                    self.send(Place::Daemon(node), to, message);
                }
            }
        }
    }

    fn confirmed(&mut self, node: usize) {
        for (number, index) in self.hosts[node].raft.confirmed() {
            self.answer_confirm(node, number, index);
        }
    }

    fn answer_confirm(&mut self, node: usize, number: u64, index: usize) {
        let Some(asked) = self
            .daemon(node)
            .and_then(|daemon| daemon.confirms.remove(&number))
        else {
            return;
        };
        match asked {
            ConfirmFor::Read { to, rpc, received } => {
                invariants::answers(self, node, received);
                let index = Some(index);
                self.send(Place::Daemon(node), to, Message::Confirmed { rpc, index });
            }
            ConfirmFor::Lease {
                node: peer,
                sequence,
                incarnation,
                received,
            } => {
                let now_ns = self.clock(node) * 1_000;
                let term = self.hosts[node].raft.vote.term;
                let early = self.mutant == Some(Mutant::LostTooEarly);
                let Some(daemon) = self.daemon(node) else {
                    return;
                };
                if daemon.applied < index {
                    return;
                }
                let state = daemon.state.clone();
                let (_, table, condemned) = table_of(&mut daemon.table, term, now_ns);
                let up_since = state.nodes.get(&node_id(peer)).map(|known| known.up_since);
                if up_since.is_some_and(|since| condemned.contains(&(node_id(peer), since)))
                    && !early
                {
                    return;
                }
                let received_ns = received * 1_000;
                let granted = table.grant(
                    &state,
                    node_id(peer),
                    Incarnation(incarnation),
                    received_ns,
                    received_ns,
                    now_ns,
                );
                if let Ok(grant) = granted {
                    invariants::answers(self, node, received);
                    let message = Message::Granted {
                        sequence,
                        grant,
                        index,
                    };
                    self.send(Place::Daemon(node), Place::Daemon(peer), message);
                }
            }
        }
    }

    /// A node's heartbeat to whoever leads, as far as it knows.
    pub fn heartbeat(&mut self, node: usize) {
        let sent_ns = self.clock(node) * 1_000;
        let volume_down = !self.reaches(Place::Daemon(node), Place::Server) || !self.server.up;
        let (leader, incarnation) = (self.hosts[node].raft.leader, self.hosts[node].incarnation);
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        let life = daemon.life;
        let sequence = daemon.lease.sending(sent_ns);
        let interval = u64::from(daemon.state.settings.heartbeat_ms.max(300)) * MS;
        if let Some(leader) = leader {
            let message = Message::Heartbeat {
                sequence,
                incarnation,
                volume_down,
            };
            self.send(Place::Daemon(node), Place::Daemon(leader), message);
        }
        let next = self.after(node, interval);
        self.at(next, Event::Beat { node, life });
    }

    fn granted(&mut self, node: usize, sequence: u64, grant: Grant, index: usize) {
        let now_ns = self.clock(node) * 1_000;
        let from_receipt = self.mutant == Some(Mutant::LeaseFromReceipt);
        let me = node_id(node);
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        if daemon.applied < index {
            let again = Message::Granted {
                sequence,
                grant,
                index,
            };
            return self.later(node, again);
        }
        let granted = daemon.lease.granted(sequence, grant);
        let deadline_ns = match granted {
            _ if from_receipt => now_ns + u64::from(grant.lease_ms) * 1_000_000,
            Some(deadline_ns) => deadline_ns,
            None => return,
        };
        let state = daemon.state.clone();
        let deadline = deadline_ns / 1_000;
        let monitors: Vec<(u64, Token)> = self.daemon(node).map_or_else(Vec::new, |daemon| {
            let mine = daemon.sight.values().map(|(_, monitor)| monitor);
            let mine = mine.filter(|monitor| {
                let known = state.vms.get(&monitor.vm);
                known.is_some_and(|vm| vm.ownership.owner == Some(me))
            });
            mine.map(|monitor| (monitor.nonce, monitor.token)).collect()
        });
        for (nonce, token) in monitors {
            let (here, there) = (Place::Daemon(node), Place::Monitor(node, nonce));
            let call = MonitorCall::Extend { token, deadline };
            self.send(here, there, Message::Ask { rpc: 1, call });
        }
    }

    /// Applies what is committed.
    pub fn apply(&mut self, node: usize) {
        self.learn_commits(node);
        let (commit, vote, leads) = {
            let raft = &self.hosts[node].raft;
            (raft.commit, raft.vote, raft.role == Role::Leader)
        };
        let mut applied_any = false;
        let wall_ms = self.wall_ms(node);
        loop {
            let mutant = self.mutant;
            let host = &mut self.hosts[node];
            let Some(daemon) = host.daemon.as_mut() else {
                return;
            };
            if daemon.applied >= commit {
                break;
            }
            let index = daemon.applied + 1;
            let mut entry = host.raft.log[index - 1].clone();
            if mutant == Some(Mutant::ApplyReadsClock)
                && let Some(envelope) = &mut entry.command
            {
                Arc::make_mut(envelope).at_ms = wall_ms;
            }
            let state = Arc::make_mut(&mut daemon.state);
            let reply = invariants::apply_entry(state, index, &entry, mutant);
            daemon.applied = index;
            applied_any = true;
            let digest_of = daemon.state.clone();
            for (to, rpc, asked_in) in daemon.waiting.remove(&index).unwrap_or_default() {
                let answer = (leads && asked_in == vote && entry.leader == vote.leader())
                    .then(|| reply.clone().map(|reply| (index, reply)))
                    .flatten();
                let message = Message::Proposed { rpc, answer };
                self.send(Place::Daemon(node), to, message);
            }
            invariants::applied(self, node, index, &digest_of);
        }
        if applied_any {
            self.flows_applied(node);
        }
    }

    /// Registers this life, and again when the log counts it as lost.
    fn register(&mut self, node: usize) {
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
        if now < daemon.registering {
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
        // Rpc 0 of a flow that is none: the answer is taken in below.
        let rpc = number;
        daemon.rpcs.insert(rpc, 0);
        if let Some(leader) = self.hosts[node].raft.leader {
            let message = Message::Propose {
                rpc,
                envelope: Arc::new(envelope),
            };
            self.send(Place::Daemon(node), Place::Daemon(leader), message);
        }
    }

    /// A registration was answered.
    pub fn registered(&mut self, node: usize, answer: Option<(usize, Reply)>) {
        let Some((index, Reply::Done { index: at, outcome })) = answer else {
            return;
        };
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        if daemon.applied >= index {
            daemon.session_since.get_or_insert(LogIndex(index as u64));
            return;
        }
        let rpc = self.number();
        if let Some(daemon) = self.daemon(node) {
            daemon.rpcs.insert(rpc, 0);
        }
        let answer = Some((index, Reply::Done { index: at, outcome }));
        self.later(node, Message::Proposed { rpc, answer });
    }

    /// A message that this replica is behind of: it is taken in again a little later.
    pub fn later(&mut self, node: usize, message: Message) {
        let here = Place::Daemon(node);
        let event = Event::Arrive {
            from: here,
            to: here,
            message,
        };
        self.at(self.now + 10 * MS, event);
    }

    /// A daemon that starts looks for the monitors of earlier lives: each describes itself, or is ended when it does not
    /// for ten seconds. Nothing is decided before.
    fn find_monitors(&mut self, node: usize, life: u64) {
        let clock = self.clock(node);
        let now = self.now;
        let mut silent = BTreeSet::new();
        let mut sight = BTreeMap::new();
        for (nonce, monitor) in &mut self.hosts[node].monitors {
            if monitor.paused_until > now {
                silent.insert(*nonce);
            }
            // What a silent one says when it goes on is heard then.
            sight.insert(*nonce, (monitor.said, monitor.view(clock)));
        }
        for nonce in &silent {
            let (here, there) = (Place::Daemon(node), Place::Monitor(node, *nonce));
            let call = MonitorCall::Describe;
            self.send(here, there, Message::Ask { rpc: 1, call });
            let nonce = *nonce;
            self.at(now + FOUND_PATIENCE, Event::NotFound { node, life, nonce });
        }
        if let Some(daemon) = self.daemon(node) {
            daemon.sight = sight;
            daemon.finding = silent;
        }
    }

    /// A monitor of an earlier life has not answered for long: it is ended.
    pub fn not_found(&mut self, node: usize, nonce: u64) {
        let finding = self
            .daemon(node)
            .is_some_and(|daemon| daemon.finding.remove(&nonce));
        if finding {
            self.end_monitor(node, nonce, "it does not answer");
            if let Some(daemon) = self.daemon(node) {
                daemon.sight.remove(&nonce);
            }
        }
    }

    /// The agent looks, and begins what follows.
    pub fn look(&mut self, node: usize) {
        let clock = self.clock(node);
        let incarnation = self.hosts[node].incarnation;
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        if daemon.applied == 0 || !daemon.finding.is_empty() {
            return;
        }
        let monitors = daemon.sight.values().map(|(_, view)| view.clone());
        let sight = Sight {
            me: node_id(node),
            incarnation: Incarnation(incarnation),
            session_since: daemon.session_since,
            lease_valid: daemon.lease.valid(clock * 1_000),
            monitors: monitors.collect(),
        };
        let state = daemon.state.clone();
        for work in daemon.memory.look(&state, sight) {
            self.begin_flow(node, work, state.clone());
        }
    }
}
