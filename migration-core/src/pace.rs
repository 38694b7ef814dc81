//! The cap on bandwidth: a token bucket that is told the time.

/// How far sending may run ahead of an even pace, nanoseconds: what a timer's tick can be late by.
const BURST_NS: u64 = 20_000_000;

/// Bytes that may be sent now, refilled at a rate.
///
/// A send takes its bytes at once, even into debt, and then waits until the debt is paid: so a frame
/// may be larger than the bucket, and the rate over any time longer than one frame is exact.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    bytes_s: u64,
    /// When the last byte taken would have left at an even pace.
    paid_until_ns: u64,
}

impl Pace {
    /// A pace of `bytes_s`; 0 means no cap.
    pub fn new(bytes_s: u64, now_ns: u64) -> Pace {
        Pace {
            bytes_s,
            paid_until_ns: now_ns.saturating_sub(BURST_NS),
        }
    }

    /// Takes `bytes` at `now_ns`; returns how long to wait before they are sent, nanoseconds.
    pub fn take(&mut self, bytes: u64, now_ns: u64) -> u64 {
        if self.bytes_s == 0 {
            return 0;
        }
        let cost_ns = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_s);
        let cost_ns = u64::try_from(cost_ns).unwrap_or(u64::MAX);
        // Unused time is worth a burst, no more.
        let from = self.paid_until_ns.max(now_ns.saturating_sub(BURST_NS));
        self.paid_until_ns = from.saturating_add(cost_ns);
        from.saturating_sub(now_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn without_a_cap_nothing_waits() {
        assert_eq!(Pace::new(0, 5).take(u64::MAX, 5), 0);
    }

    proptest! {
        /// A sender that obeys the waits never gets more than rate x time + burst + one frame across.
        #[test]
        fn the_rate_holds_over_any_time(
            bytes_s in 1_000u64..10_000_000_000,
            frames in proptest::collection::vec((1u64..2_000_000, 0u64..50_000_000), 1..200),
        ) {
            let start = 1_000_000_000;
            let mut pace = Pace::new(bytes_s, start);
            let (mut now, mut sent) = (start, 0u128);
            for (bytes, idle_ns) in frames {
                now += pace.take(bytes, now);
                // `bytes` leave at `now`; what left before is bounded by the rate.
                let allowed = u128::from(bytes_s) * u128::from(now - start + BURST_NS) / 1_000_000_000 + 200;
                prop_assert!(sent <= allowed, "{sent} sent, {allowed} allowed");
                sent += u128::from(bytes);
                now += idle_ns;
            }
        }

        /// And it is not slower than the cap either.
        #[test]
        fn a_busy_sender_gets_the_whole_rate(bytes_s in 100_000u64..1_000_000_000, frame in 1_000u64..1_000_000) {
            let mut pace = Pace::new(bytes_s, 0);
            let mut now = 0;
            for _ in 0..100 {
                now += pace.take(frame, now);
            }
            let even_ns = u128::from(frame) * 99 * 1_000_000_000 / u128::from(bytes_s);
            prop_assert!(u128::from(now) <= even_ns + 100);
        }
    }
}
