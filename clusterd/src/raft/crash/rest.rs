//! Damage at rest: bits that flip and files that go back or away while nobody looks.
//!
//! A store then refuses and says why, or nothing that it acknowledged is missing. One thing cannot be told
//! from a loss of power: damage to what was written under the last sync of all.

use std::path::PathBuf;

use super::disk::Seeded;
use super::history::World;

const SEEDS: u64 = 60;
const STEPS: usize = 40;
const BLOCK: usize = 4096;

/// A closed store with some history.
fn closed(seed: u64) -> World {
    let mut world = World::new(seed, None);
    world.live_and_close(STEPS).unwrap();
    world
}

/// Refused, with what was said; or opened with everything in it.
fn opened(world: &World, seed: u64, what: &str) -> Option<String> {
    let refused = world.after_power_loss(seed).open_damaged();
    refused.unwrap_or_else(|violation| panic!("seed {seed}, {what}: {violation}"))
}

/// Where in a journal the bytes of records are that a later sync came after.
fn acknowledged(journal: &[u8]) -> Vec<usize> {
    let number = |at: usize| u64::from_le_bytes(journal[at..at + 8].try_into().unwrap());
    let starts = (0..journal.len()).step_by(BLOCK);
    let records: Vec<_> = starts
        .filter(|at| journal[*at..*at + 4] == *b"BTJL")
        .map(|at| (number(at + 8), number(at + 16), at))
        .collect();
    let newest = records.iter().map(|(generation, ..)| *generation).max();
    let records = records
        .into_iter()
        .filter(|(generation, ..)| Some(*generation) == newest);
    let sequence = |number: u64| number & ((1 << 48) - 1);
    let records: Vec<_> = records.map(|(_, number, at)| (number, at)).collect();
    let last = records
        .iter()
        .max_by_key(|(number, _)| sequence(*number))
        .map_or(0, |(number, _)| sequence(*number) - (number >> 48));
    records
        .into_iter()
        .filter(|(number, _)| sequence(*number) < last)
        .flat_map(|(_, at)| {
            let length = u32::from_le_bytes(journal[at + 4..at + 8].try_into().unwrap());
            at..at + 32 + length as usize
        })
        .collect()
}

#[test]
fn a_bit_that_flips_in_an_acknowledged_record_is_refused() {
    let (mut flips, mut refusals) = (0, 0);
    for seed in 0..SEEDS {
        let world = closed(seed);
        let mut rng = Seeded(seed);
        let path = world.dir().join("journal");
        let mut at = Vec::new();
        world
            .disk()
            .rot(&path, |journal| at = acknowledged(journal))
            .unwrap();
        for _ in 0..at.len().min(40) {
            let (byte, bit) = (at[rng.below(at.len() as u64) as usize], rng.below(8));
            let flip = |journal: &mut Vec<u8>| journal[byte] ^= 1 << bit;
            world.disk().rot(&path, flip).unwrap();
            let refused = opened(&world, seed, &format!("bit {bit} of byte {byte} flipped"));
            assert!(
                refused
                    .as_ref()
                    .is_none_or(|why| why.contains("may not vote")),
                "{refused:?}"
            );
            (flips, refusals) = (flips + 1, refusals + u32::from(refused.is_some()));
            world.disk().rot(&path, flip).unwrap();
        }
    }
    println!("{flips} bits flipped, {refusals} refused");
    assert_eq!(flips, refusals);
    assert!(flips > 500, "{flips}");
}

#[test]
fn a_snapshot_that_is_damaged_is_refused_or_not_needed() {
    let (mut damages, mut refusals) = (0, 0);
    for seed in 0..SEEDS {
        let world = closed(seed);
        let mut rng = Seeded(seed);
        let snapshots = world.disk().list(&world.dir().join("snapshots"));
        for path in snapshots {
            let flip = |content: &mut Vec<u8>| {
                let at = rng.below(content.len() as u64) as usize;
                content[at] ^= 4;
            };
            world.disk().rot(&path, flip).unwrap();
            let mut damaged = world.after_power_loss(seed);
            damaged.forget_snapshots();
            let refused = damaged
                .open_damaged()
                .unwrap_or_else(|violation| panic!("seed {seed}: {violation}"));
            (damages, refusals) = (damages + 1, refusals + u32::from(refused.is_some()));
        }
    }
    println!("{damages} snapshots damaged, {refusals} refused");
    assert!(damages > 20 && refusals > 5, "{damages}, {refusals}");
}

#[test]
fn a_table_that_goes_back_is_refused_or_the_journal_has_what_it_lost() {
    let (mut returns, mut refusals) = (0, 0);
    for seed in 0..SEEDS {
        let world = World::new(seed, None);
        world.disk().table.history = Some(Vec::new());
        let mut world = world;
        world.live_and_close(STEPS).unwrap();
        let flushes = world.disk().table.history.as_ref().map_or(0, Vec::len);
        for flush in 0..flushes {
            let mut back = world.after_power_loss(seed);
            back.disk().table.go_back(flush);
            let refused = back
                .open_damaged()
                .unwrap_or_else(|violation| panic!("seed {seed}, flush {flush}: {violation}"));
            (returns, refusals) = (returns + 1, refusals + u32::from(refused.is_some()));
        }
    }
    println!("{returns} tables went back, {refusals} refused");
    assert!(returns > 200 && refusals > 50, "{returns}, {refusals}");
}

#[test]
fn a_store_whose_files_are_gone_is_not_made_again() {
    for seed in 0..SEEDS {
        for gone in ["raft-store", "journal", "log/db"] {
            let world = closed(seed);
            let path: PathBuf = world.dir().join(gone);
            world.disk().lose(&path);
            let refused = opened(&world, seed, gone);
            assert!(refused.is_some(), "seed {seed}: opened without {gone}");
        }
    }
}
