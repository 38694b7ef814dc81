//! The store against crashes, the crashes against mutants, and damage at rest.

use std::time::Instant;

use super::{Counts, Mutant, search};

/// Crash points of the test in a landing and in the long tier; [`POINTS`] asks for more.
const POINTS_DEFAULT: [u64; 2] = [4_000, 12_000];
/// Crash points within which a mutant must be caught.
const POINTS_MUTANT: u64 = 3_000;
/// How many crash points, from which seed on, and where the figures go.
const POINTS: &str = "BATON_CRASH_POINTS";
const SEED: &str = "BATON_CRASH_SEED";

fn variable(name: &str, default: u64) -> u64 {
    let value = std::env::var(name).ok();
    value.map_or(default, |value| value.parse().expect(name))
}

#[test]
fn a_store_holds_what_it_acknowledged_after_a_crash_at_any_operation() {
    let mut counts = Counts::default();
    let [landing, long] = POINTS_DEFAULT;
    let default = proto::testing::by_tier(landing, long);
    let (points, seed) = (variable(POINTS, default), variable(SEED, 1));
    let begun = Instant::now();
    let found = search(seed, points, None, &mut counts);
    let took = begun.elapsed().as_secs_f64();
    println!(
        "{} crash points in {} histories, {} restarts, {took:.1} s",
        counts.points, counts.seeds, counts.restarts
    );
    if let Some((seed, violation)) = found {
        panic!("seed {seed}: {violation}\nreplay it: cargo xtask crash --points 1 --seed {seed}");
    }
}

#[test]
fn every_mutant_is_caught() {
    let mut missed = Vec::new();
    for mutant in Mutant::ALL {
        let mut counts = Counts::default();
        match search(1, POINTS_MUTANT, Some(mutant), &mut counts) {
            Some((seed, violation)) => {
                println!(
                    "{mutant:?} after {} points, seed {seed}: {violation}",
                    counts.points
                );
            }
            None => missed.push(mutant),
        }
    }
    assert!(missed.is_empty(), "{missed:?}");
}
