//! What the processors of the guest say to each other.
//!
//! ```text
//!  SHARES  a page for each processor, which it alone writes: its figures, its first error, the time it has seen
//!  TURNS   one count that all of them raise; each keeps its own share of it in its page
//! ```
//!
//! The first processor gathers the pages for the report. The one count is there because several processors write its
//! page at once: where a copier loses one of these writes, the count falls behind the sum of what they did.

use crate::abi::{ErrorCode, PAGE_WORDS, Report, VCPUS_MAX};
use crate::cpu;

/// The page of one processor; its words are numbered below.
#[repr(align(4096))]
#[allow(dead_code)] // Used by address.
struct Page([u64; PAGE_WORDS]);

static mut SHARES: [Page; VCPUS_MAX as usize] = [const { Page([0; PAGE_WORDS]) }; VCPUS_MAX as usize];
static mut TURNS: Page = Page([0; PAGE_WORDS]);

const FIGURES: usize = 0; // Five words.
const ERRORS: usize = 8; // Five words, the count last.
const TURNS_OF_ONE: usize = 16;
const SEEN_NS: usize = 24;
const GAP_NS: usize = 25;
const STARTED_AT: usize = 32;

fn place(vcpu: u64, word: usize) -> u64 {
    &raw const SHARES as u64 + (vcpu * PAGE_WORDS as u64 + word as u64) * 8
}

/// The counter's value at the start of the guest: 0 until the first processor has set it.
pub fn started_at() -> u64 {
    cpu::read(place(0, STARTED_AT))
}

/// Sets it.
pub fn start(counter: u64) {
    cpu::write(place(0, STARTED_AT), counter.max(1));
}

/// Tells what time `vcpu` has seen, and how long after its look before.
pub fn saw(vcpu: u64, now_ns: u64, gap_ns: u64) {
    cpu::write(place(vcpu, SEEN_NS), now_ns);
    if gap_ns > cpu::read(place(vcpu, GAP_NS)) {
        cpu::raise(place(vcpu, GAP_NS), gap_ns);
    }
}

/// The latest time that any of them has seen.
pub fn latest_ns(vcpus: u64) -> u64 {
    (0..vcpus).map(|vcpu| cpu::read(place(vcpu, SEEN_NS))).fold(0, u64::max)
}

/// The longest gap of `vcpu` since this was asked last.
pub fn take_gap_ns(vcpu: u64) -> u64 {
    cpu::take(place(vcpu, GAP_NS))
}

/// Counts a turn of `vcpu`: in its own page first, then in the common count.
pub fn turn(vcpu: u64) {
    let own: u64 = cpu::read(place(vcpu, TURNS_OF_ONE));
    cpu::write(place(vcpu, TURNS_OF_ONE), own + 1);
    cpu::add(&raw const TURNS as u64, 1);
}

/// The sum of all turns and the common count where they contradict each other.
///
/// Whoever counts a turn is between the two writes for a moment, so the sum is ahead of the count, by one for each
/// processor at most.
pub fn turns_differ(vcpus: u64) -> Option<(u64, u64)> {
    let before: u64 = cpu::read(&raw const TURNS as u64);
    cpu::barrier();
    let sum = (0..vcpus).map(|vcpu| cpu::read::<u64>(place(vcpu, TURNS_OF_ONE))).sum::<u64>();
    cpu::barrier();
    let after: u64 = cpu::read(&raw const TURNS as u64);
    if before > sum {
        Some((sum, before))
    } else if after + vcpus < sum {
        Some((sum, after))
    } else {
        None
    }
}

/// Shows the others what `report` says of `vcpu`. Its errors are counted last: who sees the count sees the rest.
pub fn publish(vcpu: u64, report: &Report) {
    let figures = [report.flags, report.steps, report.pages_written, report.memory_checks, report.gap_ever_ns];
    cpu::write_words(place(vcpu, FIGURES), &figures);
    if report.errors != cpu::read(place(vcpu, ERRORS + 4)) {
        let error = [report.error_code, report.error_where, report.error_expected, report.error_found];
        cpu::write_words(place(vcpu, ERRORS), &error);
        cpu::barrier();
        cpu::write(place(vcpu, ERRORS + 4), report.errors);
    }
}

/// The program of `vcpu` itself failed, at that line.
pub fn publish_panic(vcpu: u64, line: u64) {
    cpu::write_words(place(vcpu, ERRORS), &[ErrorCode::Panic as u64, line, 0, 0]);
    cpu::barrier();
    cpu::write(place(vcpu, ERRORS + 4), 1u64);
}

/// What `vcpu` has published.
pub fn published(vcpu: u64) -> Report {
    let errors = cpu::read(place(vcpu, ERRORS + 4));
    cpu::barrier();
    let mut error = [0; 4];
    cpu::read_words(place(vcpu, ERRORS), &mut error);
    let mut figures = [0; 5];
    cpu::read_words(place(vcpu, FIGURES), &mut figures);
    let [flags, steps, pages_written, memory_checks, gap_ever_ns] = figures;
    let [error_code, error_where, error_expected, error_found] = error;
    Report {
        flags,
        steps,
        pages_written,
        memory_checks,
        gap_ever_ns,
        errors,
        error_code,
        error_where,
        error_expected,
        error_found,
        ..Report::default()
    }
}
