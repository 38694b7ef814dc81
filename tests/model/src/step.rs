//! One step of one party.

use crate::log::Command;
use crate::protocol::{Mutant, Protocol};
use crate::state::{Node, NodeId, Phase, State, Token, Write, WriteAt};

/// A step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// A proposal is committed and applied, or has no effect.
    Commit(Command),
    /// A guest sends a WRITE.
    Write(NodeId),
    /// The server checks a WRITE: it goes through or is refused.
    Check(Write),
    /// A WRITE that went through lands.
    Land(Write),
    /// The server executes a SETATTR of this group.
    Execute(u8),
    /// A claim's answer arrives.
    Acknowledge(NodeId),
    /// A claim's answer does not arrive: its token is burnt.
    Burn(NodeId),
    /// A claim is sent again (a mutant's).
    Resend(NodeId),
    /// The settle time has passed.
    Settle(NodeId),
    /// A read that began after the acknowledgement shows the token current.
    Confirm(NodeId),
    /// A guest begins to run.
    Run(NodeId),
    /// The source stops its vCPUs, drains and says *quiet*.
    Quiet,
    /// The destination claims the reserved token.
    ClaimReserved,
    /// The destination proposes the cutover.
    ProposeCutover,
    /// Somebody proposes to abort.
    ProposeAbort,
    /// The quiet source sees the abort, or that it is not the owner any more.
    SourceLearns,
    /// The quiet source runs again (a mutant's).
    SourceResumes,
    /// A running owner wants a fresh token.
    Rekey(NodeId),
    /// An owner that re-keys, or that became one, claims its token.
    Claim(NodeId),
    /// A node's lease runs out.
    LeaseOut(NodeId),
    /// It gets its lease back.
    LeaseBack(NodeId),
    /// A frozen monitor thaws, or exits because the token moved.
    Thaw(NodeId),
    /// A node dies with all it has.
    Crash(NodeId),
    /// The leader gives a node up.
    ProposeLost(NodeId, NodeId),
    /// A node registers anew.
    Rejoin(NodeId),
}

fn take<T: PartialEq>(list: &mut Vec<T>, item: &T) {
    if let Some(at) = list.iter().position(|other| other == item) {
        list.remove(at);
    }
}

impl Protocol {
    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    /// The group that stands for a token.
    fn group(&self, token: Token, node: NodeId) -> u8 {
        match self.is(Mutant::TokenPerNode) {
            true => 100 + node as u8,
            false => token,
        }
    }

    /// Every step that may come next.
    pub(crate) fn steps(&self, state: &State, steps: &mut Vec<Step>) {
        steps.extend(state.proposals.iter().map(|command| Step::Commit(*command)));
        let mut groups = state.setattrs.clone();
        groups.dedup();
        steps.extend(groups.into_iter().map(Step::Execute));
        for write in &state.writes {
            steps.push(match write.at {
                WriteAt::Sent => Step::Check(*write),
                WriteAt::Checked => Step::Land(*write),
            });
        }
        for id in NodeId::ALL {
            if state.node(id).alive {
                self.node_steps(state, id, steps);
            } else {
                steps.push(Step::Rejoin(id));
            }
            self.leader_steps(state, id, steps);
        }
        if state.log.migration.is_some() && state.used.aborts < self.bounds.aborts {
            steps.push(Step::ProposeAbort);
        }
        steps.dedup();
    }

