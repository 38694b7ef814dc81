//! The test device: reports as a guest makes them, waits, and the witness file.

use std::time::Instant;

use super::witness::{Loss, Witness, WitnessEvent, losses};
use super::*;
use crate::devices::testing::Bench;
use crate::guest::abi::{ErrorCode, FLAG_SCANNED};
use crate::guest::{REPORT_ADDRESS, record_bytes};

const COMMAND: u64 = 0;
const WAIT: u64 = (PORT_WAIT - PORT_COMMAND) as u64;
const EXIT: u64 = (PORT_EXIT - PORT_COMMAND) as u64;

fn send(bench: &Bench, device: &SelfCheck, report: &Report) {
    let bytes = record_bytes(&report.to_words());
    bench
        .context
        .memory
        .write_slice(&bytes, GuestAddress(REPORT_ADDRESS))
        .unwrap();
    bench.write(device, COMMAND, &COMMAND_REPORT.to_le_bytes());
}

fn report(life: u64, found: u64, flushed: u64) -> Report {
    Report {
        life,
        found_at_boot: found,
        flushed,
        flags: FLAG_SCANNED,
        ..Report::default()
    }
}

#[tokio::test]
async fn a_report_is_taken_and_the_longest_gap_is_kept_until_it_is_asked() {
    let bench = Bench::new();
    let device = SelfCheck::new(&bench.context, REPORT_ADDRESS, None);
    assert_eq!(device.report(), GuestReport::default());
    assert_eq!(device.report().found_at_boot(), None);
    for gap_ns in [3_000, 9_000, 5_000] {
        send(
            &bench,
            &device,
            &Report {
                gap_ns,
                gap_ever_ns: 9_000,
                steps: gap_ns,
                ..report(1, 40, 44)
            },
        );
    }
    let taken = device.report();
    assert_eq!(taken.last.unwrap().steps, 5_000);
    assert_eq!(
        (taken.found_at_boot(), taken.errors(), taken.error()),
        (Some(40), 0, None)
    );
    assert_eq!(device.take_longest_gap(), Duration::from_nanos(9_000));
    assert_eq!(device.take_longest_gap(), Duration::ZERO);
    assert_eq!(device.report().last.unwrap().gap_ever_ns, 9_000);
}

#[tokio::test]
async fn a_failed_check_and_a_damaged_record_are_errors() {
    let bench = Bench::new();
    let device = SelfCheck::new(&bench.context, REPORT_ADDRESS, None);
    bench.write(device.as_ref(), COMMAND, &COMMAND_REPORT.to_le_bytes());
    assert_eq!(device.report().errors(), 1);
    assert!(device.report().error().unwrap().contains("checksum"));
    let failed = Report {
        errors: 2,
        error_code: ErrorCode::PageStale as u64,
        error_where: 77,
        error_expected: 5,
        error_found: 4,
        ..report(1, 0, 0)
    };
    send(&bench, &device, &failed);
    assert_eq!(device.report().errors(), 3);
    assert_eq!(
        device.report().error().unwrap(),
        "page 77 of the working set holds generation 4, not 5"
    );
    for code in ErrorCode::ALL {
        let text = report::describe(&Report {
            error_code: code as u64,
            ..failed
        });
        assert!(!text.contains("unknown"), "{text}");
    }
    assert!(
        report::describe(&Report {
            error_code: 999,
            ..failed
        })
        .contains("unknown failure 999")
    );
}

