//! Trouble, and what people ask for meanwhile; all of it drawn from the one seed.

use std::collections::BTreeSet;
use std::sync::Arc;

use cluster_model::{
    Command, Desired, Duty, Envelope, MigrationCause, MigrationOptions, RequestId, VmId, Why,
};
use rand::Rng;

use crate::world::{Event, MS, Message, Place, S, World, node_id};

/// How long a host stands still, seldom.
const HOUR: u64 = 3_600 * S;

impl World {
    /// Something breaks.
    pub fn fault(&mut self) {
        if self.now >= self.calm_at {
            return;
        }
        self.counts.faults += 1;
        let node = self.rng.random_range(0..self.hosts.len());
        let long = self.rng.random_range(200 * MS..15 * S);
        match self.rng.random_range(0..25) {
            0 => {
                self.kill_daemon(node);
                self.at(self.now + long, Event::StartDaemon { node });
            }
            1 => {
                self.power_off(node);
                self.at(self.now + long + 2 * S, Event::Boot { node });
            }
            2 => {
                let nonces: Vec<u64> = self.hosts[node].monitors.keys().copied().collect();
                if !nonces.is_empty() {
                    let nonce = nonces[self.rng.random_range(0..nonces.len())];
                    self.end_monitor(node, nonce, "SIGKILL");
                    self.look(node);
                }
            }
            3 => {
                self.say(|| format!("clusterd of n{} is stopped for {} ms", node + 1, long / MS));
                self.hosts[node].paused_until = self.now + long;
            }
            4 => {
                let until = self.now + long;
                self.say(|| {
                    format!(
                        "the monitors of n{} are stopped for {} ms",
                        node + 1,
                        long / MS
                    )
                });
                for monitor in self.hosts[node].monitors.values_mut() {
                    monitor.pause(until);
                }
            }
            5 => {
                self.say(|| format!("n{} stands still for {} ms", node + 1, long / MS));
                let until = self.now + long;
                self.hosts[node].paused_until = until;
                for monitor in self.hosts[node].monitors.values_mut() {
                    monitor.pause(until);
                }
            }
            6 => self.cut("from everybody", node, true, true, true, long),
            7 => self.cut("from the other nodes", node, true, true, false, long),
            8 => self.cut("from the storage", node, false, false, true, long),
            9 => self.cut("one way: it is not heard", node, true, false, false, long),
            10 => self.cut(
                "one way: it does not hear",
                node,
                false,
                true,
                false,
                2 * long,
            ),
            11 => {
                self.say(|| "the storage server crashes".into());
                self.server.crash();
                self.at(self.now + long / 2, Event::StartServer);
            }
            12 | 13 => {
                let loss = self.rng.random_range(0..300);
                let delay = self.rng.random_range(MS..400 * MS);
                self.say(|| {
                    format!(
                        "the network loses {loss} of 1000 and takes up to {} ms",
                        delay / MS
                    )
                });
                self.loss_permille = loss;
                self.delay_max = delay;
                self.at(self.now + long, Event::Heal);
            }
            16 => {
                self.say(|| format!("no node hears another for {} ms", long / MS));
                for from in 0..self.hosts.len() {
                    for to in 0..self.hosts.len() {
                        self.links[from][to] = from == to;
                    }
                }
                self.at(self.now + long, Event::Heal);
            }
            14 | 15 => {
                let late = self.rng.random_range(500 * MS..7 * S);
                self.say(|| format!("n{} is reached {} ms late", node + 1, late / MS));
                self.congested = Some((node, late));
                self.at(self.now + long, Event::Heal);
            }
            20 => self.cut_from_leader(node, 2 * long),
            21 | 22 => self.stop_as_planned(node),
            24 => {
                self.say(|| format!("the storage refuses every claim for {} ms", long / MS));
                self.server_denies_until = self.now + long;
            }
            23 => {
                let until = self.now + 2 * long;
                self.say(|| {
                    format!(
                        "the replica of n{} hangs for {} ms",
                        node + 1,
                        2 * long / MS
                    )
                });
                self.hosts[node].hangs_until = until;
            }
            17 => {
                self.say(|| format!("the storage is full for {} ms", long / MS));
                self.server_full_until = self.now + long;
            }
            18 if self.rng.random_ratio(1, 80) => self.sleep_for_an_hour(node),
            18 => {
                // The Raft log cannot be written: the daemon stops, and is started again when there is room.
                self.say(|| format!("the disk of n{} is full for {} ms", node + 1, long / MS));
                self.kill_daemon(node);
                self.at(self.now + long, Event::StartDaemon { node });
            }
            _ => {
                let off = self.rng.random_range(-7_200_000..7_200_000);
                self.say(|| format!("the wall clock of n{} jumps to {off} ms off", node + 1));
                self.hosts[node].wall_off_ms = off;
            }
        }
        let next = self.now + self.rng.random_range(200 * MS..5 * S);
        self.at(next, Event::Fault);
    }

