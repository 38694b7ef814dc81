//! What a migration's source sends: the destination may refuse it, and writes nothing outside the guest's memory.
//!
//! ```text
//!  first byte   0       a connection's first frame
//!               1       one channel's stream as it is
//!               else    frames of two channels with right sums: any kind, any order, any size
//! ```

use std::collections::BTreeSet;
use std::io::Cursor;
use std::sync::{Arc, Mutex};

use migration_core::fuzzing::{Receiver, introduce, seal};
use migration_core::{HostError, MemorySink, PAGE_SIZE, Region};
use xxhash_rust::xxh3::xxh3_64;

use crate::input::{Input, field};
use crate::runtime::block_on;
use crate::target::{MemoryBound, Target};

/// The target.
pub const TARGET: Target = Target {
    name: "migration_stream",
    run,
    seeds,
    input_bytes_max: 4096,
    // One frame of the largest kind, twice: as it is made here, and while its buffer grows. A page is named by
    // a few bytes of the input and made here.
    memory: MemoryBound {
        base: 4 << 20,
        each: 64,
    },
};

const CHANNELS: u16 = 2;
const REGIONS: [Region; 2] = [
    Region {
        guest_address: 0,
        pages: 1100,
    },
    Region {
        guest_address: 1 << 32,
        pages: 513,
    },
];
/// Frames of one input at most: what is beyond is more of the same.
const FRAMES_MAX: usize = 64;

const SETUP: u8 = 2;
const PAGES: u8 = 3;
const ZERO: u8 = 4;
const ROUND_END: u8 = 5;
const QUIET: u8 = 6;
const DEVICE_STATE: u8 = 7;
const FINAL: u8 = 8;
const HEARTBEAT: u8 = 9;

/// Memory that remembers which pages were written, and is touched nowhere else.
#[derive(Default)]
struct Memory {
    written: Mutex<BTreeSet<(usize, u64)>>,
}

impl Memory {
    fn inside(region: usize, first_page: u64, count: u64) {
        let end = first_page.checked_add(count);
        let pages = REGIONS.get(region).map_or(0, |region| region.pages);
        assert!(
            count > 0 && end.is_some_and(|end| end <= pages),
            "{count} pages at {first_page} of region {region} are not the guest's"
        );
    }
}

impl MemorySink for Memory {
    fn regions(&self) -> Vec<Region> {
        REGIONS.to_vec()
    }

    fn write_pages(&self, region: usize, first_page: u64, data: &[u8]) -> Result<(), HostError> {
        let count = (data.len() / PAGE_SIZE) as u64;
        Memory::inside(region, first_page, count);
        assert!(data.len().is_multiple_of(PAGE_SIZE), "half a page");
        let mut written = self.written.lock().map_err(|error| error.to_string())?;
        written.extend((first_page..first_page + count).map(|page| (region, page)));
        Ok(())
    }

    fn zero_pages(&self, region: usize, first_page: u64, count: u64) -> Result<(), HostError> {
        Memory::inside(region, first_page, count);
        let written = self.written.lock().map_err(|error| error.to_string())?;
        assert!(
            (first_page..first_page + count).all(|page| written.contains(&(region, page))),
            "a page is made zero that is"
        );
        Ok(())
    }
}

fn run(data: &[u8]) {
    let Some((mode, rest)) = data.split_first() else {
        return;
    };
    match mode {
        0 => {
            let _ = block_on(introduce(Box::new(Cursor::new(rest.to_vec()))));
        }
        1 => {
            let mut receiver = Receiver::new(Arc::new(Memory::default()), 1);
            let stream = Box::new(Cursor::new(rest.to_vec()));
            let _ = block_on(receiver.listen(0, stream));
        }
        _ => frames(Input(rest)),
    }
}

/// What a source knows of a channel.
#[derive(Default)]
struct Sent {
    round: u32,
    device_state: Vec<u8>,
}

fn frames(mut input: Input<'_>) {
    let mut receiver = Receiver::new(Arc::new(Memory::default()), CHANNELS);
    let mut sent: [Sent; CHANNELS as usize] = Default::default();
    for sequence in 0..FRAMES_MAX {
        if input.is_empty() {
            return;
        }
        let choice = input.u8();
        let channel = u16::from(choice >> 7);
        let (kind, payload) = frame(choice & 0x7f, &mut input, &mut sent[usize::from(channel)]);
        let frame = seal(kind, sequence as u32, &payload);
        if receiver.take(channel, &frame).is_err() {
            return;
        }
    }
}

