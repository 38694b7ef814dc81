//! How long commits take: a histogram of fixed size.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Buckets of each power of two: a quantile is at most 12.5 % too large.
const STEPS: usize = 8;
const BUCKETS: usize = 40 * STEPS;

/// Counts durations in buckets of 12.5 %, from 1 µs to 12 days.
#[derive(Debug)]
pub(super) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
}

/// Quantiles of a latency, microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencySummary {
    /// Durations counted.
    pub count: u64,
    /// Half took at most this long.
    pub p50_us: u64,
    /// All but one in a hundred took at most this long.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
}

impl Histogram {
    pub(super) fn new() -> Histogram {
        Histogram {
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    pub(super) fn record(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket(us)].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn summary(&self) -> LatencySummary {
        let counts: Vec<u64> = self
            .buckets
            .iter()
            .map(|bucket| bucket.load(Ordering::Relaxed))
            .collect();
        let count: u64 = counts.iter().sum();
        let quantile = |percent: u64| {
            let wanted = (count * percent).div_ceil(100).max(1);
            let mut seen = 0;
            for (index, in_bucket) in counts.iter().enumerate() {
                seen += in_bucket;
                if seen >= wanted {
                    return upper(index);
                }
            }
            0
        };
        LatencySummary {
            count,
            p50_us: quantile(50),
            p99_us: quantile(99),
            max_us: quantile(100),
        }
    }
}

fn bucket(us: u64) -> usize {
    let us = us.max(1);
    let power = us.ilog2() as usize;
    // The three bits below the highest one.
    let step = if power >= 3 {
        (us >> (power - 3)) as usize & 7
    } else {
        (us << (3 - power)) as usize & 7
    };
    (power * STEPS + step).min(BUCKETS - 1)
}

/// The largest duration of a bucket.
fn upper(index: usize) -> u64 {
    let (power, step) = (index / STEPS, index % STEPS);
    let next = (STEPS + step + 1) as u64;
    if power >= 3 {
        (next << (power - 3)) - 1
    } else {
        (next >> (3 - power)).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_at_most_an_eighth_too_large() {
        for us in [
            1u64,
            2,
            3,
            5,
            8,
            100,
            1_000,
            12_345,
            1_000_000,
            86_400_000_000,
        ] {
            let histogram = Histogram::new();
            histogram.record(Duration::from_micros(us));
            let p50 = histogram.summary().p50_us;
            assert!(p50 >= us && p50 <= us + us / 8 + 1, "{us} became {p50}");
        }
    }

    #[test]
    fn the_median_is_in_the_middle() {
        let histogram = Histogram::new();
        for us in 1..=1_000 {
            histogram.record(Duration::from_micros(us));
        }
        let summary = histogram.summary();
        assert_eq!(summary.count, 1_000);
        assert!((500..=563).contains(&summary.p50_us), "{}", summary.p50_us);
        assert!(
            (990..=1_115).contains(&summary.p99_us),
            "{}",
            summary.p99_us
        );
    }

    #[test]
    fn an_empty_histogram_says_zero() {
        assert_eq!(Histogram::new().summary(), LatencySummary::default());
    }
}
