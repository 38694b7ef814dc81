//! What the guest has to say, and the first thing that was ever wrong.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::abi::{COMMAND_REPORT, ErrorCode, PORT_COMMAND, Report};
use crate::cpu;

/// Where [`Reporter::last_words`] finds the record; 0 before there is one.
static REPORT_ADDRESS: AtomicU64 = AtomicU64::new(0);

/// Gathers the report and sends it.
pub struct Reporter {
    /// The report so far.
    pub report: Report,
    /// Something in it should be known now.
    pub urgent: bool,
    address: u64,
}

impl Reporter {
    /// A reporter that keeps its record at `address`.
    pub fn new(address: u64) -> Self {
        REPORT_ADDRESS.store(address, Ordering::Relaxed);
        Self {
            report: Report::default(),
            urgent: true,
            address,
        }
    }

    /// A check failed. The first failure stays in the report for ever, the others are counted.
    pub fn fail(&mut self, code: ErrorCode, place: u64, expected: u64, found: u64) {
        let report = &mut self.report;
        if report.errors == 0 {
            report.error_code = code as u64;
            report.error_where = place;
            report.error_expected = expected;
            report.error_found = found;
            self.urgent = true;
        }
        report.errors += 1;
    }

    /// Writes the record and lets the monitor take it.
    pub fn send(&mut self, now: u64) {
        self.report.number += 1;
        self.report.clock_ns = now;
        cpu::write_words(self.address, &self.report.to_words());
        cpu::barrier();
        cpu::out32(PORT_COMMAND, COMMAND_REPORT);
        self.report.gap_ns = 0;
        self.urgent = false;
    }

    /// Reports a failure of the program itself, from wherever it happened, as far as there is a record at all.
    pub fn last_words(code: ErrorCode, place: u64) {
        let address = REPORT_ADDRESS.load(Ordering::Relaxed);
        if address != 0 {
            let report = Report {
                number: u64::MAX,
                errors: 1,
                error_code: code as u64,
                error_where: place,
                ..Report::default()
            };
            cpu::write_words(address, &report.to_words());
            cpu::barrier();
            cpu::out32(PORT_COMMAND, COMMAND_REPORT);
        }
        cpu::out32(PORT_COMMAND, crate::abi::COMMAND_GIVE_UP);
    }
}
