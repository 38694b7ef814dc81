//! What the kinds of frames hold, and how it is checked. Nothing here believes a number it has not compared.

use super::{
    BATCH_PAGES_MAX, DEVICE_STATE_BYTES_MAX, Frame, HEADER_BYTES, Kind, REASON_BYTES_MAX,
    REGIONS_MAX, RUN_BYTES, RUNS_MAX, Reader, VERSION_MAX, VERSION_MIN,
};
use crate::error::FrameError;
use crate::options::{CHANNELS_MAX, Credentials, Ticket};
use crate::pages::{CHUNK_PAGES, PAGE_SIZE, Region, channel_of};
use crate::stats::SendTimings;

/// Role byte of channel 0: control, and memory too.
const ROLE_CONTROL: u8 = 1;
/// Role byte of the other channels: memory only.
const ROLE_DATA: u8 = 2;

fn malformed(kind: Kind, what: &'static str) -> FrameError {
    FrameError::Malformed {
        kind: kind.label(),
        what,
    }
}

/// How a connection introduces itself.
#[derive(Clone, Copy, Debug)]
pub struct Hello {
    /// The oldest version the source speaks.
    pub version_min: u16,
    /// The newest.
    pub version_max: u16,
    /// Which channel this is.
    pub channel: u16,
    /// How many there will be.
    pub channels: u16,
    /// Which migration, and the right to it.
    pub credentials: Credentials,
}

impl Hello {
    /// The introduction of one of this side's channels.
    pub fn new(channel: u16, channels: u16, credentials: Credentials) -> Hello {
        Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            channel,
            channels,
            credentials,
        }
    }

    /// As a frame.
    pub fn encode(&self) -> Frame {
        let mut out = vec![
            if self.channel == 0 {
                ROLE_CONTROL
            } else {
                ROLE_DATA
            },
            0,
        ];
        for number in [
            self.version_min,
            self.version_max,
            self.channel,
            self.channels,
        ] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.credentials.migration_id.to_le_bytes());
        out.extend_from_slice(&self.credentials.ticket.0);
        Frame::new(Kind::Hello, &out)
    }

    /// From a payload; the role must be that of the channel.
    pub fn decode(payload: &[u8]) -> Result<Hello, FrameError> {
        let mut reader = Reader::new(Kind::Hello.label(), payload);
        let [role, zero] = reader.array()?;
        let hello = Hello {
            version_min: reader.u16()?,
            version_max: reader.u16()?,
            channel: reader.u16()?,
            channels: reader.u16()?,
            credentials: Credentials {
                migration_id: reader.u64()?,
                ticket: Ticket(reader.array()?),
            },
        };
        reader.end()?;
        let role_due = if hello.channel == 0 {
            ROLE_CONTROL
        } else {
            ROLE_DATA
        };
        if role != role_due || zero != 0 {
            return Err(malformed(
                Kind::Hello,
                "the role is not that of the channel",
            ));
        }
        if hello.channels == 0
            || hello.channels > CHANNELS_MAX
            || hello.channel >= hello.channels
            || hello.version_min > hello.version_max
        {
            return Err(malformed(Kind::Hello, "impossible numbers"));
        }
        Ok(hello)
    }

    /// The newest version that both sides speak.
    pub fn pick_version(&self) -> Result<u16, FrameError> {
        pick(self.version_min, self.version_max, VERSION_MIN, VERSION_MAX)
    }
}

pub(super) fn pick(
    theirs_min: u16,
    theirs_max: u16,
    ours_min: u16,
    ours_max: u16,
) -> Result<u16, FrameError> {
    let version = theirs_max.min(ours_max);
    if version >= theirs_min.max(ours_min) {
        Ok(version)
    } else {
        Err(FrameError::Version {
            theirs_min,
            theirs_max,
            ours_min,
            ours_max,
        })
    }
}

/// The answer to Hello.
pub fn accepted(version: u16) -> Frame {
    Frame::new(Kind::Accepted, &version.to_le_bytes())
}

