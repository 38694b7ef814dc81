//! The protocol stands in every order of its steps, and what is broken on purpose is found.

use protocol_model::{Bounds, Mutant, Protocol, SMALL, Step, catch};

/// More states than these bounds have.
const ALL: usize = 20_000_000;

/// Bounds that a minute is enough for.
const TINY: Bounds = Bounds {
    crashes: 0,
    ..SMALL
};

fn check(bounds: Bounds, mutant: Option<Mutant>) -> protocol_model::Verdict {
    Protocol { bounds, mutant }.check(ALL)
}

#[test]
fn at_most_one_copy_runs_and_no_write_lands_late_whatever_the_order() {
    let verdict = check(TINY, None);
    assert_eq!(verdict.violation, None);
    assert!(verdict.exhaustive, "{} states", verdict.states);
    assert_eq!(verdict.never, Vec::<&str>::new());
    assert!(verdict.states > 100_000, "{} states", verdict.states);
}

#[test]
fn the_disk_holds_even_where_clocks_are_wrong_by_any_amount() {
    let wrong = Bounds {
        clocks: false,
        lapses: 0,
        aborts: 0,
        ..TINY
    };
    let verdict = check(wrong, None);
    assert_eq!(verdict.violation, None);
    assert!(verdict.exhaustive, "{} states", verdict.states);
}

#[test]
fn without_settle_a_write_lands_late() {
    let verdict = check(TINY, Some(Mutant::NoSettle));
    let (violated, steps) = verdict.violation.expect("a counterexample");
    assert_eq!(violated, "a write lands late");
    // The WRITE was let through before the takeover's claim, and lands after its guest began to run.
    let at = |wanted: fn(&Step) -> bool| steps.iter().position(wanted).expect("the step");
    let checked = at(|step| matches!(step, Step::Check(_)));
    let claimed = at(|step| matches!(step, Step::Execute(_)));
    let ran = at(|step| matches!(step, Step::Run(_)));
    let landed = at(|step| matches!(step, Step::Land(_)));
    assert!(
        checked < claimed && claimed < ran && ran < landed,
        "{steps:?}"
    );
}

#[test]
fn every_fault_put_in_on_purpose_is_found() {
    let missed: Vec<_> = Mutant::ALL
        .into_iter()
        .filter(|mutant| catch(*mutant, ALL).is_none())
        .collect();
    assert!(missed.is_empty(), "{missed:?}");
}
