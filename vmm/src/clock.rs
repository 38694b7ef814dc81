//! The host's clocks: boot time for leases, monotonic for timings, real time for the guest's clock over a migration.

use nix::time::{ClockId, clock_gettime};

fn read(clock: ClockId) -> u64 {
    // These clocks exist on every Linux that has KVM; a zero makes a lease lapse, the safe side.
    clock_gettime(clock).map_or(0, |time| {
        u64::try_from(time.tv_sec()).unwrap_or(0) * 1_000_000_000
            + u64::try_from(time.tv_nsec()).unwrap_or(0)
    })
}

/// CLOCK_BOOTTIME, nanoseconds: goes on while the host sleeps. Lease deadlines are counted on it.
pub fn boottime_ns() -> u64 {
    read(ClockId::CLOCK_BOOTTIME)
}

/// CLOCK_MONOTONIC, nanoseconds.
pub fn monotonic_ns() -> u64 {
    read(ClockId::CLOCK_MONOTONIC)
}

/// CLOCK_REALTIME, nanoseconds.
pub fn realtime_ns() -> u64 {
    read(ClockId::CLOCK_REALTIME)
}

/// Processor time of this process, all threads together, nanoseconds.
pub fn process_cpu_ns() -> u64 {
    read(ClockId::CLOCK_PROCESS_CPUTIME_ID)
}
