//! The model, its bounds, what must hold, and the faults put in on purpose.

use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model, Property};

use crate::log::{Log, Migration};
use crate::state::{Node, NodeId, Phase, State, Used};
use crate::step::Step;

/// How much may happen in one history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Leases run out before nodes are declared lost.
    pub clocks: bool,
    /// WRITEs.
    pub writes: u8,
    /// Re-keys without need, and burnt claims.
    pub rekeys: u8,
    /// Nodes declared lost.
    pub losses: u8,
    /// Crashes.
    pub crashes: u8,
    /// Aborts proposed.
    pub aborts: u8,
    /// Leases that run out.
    pub lapses: u8,
}

/// The smallest bounds in which every mutant is found in one of the two worlds.
pub const SMALL: Bounds = Bounds {
    clocks: true,
    writes: 1,
    rekeys: 1,
    losses: 1,
    crashes: 1,
    aborts: 1,
    lapses: 1,
};

/// The worlds that are checked: small ones, or as large as an hour allows.
pub fn worlds(deep: bool) -> Vec<Bounds> {
    let with = |writes, rekeys, losses, crashes, lapses| Bounds {
        writes,
        rekeys,
        losses,
        crashes,
        lapses,
        ..SMALL
    };
    let wrong = |bounds: Bounds| Bounds {
        clocks: false,
        lapses: 0,
        ..bounds
    };
    match deep {
        false => vec![
            SMALL,
            with(1, 2, 1, 0, 1),
            wrong(with(1, 1, 2, 0, 0)),
            wrong(with(2, 1, 1, 1, 0)),
        ],
        true => vec![
            with(2, 2, 1, 1, 1),
            with(1, 1, 2, 1, 2),
            with(1, 2, 2, 0, 1),
            wrong(with(2, 2, 2, 0, 0)),
            wrong(with(1, 2, 2, 1, 0)),
        ],
    }
}

/// A fault put in on purpose: the checker must find what it breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// Who takes over does not wait for what the server has let through.
    NoSettle,
    /// The source says *quiet* with WRITEs outstanding.
    NoDrain,
    /// The reserved token is also the next one that a change of owner takes.
    PrepTokenIsNext,
    /// The destination proposes while its SETATTR is unanswered.
    CutoverBeforeClaimAnswered,
    /// Who claimed runs without reading the log again.
    RunWithoutConfirm,
    /// A SETATTR without an answer is sent again under the same token.
    SameTokenSentAgain,
    /// A destination that came back claims a token that it may have claimed in its life before.
    ClaimsAgainAfterRestart,
    /// The group names the node, not the grant.
    TokenPerNode,
    /// Who takes over runs before its claim is answered.
    ActivateBeforeFencing,
    /// A quiet source that reads "no cutover yet" runs again.
    InDoubtResolvedByReadOnly,
    /// A quiet source runs again without an applied abort.
    ResumeAfterFinalWithoutAbort,
    /// A quiet source whose lease comes back thaws.
    QuietSourceThaws,
    /// A re-key of the source leaves the reserved token standing.
    RekeyLeavesReserved,
    /// A re-key does not settle although WRITEs are unanswered.
    RekeyWithoutSettle,
    /// An abort takes effect after the cutover.
    LateAbortApplies,
    /// A source whose machine comes back to it after a cutover runs the image it still has.
    VoidImageResumes,
}

impl Mutant {
    /// All of them.
    pub const ALL: [Mutant; 16] = [
        Mutant::NoSettle,
        Mutant::NoDrain,
        Mutant::PrepTokenIsNext,
        Mutant::CutoverBeforeClaimAnswered,
        Mutant::RunWithoutConfirm,
        Mutant::SameTokenSentAgain,
        Mutant::ClaimsAgainAfterRestart,
        Mutant::TokenPerNode,
        Mutant::ActivateBeforeFencing,
        Mutant::InDoubtResolvedByReadOnly,
        Mutant::ResumeAfterFinalWithoutAbort,
        Mutant::QuietSourceThaws,
        Mutant::RekeyLeavesReserved,
        Mutant::RekeyWithoutSettle,
        Mutant::LateAbortApplies,
        Mutant::VoidImageResumes,
    ];
}

/// The protocol within bounds, whole or with a fault.
#[derive(Clone, Copy, Debug)]
pub struct Protocol {
    /// How much may happen.
    pub bounds: Bounds,
    /// What is broken.
    pub mutant: Option<Mutant>,
}

