//! The host's clocks: boot time for leases, monotonic for timings, real time for the guest's clock over a migration.

use nix::time::{ClockId, clock_gettime};

pub use proto::clock::{boottime_ns, kernel_boottime_ns, may_step, monotonic_ns, realtime_ns};

/// Processor time of this process, all threads together, nanoseconds.
pub fn process_cpu_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(0, |time| {
        u64::try_from(time.tv_sec()).unwrap_or(0) * 1_000_000_000
            + u64::try_from(time.tv_nsec()).unwrap_or(0)
    })
}
