//! The one place where this crate reads a clock.

use nix::time::{ClockId, clock_gettime};

/// CLOCK_MONOTONIC of this host, in nanoseconds: the clock of every `..._ns` field of this crate.
pub fn monotonic_ns() -> u64 {
    // CLOCK_MONOTONIC exists on every Linux; a failure would mean a broken kernel, and 0 is what
    // "not reached" looks like.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(|t| (t.tv_sec() as u64).saturating_mul(1_000_000_000) + t.tv_nsec() as u64)
        .unwrap_or(0)
}
