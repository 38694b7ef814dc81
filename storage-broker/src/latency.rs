//! How long the slowest of the last minutes' WRITEs took: what the settle time is computed from.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Latencies of the present and of the last window count, older ones do not.
const WINDOW: Duration = Duration::from_secs(150);

/// Buckets per power of two: an error of at most an eighth.
const STEPS: u32 = 8;

/// Enough buckets for 2^40 µs.
const BUCKETS: usize = 40 * STEPS as usize;

/// A histogram of latencies over the last 2.5 to 5 minutes, in logarithmic buckets.
#[derive(Debug)]
pub struct LatencyHistogram {
    windows: Mutex<Windows>,
}

#[derive(Debug)]
struct Windows {
    began: Instant,
    present: Box<[u32; BUCKETS]>,
    last: Box<[u32; BUCKETS]>,
}

impl LatencyHistogram {
    /// An empty histogram.
    pub fn new(now: Instant) -> Self {
        let empty = || Box::new([0; BUCKETS]);
        LatencyHistogram {
            windows: Mutex::new(Windows {
                began: now,
                present: empty(),
                last: empty(),
            }),
        }
    }

    /// Counts one latency.
    pub fn record(&self, now: Instant, latency: Duration) {
        let mut windows = self
            .windows
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        windows.turn(now);
        let count = &mut windows.present[bucket(latency)];
        *count = count.saturating_add(1);
    }

    /// The latency that 99.9 % of the counted ones do not exceed (rounded up to its bucket's
    /// end); zero when none was counted.
    pub fn p999(&self, now: Instant) -> Duration {
        let mut windows = self
            .windows
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        windows.turn(now);
        let counts: Vec<u64> = windows
            .present
            .iter()
            .zip(windows.last.iter())
            .map(|(a, b)| u64::from(*a) + u64::from(*b))
            .collect();
        let total: u64 = counts.iter().sum();
        // The rank of the value sought, counted from the slowest: at least one.
        let mut above = total / 1000;
        for (index, count) in counts.iter().enumerate().rev() {
            if *count > above {
                return Duration::from_micros(bucket_end_us(index));
            }
            above -= count;
        }
        Duration::ZERO
    }
}

impl Windows {
    fn turn(&mut self, now: Instant) {
        let age = now.saturating_duration_since(self.began);
        if age < WINDOW {
            return;
        }
        std::mem::swap(&mut self.present, &mut self.last);
        self.present.fill(0);
        if age >= WINDOW * 2 {
            self.last.fill(0);
        }
        self.began = now;
    }
}

fn bucket(latency: Duration) -> usize {
    let us = u64::try_from(latency.as_micros())
        .unwrap_or(u64::MAX)
        .max(1);
    let power = us.ilog2();
    let step = if power >= 3 {
        (us >> (power - 3)) & 7
    } else {
        (us << (3 - power)) & 7
    };
    (power as usize * STEPS as usize + step as usize).min(BUCKETS - 1)
}

fn bucket_end_us(index: usize) -> u64 {
    let (power, step) = (index / STEPS as usize, (index % STEPS as usize) as u64);
    ((8 + step + 1) << power).div_ceil(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slow_write_in_a_thousand_does_not_count_and_two_do() {
        let now = Instant::now();
        let histogram = LatencyHistogram::new(now);
        for _ in 0..999 {
            histogram.record(now, Duration::from_micros(100));
        }
        histogram.record(now, Duration::from_millis(80));
        assert!(histogram.p999(now) < Duration::from_micros(130));
        histogram.record(now, Duration::from_millis(80));
        let p999 = histogram.p999(now);
        assert!((80..=90).contains(&(p999.as_millis())), "{p999:?}");
    }

    #[test]
    fn an_empty_histogram_says_zero_and_an_old_one_forgets() {
        let start = Instant::now();
        let histogram = LatencyHistogram::new(start);
        assert_eq!(histogram.p999(start), Duration::ZERO);
        histogram.record(start, Duration::from_secs(1));
        assert!(histogram.p999(start + WINDOW) >= Duration::from_secs(1));
        assert_eq!(histogram.p999(start + WINDOW * 2), Duration::ZERO);
    }

    #[test]
    fn a_bucket_ends_after_every_latency_in_it() {
        for us in [1, 2, 3, 7, 8, 9, 100, 1000, 12345, 999_999, 60_000_000] {
            let end = bucket_end_us(bucket(Duration::from_micros(us)));
            assert!(end >= us && end <= us + us / 4 + 1, "{us} {end}");
        }
    }
}
