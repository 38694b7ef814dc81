//! What each side publishes while it works, and what it returns when it is done.

use serde::Serialize;

/// One round of copying.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RoundStats {
    /// 1 is the bulk copy; the last one is sent while the machine is stopped.
    pub number: u32,
    /// Pages looked at, zero pages included.
    pub pages: u64,
    /// Of them, zero: named, not sent.
    pub zero_pages: u64,
    /// Bytes put on the wire, headers included.
    pub bytes: u64,
    /// From the first read to the destination's acknowledgement (the last round: to its last byte written), microseconds.
    pub duration_us: u64,
    /// Pages dirty when it ended; 0 after the last round.
    pub dirty_pages_after: u64,
}

/// Where the sending side stands; later stages compare greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SendStage {
    /// Connecting, handshakes, *Setup* until *Ready*.
    #[default]
    Setup,
    /// The first round: every page.
    MemoryCopy,
    /// Later rounds: what was dirtied meanwhile.
    ModifiedPages,
    /// The policy said stop: vCPUs are being stopped, disks drained. Can still be cancelled.
    Stopping,
    /// *Quiet* was said: last pages, device state, *Final*. Cannot be cancelled any more.
    Quiet,
    /// *Final* was sent; the destination verifies.
    FinalSent,
    /// The destination said *Complete*.
    Complete,
    /// It ended otherwise; see `failure`.
    Failed,
}

/// CLOCK_MONOTONIC of the source, nanoseconds, 0 when not reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SendTimings {
    /// [`send`](crate::send) was called.
    pub started_ns: u64,
    /// The last vCPU had stopped.
    pub vcpus_stopped_ns: u64,
    /// *Quiet* was handed to the network.
    pub quiet_ns: u64,
    /// The last byte of *Final* was handed to the network.
    pub final_sent_ns: u64,
    /// The destination's *Complete* was read.
    pub complete_ns: u64,
}

/// The sending side, published through a watch channel at each change and some ten times a second.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SendStatus {
    /// Where it stands.
    pub stage: SendStage,
    /// The round under way.
    pub round: u32,
    /// All guest memory.
    pub memory_total_bytes: u64,
    /// Guest memory still to send in this round.
    pub remaining_bytes: u64,
    /// On the wire so far.
    pub sent_bytes: u64,
    /// Pages looked at so far, zero pages included.
    pub pages: u64,
    /// Zero pages so far.
    pub zero_pages: u64,
    /// Recent bytes a second on the wire.
    pub rate_bytes_s: u64,
    /// How fast the guest dirtied memory in the last finished round.
    pub dirty_bytes_s: u64,
    /// What the blackout would be if copying stopped after the last finished round.
    pub predicted_blackout_us: u64,
    /// Finished rounds.
    pub rounds: Vec<RoundStats>,
    /// When what was reached.
    pub timings: SendTimings,
    /// Why copying stopped, in words; empty before.
    pub why_stopped_copying: String,
    /// True from just before the first attempt to send *Quiet*.
    pub said_quiet: bool,
    /// Why it failed, in words; empty unless `stage` is `Failed`.
    pub failure: String,
}

/// A migration that the destination has confirmed complete. The machine is still stopped here, and
/// stays so unless the log says abort.
#[derive(Clone, Debug, Serialize)]
pub struct Sent {
    /// The last status.
    pub status: SendStatus,
    /// Length of the device state, bytes.
    pub device_state_bytes: u64,
}

/// Where the receiving side stands; later stages compare greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReceiveStage {
    /// No source yet.
    #[default]
    Waiting,
    /// The ticket was shown; channels and *Setup* are coming.
    Setup,
    /// Memory arrives.
    Incoming,
    /// The source said *Quiet*: the disks may be claimed.
    QuietReceived,
    /// Everything arrived, verified, and is loaded: the cutover may be proposed.
    Complete,
    /// It ended otherwise; see `failure`.
    Failed,
}

/// The receiving side, published through a watch channel.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ReceiveStatus {
    /// Where it stands.
    pub stage: ReceiveStage,
    /// The round that is arriving.
    pub round: u32,
    /// All guest memory.
    pub memory_total_bytes: u64,
    /// Pages written so far (a page sent twice counts twice).
    pub pages: u64,
    /// Pages named as zero so far.
    pub zero_pages: u64,
    /// Bytes of payload so far.
    pub received_bytes: u64,
    /// CLOCK_MONOTONIC here of when *Quiet* came, 0 before.
    pub quiet_received_ns: u64,
    /// CLOCK_MONOTONIC here of when all was verified and loaded, 0 before.
    pub complete_ns: u64,
    /// The source's stamps, on the source's clock; known from *Final* on (`complete_ns` stays 0).
    pub source_timings: SendTimings,
    /// Why it failed, in words; empty unless `stage` is `Failed`.
    pub failure: String,
}

/// A machine that arrived whole and verified, loaded and not running.
#[derive(Clone, Debug, Serialize)]
pub struct Received {
    /// The last status.
    pub status: ReceiveStatus,
    /// Length of the device state, bytes.
    pub device_state_bytes: u64,
}
