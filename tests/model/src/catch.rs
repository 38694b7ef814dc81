//! Finding the faults put in on purpose.

use crate::protocol::{Bounds, Mutant, Protocol, SMALL, Verdict};
use crate::step::Step;

/// Where a fault was found: in which bounds, with what verdict, and what it violated by which steps.
pub type Caught = (Bounds, Verdict, (&'static str, Vec<Step>));

/// Bounds to look in, smallest first.
pub fn places() -> Vec<Bounds> {
    let wrong = Bounds {
        clocks: false,
        lapses: 0,
        crashes: 0,
        aborts: 0,
        ..SMALL
    };
    vec![
        SMALL,
        wrong,
        Bounds { losses: 2, ..wrong },
        Bounds {
            rekeys: 2,
            losses: 2,
            ..wrong
        },
        Bounds {
            losses: 2,
            crashes: 2,
            lapses: 2,
            ..SMALL
        },
    ]
}

/// The first history that shows what a fault breaks, looking at `states` at most in each place.
pub fn catch(mutant: Mutant, states: usize) -> Option<Caught> {
    places().into_iter().find_map(|bounds| {
        let protocol = Protocol {
            bounds,
            mutant: Some(mutant),
        };
        let verdict = protocol.check(states);
        let violation = verdict.violation.clone()?;
        Some((bounds, verdict, violation))
    })
}