/// The version the destination picked, which must be one that was offered.
pub fn decode_accepted(payload: &[u8]) -> Result<u16, FrameError> {
    let mut reader = Reader::new(Kind::Accepted.label(), payload);
    let version = reader.u16()?;
    reader.end()?;
    pick(version, version, VERSION_MIN, VERSION_MAX)
}

/// The memory that will be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// In order.
    pub regions: Vec<Region>,
}

impl Setup {
    /// As a frame.
    pub fn encode(&self) -> Frame {
        let mut out = Vec::with_capacity(8 + self.regions.len() * 16);
        out.extend_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
        out.extend_from_slice(&(self.regions.len() as u32).to_le_bytes());
        for region in &self.regions {
            out.extend_from_slice(&region.guest_address.to_le_bytes());
            out.extend_from_slice(&region.pages.to_le_bytes());
        }
        Frame::new(Kind::Setup, &out)
    }

    /// From a payload. That the regions are the machine's own is for the caller to compare.
    pub fn decode(payload: &[u8]) -> Result<Setup, FrameError> {
        let mut reader = Reader::new(Kind::Setup.label(), payload);
        if reader.u32()? as usize != PAGE_SIZE {
            return Err(malformed(Kind::Setup, "another page size"));
        }
        let count = reader.u32()? as usize;
        if count == 0 || count > REGIONS_MAX {
            return Err(malformed(Kind::Setup, "no regions, or too many"));
        }
        let regions = (0..count)
            .map(|_| {
                Ok(Region {
                    guest_address: reader.u64()?,
                    pages: reader.u64()?,
                })
            })
            .collect::<Result<_, _>>()?;
        reader.end()?;
        Ok(Setup { regions })
    }
}

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

/// The end of a round on one channel, and its acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundMark {
    /// The round.
    pub round: u32,
    /// Nothing but the device state and *Final* follows.
    pub last: bool,
}

impl RoundMark {
    /// As a frame of `kind` RoundEnd or RoundAck.
    pub fn encode(&self, kind: Kind) -> Frame {
        let mut out = [0; 8];
        out[..4].copy_from_slice(&self.round.to_le_bytes());
        out[4] = u8::from(self.last);
        Frame::new(kind, &out)
    }

    /// From a payload of RoundEnd or RoundAck.
    pub fn decode(kind: Kind, payload: &[u8]) -> Result<RoundMark, FrameError> {
        let mut reader = Reader::new(kind.label(), payload);
        let mark = RoundMark {
            round: reader.u32()?,
            last: match reader.u32()? {
                0 => false,
                1 => true,
                _ => return Err(malformed(kind, "unknown flags")),
            },
        };
        reader.end()?;
        Ok(mark)
    }
}

/// A piece of the device state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceStateChunk<'a> {
    /// Length of the whole.
    pub total: u64,
    /// Where this piece begins; pieces come in order.
    pub offset: u64,
    /// Its bytes; never empty.
    pub bytes: &'a [u8],
}

