//! Losses of power at every operation of the disk: what a store that comes back may and may not say.
//!
//! ```text
//!  history (seed) ──► LogStore ─► journal, snapshots, table ─► Disk in memory ── crash at operation k
//!                                                                │ survivors: any of what was not synced
//!  Oracle: asked for, acknowledged ◄── compare ◄── open again ◄──┘  (again cut short, killed, failing)
//! ```
//! A store that opens holds what it was asked for, in order, at least as far as it acknowledged; one whose
//! disk failed acknowledges nothing more; one that was damaged at rest refuses and says so. The
//! [mutants](Mutant) show that each of these can be missed.

mod disk;
mod files;
mod history;
mod oracle;
mod rest;
mod table;
mod tests;

use std::future::Future;
use std::panic::AssertUnwindSafe;

use futures::FutureExt;

use disk::Plan;
use history::{End, World};

/// Steps of a history, and of what follows a crash.
const STEPS: usize = 30;
const STEPS_AFTER: usize = 6;
/// Restarts from each crash point.
const RESTARTS: u64 = 2;

/// Something broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    /// The journal is not synced.
    NoDataSync,
    /// New files are renamed before they are synced.
    NoFileSync,
    /// Directories are not synced.
    NoDirectorySync,
    /// The table's flush does not reach the disk.
    NoTableSync,
    /// The table's content and the generation that speaks for it go in one flush.
    OneFlush,
    /// Answers come before the sync.
    AnswersEarly,
    /// A journal's record is taken whatever its checksum says.
    ChecksumIgnored,
    /// A sync that fails is taken for one that did not.
    SyncErrorsIgnored,
    /// After a sync that failed, the page cache is believed.
    CacheTrusted,
}

impl Mutant {
    const ALL: [Mutant; 9] = [
        Mutant::NoDataSync,
        Mutant::NoFileSync,
        Mutant::NoDirectorySync,
        Mutant::NoTableSync,
        Mutant::OneFlush,
        Mutant::AnswersEarly,
        Mutant::ChecksumIgnored,
        Mutant::SyncErrorsIgnored,
        Mutant::CacheTrusted,
    ];
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    /// Operations at which a store was stopped or its disk failed.
    points: u64,
    /// Stores opened again after one.
    restarts: u64,
    seeds: u64,
}

/// The answer of a future that waits for nobody.
fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("nothing to wait for")
}

/// Runs every crash point of one seed's history; gives the first violation.
fn run_seed(seed: u64, mutant: Option<Mutant>, counts: &mut Counts) -> Result<(), String> {
    counts.seeds += 1;
    let mut whole = World::new(seed, mutant);
    whole.live(STEPS)?;
    let operations = whole.disk().operations;
    // How a store is made is the same in all histories: a few look at that.
    let first = match seed % 8 {
        0 => 0,
        _ => {
            let mut new = World::new(seed, mutant);
            new.live(0)?;
            new.disk().operations
        }
    };
    for operation in first..operations {
        // Mostly crashes, sometimes a disk that fails.
        let fails = (seed + operation).is_multiple_of(4);
        let plan = match fails {
            true => Plan::Fail(operation),
            false => Plan::Crash(operation),
        };
        let mut world = World::new(seed, mutant);
        world.plan(plan);
        let at = |what: String| format!("{plan:?}: {what}");
        if world.live(STEPS).map_err(at)? == End::Done {
            return Err(at("this operation did not come".into()));
        }
        counts.points += 1;
        for restart in 0..RESTARTS {
            let at = |what: String| format!("{plan:?}, restart {restart}: {what}");
            let seed = seed ^ (operation << 32) ^ (restart << 60);
            again(&world, seed, counts).map_err(at)?;
        }
    }
    Ok(())
}

/// Starts the store of a stopped world again, with more crashes on the way, and lets it go on.
fn again(world: &World, seed: u64, counts: &mut Counts) -> Result<(), String> {
    let mut world = match seed >> 60 {
        0 => world.after_power_loss(seed),
        _ => world.after_kill(seed),
    };
    for round in 0..4 {
        counts.restarts += 1;
        let steps = match round {
            3 => 0,
            _ => world.below(STEPS_AFTER as u64) as usize,
        };
        let plan = match world.below(8) {
            _ if round == 3 => Plan::Nothing,
            0..4 => Plan::Crash(world.below(24)),
            4 => Plan::Fail(world.below(24)),
            _ => Plan::Nothing,
        };
        world.plan(plan);
        let at = |what: String| format!("{plan:?} in round {round}: {what}");
        world.live(steps).map_err(at)?;
        let seed = world.below(u64::MAX);
        world = match round < 2 && world.chance(3) {
            true => world.after_kill(seed),
            false => world.after_power_loss(seed),
        };
    }
    Ok(())
}

/// Runs seeds until `points` crash points are reached; gives the first seed with a violation.
fn search(
    first: u64,
    points: u64,
    mutant: Option<Mutant>,
    counts: &mut Counts,
) -> Option<(u64, String)> {
    let mut seed = first;
    while counts.points < points {
        let run = AssertUnwindSafe(|| run_seed(seed, mutant, counts));
        // An assertion of the store is a violation like any other.
        let result = std::panic::catch_unwind(run).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            Err(text.unwrap_or_else(|| "it panicked".into()))
        });
        if let Err(violation) = result {
            return Some((seed, violation));
        }
        seed += 1;
    }
    None
}
