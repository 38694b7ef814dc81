//! What arrives on one channel: checked frame by frame, written to memory, reported when it matters.
//!
//! Synchronous and without a socket: the driver runs it on a blocking thread (a fresh page costs a
//! fault), the tests feed it bytes.

use crate::clock::monotonic_ns;
use crate::error::{FrameError, HostError, ReceiveError};
use crate::frame::{
    ChannelTotals, DeviceStateChunk, Final, Header, Kind, PageRun, RoundMark, Setup, decode_error,
    decode_pages, decode_zero,
};
use crate::machine::MemorySink;
use crate::pages::{PAGE_SIZE, Region};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Something the driver must know.
#[derive(Debug, PartialEq, Eq)]
pub enum Arrived {
    /// The source's regions are ours.
    Setup,
    /// A round is in memory, as far as this channel goes; what it carried so far.
    RoundEnd(RoundMark, ChannelTotals),
    /// The source's promise, and when it was read.
    Quiet { at_ns: u64 },
    /// What must have arrived, and the device state, whose sum was compared.
    Final(Final, Vec<u8>),
}

/// What the channels of one migration share.
#[derive(Debug)]
pub struct Shared {
    /// The sink's memory.
    pub regions: Vec<Region>,
    /// Pages that were written, one bitmap a region: a zero page that was not needs no writing.
    touched: Vec<Vec<AtomicU64>>,
    /// Whether *Setup* came.
    set_up: AtomicBool,
    /// Figures for the status.
    pub pages: AtomicU64,
    pub zero_pages: AtomicU64,
    pub bytes: AtomicU64,
}

impl Shared {
    /// For a sink whose memory is fresh.
    pub fn new(regions: Vec<Region>) -> Shared {
        let words = |region: &Region| {
            (0..region.bitmap_words())
                .map(|_| AtomicU64::new(0))
                .collect()
        };
        Shared {
            touched: regions.iter().map(words).collect(),
            regions,
            set_up: AtomicBool::new(false),
            pages: AtomicU64::new(0),
            zero_pages: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }
    }

    /// Whether a page was written before.
    fn was_touched(&self, region: usize, page: u64) -> bool {
        let word = &self.touched[region][(page / 64) as usize];
        word.load(Ordering::Relaxed) >> (page % 64) & 1 == 1
    }

    /// Notes pages as written. Only the channel of their chunk looks at them, so no order is needed.
    fn touch(&self, run: &PageRun) {
        for page in run.first_page..run.first_page + u64::from(run.count) {
            let word = &self.touched[run.region as usize][(page / 64) as usize];
            word.fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
    }
}

/// One channel's protocol state.
pub struct Intake<S: ?Sized> {
    sink: Arc<S>,
    shared: Arc<Shared>,
    channel: u16,
    channels: u16,
    totals: ChannelTotals,
    round: u32,
    /// The last round has ended here: no memory follows.
    ended: bool,
    quiet: bool,
    finished: bool,
    device_state: Vec<u8>,
}

impl<S: MemorySink + ?Sized> Intake<S> {
    /// A channel that has just been admitted.
    pub fn new(sink: Arc<S>, shared: Arc<Shared>, channel: u16, channels: u16) -> Intake<S> {
        Intake {
            sink,
            shared,
            channel,
            channels,
            totals: ChannelTotals::default(),
            round: 0,
            ended: false,
            quiet: false,
            finished: false,
            device_state: Vec::new(),
        }
    }

    /// Whether this channel has brought all it had to: then it may break.
    pub fn is_finished(&self) -> bool {
        if self.channel == 0 {
            self.finished
        } else {
            self.ended
        }
    }

    /// Takes one frame.
    pub fn take(
        &mut self,
        header: &Header,
        payload: &[u8],
    ) -> Result<Option<Arrived>, ReceiveError> {
        let arrived = header.verify(payload).map_err(|error| self.bad(error));
        arrived.and_then(|()| self.understand(header, payload))
    }

    fn bad(&self, source: FrameError) -> ReceiveError {
        ReceiveError::Protocol {
            channel: self.channel,
            source,
        }
    }

    fn understand(
        &mut self,
        header: &Header,
        payload: &[u8],
    ) -> Result<Option<Arrived>, ReceiveError> {
        let kind = header.kind;
        self.place(kind).map_err(|what| {
            self.bad(FrameError::Unexpected {
                kind: kind.label(),
                what,
            })
        })?;
        let channel = self.channel;
        let bad = |source| ReceiveError::Protocol { channel, source };
        match kind {
            Kind::Pages => self.pages(header, payload).map(|()| None),
            Kind::Zero => self.zero(header, payload).map(|()| None),
            Kind::Heartbeat => Ok(None),
            Kind::Error => Err(ReceiveError::Source(decode_error(payload))),
            Kind::RoundEnd => {
                let mark = RoundMark::decode(kind, payload).map_err(bad)?;
                if mark.round != self.round + 1 {
                    return Err(bad(FrameError::Sequence {
                        expected: self.round + 1,
                        found: mark.round,
                    }));
                }
                self.round = mark.round;
                self.ended = mark.last;
                if !mark.last {
                    let arrived = self.sink.round_arrived(mark.round);
                    arrived.map_err(host("take up a round"))?;
                }
                Ok(Some(Arrived::RoundEnd(mark, self.totals)))
            }
            Kind::Setup => {
                let setup = Setup::decode(payload).map_err(bad)?;
                compare(&setup.regions, &self.shared.regions).map_err(ReceiveError::Regions)?;
                self.shared.set_up.store(true, Ordering::Release);
                Ok(Some(Arrived::Setup))
            }
            Kind::Quiet => {
                self.quiet = true;
                Ok(Some(Arrived::Quiet {
                    at_ns: monotonic_ns(),
                }))
            }
            Kind::DeviceState => {
                let arrived = self.device_state.len();
                let chunk = DeviceStateChunk::decode(payload, arrived).map_err(bad)?;
                self.device_state.extend_from_slice(chunk.bytes);
                Ok(None)
            }
            Kind::Final => {
                let last = Final::decode(payload).map_err(bad)?;
                self.check_final(&last).map_err(bad)?;
                self.finished = true;
                Ok(Some(Arrived::Final(
                    last,
                    std::mem::take(&mut self.device_state),
                )))
            }
            Kind::Hello | Kind::Accepted | Kind::Ready | Kind::RoundAck | Kind::Complete => {
                let what = "a source does not say that here";
                Err(bad(FrameError::Unexpected {
                    kind: kind.label(),
                    what,
                }))
            }
        }
    }

