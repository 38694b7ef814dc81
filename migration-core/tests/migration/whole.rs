//! Migrations that succeed, are cancelled, are given up, or are refused by one side.

use crate::fake::{Fake, Guest};
use crate::rig::{Attempt, Cut, Outcome, network};
use migration_core::{
    Policy, ReceiveError, ReceiveStage, Region, SendError, SendStage, TcpAcceptor, TcpConnector,
};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;

/// An attempt over TCP on this host.
async fn over_tcp(channels: u16) -> Attempt {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = vec![listener.local_addr().unwrap()];
    Attempt::new(
        Arc::new(TcpConnector { addresses }),
        Arc::new(TcpAcceptor { listener }),
        channels,
    )
}

fn in_process(channels: u16) -> Attempt {
    let (caller, port, _) = network(0, Cut::Never);
    Attempt::new(caller, port, channels)
}

fn assert_moved(outcome: &Outcome, source: &Fake, sink: &Fake) {
    let sent = outcome.source.as_ref().expect("sent");
    let received = outcome.destination.as_ref().expect("received");
    assert_eq!(source.difference(sink), None);
    assert!(!source.is_running(), "the engine resumes nothing");
    assert!(source.quiet.load(SeqCst) && sent.status.said_quiet);
    assert!(!source.logging.load(SeqCst));
    let expected = (0..300_000).map(|n| n as u8).collect::<Vec<_>>();
    assert_eq!(sink.loaded.lock().unwrap().as_ref(), Some(&expected));
    assert_eq!(sent.status.stage, SendStage::Complete);
    assert_eq!(received.status.stage, ReceiveStage::Complete);
    assert_eq!(
        sent.status.pages,
        received.status.pages + received.status.zero_pages
    );
    assert_eq!(sent.status.zero_pages, received.status.zero_pages);
    assert_eq!(sent.status.remaining_bytes, 0);
    assert!(!sent.status.why_stopped_copying.is_empty());
    let rounds = &sent.status.rounds;
    assert_eq!(rounds[0].pages, 1300 + 2999);
    assert_eq!(
        rounds.iter().map(|r| r.pages).sum::<u64>(),
        sent.status.pages
    );
    let t = sent.status.timings;
    assert!(0 < t.started_ns && t.started_ns < t.vcpus_stopped_ns);
    assert!(t.vcpus_stopped_ns <= t.quiet_ns && t.quiet_ns <= t.final_sent_ns);
    assert!(t.final_sent_ns <= t.complete_ns);
    let r = &received.status;
    assert!(t.quiet_ns <= r.quiet_received_ns && r.quiet_received_ns <= r.complete_ns);
    assert_eq!(r.source_timings.vcpus_stopped_ns, t.vcpus_stopped_ns);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_equal_after_a_move_of_a_machine_that_keeps_writing() {
    for channels in [1, 2, 3, 4] {
        let (source, sink) = (Fake::filled(u64::from(channels)), Fake::new());
        let guest = Guest::start(&source, 200, Duration::from_micros(300));
        let outcome = over_tcp(channels).await.run(&source, &sink).await;
        assert_moved(&outcome, &source, &sink);
        let written = guest.writes.load(SeqCst);
        assert!(written > 0, "the guest ran meanwhile");
        // What drain and save touch is two pages; the rest was dirtied by the guest.
        let again: u64 = outcome.source_status.rounds[1..]
            .iter()
            .map(|r| r.pages)
            .sum();
        assert!(
            again > 2,
            "{again} pages were sent again, {written} written"
        );
    }
}

#[tokio::test]
async fn one_thread_is_enough_for_both_sides() {
    let (source, sink) = (Fake::filled(5), Fake::new());
    let _guest = Guest::start(&source, 100, Duration::from_micros(500));
    let outcome = in_process(2).run(&source, &sink).await;
    assert_moved(&outcome, &source, &sink);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zero_pages_are_named_and_not_sent() {
    let (source, sink) = (Fake::new(), Fake::new());
    source.guest_write(1, 1500, 3, 9);
    let outcome = in_process(1).run(&source, &sink).await;
    assert_moved(&outcome, &source, &sink);
    let bulk = outcome.source_status.rounds[0];
    assert_eq!(bulk.zero_pages, bulk.pages - 1);
    assert!(bulk.bytes < 10_000, "{} bytes for one page", bulk.bytes);
    assert_eq!(
        sink.zeroed_pages.load(SeqCst),
        0,
        "fresh memory was not touched"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_before_quiet_leaves_the_machine_running() {
    let (source, sink) = (Fake::filled(2), Fake::new());
    let guest = Guest::start(&source, 4000, Duration::from_micros(100));
    let mut attempt = in_process(2);
    // Slow enough that the cancel comes in the middle of the copy.
    attempt.send_options.bandwidth_max_bytes_s = 8 << 20;
    let cancel = attempt.cancel.clone();
    let mut status = attempt.source_status.subscribe();
    let cancelling = tokio::spawn(async move {
        status.wait_for(|status| status.pages > 500).await.unwrap();
        cancel.cancel();
        Instant::now()
    });
    let outcome = attempt.run(&source, &sink).await;
    let took = cancelling.await.unwrap().elapsed();
    let failed = outcome.source.unwrap_err();
    assert!(matches!(failed.cause, SendError::Cancelled), "{failed}");
    assert!(!failed.said_quiet && !failed.machine_stopped);
    assert!(source.is_running() && !source.logging.load(SeqCst) && !source.quiet.load(SeqCst));
    let before = guest.writes.load(SeqCst);
    let deadline = Instant::now() + Duration::from_secs(10);
    while guest.writes.load(SeqCst) == before {
        assert!(Instant::now() < deadline, "the guest stands still");
        tokio::task::yield_now().await;
    }
    assert!(
        matches!(&outcome.destination, Err(ReceiveError::Source(why)) if why == "cancelled"),
        "{:?}",
        outcome.destination
    );
    assert!(sink.loaded.lock().unwrap().is_none());
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_migration_after_an_aborted_one_moves_everything() {
    let source = Fake::filled(3);
    let _guest = Guest::start(&source, 300, Duration::from_micros(300));
    for pages in [1, 800, 4000] {
        let mut attempt = in_process(2);
        attempt.send_options.bandwidth_max_bytes_s = 30 << 20;
        let cancel = attempt.cancel.clone();
        let mut status = attempt.source_status.subscribe();
        tokio::spawn(async move {
            if status
                .wait_for(|status| status.pages >= pages)
                .await
                .is_ok()
            {
                cancel.cancel();
            }
        });
        let outcome = attempt.run(&source, &Fake::new()).await;
        assert!(!outcome.source.unwrap_err().said_quiet);
    }
    let sink = Fake::new();
    let outcome = in_process(2).run(&source, &sink).await;
    assert_moved(&outcome, &source, &sink);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_cannot_say_quiet_any_more_has_promised_nothing() {
    let (source, sink) = (Fake::filled(5), Fake::new());
    source.goes_on.store(true, SeqCst);
    let attempt = in_process(1);
    let status = attempt.source_status.subscribe();
    let outcome = attempt.run(&source, &sink).await;
    let failed = outcome.source.unwrap_err();
    assert!(
        !failed.said_quiet && !status.borrow().said_quiet,
        "{failed}"
    );
    assert!(source.is_running() && !source.logging.load(SeqCst));
    assert_eq!(outcome.destination_status.quiet_received_ns, 0);
    assert!(
        matches!(&outcome.destination, Err(ReceiveError::Source(why)) if why.contains("goes on")),
        "{:?}",
        outcome.destination
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_sent_after_a_failure_past_quiet_arrives_whole() {
    let source = Fake::filled(13);
    let refusing = Fake::new();
    refusing.refuse_to_load.store(true, SeqCst);
    let outcome = in_process(1).run(&source, &refusing).await;
    assert!(outcome.source.unwrap_err().said_quiet);
    // The log said abort, the monitor was re-keyed, the machine runs and writes again.
    source.resume();
    source.guest_write(0, 1000, 0, 0x5eed);
    source.quiet.store(false, SeqCst);
    let sink = Fake::new();
    let outcome = in_process(1).run(&source, &sink).await;
    assert_moved(&outcome, &source, &sink);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_with_other_memory_is_refused_and_the_source_learns_why() {
    let source = Fake::filled(4);
    let sink = Fake::with(vec![Region {
        guest_address: 0,
        pages: 1300,
    }]);
    let outcome = in_process(2).run(&source, &sink).await;
    assert!(matches!(outcome.destination, Err(ReceiveError::Regions(_))));
    let failed = outcome.source.unwrap_err();
    assert!(
        matches!(&failed.cause, SendError::Destination(why) if why.contains("2 regions there")),
        "{failed}"
    );
    assert!(!failed.said_quiet && source.is_running());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_state_that_does_not_load_is_never_complete() {
    let (source, sink) = (Fake::filled(4), Fake::new());
    sink.refuse_to_load.store(true, SeqCst);
    let outcome = in_process(1).run(&source, &sink).await;
    assert!(matches!(
        outcome.destination,
        Err(ReceiveError::Host { .. })
    ));
    assert_eq!(outcome.destination_status.stage, ReceiveStage::Failed);
    assert_eq!(outcome.destination_status.complete_ns, 0);
    let failed = outcome.source.unwrap_err();
    assert!(failed.said_quiet && !source.is_running());
    assert!(
        failed.to_string().contains("interrupt controller"),
        "{failed}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_does_not_converge_is_given_up_with_the_reason() {
    let (source, sink) = (Fake::filled(6), Fake::new());
    let _guest = Guest::start(&source, 3000, Duration::from_micros(50));
    let mut attempt = in_process(1);
    attempt.send_options.bandwidth_max_bytes_s = 24 << 20;
    attempt.send_options.policy = Policy {
        downtime_max_ms: 30,
        rounds_max: 4,
        ..Policy::default()
    };
    let outcome = attempt.run(&source, &sink).await;
    let failed = outcome.source.unwrap_err();
    let SendError::GaveUp(why) = &failed.cause else {
        panic!("{failed}")
    };
    assert_eq!(why.rounds, 4);
    assert!(why.predicted_blackout_us > 30_000, "{why}");
    assert!(!failed.said_quiet && !failed.machine_stopped && source.is_running());
    assert!(!source.logging.load(SeqCst));
    assert!(
        matches!(&outcome.destination, Err(ReceiveError::Source(why)) if why.contains("converge"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_guest_moves_by_stop_and_copy_when_that_is_allowed() {
    let (source, sink) = (Fake::filled(6), Fake::new());
    let _guest = Guest::start(&source, 3000, Duration::from_micros(50));
    let mut attempt = in_process(1);
    attempt.send_options.bandwidth_max_bytes_s = 6 << 20;
    // The last pages take longer than either side's bound of the hand-over: only a standstill ends it.
    attempt.send_options.final_timeout = Duration::from_secs(1);
    attempt.receive_options.final_timeout = Duration::from_secs(1);
    attempt.send_options.policy = Policy {
        downtime_max_ms: 30,
        rounds_max: 2,
        stop_and_copy: true,
        ..Policy::default()
    };
    let outcome = attempt.run(&source, &sink).await;
    assert_moved(&outcome, &source, &sink);
    assert!(
        outcome
            .source_status
            .why_stopped_copying
            .contains("stop-and-copy")
    );
    assert_eq!(outcome.source_status.rounds.len(), 3);
    let t = outcome.source_status.timings;
    assert!(
        t.final_sent_ns - t.quiet_ns > 1_200_000_000,
        "the last pages took too short a time to tell"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cap_on_bandwidth_is_honoured() {
    let (source, sink) = (Fake::filled(7), Fake::new());
    let mut attempt = in_process(2);
    let cap = 20 << 20;
    attempt.send_options.bandwidth_max_bytes_s = cap;
    let began = Instant::now();
    let outcome = attempt.run(&source, &sink).await;
    let seconds = began.elapsed().as_secs_f64();
    assert_moved(&outcome, &source, &sink);
    let sent = outcome.source_status.sent_bytes as f64;
    assert!(sent > 8e6, "{sent}");
    // 20 ms of burst, and the last frame of each channel is paid for after it is sent.
    let allowed = cap as f64 * (seconds + 0.1) + 1e6;
    assert!(sent <= allowed, "{sent} bytes in {seconds} s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_whose_devices_still_write_is_not_sent() {
    let (source, sink) = (Fake::filled(8), Fake::new());
    source.never_still.store(true, SeqCst);
    let outcome = in_process(1).run(&source, &sink).await;
    let failed = outcome.source.unwrap_err();
    assert!(
        matches!(failed.cause, SendError::StillChanging { pages: 1 }),
        "{failed}"
    );
    assert!(failed.said_quiet && sink.loaded.lock().unwrap().is_none());
    assert!(outcome.destination.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_destination_can_cancel_and_the_source_runs_on() {
    let (source, sink) = (Fake::filled(9), Fake::new());
    let mut attempt = in_process(1);
    attempt.send_options.bandwidth_max_bytes_s = 8 << 20;
    let cancel = attempt.cancel_receive.clone();
    let mut status = attempt.destination_status.subscribe();
    tokio::spawn(async move {
        if status.wait_for(|status| status.pages > 300).await.is_ok() {
            cancel.cancel();
        }
    });
    let outcome = attempt.run(&source, &sink).await;
    assert!(matches!(outcome.destination, Err(ReceiveError::Cancelled)));
    let failed = outcome.source.unwrap_err();
    assert!(
        matches!(&failed.cause, SendError::Destination(why) if why == "cancelled"),
        "{failed}"
    );
    assert!(!failed.said_quiet && source.is_running() && !source.logging.load(SeqCst));
}
