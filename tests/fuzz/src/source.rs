//! A migration's source that breaks rules: frames of any kind with numbers of the input's, and the memory they go to.

use std::collections::BTreeSet;
use std::sync::Mutex;

use async_trait::async_trait;
use migration_core::{HostError, MachineSink, MemorySink, PAGE_SIZE, Region};
use xxhash_rust::xxh3::xxh3_64;

use crate::input::{Input, field};

/// Channels of the migration, unless there is one.
pub(crate) const CHANNELS: u16 = 2;
/// The guest's memory: neither of whole chunks.
pub(crate) const REGIONS: [Region; 2] = [
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
pub(crate) const FRAMES_MAX: usize = 64;

// The kinds, by their numbers on the wire.
pub(crate) const SETUP: u8 = 2;
pub(crate) const PAGES: u8 = 3;
pub(crate) const ZERO: u8 = 4;
pub(crate) const ROUND_END: u8 = 5;
pub(crate) const QUIET: u8 = 6;
pub(crate) const DEVICE_STATE: u8 = 7;
pub(crate) const FINAL: u8 = 8;
pub(crate) const HEARTBEAT: u8 = 9;

/// Memory that remembers which pages were written, and is touched nowhere else.
#[derive(Default)]
pub(crate) struct Memory {
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

#[async_trait]
impl MachineSink for Memory {
    async fn load_device_state(&self, _: Vec<u8>) -> Result<(), HostError> {
        Ok(())
    }
}

/// What a source knows of a channel.
#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    round: u32,
    frames: u64,
    pages: u64,
    zero_pages: u64,
    digest: u64,
}

impl Sent {
    /// Takes account of a frame of memory, as both sides do.
    fn count(&mut self, pages: u64, zero_pages: u64, payload: &[u8]) {
        self.frames += 1;
        self.pages += pages;
        self.zero_pages += zero_pages;
        let mixed = self.digest.rotate_left(1) ^ xxh3_64(payload);
        self.digest = mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// A source, and what it has sent so far.
#[derive(Debug, Default)]
pub(crate) struct Source {
    channels: [Sent; CHANNELS as usize],
    device_state: Vec<u8>,
}

impl Source {
    /// The next frame's kind and payload: of one that a source could send on that channel, with numbers of the
    /// input's; or anything at all.
    pub(crate) fn frame(
        &mut self,
        channel: usize,
        kind: u8,
        input: &mut Input<'_>,
    ) -> (u8, Vec<u8>) {
        let payload = match kind {
            SETUP => setup(input.u8()),
            PAGES => self.pages(channel, input),
            ZERO => {
                let runs = runs(input);
                let payload = encode(&runs);
                self.channels[channel].count(0, pages_of(&runs), &payload);
                payload
            }
            ROUND_END => {
                let (skipped, last) = (u32::from(input.u8()), input.u8());
                let round = &mut self.channels[channel].round;
                *round = round.wrapping_add(1).wrapping_add(skipped);
                [round.to_le_bytes(), u32::from(last).to_le_bytes()].concat()
            }
            QUIET | HEARTBEAT => Vec::new(),
            DEVICE_STATE => {
                let (total, off_by) = (u64::from(input.u32()), u64::from(input.u8()));
                let offset = self.device_state.len() as u64 + off_by;
                let bytes = input.field();
                self.device_state.extend_from_slice(bytes);
                [&total.to_le_bytes(), &offset.to_le_bytes(), bytes].concat()
            }
            FINAL => self.last(channel, input),
            _ => return (input.u8(), input.field().to_vec()),
        };
        (kind, payload)
    }

    /// Pages of one content, as many as named and 256 at most, or up to a few bytes more or less.
    fn pages(&mut self, channel: usize, input: &mut Input<'_>) -> Vec<u8> {
        const PAGES_MAX: u64 = 256;
        let runs = runs(input);
        let right = pages_of(&runs).min(PAGES_MAX) as usize * PAGE_SIZE;
        let length = match usize::from(input.u8()) {
            0 => right,
            off_by => (right + off_by).saturating_sub(128),
        };
        let payload = [vec![0x5a; length], encode(&runs)].concat();
        self.channels[channel].count(pages_of(&runs), 0, &payload);
        payload
    }

    /// *Final* with the numbers that are right, or one that is not.
    fn last(&self, channel: usize, input: &mut Input<'_>) -> Vec<u8> {
        let (off_by, channels) = (input.u8(), usize::from(input.u8()));
        let wrong = |bit: u8| off_by >> bit & 1;
        let round = self.channels[channel].round ^ u32::from(wrong(0));
        let mut payload = round.to_le_bytes().to_vec();
        payload.extend((channels as u32).to_le_bytes());
        let length = self.device_state.len() as u64 ^ u64::from(wrong(1));
        let sum = xxh3_64(&self.device_state) ^ u64::from(wrong(2));
        for number in [length, sum, 1, 2, 3, 4] {
            payload.extend(number.to_le_bytes());
        }
        let nothing = std::iter::repeat(Sent::default());
        for sent in self.channels.into_iter().chain(nothing).take(channels) {
            let frames = sent.frames ^ u64::from(wrong(3));
            for number in [frames, sent.pages, sent.zero_pages, sent.digest] {
                payload.extend(number.to_le_bytes());
            }
        }
        payload
    }
}

/// The guest's memory as *Setup* names it, larger by so many pages.
pub(crate) fn setup(off_by: u8) -> Vec<u8> {
    let mut payload = (PAGE_SIZE as u32).to_le_bytes().to_vec();
    payload.extend((REGIONS.len() as u32).to_le_bytes());
    for region in REGIONS {
        payload.extend(region.guest_address.to_le_bytes());
        payload.extend((region.pages + u64::from(off_by)).to_le_bytes());
    }
    payload
}

/// Region, count, first page.
type Run = (u32, u32, u64);

/// Three bytes and four for each.
fn runs(input: &mut Input<'_>) -> Vec<Run> {
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

fn pages_of(runs: &[Run]) -> u64 {
    runs.iter().map(|run| u64::from(run.1)).sum()
}

fn encode(runs: &[Run]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (region, count, first) in runs {
        payload.extend(region.to_le_bytes());
        payload.extend(count.to_le_bytes());
        payload.extend(first.to_le_bytes());
    }
    payload.extend((runs.len() as u32).to_le_bytes());
    payload
}

/// The input by which a source of one channel sends a whole machine.
pub(crate) fn whole_machine() -> Vec<u8> {
    let pages = [&[PAGES, 1, 0, 2, 0][..], &7u32.to_le_bytes(), &[0]].concat();
    let zero = [&[ZERO, 1, 1, 1, 0][..], &512u32.to_le_bytes()].concat();
    let zero_again = [&[ZERO, 1, 0, 9, 0][..], &0u32.to_le_bytes()].concat();
    let state = [
        &[DEVICE_STATE][..],
        &5u32.to_le_bytes(),
        &[0],
        &field(b"state"),
    ]
    .concat();
    [
        vec![SETUP, 0, HEARTBEAT],
        pages.clone(),
        zero,
        vec![ROUND_END, 0, 0],
        zero_again,
        vec![QUIET],
        pages,
        vec![ROUND_END, 0, 1],
        state,
        vec![FINAL, 0, 1],
    ]
    .concat()
}
