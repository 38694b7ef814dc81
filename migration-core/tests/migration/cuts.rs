//! The connection is cut at every frame boundary, both ways: what each side may believe afterwards.

use crate::fake::Fake;
use crate::rig::{Attempt, Cut, Outcome, Record, frame_ends, network};
use migration_core::{ReceiveStage, SendError, SendStage};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const QUIET: u8 = 6;
const FINAL: u8 = 8;
const COMPLETE: u8 = 19;

/// What is noticed by a bound is noticed within so many times the bound, however busy this machine is. The other
/// bounds of a migration are ten seconds and more: none of them can have been what noticed it.
const LATE_MAX: u32 = 4;

struct Run {
    outcome: Outcome,
    source: Arc<Fake>,
    sink: Arc<Fake>,
    record: Arc<Mutex<Record>>,
    took: Duration,
}

/// A guest that does not write by itself, so that every run has the same frames.
async fn run(channels: u16, cut_channel: u16, cut: Cut) -> Run {
    let (source, sink) = (Fake::filled(11), Fake::new());
    let (caller, port, record) = network(cut_channel, cut);
    let mut attempt = Attempt::new(caller, port, channels);
    // Heartbeats would make the frames depend on time.
    for heartbeat in [
        &mut attempt.send_options.heartbeat,
        &mut attempt.receive_options.heartbeat,
    ] {
        *heartbeat = Duration::from_secs(20);
    }
    for bound in [
        &mut attempt.send_options.dead_after,
        &mut attempt.receive_options.dead_after,
    ] {
        *bound = Duration::from_secs(30);
    }
    // A cut may come before the source could show its ticket.
    attempt.receive_options.source_timeout = Duration::from_millis(500);
    attempt.receive_options.setup_timeout = Duration::from_millis(500);
    attempt.send_options.setup_timeout = Duration::from_millis(500);
    let began = Instant::now();
    let outcome = attempt.run(&source, &sink).await;
    Run {
        outcome,
        source,
        sink,
        record,
        took: began.elapsed(),
    }
}

