//! Node leases, lost nodes and crashes.
//!
//! Time is a flag: the lease runs out at any moment, and only then may the leader declare the node lost.

use super::{Protocol, grants};
use crate::host::{Flow, Guest, Host, Node};
use crate::mutants::Mutant;
use crate::state::State;
use crate::step::Step;

/// What may happen.
pub fn offer(protocol: &Protocol, state: &State, steps: &mut Vec<Step>) {
    let log = &state.log;
    for node in Node::ALL {
        let host = state.host(node);
        let (lost, condemned) = (log.lost[node as usize], log.condemned[node as usize]);
        if state.faults < protocol.bounds.faults && host.up && state.has_part(node) {
            steps.push(Step::Crashes(node));
            if host.lease {
                steps.push(Step::LeaseRunsOut(node));
            }
            steps.push(Step::ClusterdRestarts(node));
            if host.guest != Guest::None {
                steps.push(Step::MonitorDies(node));
            }
        }
        if log.owner == Some(node) && log.token == host.died_under {
            steps.push(Step::Released(node));
        }
        if !host.up {
            steps.push(Step::Boots(node));
        } else if !host.lease && (!condemned || protocol.without(Mutant::LeaseWhileCondemned)) {
            steps.push(Step::LeaseGranted(node));
        }
        let party = log.owner == Some(node) || (log.migrating() && node != Node::Third);
        let expired = !host.lease
            || !protocol.bounds.leases_hold
            || protocol.without(Mutant::LostBeforeFrozen);
        let in_bounds = !host.lease || state.faults < protocol.bounds.faults;
        if party && expired && in_bounds && !lost && !condemned {
            steps.push(Step::LossProposed(node));
        }
        if condemned {
            steps.push(Step::LossDropped(node));
            steps.push(Step::LossApplied(node));
        }
    }
}

/// The leader has waited long enough. To do so in spite of a valid lease is a fault.
pub fn loss_proposed(state: &mut State, node: Node) {
    state.faults += u8::from(state.host(node).lease);
    state.log.condemned[node as usize] = true;
}

/// The guest freezes by itself, and a permit that was not used is void.
pub fn runs_out(protocol: &Protocol, state: &mut State, node: Node) {
    state.faults += 1;
    let host = state.host_mut(node);
    host.lease = false;
    match host.guest {
        Guest::Running if !protocol.without(Mutant::NoFreeze) => host.guest = Guest::Frozen,
        Guest::Quiet if protocol.without(Mutant::QuietSourceThaws) => host.guest = Guest::Frozen,
        _ => {}
    }
    if host.flow == Flow::Confirmed && !protocol.without(Mutant::PermitOutlivesLease) {
        host.flow = Flow::Settled;
    }
}

/// The node uses a lease only once it has applied what the log said at the grant: what is void ends.
pub fn granted(protocol: &Protocol, state: &mut State, node: Node) {
    if state.is_void(node) && !protocol.without(Mutant::LeaseBeforeCaughtUp) {
        state.host_mut(node).end_guest();
    }
    state.log.lost[node as usize] = false;
    state.host_mut(node).lease = true;
}

/// `NodeLost`.
pub fn loss_applied(state: &mut State, node: Node) {
    state.log.condemned[node as usize] = false;
    state.log.lost[node as usize] = true;
    state.log.take_from(node);
    state.log.migration.cutover_pending &= state.log.migrating();
}

/// The host dies with its monitor; what it sent stays under way.
pub fn crashes(protocol: &Protocol, state: &mut State, node: Node) {
    state.faults += 1;
    grants::claim_given_up(protocol, state, node);
    *state.host_mut(node) = Host {
        up: false,
        lease: false,
        ..Host::IDLE
    };
}

/// A new life of the host: the machines of the last one are taken from it when it registers.
pub fn boots(state: &mut State, node: Node) {
    if !state.log.lost[node as usize] {
        state.log.take_from(node);
        state.log.migration.cutover_pending &= state.log.migrating();
    }
    state.log.lost[node as usize] = false;
    state.log.condemned[node as usize] = false;
    *state.host_mut(node) = Host {
        begun: state.log.token_last,
        ..Host::IDLE
    };
}

/// A process dies; its node stays, and knows. A flow that was for this monitor ends with it.
pub fn monitor_dies(protocol: &Protocol, state: &mut State, node: Node) {
    state.faults += 1;
    grants::claim_given_up(protocol, state, node);
    let owned = state.log.owner == Some(node);
    let token = if owned { state.log.token } else { 0 };
    let host = state.host_mut(node);
    host.end_guest();
    host.died_under = token;
}

/// `Release`: the machine has no owner, and whoever starts it settles.
pub fn released(state: &mut State, node: Node) {
    state.host_mut(node).died_under = 0;
    state.log.take_from(node);
    state.log.migration.cutover_pending &= state.log.migrating();
}

/// `clusterd` forgets its flows; any token granted so far may have been claimed by its earlier life.
pub fn clusterd_restarts(protocol: &Protocol, state: &mut State, node: Node) {
    state.faults += 1;
    grants::claim_given_up(protocol, state, node);
    let granted = state.log.token_last;
    state.host_mut(node).begun = if protocol.without(Mutant::RestartForgetsClaims) {
        0
    } else {
        granted
    };
}