    fn node_steps(&self, state: &State, id: NodeId, steps: &mut Vec<Step>) {
        let (node, bounds) = (state.node(id), &self.bounds);
        let leased = node.lease || !bounds.clocks;
        match node.phase {
            Phase::Idle => self.idle_steps(state, id, steps),
            Phase::Running(_) => {
                if state.used.writes < bounds.writes {
                    steps.push(Step::Write(id));
                }
                if state.used.rekeys < bounds.rekeys {
                    steps.push(Step::Rekey(id));
                }
                let drained = self.is(Mutant::NoDrain) || !state.unanswered(id);
                if id == NodeId::S && node.image && state.log.migration.is_some() && drained {
                    steps.push(Step::Quiet);
                }
            }
            Phase::Frozen(_) if node.lease => steps.push(Step::Thaw(id)),
            Phase::Frozen(_) => {}
            Phase::Quiet(_) => {
                steps.push(Step::SourceLearns);
                let cut = state.log.cut;
                if (self.is(Mutant::InDoubtResolvedByReadOnly) && !cut)
                    || self.is(Mutant::ResumeAfterFinalWithoutAbort)
                {
                    steps.push(Step::SourceResumes);
                }
                if self.is(Mutant::QuietSourceThaws) && node.lease && state.used.lapses > 0 {
                    steps.push(Step::SourceResumes);
                }
            }
            Phase::Rekeying { .. } => steps.push(Step::Claim(id)),
            Phase::Claiming { executed, .. } => {
                if executed {
                    steps.push(Step::Acknowledge(id));
                }
                steps.push(Step::Burn(id));
                if self.is(Mutant::SameTokenSentAgain) && state.setattrs.len() < 2 {
                    steps.push(Step::Resend(id));
                }
                if self.is(Mutant::ActivateBeforeFencing) && id != NodeId::D && leased {
                    steps.push(Step::Run(id));
                }
                if self.is(Mutant::CutoverBeforeClaimAnswered) && self.moves_here(state, id) {
                    steps.push(Step::ProposeCutover);
                }
                let owner = state.log.cut && state.log.owner == id;
                if self.is(Mutant::CutoverBeforeClaimAnswered) && id == NodeId::D && owner && leased
                {
                    steps.push(Step::Run(id));
                }
            }
            Phase::Claimed { settle, .. } => {
                if self.moves_here(state, id) {
                    steps.push(Step::ProposeCutover);
                }
                if settle {
                    steps.push(Step::Settle(id));
                } else {
                    steps.push(Step::Confirm(id));
                }
            }
            Phase::Confirmed(_) if leased => steps.push(Step::Run(id)),
            Phase::Confirmed(_) => {}
        }
        if node.lost {
            steps.push(Step::Rejoin(id));
        }
        if state.used.crashes < bounds.crashes {
            steps.push(Step::Crash(id));
        }
    }

    fn idle_steps(&self, state: &State, id: NodeId, steps: &mut Vec<Step>) {
        let log = &state.log;
        // Memory that came over belongs to this migration and this owner alone.
        let quiet = matches!(state.node(NodeId::S).phase, Phase::Quiet(_));
        if id == NodeId::D && log.migration.is_some() && quiet {
            steps.push(Step::ClaimReserved);
        }
        if log.owner == id && log.boot && log.session == state.node(id).session {
            steps.push(Step::Claim(id));
        }
    }

    fn moves_here(&self, state: &State, id: NodeId) -> bool {
        id == NodeId::D && state.node(id).image && state.log.migration.is_some()
    }

    fn leader_steps(&self, state: &State, id: NodeId, steps: &mut Vec<Step>) {
        let (node, bounds) = (state.node(id), &self.bounds);
        if node.lost {
            return;
        }
        if bounds.clocks && node.alive {
            if node.lease && state.used.lapses < bounds.lapses {
                steps.push(Step::LeaseOut(id));
            }
            if !node.lease {
                steps.push(Step::LeaseBack(id));
            }
        }
        let out = !node.lease || !node.alive || !bounds.clocks;
        if out && state.used.losses < bounds.losses {
            let others = NodeId::ALL.into_iter().filter(|to| *to != id);
            let able = others.filter(|to| state.node(*to).alive && !state.node(*to).lost);
            steps.extend(able.map(|to| Step::ProposeLost(id, to)));
        }
    }

