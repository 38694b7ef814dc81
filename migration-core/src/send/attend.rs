//! Waiting, at the source: for some work, and meanwhile for the destination, the caller and the clock.

use super::Driver;
use super::channel::Heard;
use crate::clock::monotonic_ns;
use crate::error::{FrameError, SendError};
use crate::frame::Kind;
use crate::machine::MigrationSource;
use crate::pages::PAGE_SIZE;
use crate::stats::SendStage;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

/// How often the status is published while nothing else happens.
const PUBLISH_EVERY: Duration = Duration::from_millis(100);

/// Memory that does not move for so long is stuck, though the peer still answers.
const STALL_MAX: Duration = Duration::from_secs(30);

/// How long a broken connection is given to yield the destination's own reason.
const REASON_WAIT: Duration = Duration::from_millis(200);

impl<S: MigrationSource + ?Sized> Driver<S> {
    /// Waits for `work` while listening to the destination, the caller and the clock.
    pub(super) async fn attend<F: Future>(&mut self, work: F) -> Result<F::Output, SendError> {
        let mut work = pin!(work);
        let cancel = self.cancel.clone();
        self.meter.moved(Instant::now());
        let mut tick = interval(PUBLISH_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = cancel.cancelled(), if !self.said_quiet => return Err(SendError::Cancelled),
                heard = self.heard.recv() => self.take(heard).await?,
                output = &mut work => return Ok(output),
                _ = tick.tick() => self.check_progress()?,
            }
        }
    }

    /// Listens until `done`.
    pub(super) async fn wait_until(
        &mut self,
        done: impl Fn(&Self) -> bool,
    ) -> Result<(), SendError> {
        let cancel = self.cancel.clone();
        self.meter.moved(Instant::now());
        let mut tick = interval(PUBLISH_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !done(self) {
            tokio::select! {
                biased;
                () = cancel.cancelled(), if !self.said_quiet => return Err(SendError::Cancelled),
                heard = self.heard.recv() => self.take(heard).await?,
                _ = tick.tick() => self.check_progress()?,
            }
        }
        Ok(())
    }

    /// Takes account of what a channel reports.
    async fn take(&mut self, heard: Option<Result<Heard, SendError>>) -> Result<(), SendError> {
        match heard {
            // After *Complete* the destination may close as it likes.
            _ if self.complete => Ok(()),
            Some(Ok(Heard::Ready)) => {
                self.ready = true;
                Ok(())
            }
            Some(Ok(Heard::RoundAck(channel, mark))) => {
                if let Some(acked) = self.acknowledged.get_mut(usize::from(channel)) {
                    *acked = mark.round;
                }
                Ok(())
            }
            Some(Ok(Heard::Complete)) => self.note_complete(),
            Some(Err(error)) => self.weigh(error).await,
            // This side holds a sender itself, so the queue cannot end.
            None => Ok(()),
        }
    }

    fn note_complete(&mut self) -> Result<(), SendError> {
        if self.status.borrow().stage != SendStage::FinalSent {
            let what = "not everything was sent";
            let source = FrameError::Unexpected {
                kind: Kind::Complete.label(),
                what,
            };
            return Err(SendError::Protocol { channel: 0, source });
        }
        self.complete = true;
        self.status.send_modify(|status| {
            status.stage = SendStage::Complete;
            status.timings.complete_ns = monotonic_ns();
        });
        Ok(())
    }

    /// A connection often breaks because the destination is done, for better or worse, and closes them
    /// all; its own word for it may still be on its way on channel 0.
    async fn weigh(&mut self, error: SendError) -> Result<(), SendError> {
        if !matches!(error, SendError::Connection { .. }) {
            return Err(error);
        }
        let word = async {
            loop {
                match self.heard.recv().await {
                    Some(Err(better @ SendError::Destination(_))) => return Err(better),
                    Some(Ok(Heard::Complete)) => return Ok(()),
                    _ => {}
                }
            }
        };
        match timeout(REASON_WAIT, word).await {
            Ok(Ok(())) => self.note_complete(),
            Ok(Err(better)) => Err(better),
            Err(_) => Err(error),
        }
    }

    fn check_progress(&mut self) -> Result<(), SendError> {
        self.publish();
        if self.meter.still_for(Instant::now()) > STALL_MAX {
            let limit_ms = STALL_MAX.as_millis() as u64;
            return Err(SendError::TimedOut {
                what: "the next sign of progress",
                limit_ms,
            });
        }
        Ok(())
    }

    /// Brings the live figures of the status up to date.
    pub(super) fn publish(&mut self) {
        let counters = &self.common.counters;
        let bytes = counters.bytes.load(Ordering::Relaxed);
        let pages = counters.pages.load(Ordering::Relaxed);
        let zero_pages = counters.zero_pages.load(Ordering::Relaxed);
        self.meter.observe(Instant::now(), bytes);
        let remaining_bytes = self.meter.remaining_pages(pages) * PAGE_SIZE as u64;
        let rate_bytes_s = self.meter.rate_bytes_s();
        self.status.send_modify(|status| {
            status.sent_bytes = bytes;
            status.pages = pages;
            status.zero_pages = zero_pages;
            status.remaining_bytes = remaining_bytes;
            status.rate_bytes_s = rate_bytes_s;
        });
    }
}
