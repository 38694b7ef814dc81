//! Carries out the steps of the agent's flows, as `clusterd` does: the same flows, in a world where a step may be late,
//! be stopped in the middle, or never come back.
//!
//! Between any two steps the daemon may be killed or stopped, or simply be slow; a call to a stopped monitor waits
//! in its socket and is carried out when it goes on; what is known of a monitor is what it said last.

use std::sync::Arc;

use cluster_model::agent::{Ended, Work};
use cluster_model::flow::{Answer, Failure, FailureKind, Flow as Core, Next, Ready, Seen, Step};
use cluster_model::phase::Phase;
use cluster_model::{
    ClusterState, Command, Envelope, MigrationId, Reply, RequestId, Side, Token, VmId,
};
use rand::Rng;

use crate::monitor::{Monitor, MonitorCall, Part};
use crate::storage::{self, Call};
use crate::world::{Event, MS, Message, Place, S, World, node_id, node_of};

/// A command waits for its answer this long.
const PATIENCE: u64 = 5 * S;
/// A storage call of the broker waits this long.
const CALL_PATIENCE: u64 = 2 * S;
/// A call of a monitor waits this long...
const MONITOR_PATIENCE: u64 = 5 * S;
/// ...and a re-key, which sends every held write again, this long.
const REKEY_PATIENCE: u64 = 30 * S;
/// The destination is waited for this long, once.
const ASK_PATIENCE: u64 = 3 * S;

/// What a flow waits for.
#[derive(Debug)]
enum Waits {
    /// Its first answer.
    Nothing,
    /// A moment; then this is the answer.
    Time(Answer),
    /// A moment before this step is begun.
    Held(Step),
    /// A command: what was asked, until when it is asked again, which answer, which entry.
    Command {
        envelope: Arc<Envelope>,
        until: u64,
        rpc: u64,
        applies: Option<usize>,
    },
    /// A storage call.
    Call { rpc: u64, call: Call },
    /// A confirmed index, and the entry that is to be applied here.
    Confirm { rpc: u64, applies: Option<usize> },
    /// A monitor's reply; whether its description is the answer, and whether silence is as good as one.
    Monitor { rpc: u64, view: bool, lenient: bool },
    /// The destination's word.
    Ready { rpc: u64 },
    /// A monitor that is to be ended.
    End(u64),
    /// The pause after a failure.
    Pause(Ended),
}

/// Work under way.
#[derive(Debug)]
pub struct Flow {
    /// Its number.
    pub id: u64,
    core: Core,
    waits: Waits,
    /// Counts waits: an old timer ends none but its own.
    wait: u64,
    /// The monitor that was begun.
    built: Option<u64>,
}

fn failed(kind: FailureKind, why: &str) -> Answer {
    Answer::Failed(Failure::new(kind, why))
}

impl World {
    /// The work of a flow is over: the agent takes it in.
    fn end_flow(&mut self, node: usize, ended: Ended) {
        if let Some(daemon) = self.daemon(node) {
            daemon.memory.take_in(ended);
            self.look(node);
        }
    }

    /// Begins work that was decided in `state`.
    pub fn begin_flow(&mut self, node: usize, work: Work, state: Arc<ClusterState>) {
        let id = self.number();
        self.say(|| {
            let acts: Vec<String> = work.acts.iter().map(|act| format!("{act:?}")).collect();
            format!("n{} begins {}", node + 1, acts.join(", "))
        });
        let safeguards = crate::mutants::safeguards(self.mutant);
        let flow = Flow {
            id,
            core: Core::new(node_id(node), work, state, safeguards),
            waits: Waits::Nothing,
            wait: 0,
            built: None,
        };
        self.keep(node, flow);
        self.go_on(node, id, Answer::Begin);
    }

    fn keep(&mut self, node: usize, flow: Flow) {
        if let Some(daemon) = self.daemon(node) {
            daemon.flows.insert(flow.id, flow);
        }
    }

    fn take(&mut self, node: usize, id: u64) -> Option<Flow> {
        self.daemon(node)?.flows.remove(&id)
    }

    /// What the daemon sees of a machine.
    fn seen(&mut self, node: usize, vm: VmId) -> Option<Seen> {
        let now_ns = self.clock(node) * 1_000;
        let daemon = self.daemon(node)?;
        Some(Seen {
            lease_deadline_ns: daemon.lease.deadline_ns(),
            state: daemon.state.clone(),
            monitors: daemon
                .sight
                .values()
                .filter(|(_, monitor)| monitor.vm == vm)
                .map(|(_, monitor)| monitor.clone())
                .collect(),
            now_ns,
        })
    }

