//! What must always hold, and what must be reached for that to mean something.

use stateright::Property;

use crate::bounds::Bounds;
use crate::host::{Flow, Guest, Node};
use crate::log::Phase;
use crate::protocol::Protocol;
use crate::state::State;

/// At most one copy of the machine executes.
pub const ONE_RUNS: &str = "at most one copy runs";
/// Whoever executes is the owner in the log, in the machine's present image.
pub const OWNER_RUNS: &str = "only the owner runs, in the machine's present image";
/// No WRITE lands after a guest began to run under a newer token: two never write.
pub const NO_LATE_LANDING: &str = "no write lands after a newer token ran";
/// A cutover and an abort of one migration never both take effect.
pub const ONE_END: &str = "a migration is cut over or aborted, never both";
/// Every owner's token is above all earlier ones', so none is granted twice.
pub const TOKENS_GROW: &str = "tokens only grow and are never reused";
/// What is reserved for a destination stays above what the source may take meanwhile.
pub const RESERVED_ABOVE: &str = "a reserved token is above the owner's";
/// No SETATTR of a token under which a guest runs is still under way.
pub const CLAIM_IS_OVER: &str = "nobody runs under a token whose claim may still be executed";

type Condition = fn(&Protocol, &State) -> bool;

const ALWAYS: [(&str, Condition); 7] = [
    (ONE_RUNS, |protocol, state| {
        state.running() <= 1 || !protocol.bounds.leases_hold
    }),
    (OWNER_RUNS, |protocol, state| {
        !protocol.bounds.leases_hold
            || Node::ALL.into_iter().all(|node| {
                let host = state.host(node);
                !state.runs(node)
                    || (state.log.owner == Some(node)
                        && state.log.image == host.image
                        && state.log.token >= host.token)
            })
    }),
    (NO_LATE_LANDING, |_, state| !state.landed_late),
    (ONE_END, |_, state| {
        let migration = &state.log.migration;
        !(migration.cutover_applied && migration.abort_applied)
    }),
    (TOKENS_GROW, |_, state| !state.log.token_fell),
    (RESERVED_ABOVE, |_, state| {
        let log = &state.log;
        !log.migrating() || log.migration.reserved > log.token
    }),
    (CLAIM_IS_OVER, |protocol, state| {
        let under_way = state.storage.awaited.union(state.storage.stray);
        Node::ALL.into_iter().all(|node| {
            let group = protocol.group(node, state.host(node).token);
            !state.runs(node) || !under_way.contains(group)
        })
    }),
];

/// A state to be reached, and whether bounds allow it.
struct Reached {
    name: &'static str,
    possible: fn(&Bounds) -> bool,
    condition: Condition,
}

const SOMETIMES: [Reached; 13] = [
    Reached {
        name: "a migration completes",
        possible: |bounds| bounds.migrations > 0,
        condition: |_, state| {
            state.runs(Node::Destination) && state.log.migration.phase == Phase::CutOver
        },
    },
    Reached {
        name: "an abort lets a quiet source run again",
        possible: |bounds| bounds.migrations > 0 && bounds.rekeys > 0,
        condition: |_, state| {
            let migration = &state.log.migration;
            state.runs(Node::Source)
                && migration.phase == Phase::Aborted
                && migration.quiet
                && migration.rekeyed
        },
    },
    Reached {
        name: "an abort finds the destination's claim done",
        possible: |bounds| bounds.migrations > 0,
        condition: |_, state| {
            let migration = &state.log.migration;
            migration.phase == Phase::Aborted
                && state.storage.group == migration.reserved
                && state.host(Node::Destination).flow == Flow::Claimed
        },
    },
    Reached {
        name: "a source that was re-keyed during its migration is cut over",
        possible: |bounds| bounds.migrations > 0 && bounds.rekeys > 0,
        condition: |_, state| {
            state.log.migration.phase == Phase::CutOver
                && state.log.rekeys > 0
                && state.host(Node::Source).guest == Guest::Quiet
                && state.host(Node::Source).token > 1
        },
    },
    Reached {
        name: "a renewed token is cut over",
        possible: |bounds| bounds.migrations > 0 && bounds.renewals > 0,
        condition: |_, state| {
            state.runs(Node::Destination)
                && state.log.migration.phase == Phase::CutOver
                && state.log.renewals > 0
        },
    },
    Reached {
        name: "a machine runs again under the next token",
        possible: |bounds| bounds.rekeys > 0,
        condition: |_, state| state.runs(Node::Source) && state.host(Node::Source).token > 1,
    },
    Reached {
        name: "a lease comes back to a frozen machine that is still the node's",
        possible: |bounds| bounds.faults > 0,
        condition: |_, state| {
            Node::ALL.into_iter().any(|node| {
                let host = state.host(node);
                host.guest == Guest::Frozen && host.lease && state.is_live(node)
            })
        },
    },
    Reached {
        name: "the third node takes over",
        possible: |bounds| bounds.faults > 0,
        condition: |_, state| state.runs(Node::Third),
    },
    Reached {
        name: "the machine survives its source",
        possible: |bounds| bounds.migrations > 0 && bounds.faults > 0,
        condition: |_, state| {
            state.runs(Node::Destination)
                && state.log.migration.phase == Phase::CutOver
                && !state.host(Node::Source).up
        },
    },
    Reached {
        name: "the destination is lost after the cutover and the third node takes over",
        possible: |bounds| bounds.migrations > 0 && bounds.faults > 0,
        condition: |_, state| {
            state.runs(Node::Third)
                && state.log.migration.phase == Phase::CutOver
                && state.host(Node::Source).guest == Guest::Quiet
        },
    },
    Reached {
        name: "the machine comes back to a node that it was taken from",
        possible: |bounds| bounds.faults > 1,
        condition: |_, state| {
            state.runs(Node::Source)
                && state.host(Node::Source).image > 1
                && state.log.migrations == 0
        },
    },
    Reached {
        name: "the server holds a write that the fence came too late for",
        possible: |bounds| bounds.faults > 0 || bounds.rekeys > 0,
        condition: |_, state| state.storage.holds_residue(state.storage.group),
    },
    Reached {
        name: "a burnt claim is executed under a running guest",
        possible: |bounds| bounds.rekeys > 1,
        condition: |_, state| {
            state.storage.stray.contains(state.storage.group) && state.running() == 1
        },
    },
];

/// The properties of a protocol: with a rule left out, those alone that must hold.
pub fn of(protocol: &Protocol) -> Vec<Property<Protocol>> {
    let always = ALWAYS
        .iter()
        .map(|&(name, condition)| Property::always(name, condition));
    let sometimes = SOMETIMES
        .iter()
        .filter(|reached| protocol.mutant.is_none() && (reached.possible)(&protocol.bounds))
        .map(|reached| Property::sometimes(reached.name, reached.condition));
    always.chain(sometimes).collect()
}
