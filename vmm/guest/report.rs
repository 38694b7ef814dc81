//! What the guest has to say, and the first thing that was ever wrong.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::abi::{COMMAND_GIVE_UP, COMMAND_REPORT, ErrorCode, FLAG_FILLED, PORT_COMMAND, Report};
use crate::cpu;
use crate::share;

/// Where [`Reporter::last_words`] finds the record; 0 before there is one.
static REPORT_ADDRESS: AtomicU64 = AtomicU64::new(0);

/// Gathers what one processor has to say; the first one's is sent, with what all others say.
pub struct Reporter {
    /// The report so far, of this processor alone. Of an error that another one published the facts are here too, the
    /// count is not.
    pub report: Report,
    /// Something in it should be known now.
    pub urgent: bool,
    address: u64,
    vcpu: u64,
    vcpus: u64,
}

impl Reporter {
    /// The reporter of processor `vcpu` of `vcpus`; the first one keeps the record at `address`.
    pub fn new(address: u64, vcpu: u64, vcpus: u64) -> Self {
        if vcpu == 0 {
            REPORT_ADDRESS.store(address, Ordering::Relaxed);
        }
        Self {
            report: Report::default(),
            urgent: true,
            address,
            vcpu,
            vcpus,
        }
    }

    /// A check failed. The first failure stays in the report for ever, the others are counted.
    pub fn fail(&mut self, code: ErrorCode, place: u64, expected: u64, found: u64) {
        let report = &mut self.report;
        if report.error_code == 0 {
            report.error_code = code as u64;
            report.error_where = place;
            report.error_expected = expected;
            report.error_found = found;
            self.urgent = true;
        }
        report.errors += 1;
    }

    /// Shows the first processor what this one has to say.
    pub fn publish(&self) {
        share::publish(self.vcpu, &self.report);
    }

    /// Looks at what the others publish. The machine ends where one of their programs failed.
    pub fn look_around(&mut self, now: u64) {
        if let Some((sum, count)) = share::turns_differ(self.vcpus) {
            self.fail(ErrorCode::SharedCountStale, 0, sum, count);
        }
        for other in 1..self.vcpus {
            let theirs = share::published(other);
            let gap = share::take_gap_ns(other);
            let report = &mut self.report;
            report.gap_ns = report.gap_ns.max(gap);
            report.gap_ever_ns = report.gap_ever_ns.max(theirs.gap_ever_ns);
            self.urgent |= adopt_error(report, &theirs);
            if theirs.error_code == ErrorCode::Panic as u64 {
                self.send(now);
                cpu::out32(PORT_COMMAND, COMMAND_GIVE_UP);
            }
        }
    }

    /// What all processors together have to say.
    fn of_all(&self) -> Report {
        let mut all = self.report;
        for other in 1..self.vcpus {
            let theirs = share::published(other);
            all.steps = all.steps.min(theirs.steps);
            all.flags &= theirs.flags | !FLAG_FILLED;
            all.pages_written += theirs.pages_written;
            all.memory_checks += theirs.memory_checks;
            adopt_error(&mut all, &theirs);
            all.errors += theirs.errors;
        }
        all
    }

    /// Writes the record and lets the monitor take it.
    pub fn send(&mut self, now: u64) {
        self.report.number += 1;
        self.report.clock_ns = now;
        cpu::write_words(self.address, &self.of_all().to_words());
        cpu::barrier();
        cpu::out32(PORT_COMMAND, COMMAND_REPORT);
        self.report.gap_ns = 0;
        self.urgent = false;
    }

    /// Reports a failure of the first processor's program itself, from wherever it happened, as far as there is a
    /// record at all.
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
        cpu::out32(PORT_COMMAND, COMMAND_GIVE_UP);
    }
}

/// Takes over the facts of another processor's error where there are none yet; answers whether it did.
fn adopt_error(report: &mut Report, theirs: &Report) -> bool {
    let first = report.error_code == 0 && theirs.errors != 0;
    if first {
        report.error_code = theirs.error_code;
        report.error_where = theirs.error_where;
        report.error_expected = theirs.error_expected;
        report.error_found = theirs.error_found;
    }
    first
}
