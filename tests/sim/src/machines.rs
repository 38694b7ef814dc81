//! What monitors and their guests do: write, flush, check, freeze, and move.

use std::sync::Arc;

use cluster_model::{ClusterState, MigrationId, MonitorPhase, Side, VmId};
use rand::Rng;

use crate::monitor::{Guest, Part, Pending};
use crate::mutants::Mutant;
use crate::storage::{Answer, BLOCKS, Call};
use crate::world::{Event, MS, Message, Place, S, World, node_of};

/// A call that has no answer for this long will have none.
const CALL_PATIENCE: u64 = 2 * S;
/// Writes between two flushes.
const WRITES: usize = 3;

impl World {
    /// A permit was used: the guest runs.
    pub fn run_guest(&mut self, node: usize, nonce: u64, deadline: u64) {
        let clock = self.clock(node);
        self.counts.runs += 1;
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        let (vm, token) = (monitor.vm, monitor.token);
        monitor.phase = MonitorPhase::Running;
        monitor.said_quiet = false;
        monitor.deadline = monitor.deadline.max(deadline);
        let ticking = std::mem::replace(&mut monitor.ticking, true);
        let part = monitor.part.as_mut();
        let stopping = part.is_some_and(|part| std::mem::take(&mut part.stopping));
        let due = monitor.deadline.saturating_sub(clock);
        self.say(|| format!("n{}: {vm} runs under {token}", node + 1));
        crate::invariants::runs(self, node, nonce);
        if !ticking {
            let at = self.now + self.rng.random_range(MS..5 * MS);
            self.at(at, Event::Guest { node, nonce });
        }
        let at = self.after(node, due);
        self.at(at, Event::Deadline { node, nonce });
        if stopping && self.mutant == Some(Mutant::QuietWhileRunning) {
            self.quiet(node, nonce);
            if let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) {
                (monitor.phase, monitor.ticking) = (MonitorPhase::Running, true);
            }
        }
    }

    /// A monitor process ends.
    pub fn end_monitor(&mut self, node: usize, nonce: u64, why: &str) {
        if let Some(monitor) = self.hosts[node].monitors.remove(&nonce) {
            let vm = monitor.vm;
            self.say(|| format!("n{}: the monitor of {vm} ends: {why}", node + 1));
            self.stream_breaks(node, &monitor.part, "the other side ended");
        }
    }

    fn stream_breaks(&mut self, node: usize, part: &Option<Part>, why: &str) {
        if let Some(part) = part
            && let Some(nonce) = part.peer_nonce
            && part.failed.is_none()
        {
            let message = Message::Broken {
                migration: part.id,
                why: why.into(),
            };
            let to = Place::Monitor(part.peer, nonce);
            self.send(Place::Monitor(node, 0), to, message);
        }
    }

    /// The deadline may have passed: the guest freezes.
    pub fn deadline(&mut self, node: usize, nonce: u64) {
        let clock = self.clock(node);
        if self.mutant == Some(Mutant::NoFreeze) {
            if let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce)
                && monitor.deadline <= clock
            {
                monitor.deadline = clock + 3_600 * S;
            }
            return;
        }
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        if monitor.deadline <= clock && monitor.phase == MonitorPhase::Running {
            monitor.phase = MonitorPhase::Frozen;
            let vm = monitor.vm;
            self.say(|| format!("n{}: {vm} freezes", node + 1));
            self.look(node);
        }
    }

    /// The guest's next step.
    pub fn guest_step(&mut self, node: usize, nonce: u64) {
        let (clock, now) = (self.clock(node), self.now);
        let next = self.now + self.rng.random_range(15 * MS..60 * MS);
        let look_at_disk = self.rng.random_ratio(1, 6);
        let witnesses = &self.truth.witness;
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        let witness = witnesses.get(&monitor.vm).copied().unwrap_or(0);
        let mut call = None;
        // The source stops its guest for the cutover, and the I/O goes on until every answer is in.
        let stopping = monitor.phase == MonitorPhase::Running
            && clock < monitor.deadline
            && monitor.part.as_ref().is_some_and(|part| part.stopping);
        let executes = monitor.executes(clock, now);
        if (executes || stopping) && !monitor.in_doubt {
            if executes {
                monitor.guest.steps += 1;
            }
            if !monitor.guest.booted {
                if monitor.calls.is_empty() {
                    call = Some((
                        Pending::Read(witness),
                        Call::Read {
                            vm: monitor.vm,
                            token: monitor.token,
                        },
                    ));
                }
            } else if monitor.calls.is_empty() && !monitor.again.is_empty() {
                let number = monitor.again.remove(0);
                call = Some((
                    Pending::Write(number),
                    Call::Write {
                        vm: monitor.vm,
                        token: monitor.token,
                        sequence: number,
                    },
                ));
            } else if monitor.calls.is_empty()
                && (monitor.guest.uncommitted.len() >= WRITES
                    || ((stopping || monitor.stop_asked) && !monitor.guest.uncommitted.is_empty()))
            {
                call = Some((
                    Pending::Commit(monitor.guest.written),
                    Call::Commit {
                        vm: monitor.vm,
                        token: monitor.token,
                    },
                ));
            } else if monitor.calls.is_empty() && stopping {
                return self.quiet(node, nonce);
            } else if monitor.calls.is_empty() && monitor.stop_asked {
                monitor.phase = MonitorPhase::Stopped;
                monitor.ticking = false;
                return self.look(node);
            } else if executes && monitor.calls.is_empty() && look_at_disk {
                call = Some((
                    Pending::Read(witness),
                    Call::Read {
                        vm: monitor.vm,
                        token: monitor.token,
                    },
                ));
            } else if executes
                && !monitor.stop_asked
                && monitor.again.is_empty()
                && monitor.calls.len() < 2
                && monitor
                    .calls
                    .values()
                    .all(|(_, what, _)| matches!(what, Pending::Write(_)))
                && monitor.guest.uncommitted.len() + monitor.calls.len() < WRITES
            {
                monitor.guest.written += 1;
                let number = monitor.guest.written;
                monitor.guest.expects[number as usize % BLOCKS] = number;
                call = Some((
                    Pending::Write(number),
                    Call::Write {
                        vm: monitor.vm,
                        token: monitor.token,
                        sequence: number,
                    },
                ));
            }
            if stopping && self.mutant == Some(Mutant::QuietWithWritesOut) {
                return self.quiet(node, nonce);
            }
        }
        if let Some((what, call)) = call {
            let rpc = self.number();
            if let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) {
                let token = monitor.token;
                monitor.calls.insert(rpc, (now, what, token));
            }
            self.send(
                Place::Monitor(node, nonce),
                Place::Server,
                Message::Call { rpc, call },
            );
            let late = self.now + CALL_PATIENCE;
            self.at(late, Event::CallLate { node, nonce, rpc });
        }
        self.at(next, Event::Guest { node, nonce });
    }

    /// A call has had no answer for long: what became of a write is not known.
    pub fn call_late(&mut self, node: usize, nonce: u64, rpc: u64) {
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        let Some((_, what, token)) = monitor.calls.get(&rpc).cloned() else {
            return;
        };
        if token != monitor.token {
            return;
        }
        match what {
            // Asked again; nothing depends on it.
            Pending::Read(_) | Pending::Commit(_) => {
                monitor.calls.remove(&rpc);
            }
            Pending::Write(_) => {
                monitor.in_doubt = true;
                self.refuse(node, nonce, "a write has no answer");
            }
        }
    }

    fn refuse(&mut self, node: usize, nonce: u64, why: &str) {
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        if !matches!(monitor.phase, MonitorPhase::Running | MonitorPhase::Frozen) {
            return;
        }
        monitor.phase = MonitorPhase::Refused;
        let vm = monitor.vm;
        let part = monitor.part.clone();
        let goes_on = self.mutant == Some(Mutant::QuietWhileRunning);
        if let Some(part) = &mut monitor.part
            && part.side == Side::Source
            && part.failed.is_none()
            && !goes_on
        {
            part.failed = Some("the guest's disk stopped".into());
            part.stopping = false;
        }
        self.say(|| format!("n{}: {vm} is refused: {why}", node + 1));
        if part.as_ref().is_some_and(|part| part.side == Side::Source) && !goes_on {
            self.stream_breaks(node, &part, why);
        }
        self.look(node);
    }

    /// A message for a monitor.
    pub fn monitor_hears(&mut self, node: usize, nonce: u64, message: Message) {
        match message {
            Message::Answer { rpc, answer } => self.answered(node, nonce, rpc, answer),
            Message::Quiet { migration } => {
                if let Some(part) = self.receiving(node, nonce, migration) {
                    part.quiet_received = true;
                }
                self.look(node);
            }
            Message::Final { migration, guest } => {
                if self.receiving(node, nonce, migration).is_some()
                    && let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce)
                    && monitor.phase == MonitorPhase::Incoming
                {
                    monitor.guest = guest;
                    monitor.phase = MonitorPhase::Complete;
                    if let Some(part) = &mut monitor.part {
                        part.quiet_received = true;
                    }
                    if self.mutant == Some(Mutant::RunWithoutCutover) {
                        let deadline = self
                            .daemon(node)
                            .map_or(0, |daemon| daemon.lease.deadline_ns() / 1_000);
                        self.run_guest(node, nonce, deadline);
                    }
                }
                self.look(node);
            }
            Message::Broken { migration, why } => {
                if let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce)
                    && !matches!(monitor.phase, MonitorPhase::Complete)
                    && let Some(part) = &mut monitor.part
                    && part.id == migration
                    && part.failed.is_none()
                    && (part.side == Side::Source || monitor.phase == MonitorPhase::Incoming)
                {
                    part.failed = Some(why);
                    part.stopping = false;
                }
                self.look(node);
            }
            _ => {}
        }
    }

    fn receiving(&mut self, node: usize, nonce: u64, migration: MigrationId) -> Option<&mut Part> {
        self.hosts[node]
            .monitors
            .get_mut(&nonce)?
            .part
            .as_mut()
            .filter(|part| part.id == migration && part.side == Side::Destination)
    }

    fn answered(&mut self, node: usize, nonce: u64, rpc: u64, answer: Answer) {
        let mutant = self.mutant;
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        let Some((_, what, token)) = monitor.calls.remove(&rpc) else {
            return;
        };
        let vm = monitor.vm;
        if token != monitor.token {
            return;
        }
        match (what, answer) {
            (what, Answer::Refused) => {
                if let Pending::Write(number) = what {
                    monitor.again.push(number);
                    monitor.again.sort_unstable();
                }
                self.refuse(node, nonce, "the server refuses its token");
            }
            (Pending::Write(number), Answer::Done { verifier }) => {
                monitor.guest.uncommitted.insert(number, verifier);
                if mutant == Some(Mutant::FlushBeforeCommit) {
                    self.flushed(vm, number);
                }
            }
            (Pending::Commit(upto), Answer::Done { verifier }) => {
                let lost = monitor
                    .guest
                    .uncommitted
                    .values()
                    .any(|written| *written != verifier);
                if lost && mutant != Some(Mutant::VerifierIgnored) {
                    monitor.again_everything();
                    return self.refuse(node, nonce, "the server started again since the writes");
                }
                let done = monitor.guest.uncommitted.keys().max().copied();
                monitor.guest.uncommitted.clear();
                if let Some(done) = done {
                    self.flushed(vm, done.min(upto));
                }
            }
            (Pending::Read(witness), Answer::Content { blocks }) => {
                let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
                    return;
                };
                if let Some(wrong) = monitor.check(&blocks, witness) {
                    crate::invariants::lost(self, wrong);
                }
            }
            _ => {}
        }
    }

    fn flushed(&mut self, vm: VmId, number: u64) {
        self.counts.flushes += 1;
        let known = self.truth.witness.entry(vm).or_insert(0);
        *known = (*known).max(number);
    }

    /// The source's monitor begins to send to the destination's.
    pub fn begin_sending(
        &mut self,
        node: usize,
        vm: VmId,
        migration: MigrationId,
        peer_nonce: u64,
        state: &Arc<ClusterState>,
    ) {
        let Some(known) = state.migrations.get(&migration) else {
            return;
        };
        let peer = node_of(known.to);
        let takes = self.rng.random_range(50 * MS..2 * S);
        let Some(monitor) = self.hosts[node]
            .monitors
            .values_mut()
            .find(|monitor| monitor.vm == vm && monitor.phase == MonitorPhase::Running)
        else {
            return;
        };
        let nonce = monitor.nonce;
        monitor.part = Some(Part {
            id: migration,
            side: Side::Source,
            peer,
            peer_nonce: Some(peer_nonce),
            quiet_received: false,
            failed: None,
            stopping: false,
        });
        if let Some(part) = self.hosts[peer]
            .monitors
            .get_mut(&peer_nonce)
            .and_then(|monitor| monitor.part.as_mut())
        {
            part.peer_nonce = Some(nonce);
        }
        self.at(self.now + takes, Event::Copied { node, nonce });
    }

    /// Enough is copied: the guest stops for the cutover, or the stream has broken meanwhile.
    pub fn copied(&mut self, node: usize, nonce: u64) {
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        let running = monitor.phase == MonitorPhase::Running;
        let Some(part) = monitor
            .part
            .as_mut()
            .filter(|part| part.side == Side::Source)
        else {
            return;
        };
        if part.failed.is_some() {
            return;
        }
        let (peer, peer_nonce) = (part.peer, part.peer_nonce.unwrap_or(0));
        if !running {
            part.failed = Some("the guest does not run".into());
            return self.look(node);
        }
        let here = Place::Monitor(node, nonce);
        let there = Place::Monitor(peer, peer_nonce);
        let there_lives = self.hosts[peer].monitors.contains_key(&peer_nonce);
        let whole = self.reaches(here, there) && self.reaches(there, here) && there_lives;
        if let Some(part) = self.hosts[node]
            .monitors
            .get_mut(&nonce)
            .and_then(|monitor| monitor.part.as_mut())
        {
            if whole {
                part.stopping = true;
            } else {
                part.failed = Some("the link to the destination broke".into());
            }
        }
        self.look(node);
    }

    /// Every answer is in and committed: quiet, and then the last of the memory.
    fn quiet(&mut self, node: usize, nonce: u64) {
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        monitor.ticking = false;
        monitor.phase = MonitorPhase::Quiet;
        monitor.said_quiet = true;
        let vm = monitor.vm;
        let Some(part) = monitor.part.as_mut() else {
            return;
        };
        part.stopping = false;
        let (migration, peer) = (
            part.id,
            Place::Monitor(part.peer, part.peer_nonce.unwrap_or(0)),
        );
        let guest: Guest = monitor.guest.clone();
        self.say(|| format!("n{}: {vm} is quiet", node + 1));
        let here = Place::Monitor(node, nonce);
        self.send(here, peer, Message::Quiet { migration });
        self.send(here, peer, Message::Final { migration, guest });
        self.look(node);
    }
}
