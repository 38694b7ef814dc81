//! A processor's part of the working set: dirtied at a set rate, and every page compared, again and again, with the one generation that it
//! must hold now.
//!
//! What a page must hold follows from how many pages were ever written: one count, kept twice in two other pages.
//! So an older copy of a page is as wrong as a damaged one, and an older copy of the count contradicts its twin and
//! every page written since.

use crate::abi::{
    BootParams, DIRTY_UNLIMITED, ErrorCode, FLAG_FILLED, PAGE_BYTES, PAGE_WORDS, PATTERN_STEP, PageOrder, VCPUS_MAX,
    page_base, page_generation, part_of,
};
use crate::clock::Clock;
use crate::cpu;
use crate::report::Reporter;

/// Pages written between two looks at the clock: under dirty tracking a page costs 25 µs, so a look is due each 0.4 ms.
const SLICE_PAGES: u64 = 16;
/// Slices that one call writes at most: the disk and the report have their turn too.
const SLICES_MAX: u64 = 8;
/// Pages checked in turn in each step.
const CHECKS_IN_TURN: u64 = 64;
/// Pages checked at random in each step.
const CHECKS_AT_RANDOM: u64 = 8;
/// Time whose dirtying is made up for at most: after a blackout the guest goes on at its rate, without a burst.
const CATCH_UP_NS: u64 = 20_000_000;

/// A set rate above this is this rate: no processor writes faster, and the credit's arithmetic stays in range.
const DIRTY_MIB_S_MAX: u64 = 1_000_000;

/// A processor's count of pages written, on a page of its own.
#[repr(align(4096))]
#[allow(dead_code)] // Used by address.
struct Count([u64; PAGE_WORDS]);

static mut COUNT_FIRST: [Count; VCPUS_MAX as usize] = [const { Count([0; PAGE_WORDS]) }; VCPUS_MAX as usize];
static mut COUNT_SECOND: [Count; VCPUS_MAX as usize] = [const { Count([0; PAGE_WORDS]) }; VCPUS_MAX as usize];

/// A processor's part of the working set and where work on it stands. Its pages are numbered from 0, those of the
/// whole set, which patterns and reports name, from the first processor's on.
pub struct Memory {
    vm_id: u64,
    vcpu: u64,
    first_page: u64,
    range0_start: u64,
    range0_pages: u64,
    range1_start: u64,
    order: PageOrder,
    pages_per_s: u64,
    /// Nanosecond-pages of dirtying that are due.
    credit: u64,
    credited_at: u64,
    next_check: u64,
    random: u64,
}

impl Memory {
    /// The part of processor `vcpu` of the parameters' working set, not yet written.
    pub fn new(params: &BootParams, vcpu: u64) -> Self {
        let (first_page, pages) = part_of(params.range0_pages + params.range1_pages, params.vcpus, vcpu);
        let pages_per_s = params.dirty_mib_s.min(DIRTY_MIB_S_MAX) * ((1 << 20) / PAGE_BYTES);
        count_written(vcpu, 0);
        Self {
            vm_id: params.vm_id,
            vcpu,
            first_page,
            range0_start: params.range0_start,
            range0_pages: params.range0_pages,
            range1_start: params.range1_start,
            order: PageOrder::new(pages),
            pages_per_s: if params.dirty_mib_s == DIRTY_UNLIMITED {
                u64::MAX
            } else {
                part_of(pages_per_s, params.vcpus, vcpu).1
            },
            credit: 0,
            credited_at: 0,
            next_check: 0,
            random: (params.vm_id ^ PATTERN_STEP).wrapping_add(vcpu),
        }
    }

    /// Every page was written once.
    pub fn filled(&self) -> bool {
        self.written() >= self.order.pages()
    }

    /// Dirties what is due; checks pages when it is time for a step. True when more is due at once.
    pub fn work(&mut self, now: u64, step: bool, clock: &mut Clock, reporter: &mut Reporter) -> bool {
        self.check_count(reporter);
        let mut due = self.due(now);
        let busy = due > SLICE_PAGES * SLICES_MAX;
        due = due.min(SLICE_PAGES * SLICES_MAX);
        if self.filled() && self.pages_per_s != u64::MAX {
            self.credit -= due * 1_000_000_000;
        }
        while due > 0 {
            let slice = due.min(SLICE_PAGES);
            for _ in 0..slice {
                self.write_next(reporter);
            }
            due -= slice;
            clock.look(reporter);
        }
        if step {
            self.check_some(clock, reporter);
        }
        if self.filled() {
            reporter.report.flags |= FLAG_FILLED;
        }
        busy
    }

