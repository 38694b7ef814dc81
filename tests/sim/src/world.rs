//! The simulated world: virtual time, hosts with their own clocks, links, and the queue of what happens next.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cluster_model::agent::Memory;
use cluster_model::{
    ClusterState, Envelope, HeldLease, LogIndex, Loss, MonitorView, Name, NodeId, Term, Token, VmId,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

pub use crate::event::{Event, Message, Place};
use crate::flows::Flow;
use crate::invariants::{self, Truth};
use crate::monitor::Monitor;
use crate::mutants::Mutant;
use crate::queue::Queue;
use crate::raft::{Entry, Raft, Vote};
use crate::setup;
use crate::storage::{Call, Server};

/// Microseconds.
pub const MS: u64 = 1_000;
/// Microseconds.
pub const S: u64 = 1_000_000;
/// Lines of the timeline that are kept.
const TIMELINE_MAX: usize = 20_000;

/// A host.
#[derive(Debug)]
pub struct Host {
    /// Whether it has power.
    pub up: bool,
    /// When it booted, real time.
    pub booted_at: u64,
    /// How much faster its clock runs, millionths.
    pub drift: i64,
    /// How wrong its wall clock is, ms.
    pub wall_off_ms: i64,
    /// The life of the host.
    pub incarnation: u64,
    /// Its log, on its disk.
    pub raft: Raft,
    /// Its `clusterd`.
    pub daemon: Option<Daemon>,
    /// Until when `clusterd` is stopped (SIGSTOP).
    pub paused_until: u64,
    /// Until when its replica hangs: entries come in, and nothing is applied.
    pub hangs_until: u64,
    /// Which life of `clusterd` each monitor obeys, by nonce; any, if it is not here.
    pub sessions: BTreeMap<u64, u64>,
    /// Its monitors.
    pub monitors: BTreeMap<u64, Monitor>,
}

/// One life of a `clusterd`.
#[derive(Debug)]
pub struct Daemon {
    /// Which.
    pub life: u64,
    /// The state as applied here.
    pub state: Arc<ClusterState>,
    /// Entries applied.
    pub applied: usize,
    /// The agent's memory.
    pub memory: Memory,
    /// Its lease.
    pub lease: HeldLease,
    /// When each heartbeat was sent, on its own clock: for the book.
    pub sent: BTreeMap<u64, u64>,
    /// Until when its leases run, by the book: on its own clock, µs.
    pub booked_until: u64,
    /// The entry by which this life registered.
    pub session_since: Option<LogIndex>,
    /// A registration is under way, or paused until then.
    pub registering: u64,
    /// Its monitors as they last described themselves, and how often they had by then.
    pub sight: BTreeMap<u64, (u64, MonitorView)>,
    /// Monitors that it found at its start and that have not answered yet.
    pub finding: BTreeSet<u64>,
    /// Work under way.
    pub flows: BTreeMap<u64, Flow>,
    /// Which flow waits for which answer.
    pub rpcs: BTreeMap<u64, u64>,
    /// Leader: who waits for which entry, and the vote it led under.
    pub waiting: BTreeMap<usize, Vec<(Place, u64, Vote)>>,
    /// What it proposed for itself, by the number of the proposal.
    pub own: BTreeMap<u64, Own>,
    /// It was told to stop, and ends then at the latest.
    pub leaving: Option<u64>,
    /// The end of its absence is on its way into the log until then.
    pub returning: u64,
    /// The mutant's: losses that are handed on, by the number of their proposal.
    pub handed_on: BTreeMap<u64, Arc<Envelope>>,
    /// Leader: what each confirm round is for.
    pub confirms: BTreeMap<u64, ConfirmFor>,
    /// Leader: what it knows of leases in its term.
    pub term: Option<Term>,
    /// Leader: nodes that do not reach the volume.
    pub volumes_down: BTreeSet<NodeId>,
    /// Its own watch of the volume.
    pub volume_watch: VolumeWatch,
    /// When an election is due, real time.
    pub election_at: u64,
    /// When it last heard its leader, on its own clock.
    pub heard_at: Option<u64>,
    /// When the controllers planned last.
    pub planned_at: u64,
    /// What it has seen of open migrations.
    pub supervisor: cluster_model::supervise::Supervisor,
}

/// How a node finds out that it does not reach the volume: now and then, and not at the first failure.
#[derive(Clone, Copy, Debug, Default)]
pub struct VolumeWatch {
    /// When it looks next, real time.
    pub next: u64,
    /// Looks that failed in a row.
    pub failures: u32,
}

impl Daemon {
    /// Which life it is, for monitors: the entry by which it registered.
    pub fn session(&self) -> u64 {
        self.session_since.map_or(0, |since| since.0)
    }
}

/// What a daemon proposes for itself.
#[derive(Clone, Debug)]
pub enum Own {
    /// That it is there.
    Registration,
    /// That it will be away.
    Absence,
    /// Leader: that a node is lost, seen in that term; given up then.
    Loss {
        loss: Box<Loss>,
        term: u64,
        until: u64,
    },
}

/// Who waits for a confirm round.
#[derive(Clone, Debug)]
pub enum ConfirmFor {
    /// A flow somewhere: asked then.
    Read { to: Place, rpc: u64, received: u64 },
    /// A node's heartbeat: received then.
    Lease {
        node: usize,
        sequence: u64,
        incarnation: u64,
        applied: usize,
        received: u64,
    },
}

/// What the run counted.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Events.
    pub events: u64,
    /// Faults.
    pub faults: u64,
    /// Cutovers.
    pub cutovers: u64,
    /// Aborted migrations.
    pub aborts: u64,
    /// Nodes declared lost.
    pub losses: u64,
    /// Guests that were let run.
    pub runs: u64,
    /// Flushes that guests were told of.
    pub flushes: u64,
}

