//! When to stop copying: a pure function of the rounds so far.
//!
//! After each round the driver asks [`judge`]. The blackout that would follow if the machine were
//! stopped now is predicted as
//!
//! ```text
//! pause + drain + device state + commit + resume   (given: measured by the caller)
//!   + harvest                                      (measured each round)
//!   + remaining bytes / recent throughput
//! ```
//!
//! The downtime limit is a ceiling, not a goal: "stop as soon as the prediction is under the limit"
//! makes an idle guest wait for the whole limit. Rounds go on while they pay, that is while
//! the next one is expected to take away a quarter of what remains and costs little; then the
//! machine is stopped at a local minimum of what remains. A guest that cannot be brought under the
//! ceiling in the rounds allowed is given up with the figures that say why, unless
//! the caller asked for stop-and-copy.

use crate::pages::PAGE_SIZE;
use crate::stats::RoundStats;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What is assumed of a link that nothing was sent over yet (an all-zero guest), bytes a second.
const ASSUMED_BYTES_S: u64 = 256 << 20;

/// Rounds that throughput is averaged over: recent enough to follow a change, long enough to smooth it.
const THROUGHPUT_ROUNDS: usize = 3;

/// Bytes that an average must rest on: less than a batch says more about latency than about the link.
const THROUGHPUT_BYTES_MIN: u64 = 1 << 20;

/// Rounds among which a minimum of what remains is looked for.
const MINIMUM_ROUNDS: usize = 4;

/// How much above that minimum still counts as being at it.
const MINIMUM_SLACK_PERCENT: u64 = 25;

/// What a migration may cost the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Ceiling of the predicted blackout, milliseconds.
    pub downtime_max_ms: u32,
    /// Rounds before the answer must be stop or give up.
    pub rounds_max: u32,
    /// A round pays when it is expected to take away at least this share of what remains.
    pub gain_min_percent: u32,
    /// And at least this much of the blackout, microseconds: below it noise is all there is to gain.
    pub gain_min_us: u64,
    /// Once the ceiling holds, a round may take this long, milliseconds, or it costs more than it gives.
    pub round_max_ms: u64,
    /// The copying as a whole may take this long, milliseconds.
    pub copy_max_ms: u64,
    /// What to do with a guest that does not converge: stop it anyway and copy the rest (true), or give up.
    pub stop_and_copy: bool,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            downtime_max_ms: 300,
            rounds_max: 30,
            gain_min_percent: 25,
            gain_min_us: 500,
            round_max_ms: 5_000,
            copy_max_ms: 3_600_000,
            stop_and_copy: false,
        }
    }
}

/// The parts of the blackout that do not depend on what remains, microseconds.
///
/// The caller knows them (earlier migrations, a rehearsal); the defaults are what a small machine on one host showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FixedCosts {
    /// Stopping the vCPUs.
    pub pause_us: u64,
    /// Draining and flushing the disks.
    pub drain_us: u64,
    /// Saving, sending and loading the device state.
    pub device_state_us: u64,
    /// The cutover's entry in the log.
    pub commit_us: u64,
    /// From the permit to the first instruction.
    pub resume_us: u64,
}

impl FixedCosts {
    /// All of them.
    pub fn total_us(&self) -> u64 {
        [
            self.pause_us,
            self.drain_us,
            self.device_state_us,
            self.commit_us,
            self.resume_us,
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }
}

impl Default for FixedCosts {
    fn default() -> FixedCosts {
        FixedCosts {
            pause_us: 1_000,
            drain_us: 2_000,
            device_state_us: 1_000,
            commit_us: 5_000,
            resume_us: 1_000,
        }
    }
}

/// What the driver knows after a round.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Finished rounds, oldest first; `dirty_pages_after` of the last is what remains.
    pub rounds: &'a [RoundStats],
    /// Since the copying began, microseconds.
    pub elapsed_us: u64,
    /// Reading the dirty bitmap, as last measured, microseconds.
    pub harvest_us: u64,
    /// Fixed costs of the blackout.
    pub costs: FixedCosts,
    /// The cap on bandwidth, bytes a second; 0: none.
    pub bandwidth_max_bytes_s: u64,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send what is dirty now, machine running.
    AnotherRound,
    /// Stop the machine and send the rest.
    Stop(StopReason),
    /// End the attempt; the machine runs on.
    GiveUp(GiveUp),
}

