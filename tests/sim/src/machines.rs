//! What monitors and their guests do: write, flush, check, freeze, and move. A monitor's phases are those of the
//! product's table (`cluster_model::phase`).

use cluster_model::phase::{self, Phase};
use cluster_model::{MigrationId, MonitorView, Side, Token, VmId};
use rand::Rng;

use crate::monitor::{Guest, MonitorCall, Part, Pending};
use crate::mutants::Mutant;
use crate::storage::{Answer, BLOCKS, Call};
use crate::world::{Event, MS, Message, Place, S, World};

/// A call that has no answer for this long will have none.
const CALL_PATIENCE: u64 = 2 * S;
/// Writes between two flushes.
const WRITES: usize = 3;

impl World {
    /// A permit was used: the guest runs.
    pub fn run_guest(&mut self, node: usize, nonce: u64, deadline: u64) {
        self.counts.runs += 1;
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        let (vm, token) = (monitor.vm, monitor.token);
        monitor.phase = Phase::Running;
        monitor.in_guest = true;
        monitor.said_quiet = false;
        monitor.deadline = monitor.deadline.max(deadline);
        let deadline = monitor.deadline;
        let goes_on = std::mem::take(&mut monitor.goes_on_to_quiet);
        self.say(|| format!("n{}: {vm} runs under {token}", node + 1));
        crate::invariants::runs(self, node, nonce);
        self.wake_guest(node, nonce);
        self.arm(node, nonce, deadline);
        if goes_on {
            self.quiet(node, nonce);
            if let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) {
                (monitor.phase, monitor.in_guest) = (Phase::Running, true);
            }
        }
    }

    /// The guest's steps go on.
    fn wake_guest(&mut self, node: usize, nonce: u64) {
        let at = self.now + self.rng.random_range(MS..5 * MS);
        if let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce)
            && !std::mem::replace(&mut monitor.ticking, true)
        {
            self.at(at, Event::Guest { node, nonce });
        }
    }

    /// The timer of a deadline; like every timer it comes a little late.
    pub fn arm(&mut self, node: usize, nonce: u64, deadline: u64) {
        let due = deadline.saturating_sub(self.clock(node));
        let late = match self.rng.random_ratio(1, 30) {
            true => self.rng.random_range(0..200 * MS),
            false => self.rng.random_range(0..3 * MS),
        };
        let at = self.after(node, due) + late;
        self.at(at, Event::Deadline { node, nonce });
    }

    /// A monitor says how it stands; its daemon hears of it, usually soon.
    pub fn publish(&mut self, node: usize, nonce: u64) {
        let clock = self.clock(node);
        let late = match self.rng.random_ratio(1, 25) {
            true => self.rng.random_range(0..500 * MS),
            false => self.rng.random_range(10..2 * MS),
        };
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        monitor.said += 1;
        let (said, view) = (monitor.said, Box::new(monitor.view(clock)));
        let event = Event::Arrive {
            from: Place::Monitor(node, nonce),
            to: Place::Daemon(node),
            message: Message::Status { said, view },
        };
        self.at(self.now + late, event);
    }

    /// A daemon hears how one of its monitors stands: an older word than it has counts for nothing.
    pub fn described(&mut self, node: usize, said: u64, view: MonitorView) {
        if let Some(daemon) = self.daemon(node)
            && let Some(known) = daemon.sight.get_mut(&view.nonce)
            && known.0 < said
        {
            *known = (said, view);
        }
    }

    /// A monitor process ends.
    pub fn end_monitor(&mut self, node: usize, nonce: u64, why: &str) {
        if let Some(monitor) = self.hosts[node].monitors.remove(&nonce) {
            let vm = monitor.vm;
            self.say(|| format!("n{}: the monitor of {vm} ends: {why}", node + 1));
            self.stream_breaks(node, &monitor.part, "the other side ended");
            let late = self.now + self.rng.random_range(MS..100 * MS);
            let (from, to) = (Place::Monitor(node, nonce), Place::Daemon(node));
            let message = Message::Gone { nonce };
            self.at(late, Event::Arrive { from, to, message });
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
            return;
        }
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        // One that stops, for a cutover or for good, has its vCPUs out of the guest already; its drain ends with its
        // lease too.
        if monitor.deadline <= clock && matches!(monitor.phase, Phase::Running | Phase::Stopping) {
            monitor.step(phase::Event::LeaseLapsed);
            let vm = monitor.vm;
            self.say(|| format!("n{}: {vm} freezes", node + 1));
            self.publish(node, nonce);
        }
    }

    /// What a daemon asks of a monitor.
    fn asked(&mut self, node: usize, nonce: u64, rpc: u64, call: MonitorCall) {
        let clock = self.clock(node);
        let goes_on = self.mutant == Some(Mutant::QuietWhileRunning);
        let thaws = self.mutant == Some(Mutant::QuietSourceThaws);
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        let older = |monitor: &crate::monitor::Monitor, token: Token| {
            (token < monitor.highest).then(|| format!("{token} is older than {}", monitor.highest))
        };
        let refused = match call {
            MonitorCall::Describe => None,
            MonitorCall::Run { token, deadline } => {
                let refused = older(monitor, token);
                monitor.highest = monitor.highest.max(token);
                // A monitor has a lock of its own before this door: the mutant leaves it out too.
                if thaws && monitor.phase == (Phase::Quiet { rekeyed: false }) {
                    monitor.phase = Phase::Frozen;
                }
                if refused.is_some() {
                    refused
                } else if token != monitor.token {
                    Some("re-key first".into())
                } else if deadline <= clock {
                    Some("the permit's lease has ended".into())
                } else if let Err(why) = monitor.phase.after(phase::Event::Permitted) {
                    Some(why.to_string())
                } else {
                    self.run_guest(node, nonce, deadline);
                    None
                }
            }
            MonitorCall::Rekey(token) => {
                let refused = older(monitor, token);
                monitor.highest = monitor.highest.max(token);
                if monitor.phase == Phase::Stopping && goes_on {
                    monitor.step(phase::Event::GaveUp);
                    monitor.goes_on_to_quiet = true;
                }
                if refused.is_none() && monitor.token < token && monitor.phase == Phase::Running {
                    monitor.step(phase::Event::LeaseLapsed);
                }
                let refused = refused.or_else(|| {
                    let after = monitor.phase.after(phase::Event::Rekeyed);
                    after.err().map(|why| why.to_string())
                });
                if refused.is_none() {
                    let wants =
                        monitor.in_doubt || monitor.phase == Phase::Refused { rekeyed: false };
                    if monitor.token != token || wants {
                        monitor.take_up(token);
                    }
                    if monitor.again.is_empty() {
                        monitor.step(phase::Event::Rekeyed);
                    } else {
                        // Answered when everything is sent again.
                        monitor.rekeying = Some(rpc);
                        return self.wake_guest(node, nonce);
                    }
                }
                refused
            }
            MonitorCall::Stop { token, forced } => {
                let refused = older(monitor, token);
                monitor.highest = monitor.highest.max(token);
                let refused = refused.or_else(|| {
                    let after = monitor.phase.after(phase::Event::ShutDown);
                    after.err().map(|why| why.to_string())
                });
                if refused.is_none() {
                    monitor.stop_asked = true;
                    monitor.in_guest = false;
                    if forced || monitor.phase != Phase::Running {
                        monitor.undrained = true;
                        monitor.step(phase::Event::ShutDown);
                    }
                    let part = monitor.part.clone();
                    if let Some(part) = monitor.part.as_mut()
                        && part.side == Side::Source
                    {
                        part.failed = Some("the machine is being stopped".into());
                    }
                    self.stream_breaks(node, &part, "the machine is being stopped");
                }
                refused
            }
            MonitorCall::Send {
                migration,
                peer,
                peer_nonce,
            } => match monitor.phase {
                Phase::Running => {
                    self.begin_sending(node, nonce, migration, peer, peer_nonce);
                    None
                }
                phase => Some(format!("it is {phase}")),
            },
            MonitorCall::CancelSend(migration) => {
                let part = monitor.part.as_mut();
                if let Some(part) = part.filter(|part| part.id == migration) {
                    part.failed = Some("the migration was aborted".into());
                    self.give_up_cutover(node, nonce);
                }
                None
            }
        };
        self.reply(node, nonce, rpc, refused);
    }

    /// A monitor's reply, with how it stands by then.
    fn reply(&mut self, node: usize, nonce: u64, rpc: u64, refused: Option<String>) {
        let clock = self.clock(node);
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        monitor.said += 1;
        let message = Message::Told {
            rpc,
            refused,
            said: monitor.said,
            view: Some(monitor.view(clock)),
        };
        self.send(Place::Monitor(node, nonce), Place::Daemon(node), message);
    }

    /// The cutover was given up before *quiet*: the guest goes on by the permit that it had, if its lease still runs.
    fn give_up_cutover(&mut self, node: usize, nonce: u64) {
        let clock = self.clock(node);
        if let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce)
            && monitor.phase == Phase::Stopping
        {
            monitor.step(phase::Event::GaveUp);
            if monitor.deadline > clock {
                monitor.step(phase::Event::Permitted);
                let deadline = monitor.deadline;
                self.arm(node, nonce, deadline);
            }
            self.publish(node, nonce);
        }
    }

    /// The guest's next step, and its disk's.
    pub fn guest_step(&mut self, node: usize, nonce: u64) {
        let (clock, now) = (self.clock(node), self.now);
        let next = self.now + self.rng.random_range(15 * MS..60 * MS);
        let look_at_disk = self.rng.random_ratio(1, 6);
        let enters_late = self.mutant == Some(Mutant::EntersPastDeadline);
        let witnesses = &self.truth.witness;
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        let witness = witnesses.get(&monitor.vm).copied().unwrap_or(0);
        // A vCPU looks at the deadline before it enters the guest.
        let open = monitor.phase == Phase::Running && !monitor.stop_asked;
        let ahead = clock < monitor.deadline;
        monitor.in_guest = open && (ahead || enters_late || self.mutant == Some(Mutant::NoFreeze));
        if open && !monitor.in_guest {
            monitor.ticking = false;
            return self.deadline(node, nonce);
        }
        let executes = monitor.in_guest;
        let stopping = monitor.phase == Phase::Stopping;
        let stops = monitor.phase == Phase::Running && monitor.stop_asked;
        let rekeys = monitor.rekeying.is_some();
        if !(executes || stopping || stops || rekeys) {
            monitor.ticking = false;
            return;
        }
        let idle = monitor.calls.is_empty();
        let (vm, token) = (monitor.vm, monitor.token);
        let read = (Pending::Read(witness), Call::Read { vm, token });
        let write = |sequence| {
            let call = Call::Write {
                vm,
                token,
                sequence,
            };
            (Pending::Write(sequence), call)
        };
        let mut call = None;
        if executes {
            monitor.guest.steps += 1;
        }
        if monitor.in_doubt {
            // Its disk waits for a re-key.
        } else if idle && !monitor.again.is_empty() {
            call = Some(write(monitor.again.remove(0)));
        } else if rekeys {
            if idle {
                monitor.step(phase::Event::Rekeyed);
                if let Some(rpc) = monitor.rekeying.take() {
                    self.reply(node, nonce, rpc, None);
                }
            }
        } else if !monitor.guest.booted && executes {
            call = idle.then_some(read);
        } else if idle
            && (monitor.guest.uncommitted.len() >= WRITES
                || ((stopping || stops) && !monitor.guest.uncommitted.is_empty()))
        {
            let upto = monitor.guest.written;
            call = Some((Pending::Commit(upto), Call::Commit { vm, token }));
        } else if stopping && (idle || self.mutant == Some(Mutant::QuietWithWritesOut)) {
            monitor.ticking = false;
            return self.quiet(node, nonce);
        } else if idle && stops {
            monitor.step(phase::Event::ShutDown);
            monitor.ticking = false;
            return self.publish(node, nonce);
        } else if executes && idle && look_at_disk {
            call = Some(read);
        } else if executes
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
            call = Some(write(number));
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

    /// A disk wants a fresh token.
    fn refuse(&mut self, node: usize, nonce: u64, why: &str) {
        let goes_on = self.mutant == Some(Mutant::QuietWhileRunning);
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        let was = monitor.phase;
        if matches!(was, Phase::Stopped | Phase::Failed) {
            return;
        }
        if goes_on && was == Phase::Stopping {
            monitor.goes_on_to_quiet = true;
        }
        monitor.step(phase::Event::DiskRefused);
        let rekeying = monitor.rekeying.take();
        let vm = monitor.vm;
        let part = monitor.part.clone();
        let sends = matches!(was, Phase::Running | Phase::Frozen | Phase::Stopping);
        if let Some(part) = &mut monitor.part
            && part.side == Side::Source
            && part.failed.is_none()
            && sends
            && !goes_on
        {
            part.failed = Some("the guest's disk stopped".into());
        }
        self.say(|| format!("n{}: {vm} is refused: {why}", node + 1));
        if part.as_ref().is_some_and(|part| part.side == Side::Source) && sends && !goes_on {
            self.stream_breaks(node, &part, why);
        }
        if let Some(rpc) = rekeying {
            self.reply(node, nonce, rpc, Some(why.to_owned()));
        }
        self.publish(node, nonce);
    }

    /// A message for a monitor.
    pub fn monitor_hears(&mut self, node: usize, nonce: u64, message: Message) {
        match message {
            Message::Answer { rpc, answer } => self.answered(node, nonce, rpc, answer),
            Message::Ask { rpc, call } => self.asked(node, nonce, rpc, call),
            Message::Quiet { migration } => {
                if let Some(part) = self.receiving(node, nonce, migration) {
                    part.quiet_received = true;
                }
                self.publish(node, nonce);
            }
            Message::Final { migration, guest } => {
                if self.receiving(node, nonce, migration).is_some()
                    && let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce)
                    && monitor.step(phase::Event::Arrived)
                {
                    monitor.guest = guest;
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
                self.publish(node, nonce);
            }
            Message::Broken { migration, why } => {
                if let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce)
                    && !matches!(monitor.phase, Phase::Complete)
                    && let Some(part) = &mut monitor.part
                    && part.id == migration
                    && part.failed.is_none()
                    && (part.side == Side::Source || monitor.phase == Phase::Incoming)
                {
                    part.failed = Some(why);
                    self.give_up_cutover(node, nonce);
                }
                self.publish(node, nonce);
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
    fn begin_sending(
        &mut self,
        node: usize,
        nonce: u64,
        migration: MigrationId,
        peer: usize,
        peer_nonce: u64,
    ) {
        let takes = self.rng.random_range(50 * MS..2 * S);
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        monitor.part = Some(Part {
            id: migration,
            side: Side::Source,
            peer,
            peer_nonce: Some(peer_nonce),
            quiet_received: false,
            failed: None,
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
        let here = Place::Monitor(node, nonce);
        let there = Place::Monitor(peer, peer_nonce);
        let there_lives = self.hosts[peer].monitors.contains_key(&peer_nonce);
        let whole = self.reaches(here, there) && self.reaches(there, here) && there_lives;
        if let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) {
            let runs = monitor.in_guest;
            let stops = whole && runs && monitor.step(phase::Event::StopForCutover);
            if let Some(part) = monitor.part.as_mut().filter(|_| !stops) {
                part.failed = Some(match runs {
                    true => "the link to the destination broke".into(),
                    false => "the guest does not run".into(),
                });
            }
        }
        self.publish(node, nonce);
    }

    /// Every answer is in and committed: quiet, and then the last of the memory.
    fn quiet(&mut self, node: usize, nonce: u64) {
        let forced = self.mutant == Some(Mutant::QuietWhileRunning);
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return;
        };
        if !monitor.step(phase::Event::SaidQuiet) && !forced {
            return;
        }
        monitor.said_quiet = !forced || monitor.phase == Phase::Quiet { rekeyed: false };
        let vm = monitor.vm;
        let Some(part) = monitor.part.as_ref() else {
            return;
        };
        let (migration, peer) = (
            part.id,
            Place::Monitor(part.peer, part.peer_nonce.unwrap_or(0)),
        );
        let guest: Guest = monitor.guest.clone();
        self.say(|| format!("n{}: {vm} is quiet", node + 1));
        let here = Place::Monitor(node, nonce);
        self.send(here, peer, Message::Quiet { migration });
        self.send(here, peer, Message::Final { migration, guest });
        self.publish(node, nonce);
    }
}
