//! The acts of the agent as steps with waits between them, as `clusterd` carries them out.

mod answers;
mod steps;

use std::collections::VecDeque;
use std::sync::Arc;

use cluster_model::agent::{Act, Ended, Learnt, Work, permit_allowed};
use cluster_model::{
    ClusterState, Command, Envelope, MigrationId, MigrationState, MonitorPhase, OwnershipCause,
    RequestId, Side, Token, VmId,
};

use crate::monitor::{Monitor, Part};
use crate::mutants::Mutant;
use crate::storage::Call;
use crate::world::{Event, MS, Message, Place, S, World, node_id, node_of};

/// A command waits for its answer this long.
const PATIENCE: u64 = 5 * S;
/// A storage call of the broker waits this long.
const CALL_PATIENCE: u64 = 2 * S;

/// One thing after another.
#[derive(Clone, Debug)]
pub enum Step {
    /// Proposes, and waits until it is applied here.
    Propose(Box<Command>),
    /// Claims the disk; no answer burns the token.
    Claim(VmId, Token),
    /// Waits for what is under way in the server.
    Settle(u64),
    /// The group is still ours; everything is written down.
    Verify(VmId, Token),
    /// Makes a monitor.
    Build(VmId, Token),
    /// Makes one that receives.
    BuildIncoming(VmId, MigrationId, Token),
    /// A linearizable read.
    Confirm,
    /// The log allows it.
    Allowed(VmId, Token),
    /// The monitor takes up the token.
    Rekey(u64, Token),
    /// The claim that a cutover names.
    ByCutover(VmId),
    /// Lets the guest run.
    Permit(VmId, Token),
    /// Ends a monitor.
    End(u64),
    /// Asks the guest to stop.
    Stop(VmId, Token),
    /// Asks the destination for its monitor.
    AskReady(VmId, MigrationId),
    /// Ends the sending.
    CancelSend(VmId, MigrationId),
    /// Remembers the claim.
    Claimed(VmId, Token),
}

/// Why a step went wrong.
enum Trouble {
    /// The token is burnt; the next decision, after a pause, knows what to do.
    Burnt,
    /// The start failed for another reason.
    Start(String),
    /// Tried again after a pause.
    Other,
}

/// What a step gives.
enum Done {
    Next,
    Wait(u64),
}

/// Work under way.
#[derive(Clone, Debug)]
pub struct Flow {
    /// Its number.
    pub id: u64,
    work: Work,
    acts: VecDeque<Act>,
    act: Option<Act>,
    steps: VecDeque<Step>,
    state: Arc<ClusterState>,
    confirm: Option<Arc<ClusterState>>,
    claimed: Option<(VmId, Token)>,
    nonce: Option<u64>,
    failed: bool,
    learnt: Vec<Learnt>,
    /// Counts waits: an old timer ends none but its own.
    wait: u64,
    /// The answer it waits for.
    rpc: Option<u64>,
    /// The entry it waits for.
    applies: Option<usize>,
    /// What it asked, to ask again.
    envelope: Option<(Arc<Envelope>, u64)>,
}

impl Flow {
    /// Work to be begun.
    pub fn new(id: u64, work: Work, state: Arc<ClusterState>) -> Flow {
        Flow {
            id,
            acts: work.acts.iter().cloned().collect(),
            work,
            act: None,
            steps: VecDeque::new(),
            state,
            confirm: None,
            claimed: None,
            nonce: None,
            failed: false,
            learnt: Vec::new(),
            wait: 0,
            rpc: None,
            applies: None,
            envelope: None,
        }
    }
}

impl World {
    /// Begins work.
    pub fn begin_flow(&mut self, node: usize, flow: Flow) {
        let id = flow.id;
        let acts: Vec<String> = flow
            .work
            .acts
            .iter()
            .map(|act| format!("{act:?}"))
            .collect();
        self.say(|| format!("n{} begins {}", node + 1, acts.join(", ")));
        if let Some(daemon) = self.daemon(node) {
            daemon.flows.insert(id, flow);
        }
        self.go_on(node, id);
    }

    /// The work of a flow is over: the agent takes it in.
    pub fn end_flow(&mut self, node: usize, id: u64) {
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        let Some(flow) = daemon.flows.remove(&id) else {
            return;
        };
        daemon.memory.take_in(Ended {
            vm: flow.work.vm,
            nonces: flow.work.acts.iter().filter_map(Act::ends).collect(),
            is_flow: flow.work.kind.is_some(),
            failed: flow.failed,
            learnt: flow.learnt,
        });
        self.look(node);
    }

