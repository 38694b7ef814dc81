//! What confines a monitor from outside, before its first instruction: the user that it is to become, the limits of
//! its control groups, a PID namespace of its own. What a monitor gives up by itself it does after it has opened
//! what it needs.
//!
//! Nothing of it stops a machine from starting: what cannot be applied is told to the monitor as a [`Measure`],
//! the monitor tells it on in its status, and `clusterctl node check` shows it.

mod namespace;

use std::path::Path;
use std::str::FromStr;

use cluster_model::{Token, VmId};
use serde::{Deserialize, Serialize};

use crate::cgroups::{Groups, Limits};

pub use namespace::{can_separate, in_own_pid_namespace};

/// The uids that own disk files: above people and services, below those of monitors.
pub const BROKER_UIDS: std::ops::Range<u32> = 0x2000_0000..0x3000_0000;
/// The usual uids of monitors.
///
/// What others take lies apart: people and services below 65,536 (systemd's dynamic users among them), the
/// subordinate uids of `useradd` up to 600,100,000. Above begin the groups that carry tokens: a monitor whose own
/// group were one could open the files of a directory volume that another machine has claimed.
pub const MONITOR_UIDS: UidRange = UidRange {
    first: 0x3000_0000,
    last: Token::GID_BASE - 1,
};

/// One measure of confinement, as it came out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measure {
    /// Its name: `uid`, `memory-limit`, `processes`, …
    pub name: String,
    /// Whether it holds.
    pub applied: bool,
    /// What was done, or why it could not be.
    pub detail: String,
}

impl Measure {
    /// One that holds.
    pub fn applied(name: &str, detail: impl Into<String>) -> Measure {
        Measure {
            name: name.to_owned(),
            applied: true,
            detail: detail.into(),
        }
    }

    /// One that could not be taken.
    pub fn missing(name: &str, why: impl Into<String>) -> Measure {
        Measure {
            name: name.to_owned(),
            applied: false,
            detail: why.into(),
        }
    }
}

/// What a machine file says of its monitor's confinement.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Confinement {
    /// The user and group that it becomes.
    pub uid: Option<u32>,
    /// What was done to it before it started.
    pub measures: Vec<Measure>,
}

/// Uids from `first` to `last`, both used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct UidRange {
    first: u32,
    last: u32,
}

impl UidRange {
    /// The uid of a machine's monitor: no two machines of a host have the same unless their numbers differ by a
    /// multiple of the range's length.
    pub fn of(self, vm: VmId) -> u32 {
        let length = u64::from(self.last - self.first) + 1;
        // Below the length of a range of u32, so it fits.
        self.first + (vm.0 % length) as u32
    }

    fn overlaps(self, first: u32, last: u32) -> bool {
        self.first <= last && first <= self.last
    }
}

impl std::fmt::Display for UidRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for UidRange {
    type Err = String;
    fn from_str(text: &str) -> Result<UidRange, String> {
        let bad = || format!("`{text}` is not a range of uids: use FIRST-LAST, as {MONITOR_UIDS}");
        let (first, last) = text.split_once('-').ok_or_else(bad)?;
        let range = UidRange {
            first: first.trim().parse().map_err(|_| bad())?,
            last: last.trim().parse().map_err(|_| bad())?,
        };
        if range.first > range.last {
            return Err(bad());
        }
        // 65,535 and the last are "no change" to the kernel; below 65,536 are people, services, nobody.
        if range.first < 0x1_0000 || range.last == u32::MAX {
            return Err(format!(
                "`{text}`: uids below 65536 are people's and services', and {} is none; use FIRST-LAST, as {MONITOR_UIDS}",
                u32::MAX
            ));
        }
        let tokens = (Token::GID_BASE, Token::GID_BASE + (Token::LIMIT - 1));
        let brokers = (BROKER_UIDS.start, BROKER_UIDS.end - 1);
        for ((first, last), whose) in [
            (brokers, "uids that own disk files"),
            (tokens, "groups that carry tokens"),
        ] {
            if range.overlaps(first, last) {
                return Err(format!(
                    "`{text}` meets the {whose} ({first}-{last}); use another range, as {MONITOR_UIDS}"
                ));
            }
        }
        Ok(range)
    }
}

impl TryFrom<String> for UidRange {
    type Error = String;
    fn try_from(text: String) -> Result<UidRange, String> {
        text.parse()
    }
}

/// Confines the monitors of one node.
#[derive(Clone, Debug)]
pub struct Confiner {
    is_root: bool,
    uids: UidRange,
    /// Their control groups.
    pub groups: Groups,
}

impl Confiner {
    /// That of the node with this data directory, as this host lets it.
    pub fn of_host(uids: UidRange, data_dir: &Path) -> Confiner {
        Confiner {
            is_root: nix::unistd::geteuid().is_root(),
            uids,
            groups: Groups::of_host(data_dir),
        }
    }

    /// What the monitor in the folder `name` is to become; makes its control groups.
    pub fn prepare(&self, name: &str, vm: VmId, limits: &Limits) -> Confinement {
        Confinement {
            // Where there is none, the monitor says so itself.
            uid: self.is_root.then(|| self.uids.of(vm)),
            measures: self.groups.make(name, limits),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_that_are_closer_than_the_range_is_long_have_uids_of_their_own() {
        let range: UidRange = "100000-100002".parse().unwrap();
        let uids: Vec<u32> = (0..6).map(|vm| range.of(VmId(vm))).collect();
        assert_eq!(uids, [100_000, 100_001, 100_002, 100_000, 100_001, 100_002]);
        for vm in [0, 1, 1 << 28, u64::MAX] {
            let uid = MONITOR_UIDS.of(VmId(vm));
            assert!(
                (MONITOR_UIDS.first..=MONITOR_UIDS.last).contains(&uid),
                "{vm}"
            );
            assert!(uid >= 65_536);
        }
    }

    #[test]
    fn a_range_that_is_somebody_elses_is_refused() {
        for (text, word) in [
            ("", "FIRST-LAST"),
            ("7", "FIRST-LAST"),
            ("200000-100000", "FIRST-LAST"),
            ("0-10", "services"),
            ("1000-200000", "services"),
            ("4294967290-4294967295", "none"),
            ("600000000-600000001", "disk files"),
            ("1000000000-1073741824", "tokens"),
        ] {
            let error = text.parse::<UidRange>().unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
        let usual = MONITOR_UIDS.to_string().parse::<UidRange>().unwrap();
        assert_eq!(usual, MONITOR_UIDS);
    }
}
