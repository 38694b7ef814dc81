//! From a bitmap of dirty pages to frames: what one channel carries of one round.

use crate::error::{HostError, SendError};
use crate::frame::{BatchBuilder, Frame, PageRun, RUNS_MAX, encode_zero, push_run};
use crate::machine::MemorySource;
use crate::pages::{CHUNK_PAGES, PAGE_SIZE, channel_of, is_zero, runs};
use crate::send::channel::Outgoing;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::mpsc;

/// Pages read at a time: small enough that the zero scan and the checksum find them in the cache.
const READ_PAGES: usize = 32;

/// What a scan needs; runs on a blocking thread of its own, so that page faults and ioctls of the
/// monitor hold up no one's heartbeat, and so that reading and sending overlap.
pub struct Scan<S: ?Sized> {
    pub source: Arc<S>,
    pub bitmaps: Arc<Vec<Vec<u64>>>,
    pub channel: u16,
    pub channels: u16,
    /// Pages of a batch.
    pub batch_pages: usize,
    pub outgoing: mpsc::Sender<Outgoing>,
    pub buffers: mpsc::Receiver<Vec<u8>>,
    /// Set when the attempt is over.
    pub stop: Arc<AtomicBool>,
}

/// Why a scan ended early.
pub enum Interrupted {
    /// The channel or the attempt is gone; its own error says why.
    Gone,
    /// The monitor failed.
    Host(SendError),
}

fn host(what: &'static str) -> impl Fn(HostError) -> Interrupted {
    move |source| Interrupted::Host(SendError::Host { what, source })
}

impl<S: MemorySource + ?Sized> Scan<S> {
    /// Sends all that this channel carries of the bitmaps; gives the buffers back for the next round.
    pub fn run(mut self) -> Result<mpsc::Receiver<Vec<u8>>, Interrupted> {
        let mut batch = None;
        let mut zeros = Vec::new();
        let bitmaps = Arc::clone(&self.bitmaps);
        for (index, bits) in bitmaps.iter().enumerate() {
            let words = (CHUNK_PAGES / 64) as usize;
            for (chunk, bits) in bits.chunks(words).enumerate() {
                let first_page = chunk as u64 * CHUNK_PAGES;
                let ours = channel_of(index, first_page, self.channels) == self.channel;
                if !ours || bits.iter().all(|&word| word == 0) {
                    continue;
                }
                if self.stop.load(Ordering::Relaxed) {
                    return Err(Interrupted::Gone);
                }
                // Cleared before it is read: a write in between is read now, and sent again.
                self.source
                    .clear_dirty(index, first_page, bits)
                    .map_err(host("clear the dirty log"))?;
                for (start, count) in runs(bits) {
                    let start = first_page + start;
                    self.read_run(index, start, start + count, &mut batch, &mut zeros)?;
                }
            }
        }
        if let Some(batch) = batch {
            self.send_batch(batch)?;
        }
        self.send_zeros(&mut zeros)?;
        Ok(self.buffers)
    }

    fn read_run(
        &mut self,
        region: usize,
        mut page: u64,
        end: u64,
        batch: &mut Option<BatchBuilder>,
        zeros: &mut Vec<PageRun>,
    ) -> Result<(), Interrupted> {
        while page < end {
            let mut builder = match batch.take() {
                Some(builder) => builder,
                // The queue bounds how many there are; one that has not come back yet is replaced.
                None => BatchBuilder::new(
                    self.buffers.try_recv().unwrap_or_default(),
                    self.batch_pages,
                ),
            };
            let count = builder.room().min(READ_PAGES).min((end - page) as usize);
            let tail = builder.tail(count);
            self.source
                .read_pages(region, page, tail)
                .map_err(host("read guest memory"))?;
            // The copy is scanned, not guest memory: what is judged zero is what would be sent.
            let mut kept = 0;
            for at in 0..count {
                let number = page + at as u64;
                if is_zero(&builder.tail(at - kept + 1)[(at - kept) * PAGE_SIZE..]) {
                    push_run(zeros, region as u32, number, 1);
                } else {
                    builder.keep(at - kept, region as u32, number);
                    kept += 1;
                }
            }
            page += count as u64;
            if zeros.len() >= RUNS_MAX - READ_PAGES {
                self.send_zeros(zeros)?;
            }
            if builder.room() == 0 {
                self.send_batch(builder)?;
            } else {
                *batch = Some(builder);
            }
        }
        Ok(())
    }

    fn send_batch(&self, batch: BatchBuilder) -> Result<(), Interrupted> {
        if batch.pages() == 0 {
            return Ok(());
        }
        let pages = batch.pages() as u64;
        self.send(batch.finish(), pages, 0)
    }

    fn send_zeros(&self, zeros: &mut Vec<PageRun>) -> Result<(), Interrupted> {
        if zeros.is_empty() {
            return Ok(());
        }
        let pages = zeros.iter().map(|run| u64::from(run.count)).sum();
        let frame = encode_zero(zeros);
        zeros.clear();
        self.send(frame, 0, pages)
    }

    fn send(&self, frame: Frame, pages: u64, zero_pages: u64) -> Result<(), Interrupted> {
        self.outgoing
            .blocking_send(Outgoing::Frame {
                frame,
                pages,
                zero_pages,
            })
            .map_err(|_| Interrupted::Gone)
    }
}
