//! The migration: setup, *quiet*, cutover or abort, and who runs after it.
//!
//! The destination proposes the cutover, and one log decides between it and the abort. A quiet source runs
//! again only after the applied abort and a re-key (`grants.rs`).

use super::{Protocol, grants};
use crate::host::{Flow, Guest, Node};
use crate::log::{Migration, Phase};
use crate::mutants::Mutant;
use crate::state::State;
use crate::step::Step;

/// What may happen.
pub fn offer(protocol: &Protocol, state: &State, steps: &mut Vec<Step>) {
    let log = &state.log;
    let migration = &log.migration;
    let source = state.host(Node::Source);
    let destination = state.host(Node::Destination);
    if may_start(protocol, state) {
        steps.push(Step::MigrationStarts);
    }
    if log.migrating() && log.renewals < protocol.bounds.renewals {
        steps.push(Step::TokenRenewed);
    }
    let drained = !state.unanswered(Node::Source) || protocol.without(Mutant::NoDrain);
    if log.migrating() && source.guest == Guest::Running && drained {
        steps.push(Step::SaysQuiet);
    }
    let claimed = destination.flow == Flow::Claimed
        || (destination.flow == Flow::Claiming
            && protocol.without(Mutant::CutoverBeforeClaimAnswered));
    if log.migrating()
        && destination.guest == Guest::Receiving
        && destination.lease
        && claimed
        && destination.claim == migration.reserved
    {
        steps.push(Step::CutoverProposed);
    }
    let in_time = log.migrating() && log.owner == Some(Node::Source);
    let late = migration.phase == Phase::Aborted && protocol.without(Mutant::LateCutoverApplies);
    if migration.cutover_pending && (in_time || late) && !log.lost[Node::Destination as usize] {
        steps.push(Step::CutoverApplied);
    }
    let late = migration.phase == Phase::CutOver && protocol.without(Mutant::LateAbortApplies);
    if log.migrating() || late {
        steps.push(Step::AbortApplied);
    }
    if destination.guest == Guest::Receiving
        && destination.lease
        && destination.flow != Flow::Confirmed
        && migration.phase == Phase::CutOver
    {
        steps.push(Step::CutoverLearnt);
    }
    let current = log.owner == Some(Node::Source) && log.token == source.token;
    let reads_only = protocol.without(Mutant::InDoubtResolvedByReadOnly) && current;
    let gives_up = protocol.without(Mutant::ResumeAfterFinalWithoutAbort);
    let thaws = protocol.without(Mutant::ThawAfterAbortWithoutRekey)
        && current
        && migration.phase == Phase::Aborted;
    if source.guest == Guest::Quiet && source.lease && (reads_only || gives_up || thaws) {
        steps.push(Step::QuietSourceRuns);
    }
}

fn may_start(protocol: &Protocol, state: &State) -> bool {
    let (log, source) = (&state.log, state.host(Node::Source));
    let destination = state.host(Node::Destination);
    log.migrations < protocol.bounds.migrations
        && !log.migrating()
        && log.owner == Some(Node::Source)
        && source.guest == Guest::Running
        && source.token == log.token
        && destination.lease
        && !log.lost[Node::Destination as usize]
        && matches!(destination.guest, Guest::None | Guest::Receiving)
}

/// `StartMigration`: the token that the destination will own the machine under is taken now.
pub fn starts(protocol: &Protocol, state: &mut State) {
    let reserved = reserve(protocol, state);
    state.log.migrations += 1;
    state.log.migration = Migration {
        phase: Phase::Active,
        reserved,
        quiet: false,
        rekeyed: false,
        cutover_pending: false,
        cutover_applied: false,
        abort_applied: false,
    };
    state.host_mut(Node::Destination).guest = Guest::Receiving;
}

/// Takes the token for a destination out of the counter.
pub fn reserve(protocol: &Protocol, state: &mut State) -> crate::log::Token {
    if protocol.without(Mutant::PrepTokenIsNext) {
        state.log.token_last + 1
    } else {
        state.log.take_token()
    }
}

/// `RenewMigrationToken`: a burnt t' is replaced by a fresh one.
pub fn token_renewed(protocol: &Protocol, state: &mut State) {
    state.log.renewals += 1;
    state.log.migration.reserved = reserve(protocol, state);
    state.log.migration.cutover_pending = false;
}

/// *Quiet*: every reply is in. From here on only the log lets the source run.
pub fn says_quiet(state: &mut State) {
    state.host_mut(Node::Source).guest = Guest::Quiet;
    state.log.migration.quiet = true;
}

/// The destination has every acknowledgement and proposes.
pub fn cutover_proposed(state: &mut State) {
    state.log.migration.cutover_pending = true;
}

/// `Cutover`: owner and token pass in one entry.
pub fn cutover_applied(state: &mut State) {
    let log = &mut state.log;
    let reserved = log.migration.reserved;
    log.grant(Some(Node::Destination), reserved, reserved);
    log.token_last = log.token_last.max(reserved);
    log.migration.phase = Phase::CutOver;
    log.migration.cutover_pending = false;
    log.migration.cutover_applied = true;
}

/// `AbortMigration`: no token changes.
pub fn abort_applied(protocol: &Protocol, state: &mut State) {
    let log = &mut state.log;
    if log.migration.phase == Phase::CutOver {
        log.owner = Some(Node::Source);
    }
    log.abort();
    if !protocol.without(Mutant::LateCutoverApplies) {
        log.migration.cutover_pending = false;
    }
}

/// The cutover entry is the confirm of the claim that it names; the destination may learn of it late.
pub fn cutover_learnt(protocol: &Protocol, state: &mut State) {
    grants::claim_given_up(protocol, state, Node::Destination);
    let reserved = state.log.migration.reserved;
    let host = state.host_mut(Node::Destination);
    host.flow = Flow::Confirmed;
    host.claim = reserved;
    host.image = reserved;
}

/// A broken protocol's resume.
pub fn quiet_source_runs(state: &mut State) {
    state.host_mut(Node::Source).guest = Guest::Running;
}