    /// The state after a step; nothing if it cannot be.
    pub(crate) fn after(&self, before: &State, step: Step) -> Option<State> {
        let mut state = before.clone();
        match step {
            Step::Commit(command) => {
                take(&mut state.proposals, &command);
                state.log.apply(command, self.mutant);
            }
            Step::Write(id) => {
                let token = token_of(state.node(id))?;
                state.used.writes += 1;
                state.writes.push(Write {
                    node: id,
                    token,
                    at: WriteAt::Sent,
                });
                state.writes.sort_unstable();
            }
            Step::Check(write) => {
                take(&mut state.writes, &write);
                if state.group == self.group(write.token, write.node) {
                    state.writes.push(Write {
                        at: WriteAt::Checked,
                        ..write
                    });
                    state.writes.sort_unstable();
                }
            }
            Step::Land(write) => {
                take(&mut state.writes, &write);
                state.landed_late |= write.token < state.activated;
            }
            Step::Execute(group) => {
                take(&mut state.setattrs, &group);
                state.group = group;
                for id in NodeId::ALL {
                    if let Phase::Claiming {
                        token, executed, ..
                    } = &mut state.node_mut(id).phase
                        && self.group(*token, id) == group
                    {
                        *executed = true;
                    }
                }
            }
            Step::ProposeAbort => {
                state.used.aborts += 1;
                state.propose(Command::Abort);
            }
            Step::LeaseOut(id) => {
                state.used.lapses += 1;
                let node = state.node_mut(id);
                node.lease = false;
                if let Phase::Running(token) = node.phase {
                    node.phase = Phase::Frozen(token);
                }
            }
            Step::LeaseBack(id) => state.node_mut(id).lease = true,
            Step::Crash(id) => {
                state.used.crashes += 1;
                let node = state.node_mut(id);
                (node.alive, node.lease, node.image) = (false, false, false);
                node.phase = Phase::Idle;
            }
            Step::ProposeLost(id, to) => {
                state.used.losses += 1;
                let session = state.node(id).session;
                state.node_mut(id).lost = true;
                state.propose(Command::Lost {
                    node: id,
                    session,
                    to,
                });
            }
            Step::Rejoin(id) => {
                let node = state.node_mut(id);
                node.session += 1;
                (node.alive, node.lease, node.lost) = (true, true, false);
                node.phase = Phase::Idle;
                (node.image, node.begun) = (false, 0);
                let session = node.session;
                state.log.sessions[id as usize] = session;
            }
            Step::Quiet | Step::SourceLearns | Step::SourceResumes => {
                self.source(&mut state, step)?
            }
            Step::ClaimReserved | Step::ProposeCutover => self.destination(&mut state, step)?,
            Step::Acknowledge(id)
            | Step::Burn(id)
            | Step::Resend(id)
            | Step::Settle(id)
            | Step::Confirm(id)
            | Step::Run(id)
            | Step::Rekey(id)
            | Step::Claim(id)
            | Step::Thaw(id) => self.owner(&mut state, step, id)?,
        }
        (state != *before).then_some(state)
    }

    fn source(&self, state: &mut State, step: Step) -> Option<()> {
        let log = state.log;
        let node = state.node_mut(NodeId::S);
        let token = token_of(node)?;
        match step {
            Step::Quiet => node.phase = Phase::Quiet(token),
            Step::SourceResumes => node.phase = Phase::Running(token),
            _ if log.owner != NodeId::S => (node.phase, node.image) = (Phase::Idle, false),
            // Once a cutover was applied the image is void, even if the machine comes back here.
            _ if log.cut && !self.is(Mutant::VoidImageResumes) => {
                (node.phase, node.image) = (Phase::Idle, false);
            }
            // The abort is applied: a fresh token, a claim, a confirm. Nothing of its own is outstanding.
            _ if log.migration.is_none() && (log.token == token || log.cut) => {
                node.phase = Phase::Rekeying {
                    old: log.token,
                    settle: false,
                };
                state.propose(Command::Rekey {
                    node: NodeId::S,
                    expects: log.token,
                });
            }
            _ if log.migration.is_none() => (node.phase, node.image) = (Phase::Idle, false),
            _ => return None,
        }
        Some(())
    }

    fn destination(&self, state: &mut State, step: Step) -> Option<()> {
        let (log, session) = (state.log, state.node(NodeId::D).session);
        let reserved = log.migration?.reserved;
        if step == Step::ClaimReserved {
            let again =
                log.migration?.session != session || state.node(NodeId::D).begun >= reserved;
            if again && !self.is(Mutant::ClaimsAgainAfterRestart) {
                state.propose(Command::Renew { burnt: reserved });
                return Some(());
            }
            state.node_mut(NodeId::D).image = true;
            self.send_claim(state, NodeId::D, reserved, false);
            return Some(());
        }
        let token = token_of(state.node(NodeId::D))?;
        state.propose(Command::Cutover {
            expects: log.token,
            claimed: token,
            session,
        });
        Some(())
    }

