//! The guest's monotonic clock, and the gaps in it: time in which the guest did not run.

use crate::abi::ErrorCode;
use crate::cpu;
use crate::report::Reporter;

/// Counters of two processors may differ by this much without anything being wrong, ns.
const SKEW_NS: u64 = 100_000;

/// The time stamp counter, scaled.
///
/// After a migration the counter may have jumped forward by the blackout: that is what the gap shows. It must never
/// go back.
pub struct Clock {
    first: u64,
    khz: u64,
    seen: u64,
}

impl Clock {
    /// A clock that reads zero now.
    pub fn start(khz: u64) -> Self {
        Self {
            first: cpu::tsc(),
            khz,
            seen: 0,
        }
    }

    /// Nanoseconds since the start, never less than what a look has seen.
    pub fn now(&self) -> u64 {
        self.raw().max(self.seen)
    }

    fn raw(&self) -> u64 {
        let ticks = cpu::tsc().wrapping_sub(self.first);
        if ticks > u64::MAX / 2 {
            return 0; // The counter fell below its value at boot.
        }
        (u128::from(ticks) * 1_000_000 / u128::from(self.khz)) as u64
    }

    /// The time now; how long since the last look goes into the report.
    pub fn look(&mut self, reporter: &mut Reporter) -> u64 {
        let now = self.raw();
        if now + SKEW_NS < self.seen {
            reporter.fail(ErrorCode::ClockWentBack, 0, self.seen, now);
        }
        let gap = now.saturating_sub(self.seen);
        self.seen = self.seen.max(now);
        reporter.report.gap_ns = reporter.report.gap_ns.max(gap);
        reporter.report.gap_ever_ns = reporter.report.gap_ever_ns.max(gap);
        self.seen
    }
}