/// Why copying stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// Nothing, or next to nothing, is left to gain.
    NothingToGain {
        /// What remains, bytes.
        remaining_bytes: u64,
    },
    /// The ceiling holds and another round would not pay.
    NoLongerPays {
        /// What remains, bytes.
        remaining_bytes: u64,
        /// What another round would leave, bytes.
        expected_bytes: u64,
    },
    /// The ceiling holds and the bound of rounds or time is reached.
    BoundReached {
        /// Rounds done.
        rounds: u32,
    },
    /// The ceiling does not hold and the caller wants the machine moved all the same.
    StopAndCopy {
        /// The blackout to expect, microseconds.
        predicted_blackout_us: u64,
    },
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StopReason::NothingToGain { remaining_bytes } => {
                write!(f, "only {} KiB remained", remaining_bytes / 1024)
            }
            StopReason::NoLongerPays {
                remaining_bytes,
                expected_bytes,
            } => write!(
                f,
                "another round would have left {} KiB of {} KiB",
                expected_bytes / 1024,
                remaining_bytes / 1024
            ),
            StopReason::BoundReached { rounds } => {
                write!(
                    f,
                    "the bound was reached after {rounds} rounds, within the downtime"
                )
            }
            StopReason::StopAndCopy {
                predicted_blackout_us,
            } => write!(
                f,
                "stop-and-copy: it does not converge, a blackout of {} ms is expected",
                predicted_blackout_us / 1000
            ),
        }
    }
}

/// Why a guest cannot be moved within its downtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GiveUp {
    /// Rounds done.
    pub rounds: u32,
    /// The blackout to expect, microseconds.
    pub predicted_blackout_us: u64,
    /// The ceiling, milliseconds.
    pub downtime_max_ms: u32,
    /// How fast the guest dirties memory, bytes a second.
    pub dirty_bytes_s: u64,
    /// How fast memory gets across, bytes a second.
    pub copy_bytes_s: u64,
    /// What remained, bytes.
    pub remaining_bytes: u64,
}

impl fmt::Display for GiveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "after {} rounds the blackout would be {} ms and {} ms are allowed; the guest dirties {} MiB/s, \
             {} MiB/s get across, {} MiB remained; allow more downtime or bandwidth, or stop-and-copy",
            self.rounds,
            self.predicted_blackout_us / 1000,
            self.downtime_max_ms,
            self.dirty_bytes_s >> 20,
            self.copy_bytes_s >> 20,
            self.remaining_bytes >> 20
        )
    }
}

/// What the figures say, without a verdict: for the status, and for a dry run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prediction {
    /// Guest memory still to send, bytes.
    pub remaining_bytes: u64,
    /// How fast memory that is not zero gets across, bytes a second; never 0.
    pub copy_bytes_s: u64,
    /// How fast the guest dirtied memory in the last round, bytes a second.
    pub dirty_bytes_s: u64,
    /// The blackout if the machine were stopped now, microseconds.
    pub blackout_us: u64,
    /// How long another round would take, microseconds.
    pub next_round_us: u64,
    /// What it would leave, bytes.
    pub expected_bytes: u64,
}

/// Reads the figures.
pub fn predict(progress: &Progress<'_>) -> Prediction {
    let copy_bytes_s = throughput(progress);
    let last = progress.rounds.last().copied().unwrap_or_default();
    let remaining_bytes = last.dirty_pages_after.saturating_mul(PAGE_SIZE as u64);
    let dirty_bytes_s = per_second(remaining_bytes, last.duration_us);
    let copy_us = time_us(remaining_bytes, copy_bytes_s);
    let next_round_us = copy_us.saturating_add(progress.harvest_us);
    // A guest's working set makes distinct dirty pages grow slower than time, so in a shorter round
    // a straight line errs to the low side and in a longer one to the high side; the verdict of the round after puts it right.
    let expected_bytes = bytes_in(dirty_bytes_s, next_round_us);
    let blackout_us = progress
        .costs
        .total_us()
        .saturating_add(progress.harvest_us)
        .saturating_add(copy_us);
    Prediction {
        remaining_bytes,
        copy_bytes_s,
        dirty_bytes_s,
        blackout_us,
        next_round_us,
        expected_bytes,
    }
}