    /// Pages that should be written now. The first round goes as fast as it can.
    fn due(&mut self, now: u64) -> u64 {
        let elapsed = now.saturating_sub(self.credited_at).min(CATCH_UP_NS);
        self.credited_at = now;
        if !self.filled() || self.pages_per_s == u64::MAX {
            return SLICE_PAGES * SLICES_MAX + 1;
        }
        let credit_max = self.pages_per_s * CATCH_UP_NS + 1_000_000_000;
        self.credit = (self.credit + elapsed * self.pages_per_s).min(credit_max);
        self.credit / 1_000_000_000
    }

    fn write_next(&mut self, reporter: &mut Reporter) {
        let number = self.written();
        let page = self.order.page_of(number);
        // Looked at before it is overwritten: else a lie in it would never be told.
        self.check(page, reporter);
        let generation = self.order.generation(page, number) + 1;
        let mut value = page_base(self.vm_id, self.first_page + page, generation);
        for word in cpu::page(self.address(page)) {
            *word = value;
            value = value.wrapping_add(PATTERN_STEP);
        }
        count_written(self.vcpu, number + 1);
        reporter.report.pages_written = number + 1;
    }

    fn check_some(&mut self, clock: &mut Clock, reporter: &mut Reporter) {
        for _ in 0..CHECKS_IN_TURN.min(self.order.pages()) {
            self.check(self.next_check, reporter);
            self.next_check = (self.next_check + 1) % self.order.pages();
        }
        for _ in 0..CHECKS_AT_RANDOM {
            self.random = crate::abi::mix(self.random.wrapping_add(PATTERN_STEP));
            self.check(self.random % self.order.pages(), reporter);
        }
        clock.look(reporter);
    }

    fn check(&self, page: u64, reporter: &mut Reporter) {
        reporter.report.memory_checks += 1;
        let words = cpu::page(self.address(page));
        let generation = self.order.generation(page, self.written());
        let page = self.first_page + page; // As patterns and reports name it.
        if matches_generation(self.vm_id, page, generation, words) {
            return;
        }
        let found = page_generation(self.vm_id, page, words[0]);
        let found = if words[0] == 0 { 0 } else { found };
        if matches_generation(self.vm_id, page, found, words) {
            reporter.fail(ErrorCode::PageStale, page, generation, found);
            return;
        }
        let base = page_base(self.vm_id, page, generation);
        let expected = |index: usize| match generation {
            0 => 0,
            _ => base.wrapping_add(PATTERN_STEP.wrapping_mul(index as u64)),
        };
        let index = (0..PAGE_WORDS).find(|&index| words[index] != expected(index)).unwrap_or(0);
        reporter.fail(ErrorCode::PageDamaged, page, expected(index), words[index]);
    }

    fn check_count(&self, reporter: &mut Reporter) {
        let second = address_of_second(self.vcpu);
        let (twin, inverse): (u64, u64) = (cpu::read(second), cpu::read(second + 8));
        let written = self.written();
        if twin != written || inverse != !twin || twin != reporter.report.pages_written {
            reporter.fail(ErrorCode::CounterStale, self.vcpu, written, twin);
        }
    }

    fn written(&self) -> u64 {
        cpu::read(address_of_first(self.vcpu))
    }

    fn address(&self, page: u64) -> u64 {
        let page = self.first_page + page;
        if page < self.range0_pages {
            self.range0_start + page * PAGE_BYTES
        } else {
            self.range1_start + (page - self.range0_pages) * PAGE_BYTES
        }
    }
}

/// Whether a page holds exactly this generation, all 512 words.
fn matches_generation(vm_id: u64, page: u64, generation: u64, words: &[u64; PAGE_WORDS]) -> bool {
    if generation == 0 {
        return words.iter().fold(0, |sum, word| sum | word) == 0;
    }
    let mut value = page_base(vm_id, page, generation);
    let mut difference = 0;
    for word in words {
        difference |= word ^ value;
        value = value.wrapping_add(PATTERN_STEP);
    }
    difference == 0
}

fn address_of_first(vcpu: u64) -> u64 {
    &raw const COUNT_FIRST as u64 + vcpu * PAGE_BYTES
}

fn address_of_second(vcpu: u64) -> u64 {
    &raw const COUNT_SECOND as u64 + vcpu * PAGE_BYTES
}

fn count_written(vcpu: u64, count: u64) {
    cpu::write(address_of_first(vcpu), count);
    cpu::write(address_of_second(vcpu), count);
    cpu::write(address_of_second(vcpu) + 8, !count);
}