    /// Sends one SETATTR of a token's group.
    fn send_claim(&self, state: &mut State, id: NodeId, token: Token, settle: bool) {
        state.setattrs.push(self.group(token, id));
        state.setattrs.sort_unstable();
        state.node_mut(id).begun = token;
        state.node_mut(id).phase = Phase::Claiming {
            token,
            executed: false,
            settle,
        };
    }

    fn owner(&self, state: &mut State, step: Step, id: NodeId) -> Option<()> {
        let log = state.log;
        let unanswered = state.unanswered(id);
        let node = *state.node(id);
        let current = |token: Token| log.owner == id && log.token == token;
        match (step, node.phase) {
            (Step::Rekey(_), Phase::Running(token)) => {
                state.used.rekeys += 1;
                state.node_mut(id).phase = Phase::Rekeying {
                    old: token,
                    settle: unanswered && !self.is(Mutant::RekeyWithoutSettle),
                };
                state.propose(Command::Rekey {
                    node: id,
                    expects: token,
                });
            }
            (Step::Claim(_), Phase::Rekeying { old, settle }) => {
                if log.owner != id {
                    (state.node_mut(id).phase, state.node_mut(id).image) = (Phase::Idle, false);
                } else if log.token > old {
                    self.send_claim(state, id, log.token, settle);
                } else {
                    return None;
                }
            }
            (Step::Claim(_), Phase::Idle) => self.send_claim(state, id, log.token, true),
            (
                Step::Acknowledge(_),
                Phase::Claiming {
                    token,
                    executed: true,
                    settle,
                },
            ) => {
                let settle = settle && !self.is(Mutant::NoSettle);
                state.node_mut(id).phase = Phase::Claimed { token, settle };
            }
            (Step::Resend(_), Phase::Claiming { token, .. }) => {
                state.setattrs.push(self.group(token, id));
                state.setattrs.sort_unstable();
            }
            (Step::Burn(_), Phase::Claiming { token, settle, .. }) => {
                if state.used.rekeys >= self.bounds.rekeys {
                    return None;
                }
                state.used.rekeys += 1;
                if id == NodeId::D && node.image && log.migration.is_some() {
                    state.node_mut(id).phase = Phase::Idle;
                    state.propose(Command::Renew { burnt: token });
                } else if current(token) {
                    state.node_mut(id).phase = Phase::Rekeying { old: token, settle };
                    state.propose(Command::Rekey {
                        node: id,
                        expects: token,
                    });
                } else {
                    (state.node_mut(id).phase, state.node_mut(id).image) = (Phase::Idle, false);
                }
            }
            (Step::Settle(_), Phase::Claimed { token, .. }) => {
                let residue = state
                    .writes
                    .iter()
                    .any(|write| write.at == WriteAt::Checked && write.token < token);
                if residue {
                    return None;
                }
                state.node_mut(id).phase = Phase::Claimed {
                    token,
                    settle: false,
                };
            }
            (Step::Confirm(_), Phase::Claimed { token, .. }) => {
                if current(token) || self.is(Mutant::RunWithoutConfirm) && log.migration.is_none() {
                    state.node_mut(id).phase = Phase::Confirmed(token);
                } else if log.owner != id && log.migration.is_none() || log.token > token {
                    (state.node_mut(id).phase, state.node_mut(id).image) = (Phase::Idle, false);
                } else {
                    return None;
                }
            }
            (Step::Run(_), Phase::Confirmed(token) | Phase::Claiming { token, .. }) => {
                state.node_mut(id).phase = Phase::Running(token);
                state.activated = state.activated.max(token);
            }
            (Step::Thaw(_), Phase::Frozen(token)) => {
                if current(token) {
                    state.node_mut(id).phase = Phase::Running(token);
                } else {
                    (state.node_mut(id).phase, state.node_mut(id).image) = (Phase::Idle, false);
                }
            }
            _ => return None,
        }
        Some(())
    }
}

/// The token that a node's monitor has.
fn token_of(node: &Node) -> Option<Token> {
    match node.phase {
        Phase::Running(token)
        | Phase::Frozen(token)
        | Phase::Quiet(token)
        | Phase::Claimed { token, .. }
        | Phase::Claiming { token, .. }
        | Phase::Confirmed(token) => Some(token),
        Phase::Idle | Phase::Rekeying { .. } => None,
    }
}
