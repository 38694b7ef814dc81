//! The cutover's failure table on real processes: hold it at that point, kill or cut, then ask who runs, what the guest
//! says, and whether the log agrees. A landing plays the rows that are marked so, the long tier every row.

use std::collections::BTreeSet;

use anyhow::ensure;
use tests::cutover::{Outcome, Row, TABLE, play};

/// Plays every row of this tier that the part takes.
async fn part(takes: impl Fn(&Row) -> bool) -> anyhow::Result<()> {
    if !tests::kvm_or_skip("cutover failures") {
        return Ok(());
    }
    let all = proto::testing::by_tier(false, true);
    let rows: Vec<&Row> = TABLE
        .iter()
        .filter(|row| (all || row.landing) && takes(row))
        .collect();
    ensure!(!rows.is_empty(), "no row of the table");
    play(&rows).await
}

fn stays(row: &Row) -> bool {
    let stays = [Outcome::Continues, Outcome::ContinuesRekeyed];
    row.outcomes.iter().all(|outcome| stays.contains(outcome))
}

fn restarts(row: &Row) -> bool {
    row.outcomes == [Outcome::Restarts]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_on_the_way_to_the_destination_leaves_the_machine_on_its_source()
-> anyhow::Result<()> {
    part(stays).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cutover_that_the_log_has_or_gets_stands_whoever_dies() -> anyhow::Result<()> {
    part(|row| !stays(row) && !restarts(row)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_whose_memory_died_is_restarted_once_with_all_that_it_flushed()
-> anyhow::Result<()> {
    part(restarts).await
}

/// The names in `failpoint::reach("…")` in the sources of one program.
fn failpoints(program: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let mut folders = vec![std::path::Path::new(root).join(program).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).expect("a source");
            let names = text.split("failpoint::reach(\"").skip(1);
            found.extend(names.filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())));
        }
    }
    found
}

#[test]
fn every_failpoint_of_a_cutover_is_armed_by_a_row_and_every_row_arms_one_that_is_there() {
    let there: BTreeSet<String> = ["clusterd", "vmm"]
        .into_iter()
        .flat_map(failpoints)
        .collect();
    assert!(there.len() > 10, "{there:?}");
    let armed = TABLE.iter().flat_map(Row::failpoints).map(str::to_owned);
    let armed: BTreeSet<String> = armed.collect();
    assert_eq!(armed, there);
}

#[test]
fn rows_are_told_apart_by_their_names_and_a_landing_plays_one_of_each_outcome() {
    let names: BTreeSet<&str> = TABLE.iter().map(|row| row.name).collect();
    assert_eq!(names.len(), TABLE.len());
    for outcome in [
        Outcome::Continues,
        Outcome::ContinuesRekeyed,
        Outcome::Moves,
        Outcome::Restarts,
    ] {
        let mut landing = TABLE.iter().filter(|row| row.landing);
        assert!(landing.any(|row| row.outcomes == [outcome]), "{outcome:?}");
    }
}