    /// Whether a frame of this kind may come now.
    fn place(&self, kind: Kind) -> Result<(), &'static str> {
        let set_up = self.shared.set_up.load(Ordering::Acquire);
        let control = self.channel == 0;
        match kind {
            Kind::Heartbeat | Kind::Error => Ok(()),
            _ if self.finished => Err("everything has arrived"),
            Kind::Setup if !control => Err("it belongs on channel 0"),
            Kind::Setup if set_up => Err("it came before"),
            Kind::Setup => Ok(()),
            _ if !set_up => Err("Setup comes first"),
            Kind::Pages | Kind::Zero | Kind::RoundEnd if self.ended => {
                Err("the last round is over")
            }
            Kind::Quiet | Kind::DeviceState | Kind::Final if !control => {
                Err("it belongs on channel 0")
            }
            Kind::Quiet if self.quiet => Err("it came before"),
            Kind::DeviceState | Kind::Final if !self.quiet => Err("Quiet comes first"),
            Kind::Final if !self.ended => Err("the last round is not over"),
            _ => Ok(()),
        }
    }

    fn pages(&mut self, header: &Header, payload: &[u8]) -> Result<(), ReceiveError> {
        let regions = &self.shared.regions;
        let (runs, mut data) = decode_pages(payload, regions, self.channel, self.channels)
            .map_err(|error| self.bad(error))?;
        let mut pages = 0;
        for run in &runs {
            let (these, rest) = data.split_at(run.count as usize * PAGE_SIZE);
            data = rest;
            self.sink
                .write_pages(run.region as usize, run.first_page, these)
                .map_err(host("write guest memory"))?;
            self.shared.touch(run);
            pages += u64::from(run.count);
        }
        self.count(header, pages, 0);
        Ok(())
    }

    fn zero(&mut self, header: &Header, payload: &[u8]) -> Result<(), ReceiveError> {
        let regions = &self.shared.regions;
        let runs = decode_zero(payload, regions, self.channel, self.channels)
            .map_err(|error| self.bad(error))?;
        let mut pages = 0;
        for run in &runs {
            self.zero_run(run).map_err(host("zero guest memory"))?;
            pages += u64::from(run.count);
        }
        self.count(header, 0, pages);
        Ok(())
    }

    /// Zeroes what was written before; fresh memory is zero as it is, and stays unallocated.
    fn zero_run(&self, run: &PageRun) -> Result<(), HostError> {
        let region = run.region as usize;
        let end = run.first_page + u64::from(run.count);
        let mut page = run.first_page;
        while page < end {
            let touched = self.shared.was_touched(region, page);
            let mut next = page + 1;
            while next < end && self.shared.was_touched(region, next) == touched {
                next += 1;
            }
            if touched {
                self.sink.zero_pages(region, page, next - page)?;
            }
            page = next;
        }
        Ok(())
    }

    fn count(&mut self, header: &Header, pages: u64, zero_pages: u64) {
        self.totals.add(pages, zero_pages, header.payload_sum);
        self.shared.pages.fetch_add(pages, Ordering::Relaxed);
        self.shared
            .zero_pages
            .fetch_add(zero_pages, Ordering::Relaxed);
        self.shared
            .bytes
            .fetch_add(u64::from(header.length), Ordering::Relaxed);
    }

    /// The parts of *Final* that this channel knows; the driver compares the channels' totals.
    fn check_final(&self, last: &Final) -> Result<(), FrameError> {
        let sum = xxhash_rust::xxh3::xxh3_64(&self.device_state);
        let figures = [
            (
                "channels",
                last.channels.len() as u64,
                u64::from(self.channels),
            ),
            ("rounds", u64::from(last.round), u64::from(self.round)),
            (
                "device state bytes",
                last.device_state_bytes,
                self.device_state.len() as u64,
            ),
            ("device state checksum", last.device_state_sum, sum),
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

fn host(what: &'static str) -> impl Fn(HostError) -> ReceiveError {
    move |source| ReceiveError::Host { what, source }
}

/// Whether the two layouts are the same; the first difference, in words.
fn compare(theirs: &[Region], ours: &[Region]) -> Result<(), String> {
    if theirs.len() != ours.len() {
        return Err(format!(
            "{} regions there, {} here",
            theirs.len(),
            ours.len()
        ));
    }
    match theirs
        .iter()
        .zip(ours)
        .enumerate()
        .find(|(_, (theirs, ours))| theirs != ours)
    {
        None => Ok(()),
        Some((index, (theirs, ours))) => Err(format!(
            "region {index} is {} pages at {:#x} there, {} pages at {:#x} here",
            theirs.pages, theirs.guest_address, ours.pages, ours.guest_address
        )),
    }
}

#[cfg(test)]
mod tests;
