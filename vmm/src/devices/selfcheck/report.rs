//! What is known of the self-checking guest: its last report, and what the monitor adds up itself.

use crate::guest::abi::{ErrorCode, FLAG_FILLED, FLAG_SCANNED, Report};

/// What the guest reported, as far as it has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestReport {
    /// The last report; none before the first.
    pub last: Option<Report>,
    /// The longest gap since it was last taken, ns; see [`super::SelfCheck::take_longest_gap`].
    pub longest_gap_ns: u64,
    /// Reports whose record did not match its checksum.
    pub damaged_records: u64,
    /// Why the witness file could not be written; from then on it proves nothing.
    pub witness_failure: Option<String>,
}

impl GuestReport {
    /// Takes up a new report.
    pub fn take(&mut self, report: Report) {
        self.longest_gap_ns = self.longest_gap_ns.max(report.gap_ns);
        self.last = Some(report);
    }

    /// Failed checks: the guest's own, and records that arrived damaged.
    pub fn errors(&self) -> u64 {
        self.last.map_or(0, |report| report.errors) + self.damaged_records
    }

    /// The first failed check in words.
    pub fn error(&self) -> Option<String> {
        let guest = self
            .last
            .filter(|report| report.errors > 0)
            .map(|report| describe(&report));
        guest.or_else(|| self.witness_failure.clone()).or_else(|| {
            (self.damaged_records > 0).then(|| "a report record did not match its checksum".into())
        })
    }

    /// Whether the guest has written its whole working set once.
    pub fn filled(&self) -> bool {
        self.last
            .is_some_and(|report| report.flags & FLAG_FILLED != 0)
    }

    /// The highest number such that it and all before it were on the disk at boot, once the guest has looked.
    pub fn found_at_boot(&self) -> Option<u64> {
        self.last
            .filter(|report| report.flags & FLAG_SCANNED != 0)
            .map(|report| report.found_at_boot)
    }
}

/// The first failed check of a report in words.
pub fn describe(report: &Report) -> String {
    let Report {
        error_where: place,
        error_expected: expected,
        error_found: found,
        ..
    } = *report;
    match ErrorCode::from_number(report.error_code) {
        Some(ErrorCode::PageDamaged) => {
            format!(
                "page {place} of the working set is damaged: a word is {found:#018x}, not {expected:#018x}"
            )
        }
        Some(ErrorCode::PageStale) => {
            format!("page {place} of the working set holds generation {found}, not {expected}")
        }
        Some(ErrorCode::CounterStale) => {
            format!(
                "the guest's own memory is stale: one count of vCPU {place} says {expected} pages written, its twin {found}"
            )
        }
        Some(ErrorCode::ClockWentBack) => {
            format!("the clock of vCPU {place} went back from {expected} to {found} ns")
        }
        Some(ErrorCode::DiskRequestFailed) => {
            format!("the disk answered status {found} at block slot {place}")
        }
        Some(ErrorCode::BlockDamaged) => {
            format!(
                "the disk's block slot {place} is damaged: it should hold block {expected}, and says {found}"
            )
        }
        Some(ErrorCode::BlockStale) => {
            format!("the disk's block slot {place} holds block {found}, not {expected}")
        }
        Some(ErrorCode::BlockLost) => {
            format!("block {expected} was flushed; at boot its slot {place} holds block {found}")
        }
        Some(ErrorCode::DiskUnusable) => {
            format!("the disk at {place:#x} cannot be used: it says {found:#x}")
        }
        Some(ErrorCode::BadParams) => "the boot parameters are damaged".into(),
        Some(ErrorCode::Panic) => format!("the guest's own program failed at line {place}"),
        Some(ErrorCode::SharedCountStale) => {
            format!(
                "the page that all vCPUs write is stale: it counts {found} turns, and they made {expected}"
            )
        }
        None => format!(
            "unknown failure {} ({place:#x}, {expected:#x}, {found:#x})",
            report.error_code
        ),
    }
}
