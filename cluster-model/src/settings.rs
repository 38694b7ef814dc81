//! What can be set for the whole cluster, and which combinations make sense.

use serde::{Deserialize, Serialize};

use crate::settle::{SETTLE_MS_MAX, SETTLE_MS_MIN};

/// How eager the balancer is, as in Windows Server 2016.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BalanceLevel {
    /// Moves when a node is over 80 %.
    #[default]
    Low,
    /// Moves when a node is over 70 %.
    Medium,
    /// Moves when a node is over 60 %, or 5 points over the mean.
    High,
}

/// The cluster's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// A node renews its lease this often, ms.
    pub heartbeat_ms: u32,
    /// Monitors freeze this long after the last confirmed renewal was sent, ms.
    pub freeze_ms: u32,
    /// The leader declares a node lost this long after its last reply to it, ms.
    pub lost_ms: u32,
    /// Simultaneous migrations out of a node.
    pub migrations_out_max: u32,
    /// Simultaneous migrations into a node.
    pub migrations_in_max: u32,
    /// Ceiling of a migration's blackout, ms.
    pub downtime_max_ms: u32,
    /// TCP connections of a migration.
    pub migration_channels: u32,
    /// A migration that is not through after this long is aborted, seconds.
    pub migration_timeout_s: u32,
    /// Memory kept free on every node, MiB.
    pub memory_reserve_mib: u64,
    /// Virtual processors allowed for one logical processor.
    pub cpu_overcommit: u32,
    /// The shortest settle time, ms.
    pub settle_ms_min: u32,
    /// Whether the balancer moves machines by itself.
    pub balance_auto: bool,
    /// How eager it is.
    pub balance_level: BalanceLevel,
    /// How often it looks, seconds.
    pub balance_interval_s: u32,
    /// A machine that moved rests this long, seconds.
    pub balance_cooldown_s: u32,
    /// A drain tries each machine this often.
    pub drain_tries_max: u8,
    /// A machine whose monitor ends this often within ten minutes is held.
    pub crashes_max: u8,
    /// A node lost this often within an hour is quarantined.
    pub losses_max: u8,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            heartbeat_ms: 1_000,
            freeze_ms: 5_000,
            lost_ms: 6_500,
            migrations_out_max: 2,
            migrations_in_max: 2,
            downtime_max_ms: 300,
            migration_channels: 2,
            migration_timeout_s: 600,
            memory_reserve_mib: 0,
            cpu_overcommit: 8,
            settle_ms_min: 1_000,
            balance_auto: false,
            balance_level: BalanceLevel::Low,
            balance_interval_s: 1_800,
            balance_cooldown_s: 3_600,
            drain_tries_max: 3,
            crashes_max: 3,
            losses_max: 3,
        }
    }
}

/// Which setting makes no sense, and what would.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{setting} = {value} cannot be: {must}")]
pub struct SettingsError {
    /// The setting's name.
    pub setting: String,
    /// What was asked for.
    pub value: String,
    /// What it must be.
    pub must: String,
}

/// The smallest margin between freezing and being declared lost that [`Settings::validate`] lets through, ms: within
/// it a monitor has to have stopped its guest, whatever a cluster's settings are.
pub const MARGIN_MS_MIN: u32 = 500;

impl Settings {
    /// How much later than a freeze a node is declared lost, ms: a guest that runs this long past its deadline may run
    /// beside another copy of itself.
    pub fn margin_ms(&self) -> u32 {
        self.lost_ms.saturating_sub(self.freeze_ms)
    }

    /// The *fast* profile: a node is lost after 3 s. For networks without stalls.
    pub fn fast() -> Settings {
        Settings {
            heartbeat_ms: 400,
            freeze_ms: 2_000,
            lost_ms: 2_800,
            ..Settings::default()
        }
    }

