//! Numbered, checksummed blocks on the disk, in a ring: written, flushed, reported, read back, for ever.
//!
//! ```text
//!  Scan ──► Flush ──► Idle ──► Write ──► Flush ──► Check ──┐
//!            (what was found)   ▲                          │
//!                               └──────────────────────────┘
//! ```
//!
//! Block `n` lies in slot `(n − 1) mod blocks`. It carries its number, the machine, the life of its writer and the
//! highest number that the writer knew to be flushed. So a guest that boots and is told nothing can say from the disk
//! alone up to where it is whole, and which blocks must be there because a later one says they were flushed.

use crate::abi::{
    BlockContents, BootParams, DISK_BLOCKS_MAX, ErrorCode, FLAG_SCANNED, PATTERN_STEP, block_slot,
    make_block, mix, number_in_slot, read_block,
};
use crate::cpu;
use crate::report::Reporter;
use crate::virtio::{Ask, BUFFER_PAGES, BlockDevice, REQUESTS};

/// Blocks read back after each flush; half in turn, half at random.
const CHECKS: usize = 8;
/// In the scan's table: a block that is neither empty nor whole.
const DAMAGED: u64 = u64::MAX;

/// What the scan found in each slot: the number, 0 or [`DAMAGED`].
static mut FOUND: [u64; DISK_BLOCKS_MAX as usize] = [0; DISK_BLOCKS_MAX as usize];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Scan { next_slot: u64 },
    Idle,
    Write,
    Flush,
    Check,
    Unusable,
}

/// The disk and where work on it stands.
pub struct Disk {
    device: Option<BlockDevice>,
    phase: Phase,
    vm_id: u64,
    registers: u64,
    blocks: u64,
    per_flush: u64,
    interval_ns: u64,
    next_round: u64,
    /// The slot of each request in flight.
    slots: [Option<u64>; REQUESTS],
    /// The highest number whose write was completed; all before it too.
    written: u64,
    flushed: u64,
    life: u64,
    /// The highest number written by an earlier life.
    inherited: u64,
    /// An earlier life may have written numbers up to this one, in any order, torn or not at all.
    uncertain: u64,
    highest_found: u64,
    flushed_found: u64,
    next_check: u64,
    random: u64,
}

impl Disk {
    /// The disk of the parameters, not yet scanned.
    pub fn new(params: &BootParams) -> Self {
        Self {
            device: None,
            phase: Phase::Scan { next_slot: 0 },
            vm_id: params.vm_id,
            registers: params.disk_mmio,
            blocks: params.disk_blocks,
            per_flush: params.blocks_per_flush,
            interval_ns: params.flush_interval_us * 1000,
            next_round: 0,
            slots: [None; REQUESTS],
            written: 0,
            flushed: 0,
            life: 0,
            inherited: 0,
            uncertain: 0,
            highest_found: 0,
            flushed_found: 0,
            next_check: 0,
            random: params.vm_id,
        }
    }

    /// Takes what was completed and goes on as far as it can without waiting.
    pub fn work(&mut self, now: u64, reporter: &mut Reporter) {
        if self.phase == Phase::Unusable {
            return;
        }
        let mut device = match self.device.take() {
            Some(device) => device,
            None => match BlockDevice::start(self.registers, self.blocks) {
                Ok(device) => device,
                Err(found) => {
                    reporter.fail(ErrorCode::DiskUnusable, self.registers, self.blocks, found);
                    self.phase = Phase::Unusable;
                    return;
                }
            },
        };
        let mut failed = false;
        while let Some((request, status)) = device.completed() {
            let Some(slot) = self.slots[request].take() else {
                continue;
            };
            if status != 0 {
                reporter.fail(ErrorCode::DiskRequestFailed, slot, 0, u64::from(status));
                failed = true;
                continue;
            }
            match self.phase {
                Phase::Scan { .. } => self.note_scanned(request, slot),
                Phase::Check => self.check(request, slot, reporter),
                _ => {}
            }
        }
        if let Phase::Scan { next_slot } = self.phase {
            // More reads as soon as one is done.
            let next_slot = self.scan_on(next_slot, &mut device);
            self.phase = Phase::Scan { next_slot };
        }
        if self.slots.iter().all(Option::is_none) {
            self.advance(now, failed, &mut device, reporter);
        }
        self.device = Some(device);
    }

    /// Nothing is in flight: on to the next phase. What failed is tried again: a write, from the same number on.
    fn advance(&mut self, now: u64, failed: bool, device: &mut BlockDevice, reporter: &mut Reporter) {
        match self.phase {
            Phase::Scan { .. } => {
                self.judge_scan(reporter);
                self.flush(device);
            }
            Phase::Write if failed => self.write(device),
            Phase::Flush if failed => self.flush(device),
            Phase::Write => {
                self.written += self.per_flush;
                self.flush(device);
            }
            Phase::Flush => {
                self.flushed = self.written;
                reporter.report.flushed = self.flushed;
                reporter.urgent = true;
                self.read_back(device);
            }
            Phase::Check => self.phase = Phase::Idle,
            Phase::Idle if now >= self.next_round => {
                self.next_round = now + self.interval_ns;
                self.write(device);
            }
            Phase::Idle | Phase::Unusable => {}
        }
    }

