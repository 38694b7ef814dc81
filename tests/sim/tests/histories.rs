//! Histories from seeds: a few hundred that hold, and mutants that do not.

use sim::{Mutant, World};

/// Seeds of a usual test run; `cargo xtask sim --seeds 100000` runs more.
const SEEDS: u64 = 300;

fn first_violation(seeds: u64, mutant: Option<Mutant>) -> Option<(u64, String)> {
    (1..=seeds).find_map(|seed| {
        let mut world = World::new(seed, mutant, false);
        world.run_caught();
        let violation = world.violation?;
        let counts = mutant.is_none_or(|mutant| mutant.is_caught_by(&violation));
        counts.then_some((seed, violation))
    })
}

#[test]
fn hundreds_of_histories_violate_nothing() {
    assert_eq!(first_violation(SEEDS, None), None);
}

#[test]
fn a_seed_is_a_history() {
    let timeline = |seed| {
        let mut world = World::new(seed, None, true);
        world.run();
        world.timeline
    };
    let first = timeline(9);
    assert!(first.len() > 100);
    assert_eq!(first, timeline(9));
    assert_ne!(first, timeline(8));
}

#[test]
fn much_happens_in_them() {
    let mut cutovers = 0;
    let mut losses = 0;
    let mut flushes = 0;
    for seed in 1..=20 {
        let mut world = World::new(seed, None, false);
        world.run();
        cutovers += world.counts.cutovers;
        losses += world.counts.losses;
        flushes += world.counts.flushes;
    }
    assert!(cutovers > 10 && losses > 5 && flushes > 1_000);
}

/// The ones that show soon; `cargo xtask sim --mutants` proves all of them.
#[test]
fn faults_put_in_on_purpose_are_caught() {
    for mutant in [
        Mutant::LostTooEarly,
        Mutant::LeaseWithoutQuorum,
        Mutant::NoFreeze,
        Mutant::EntersPastDeadline,
        Mutant::RunWithoutCutover,
        Mutant::CutoverBeforeClaim,
        Mutant::QuietSourceThaws,
        Mutant::QuietWithWritesOut,
        Mutant::QuietWhileRunning,
        Mutant::RunBeforeClaim,
        Mutant::OldTokensWrite,
        Mutant::FlushBeforeCommit,
        Mutant::VerifierIgnored,
        Mutant::VoidMonitorsStay,
        Mutant::StopTakenForShutDown,
        Mutant::DrainedTooEarly,
        Mutant::EndRewritten,
        Mutant::NoReason,
        Mutant::ApplyReadsClock,
        Mutant::SnapshotForgets,
        Mutant::LogForgotten,
        Mutant::LeasesStay,
        Mutant::CommitFallsBack,
        Mutant::RequestsForgotten,
        Mutant::FrozenEnded,
    ] {
        assert!(
            first_violation(SEEDS, Some(mutant)).is_some(),
            "{mutant:?} was not caught within {SEEDS} seeds"
        );
    }
}
