//! The protocol, counted out within small bounds; `protocol-model` counts out larger ones.

use protocol_model::{Bounds, Outcome, SMALL, exhaust};

/// Two, so that the counting shares a machine with other tests.
const THREADS: usize = 2;

fn counted_out(bounds: Bounds) -> Outcome {
    let outcome = exhaust(bounds, THREADS);
    for broken in &outcome.broken {
        println!("{broken}");
    }
    assert!(outcome.broken.is_empty());
    assert_eq!(outcome.unreached, Vec::<&str>::new());
    outcome
}

#[test]
fn within_small_bounds_everything_holds_and_all_that_matters_is_reached() {
    let outcome = counted_out(SMALL[0]);
    assert!(outcome.states > 100_000, "{} states", outcome.states);
    assert_eq!(outcome.reached, 11);
}

#[test]
fn the_disk_is_safe_when_leases_do_not_hold() {
    let bounds = SMALL[1];
    assert!(!bounds.leases_hold);
    counted_out(bounds);
}

#[test]
fn two_counts_of_the_same_bounds_find_the_same_states() {
    let few = Bounds {
        renewals: 0,
        writes: 1,
        ..SMALL[0]
    };
    assert_eq!(exhaust(few, 1).states, exhaust(few, THREADS).states);
}