    /// Answers a flow's step; it takes the next.
    fn go_on(&mut self, node: usize, id: u64, answer: Answer) {
        let Some(mut flow) = self.take(node, id) else {
            return;
        };
        let Some(seen) = self.seen(node, flow.core.vm()) else {
            return;
        };
        let next = flow.core.next(answer, &seen);
        for (act, failure) in flow.core.take_failures() {
            self.say(|| format!("n{}: {act:?} failed: {}", node + 1, failure.why));
        }
        match next {
            Next::Do(step) => {
                if self.trouble_between(node) {
                    let late = self.later_than_trouble(node);
                    return self.wait_for(node, flow, Waits::Held(step), late);
                }
                self.carry_out(node, flow, step);
            }
            Next::Over { ended, pause_ns } => {
                let until = self.after(node, pause_ns / 1_000);
                self.wait_for(node, flow, Waits::Pause(ended), until);
            }
        }
    }

    /// A step has been answered; what comes of it may come later, and rest on what was so then.
    fn answer(&mut self, node: usize, id: u64, answer: Answer) {
        if self.trouble_between(node) {
            let late = self.later_than_trouble(node);
            if let Some(flow) = self.take(node, id) {
                self.wait_for(node, flow, Waits::Time(answer), late);
            }
            return;
        }
        self.go_on(node, id, answer);
    }

    /// A while after the daemon goes on, if it is stopped.
    fn later_than_trouble(&mut self, node: usize) -> u64 {
        let from = self.hosts[node].paused_until.max(self.now);
        from + self.rng.random_range(0..2 * S)
    }

    /// Between two steps: whether the daemon does not go on at once. It may be slow, stopped for a while, or killed.
    fn trouble_between(&mut self, node: usize) -> bool {
        if self.now >= self.calm_at {
            return false;
        }
        match self.rng.random_range(0..600) {
            0 => {
                self.kill_daemon(node);
                let back = self.now + self.rng.random_range(100 * MS..6 * S);
                self.at(back, Event::StartDaemon { node });
                true
            }
            1..=3 => {
                let long = self.rng.random_range(100 * MS..9 * S);
                self.say(|| format!("n{}: stopped between two steps", node + 1));
                let host = &mut self.hosts[node];
                host.paused_until = host.paused_until.max(self.now + long);
                true
            }
            4..=20 => true,
            _ => false,
        }
    }

    fn wait_for(&mut self, node: usize, mut flow: Flow, waits: Waits, until: u64) {
        flow.waits = waits;
        flow.wait += 1;
        let (id, wait) = (flow.id, flow.wait);
        self.keep(node, flow);
        let Some(life) = self.daemon(node).map(|daemon| daemon.life) else {
            return;
        };
        let flow = id;
        self.at(
            until,
            Event::Flow {
                node,
                life,
                flow,
                wait,
            },
        );
    }

