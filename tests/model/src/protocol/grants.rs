//! Claim, confirm, run: how a node comes to run the machine under a token, and how tokens are granted.
//!
//! ```text
//!  granted ──► claim sent ──► answered ──► settled ──► confirmed ──► runs
//!                   └───────► no answer: burnt; only a fresh token goes on
//! ```

use super::{Protocol, migration};
use crate::host::{Flow, Guest, Node};
use crate::log::{Phase, Token};
use crate::mutants::Mutant;
use crate::state::State;
use crate::step::Step;
use crate::storage::Group;

/// What may happen.
pub fn offer(protocol: &Protocol, state: &State, steps: &mut Vec<Step>) {
    let log = &state.log;
    if log.owner.is_some() && log.rekeys < protocol.bounds.rekeys {
        steps.push(Step::Rekeyed);
    }
    let storage = &state.storage;
    for group in storage.awaited.union(storage.stray).iter() {
        steps.push(Step::ClaimExecuted(group));
    }
    for node in Node::ALL {
        let host = state.host(node);
        if !host.up {
            continue;
        }
        if log.owner.is_none() && !log.lost[node as usize] {
            steps.push(Step::Granted(node));
        }
        if claimable(protocol, state, node).is_some() {
            steps.push(Step::ClaimSent(node));
        }
        offer_flow(protocol, state, node, steps);
        let current = log.owner == Some(node) && log.token == host.token;
        if host.guest == Guest::Frozen && host.lease && current {
            steps.push(Step::Thaws(node));
        }
    }
}

fn offer_flow(protocol: &Protocol, state: &State, node: Node, steps: &mut Vec<Step>) {
    let host = state.host(node);
    let group = protocol.group(node, host.claim);
    let for_cutover = host.guest == Guest::Receiving && state.log.migrating();
    let unfenced = protocol.without(Mutant::ActivateBeforeFencing)
        && host.guest == Guest::None
        && state.log.owner == Some(node);
    let mut may_confirm = false;
    let mut may_run = unfenced;
    match host.flow {
        Flow::Idle => {}
        Flow::Claiming => {
            if state.storage.executed.contains(group) {
                steps.push(Step::ClaimAnswered(node));
            }
            steps.push(Step::ClaimGivenUp(node));
            if protocol.without(Mutant::SameTokenSentAgain) {
                steps.push(Step::ClaimSentAgain(node));
            }
        }
        // The cutover itself is the confirm.
        Flow::Claimed if for_cutover => {}
        Flow::Claimed if host.settle => {
            let waits = match host.guest {
                Guest::None => !protocol.without(Mutant::NoSettle),
                _ => !protocol.without(Mutant::RekeyWithoutSettle),
            };
            if !waits || !state.storage.holds_residue(group) {
                steps.push(Step::Settled(node));
            }
        }
        Flow::Claimed | Flow::Settled => {
            may_confirm = true;
            may_run |= protocol.without(Mutant::RunWithoutConfirm);
        }
        Flow::Confirmed => may_run = true,
    }
    // A confirm is good for the lease under which the log is read, and for no later one.
    let leased = host.lease || protocol.without(Mutant::PermitOutlivesLease);
    let current = state.log.owner == Some(node) && state.log.token == host.claim;
    if may_confirm && current && leased {
        steps.push(Step::Confirmed(node));
    }
    if may_run && host.lease {
        steps.push(Step::Runs(node));
    }
}

/// The token that `node` is to claim now, and whether it must settle.
fn claimable(protocol: &Protocol, state: &State, node: Node) -> Option<(Token, bool)> {
    let (log, host) = (&state.log, state.host(node));
    if host.guest == Guest::Receiving && log.migrating() {
        let told = log.migration.quiet || protocol.without(Mutant::CutoverBeforeQuiet);
        return (told && log.migration.reserved > host.begun)
            .then_some((log.migration.reserved, false));
    }
    if log.owner != Some(node) || log.token <= host.begun || !host.lease {
        return None;
    }
    let unanswered = state.unanswered(node);
    if !live(protocol, state, node) {
        // *Quiet* binds the node, not its monitor alone: while the migration is open a cutover may follow.
        let bound = log.migrating() && !protocol.without(Mutant::StartWhileMigrating);
        return (!bound).then_some((log.token, true));
    }
    match host.guest {
        Guest::None => None,
        Guest::Running | Guest::Frozen | Guest::Held | Guest::Receiving => {
            (log.token > host.token).then_some((log.token, unanswered))
        }
        // It has nothing outstanding, and the destination never ran.
        Guest::Quiet => {
            let aborted = log.migration.phase == Phase::Aborted && log.migration.rekeyed;
            (aborted || protocol.without(Mutant::VoidImageRuns)).then_some((log.token, false))
        }
    }
}

