//! How long a takeover waits between its claim and its confirmation, so that WRITEs of the former owner that
//! had passed the server's check have landed. One rule, for whoever waits and for whoever shows it.
//!
//! ```text
//!  the largest of   SETTLE_MS_MIN · what certification measured · the setting · ten times the p99.9 of WRITEs
//! ```
//!
//! What a person set and what certification measured is waited in full: what is over [`SETTLE_MS_MAX`] was
//! refused when it was to be written down. Only what a monitor measured is bounded here, by
//! [`MEASURED_MS_MAX`], and [`Settle::is_bounded`] says so.

#[cfg(test)]
mod tests;

use crate::settings::Settings;
use crate::state::{ClusterState, Vm, Volume};

/// No settle is shorter, ms: late landings were measured up to 108 ms (and none after 50 ms of waiting), so
/// this has a margin of ten.
pub const SETTLE_MS_MIN: u32 = 1_000;
/// No settle that is set or certified is longer, ms: a machine that stands still for longer than ten minutes at
/// each failover is better moved by hand. A setting above it is refused, and a volume whose server would need
/// it has fence class `none`.
pub const SETTLE_MS_MAX: u32 = 600_000;
/// What monitors measured counts for this long at most, ms. A WRITE that waited for a server that was away
/// looks like one that the server let in and landed late; without a bound an outage of a minute would freeze
/// each re-keyed machine for ten.
pub const MEASURED_MS_MAX: u32 = 120_000;
/// The settle time covers this many times the slowest of a thousand WRITEs, and of the late landings seen.
const TIMES: u64 = 10;

/// How long to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settle {
    /// This long, ms.
    pub ms: u64,
    /// Ten times the p99.9 of the machine's WRITEs, ms.
    pub measured_ms: u64,
}

impl Settle {
    /// Whether it is shorter than what was measured asks for: to be said where it is waited.
    pub fn is_bounded(&self) -> bool {
        self.measured_ms > self.ms
    }
}

/// The settle time that a server needs whose late WRITEs landed up to `lag_us` after the group had changed, ms.
///
/// # Errors
/// It is over [`SETTLE_MS_MAX`]: what it would be.
pub fn certified_ms(lag_us: u64) -> Result<u32, u64> {
    let ms = times(lag_us);
    u32::try_from(ms)
        .ok()
        .filter(|&ms| ms <= SETTLE_MS_MAX)
        .map(|ms| ms.max(SETTLE_MS_MIN))
        .ok_or(ms)
}

/// Ten times that, ms, rounded up.
fn times(us: u64) -> u64 {
    us.saturating_mul(TIMES).div_ceil(1_000)
}

impl Volume {
    /// The settle time of its machines as far as it is known beforehand, ms.
    pub fn settle_ms(&self, settings: &Settings) -> u32 {
        self.settle_ms
            .max(settings.settle_ms_min)
            .max(SETTLE_MS_MIN)
    }
}

impl ClusterState {
    /// How long a takeover of this machine settles. `write_latency_p999_us`: what its monitor measured; 0
    /// where there is none to ask, as after the loss of its node.
    pub fn settle(&self, vm: &Vm, write_latency_p999_us: u64) -> Settle {
        let promised = vm
            .spec
            .disks
            .iter()
            .filter_map(|disk| self.volume_named(&disk.volume))
            .map(|volume| volume.settle_ms(&self.settings))
            .max()
            .unwrap_or(0)
            .max(self.settings.settle_ms_min)
            .max(SETTLE_MS_MIN);
        let measured_ms = times(write_latency_p999_us);
        Settle {
            ms: u64::from(promised).max(measured_ms.min(u64::from(MEASURED_MS_MAX))),
            measured_ms,
        }
    }
}