    fn write(&mut self, device: &mut BlockDevice) {
        self.phase = Phase::Write;
        for request in 0..self.per_flush as usize {
            let number = self.written + 1 + request as u64;
            let slot = block_slot(number, self.blocks);
            let words = cpu::page(BlockDevice::buffer(request));
            make_block(words, self.vm_id, number, self.life, self.flushed);
            device.submit(request, Ask::Write, slot, 1);
            self.slots[request] = Some(slot);
        }
        device.notify();
    }

    fn flush(&mut self, device: &mut BlockDevice) {
        self.phase = Phase::Flush;
        device.submit(0, Ask::Flush, 0, 0);
        self.slots[0] = Some(0);
        device.notify();
    }

    fn read_back(&mut self, device: &mut BlockDevice) {
        self.phase = Phase::Check;
        for request in 0..CHECKS {
            let slot = if request % 2 == 0 {
                self.next_check = (self.next_check + 1) % self.blocks;
                self.next_check
            } else {
                self.random = mix(self.random.wrapping_add(PATTERN_STEP));
                self.random % self.blocks.min(self.written.max(1))
            };
            let expected = number_in_slot(slot, self.written, self.blocks);
            if expected == 0 || next_in_slot(slot, expected, self.blocks) <= self.uncertain {
                continue; // Never written, or perhaps overwritten before a crash: nothing is known of it.
            }
            device.submit(request, Ask::Read, slot, 1);
            self.slots[request] = Some(slot);
        }
        device.notify();
    }

    fn check(&mut self, request: usize, slot: u64, reporter: &mut Reporter) {
        reporter.report.disk_checks += 1;
        let expected = number_in_slot(slot, self.written, self.blocks);
        match read_block(cpu::page(BlockDevice::buffer(request)), self.vm_id) {
            BlockContents::Whole { number, life, .. } => {
                // A number written in this life bears it; an inherited one bears an earlier one.
                let life_right = if number > self.inherited { life == self.life } else { life < self.life };
                if number != expected || !life_right {
                    reporter.fail(ErrorCode::BlockStale, slot, expected, number);
                }
            }
            BlockContents::Empty => reporter.fail(ErrorCode::BlockStale, slot, expected, 0),
            BlockContents::Damaged(number) => reporter.fail(ErrorCode::BlockDamaged, slot, expected, number),
        }
    }

    fn scan_on(&mut self, mut next_slot: u64, device: &mut BlockDevice) -> u64 {
        let before = next_slot;
        for request in 0..REQUESTS {
            if self.slots[request].is_none() && next_slot < self.blocks {
                let count = BUFFER_PAGES.min(self.blocks - next_slot);
                device.submit(request, Ask::Read, next_slot, count);
                self.slots[request] = Some(next_slot);
                next_slot += count;
            }
        }
        if next_slot != before {
            device.notify();
        }
        next_slot
    }

    fn note_scanned(&mut self, request: usize, first_slot: u64) {
        for index in 0..BUFFER_PAGES.min(self.blocks - first_slot) {
            let slot = first_slot + index;
            let words = cpu::page(BlockDevice::buffer(request) + index * crate::abi::PAGE_BYTES);
            let number = match read_block(words, self.vm_id) {
                BlockContents::Empty => 0,
                BlockContents::Whole { number, life, flushed } if block_slot(number, self.blocks) == slot => {
                    self.highest_found = self.highest_found.max(number);
                    self.flushed_found = self.flushed_found.max(flushed);
                    self.life = self.life.max(life);
                    number
                }
                BlockContents::Whole { .. } | BlockContents::Damaged(_) => DAMAGED,
            };
            set_found(slot, number);
        }
    }

    /// The disk was read: what is on it, and is everything there that some block says was flushed?
    ///
    /// Blocks after the last flush may be there or not, in any order, and may be torn. The flushed number in the
    /// blocks lags the true one by one round at most, so such a block's number is within two rounds of it.
    fn judge_scan(&mut self, reporter: &mut Reporter) {
        let unflushed_max = self.flushed_found + 2 * self.per_flush;
        for slot in 0..self.blocks {
            let found = found(slot);
            let needed = number_in_slot(slot, self.flushed_found, self.blocks);
            let next = next_in_slot(slot, needed, self.blocks);
            if found == DAMAGED {
                if next > unflushed_max {
                    reporter.fail(ErrorCode::BlockDamaged, slot, needed, 0);
                }
            } else if found < needed {
                reporter.fail(ErrorCode::BlockLost, slot, needed, found);
            } else if found > unflushed_max {
                reporter.fail(ErrorCode::BlockLost, slot, unflushed_max, found);
            }
        }
        let mut whole = self.flushed_found;
        while found(block_slot(whole + 1, self.blocks)) == whole + 1 {
            whole += 1;
        }
        self.written = whole;
        self.inherited = whole;
        self.uncertain = unflushed_max;
        self.life += 1;
        let report = &mut reporter.report;
        report.found_at_boot = whole;
        report.highest_at_boot = self.highest_found;
        report.life = self.life;
        report.flags |= FLAG_SCANNED;
        reporter.urgent = true;
    }
}

/// The number that comes into `slot` after `number` (0: none yet).
fn next_in_slot(slot: u64, number: u64, blocks: u64) -> u64 {
    if number == 0 { slot + 1 } else { number + blocks }
}

fn found(slot: u64) -> u64 {
    cpu::read(&raw const FOUND as u64 + 8 * slot)
}

fn set_found(slot: u64, number: u64) {
    cpu::write(&raw const FOUND as u64 + 8 * slot, number);
}