    /// Takes step after step until one waits.
    fn go_on(&mut self, node: usize, id: u64) {
        loop {
            let Some(mut flow) = self
                .daemon(node)
                .and_then(|daemon| daemon.flows.remove(&id))
            else {
                return;
            };
            flow.wait += 1;
            flow.rpc = None;
            let Some(step) = flow.steps.pop_front() else {
                match flow.acts.pop_front() {
                    Some(act) => {
                        flow.steps = self.steps(node, &flow, &act).into();
                        flow.act = Some(act);
                        self.keep(node, flow);
                        continue;
                    }
                    None => return self.flow_over(node, flow),
                }
            };
            match self.step(node, &mut flow, step) {
                Ok(Done::Next) => self.keep(node, flow),
                Ok(Done::Wait(until)) => {
                    let wait = flow.wait;
                    self.keep(node, flow);
                    let Some(life) = self.daemon(node).map(|daemon| daemon.life) else {
                        return;
                    };
                    self.at(
                        until,
                        Event::Flow {
                            node,
                            life,
                            flow: id,
                            wait,
                        },
                    );
                    return;
                }
                Err(trouble) => self.trouble(node, flow, trouble),
            }
        }
    }

    fn keep(&mut self, node: usize, flow: Flow) {
        if let Some(daemon) = self.daemon(node) {
            daemon.flows.insert(flow.id, flow);
        }
    }

    fn flow_over(&mut self, node: usize, flow: Flow) {
        let (id, failed, failures) = (flow.id, flow.failed, flow.work.failures);
        self.keep(node, flow);
        if !failed {
            return self.end_flow(node, id);
        }
        let pause = (50 * MS * 2u64.pow(failures.min(10))).min(2 * S);
        let at = self.after(node, pause);
        if let Some(life) = self.daemon(node).map(|daemon| daemon.life) {
            let flow = id;
            self.at(at, Event::FlowPaused { node, life, flow });
        }
    }

    /// An act went wrong: what follows it in this flow, and what the agent learns.
    fn trouble(&mut self, node: usize, mut flow: Flow, trouble: Trouble) {
        let act = flow.act.take();
        let starts = matches!(act, Some(Act::Start { .. }));
        flow.steps.clear();
        match trouble {
            Trouble::Burnt => {
                if starts && let Some(nonce) = flow.nonce {
                    self.end_monitor(node, nonce, "its token was not claimed");
                }
                flow.failed = true;
            }
            Trouble::Start(why) => {
                if let Some(Act::Start { vm, token, .. }) = act {
                    flow.learnt.push(Learnt::StartFailed(vm, token, why));
                }
                flow.failed = true;
            }
            Trouble::Other => {
                flow.failed = true;
                if act.as_ref().is_some_and(|act| act.ends().is_some()) {
                    flow.acts.clear();
                }
            }
        }
        self.keep(node, flow);
    }

