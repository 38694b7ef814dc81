//! Runs checks and says what came out.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Instant;

use stateright::{Checker, Expectation, HasDiscoveries, Model, Path};

use crate::bounds::Bounds;
use crate::mutants::Mutant;
use crate::properties;
use crate::protocol::Protocol;
use crate::state::State;
use crate::step::Step;

/// A history that breaks a property, step by step.
#[derive(Clone, Debug)]
pub struct Counterexample {
    /// The property.
    pub property: &'static str,
    /// What happened.
    pub steps: Vec<Step>,
}

impl Counterexample {
    fn new(property: &'static str, path: Path<State, Step>) -> Counterexample {
        Counterexample {
            property,
            steps: path.into_actions(),
        }
    }
}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, step) in self.steps.iter().enumerate() {
            writeln!(f, "{:>3}  {step}", at + 1)?;
        }
        write!(f, "     broken: {}", self.property)
    }
}

/// What a check within bounds found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The bounds.
    pub bounds: Bounds,
    /// Different states.
    pub states: usize,
    /// Steps taken to find them.
    pub steps: usize,
    /// Steps of the longest history without a detour.
    pub depth: usize,
    /// How long it took.
    pub seconds: f64,
    /// What broke.
    pub broken: Vec<Counterexample>,
    /// What had to be reached and was not.
    pub unreached: Vec<&'static str>,
    /// How many were reached.
    pub reached: usize,
}

impl Outcome {
    /// Whether everything holds and everything was reached.
    pub fn holds(&self) -> bool {
        self.broken.is_empty() && self.unreached.is_empty()
    }
}

/// Counts out every history within bounds.
pub fn exhaust(bounds: Bounds, threads: usize) -> Outcome {
    count_out(
        Protocol {
            bounds,
            mutant: None,
        },
        threads,
    )
}

/// Counts out every history of a protocol.
pub fn count_out(protocol: Protocol, threads: usize) -> Outcome {
    let begun = Instant::now();
    let checker = protocol
        .checker()
        .threads(threads)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    let mut found = checker.discoveries();
    let mut broken = Vec::new();
    let mut unreached = Vec::new();
    let mut reached = 0;
    for property in properties::of(&protocol) {
        match (property.expectation, found.remove(property.name)) {
            (Expectation::Always, Some(path)) => {
                broken.push(Counterexample::new(property.name, path));
            }
            (Expectation::Sometimes, None) => unreached.push(property.name),
            (Expectation::Sometimes, Some(_)) => reached += 1,
            (Expectation::Always | Expectation::Eventually, _) => {}
        }
    }
    Outcome {
        bounds: protocol.bounds,
        states: checker.unique_state_count(),
        steps: checker.state_count(),
        depth: checker.max_depth(),
        seconds: begun.elapsed().as_secs_f64(),
        broken,
        unreached,
        reached,
    }
}

/// The shortest history in which the rule that a mutant leaves out does its harm.
///
/// The checker looks at many states at a time and keeps the last history that it found among them, so it is
/// asked again for a shorter one until there is none.
pub fn hunt(mutant: Mutant) -> Option<Counterexample> {
    let mut best = hunt_shorter(mutant, None)?;
    while let Some(shorter) = hunt_shorter(mutant, Some(best.steps.len())) {
        best = shorter;
    }
    Some(best)
}

fn hunt_shorter(mutant: Mutant, than: Option<usize>) -> Option<Counterexample> {
    let protocol = Protocol {
        bounds: mutant.bounds(),
        mutant: Some(mutant),
    };
    let harm = mutant.harm();
    let mut builder = protocol
        .checker()
        .finish_when(HasDiscoveries::AllOf(BTreeSet::from([harm])));
    if let Some(steps) = than {
        // The first state has depth 1, and those at the maximum are not looked at.
        builder = builder.target_max_depth(steps + 1);
    }
    let path = builder.spawn_bfs().join().discovery(harm)?;
    Some(Counterexample::new(harm, path))
}