/// A frame's kind and payload: of one that a source could send, with numbers of the input's; or anything at all.
fn frame(kind: u8, input: &mut Input<'_>, sent: &mut Sent) -> (u8, Vec<u8>) {
    let payload = match kind {
        SETUP => setup(input.u8()),
        PAGES => {
            let runs = runs(input);
            let pages: usize = runs.iter().map(|run| run.1 as usize).sum();
            // Up to a few bytes more or less than the pages named, and 256 pages at most.
            let off_by = input.u8();
            let length = (pages.min(256) * PAGE_SIZE + usize::from(off_by)).saturating_sub(128);
            let length = if off_by == 0 {
                pages.min(256) * PAGE_SIZE
            } else {
                length
            };
            [vec![0x5a; length], encode(&runs)].concat()
        }
        ZERO => encode(&runs(input)),
        ROUND_END => {
            let (round, last) = (u32::from(input.u8()), input.u8());
            sent.round = sent.round.wrapping_add(1).wrapping_add(round);
            [sent.round.to_le_bytes(), u32::from(last).to_le_bytes()].concat()
        }
        QUIET | HEARTBEAT => Vec::new(),
        DEVICE_STATE => {
            let (total, off_by) = (u64::from(input.u32()), u64::from(input.u8()));
            let offset = (sent.device_state.len() as u64).wrapping_add(off_by);
            let bytes = input.field();
            sent.device_state.extend_from_slice(bytes);
            [&total.to_le_bytes(), &offset.to_le_bytes(), bytes].concat()
        }
        FINAL => last(input, sent),
        _ => return (input.u8(), input.field().to_vec()),
    };
    (kind, payload)
}

fn setup(off_by: u8) -> Vec<u8> {
    let mut payload = (PAGE_SIZE as u32).to_le_bytes().to_vec();
    payload.extend((REGIONS.len() as u32).to_le_bytes());
    for region in REGIONS {
        payload.extend(region.guest_address.to_le_bytes());
        payload.extend((region.pages + u64::from(off_by)).to_le_bytes());
    }
    payload
}

/// Region, count, first page: three bytes and four.
fn runs(input: &mut Input<'_>) -> Vec<(u32, u32, u64)> {
    (0..input.u8() % 16)
        .map(|_| {
            let (region, count) = (u32::from(input.u8()), u32::from(input.u16()));
            let first = input.u32();
            // A page beyond any memory, too.
            let first = if first >> 24 == 0xff {
                u64::MAX - u64::from(first & 0xff)
            } else {
                u64::from(first)
            };
            (region, count, first)
        })
        .collect()
}

fn encode(runs: &[(u32, u32, u64)]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (region, count, first) in runs {
        payload.extend(region.to_le_bytes());
        payload.extend(count.to_le_bytes());
        payload.extend(first.to_le_bytes());
    }
    payload.extend((runs.len() as u32).to_le_bytes());
    payload
}

/// *Final* with the numbers that are right, or one that is not.
fn last(input: &mut Input<'_>, sent: &Sent) -> Vec<u8> {
    let (off_by, channels) = (input.u8(), u32::from(input.u8()));
    let mut payload = (sent.round ^ u32::from(off_by & 1)).to_le_bytes().to_vec();
    payload.extend(channels.to_le_bytes());
    let length = sent.device_state.len() as u64 ^ u64::from(off_by >> 1 & 1);
    let sum = xxh3_64(&sent.device_state) ^ u64::from(off_by >> 2 & 1);
    for number in [length, sum, 1, 2, 3, 4] {
        payload.extend(number.to_le_bytes());
    }
    payload.extend(vec![0; channels as usize * 32]);
    payload
}

fn seeds() -> Vec<Vec<u8>> {
    let round = |last: u8| vec![ROUND_END, 0, last];
    let pages = [
        vec![PAGES, 1, 0, 2, 0],
        7u32.to_le_bytes().to_vec(),
        vec![0],
    ]
    .concat();
    let zero = [vec![ZERO, 1, 1, 1, 0], 512u32.to_le_bytes().to_vec()].concat();
    let zero_again = [vec![ZERO, 1, 0, 9, 0], 0u32.to_le_bytes().to_vec()].concat();
    let state = [
        vec![DEVICE_STATE],
        5u32.to_le_bytes().to_vec(),
        vec![0],
        field(b"state"),
    ]
    .concat();
    let whole = [
        vec![2, SETUP, 0, HEARTBEAT],
        pages.clone(),
        zero,
        round(0),
        zero_again,
        vec![0x80 | ROUND_END, 0, 1],
        vec![QUIET],
        pages,
        round(1),
        state,
        vec![FINAL, 0, CHANNELS as u8],
    ]
    .concat();
    let mut hello = vec![1, 0, 1, 0, 1, 0, 0, 0, 1, 0];
    hello.extend(7u64.to_le_bytes());
    hello.extend([5; 32]);
    let stream = [seal(SETUP, 0, &setup(0)[..]), seal(HEARTBEAT, 1, &[])].concat();
    vec![
        whole,
        [vec![0], seal(1, 0, &hello)].concat(),
        [vec![0], seal(20, 0, b"the source gives up")].concat(),
        [vec![1], stream].concat(),
        [vec![2, 0x10, 20], field(b"the source gives up")].concat(),
    ]
}