    fn step(&mut self, node: usize, flow: &mut Flow, step: Step) -> Result<Done, Trouble> {
        match step {
            Step::Propose(command) => {
                let number = self.number();
                let envelope = Arc::new(Envelope {
                    request: RequestId(format!("n{}/{number}", node + 1)),
                    actor: format!("node/n{}", node + 1),
                    at_ms: self.wall_ms(node),
                    asked: None,
                    command: *command,
                });
                flow.envelope = Some((envelope, self.now + PATIENCE));
                Ok(self.ask(node, flow))
            }
            Step::Claim(vm, token) => {
                flow.claimed = None;
                let call = Call::Claim { vm, token };
                Ok(self.call(node, flow, step, call))
            }
            Step::Verify(vm, token) => {
                let call = Call::VerifyAndCommit { vm, token };
                Ok(self.call(node, flow, step, call))
            }
            Step::Settle(us) => Ok(Done::Wait(self.after(node, us))),
            Step::Build(vm, token) => {
                let nonce = self.number();
                flow.nonce = Some(nonce);
                let monitor = Monitor::new(vm, nonce, token, MonitorPhase::Ready);
                self.hosts[node].monitors.insert(nonce, monitor);
                Ok(Done::Next)
            }
            Step::BuildIncoming(vm, migration, token) => {
                let from = flow
                    .state
                    .migrations
                    .get(&migration)
                    .map(|known| known.from);
                let nonce = self.number();
                let mut monitor = Monitor::new(vm, nonce, token, MonitorPhase::Incoming);
                monitor.part = Some(Part {
                    id: migration,
                    side: Side::Destination,
                    peer: from.map_or(0, node_of),
                    peer_nonce: None,
                    quiet_received: false,
                    failed: None,
                    stopping: false,
                });
                self.hosts[node].monitors.insert(nonce, monitor);
                Ok(Done::Next)
            }
            Step::Confirm => {
                flow.confirm = None;
                let rpc = self.number();
                flow.rpc = Some(rpc);
                flow.steps.push_front(Step::Confirm);
                let Some(leader) = self.hosts[node].raft.leader else {
                    return Err(Trouble::Other);
                };
                if let Some(daemon) = self.daemon(node) {
                    daemon.rpcs.insert(rpc, flow.id);
                }
                self.send(
                    Place::Daemon(node),
                    Place::Daemon(leader),
                    Message::Confirm { rpc },
                );
                Ok(Done::Wait(self.now + PATIENCE))
            }
            Step::Allowed(vm, token) => {
                let confirm = match self.mutant {
                    Some(Mutant::NoConfirm) => Some(flow.state.clone()),
                    _ => flow.confirm.clone(),
                };
                let confirm = confirm.ok_or(Trouble::Other)?;
                permit_allowed(&confirm, vm, node_id(node), token).map_err(|_| Trouble::Other)?;
                Ok(Done::Next)
            }
            Step::Rekey(nonce, token) => {
                let now = self.now;
                let goes_on = self.mutant == Some(Mutant::QuietWhileRunning);
                let monitor = self.hosts[node].monitors.get_mut(&nonce);
                let monitor = monitor.filter(|monitor| monitor.paused_until <= now);
                let monitor = monitor.ok_or(Trouble::Other)?;
                if token < monitor.token {
                    return Err(Trouble::Other);
                }
                flow.nonce = Some(nonce);
                if token > monitor.token {
                    let stopping = monitor.part.as_ref().is_some_and(|part| part.stopping);
                    monitor.take_up(token);
                    if let Some(part) = monitor.part.as_mut().filter(|_| goes_on) {
                        part.stopping = stopping;
                    }
                }
                Ok(Done::Next)
            }
            Step::ByCutover(vm) => {
                let record = flow.state.vms.get(&vm).map(|vm| vm.ownership.clone());
                let record = record.ok_or(Trouble::Other)?;
                let cut_over =
                    record.cause == OwnershipCause::Cutover && record.owner == Some(node_id(node));
                if !cut_over {
                    return Err(Trouble::Other);
                }
                flow.confirm = Some(flow.state.clone());
                flow.claimed = Some((vm, record.token));
                Ok(Done::Next)
            }
            Step::Permit(vm, token) => self.permit(node, flow, vm, token),
            Step::End(nonce) => {
                crate::invariants::ends(self, node, nonce);
                self.end_monitor(node, nonce, "as the log says");
                Ok(Done::Next)
            }
            Step::Stop(vm, token) => {
                let found = self.hosts[node]
                    .monitors
                    .values_mut()
                    .find(|monitor| monitor.vm == vm && monitor.token == token);
                if let Some(monitor) = found {
                    monitor.stop_asked = true;
                }
                // The agent looks again until it has stopped.
                Ok(Done::Wait(self.after(node, 300 * MS)))
            }
            Step::AskReady(vm, migration) => self.ask_ready(node, flow, vm, migration),
            Step::CancelSend(vm, migration) => {
                let found = self.hosts[node].monitors.values_mut().find(|monitor| {
                    monitor.vm == vm
                        && monitor
                            .part
                            .as_ref()
                            .is_some_and(|part| part.id == migration)
                });
                if let Some(part) = found.and_then(|monitor| monitor.part.as_mut()) {
                    part.failed = Some("the migration was aborted".into());
                    part.stopping = false;
                }
                Ok(Done::Next)
            }
            Step::Claimed(vm, token) => {
                flow.learnt.push(Learnt::Claimed(vm, token));
                if self.mutant == Some(Mutant::CutoverBeforeClaim)
                    && let Some(daemon) = self.daemon(node)
                {
                    // It tells the agent at once, with the claim still to come.
                    daemon.memory.take_in(Ended {
                        vm,
                        nonces: Vec::new(),
                        is_flow: true,
                        failed: false,
                        learnt: vec![Learnt::Claimed(vm, token)],
                    });
                }
                Ok(Done::Next)
            }
        }
    }

    /// A storage call of the broker, each sent once.
    fn call(&mut self, node: usize, flow: &mut Flow, step: Step, call: Call) -> Done {
        let rpc = self.number();
        flow.rpc = Some(rpc);
        flow.steps.push_front(step);
        if let Some(daemon) = self.daemon(node) {
            daemon.rpcs.insert(rpc, flow.id);
        }
        self.send(
            Place::Daemon(node),
            Place::Server,
            Message::Call { rpc, call },
        );
        Done::Wait(self.now + CALL_PATIENCE)
    }