    /// A host stands still for an hour, and then goes on as if nothing had been; everybody else is calm by then.
    fn sleep_for_an_hour(&mut self, node: usize) {
        if self.asleep.is_some() || self.now + S >= self.calm_at {
            return;
        }
        self.say(|| format!("n{} stands still for an hour", node + 1));
        let until = self.now + HOUR;
        self.asleep = Some((node, until));
        self.end_at += HOUR;
        self.hosts[node].paused_until = until;
        for monitor in self.hosts[node].monitors.values_mut() {
            monitor.pause(until);
        }
        self.at(until + S, Event::Calm);
    }

    /// Whether that host stands still for an hour, and has not gone on.
    fn is_asleep(&self, node: usize) -> bool {
        self.asleep
            .is_some_and(|(asleep, until)| asleep == node && self.now < until)
    }

    pub(crate) fn kill_daemon(&mut self, node: usize) {
        self.say(|| format!("clusterd of n{} is killed", node + 1));
        self.hosts[node].daemon = None;
        self.hosts[node].paused_until = 0;
    }

    /// A `clusterd` that was told to stop is gone.
    pub fn end_daemon(&mut self, node: usize) {
        self.say(|| format!("clusterd of n{} has stopped", node + 1));
        self.hosts[node].daemon = None;
        self.hosts[node].paused_until = 0;
    }

    /// What came back from an absence is gone again, longer than a lease.
    pub fn gone_again(&mut self, node: usize) {
        if self.now >= self.calm_at {
            return;
        }
        let long = self.rng.random_range(5 * S..25 * S);
        match self.rng.random_range(0..3) {
            0 => self.cut("from the other nodes", node, true, true, false, long),
            1 => self.kill_daemon(node),
            _ => {
                self.say(|| format!("clusterd of n{} is stopped for {} ms", node + 1, long / MS));
                self.hosts[node].paused_until = self.now + long;
            }
        }
    }

    fn power_off(&mut self, node: usize) {
        self.say(|| format!("n{} loses power", node + 1));
        let nonces: Vec<u64> = self.hosts[node].monitors.keys().copied().collect();
        for nonce in nonces {
            self.end_monitor(node, nonce, "power loss");
        }
        let host = &mut self.hosts[node];
        host.daemon = None;
        host.paused_until = 0;
        host.up = false;
    }

    /// A host boots: a new life, a clock that begins again.
    pub fn boot(&mut self, node: usize) {
        if self.hosts[node].up {
            return;
        }
        let now = self.now;
        let host = &mut self.hosts[node];
        host.up = true;
        host.booted_at = now;
        host.incarnation += 1;
        self.say(|| format!("n{} boots", node + 1));
        self.start_daemon(node);
    }

    fn cut(&mut self, how: &str, node: usize, out: bool, into: bool, storage: bool, long: u64) {
        let line = format!("n{} is cut off {how} for {} ms", node + 1, long / MS);
        self.say(|| line);
        let server = self.hosts.len();
        for other in 0..server {
            if other != node {
                self.links[node][other] &= !out;
                self.links[other][node] &= !into;
            }
        }
        if storage {
            self.links[node][server] = false;
            self.links[server][node] = false;
        }
        self.at(self.now + long, Event::Heal);
    }

    /// A node loses the leader it knows, or its neighbour where it leads itself, and nobody else.
    fn cut_from_leader(&mut self, node: usize, long: u64) {
        let leader = self.hosts[node].raft.leader;
        let leader = leader.filter(|&leader| leader != node);
        let peer = leader.unwrap_or((node + 1) % self.hosts.len());
        let (there, back) = match self.rng.random_range(0..4) {
            0 => (true, false),
            1 => (false, true),
            _ => (true, true),
        };
        self.say(|| {
            let (from, to) = (node + 1, peer + 1);
            let how = match (there, back) {
                (true, true) => format!("n{from} and n{to} do not hear each other"),
                (true, false) => format!("n{to} does not hear n{from}"),
                _ => format!("n{from} does not hear n{to}"),
            };
            format!("{how} for {} ms", long / MS)
        });
        self.links[node][peer] &= !there;
        self.links[peer][node] &= !back;
        self.at(self.now + long, Event::Heal);
    }