    fn carry_out(&mut self, node: usize, mut flow: Flow, step: Step) {
        let soon = self.now + self.rng.random_range(50..5 * MS);
        match step {
            Step::EnsureBroker => self.wait_for(node, flow, Waits::Time(Answer::Done), soon),
            Step::Propose(command) => self.propose(node, flow, *command),
            Step::Report { migration, .. } => {
                let summary = serde_json::json!({ "verified": true });
                self.propose(node, flow, Command::ReportMigration { migration, summary });
            }
            Step::MakeDisks { vm, token } => self.call(node, flow, Call::Make { vm, token }),
            Step::Claim { vm, token } => self.call(node, flow, Call::Claim { vm, token }),
            Step::VerifyAndCommit { vm, token } => {
                self.call(node, flow, Call::VerifyAndCommit { vm, token });
            }
            Step::Wait { ns, .. } => {
                let until = self.after(node, ns / 1_000);
                self.wait_for(node, flow, Waits::Time(Answer::Done), until);
            }
            Step::Build {
                vm,
                token,
                incoming,
            } => {
                // Whether it comes up is seen when it is waited for; the process is there from now on.
                if self.now >= self.calm_at || !self.rng.random_ratio(1, 100) {
                    flow.built = Some(self.build(node, &flow, vm, token, incoming));
                }
                let id = flow.id;
                self.keep(node, flow);
                self.go_on(node, id, Answer::Done);
            }
            Step::Built => {
                let answer = match flow.built.take() {
                    Some(nonce) => self.found(node, nonce),
                    None => failed(FailureKind::Host, "it did not start"),
                };
                let until = self.now + self.rng.random_range(MS..250 * MS);
                self.wait_for(node, flow, Waits::Time(answer), until);
            }
            Step::Confirm => self.confirm(node, flow),
            Step::Rekey { nonce, token } => {
                self.ask_monitor(node, flow, nonce, MonitorCall::Rekey(token));
            }
            Step::Run(permit) => {
                let call = MonitorCall::Run {
                    token: permit.token(),
                    deadline: permit.lease_deadline_ns() / 1_000,
                };
                self.ask_monitor(node, flow, permit.nonce(), call);
            }
            Step::End { nonce, .. } => {
                // It may say what it measured before it is killed.
                let until = self.now + self.rng.random_range(MS..350 * MS);
                self.wait_for(node, flow, Waits::End(nonce), until);
            }
            Step::Stop {
                nonce,
                token,
                forced,
            } => self.ask_monitor(node, flow, nonce, MonitorCall::Stop { token, forced }),
            Step::Refresh { nonce } => {
                self.ask_monitor(node, flow, nonce, MonitorCall::Describe);
            }
            Step::AskReady { to, migration, .. } => {
                let rpc = self.rpc(node, flow.id);
                let to = Place::Daemon(node_of(to));
                self.send(
                    Place::Daemon(node),
                    to,
                    Message::AskReady { rpc, migration },
                );
                let until = self.now + ASK_PATIENCE;
                self.wait_for(node, flow, Waits::Ready { rpc }, until);
            }
            Step::Send {
                nonce,
                migration,
                ready,
                ..
            } => {
                let state = flow.core.state();
                let peer = state.migrations.get(&migration).map(|known| known.to);
                let there = ready.addresses.first().and_then(|text| text.parse().ok());
                let call = MonitorCall::Send {
                    migration,
                    peer: peer.map_or(node, node_of),
                    peer_nonce: there.unwrap_or(0),
                };
                self.ask_monitor(node, flow, nonce, call);
            }
            Step::CancelSend { nonce, migration } => {
                self.ask_monitor(node, flow, nonce, MonitorCall::CancelSend(migration));
            }
        }
    }

    /// A number for a question of a flow.
    fn rpc(&mut self, node: usize, flow: u64) -> u64 {
        let rpc = self.number();
        if let Some(daemon) = self.daemon(node) {
            daemon.rpcs.insert(rpc, flow);
        }
        rpc
    }

    fn propose(&mut self, node: usize, flow: Flow, command: Command) {
        let number = self.number();
        let envelope = Arc::new(Envelope {
            request: RequestId(format!("n{}/{number}", node + 1)),
            actor: format!("node/n{}", node + 1),
            at_ms: self.wall_ms(node),
            asked: None,
            command,
        });
        let until = self.now + PATIENCE;
        self.ask_leader(node, flow, envelope, until);
    }

    /// Sends the flow's command to whoever leads, again and again until its patience ends.
    fn ask_leader(&mut self, node: usize, flow: Flow, envelope: Arc<Envelope>, until: u64) {
        let rpc = self.rpc(node, flow.id);
        if let Some(leader) = self.hosts[node].raft.leader {
            let envelope = envelope.clone();
            let message = Message::Propose { rpc, envelope };
            self.send(Place::Daemon(node), Place::Daemon(leader), message);
        }
        let waits = Waits::Command {
            envelope,
            until,
            rpc,
            applies: None,
        };
        let again = self.now + 400 * MS;
        self.wait_for(node, flow, waits, again);
    }

    /// A storage call of the broker, each sent once.
    fn call(&mut self, node: usize, flow: Flow, call: Call) {
        let rpc = self.rpc(node, flow.id);
        let message = Message::Call {
            rpc,
            call: call.clone(),
        };
        self.send(Place::Daemon(node), Place::Server, message);
        let until = self.now + CALL_PATIENCE;
        self.wait_for(node, flow, Waits::Call { rpc, call }, until);
    }

    fn confirm(&mut self, node: usize, flow: Flow) {
        let rpc = self.rpc(node, flow.id);
        if let Some(leader) = self.hosts[node].raft.leader {
            let (here, there) = (Place::Daemon(node), Place::Daemon(leader));
            self.send(here, there, Message::Confirm { rpc });
        }
        let until = self.now + PATIENCE;
        let applies = None;
        self.wait_for(node, flow, Waits::Confirm { rpc, applies }, until);
    }