/// The world.
pub struct World {
    /// Real time, µs.
    pub now: u64,
    queue: Queue,
    /// The one source of chance.
    pub rng: StdRng,
    /// The hosts.
    pub hosts: Vec<Host>,
    /// The storage server.
    pub server: Server,
    /// `links[a][b]`: whether what `a` sends reaches `b`; the last one is the server.
    pub links: Vec<Vec<bool>>,
    /// Messages lost, in a thousand.
    pub loss_permille: u32,
    /// The longest usual delay.
    pub delay_max: u64,
    /// A place that everything reaches late, and by how much.
    pub congested: Option<(usize, u64)>,
    /// What is broken on purpose.
    pub mutant: Option<Mutant>,
    /// What really happened.
    pub truth: Truth,
    /// Figures.
    pub counts: Counts,
    /// What happened, for people.
    pub timeline: Vec<(u64, String)>,
    /// Whether to keep the timeline.
    pub verbose: bool,
    /// The first thing that must not be.
    pub violation: Option<String>,
    /// Trouble goes on until then.
    pub calm_at: u64,
    /// A host that stands still for an hour, and until when.
    pub asleep: Option<(usize, u64)>,
    /// Until then the storage server has no room for a WRITE.
    pub server_full_until: u64,
    /// Until then the storage server refuses every claim for good.
    pub server_denies_until: u64,
    /// The run ends then.
    pub end_at: u64,
    number: u64,
}

impl World {
    /// A cluster of `hosts` nodes with some machines, as it comes up.
    pub fn new(seed: u64, mutant: Option<Mutant>, verbose: bool) -> World {
        let mut rng = StdRng::seed_from_u64(seed);
        let count = if rng.random_ratio(1, 4) { 5 } else { 3 };
        let machines = rng.random_range(2..=4);
        let log = setup::log(count, machines);
        let mut world = World {
            now: S,
            queue: Queue::default(),
            hosts: Vec::new(),
            server: Server {
                up: true,
                checks: mutant != Some(Mutant::OldTokensWrite),
                ..Server::default()
            },
            links: vec![vec![true; count + 1]; count + 1],
            loss_permille: 0,
            delay_max: 2 * MS,
            congested: None,
            mutant,
            truth: Truth::new(&log),
            counts: Counts::default(),
            timeline: Vec::new(),
            verbose,
            violation: None,
            calm_at: 0,
            asleep: None,
            server_full_until: 0,
            server_denies_until: 0,
            end_at: 0,
            number: 1_000,
            rng,
        };
        world.calm_at = world.now + world.rng.random_range(20..50) * S;
        world.end_at = world.calm_at + 60 * S;
        for node in 0..count {
            let drift = world.rng.random_range(-50_000..=50_000);
            world.hosts.push(Host {
                up: true,
                booted_at: 0,
                drift,
                wall_off_ms: 0,
                incarnation: 1,
                raft: Raft::new(node, count, log.clone()),
                daemon: None,
                paused_until: 0,
                hangs_until: 0,
                sessions: BTreeMap::new(),
                monitors: BTreeMap::new(),
            });
            world.at(world.now, Event::StartDaemon { node });
        }
        let first = world.now + 6 * S;
        world.at(first, Event::Fault);
        world.at(first, Event::Operate);
        world.at(world.calm_at, Event::Calm);
        world
    }