/// What must hold of every run, cut or not.
fn check_promises(name: &str, run: &Run) {
    let Run {
        outcome,
        source,
        sink,
        ..
    } = run;
    let said_quiet = match &outcome.source {
        Ok(_) => true,
        Err(failed) => failed.said_quiet,
    };
    assert_eq!(
        source.quiet.load(SeqCst),
        said_quiet,
        "{name}: the monitor's own record"
    );
    assert_eq!(
        outcome.source_status.said_quiet, said_quiet,
        "{name}: the status"
    );
    if said_quiet {
        assert!(!source.is_running(), "{name}: runs after quiet");
    }
    if let Err(failed) = &outcome.source
        && !failed.machine_stopped
    {
        assert!(source.is_running(), "{name}: stopped, and not said");
    }
    assert!(
        !source.logging.load(SeqCst),
        "{name}: the dirty log is still on"
    );
    let quiet_received = outcome.destination_status.quiet_received_ns != 0;
    assert!(
        !quiet_received || said_quiet,
        "{name}: heard what was not said"
    );
    match &outcome.destination {
        Ok(received) => {
            assert!(quiet_received, "{name}");
            assert_eq!(received.status.stage, ReceiveStage::Complete);
            assert!(sink.loaded.lock().unwrap().is_some(), "{name}");
            assert_eq!(
                source.difference(sink),
                None,
                "{name}: complete but different"
            );
        }
        Err(error) => {
            assert!(
                sink.loaded.lock().unwrap().is_none(),
                "{name}: loaded, and failed: {error}"
            );
            assert!(outcome.source.is_err(), "{name}: sent, but {error}");
            assert_eq!(
                outcome.destination_status.stage,
                ReceiveStage::Failed,
                "{name}"
            );
        }
    }
    assert!(
        run.took < Duration::from_secs(10),
        "{name}: took {:?}",
        run.took
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_of_what_the_source_sends_has_the_promised_outcome_at_every_frame() {
    let whole = run(1, 0, Cut::Never).await;
    assert!(whole.outcome.source.is_ok());
    let ends = frame_ends(&whole.record.lock().unwrap().sent);
    let end_of = |kind| ends.iter().find(|(k, _)| *k == kind).unwrap().1;
    let before_quiet = ends
        .iter()
        .rev()
        .find(|(_, end)| *end < end_of(QUIET))
        .unwrap()
        .1;
    let (quiet_end, final_end) = (end_of(QUIET), end_of(FINAL));
    assert!(ends.len() > 20, "{} frames", ends.len());

    let mut cuts = vec![1, 31, quiet_end - 1, quiet_end + 1, final_end - 1];
    for (_, end) in &ends {
        cuts.extend([*end, end + 16]);
    }
    cuts.push(final_end + 1000);
    let mut finals = 0;
    for at in cuts {
        let name =
            format!("cut after {at} bytes (quiet ends at {quiet_end}, final at {final_end})");
        let done = run(1, 0, Cut::Sent(at)).await;
        check_promises(&name, &done);
        // The promise counts from the attempt, even where not one byte of it left.
        assert_eq!(
            done.outcome.source_status.said_quiet,
            at >= before_quiet,
            "{name}"
        );
        let heard = done.outcome.destination_status.quiet_received_ns != 0;
        assert_eq!(heard, at >= quiet_end, "{name}");
        // The pages after quiet come in one frame or in two, as saving the state falls before or
        // after the first look at the log: so what arrived is read off this run's own record.
        let sent = frame_ends(&done.record.lock().unwrap().sent);
        let all = sent.iter().any(|(kind, _)| *kind == FINAL);
        let (source, destination) = (&done.outcome.source, &done.outcome.destination);
        assert_eq!(destination.is_ok(), all, "{name}");
        assert_eq!(source.is_ok(), all, "{name}: {:?}", source.as_ref().err());
        finals += u32::from(all);
    }
    assert!(finals >= 1, "no run got as far as Final");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_of_what_the_destination_answers_has_the_promised_outcome_at_every_frame() {
    let whole = run(1, 0, Cut::Never).await;
    let ends = frame_ends(&whole.record.lock().unwrap().heard);
    let complete_end = ends.iter().find(|(kind, _)| *kind == COMPLETE).unwrap().1;
    for (_, end) in &ends {
        for at in [end - 1, *end] {
            let name = format!("cut after {at} bytes of answers (complete ends at {complete_end})");
            let done = run(1, 0, Cut::Heard(at)).await;
            check_promises(&name, &done);
            assert_eq!(done.outcome.source.is_ok(), at >= complete_end, "{name}");
            if let Err(failed) = &done.outcome.source {
                let timed_out = matches!(failed.cause, SendError::TimedOut { .. });
                let broken = matches!(failed.cause, SendError::Connection { .. });
                assert!(timed_out || broken, "{name}: {failed}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_of_a_second_channel_has_the_promised_outcome_at_every_frame() {
    let whole = run(3, 1, Cut::Never).await;
    assert!(whole.outcome.source.is_ok());
    let ends = frame_ends(&whole.record.lock().unwrap().sent);
    let all = ends.last().unwrap().1;
    for (_, at) in &ends {
        let name = format!("channel 1 cut after {at} of {all} bytes");
        let done = run(3, 1, Cut::Sent(*at)).await;
        check_promises(&name, &done);
        if *at < all {
            assert!(done.outcome.destination.is_err(), "{name}");
        }
    }
}

/// The destination is there and says nothing any more: its process is frozen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_destination_is_noticed_before_quiet_by_the_bound_of_setting_up() {
    let source = Fake::filled(12);
    let (caller, port, _record) = network(0, Cut::Never);
    let (status, _) = tokio::sync::watch::channel(Default::default());
    let frozen = tokio::spawn(async move {
        use migration_core::Acceptor;
        use tokio::io::AsyncReadExt;
        let mut stream = port.accept().await.unwrap().await.unwrap();
        let mut waste = [0; 32];
        stream.read_exact(&mut waste).await.unwrap();
        // Holds the connection open for as long as the test lasts.
        std::future::pending::<()>().await;
        drop(stream);
    });
    let options = migration_core::SendOptions {
        setup_timeout: Duration::from_millis(1500),
        // Silence is another bound, looked at below.
        dead_after: Duration::from_secs(60),
        ..Default::default()
    };
    let bound = options.setup_timeout;
    let began = Instant::now();
    let result = migration_core::send(
        caller,
        crate::rig::credentials(),
        Arc::clone(&source),
        options,
        status,
        Default::default(),
    )
    .await;
    let took = began.elapsed();
    frozen.abort();
    let failed = result.unwrap_err();
    assert!(!failed.said_quiet && source.is_running());
    let limit_ms = match failed.cause {
        // Until it has answered once, its silence is bounded by the time for setting up.
        SendError::TimedOut { limit_ms, .. } => limit_ms,
        SendError::PeerSilent { silent_ms, .. } => silent_ms,
        ref other => panic!("{other}"),
    };
    assert_eq!(u128::from(limit_ms), bound.as_millis());
    assert!(took < bound * LATE_MAX, "{took:?}");
}

/// A relay that stops passing anything on, both ways, once the copying is under way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_goes_silent_is_noticed_by_both_sides_by_their_bound_of_silence() {
    let (source, sink) = (Fake::filled(12), Fake::new());
    let (caller, port, _record) = network(0, Cut::Never);
    let stall = Arc::new(tokio::sync::Notify::new());
    let relay = Arc::new(crate::door::Relay {
        to: caller,
        stall: Arc::clone(&stall),
    });
    let mut attempt = Attempt::new(relay, port, 1);
    attempt.send_options.bandwidth_max_bytes_s = 4 << 20;
    let bound = attempt.send_options.dead_after;
    let mut status = attempt.source_status.subscribe();
    let stalling = tokio::spawn(async move {
        status.wait_for(|status| status.pages > 100).await.unwrap();
        stall.notify_waiters();
        Instant::now()
    });
    let outcome = attempt.run(&source, &sink).await;
    let took = stalling.await.unwrap().elapsed();
    let failed = outcome.source.unwrap_err();
    assert!(
        matches!(failed.cause, SendError::PeerSilent { .. }),
        "{failed}"
    );
    assert!(!failed.said_quiet && source.is_running());
    assert_eq!(outcome.source_status.stage, SendStage::Failed);
    assert!(outcome.destination.is_err());
    assert!(took < bound * LATE_MAX, "{took:?}");
}