    fn ask_monitor(&mut self, node: usize, flow: Flow, nonce: u64, call: MonitorCall) {
        if !self.hosts[node].monitors.contains_key(&nonce) {
            let soon = self.now + self.rng.random_range(50..MS);
            let answer = match call {
                MonitorCall::Describe => Answer::Done,
                _ => failed(FailureKind::Host, "the monitor is gone"),
            };
            return self.wait_for(node, flow, Waits::Time(answer), soon);
        }
        let rpc = self.rpc(node, flow.id);
        let view = matches!(call, MonitorCall::Rekey(_));
        let lenient = matches!(call, MonitorCall::Describe);
        let patience = if view {
            REKEY_PATIENCE
        } else {
            MONITOR_PATIENCE
        };
        let (here, there) = (Place::Daemon(node), Place::Monitor(node, nonce));
        self.send(here, there, Message::Ask { rpc, call });
        let until = self.now + patience;
        let waits = Waits::Monitor { rpc, view, lenient };
        self.wait_for(node, flow, waits, until);
    }

    /// A monitor process begins.
    fn build(
        &mut self,
        node: usize,
        flow: &Flow,
        vm: VmId,
        token: Token,
        incoming: Option<MigrationId>,
    ) -> u64 {
        let nonce = self.number();
        let mut monitor = Monitor::new(vm, nonce, token, Phase::Ready);
        if let Some(migration) = incoming {
            let known = flow.core.state().migrations.get(&migration);
            monitor.phase = Phase::Incoming;
            monitor.part = Some(Part {
                id: migration,
                side: Side::Destination,
                peer: known.map_or(node, |known| node_of(known.from)),
                peer_nonce: None,
                quiet_received: false,
                failed: None,
            });
        }
        self.hosts[node].monitors.insert(nonce, monitor);
        nonce
    }

    /// A monitor has described itself for the first time: it is in the table from now on.
    fn found(&mut self, node: usize, nonce: u64) -> Answer {
        let clock = self.clock(node);
        let Some(monitor) = self.hosts[node].monitors.get_mut(&nonce) else {
            return failed(FailureKind::Host, "it ended at once");
        };
        monitor.said += 1;
        let (said, view) = (monitor.said, monitor.view(clock));
        if let Some(daemon) = self.daemon(node) {
            daemon.sight.insert(nonce, (said, view.clone()));
        }
        Answer::Monitor(view)
    }

    /// An answer for a flow.
    pub fn flow_answered(&mut self, node: usize, message: Message) {
        let rpc = match &message {
            Message::Proposed { rpc, .. }
            | Message::Confirmed { rpc, .. }
            | Message::Ready { rpc, .. }
            | Message::Told { rpc, .. }
            | Message::Answer { rpc, .. } => *rpc,
            _ => return,
        };
        if let Message::Told {
            said,
            view: Some(view),
            ..
        } = &message
        {
            self.described(node, *said, view.clone());
        }
        let Some(id) = self
            .daemon(node)
            .and_then(|daemon| daemon.rpcs.remove(&rpc))
        else {
            return;
        };
        let applied = self.daemon(node).map_or(0, |daemon| daemon.applied);
        let Some(flow) = self
            .daemon(node)
            .and_then(|daemon| daemon.flows.get_mut(&id))
        else {
            return;
        };
        let answer = match (&mut flow.waits, message) {
            (
                Waits::Command {
                    rpc: asked,
                    applies,
                    ..
                },
                Message::Proposed { answer, .. },
            ) if *asked == rpc => match answer {
                Some((index, Reply::Done { .. })) if applied < index => {
                    *applies = Some(index);
                    return;
                }
                Some((_, Reply::Done { .. })) => Answer::Done,
                Some((_, Reply::Rejected(why))) => {
                    failed(FailureKind::Log, &format!("refused: {why}"))
                }
                // Asked again when the wait ends.
                None => return,
            },
            (
                Waits::Confirm {
                    rpc: asked,
                    applies,
                },
                Message::Confirmed { index, .. },
            ) if *asked == rpc => match index {
                Some(index) if applied < index => {
                    *applies = Some(index);
                    return;
                }
                Some(_) => return self.confirmed_flow(node, id),
                None => failed(FailureKind::Log, "no quorum confirms"),
            },
            (Waits::Ready { rpc: asked }, Message::Ready { nonce, .. }) if *asked == rpc => {
                match nonce {
                    Some(nonce) => Answer::Ready(Ready {
                        addresses: vec![nonce.to_string()],
                        fingerprint: Vec::new(),
                    }),
                    None => Answer::NotReady {
                        why: "it is still being built".into(),
                        for_good: false,
                    },
                }
            }
            (
                Waits::Monitor {
                    rpc: asked, view, ..
                },
                Message::Told {
                    refused, view: of, ..
                },
            ) if *asked == rpc => match (refused, of) {
                (Some(why), _) => failed(FailureKind::Host, &why),
                (None, Some(of)) if *view => Answer::Monitor(of),
                (None, _) => Answer::Done,
            },
            (Waits::Call { rpc: asked, call }, Message::Answer { answer, .. }) if *asked == rpc => {
                match (&*call, answer) {
                    (_, storage::Answer::Denied) => {
                        failed(FailureKind::RefusedForGood, "the storage refuses")
                    }
                    (Call::Claim { vm, token }, storage::Answer::Done { .. }) => {
                        let claimed = (*vm, *token);
                        self.truth.claimed.insert(claimed);
                        Answer::Done
                    }
                    (_, storage::Answer::Done { .. }) => Answer::Done,
                    _ => failed(FailureKind::Burnt, "another group"),
                }
            }
            _ => return,
        };
        self.answer(node, id, answer);
    }