    /// Runs to the end, or to the first thing that must not be.
    pub fn run(&mut self) {
        while let Some((at, event)) = self.queue.pop() {
            if at > self.end_at || self.violation.is_some() {
                break;
            }
            self.now = at;
            self.counts.events += 1;
            self.happen(event);
            if self.violation.is_none() {
                invariants::after_event(self);
            }
        }
        if self.violation.is_none() {
            self.now = self.end_at;
            invariants::at_end(self);
        }
    }

    /// [`World::run`], where an assertion of the code under test counts as a violation.
    pub fn run_caught(&mut self) {
        let run = std::panic::AssertUnwindSafe(|| self.run());
        if let Err(panic) = std::panic::catch_unwind(run) {
            let text = panic.downcast_ref::<&str>().map(ToString::to_string);
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            self.violate("an assertion in the code", text.unwrap_or_default());
        }
    }

    /// Puts something into the queue.
    pub fn at(&mut self, at: u64, event: Event) {
        self.queue.push(at.max(self.now), event);
    }

    /// A number that nobody has.
    pub fn number(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    /// A line for people.
    pub fn say(&mut self, line: impl FnOnce() -> String) {
        if self.verbose && self.timeline.len() < TIMELINE_MAX {
            self.timeline.push((self.now, line()));
        }
    }

    /// Something that must not be.
    pub fn violate(&mut self, invariant: &str, what: String) {
        if self.violation.is_none() {
            self.violation = Some(format!("{invariant}: {what}"));
            self.say(|| format!("VIOLATION of {invariant}"));
        }
    }

    /// A host's clock that never stops, µs since it booted.
    pub fn clock(&self, node: usize) -> u64 {
        let host = &self.hosts[node];
        let real = self.now.saturating_sub(host.booted_at) as i64;
        (real * (1_000_000 + host.drift) / 1_000_000) as u64
    }

    /// A host's wall clock, ms.
    pub fn wall_ms(&self, node: usize) -> u64 {
        (1_700_000_000_000 + self.now / MS).saturating_add_signed(self.hosts[node].wall_off_ms)
    }

    /// When, in real time, that much of a host's clock has passed.
    pub fn after(&self, node: usize, us: u64) -> u64 {
        self.now + (us as i64 * 1_000_000 / (1_000_000 + self.hosts[node].drift)) as u64 + 1
    }

    fn index(&self, place: Place) -> usize {
        match place {
            Place::Daemon(node) | Place::Monitor(node, _) => node,
            Place::Server => self.hosts.len(),
        }
    }

    /// Whether what one sends reaches the other now.
    pub fn reaches(&self, from: Place, to: Place) -> bool {
        let (from, to) = (self.index(from), self.index(to));
        from == to || self.links[from][to]
    }

    /// Sends a message: it may be late, or lost; what goes to the server may wait in a buffer.
    pub fn send(&mut self, from: Place, to: Place, message: Message) {
        let local = self.index(from) == self.index(to);
        let delay = if local {
            self.rng.random_range(10..200)
        } else if self.rng.random_ratio(1, 50) {
            self.rng.random_range(0..self.delay_max * 20)
        } else {
            self.rng.random_range(100..self.delay_max.max(200))
        };
        let delay = match self.congested {
            Some((place, late)) if !local && self.index(to) == place => delay + late,
            _ => delay,
        };
        let stream = matches!(message, Message::Call { .. });
        if !local && (!self.reaches(from, to) || self.rng.random_ratio(self.loss_permille, 1_000)) {
            // TCP holds it and sends again, also for a process that has died since.
            if stream && self.rng.random_ratio(2, 3) {
                let late = self.now + self.rng.random_range(200 * MS..25 * S);
                self.at(late, Event::Arrive { from, to, message });
            }
            return;
        }
        // A network that loses messages also makes callers ask twice; streams and storage calls are not doubled.
        let call = matches!(
            message,
            Message::Raft(_)
                | Message::Propose { .. }
                | Message::Proposed { .. }
                | Message::Confirm { .. }
                | Message::Confirmed { .. }
                | Message::Heartbeat { .. }
                | Message::Granted { .. }
        );
        if !local && call && self.rng.random_ratio(self.loss_permille / 2, 1_000) {
            let again = self.now + delay + self.rng.random_range(0..6 * S);
            let message = message.clone();
            self.at(again, Event::Arrive { from, to, message });
        }
        self.at(self.now + delay, Event::Arrive { from, to, message });
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrive { from, to, message } => self.arrive(from, to, message),
            Event::Tick { node, life } => {
                if self.lives(node, life, &event) {
                    self.tick(node);
                }
            }
            Event::Beat { node, life } => {
                if self.lives(node, life, &event) {
                    self.heartbeat(node);
                }
            }
            Event::Flow {
                node,
                life,
                flow,
                wait,
            } => {
                if self.lives(node, life, &event) {
                    self.flow_waited(node, flow, wait);
                }
            }
            Event::NotFound { node, life, nonce } => {
                if self.lives(node, life, &event) {
                    self.not_found(node, nonce);
                }
            }
            Event::Guest { node, nonce } => {
                if self.monitor_lives(node, nonce, &event) {
                    self.guest_step(node, nonce);
                }
            }
            Event::Deadline { node, nonce } => {
                let monitor = self.hosts[node].monitors.get(&nonce);
                let until = monitor.map_or(0, |monitor| monitor.paused_until);
                if until > self.now {
                    // The timer's thread is one of several that go on: its vCPUs may be quicker.
                    let late = until + self.rng.random_range(0..80 * MS);
                    return self.at(late, event);
                }
                if self.monitor_lives(node, nonce, &event) {
                    self.deadline(node, nonce);
                }
            }
            Event::CallLate { node, nonce, rpc } => {
                if self.monitor_lives(node, nonce, &event) {
                    self.call_late(node, nonce, rpc);
                }
            }
            Event::Copied { node, nonce } => {
                if self.monitor_lives(node, nonce, &event) {
                    self.copied(node, nonce);
                }
            }
            Event::Land {
                vm,
                token,
                sequence,
                verifier,
                rpc,
                to,
            } => self.land(vm, token, sequence, verifier, rpc, to),
            Event::Fault => self.fault(),
            Event::Operate => self.operate(),
            Event::StartDaemon { node } => self.start_daemon(node),
            Event::Boot { node } => self.boot(node),
            Event::GoneAgain { node } => self.gone_again(node),
            Event::StartServer => {
                if !self.server.up {
                    self.server.start();
                    self.say(|| "the storage server starts".into());
                }
            }
            Event::Heal => self.heal(),
            Event::Calm => self.calm(),
        }
    }

