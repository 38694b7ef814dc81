//! What wakes a flow: an answer, an applied entry, or the end of its patience.

use cluster_model::Reply;

use super::{Done, Flow, Step, Trouble};
use crate::mutants::Mutant;
use crate::storage::{Answer, Call};
use crate::world::{Event, Message, S, World};

impl World {
    /// An answer for a flow.
    pub fn flow_answered(&mut self, node: usize, message: Message) {
        let rpc = match &message {
            Message::Proposed { rpc, .. }
            | Message::Confirmed { rpc, .. }
            | Message::Ready { rpc, .. }
            | Message::Answer { rpc, .. } => *rpc,
            _ => return,
        };
        let Some(id) = self
            .daemon(node)
            .and_then(|daemon| daemon.rpcs.remove(&rpc))
        else {
            return;
        };
        let Some(mut flow) = self
            .daemon(node)
            .and_then(|daemon| daemon.flows.remove(&id))
        else {
            return;
        };
        if flow.rpc != Some(rpc) {
            return self.keep(node, flow);
        }
        flow.rpc = None;
        let applied = self.daemon(node).map_or(0, |daemon| daemon.applied);
        match message {
            Message::Proposed { answer, .. } => match answer {
                Some((index, Reply::Done { .. })) => {
                    flow.envelope = None;
                    if applied < index {
                        flow.applies = Some(index);
                        return self.keep(node, flow);
                    }
                    self.keep(node, flow);
                }
                Some((_, Reply::Rejected(_))) => {
                    flow.envelope = None;
                    self.trouble(node, flow, Trouble::Other);
                }
                // Asked again when the wait ends.
                None => return self.keep(node, flow),
            },
            Message::Confirmed { index, .. } => match index {
                Some(index) if applied >= index => self.confirmed_flow(node, flow),
                Some(index) => {
                    flow.applies = Some(index);
                    return self.keep(node, flow);
                }
                None => self.trouble(node, flow, Trouble::Other),
            },
            Message::Ready { nonce, .. } => {
                if let Some(nonce) = nonce {
                    if let Some(Step::AskReady(vm, migration)) = flow.steps.pop_front() {
                        self.begin_sending(node, vm, migration, nonce, &flow.state.clone());
                    }
                } else {
                    return self.keep(node, flow);
                }
                self.keep(node, flow);
            }
            Message::Answer { answer, .. } => match (flow.steps.pop_front(), answer) {
                (Some(Step::Claim(vm, token)), Answer::Done { .. }) => {
                    flow.claimed = Some((vm, token));
                    self.truth.claimed.insert((vm, token));
                    self.keep(node, flow);
                }
                (Some(Step::Verify(..)), Answer::Done { .. }) => self.keep(node, flow),
                _ => self.trouble(node, flow, Trouble::Burnt),
            },
            _ => self.keep(node, flow),
        }
        if self
            .daemon(node)
            .is_some_and(|daemon| daemon.flows.contains_key(&id))
        {
            self.go_on(node, id);
        }
    }

    fn confirmed_flow(&mut self, node: usize, mut flow: Flow) {
        flow.steps.pop_front();
        flow.confirm = self.daemon(node).map(|daemon| daemon.state.clone());
        self.keep(node, flow);
    }

    /// Entries were applied: flows that waited for them go on.
    pub fn flows_applied(&mut self, node: usize) {
        let Some(daemon) = self.daemon(node) else {
            return;
        };
        let applied = daemon.applied;
        let ready: Vec<u64> = daemon
            .flows
            .values()
            .filter(|flow| flow.applies.is_some_and(|index| index <= applied))
            .map(|flow| flow.id)
            .collect();
        for id in ready {
            let Some(mut flow) = self
                .daemon(node)
                .and_then(|daemon| daemon.flows.remove(&id))
            else {
                continue;
            };
            flow.applies = None;
            if matches!(flow.steps.front(), Some(Step::Confirm)) {
                self.confirmed_flow(node, flow);
            } else {
                self.keep(node, flow);
            }
            self.go_on(node, id);
        }
    }

    /// A flow's wait has ended.
    pub fn flow_waited(&mut self, node: usize, id: u64, wait: u64) {
        let Some(mut flow) = self
            .daemon(node)
            .and_then(|daemon| daemon.flows.remove(&id))
        else {
            return;
        };
        if flow.wait != wait {
            return self.keep(node, flow);
        }
        if flow.envelope.is_some()
            || (flow.applies.is_some() && !matches!(flow.steps.front(), Some(Step::Confirm)))
        {
            let patient = flow
                .envelope
                .as_ref()
                .is_some_and(|(_, until)| self.now < *until);
            if flow.applies.is_some() || patient {
                flow.wait += 1;
                let done = match flow.applies {
                    Some(_) => Done::Wait(self.now + S),
                    None => self.ask(node, &mut flow),
                };
                let wait = flow.wait;
                self.keep(node, flow);
                if let (Done::Wait(until), Some(life)) =
                    (done, self.daemon(node).map(|daemon| daemon.life))
                {
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
                return;
            }
            flow.envelope = None;
            self.trouble(node, flow, Trouble::Other);
            return self.go_on(node, id);
        }
        flow.applies = None;
        match flow.steps.front() {
            // No answer: whether it was executed is not known.
            Some(Step::Claim(..))
                if self.mutant == Some(Mutant::TokenSentAgain) && flow.rpc.is_some() =>
            {
                let Some(step) = flow.steps.pop_front() else {
                    return;
                };
                if let Step::Claim(vm, token) = step {
                    let done = self.call(
                        node,
                        &mut flow,
                        Step::Claim(vm, token),
                        Call::Claim { vm, token },
                    );
                    flow.wait += 1;
                    let wait = flow.wait;
                    self.keep(node, flow);
                    if let (Done::Wait(until), Some(life)) =
                        (done, self.daemon(node).map(|daemon| daemon.life))
                    {
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
                    return;
                }
            }
            Some(Step::Claim(..)) if flow.rpc.is_some() => self.trouble(node, flow, Trouble::Burnt),
            Some(Step::Verify(..)) if flow.rpc.is_some() => {
                self.trouble(
                    node,
                    flow,
                    Trouble::Start("the storage does not answer".into()),
                );
            }
            Some(Step::Confirm) if flow.rpc.is_some() => {
                self.trouble(node, flow, Trouble::Other);
            }
            Some(Step::AskReady(..)) => self.keep(node, flow),
            _ => self.keep(node, flow),
        }
        self.go_on(node, id);
    }
}