    fn confirmed_flow(&mut self, node: usize, id: u64) {
        let state = self.daemon(node).map(|daemon| daemon.state.clone());
        if let Some(state) = state {
            self.answer(node, id, Answer::Confirmed(state));
        }
    }

    /// Entries were applied: flows that waited for them go on.
    pub fn flows_applied(&mut self, node: usize) {
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        let applied = daemon.applied;
        let due = |index: &Option<usize>| index.is_some_and(|index| index <= applied);
        let mut ready: Vec<(u64, bool)> = Vec::new();
        for flow in daemon.flows.values() {
            match &flow.waits {
                Waits::Command { applies, .. } if due(applies) => ready.push((flow.id, false)),
                Waits::Confirm { applies, .. } if due(applies) => ready.push((flow.id, true)),
                _ => {}
            }
        }
        for (id, confirms) in ready {
            match confirms {
                true => self.confirmed_flow(node, id),
                false => self.go_on(node, id, Answer::Done),
            }
        }
    }

    /// A flow's wait has ended.
    pub fn flow_waited(&mut self, node: usize, id: u64, wait: u64) {
        let Some(mut flow) = self.take(node, id) else {
            return;
        };
        if flow.wait != wait {
            return self.keep(node, flow);
        }
        let answer = match std::mem::replace(&mut flow.waits, Waits::Nothing) {
            Waits::Nothing => return self.keep(node, flow),
            Waits::Time(answer) => answer,
            Waits::Held(step) => return self.carry_out(node, flow, step),
            Waits::Command {
                envelope,
                until,
                rpc,
                applies: Some(index),
            } => {
                // It is applied by the leader, and will be here.
                let waits = Waits::Command {
                    envelope,
                    until,
                    rpc,
                    applies: Some(index),
                };
                let later = self.now + S;
                return self.wait_for(node, flow, waits, later);
            }
            Waits::Command {
                envelope, until, ..
            } if self.now < until => return self.ask_leader(node, flow, envelope, until),
            Waits::Command { .. } => failed(FailureKind::Log, "nobody knows what became of it"),
            // No answer: whether it was executed is not known.
            Waits::Call {
                call: Call::Claim { .. },
                ..
            } => failed(FailureKind::Burnt, "no answer"),
            Waits::Call { .. } => failed(FailureKind::Host, "the storage does not answer"),
            Waits::Confirm { .. } => failed(FailureKind::Log, "no quorum confirms"),
            Waits::Monitor { lenient: true, .. } => Answer::Done,
            Waits::Monitor { .. } => failed(FailureKind::Host, "the monitor does not answer"),
            Waits::Ready { .. } => Answer::NotReady {
                why: "it does not answer".into(),
                for_good: false,
            },
            Waits::End(nonce) => {
                crate::invariants::ends(self, node, nonce);
                self.end_monitor(node, nonce, "as the log says");
                if let Some(daemon) = self.daemon(node) {
                    daemon.sight.remove(&nonce);
                }
                Answer::Done
            }
            Waits::Pause(ended) => return self.end_flow(node, ended),
        };
        self.keep(node, flow);
        self.go_on(node, id, answer);
    }
}