    /// Whether that life of a daemon is there to do something now; what a stopped process missed comes later.
    fn lives(&mut self, node: usize, life: u64, event: &Event) -> bool {
        let host = &self.hosts[node];
        if host
            .daemon
            .as_ref()
            .is_none_or(|daemon| daemon.life != life)
        {
            return false;
        }
        let until = host.paused_until;
        if until > self.now {
            self.at(until, event.clone());
            return false;
        }
        true
    }

    fn monitor_lives(&mut self, node: usize, nonce: u64, event: &Event) -> bool {
        let Some(monitor) = self.hosts[node].monitors.get(&nonce) else {
            return false;
        };
        let until = monitor.paused_until;
        if until > self.now {
            self.at(until, event.clone());
            return false;
        }
        true
    }

    fn arrive(&mut self, from: Place, to: Place, message: Message) {
        if !self.reaches(from, to) {
            if matches!(message, Message::Call { .. }) && self.rng.random_ratio(2, 3) {
                let late = self.now + self.rng.random_range(200 * MS..25 * S);
                self.at(late, Event::Arrive { from, to, message });
            }
            return;
        }
        match to {
            Place::Server => self.serve(from, message),
            Place::Daemon(node) => {
                let host = &self.hosts[node];
                let Some(life) = host.daemon.as_ref().map(|daemon| daemon.life) else {
                    return;
                };
                let event = Event::Arrive { from, to, message };
                if self.lives(node, life, &event)
                    && let Event::Arrive { message, .. } = event
                {
                    self.daemon_hears(node, from, message);
                }
            }
            Place::Monitor(node, nonce) => {
                let event = Event::Arrive { from, to, message };
                if self.monitor_lives(node, nonce, &event)
                    && let Event::Arrive { message, .. } = event
                    && !self.deadline_told(node, nonce, &message)
                {
                    self.monitor_hears(node, nonce, message);
                }
            }
        }
    }