fn live(protocol: &Protocol, state: &State, node: Node) -> bool {
    let revived = protocol.without(Mutant::VoidImageRuns)
        && state.host(node).guest == Guest::Quiet
        && state.log.owner == Some(node);
    state.is_live(node) || revived
}

/// `Rekey`: the owner's next token, and a new t' above it for a migration under way.
pub fn rekeyed(protocol: &Protocol, state: &mut State) {
    let (owner, image) = (state.log.owner, state.log.image);
    state.log.rekeys += 1;
    let token = state.log.take_token();
    state.log.grant(owner, token, image);
    if state.log.migrating() && !protocol.without(Mutant::RekeyLeavesReserved) {
        state.log.migration.reserved = migration::reserve(protocol, state);
        state.log.migration.cutover_pending = false;
    }
    state.log.migration.rekeyed |= state.log.migration.phase == Phase::Aborted;
}

/// `StartVm` of a machine without an owner.
pub fn granted(state: &mut State, node: Node) {
    let token = state.log.take_token();
    state.log.grant(Some(node), token, token);
}

/// The claim of a token that this node never claimed; the guest stops, and a void one ends.
pub fn claim_sent(protocol: &Protocol, state: &mut State, node: Node) {
    let Some((token, settle)) = claimable(protocol, state, node) else {
        return;
    };
    claim_given_up(protocol, state, node);
    let receives = state.host(node).guest == Guest::Receiving && state.log.migrating();
    let live = live(protocol, state, node);
    let host = state.host_mut(node);
    host.died_under = 0;
    host.begun = token;
    host.claim = token;
    host.flow = Flow::Claiming;
    host.settle = settle;
    if !live && !receives {
        host.end_guest();
    } else if matches!(host.guest, Guest::Running | Guest::Frozen) {
        host.guest = Guest::Held;
    }
    let group = protocol.group(node, token);
    state.storage.stop_waiting(group);
    state.storage.awaited.insert(group);
}

/// The same SETATTR once more: the first may still be executed after the second's answer.
pub fn claim_sent_again(protocol: &Protocol, state: &mut State, node: Node) {
    let group = protocol.group(node, state.host(node).claim);
    state.storage.stop_waiting(group);
    state.storage.awaited.insert(group);
}

/// The server executes a SETATTR that is under way.
pub fn claim_executed(state: &mut State, group: Group) {
    state.storage.group = group;
    if state.storage.awaited.contains(group) {
        state.storage.executed.insert(group);
    }
}

/// The acknowledgement: that SETATTR is executed no more.
pub fn claim_answered(protocol: &Protocol, state: &mut State, node: Node) {
    let group = protocol.group(node, state.host(node).claim);
    state.storage.awaited.remove(group);
    state.storage.executed.remove(group);
    state.host_mut(node).flow = Flow::Claimed;
}

/// Nobody waits for the answer, and nobody claims that token again.
pub fn claim_given_up(protocol: &Protocol, state: &mut State, node: Node) {
    if state.host(node).flow == Flow::Claiming {
        let group = protocol.group(node, state.host(node).claim);
        state.storage.stop_waiting(group);
    }
    state.host_mut(node).forget_flow();
}

/// A linearizable read, begun after the last acknowledgement.
pub fn confirmed(state: &mut State, node: Node) {
    let image = state.log.image;
    let host = state.host_mut(node);
    host.flow = Flow::Confirmed;
    if matches!(host.guest, Guest::None | Guest::Receiving) {
        host.image = image;
    }
}

/// The run permit is used.
pub fn runs(protocol: &Protocol, state: &mut State, node: Node) {
    let granted = state.log.token;
    let host = state.host_mut(node);
    let unfenced = protocol.without(Mutant::ActivateBeforeFencing) && host.claim == 0;
    let token = if unfenced { granted } else { host.claim };
    if host.image == 0 {
        host.image = token;
    }
    host.guest = Guest::Running;
    host.token = token;
    host.forget_flow();
    state.newest_run = state.newest_run.max(token);
}