/// What a check found.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Different states reached.
    pub states: usize,
    /// Steps of the longest shortest history.
    pub depth: usize,
    /// How long it took.
    pub took: Duration,
    /// Whether every state within the bounds was reached.
    pub exhaustive: bool,
    /// What was violated, with the steps that lead there.
    pub violation: Option<(&'static str, Vec<Step>)>,
    /// What should happen in some history and does in none.
    pub never: Vec<&'static str>,
}

/// The machine runs on S under this token, and is being migrated.
const FIRST: u8 = 1;

impl Model for Protocol {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let node = Node {
            phase: Phase::Idle,
            alive: true,
            lease: true,
            lost: false,
            session: 0,
            begun: 0,
            image: false,
        };
        let source = Node {
            phase: Phase::Running(FIRST),
            image: true,
            ..node
        };
        let reserved = FIRST + 1;
        let next = match self.mutant {
            Some(Mutant::PrepTokenIsNext) => reserved,
            _ => reserved + 1,
        };
        let group = match self.mutant {
            Some(Mutant::TokenPerNode) => 100,
            _ => FIRST,
        };
        vec![State {
            log: Log {
                owner: NodeId::S,
                session: 0,
                boot: false,
                token: FIRST,
                next,
                migration: Some(Migration {
                    reserved,
                    session: 0,
                    renewals: 0,
                }),
                sessions: [0; 3],
                cut: false,
                aborted: false,
                fell: false,
            },
            proposals: Vec::new(),
            nodes: [source, node, node],
            group,
            setattrs: Vec::new(),
            writes: Vec::new(),
            activated: FIRST,
            landed_late: false,
            used: Used::default(),
        }]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        self.steps(state, steps);
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        self.after(state, step)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("a write lands late", |_, state: &State| !state.landed_late),
            Property::always(
                "an abort and a cutover both take effect",
                |_, state: &State| !(state.log.cut && state.log.aborted),
            ),
            Property::always("tokens fall", |_, state: &State| !state.log.fell),
            Property::always("a void image runs", |_, state: &State| {
                !state.log.cut
                    || state
                        .running()
                        .all(|(id, _)| id != NodeId::S || !state.node(id).image)
            }),
            Property::sometimes(
                "the machine runs on at the destination",
                |_, state: &State| {
                    state.log.cut && matches!(state.node(NodeId::D).phase, Phase::Running(_))
                },
            ),
            Property::sometimes(
                "a quiet source runs again after an abort",
                |_, state: &State| {
                    state.log.aborted
                        && state.node(NodeId::S).image
                        && matches!(state.node(NodeId::S).phase, Phase::Running(token) if token > FIRST)
                },
            ),
            Property::sometimes("a third node takes over", |_, state: &State| {
                matches!(state.node(NodeId::T).phase, Phase::Running(_))
            }),
            Property::sometimes("a setattr comes after a newer claim", |_, state: &State| {
                state.group < state.activated
            }),
        ];
        if self.bounds.clocks {
            properties.push(Property::always("two copies run", |_, state: &State| {
                state.running().count() <= 1
            }));
            properties.push(Property::always(
                "a guest runs under a token that is not current",
                |_, state: &State| {
                    state
                        .running()
                        .all(|(id, token)| state.log.owner == id && state.log.token == token)
                },
            ));
        }
        properties
    }
}

impl Protocol {
    /// Explores every history within the bounds, breadth first, until one violates something; with `states` as
    /// the most that are looked at.
    pub fn check(self, states: usize) -> Verdict {
        let begun = Instant::now();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let checker = self
            .checker()
            .threads(threads)
            .finish_when(HasDiscoveries::AnyFailures)
            .target_state_count(states)
            .spawn_bfs()
            .join();
        let discoveries = checker.discoveries();
        let violation = self
            .properties()
            .into_iter()
            .filter(|property| matches!(property.expectation, stateright::Expectation::Always))
            .find_map(|property| {
                let path = discoveries.get(property.name)?.clone();
                let steps = path.into_vec().into_iter().filter_map(|(_, step)| step);
                Some((property.name, steps.collect()))
            });
        let never = self
            .properties()
            .into_iter()
            .filter(|property| matches!(property.expectation, stateright::Expectation::Sometimes))
            .map(|property| property.name)
            .filter(|name| !discoveries.contains_key(name))
            .collect();
        Verdict {
            states: checker.unique_state_count(),
            depth: checker.max_depth(),
            took: begun.elapsed(),
            exhaustive: checker.is_done() && checker.state_count() < states,
            violation,
            never,
        }
    }
}