    /// Links are whole again.
    pub fn heal(&mut self) {
        self.say(|| "the network is whole".into());
        for row in &mut self.links {
            row.fill(true);
        }
        self.loss_permille = 0;
        self.congested = None;
        self.delay_max = 2 * MS;
    }

    /// All trouble ends: what is down comes up, what was drained is taken back.
    pub fn calm(&mut self) {
        self.say(|| "calm".into());
        self.heal();
        if !self.server.up {
            self.server.start();
        }
        self.server_full_until = 0;
        self.server_denies_until = 0;
        for node in 0..self.hosts.len() {
            if self.is_asleep(node) {
                continue;
            }
            self.hosts[node].paused_until = 0;
            self.hosts[node].hangs_until = 0;
            for monitor in self.hosts[node].monitors.values_mut() {
                monitor.paused_until = 0;
            }
            self.boot(node);
            self.start_daemon(node);
        }
        let state = self.truth.state.clone();
        for node in state
            .nodes
            .values()
            .filter(|node| node.duty != Duty::Active)
        {
            self.ask_for(Command::Uncordon {
                node: node.id,
                failback: false,
            });
        }
        for vm in state.vms.keys() {
            self.ask_for(Command::SetDesired {
                vm: *vm,
                desired: Desired::Running,
                forced: false,
            });
        }
        // Once more, if nobody led just then. Without the pre-vote, which this model of the log does not have, a node
        // with a short log can keep the others from leading for ten seconds and more (seed 52,899).
        if self.now < self.end_at.saturating_sub(30 * S) {
            let waits = self.asleep.is_some_and(|(_, until)| self.now < until);
            let next = self.now + if waits { 60 * S } else { 5 * S };
            self.at(next, Event::Calm);
        }
    }

    /// Somebody asks for something.
    pub fn operate(&mut self) {
        if self.now >= self.calm_at {
            return;
        }
        let state = self.truth.state.clone();
        let vms: Vec<VmId> = state.vms.keys().copied().collect();
        let vm = vms[self.rng.random_range(0..vms.len())];
        let node = node_id(self.rng.random_range(0..self.hosts.len()));
        match self.rng.random_range(0..13) {
            10 => self.ask_for(Command::SetDesired {
                vm,
                desired: Desired::Stopped,
                forced: true,
            }),
            11 | 12 => {
                if let Some(migration) = state.active_migration(vm) {
                    self.ask_for(Command::AbortMigration {
                        migration: migration.id,
                        reason: "cancelled by admin".into(),
                    });
                }
            }
            0..=6 => {
                if state.vms[&vm].ownership.owner != Some(node) {
                    self.ask_for(Command::QueueMigration {
                        vm,
                        to: node,
                        options: MigrationOptions::default(),
                        cause: MigrationCause::Asked,
                        why: Why::rule("asked"),
                    });
                }
            }
            7 => {
                let desired = match state.vms[&vm].desired {
                    Desired::Running => Desired::Stopped,
                    Desired::Stopped => Desired::Running,
                };
                self.ask_for(Command::SetDesired {
                    vm,
                    desired,
                    forced: false,
                });
            }
            8 => self.ask_for(Command::StartDrain {
                node,
                reason: "asked".into(),
            }),
            _ => {
                let drained: BTreeSet<_> = state
                    .nodes
                    .values()
                    .filter(|node| node.duty != Duty::Active)
                    .map(|node| node.id)
                    .collect();
                for node in drained {
                    self.ask_for(Command::Uncordon {
                        node,
                        failback: true,
                    });
                }
            }
        }
        let next = self.now + self.rng.random_range(300 * MS..3 * S);
        self.at(next, Event::Operate);
    }

    /// A person's command, to whichever node leads.
    fn ask_for(&mut self, command: Command) {
        let number = self.number();
        let leader = (0..self.hosts.len()).find(|&node| {
            self.hosts[node].daemon.is_some() && self.hosts[node].raft.leader == Some(node)
        });
        let Some(leader) = leader else { return };
        let envelope = Arc::new(Envelope {
            request: RequestId(format!("admin/{number}")),
            actor: "admin".into(),
            at_ms: self.wall_ms(leader),
            asked: None,
            command,
        });
        let message = Message::Propose {
            rpc: number,
            envelope,
        };
        let to = Place::Daemon(leader);
        // Somebody who hears nothing asks again, and not always the same node.
        if self.rng.random_ratio(1, 4) {
            let again = self.now + self.rng.random_range(100 * MS..4 * S);
            let other = Place::Daemon(self.rng.random_range(0..self.hosts.len()));
            let message = message.clone();
            let (from, to) = (to, other);
            self.at(again, Event::Arrive { from, to, message });
        }
        self.send(to, to, message);
    }
}
