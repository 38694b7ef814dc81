//! What a caller chooses for one migration, with the bounds of every wait.

use crate::policy::{FixedCosts, Policy};
use std::fmt;
use std::time::Duration;

/// The most channels of one migration: more has not made loopback or a 100 Gb/s link any faster.
pub const CHANNELS_MAX: u16 = 16;

/// The single-use secret that opens a destination's memory port to one source.
#[derive(Clone, Copy)]
pub struct Ticket(pub [u8; 32]);

impl Ticket {
    /// Compares without telling by its duration where the first difference is.
    pub(crate) fn matches(&self, other: &Ticket) -> bool {
        let difference = self
            .0
            .iter()
            .zip(other.0)
            .fold(0, |acc, (a, b)| acc | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ticket(secret)")
    }
}

impl TryFrom<&[u8]> for Ticket {
    type Error = std::array::TryFromSliceError;
    fn try_from(bytes: &[u8]) -> Result<Ticket, Self::Error> {
        Ok(Ticket(bytes.try_into()?))
    }
}

/// What both sides were told out of band; every connection begins by proving it.
#[derive(Clone, Copy, Debug)]
pub struct Credentials {
    /// The migration's id in the log.
    pub migration_id: u64,
    /// Its ticket. One source may open its channels with it once.
    pub ticket: Ticket,
}

/// Choices and bounds of the sending side.
#[derive(Clone, Debug)]
pub struct SendOptions {
    /// Connections that carry memory, 1 to 16; 0 means 1.
    pub channels: u16,
    /// When to stop copying.
    pub policy: Policy,
    /// What the blackout costs beyond copying; measured by the caller, or the default's guess.
    pub costs: FixedCosts,
    /// Bytes a second over all channels, in the blackout too; 0: no cap.
    pub bandwidth_max_bytes_s: u64,
    /// How often a side that has nothing to say says so.
    pub heartbeat: Duration,
    /// A peer that was silent for so long is dead.
    pub dead_after: Duration,
    /// Bound of connecting, the handshakes and *Ready* together.
    pub setup_timeout: Duration,
    /// Bound of stopping the vCPUs and of draining the disks, each.
    pub stop_timeout: Duration,
    /// Bound from *Final* to *Complete*. The caller's log decides what happens after it.
    pub final_timeout: Duration,
}

impl Default for SendOptions {
    fn default() -> SendOptions {
        SendOptions {
            channels: 1,
            policy: Policy::default(),
            costs: FixedCosts::default(),
            bandwidth_max_bytes_s: 0,
            heartbeat: Duration::from_millis(200),
            dead_after: Duration::from_millis(1500),
            setup_timeout: Duration::from_secs(10),
            stop_timeout: Duration::from_secs(10),
            final_timeout: Duration::from_secs(30),
        }
    }
}

/// Bounds of the receiving side.
#[derive(Clone, Debug)]
pub struct ReceiveOptions {
    /// How long to wait for the source's first connection.
    pub source_timeout: Duration,
    /// Bound from the first connection to *Setup* and all channels.
    pub setup_timeout: Duration,
    /// Bound of one connection's handshake, TLS included.
    pub handshake_timeout: Duration,
    /// How often a side that has nothing to say says so.
    pub heartbeat: Duration,
    /// A peer that was silent for so long is dead.
    pub dead_after: Duration,
    /// From *Quiet* on: bound of a standstill, and of loading the device state.
    pub final_timeout: Duration,
}

impl Default for ReceiveOptions {
    fn default() -> ReceiveOptions {
        ReceiveOptions {
            source_timeout: Duration::from_secs(60),
            setup_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(3),
            heartbeat: Duration::from_millis(200),
            dead_after: Duration::from_millis(1500),
            final_timeout: Duration::from_secs(30),
        }
    }
}
