//! The guest's monotonic clock, and the gaps in it: time in which the guest did not run.

use crate::abi::ErrorCode;
use crate::cpu;
use crate::report::Reporter;
use crate::share;

/// Counters of two processors may differ by this much without anything being wrong, ns.
const SKEW_NS: u64 = 100_000;

/// The time stamp counter of one processor, scaled.
///
/// After a migration the counter may have jumped forward by the blackout: that is what the gap shows. It must never
/// go back, and never be behind what another processor has read before.
pub struct Clock {
    vcpu: u64,
    vcpus: u64,
    first: u64,
    khz: u64,
    seen: u64,
}

impl Clock {
    /// The clock of processor `vcpu` of `vcpus`; it read zero at `first`.
    pub fn new(vcpu: u64, vcpus: u64, first: u64, khz: u64) -> Self {
        Self {
            vcpu,
            vcpus,
            first,
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
        let latest = share::latest_ns(self.vcpus).max(self.seen);
        cpu::barrier(); // The others' times are read before the counter is.
        let now = self.raw();
        if now + SKEW_NS < latest {
            reporter.fail(ErrorCode::ClockWentBack, self.vcpu, latest, now);
        }
        let gap = if self.seen == 0 { 0 } else { now.saturating_sub(self.seen) };
        self.seen = self.seen.max(now);
        share::saw(self.vcpu, self.seen, gap);
        reporter.report.gap_ns = reporter.report.gap_ns.max(gap);
        reporter.report.gap_ever_ns = reporter.report.gap_ever_ns.max(gap);
        self.seen
    }
}
