//! The self-checking guest: a program without an operating system that proves, from inside a machine, that neither
//! its memory nor its disk nor its time was tampered with.
//!
//! ```text
//!  boot ─► read parameters ─► loop: ┬─ clock     every look: how long was I gone?
//!                                   ├─ memory    dirty what is due, check a few pages, report the first lie
//!                                   ├─ disk      scan once; then write, flush, report, read back
//!                                   └─ wait      in a port exit until the next step
//! ```
//!
//! Each processor goes round this loop with a part of the memory of its own. The first one has the disk too, and
//! reports for all: a step counts when every processor has made it, and an error is one whoever finds it.
//!
//! It runs at CPL3 with I/O privilege, identity-mapped, interrupts off. So it uses no privileged instruction, and it
//! tells time by the time stamp counter alone.
#![no_std]
#![no_main]

#[allow(dead_code)] // The other half of it is the monitor's.
mod abi;
mod clock;
mod cpu;
mod disk;
mod memory;
mod report;
mod share;
mod virtio;

use abi::{BOOT_PARAMS_WORDS, BootParams, ErrorCode, FLAG_NO_DISK, WAIT_US_MAX};
use clock::Clock;
use disk::Disk;
use memory::Memory;
use report::Reporter;

/// A report at least this often, so that the monitor's figures are fresh.
const REPORT_INTERVAL_NS: u64 = 100_000_000;
/// A gap this long is reported at once: the first thing a destination hears is how long the guest was away.
const GAP_REPORT_NS: u64 = 10_000_000;

/// Called by the entry code of each processor with the address of the parameter record and the processor's number.
fn run(params_address: u64, vcpu: u64) -> ! {
    let mut words = [0; BOOT_PARAMS_WORDS];
    cpu::read_words(params_address, &mut words);
    let Some(params) = BootParams::from_words(&words).filter(valid) else {
        // Without parameters there is no place for a report either: the monitor knows from the command alone.
        cpu::out32(abi::PORT_COMMAND, abi::COMMAND_GIVE_UP);
        stop()
    };
    if vcpu == 0 {
        share::start(cpu::tsc());
    }
    while share::started_at() == 0 {
        cpu::out32(abi::PORT_WAIT, params.step_us.clamp(1, u64::from(WAIT_US_MAX)) as u32);
    }
    let mut clock = Clock::new(vcpu, params.vcpus, share::started_at(), params.tsc_khz);
    let mut reporter = Reporter::new(params.report_address, vcpu, params.vcpus);
    let mut memory = Memory::new(&params, vcpu);
    let mut disk = (vcpu == 0 && params.disk_mmio != 0).then(|| Disk::new(&params));
    if params.disk_mmio == 0 {
        reporter.report.flags |= FLAG_NO_DISK;
    }
    let step_ns = params.step_us * 1000;
    let mut next_step = clock.now();
    let mut next_report = next_step;
    loop {
        let now = clock.look(&mut reporter);
        share::turn(vcpu);
        let busy = memory.work(now, now >= next_step, &mut clock, &mut reporter);
        if let Some(disk) = &mut disk {
            disk.work(now, &mut reporter);
            clock.look(&mut reporter);
        }
        if now >= next_step {
            if memory.filled() {
                reporter.report.steps += 1;
            }
            next_step = now + step_ns;
        }
        if vcpu == 0 {
            reporter.look_around(clock.now());
            if now >= next_report || reporter.urgent || reporter.report.gap_ns >= GAP_REPORT_NS {
                reporter.send(clock.now());
                next_report = now + REPORT_INTERVAL_NS;
            }
        } else {
            reporter.publish();
        }
        let now = clock.look(&mut reporter);
        if !busy && now < next_step {
            let wait_us = (next_step - now) / 1000;
            cpu::out32(abi::PORT_WAIT, wait_us.clamp(1, u64::from(WAIT_US_MAX)) as u32);
        }
    }
}

fn valid(params: &BootParams) -> bool {
    params.tsc_khz != 0
        && params.range0_pages != 0
        && params.range0_pages + params.range1_pages < 1 << 31
        && params.step_us != 0
        && (1..=abi::VCPUS_MAX).contains(&params.vcpus)
        && params.range0_pages + params.range1_pages >= params.vcpus
        && params.report_address != 0
        && (1..=abi::BLOCKS_PER_FLUSH_MAX).contains(&params.blocks_per_flush)
        && (params.disk_mmio == 0 || params.disk_blocks > 4 * abi::BLOCKS_PER_FLUSH_MAX)
        && params.disk_blocks <= abi::DISK_BLOCKS_MAX
}

/// Waits for ever.
fn stop() -> ! {
    loop {
        cpu::out32(abi::PORT_WAIT, WAIT_US_MAX);
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let line = info.location().map_or(0, |place| u64::from(place.line()));
    match cpu::number() {
        0 => Reporter::last_words(ErrorCode::Panic, line),
        other => share::publish_panic(other, line),
    }
    stop()
}