    /// Sends the flow's command to whoever leads, again and again until its patience ends.
    fn ask(&mut self, node: usize, flow: &mut Flow) -> Done {
        let Some((envelope, _)) = flow.envelope.clone() else {
            return Done::Next;
        };
        let rpc = self.number();
        flow.rpc = Some(rpc);
        if let Some(daemon) = self.daemon(node) {
            daemon.rpcs.insert(rpc, flow.id);
        }
        if let Some(leader) = self.hosts[node].raft.leader {
            let message = Message::Propose { rpc, envelope };
            self.send(Place::Daemon(node), Place::Daemon(leader), message);
        }
        Done::Wait(self.now + 400 * MS)
    }

    fn ask_ready(
        &mut self,
        node: usize,
        flow: &mut Flow,
        vm: VmId,
        migration: MigrationId,
    ) -> Result<Done, Trouble> {
        let state = self.daemon(node).map(|daemon| daemon.state.clone());
        let state = state.ok_or(Trouble::Other)?;
        let known = state
            .migrations
            .get(&migration)
            .cloned()
            .ok_or(Trouble::Other)?;
        if !matches!(known.state, MigrationState::Active { .. }) {
            return Err(Trouble::Other);
        }
        let rpc = self.number();
        flow.rpc = Some(rpc);
        flow.steps.push_front(Step::AskReady(vm, migration));
        if let Some(daemon) = self.daemon(node) {
            daemon.rpcs.insert(rpc, flow.id);
        }
        let to = Place::Daemon(node_of(known.to));
        self.send(
            Place::Daemon(node),
            to,
            Message::AskReady { rpc, migration },
        );
        Ok(Done::Wait(self.now + S))
    }

    /// The run permit: claim, confirm and lease, or nothing (rule R7).
    fn permit(
        &mut self,
        node: usize,
        flow: &mut Flow,
        vm: VmId,
        token: Token,
    ) -> Result<Done, Trouble> {
        let mutant = self.mutant;
        let clock = self.clock(node);
        let now = self.now;
        let confirm = match mutant {
            Some(Mutant::NoConfirm) => Some(flow.state.clone()),
            _ => flow.confirm.clone(),
        };
        let confirm = confirm.ok_or(Trouble::Other)?;
        let nonce = match (&flow.act, flow.nonce) {
            (Some(Act::Thaw { nonce, .. }), _) => *nonce,
            (_, Some(nonce)) => nonce,
            _ => return Err(Trouble::Other),
        };
        let deadline = self
            .daemon(node)
            .map_or(0, |daemon| daemon.lease.deadline_ns() / 1_000);
        let monitor = self.hosts[node].monitors.get_mut(&nonce);
        let monitor = monitor.filter(|monitor| monitor.paused_until <= now);
        let monitor = monitor.ok_or(Trouble::Other)?;
        let thaws = matches!(flow.act, Some(Act::Thaw { .. }));
        let ran = !matches!(
            monitor.phase,
            MonitorPhase::Ready | MonitorPhase::Incoming | MonitorPhase::Complete
        );
        let claimed = flow.claimed == Some((vm, token))
            || (thaws && ran)
            || mutant == Some(Mutant::RunBeforeClaim);
        let allowed = permit_allowed(&confirm, vm, node_id(node), token).is_ok();
        let quiet = monitor.said_quiet && !token_is_after_abort(&confirm, vm, monitor);
        let quiet = quiet && mutant != Some(Mutant::QuietSourceThaws);
        let lapsed = deadline <= clock;
        // With its lease a node would not get that far: these two take the claim for everything.
        let believes = matches!(mutant, Some(Mutant::NoConfirm | Mutant::ConfirmIsLocal));
        if !claimed || !allowed || quiet || monitor.token != token || (lapsed && !believes) {
            return Err(Trouble::Other);
        }
        let deadline = if lapsed { clock + S } else { deadline };
        let may_run = matches!(
            monitor.phase,
            MonitorPhase::Ready
                | MonitorPhase::Complete
                | MonitorPhase::Frozen
                | MonitorPhase::Refused
                | MonitorPhase::Quiet
                | MonitorPhase::Running
        );
        if !may_run {
            return Err(Trouble::Other);
        }
        self.run_guest(node, nonce, deadline);
        Ok(Done::Next)
    }
}

/// Whether the machine's token was granted by a re-key after the abort of the migration in which this
/// monitor said quiet.
fn token_is_after_abort(state: &ClusterState, vm: VmId, monitor: &Monitor) -> bool {
    let Some(record) = state.vms.get(&vm).map(|vm| &vm.ownership) else {
        return false;
    };
    let migration = monitor
        .part
        .as_ref()
        .and_then(|part| state.migrations.get(&part.id));
    record.cause == OwnershipCause::Rekey
        && match migration.map(|migration| &migration.state) {
            Some(MigrationState::Aborted { at, .. }) => record.since > *at,
            Some(_) => false,
            None => true,
        }
}