#[tokio::test]
async fn the_witness_has_every_flush_and_every_boot_once() {
    let bench = Bench::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("witness");
    let device = SelfCheck::new(
        &bench.context,
        REPORT_ADDRESS,
        Some(Witness::open(path.clone()).unwrap()),
    );
    send(
        &bench,
        &device,
        &Report {
            life: 0,
            flags: 0,
            ..report(0, 0, 0)
        },
    );
    assert!(witness::read(&path).unwrap().is_empty());
    for flushed in [0, 8, 8, 12] {
        send(&bench, &device, &report(1, 8, flushed));
    }
    // The destination of a migration goes on in the same file and repeats nothing.
    let there = SelfCheck::new(
        &bench.context,
        REPORT_ADDRESS,
        Some(Witness::open(path.clone()).unwrap()),
    );
    there.restore(1, &device.save().unwrap()).unwrap();
    assert_eq!(there.report(), device.report());
    send(&bench, &there, &report(1, 8, 12));
    send(&bench, &there, &report(1, 8, 16));
    // A failover: a fresh device, a guest that found everything.
    let again = SelfCheck::new(
        &bench.context,
        REPORT_ADDRESS,
        Some(Witness::open(path.clone()).unwrap()),
    );
    send(&bench, &again, &report(2, 16, 0));
    let events = witness::read(&path).unwrap();
    assert_eq!(
        events,
        [
            WitnessEvent::Found { number: 8, life: 1 },
            WitnessEvent::Flushed { number: 8, life: 1 },
            WitnessEvent::Flushed {
                number: 12,
                life: 1
            },
            WitnessEvent::Flushed {
                number: 16,
                life: 1
            },
            WitnessEvent::Found {
                number: 16,
                life: 2
            },
        ]
    );
    assert_eq!(losses(&events), []);
}

#[test]
fn a_boot_that_finds_less_than_was_flushed_is_a_loss() {
    let flushed = |number| WitnessEvent::Flushed { number, life: 1 };
    let found = |number| WitnessEvent::Found { number, life: 2 };
    assert_eq!(
        losses(&[found(0), flushed(4), found(4), flushed(8), found(9)]),
        []
    );
    assert_eq!(
        losses(&[flushed(8), found(7), found(7), flushed(9), found(3)]),
        [
            Loss {
                found: 7,
                flushed: 8
            },
            Loss {
                found: 3,
                flushed: 9
            }
        ]
    );
}

#[tokio::test]
async fn a_witness_that_cannot_be_written_is_told() {
    let bench = Bench::new();
    let path = std::path::PathBuf::from("/dev/full");
    let device = SelfCheck::new(
        &bench.context,
        REPORT_ADDRESS,
        Some(Witness::open(path).unwrap()),
    );
    send(&bench, &device, &report(1, 0, 4));
    assert!(device.report().error().unwrap().contains("/dev/full"));
}

#[test]
fn a_file_that_is_no_witness_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("witness");
    for text in [
        "flushed x life 1\n",
        "flushed 1\n",
        "lost 1 life 1\n",
        "\n",
        "flushed 1 life 1 more\n",
    ] {
        std::fs::write(&path, text).unwrap();
        assert!(witness::read(&path).is_err(), "{text:?}");
    }
}

#[tokio::test]
async fn a_wait_lasts_as_asked_unless_something_happens() {
    let bench = Bench::new();
    let device = SelfCheck::new(&bench.context, REPORT_ADDRESS, None);
    let begun = Instant::now();
    bench.write(device.as_ref(), WAIT, &20_000u32.to_le_bytes());
    assert!(begun.elapsed() >= Duration::from_millis(20));
    bench.context.wake.wake_all();
    let begun = Instant::now();
    bench.write(device.as_ref(), WAIT, &u32::MAX.to_le_bytes());
    assert!(begun.elapsed() < Duration::from_millis(100));
}

#[tokio::test]
async fn a_guest_that_ends_or_gives_up_is_told() {
    let mut bench = Bench::new();
    let device = SelfCheck::new(&bench.context, REPORT_ADDRESS, None);
    bench.write(device.as_ref(), EXIT, &0u32.to_le_bytes());
    assert_eq!(bench.events.try_recv(), Ok(MachineEvent::ShutDown));
    bench.write(device.as_ref(), EXIT, &7u32.to_le_bytes());
    assert_eq!(
        bench.events.try_recv(),
        Ok(MachineEvent::Failed("the guest ended with code 7".into()))
    );
    bench.write(device.as_ref(), COMMAND, &COMMAND_GIVE_UP.to_le_bytes());
    assert!(
        matches!(bench.events.try_recv(), Ok(MachineEvent::Failed(why)) if why.contains("gave up"))
    );
    for (offset, data) in [
        (COMMAND, vec![9, 0, 0, 0]),
        (EXIT, vec![0]),
        (3, vec![0; 4]),
        (1 << 40, vec![0; 4]),
    ] {
        bench.write(device.as_ref(), offset, &data);
    }
    assert!(bench.events.try_recv().is_err());
}
