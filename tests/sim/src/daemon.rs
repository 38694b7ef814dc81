//! A node's `clusterd`: its log, lease and agent, and while it leads the lease table and the planners.
//!
//! The decisions are the real ones (`cluster_model`); this file carries them out in the simulated world.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cluster_model::agent::{Memory, Sight};
use cluster_model::supervise::Supervisor;
use cluster_model::{ClusterState, Envelope, HeldLease, Incarnation, MonitorView};
use rand::Rng;

use crate::invariants;
use crate::monitor::MonitorCall;
use crate::mutants::{self, Mutant};
use crate::raft::Role;
use crate::world::{ConfirmFor, Daemon, Event, MS, Message, Place, S, VolumeWatch, World, node_id};

/// A daemon looks at everything this often.
const TICK: u64 = 100 * MS;

/// Whoever heard a leader this lately gives nobody else a vote.
const LEADER_HEARD: u64 = 900 * MS;

/// A monitor of an earlier life that does not answer for this long is ended.
const FOUND_PATIENCE: u64 = 10 * S;
/// One look in this many hears how every monitor stands, changed or not.
const HEARD_ANYWAY: u32 = 10;

/// How far a commit point may fall back at a restart, entries.
const COMMITS_FORGOTTEN: usize = 12;

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
        let mutant = self.mutant;
        let forgets = self.mutant == Some(Mutant::LogForgotten);
        let host = &mut self.hosts[node];
        host.raft.restart();
        // The commit point is not synced: a node may find an older one, and apply the rest anew.
        if self.rng.random_bool(0.5) {
            let back = self.rng.random_range(0..=COMMITS_FORGOTTEN);
            let raft = &mut self.hosts[node].raft;
            raft.commit = raft.commit.saturating_sub(back).max(1);
            let commit = raft.commit;
            if let Some(promised) = self.truth.promised.get_mut(&node) {
                promised.1 = promised.1.min(commit);
            }
        }
        let host = &mut self.hosts[node];
        if forgets {
            host.raft.forget(ENTRIES_FORGOTTEN);
        }
        host.paused_until = 0;
        host.hangs_until = 0;
        host.daemon = Some(Daemon {
            life,
            state: Arc::new(ClusterState::default()),
            applied: 0,
            memory: Memory::with(mutants::safeguards(mutant)),
            lease: HeldLease::default(),
            sent: BTreeMap::new(),
            booked_until: 0,
            session_since: None,
            registering: 0,
            sight: BTreeMap::new(),
            finding: BTreeSet::new(),
            flows: BTreeMap::new(),
            rpcs: BTreeMap::new(),
            waiting: BTreeMap::new(),
            own: BTreeMap::new(),
            leaving: None,
            returning: 0,
            handed_on: BTreeMap::new(),
            confirms: BTreeMap::new(),
            term: None,
            volumes_down: BTreeSet::new(),
            volume_watch: VolumeWatch::default(),
            election_at,
            heard_at: None,
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
        self.leave_in_time(node);
        self.look(node);
        let next = self.after(node, TICK);
        self.at(next, Event::Tick { node, life });
    }

    /// Whether it hears a leader, or leads and was confirmed a moment ago: it then gives nobody else its vote, so that
    /// a node that does not hear the leader deposes nobody. It stands for openraft's pre-vote and leader's lease.
    fn has_a_leader(&self, node: usize) -> bool {
        let clock = self.clock(node);
        self.hosts[node].daemon.as_ref().is_some_and(|daemon| {
            daemon
                .heard_at
                .is_some_and(|heard| clock.saturating_sub(heard) < LEADER_HEARD)
        })
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
                if matches!(message, crate::raft::RaftMessage::Vote { .. })
                    && self.has_a_leader(node)
                {
                    return;
                }
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
                    let heard_at = self.clock(node);
                    if let Some(daemon) = self.daemon(node) {
                        daemon.election_at = due;
                        daemon.heard_at = Some(heard_at);
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
                applied,
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
                        applied,
                        received,
                    },
                );
            }
            Message::Granted {
                sequence,
                grant,
                index,
                until,
            } => self.granted(node, sequence, grant, index, until),
            Message::Shortened { nonce, life } => self.shortened(node, nonce, life),
            Message::Proposed { rpc, answer } if self.own_answered(node, rpc, &answer) => {}
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
            | Message::Extend { .. }
            | Message::Shorten { .. }
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
            asked @ ConfirmFor::Lease { .. } => self.answer_heartbeat(node, asked, index),
        }
    }

    /// Applies what is committed.
    pub fn apply(&mut self, node: usize) {
        self.learn_commits(node);
        let (commit, vote, leads) = {
            let raft = &self.hosts[node].raft;
            (raft.commit, raft.vote, raft.role == Role::Leader)
        };
        // A replica that hangs takes in entries and acknowledges them, and gets no further.
        if self.hosts[node].hangs_until > self.now {
            return;
        }
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
        if daemon.applied == 0 || !daemon.finding.is_empty() || daemon.leaving.is_some() {
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