    /// Checks that the times stand in the order that safety and liveness need.
    ///
    /// # Errors
    /// Names the first setting that is out of its range.
    pub fn validate(&self) -> Result<(), SettingsError> {
        let bad = |setting: &str, value: String, must: &str| {
            Err(SettingsError {
                setting: setting.into(),
                value,
                must: must.into(),
            })
        };
        if !(100..=60_000).contains(&self.heartbeat_ms) {
            return bad(
                "heartbeat_ms",
                self.heartbeat_ms.to_string(),
                "100 to 60000",
            );
        }
        if self.freeze_ms < self.heartbeat_ms.saturating_mul(3) || self.freeze_ms > 600_000 {
            return bad(
                "freeze_ms",
                self.freeze_ms.to_string(),
                "at least three heartbeats, so that one lost packet freezes nobody, and at most 600000",
            );
        }
        // Clocks may differ in rate by some percent between two nodes, so lost must be clearly later.
        let lost_min = self.freeze_ms + (self.freeze_ms / 5).max(MARGIN_MS_MIN);
        if self.lost_ms < lost_min || self.lost_ms > 900_000 {
            return bad(
                "lost_ms",
                self.lost_ms.to_string(),
                &format!(
                    "{lost_min} (freeze_ms and a fifth, at least {MARGIN_MS_MIN} ms more) to 900000"
                ),
            );
        }
        if !(1..=64).contains(&self.migrations_out_max) {
            return bad(
                "migrations_out_max",
                self.migrations_out_max.to_string(),
                "1 to 64",
            );
        }
        if !(1..=64).contains(&self.migrations_in_max) {
            return bad(
                "migrations_in_max",
                self.migrations_in_max.to_string(),
                "1 to 64",
            );
        }
        if !(1..=60_000).contains(&self.downtime_max_ms) {
            return bad(
                "downtime_max_ms",
                self.downtime_max_ms.to_string(),
                "1 to 60000",
            );
        }
        if !(1..=16).contains(&self.migration_channels) {
            return bad(
                "migration_channels",
                self.migration_channels.to_string(),
                "1 to 16",
            );
        }
        if !(10..=86_400).contains(&self.migration_timeout_s) {
            return bad(
                "migration_timeout_s",
                self.migration_timeout_s.to_string(),
                "10 to 86400",
            );
        }
        if !(1..=64).contains(&self.cpu_overcommit) {
            return bad("cpu_overcommit", self.cpu_overcommit.to_string(), "1 to 64");
        }
        if !(SETTLE_MS_MIN..=SETTLE_MS_MAX).contains(&self.settle_ms_min) {
            return bad(
                "settle_ms_min",
                self.settle_ms_min.to_string(),
                &format!(
                    "{SETTLE_MS_MIN} to {SETTLE_MS_MAX}: under a second late writes of a lost owner were seen to land"
                ),
            );
        }
        if !(1..=86_400).contains(&self.balance_interval_s) {
            return bad(
                "balance_interval_s",
                self.balance_interval_s.to_string(),
                "1 to 86400",
            );
        }
        if !(1..=20).contains(&self.drain_tries_max) {
            return bad(
                "drain_tries_max",
                self.drain_tries_max.to_string(),
                "1 to 20",
            );
        }
        if self.crashes_max == 0 {
            return bad("crashes_max", "0".into(), "at least 1");
        }
        if self.losses_max == 0 {
            return bad("losses_max", "0".into(), "at least 1");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_let_through_leaves_a_monitor_the_smallest_margin() {
        for freeze_ms in [300, 1_000, 2_000, 2_500, 5_000, 60_000, 600_000] {
            for margin_ms in (0..1_200).step_by(100).chain([120_000]) {
                let settings = Settings {
                    heartbeat_ms: 100,
                    freeze_ms,
                    lost_ms: freeze_ms + margin_ms,
                    ..Settings::default()
                };
                assert_eq!(settings.margin_ms(), margin_ms);
                let valid = settings.validate().is_ok();
                assert!(!valid || margin_ms >= MARGIN_MS_MIN, "{settings:?}");
            }
        }
        for profile in [Settings::default(), Settings::fast()] {
            assert_eq!(profile.validate(), Ok(()));
            assert!(profile.margin_ms() > MARGIN_MS_MIN);
        }
    }
}
