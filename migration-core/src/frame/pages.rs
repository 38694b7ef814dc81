//! Payloads of memory: runs of pages, their contents, and a batch being filled.

use super::payload::malformed;
use super::{BATCH_PAGES_MAX, Frame, HEADER_BYTES, Kind, RUN_BYTES, RUNS_MAX, Reader};
use crate::error::FrameError;
use crate::pages::{CHUNK_PAGES, PAGE_SIZE, Region, channel_of};

/// A run of pages within a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Region index.
    pub region: u32,
    /// How many pages; never 0.
    pub count: u32,
    /// The first one.
    pub first_page: u64,
}

impl PageRun {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.region.to_le_bytes());
        out.extend_from_slice(&self.count.to_le_bytes());
        out.extend_from_slice(&self.first_page.to_le_bytes());
    }

    /// Checks it against the machine's memory, and that this channel is the one to carry it.
    fn check(&self, regions: &[Region], channel: u16, channels: u16) -> Result<(), FrameError> {
        let refused = |what| FrameError::Pages {
            region: self.region,
            first_page: self.first_page,
            count: self.count,
            what,
        };
        let region = regions
            .get(self.region as usize)
            .ok_or(refused("in no region"))?;
        let end = self.first_page.checked_add(u64::from(self.count));
        if self.count == 0 || end.is_none_or(|end| end > region.pages) {
            return Err(refused("outside its region"));
        }
        let last = self.first_page + u64::from(self.count) - 1;
        let carrier = |page| channel_of(self.region as usize, page, channels);
        let one_chunk = self.first_page / CHUNK_PAGES == last / CHUNK_PAGES;
        if !one_chunk || carrier(self.first_page) != channel {
            return Err(refused("on the wrong channel"));
        }
        Ok(())
    }
}

fn decode_runs(
    kind: Kind,
    bytes: &[u8],
    regions: &[Region],
    channel: u16,
    channels: u16,
) -> Result<Vec<PageRun>, FrameError> {
    let mut runs = Vec::with_capacity(bytes.len() / RUN_BYTES);
    let mut reader = Reader::new(kind.label(), bytes);
    while !reader.rest.is_empty() {
        let run = PageRun {
            region: reader.u32()?,
            count: reader.u32()?,
            first_page: reader.u64()?,
        };
        run.check(regions, channel, channels)?;
        runs.push(run);
    }
    Ok(runs)
}

/// Splits a payload into what stands before its runs, and the runs' bytes.
fn split_runs(kind: Kind, payload: &[u8]) -> Result<(&[u8], &[u8]), FrameError> {
    let (body, count) = payload
        .split_last_chunk()
        .ok_or(malformed(kind, "too short"))?;
    let count = u32::from_le_bytes(*count) as usize;
    if count == 0 || count > RUNS_MAX {
        return Err(malformed(kind, "no runs, or too many"));
    }
    body.split_at_checked(body.len().wrapping_sub(count * RUN_BYTES))
        .ok_or(malformed(kind, "too short for its runs"))
}

/// The runs of a *Pages* payload, each checked, and the page contents in their order.
pub fn decode_pages<'a>(
    payload: &'a [u8],
    regions: &[Region],
    channel: u16,
    channels: u16,
) -> Result<(Vec<PageRun>, &'a [u8]), FrameError> {
    let (data, runs) = split_runs(Kind::Pages, payload)?;
    let runs = decode_runs(Kind::Pages, runs, regions, channel, channels)?;
    let pages: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
    if data.len() as u64 != pages * PAGE_SIZE as u64 {
        return Err(malformed(
            Kind::Pages,
            "the runs are not those of the contents",
        ));
    }
    Ok((runs, data))
}

/// The runs of a *Zero* payload, each checked.
pub fn decode_zero(
    payload: &[u8],
    regions: &[Region],
    channel: u16,
    channels: u16,
) -> Result<Vec<PageRun>, FrameError> {
    let (data, runs) = split_runs(Kind::Zero, payload)?;
    if !data.is_empty() {
        return Err(malformed(Kind::Zero, "contents"));
    }
    decode_runs(Kind::Zero, runs, regions, channel, channels)
}

/// Names pages that are zero; at most [`RUNS_MAX`] runs.
pub fn encode_zero(runs: &[PageRun]) -> Frame {
    let mut out = Vec::with_capacity(HEADER_BYTES + runs.len() * RUN_BYTES + 4);
    out.resize(HEADER_BYTES, 0);
    runs.iter().for_each(|run| run.encode(&mut out));
    out.extend_from_slice(&(runs.len() as u32).to_le_bytes());
    Frame::around(Kind::Zero, out)
}

/// Adds `count` pages at `first_page` to `runs`, joining them to the last run where they touch and
/// lie in the same chunk.
pub fn push_run(runs: &mut Vec<PageRun>, region: u32, first_page: u64, count: u32) {
    if let Some(last) = runs.last_mut()
        && last.region == region
        && last.first_page + u64::from(last.count) == first_page
        && last.first_page / CHUNK_PAGES == first_page / CHUNK_PAGES
    {
        last.count += count;
    } else {
        runs.push(PageRun {
            region,
            count,
            first_page,
        });
    }
}

/// A *Pages* frame being filled: guest memory is read straight into it, the runs follow at the end.
#[derive(Debug)]
pub struct BatchBuilder {
    bytes: Vec<u8>,
    runs: Vec<PageRun>,
    pages: usize,
    pages_max: usize,
}

impl BatchBuilder {
    /// A builder of batches of up to `pages_max` pages, in `bytes` (reused: it only grows once).
    pub fn new(mut bytes: Vec<u8>, pages_max: usize) -> BatchBuilder {
        let pages_max = pages_max.clamp(1, BATCH_PAGES_MAX);
        // The buffer keeps its length between batches, so that it is zeroed once, not for each.
        bytes.resize(HEADER_BYTES + pages_max * PAGE_SIZE, 0);
        BatchBuilder {
            bytes,
            runs: Vec::new(),
            pages: 0,
            pages_max,
        }
    }

    /// Pages that still fit.
    pub fn room(&self) -> usize {
        self.pages_max - self.pages
    }

    /// Pages in it.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Room for the next `count` pages; `count` is at most [`room`](Self::room).
    pub fn tail(&mut self, count: usize) -> &mut [u8] {
        let start = HEADER_BYTES + self.pages * PAGE_SIZE;
        &mut self.bytes[start..start + count * PAGE_SIZE]
    }

    /// Keeps the page that stands `from` pages into the tail as the next one.
    pub fn keep(&mut self, from: usize, region: u32, page: u64) {
        if from != 0 {
            let start = HEADER_BYTES + self.pages * PAGE_SIZE;
            let source = start + from * PAGE_SIZE;
            self.bytes.copy_within(source..source + PAGE_SIZE, start);
        }
        self.pages += 1;
        push_run(&mut self.runs, region, page, 1);
    }

    /// The finished frame.
    pub fn finish(mut self) -> Frame {
        self.bytes.truncate(HEADER_BYTES + self.pages * PAGE_SIZE);
        self.runs.iter().for_each(|run| run.encode(&mut self.bytes));
        self.bytes
            .extend_from_slice(&(self.runs.len() as u32).to_le_bytes());
        Frame::around(Kind::Pages, self.bytes)
    }
}