/// Decides what comes after the rounds so far.
pub fn judge(policy: &Policy, progress: &Progress<'_>) -> Verdict {
    if progress.rounds.is_empty() {
        return Verdict::AnotherRound;
    }
    let rounds = progress.rounds.len() as u32;
    let now = predict(progress);
    let fits = now.blackout_us <= u64::from(policy.downtime_max_ms) * 1000;
    let bound_reached = rounds >= policy.rounds_max
        || progress.elapsed_us >= policy.copy_max_ms.saturating_mul(1000);

    if !fits {
        return match (bound_reached, policy.stop_and_copy) {
            (false, _) => Verdict::AnotherRound,
            (true, true) => Verdict::Stop(StopReason::StopAndCopy {
                predicted_blackout_us: now.blackout_us,
            }),
            (true, false) => Verdict::GiveUp(GiveUp {
                rounds,
                predicted_blackout_us: now.blackout_us,
                downtime_max_ms: policy.downtime_max_ms,
                dirty_bytes_s: now.dirty_bytes_s,
                copy_bytes_s: now.copy_bytes_s,
                remaining_bytes: now.remaining_bytes,
            }),
        };
    }
    if bound_reached {
        return Verdict::Stop(StopReason::BoundReached { rounds });
    }
    let most_to_gain_us = time_us(now.remaining_bytes, now.copy_bytes_s);
    if most_to_gain_us < policy.gain_min_us {
        return Verdict::Stop(StopReason::NothingToGain {
            remaining_bytes: now.remaining_bytes,
        });
    }
    if pays(policy, &now) {
        return Verdict::AnotherRound;
    }
    // Not paying by the forecast, but well above what earlier rounds reached: this round caught the guest in
    // a burst. Wait for a calmer moment; the minimum looked for moves on with the rounds, so this ends.
    if above_minimum(progress.rounds)
        && now.next_round_us <= policy.round_max_ms.saturating_mul(1000)
    {
        return Verdict::AnotherRound;
    }
    Verdict::Stop(StopReason::NoLongerPays {
        remaining_bytes: now.remaining_bytes,
        expected_bytes: now.expected_bytes,
    })
}

fn pays(policy: &Policy, now: &Prediction) -> bool {
    let saved = now.remaining_bytes.saturating_sub(now.expected_bytes);
    let share_ok = u128::from(saved) * 100
        >= u128::from(now.remaining_bytes) * u128::from(policy.gain_min_percent);
    share_ok
        && time_us(saved, now.copy_bytes_s) >= policy.gain_min_us
        && now.next_round_us <= policy.round_max_ms.saturating_mul(1000)
}

/// Whether what remains is clearly more than the least of the few rounds before.
fn above_minimum(rounds: &[RoundStats]) -> bool {
    let Some((last, before)) = rounds.split_last() else {
        return false;
    };
    let recent = &before[before.len().saturating_sub(MINIMUM_ROUNDS)..];
    let Some(least) = recent.iter().map(|r| r.dirty_pages_after).min() else {
        return false;
    };
    u128::from(last.dirty_pages_after) * 100
        > u128::from(least) * u128::from(100 + MINIMUM_SLACK_PERCENT)
}

/// Bytes a second over the last rounds, weighted by time, never 0 and never above the cap.
fn throughput(progress: &Progress<'_>) -> u64 {
    let (mut bytes, mut duration_us) = (0u64, 0u64);
    for (age, round) in progress.rounds.iter().rev().enumerate() {
        if age >= THROUGHPUT_ROUNDS && bytes >= THROUGHPUT_BYTES_MIN {
            break;
        }
        // Zero pages cross at the speed of a scan; what is dirty at the end is hardly ever zero.
        let pages = round.pages.saturating_sub(round.zero_pages);
        bytes = bytes.saturating_add(pages.saturating_mul(PAGE_SIZE as u64));
        duration_us = duration_us.saturating_add(round.duration_us);
    }
    let measured = if bytes < THROUGHPUT_BYTES_MIN {
        ASSUMED_BYTES_S
    } else {
        per_second(bytes, duration_us)
    };
    match progress.bandwidth_max_bytes_s {
        0 => measured.max(1),
        cap => measured.min(cap).max(1),
    }
}

fn per_second(bytes: u64, duration_us: u64) -> u64 {
    saturate(u128::from(bytes) * 1_000_000 / u128::from(duration_us.max(1)))
}

fn time_us(bytes: u64, bytes_s: u64) -> u64 {
    saturate(u128::from(bytes) * 1_000_000 / u128::from(bytes_s.max(1)))
}

fn bytes_in(bytes_s: u64, duration_us: u64) -> u64 {
    saturate(u128::from(bytes_s) * u128::from(duration_us) / 1_000_000)
}

fn saturate(value: u128) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
