//! Monitors as processes: permits, leases, migration of the self-checking guest between two of them.

mod common;

use std::time::Duration;

use common::process::{LEASE, Process, incoming, machine_file};
use common::{kvm, late, margin};
use proto::monitor::{CancelMigrationRequest, Phase, QuitRequest, RunPermit, StopRequest};
use tonic::Code;
use vmm::clock;

macro_rules! needs_kvm {
    ($name:literal) => {
        if !kvm($name) {
            return;
        }
    };
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_refuses_every_permit_but_its_own() {
    needs_kvm!("a_monitor_refuses_every_permit_but_its_own");
    let directory = tempfile::tempdir().unwrap();
    let file = machine_file(directory.path(), 32, 10, 0);
    let mut monitor = Process::start(directory.path(), "a", &file, "").await;
    let good = monitor.permit(5, LEASE);
    let passed = clock::boottime_ns() - 1;
    for (wrong, code) in [
        (
            RunPermit {
                nonce: good.nonce ^ 2,
                ..good
            },
            Code::FailedPrecondition,
        ),
        (RunPermit { vm_id: 2, ..good }, Code::FailedPrecondition),
        (RunPermit { token: 4, ..good }, Code::PermissionDenied),
        (
            RunPermit {
                lease_deadline_ns: passed,
                ..good
            },
            Code::FailedPrecondition,
        ),
    ] {
        let refused = monitor.client.run(wrong).await.unwrap_err();
        assert_eq!(refused.code(), code, "{refused}");
        assert_eq!(monitor.status().await.phase(), Phase::Ready);
    }
    monitor.client.run(good).await.unwrap();
    let status = monitor
        .wait("reporting", |status| {
            status.guest.as_ref().is_some_and(|g| g.steps > 10)
        })
        .await;
    assert_eq!(status.phase(), Phase::Running);
    assert_eq!(status.guest.unwrap().error, "");
    // A newer token seen, even in a refused permit, makes the present one old.
    let newer = RunPermit { token: 6, ..good };
    assert_eq!(
        monitor.client.run(newer).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    assert_eq!(
        monitor.client.run(good).await.unwrap_err().code(),
        Code::PermissionDenied
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_runs_is_frozen_before_it_takes_up_a_newer_token() {
    needs_kvm!("a_machine_that_runs_is_frozen_before_it_takes_up_a_newer_token");
    let directory = tempfile::tempdir().unwrap();
    let file = machine_file(directory.path(), 64, 20, 8);
    let mut monitor = Process::start(directory.path(), "s", &file, "").await;
    monitor.run(5, LEASE).await.unwrap();
    let worked = |status: &proto::monitor::MonitorStatus, steps: u64| {
        status
            .guest
            .as_ref()
            .is_some_and(|guest| guest.steps > steps)
    };
    monitor.wait("working", |status| worked(status, 50)).await;
    monitor.rekey(7).await.unwrap();
    let status = monitor.status().await;
    assert_eq!((status.phase(), status.token), (Phase::Frozen, 7));
    let older = monitor.run(5, LEASE).await.unwrap_err();
    assert_eq!(older.code(), Code::PermissionDenied);
    monitor.run(7, LEASE).await.unwrap();
    let steps = monitor.status().await.guest.unwrap().steps;
    let status = monitor
        .wait("working again", |status| worked(status, steps + 100))
        .await;
    assert_eq!(status.guest.unwrap().error, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_is_moved_back_by_the_present_life_of_clusterd_and_not_on_again_by_an_earlier_one()
 {
    needs_kvm!(
        "a_deadline_is_moved_back_by_the_present_life_of_clusterd_and_not_on_again_by_an_earlier_one"
    );
    let directory = tempfile::tempdir().unwrap();
    let file = machine_file(directory.path(), 32, 10, 8);
    let mut monitor = Process::start(directory.path(), "a", &file, "").await;
    let long = LEASE * 2;
    monitor.run(5, long).await.unwrap();
    let given = monitor.status().await.lease_deadline_ns;
    monitor.shorten(7, LEASE).await.unwrap();
    let short = monitor.status().await.lease_deadline_ns;
    assert!(short < given, "{short} {given}");
    // A later deadline is no way to move it on.
    monitor.shorten(8, long).await.unwrap();
    assert_eq!(monitor.status().await.lease_deadline_ns, short);
    // What an earlier life still had on its way says nothing any more, of either kind.
    let refused = monitor.extend(5, long).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let refused = monitor.shorten(7, Duration::ZERO).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(monitor.status().await.lease_deadline_ns, short);
    // And it freezes by it, without being told.
    monitor
        .shorten(8, Duration::from_millis(300))
        .await
        .unwrap();
    monitor.wait_phase(Phase::Frozen).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lapsed_lease_freezes_the_guest_and_an_extension_does_not_thaw_it() {
    needs_kvm!("a_lapsed_lease_freezes_the_guest_and_an_extension_does_not_thaw_it");
    let directory = tempfile::tempdir().unwrap();
    let file = machine_file(directory.path(), 32, 10, 8);
    let mut monitor = Process::start(directory.path(), "a", &file, "").await;
    monitor.run(5, Duration::from_millis(800)).await.unwrap();
    assert_eq!(
        monitor
            .extend(5, Duration::from_millis(1500))
            .await
            .unwrap(),
        Phase::Running
    );
    let status = monitor.wait_phase(Phase::Frozen).await;
    let left_ns = monitor.spells().last().unwrap().left_ns;
    let late = late(left_ns, status.lease_deadline_ns);
    assert!(late < margin(), "frozen {late:?} after its deadline");
    assert_eq!(monitor.extend(5, LEASE).await.unwrap(), Phase::Frozen);
    let steps = monitor.status().await.guest.unwrap().steps;
    assert_eq!(
        monitor.extend(4, LEASE).await.unwrap_err().code(),
        Code::PermissionDenied
    );
    monitor.run(5, LEASE).await.unwrap();
    let status = monitor
        .wait("going on", |status| {
            status.guest.as_ref().is_some_and(|g| g.steps > steps + 10)
        })
        .await;
    assert_eq!(status.guest.unwrap().error, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_that_stood_still_past_its_deadline_does_not_enter_its_guest_again() {
    needs_kvm!("a_monitor_that_stood_still_past_its_deadline_does_not_enter_its_guest_again");
    let directory = tempfile::tempdir().unwrap();
    let file = machine_file(directory.path(), 32, 10, 8);
    let mut monitor = Process::start(directory.path(), "a", &file, "").await;
    for round in 0..10 {
        let before = monitor.spells().len();
        monitor.run(5, Duration::from_millis(500)).await.unwrap();
        while monitor.spells().len() == before {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let deadline_ns = monitor.status().await.lease_deadline_ns;
        monitor.signal(nix::sys::signal::Signal::SIGSTOP);
        while clock::boottime_ns() < deadline_ns + 50_000_000 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        monitor.signal(nix::sys::signal::Signal::SIGCONT);
        monitor.wait_phase(Phase::Frozen).await;
        let last = *monitor.spells().last().unwrap();
        let apart_ns = clock::boottime_ns().saturating_sub(clock::monotonic_ns());
        // Two clocks are read one after the other here.
        let allowed_ns = deadline_ns + 1_000_000;
        assert!(
            last.entered_ns + apart_ns < allowed_ns,
            "round {round}: entered {} us after its deadline",
            (last.entered_ns + apart_ns - deadline_ns) / 1_000
        );
    }
    monitor.run(5, LEASE).await.unwrap();
    let steps = monitor.status().await.guest.unwrap().steps;
    let status = monitor
        .wait("going on", |status| {
            status.guest.as_ref().is_some_and(|g| g.steps > steps + 10)
        })
        .await;
    assert_eq!(status.guest.unwrap().error, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_freeze_comes_by_the_hosts_own_clock_wherever_it_stands_and_steps() {
    needs_kvm!("a_freeze_comes_by_the_hosts_own_clock_wherever_it_stands_and_steps");
    const AHEAD: Duration = Duration::from_secs(300);
    let directory = tempfile::tempdir().unwrap();
    let shifts = directory.path().join("clock");
    proto::clock::write_shifts(&shifts, AHEAD.as_nanos() as i64, 0).unwrap();
    let file = machine_file(directory.path(), 32, 10, 0);
    let environment = [(proto::clock::VARIABLE, shifts.to_str().unwrap())];
    let mut monitor = Process::start_with(directory.path(), "a", &file, &environment).await;
    // A timer on the kernel's clock alone would be five minutes late.
    monitor
        .run(5, AHEAD + Duration::from_millis(500))
        .await
        .unwrap();
    monitor.wait_phase(Phase::Frozen).await;
    // And the clock may step under a timer that is set.
    monitor.run(5, AHEAD + LEASE).await.unwrap();
    proto::clock::write_shifts(&shifts, (AHEAD + LEASE).as_nanos() as i64, 0).unwrap();
    monitor.wait_phase(Phase::Frozen).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_flushes_and_a_quit_with_an_old_token_is_refused() {
    needs_kvm!("a_stop_flushes_and_a_quit_with_an_old_token_is_refused");
    let directory = tempfile::tempdir().unwrap();
    let file = machine_file(directory.path(), 32, 10, 8);
    let mut monitor = Process::start(directory.path(), "a", &file, "").await;
    monitor.run(5, LEASE).await.unwrap();
    let wanted = |status: &proto::monitor::MonitorStatus| {
        status.guest.as_ref().is_some_and(|g| g.flushed > 8)
    };
    monitor.wait("flushing", wanted).await;
    assert_eq!(
        monitor
            .client
            .stop(StopRequest {
                token: 4,
                force: false
            })
            .await
            .unwrap_err()
            .code(),
        Code::PermissionDenied
    );
    monitor
        .client
        .stop(StopRequest {
            token: 5,
            force: false,
        })
        .await
        .unwrap();
    let status = monitor.status().await;
    assert_eq!(status.phase(), Phase::Stopped);
    assert!(status.stop_asked && !status.undrained, "{status:?}");
    assert_eq!(
        monitor.run(5, LEASE).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    let quit = |token| QuitRequest {
        token,
        reason: "the test ends".into(),
    };
    assert_eq!(
        monitor.client.quit(quit(4)).await.unwrap_err().code(),
        Code::PermissionDenied
    );
    monitor.client.quit(quit(5)).await.unwrap();
    assert!(monitor.ended().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_stops_in_order_and_sighup_is_ignored() {
    needs_kvm!("sigterm_stops_in_order_and_sighup_is_ignored");
    let directory = tempfile::tempdir().unwrap();
    let file = machine_file(directory.path(), 32, 10, 8);
    let mut monitor = Process::start(directory.path(), "a", &file, "").await;
    monitor.run(5, LEASE).await.unwrap();
    monitor.signal(nix::sys::signal::Signal::SIGHUP);
    monitor
        .wait("running on", |status| {
            status.guest.as_ref().is_some_and(|g| g.steps > 5)
        })
        .await;
    monitor.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(monitor.ended().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_working_guest_moves_to_another_process_and_finds_its_memory_disk_and_time_whole() {
    needs_kvm!("a_working_guest_moves_to_another_process_and_finds_its_memory_disk_and_time_whole");
    moves_five_times(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_on_four_vcpus_moves_while_all_of_them_write() {
    needs_kvm!("a_guest_on_four_vcpus_moves_while_all_of_them_write");
    moves_five_times(4).await;
}

/// A machine that dirties 20 MiB/s on so many vCPUs, from monitor to monitor. A step of it is one of every vCPU.
async fn moves_five_times(vcpus: u32) {
    let directory = tempfile::tempdir().unwrap();
    let mut file = machine_file(directory.path(), 64, 20, 8);
    file["vcpus"] = vcpus.into();
    let mut source = Process::start(directory.path(), "m0", &file, "").await;
    source.run(5, LEASE).await.unwrap();
    source
        .wait("working", |status| {
            status
                .guest
                .as_ref()
                .is_some_and(|g| g.steps > 50 && g.flushed > 4)
        })
        .await;
    let mut token = 5;
    for id in 1..=5 {
        token += 1;
        let name = format!("m{id}");
        let mut destination =
            Process::start(directory.path(), &name, &incoming(&file, id, token), "").await;
        assert!(
            destination.run(token, LEASE).await.is_err(),
            "nothing has arrived yet"
        );
        source.send_to(id, &mut destination).await.unwrap();
        destination.wait_phase(Phase::Complete).await;
        let left = source.wait_phase(Phase::Quiet).await;
        assert!(left.said_quiet);
        // Its own token's permit, which it had, does not bring the source back.
        assert!(source.run(token - 1, LEASE).await.is_err());
        let running_ns = destination.run(token, LEASE).await.unwrap();
        let timings = left.migration.unwrap().timings.unwrap();
        let blackout_ms = running_ns.saturating_sub(timings.vcpus_stopped_ns) as f64 / 1e6;
        let before = left.guest.unwrap();
        let after = destination
            .wait("working again", |status| {
                status
                    .guest
                    .as_ref()
                    .is_some_and(|g| g.steps > before.steps + 200 && g.flushed > before.flushed)
            })
            .await
            .guest
            .unwrap();
        println!(
            "migration {id} of {vcpus} vCPUs: blackout {blackout_ms:.1} ms, guest's longest gap {} µs",
            after.longest_gap_ns / 1000
        );
        assert_eq!((after.errors, after.error.as_str()), (0, ""));
        assert!(after.memory_checks > before.memory_checks);
        source = destination;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_machine_that_arrived_is_sent_once_when_it_moves_on() {
    needs_kvm!("an_idle_machine_that_arrived_is_sent_once_when_it_moves_on");
    let directory = tempfile::tempdir().unwrap();
    let file = machine_file(directory.path(), 64, 0, 0);
    let mut source = Process::start(directory.path(), "m0", &file, "").await;
    source.run(5, LEASE).await.unwrap();
    let (mut token, mut checked) = (5, 0);
    for id in 1..=3 {
        // A page that the guest touches for the first time here counts as changed: it has been through all of them
        // (32 MiB) several times before it moves on.
        let status = source
            .wait("several rounds of checks", |status| {
                let guest = status.guest.as_ref();
                guest.is_some_and(|guest| guest.memory_checks > checked + 50_000)
            })
            .await;
        checked = status.guest.unwrap().memory_checks;
        token += 1;
        let name = format!("m{id}");
        let mut destination =
            Process::start(directory.path(), &name, &incoming(&file, id, token), "").await;
        source.send_to(id, &mut destination).await.unwrap();
        destination.wait_phase(Phase::Complete).await;
        let left = source.wait_phase(Phase::Quiet).await;
        let rounds = left.migration.unwrap().rounds;
        let (all, again) = (rounds[0].pages, rounds[0].dirty_pages_after);
        println!("move {id}: {again} of {all} pages again");
        assert!(again < all / 8, "move {id}: {again} of {all} pages again");
        destination.run(token, LEASE).await.unwrap();
        source = destination;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_migration_costs_nothing_before_quiet_and_a_re_key_after() {
    needs_kvm!("a_cancelled_migration_costs_nothing_before_quiet_and_a_re_key_after");
    let directory = tempfile::tempdir().unwrap();
    let file = machine_file(directory.path(), 64, 20, 8);
    let mut source = Process::start(directory.path(), "s", &file, "").await;
    source.run(5, LEASE).await.unwrap();
    source
        .wait("working", |status| {
            status.guest.as_ref().is_some_and(|g| g.steps > 50)
        })
        .await;
    // The destination never says complete, and nobody runs it.
    let mut destination = Process::start(
        directory.path(),
        "d",
        &incoming(&file, 1, 6),
        "sink.before_complete=hang",
    )
    .await;
    source.send_to(1, &mut destination).await.unwrap();
    source.wait_phase(Phase::Quiet).await;
    let cancel = CancelMigrationRequest {
        migration_id: 1,
        reason: "the log says abort".into(),
    };
    let cancelled = source
        .client
        .cancel_migration(cancel)
        .await
        .unwrap()
        .into_inner();
    assert!(cancelled.said_quiet);
    assert_eq!(source.status().await.phase(), Phase::Quiet);
    assert!(source.run(5, LEASE).await.is_err(), "quiet is a promise");
    assert_eq!(source.extend(5, LEASE).await.unwrap(), Phase::Quiet);
    source.rekey(7).await.unwrap();
    assert_eq!(source.status().await.phase(), Phase::Quiet);
    assert_eq!(
        source.run(5, LEASE).await.unwrap_err().code(),
        Code::PermissionDenied
    );
    source.run(7, LEASE).await.unwrap();
    let steps = source.status().await.guest.unwrap().steps;
    let status = source
        .wait("working again", |s| {
            s.guest.as_ref().is_some_and(|g| g.steps > steps + 100)
        })
        .await;
    assert_eq!(status.guest.unwrap().error, "");
    assert!(!status.said_quiet);
    drop(destination);

    // A destination that dies before quiet: the guest never stops.
    let mut destination = Process::start(
        directory.path(),
        "e",
        &incoming(&file, 2, 8),
        "sink.setup=error",
    )
    .await;
    source.send_to(2, &mut destination).await.unwrap();
    let failed = |status: &proto::monitor::MonitorStatus| {
        status
            .migration
            .as_ref()
            .is_some_and(|m| m.migration_id == 2 && !m.failure.is_empty())
    };
    let status = source.wait("failing", failed).await;
    assert_eq!(status.phase(), Phase::Running);
    assert!(!status.said_quiet);
    assert_eq!(status.guest.unwrap().error, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_fails_before_quiet_goes_on_by_itself() {
    needs_kvm!("a_source_that_fails_before_quiet_goes_on_by_itself");
    let directory = tempfile::tempdir().unwrap();
    let file = machine_file(directory.path(), 64, 20, 8);
    let mut source =
        Process::start(directory.path(), "s", &file, "source.before_quiet=error").await;
    source.run(5, LEASE).await.unwrap();
    source
        .wait("working", |status| {
            status.guest.as_ref().is_some_and(|g| g.steps > 50)
        })
        .await;
    let mut destination = Process::start(directory.path(), "d", &incoming(&file, 1, 6), "").await;
    source.send_to(1, &mut destination).await.unwrap();
    let failed = |status: &proto::monitor::MonitorStatus| {
        status
            .migration
            .as_ref()
            .is_some_and(|m| m.failure.contains("source.before_quiet"))
            && status.phase() == Phase::Running
    };
    let steps = source.wait("failing", failed).await.guest.unwrap().steps;
    let status = source
        .wait("going on", |s| {
            s.guest.as_ref().is_some_and(|g| g.steps > steps + 50)
        })
        .await;
    assert_eq!(status.guest.unwrap().error, "");
    assert!(!status.said_quiet);
    destination.wait_phase(Phase::Failed).await;
}

/// What is left of a migration when one side is killed at a failpoint.
struct Killed {
    failpoint: &'static str,
    /// The source's phase, if it lives.
    source: Option<Phase>,
    /// The destination's phase, if it lives.
    destination: Option<Phase>,
}

#[tokio::test(flavor = "multi_thread")]
async fn whichever_side_dies_wherever_the_other_stands_as_the_design_says() {
    needs_kvm!("whichever_side_dies_wherever_the_other_stands_as_the_design_says");
    let cases = [
        Killed {
            failpoint: "source.setup",
            source: None,
            destination: Some(Phase::Incoming),
        },
        Killed {
            failpoint: "source.round",
            source: None,
            destination: Some(Phase::Failed),
        },
        Killed {
            failpoint: "source.before_quiet",
            source: None,
            destination: Some(Phase::Failed),
        },
        Killed {
            failpoint: "source.after_quiet",
            source: None,
            destination: Some(Phase::Failed),
        },
        Killed {
            failpoint: "source.after_final",
            source: None,
            destination: Some(Phase::Complete),
        },
        Killed {
            failpoint: "sink.round",
            source: Some(Phase::Running),
            destination: None,
        },
        Killed {
            failpoint: "sink.before_complete",
            source: Some(Phase::Quiet),
            destination: None,
        },
        Killed {
            failpoint: "sink.after_complete",
            source: Some(Phase::Quiet),
            destination: None,
        },
    ];
    for Killed {
        failpoint,
        source: source_phase,
        destination: destination_phase,
    } in cases
    {
        let directory = tempfile::tempdir().unwrap();
        let file = machine_file(directory.path(), 32, 20, 8);
        let points = format!("{failpoint}=kill");
        let (at_source, at_sink) = if failpoint.starts_with("source") {
            (points.as_str(), "")
        } else {
            ("", points.as_str())
        };
        let mut source = Process::start(directory.path(), "s", &file, at_source).await;
        source.run(5, LEASE).await.unwrap();
        source
            .wait("working", |status| {
                status.guest.as_ref().is_some_and(|g| g.steps > 20)
            })
            .await;
        let mut destination =
            Process::start(directory.path(), "d", &incoming(&file, 1, 6), at_sink).await;
        // A source that dies at once may not live to answer.
        let _ = source.send_to(1, &mut destination).await;
        match source_phase {
            None => assert!(!source.ended().await.success(), "{failpoint}"),
            Some(phase) => {
                assert!(!destination.ended().await.success(), "{failpoint}");
                let status = source.wait_phase(phase).await;
                assert_eq!(status.said_quiet, phase == Phase::Quiet, "{failpoint}");
                if phase == Phase::Running {
                    // All of the memory had been on its way, and the guest never stopped.
                    let status = source
                        .wait("failing", |status| {
                            let migration = status.migration.as_ref();
                            migration.is_some_and(|m| !m.failure.is_empty())
                        })
                        .await;
                    assert_eq!(status.phase(), Phase::Running, "{failpoint}");
                    assert!(!status.said_quiet, "{failpoint}");
                    let migration = status.migration.unwrap();
                    assert!(
                        migration.sent_bytes > 16 << 20,
                        "{failpoint}: {migration:?}"
                    );
                    let timings = migration.timings.unwrap();
                    assert_eq!(timings.vcpus_stopped_ns, 0, "{failpoint}");
                }
                if phase == Phase::Quiet {
                    // Without the log's word it stays so, whatever its lease and its permit say.
                    source.extend(5, LEASE).await.unwrap();
                    assert!(source.run(5, LEASE).await.is_err(), "{failpoint}");
                    source.rekey(7).await.unwrap();
                    source.run(7, LEASE).await.unwrap();
                    let on = |s: &proto::monitor::MonitorStatus| {
                        s.guest.as_ref().is_some_and(|g| {
                            g.steps > status.guest.as_ref().map_or(0, |g| g.steps) + 20
                        })
                    };
                    assert_eq!(
                        source.wait("going on", on).await.guest.unwrap().error,
                        "",
                        "{failpoint}"
                    );
                }
            }
        }
        if let Some(phase) = destination_phase {
            let status = destination.wait_phase(phase).await;
            assert_eq!(status.phase(), phase, "{failpoint}");
            if phase == Phase::Complete {
                // The machine survives the death of its source.
                destination.run(6, LEASE).await.unwrap();
                let steps = status.guest.map_or(0, |g| g.steps);
                let on = |s: &proto::monitor::MonitorStatus| {
                    s.guest.as_ref().is_some_and(|g| g.steps > steps + 20)
                };
                assert_eq!(
                    destination.wait("going on", on).await.guest.unwrap().error,
                    "",
                    "{failpoint}"
                );
            } else {
                assert!(destination.run(6, LEASE).await.is_err(), "{failpoint}");
            }
        }
    }
}