impl<'a> DeviceStateChunk<'a> {
    /// As a frame.
    pub fn encode(&self) -> Frame {
        let mut out = Vec::with_capacity(16 + self.bytes.len());
        out.extend_from_slice(&self.total.to_le_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(self.bytes);
        Frame::new(Kind::DeviceState, &out)
    }

    /// From a payload; `arrived` bytes came before.
    pub fn decode(payload: &'a [u8], arrived: usize) -> Result<DeviceStateChunk<'a>, FrameError> {
        let kind = Kind::DeviceState;
        let mut reader = Reader::new(kind.label(), payload);
        let (total, offset) = (reader.u64()?, reader.u64()?);
        let bytes = reader.rest;
        if total > DEVICE_STATE_BYTES_MAX as u64 {
            return Err(malformed(kind, "larger than any device state"));
        }
        if offset != arrived as u64 || bytes.is_empty() || offset + bytes.len() as u64 > total {
            return Err(malformed(kind, "not the piece that was due"));
        }
        Ok(DeviceStateChunk {
            total,
            offset,
            bytes,
        })
    }
}

/// What one channel carried: counted alike on both sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChannelTotals {
    /// Frames of pages and of zero runs.
    pub frames: u64,
    /// Pages with contents.
    pub pages: u64,
    /// Pages named as zero.
    pub zero_pages: u64,
    /// The sums of those frames, chained in order.
    pub digest: u64,
}

impl ChannelTotals {
    /// Takes account of a frame.
    pub fn add(&mut self, pages: u64, zero_pages: u64, payload_sum: u64) {
        self.frames += 1;
        self.pages += pages;
        self.zero_pages += zero_pages;
        self.digest =
            (self.digest.rotate_left(1) ^ payload_sum).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    /// Compares what was sent with what arrived.
    pub fn compare(&self, arrived: &ChannelTotals) -> Result<(), FrameError> {
        let figures = [
            ("frames", self.frames, arrived.frames),
            ("pages", self.pages, arrived.pages),
            ("zero pages", self.zero_pages, arrived.zero_pages),
            ("digest", self.digest, arrived.digest),
        ];
        match figures
            .into_iter()
            .find(|(_, sent, arrived)| sent != arrived)
        {
            None => Ok(()),
            Some((what, sent, arrived)) => Err(FrameError::Digest {
                what,
                sent,
                arrived,
            }),
        }
    }
}

/// What must have arrived for the machine to be whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Final {
    /// The last round.
    pub round: u32,
    /// One for each channel, in order.
    pub channels: Vec<ChannelTotals>,
    /// Length of the device state.
    pub device_state_bytes: u64,
    /// Its xxh3-64.
    pub device_state_sum: u64,
    /// The source's stamps so far.
    pub timings: SendTimings,
}

impl Final {
    /// As a frame.
    pub fn encode(&self) -> Frame {
        let mut out = Vec::with_capacity(Kind::Final.limit());
        out.extend_from_slice(&self.round.to_le_bytes());
        out.extend_from_slice(&(self.channels.len() as u32).to_le_bytes());
        let t = &self.timings;
        let numbers = [
            self.device_state_bytes,
            self.device_state_sum,
            t.started_ns,
            t.vcpus_stopped_ns,
            t.quiet_ns,
            t.final_sent_ns,
        ];
        let channels = self.channels.iter();
        let totals = channels.flat_map(|c| [c.frames, c.pages, c.zero_pages, c.digest]);
        for number in numbers.into_iter().chain(totals) {
            out.extend_from_slice(&number.to_le_bytes());
        }
        Frame::new(Kind::Final, &out)
    }

    /// From a payload.
    pub fn decode(payload: &[u8]) -> Result<Final, FrameError> {
        let mut reader = Reader::new(Kind::Final.label(), payload);
        let round = reader.u32()?;
        let count = reader.u32()?;
        if count == 0 || count > u32::from(CHANNELS_MAX) {
            return Err(malformed(Kind::Final, "no channels, or too many"));
        }
        let (device_state_bytes, device_state_sum) = (reader.u64()?, reader.u64()?);
        let timings = SendTimings {
            started_ns: reader.u64()?,
            vcpus_stopped_ns: reader.u64()?,
            quiet_ns: reader.u64()?,
            final_sent_ns: reader.u64()?,
            complete_ns: 0,
        };
        let channels = (0..count)
            .map(|_| {
                Ok(ChannelTotals {
                    frames: reader.u64()?,
                    pages: reader.u64()?,
                    zero_pages: reader.u64()?,
                    digest: reader.u64()?,
                })
            })
            .collect::<Result<_, _>>()?;
        reader.end()?;
        Ok(Final {
            round,
            channels,
            device_state_bytes,
            device_state_sum,
            timings,
        })
    }
}

/// Says why this side gives up; a long reason is cut at a character.
pub fn encode_error(reason: &str) -> Frame {
    let mut end = reason.len().min(REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    Frame::new(Kind::Error, &reason.as_bytes()[..end])
}

/// The reason in an *Error*, safe to print: no control characters, whatever the peer sent.
pub fn decode_error(payload: &[u8]) -> String {
    String::from_utf8_lossy(payload)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