    fn serve(&mut self, from: Place, message: Message) {
        let Message::Call { rpc, call } = message else {
            return;
        };
        if !self.server.up {
            // The client sends again until the server is back, or gives up.
            if self.rng.random_ratio(1, 2) {
                let late = self.now + self.rng.random_range(100 * MS..6 * S);
                let message = Message::Call { rpc, call };
                self.at(
                    late,
                    Event::Arrive {
                        from,
                        to: Place::Server,
                        message,
                    },
                );
            }
            return;
        }
        if self.now < self.server_denies_until
            && matches!(call, Call::Claim { .. } | Call::Make { .. })
        {
            let answer = crate::storage::Answer::Denied;
            return self.send(Place::Server, from, Message::Answer { rpc, answer });
        }
        if self.now < self.server_full_until && matches!(call, Call::Write { .. }) {
            // The client holds the WRITE and tries it again.
            let late = self.now + self.rng.random_range(200 * MS..S);
            let message = Message::Call { rpc, call };
            self.at(
                late,
                Event::Arrive {
                    from,
                    to: Place::Server,
                    message,
                },
            );
            return;
        }
        match self.server.process(&call) {
            crate::storage::Processed::Now(answer) => {
                self.send(Place::Server, from, Message::Answer { rpc, answer });
            }
            crate::storage::Processed::Lands => {
                let Call::Write {
                    vm,
                    token,
                    sequence,
                } = call
                else {
                    return;
                };
                // Seldom long, and never as long as the settle time: that is what certification measures.
                let long = self.rng.random_ratio(1, 20);
                let takes = self
                    .rng
                    .random_range(20..if long { 900 * MS } else { 3 * MS });
                let verifier = self.server.verifier;
                self.at(
                    self.now + takes,
                    Event::Land {
                        vm,
                        token,
                        sequence,
                        verifier,
                        rpc,
                        to: from,
                    },
                );
            }
        }
    }

    fn land(&mut self, vm: VmId, token: Token, sequence: u64, verifier: u64, rpc: u64, to: Place) {
        if !self.server.up || self.server.verifier != verifier {
            return;
        }
        match self.server.land(vm, token, sequence) {
            Ok(answer) => self.send(Place::Server, to, Message::Answer { rpc, answer }),
            Err(newer) => invariants::late(self, vm, token, newer),
        }
    }

    /// The name of a node, for people.
    pub fn label(&self, node: usize) -> String {
        format!("n{}", node + 1)
    }

    /// The monitors whose guests execute now, and their nodes.
    pub fn executing(&self) -> impl Iterator<Item = (usize, &Monitor)> {
        let hosts = self.hosts.iter().enumerate();
        let hosts = hosts.filter(|(_, host)| !host.monitors.is_empty());
        hosts.flat_map(move |(node, host)| {
            let monitors = host.monitors.values();
            let runs = move |monitor: &&Monitor| monitor.executes(self.now);
            monitors.filter(runs).map(move |monitor| (node, monitor))
        })
    }

    /// The committed log as far as somebody knows it.
    pub fn learn_commits(&mut self, node: usize) {
        if !invariants::same_log(self, node) {
            return;
        }
        let raft = &self.hosts[node].raft;
        let (commit, log) = (raft.commit, &raft.log);
        let known = self.truth.log.len();
        let new: Vec<Entry> = log[known.min(commit)..commit].to_vec();
        for entry in new {
            invariants::commit(self, entry);
        }
    }
}

/// A name that is one.
pub fn name(text: &str) -> Name {
    Name::new(text).unwrap_or_else(|_| unreachable!("{text} is a name"))
}

/// The number of a node in the log: that of the entry by which it joined, each behind its token's.
pub fn node_id(node: usize) -> NodeId {
    NodeId(2 * node as u64 + 1)
}

/// Which node has that number.
pub fn node_of(id: NodeId) -> usize {
    (id.0 as usize - 1) / 2
}
