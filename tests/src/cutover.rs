//! The cutover's failure table as data, and who plays it on real processes.
//!
//! A row says where a live migration is held (a failpoint in somebody's daemon or monitor, or the middle of the memory
//! copy), what happens to whom there, and what must come of it. The outcome is read off the machine's own words (its
//! guest's checks, its witness), off the processes that are left, and off the log.
//!
//! ```text
//!  prepare: everybody up, roles given ─► arm ─► migrate ─► held where the row says ─► deeds ─► outcome
//!      ▲                                                                                        │
//!      └──────────────────── the same cluster and machine, for the next row ────────────────────┘
//! ```

use anyhow::ensure;

mod scene;
mod table;

use scene::Stage;
pub use table::TABLE;

/// Who takes part in a migration on three nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Party {
    /// Where the machine runs.
    Source,
    /// Where it is to go.
    Destination,
    /// The node that has no part in it.
    Third,
}

/// Where the migration is when the deeds begin.
#[derive(Clone, Copy, Debug)]
pub enum Point {
    /// Memory is on its way.
    Copying,
    /// Each of these is held at its failpoint, all reached.
    Held(&'static [(Party, &'static str)]),
    /// The first is held and was reached; the rest holds whoever comes by later.
    HeldThen((Party, &'static str), &'static [(Party, &'static str)]),
}

/// What happens then, one after the other.
#[derive(Clone, Copy, Debug)]
pub enum Deed {
    /// Everything that the host has dies, as in a power cut.
    KillHost(Party),
    /// Its `clusterd` alone dies.
    KillDaemon(Party),
    /// It starts again.
    StartDaemon(Party),
    /// Its monitor alone dies.
    KillMonitor(Party),
    /// Its `clusterd` is frozen as it stands, what reaches it waits.
    StopDaemon(Party),
    /// Nothing passes between the two.
    Cut(Party, Party),
    /// Nothing passes from the first to the second; the other way is whole.
    CutOneWay(Party, Party),
    /// Nothing passes between it and any other node, nor the storage.
    Isolate(Party),
    /// The same; the storage is reached.
    IsolateFromNodes(Party),
    /// Every link is whole again.
    Heal,
    /// Whoever was held goes on.
    Release,
    /// Everybody is held whom the point still holds.
    Reached(Party, &'static str),
    /// That node has applied the cutover.
    Applied(Party),
    /// The others count it as lost.
    Lost(Party),
    /// The others have decided, and meanwhile its guest does not take a step.
    StaysStopped(Party),
    /// For a second its guest does not take a step, as nothing is decided.
    WaitsStopped(Party),
}

/// What must come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The log says aborted: the machine never stopped being itself, on the source.
    Continues,
    /// The same, after the source had said *quiet*: under a fresh token.
    ContinuesRekeyed,
    /// The log says cut over: it never stopped being itself, on the destination.
    Moves,
    /// Failover: it was booted again somewhere, once, and found everything that it had flushed.
    Restarts,
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// As a sentence.
    pub name: &'static str,
    /// Who leads meanwhile.
    pub leader: Party,
    /// Where it is when the deeds begin.
    pub point: Point,
    /// What happens.
    pub deeds: &'static [Deed],
    /// What must come of it, whichever way the race of cutover and abort went: the log's first entry wins.
    pub outcomes: &'static [Outcome],
    /// Whether a landing plays it.
    pub landing: bool,
}

impl Row {
    /// The failpoints that it arms.
    pub fn failpoints(&self) -> Vec<&'static str> {
        let names = |held: &[(Party, &'static str)]| held.iter().map(|(_, name)| *name).collect();
        match self.point {
            Point::Copying => Vec::new(),
            Point::Held(held) => names(held),
            Point::HeldThen((_, first), later) => {
                let mut all: Vec<_> = names(later);
                all.push(first);
                all
            }
        }
    }

    /// Whether somebody's daemon comes back in it: then a loss must not come before.
    fn is_patient(&self) -> bool {
        let starts = |deed: &Deed| matches!(deed, Deed::StartDaemon(_));
        self.deeds.iter().any(starts)
    }
}

/// Plays these rows, those of one lease profile after the other on the same cluster. A row that fails leaves its
/// cluster's logs behind, and the next one gets a new cluster.
///
/// # Errors
/// With every row that failed.
pub async fn play(rows: &[&Row]) -> anyhow::Result<()> {
    let mut wrong = Vec::new();
    for patient in [false, true] {
        let mut stage: Option<Stage> = None;
        for row in rows.iter().filter(|row| row.is_patient() == patient) {
            let begun = std::time::Instant::now();
            let mut here = match stage.take() {
                Some(stage) => stage,
                None => Stage::set(patient).await?,
            };
            match here.play(row).await {
                Ok(outcome) => {
                    println!("{}: {outcome:?}, {:?}", row.name, begun.elapsed());
                    stage = Some(here);
                }
                Err(error) => {
                    let kept = here.cluster.keep_logs();
                    println!("{}: {error:#}", row.name);
                    wrong.push(format!("{}: {error:#} (kept: {kept:?})", row.name));
                }
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
