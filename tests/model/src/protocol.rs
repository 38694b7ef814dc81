//! The protocol as a model: from each state, what may happen, and what comes of it.

mod grants;
mod io;
mod leases;
mod migration;

use stateright::{Model, Property};

use crate::bounds::Bounds;
use crate::host::{Flow, Guest, Node};
use crate::log::Token;
use crate::mutants::Mutant;
use crate::properties;
use crate::state::State;
use crate::step::Step;
use crate::storage::Group;

/// The protocol within bounds, whole or with one rule left out.
#[derive(Clone, Copy, Debug)]
pub struct Protocol {
    /// How much may happen.
    pub bounds: Bounds,
    /// What is broken.
    pub mutant: Option<Mutant>,
}

impl Protocol {
    fn without(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    /// The group that a claim of `token` by `node` gives the file.
    pub fn group(&self, node: Node, token: Token) -> Group {
        if self.without(Mutant::TokenPerNode) {
            node as Group + 1
        } else {
            token
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State::new(self.group(Node::Source, 1))]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        migration::offer(self, state, steps);
        grants::offer(self, state, steps);
        leases::offer(self, state, steps);
        io::offer(self, state, steps);
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut next = *last;
        let state = &mut next;
        match step {
            Step::MigrationStarts => migration::starts(self, state),
            Step::TokenRenewed => migration::token_renewed(self, state),
            Step::SaysQuiet => migration::says_quiet(state),
            Step::CutoverProposed => migration::cutover_proposed(state),
            Step::CutoverApplied => migration::cutover_applied(state),
            Step::AbortApplied => migration::abort_applied(self, state),
            Step::CutoverLearnt => migration::cutover_learnt(self, state),
            Step::QuietSourceRuns => migration::quiet_source_runs(state),
            Step::Rekeyed => grants::rekeyed(self, state),
            Step::Granted(node) => grants::granted(state, node),
            Step::ClaimSent(node) => grants::claim_sent(self, state, node),
            Step::ClaimSentAgain(node) => grants::claim_sent_again(self, state, node),
            Step::ClaimExecuted(group) => grants::claim_executed(state, group),
            Step::ClaimAnswered(node) => grants::claim_answered(self, state, node),
            Step::ClaimGivenUp(node) => grants::claim_given_up(self, state, node),
            Step::Settled(node) => state.host_mut(node).flow = Flow::Settled,
            Step::Confirmed(node) => grants::confirmed(state, node),
            Step::Runs(node) => grants::runs(self, state, node),
            Step::Thaws(node) => state.host_mut(node).guest = Guest::Running,
            Step::LeaseRunsOut(node) => leases::runs_out(self, state, node),
            Step::LeaseGranted(node) => leases::granted(self, state, node),
            Step::LossProposed(node) => leases::loss_proposed(state, node),
            Step::LossDropped(node) => state.log.condemned[node as usize] = false,
            Step::LossApplied(node) => leases::loss_applied(state, node),
            Step::Crashes(node) => leases::crashes(self, state, node),
            Step::Boots(node) => leases::boots(state, node),
            Step::ClusterdRestarts(node) => leases::clusterd_restarts(self, state, node),
            Step::MonitorDies(node) => leases::monitor_dies(self, state, node),
            Step::Released(node) => leases::released(state, node),
            Step::WriteSent(node) => io::sent(self, state, node),
            Step::WriteChecked(write) => io::checked(state, write),
            Step::WriteLands(write) => io::lands(state, write),
        }
        (next != *last).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Protocol>> {
        properties::of(self)
    }
}
