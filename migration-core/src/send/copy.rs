//! The source's parts: copying what a bitmap names, reading the dirty log, saying something on a channel.

use super::channel::Outgoing;
use super::scan::{Interrupted, Scan};
use super::{Driver, flatten, micros};
use crate::error::{HostError, SendError};
use crate::frame::{BATCH_PAGES_MAX, ChannelTotals, Frame, Kind, RoundMark};
use crate::machine::MigrationSource;
use crate::pages::PAGE_SIZE;
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::Instant;

impl<S: MigrationSource + ?Sized> Driver<S> {
    /// Copies what the bitmaps name, over all channels at once.
    pub(super) async fn copy(&mut self, bitmaps: Vec<Vec<u64>>) -> Result<(), SendError> {
        let bitmaps = Arc::new(bitmaps);
        let batch_pages = self.batch_pages();
        let mut scans = JoinSet::new();
        for number in 0..self.channels.len() {
            let channel = &mut self.channels[number];
            let Some(buffers) = channel.buffers.take() else {
                continue;
            };
            let scan = Scan {
                source: Arc::clone(&self.source),
                bitmaps: Arc::clone(&bitmaps),
                channel: number as u16,
                channels: self.options.channels,
                batch_pages,
                outgoing: channel.outgoing.clone(),
                buffers,
                stop: Arc::clone(&self.common.stop),
            };
            let alive = self.alive.clone();
            scans.spawn_blocking(move || {
                let _alive = alive;
                (number, scan.run())
            });
        }
        while let Some(joined) = self.attend(scans.join_next()).await? {
            let what = "read guest memory";
            match joined.map_err(|panic| SendError::Host {
                what,
                source: panic.into(),
            })? {
                (number, Ok(buffers)) => self.channels[number].buffers = Some(buffers),
                (_, Err(Interrupted::Host(error))) => return Err(error),
                // The channel's own error is on its way.
                (_, Err(Interrupted::Gone)) => return self.wait_until(|_| false).await,
            }
        }
        Ok(())
    }

    /// Pages of a batch: under a cap, no more than some 20 ms of it.
    fn batch_pages(&self) -> usize {
        match self.options.bandwidth_max_bytes_s {
            0 => BATCH_PAGES_MAX / 2,
            cap => (cap / 50 / PAGE_SIZE as u64).clamp(4, BATCH_PAGES_MAX as u64 / 2) as usize,
        }
    }

    pub(super) async fn harvest(&mut self) -> Result<Vec<Vec<u64>>, SendError> {
        let source = Arc::clone(&self.source);
        let regions = Arc::clone(&self.regions);
        let began = Instant::now();
        let bitmaps = self
            .host("read the dirty log", move || {
                let mut bitmaps = Vec::with_capacity(regions.len());
                for (index, region) in regions.iter().enumerate() {
                    let mut bits = source.harvest_dirty(index)?;
                    if bits.len() != region.bitmap_words() {
                        let due = region.bitmap_words();
                        let found = bits.len();
                        return Err(format!(
                            "region {index} has {due} words of bitmap, {found} came"
                        )
                        .into());
                    }
                    region.mask_tail(&mut bits);
                    bitmaps.push(bits);
                }
                Ok(bitmaps)
            })
            .await?;
        self.harvest_us = micros(began.elapsed());
        Ok(bitmaps)
    }

    pub(super) async fn mark_round(&mut self, mark: RoundMark) -> Result<(), SendError> {
        for number in 0..self.channels.len() {
            self.say(number, mark.encode(Kind::RoundEnd)).await?;
        }
        Ok(())
    }

    /// Waits until everything said was handed to the network; what each channel carried.
    pub(super) async fn flush(&mut self) -> Result<Vec<ChannelTotals>, SendError> {
        let mut totals = Vec::with_capacity(self.channels.len());
        for number in 0..self.channels.len() {
            let (done, flushed) = oneshot::channel();
            self.order(number, Outgoing::Flush(done)).await?;
            match self.attend(flushed).await? {
                Ok(channel) => totals.push(channel),
                Err(_) => self.wait_until(|_| false).await?,
            }
        }
        Ok(totals)
    }

    pub(super) async fn say(&mut self, channel: usize, frame: Frame) -> Result<(), SendError> {
        self.order(channel, frame.into()).await
    }

    async fn order(&mut self, channel: usize, order: Outgoing) -> Result<(), SendError> {
        let outgoing = self.channels[channel].outgoing.clone();
        match self.attend(outgoing.send(order)).await? {
            Ok(()) => Ok(()),
            // The writer has ended, and left its error for us to hear.
            Err(_) => self.wait_until(|_| false).await,
        }
    }

    /// Runs a blocking part of the monitor.
    pub(super) async fn host<T: Send + 'static>(
        &mut self,
        what: &'static str,
        work: impl FnOnce() -> Result<T, HostError> + Send + 'static,
    ) -> Result<T, SendError> {
        let done = self.attend(tokio::task::spawn_blocking(work)).await?;
        flatten(what, done)
    }
}
