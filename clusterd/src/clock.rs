//! The clocks of a node, read here and nowhere else.
//!
//! Lease deadlines are counted on CLOCK_BOOTTIME (it goes on while the host sleeps), durations of a
//! migration on CLOCK_MONOTONIC (the monitors stamp with it too), and what people read is wall time.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use proto::clock;

/// A node's clocks. Clones are the same clocks; a test may shift their boot time.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    boottime_offset_ns: Arc<AtomicI64>,
}

impl Clock {
    /// CLOCK_BOOTTIME, nanoseconds.
    pub fn boottime_ns(&self) -> u64 {
        let offset = self.boottime_offset_ns.load(Ordering::Relaxed);
        clock::boottime_ns().saturating_add_signed(offset)
    }

    /// CLOCK_MONOTONIC, nanoseconds.
    pub fn monotonic_ns(&self) -> u64 {
        clock::monotonic_ns()
    }

    /// Milliseconds since the Unix epoch; shown to people, decides nothing of safety.
    pub fn wall_ms(&self) -> u64 {
        clock::realtime_ns() / 1_000_000
    }

    /// Shifts this node's boot time by `ns`, as a host that slept or a clock that runs wrongly would. For tests.
    pub fn shift_boottime(&self, ns: i64) {
        self.boottime_offset_ns.fetch_add(ns, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_moves_boot_time_alone_and_for_every_clone() {
        let clock = Clock::default();
        let clone = clock.clone();
        let (boot, monotonic) = (clock.boottime_ns(), clock.monotonic_ns());
        clock.shift_boottime(1_000_000_000_000);
        assert!(clone.boottime_ns() >= boot + 1_000_000_000_000);
        assert!(clone.monotonic_ns() < monotonic + 1_000_000_000_000);
    }
}
