//! The device's saved state: the last report and the longest gap, so that the figures go on where the machine goes.

use serde::{Deserialize, Serialize};

use super::SelfCheck;
use crate::devices::{Migratable, StateError, decode_state, encode_state};
use crate::guest::abi::{REPORT_WORDS, Report};

/// The version that is written.
pub const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// The record's words; none before the first report.
    report: Option<Vec<u64>>,
    longest_gap_ns: u64,
    damaged_records: u64,
    witness_failure: Option<String>,
}

/// Saves the device.
pub fn save(device: &SelfCheck) -> Result<Vec<u8>, StateError> {
    let report = device.report();
    let state = State {
        report: report.last.map(|report| report.to_words().to_vec()),
        longest_gap_ns: report.longest_gap_ns,
        damaged_records: report.damaged_records,
        witness_failure: report.witness_failure,
    };
    encode_state(&device.kind(), &state)
}

/// Restores the device.
pub fn restore(device: &SelfCheck, version: u32, state: &[u8]) -> Result<(), StateError> {
    let kind = device.kind();
    if version != VERSION {
        return Err(StateError::Version {
            kind,
            found: version,
            known: VERSION,
        });
    }
    let state: State = decode_state(&kind, state)?;
    let last = match state.report {
        None => None,
        Some(words) => {
            let words = <[u64; REPORT_WORDS]>::try_from(words).ok();
            let report = words.and_then(|words| Report::from_words(&words));
            let damaged = StateError::Invalid {
                kind,
                reason: "its report record is damaged".into(),
            };
            Some(report.ok_or(damaged)?)
        }
    };
    device.report.send_modify(|report| {
        report.last = last;
        report.longest_gap_ns = state.longest_gap_ns;
        report.damaged_records = state.damaged_records;
        report.witness_failure = state.witness_failure;
    });
    Ok(())
}
