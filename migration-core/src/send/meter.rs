//! The rate of sending, and whether it stands still; told the time.

use std::time::Duration;
use tokio::time::Instant;

/// A rate over less is noise.
const SPAN_MIN: Duration = Duration::from_millis(90);

/// What was seen when.
pub struct Meter {
    span_began: Instant,
    span_bytes: u64,
    bytes: u64,
    moved_at: Instant,
    rate_bytes_s: u64,
    round_pages: u64,
    pages_before: u64,
}

impl Meter {
    /// Nothing sent yet.
    pub fn new(now: Instant) -> Meter {
        Meter {
            span_began: now,
            span_bytes: 0,
            bytes: 0,
            moved_at: now,
            rate_bytes_s: 0,
            round_pages: 0,
            pages_before: 0,
        }
    }

    /// A round of `pages` begins after `pages_before` pages in all.
    pub fn begin_round(&mut self, pages: u64, pages_before: u64) {
        self.round_pages = pages;
        self.pages_before = pages_before;
    }

    /// The round turned out longer.
    pub fn more_pages(&mut self, pages: u64) {
        self.round_pages += pages;
    }

    /// Pages of this round that are not done, when `pages` are in all.
    pub fn remaining_pages(&self, pages: u64) -> u64 {
        self.round_pages
            .saturating_sub(pages.saturating_sub(self.pages_before))
    }

    /// Bytes sent in all so far.
    pub fn observe(&mut self, now: Instant, bytes: u64) {
        if bytes != self.bytes {
            self.bytes = bytes;
            self.moved_at = now;
        }
        let span = now - self.span_began;
        if span >= SPAN_MIN {
            let rate = u128::from(bytes - self.span_bytes) * 1_000_000 / span.as_micros();
            self.rate_bytes_s = (self.rate_bytes_s + rate as u64) / 2;
            self.span_began = now;
            self.span_bytes = bytes;
        }
    }

    /// Something other than bytes moved on.
    pub fn moved(&mut self, now: Instant) {
        self.moved_at = now;
    }

    /// How long nothing has moved.
    pub fn still_for(&self, now: Instant) -> Duration {
        now - self.moved_at
    }

    /// Bytes a second, smoothed over a few spans.
    pub fn rate_bytes_s(&self) -> u64 {
        self.rate_bytes_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_rate_is_found_and_a_standstill_noticed() {
        let start = Instant::now();
        let mut meter = Meter::new(start);
        for tick in 1..=20u64 {
            meter.observe(start + Duration::from_millis(100 * tick), tick * 1_000_000);
        }
        let rate = meter.rate_bytes_s();
        assert!((9_900_000..=10_000_000).contains(&rate), "{rate}");
        let later = start + Duration::from_secs(12);
        meter.observe(later, 20_000_000);
        assert_eq!(meter.still_for(later), Duration::from_secs(10));
    }

    #[test]
    fn what_remains_is_of_this_round() {
        let mut meter = Meter::new(Instant::now());
        meter.begin_round(100, 1000);
        assert_eq!(meter.remaining_pages(1030), 70);
        meter.more_pages(5);
        assert_eq!(meter.remaining_pages(1105), 0);
    }
}
