//! One test for each rule of the agent.

use super::*;
use crate::command::{Command, ReleaseReason};
use crate::ids::Incarnation;
use crate::testing::World;

const S: NodeId = NodeId(1);
const D: NodeId = NodeId(2);

fn view(world: &World, me: NodeId, monitors: Vec<MonitorView>) -> NodeView {
    NodeView {
        me,
        incarnation: Incarnation(1),
        // By default this life is as old as the cluster.
        session_since: Some(LogIndex(6).min(world.state.applied)),
        lease_valid: true,
        monitors,
        ..NodeView::default()
    }
}

fn monitor(vm: VmId, token: Token, phase: MonitorPhase) -> MonitorView {
    MonitorView {
        vm,
        token,
        nonce: 77,
        phase,
        said_quiet: phase == MonitorPhase::Quiet,
        writes_unanswered: false,
        stop_asked: false,
        undrained: false,
        migration: None,
        failure: None,
        write_latency_p999_us: 0,
        lease_deadline_passed: false,
    }
}

fn part(id: MigrationId, side: Side) -> Option<MonitorMigration> {
    Some(MonitorMigration {
        id,
        side,
        quiet_received: false,
        failed: None,
    })
}

fn failed_part(id: MigrationId, side: Side) -> Option<MonitorMigration> {
    Some(MonitorMigration {
        failed: Some("link lost".into()),
        ..part(id, side).expect("a part")
    })
}

fn world() -> World {
    World::new(3, 4_096)
}

#[test]
fn a_fresh_grant_is_started_and_settles_as_its_record_says() {
    let mut world = world();
    let vm = world.create("a", 64);
    let token = world.start(vm, S);
    let start = |settle, token| vec![Act::Start { vm, token, settle }];
    assert_eq!(
        decide(&world.state, &view(&world, S, vec![])),
        start(false, token)
    );
    assert_eq!(decide(&world.state, &view(&world, D, vec![])), vec![]);
    world.lose(S);
    let token = world.start(vm, D);
    assert_eq!(
        decide(&world.state, &view(&world, D, vec![])),
        start(true, token)
    );
}

#[test]
fn a_grant_that_an_earlier_life_or_flow_may_have_begun_is_rekeyed_before_any_start() {
    let mut world = world();
    let vm = world.create("a", 64);
    let token = world.start(vm, S);
    let mut earlier = view(&world, S, vec![]);
    earlier.session_since = Some(world.state.applied);
    let mut begun = view(&world, S, vec![]);
    begun.begun.insert((vm, token));
    for view in [earlier, begun] {
        let acts = decide(&world.state, &view);
        assert!(
            matches!(acts[..], [Act::Rekey { settle: true, expects, .. }] if expects == token),
            "{acts:?}"
        );
    }
    // The re-keyed grant is fresh, and settles.
    let since = world.state.applied;
    let fresh = world.rekey(vm, true);
    let mut after = view(&world, S, vec![]);
    after.session_since = Some(since);
    after.begun.insert((vm, token));
    assert_eq!(
        decide(&world.state, &after),
        vec![Act::Start {
            vm,
            token: fresh,
            settle: true
        }]
    );
}

#[test]
fn a_machine_with_work_under_way_gets_no_second_flow() {
    let mut world = world();
    let vm = world.create("a", 64);
    world.start(vm, S);
    let mut busy = view(&world, S, vec![]);
    busy.flows.insert(vm, FlowKind::Start);
    assert_eq!(decide(&world.state, &busy), vec![]);
}

#[test]
fn a_start_that_failed_gives_the_machine_up_with_the_reason() {
    let mut world = world();
    let vm = world.create("a", 64);
    let token = world.start(vm, S);
    let mut after = view(&world, S, vec![]);
    after.begun.insert((vm, token));
    after.start_failures.insert((vm, token), "no kernel".into());
    assert_eq!(
        decide(&world.state, &after),
        vec![Act::Release {
            vm,
            expects: token,
            reason: ReleaseReason::StartFailed("no kernel".into())
        }]
    );
}

#[test]
fn an_activated_machine_without_monitor_is_given_up() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let acts = decide(&world.state, &view(&world, S, vec![]));
    assert!(
        matches!(
            &acts[..],
            [Act::Release {
                reason: ReleaseReason::MonitorEnded(_),
                ..
            }]
        ),
        "{acts:?}"
    );
    // It is asked to stop: no difference, it did not stop cleanly.
    world.desire(vm, Desired::Stopped);
    assert_eq!(decide(&world.state, &view(&world, S, vec![])), acts);
}

#[test]
fn a_monitor_that_is_not_the_owners_or_began_before_the_record_is_killed() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let old = world.token(vm);
    world.lose(S);
    let frozen = monitor(vm, old, MonitorPhase::Frozen);
    let killed = |acts: &[Act]| matches!(acts, [Act::Kill { token, .. }] if *token == old);
    assert!(killed(&decide(
        &world.state,
        &view(&world, S, vec![frozen.clone()])
    )));
    // Back on the same node: the old image is void all the same, and goes before the fresh boot.
    world.register(S, Incarnation(1), 4_096);
    world.start(vm, S);
    assert!(killed(&decide(
        &world.state,
        &view(&world, S, vec![frozen.clone()])
    )));
    // Even where the fresh grant was re-keyed since.
    world.rekey(vm, true);
    assert!(killed(&decide(
        &world.state,
        &view(&world, S, vec![frozen.clone()])
    )));
    // And with no registration yet, and no lease.
    let mut unregistered = view(&world, S, vec![frozen]);
    unregistered.session_since = None;
    unregistered.lease_valid = false;
    assert!(killed(&decide(&world.state, &unregistered)));
}

#[test]
fn a_source_whose_cutover_is_applied_is_void_for_ever_even_when_the_machine_comes_back() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let old = world.token(vm);
    let (first, _) = world.migrate(vm, D);
    let mut quiet = monitor(vm, old, MonitorPhase::Quiet);
    quiet.migration = part(first, Side::Source);
    world.cutover(first);
    let killed = |world: &World, monitors| {
        let acts = decide(&world.state, &view(world, S, monitors));
        assert!(
            matches!(acts[..], [Act::Kill { token, .. }] if token == old),
            "{acts:?}"
        );
    };
    killed(&world, vec![quiet.clone()]);
    world.activate(vm);
    // On its way back: the incoming monitor is not made beside it.
    let (back, _) = world.migrate(vm, S);
    killed(&world, vec![quiet.clone()]);
    world.cutover(back);
    killed(&world, vec![quiet.clone()]);
    world.activate(vm);
    world.rekey(vm, false);
    killed(&world, vec![quiet]);
}

#[test]
fn what_this_replica_has_not_applied_is_left_alone() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let ahead_of = |change: &dyn Fn(&mut MonitorView)| {
        let mut monitor = monitor(vm, world.token(vm), MonitorPhase::Running);
        change(&mut monitor);
        decide(&world.state, &view(&world, S, vec![monitor]))
    };
    let beyond = MigrationId(world.state.applied.0 + 5);
    assert_eq!(
        ahead_of(&|monitor| monitor.vm = VmId(beyond.0))
            .iter()
            .filter(|act| act.vm() != vm)
            .count(),
        0
    );
    assert_eq!(ahead_of(&|monitor| monitor.token = Token(900)), vec![]);
    assert_eq!(
        ahead_of(&|monitor| {
            monitor.phase = MonitorPhase::Incoming;
            monitor.migration = part(beyond, Side::Destination);
        }),
        vec![]
    );
}

#[test]
fn a_monitor_of_a_deleted_machine_is_killed() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let stray = monitor(vm, world.token(vm), MonitorPhase::Stopped);
    world.desire(vm, Desired::Stopped);
    world.done(Command::Release {
        vm,
        node: S,
        expects: world.token(vm),
        reason: ReleaseReason::Stopped,
    });
    world.done(Command::DeleteVm { vm });
    let acts = decide(&world.state, &view(&world, S, vec![stray]));
    assert!(matches!(acts[..], [Act::Kill { .. }]), "{acts:?}");
}

#[test]
fn a_frozen_monitor_thaws_under_an_unmoved_token_and_a_valid_lease() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let token = world.token(vm);
    let mut frozen = view(&world, S, vec![monitor(vm, token, MonitorPhase::Frozen)]);
    assert_eq!(
        decide(&world.state, &frozen),
        vec![Act::Thaw {
            vm,
            token,
            nonce: 77
        }]
    );
    frozen.lease_valid = false;
    assert_eq!(decide(&world.state, &frozen), vec![]);
}

#[test]
fn a_refused_monitor_is_rekeyed_and_settles_only_if_a_write_has_no_answer() {
    for unanswered in [false, true] {
        let mut world = world();
        let vm = world.running("a", 64, S);
        let token = world.token(vm);
        let mut refused = monitor(vm, token, MonitorPhase::Refused);
        refused.writes_unanswered = unanswered;
        let acts = decide(&world.state, &view(&world, S, vec![refused.clone()]));
        assert!(
            matches!(acts[..], [Act::Rekey { expects, settle, .. }] if expects == token && settle == unanswered),
            "{acts:?}"
        );
        let fresh = world.rekey(vm, unanswered);
        assert_eq!(
            decide(&world.state, &view(&world, S, vec![refused.clone()])),
            vec![Act::TakeUpToken {
                vm,
                token: fresh,
                settle: unanswered,
                nonce: 77
            }]
        );
        // The claim of the fresh token got no good answer: it is burnt.
        let mut burnt = view(&world, S, vec![refused]);
        burnt.begun.insert((vm, fresh));
        let acts = decide(&world.state, &burnt);
        assert!(
            matches!(acts[..], [Act::Rekey { expects, .. }] if expects == fresh),
            "{acts:?}"
        );
    }
}

#[test]
fn a_machine_that_is_to_stop_is_stopped_then_given_up_by_how_it_ended() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let token = world.token(vm);
    let with = |world: &World, phase| {
        decide(
            &world.state,
            &view(world, S, vec![monitor(vm, token, phase)]),
        )
    };
    assert_eq!(with(&world, MonitorPhase::Running), vec![]);
    assert_eq!(
        with(&world, MonitorPhase::Stopped),
        vec![Act::Release {
            vm,
            expects: token,
            reason: ReleaseReason::GuestShutDown
        }]
    );
    world.desire(vm, Desired::Stopped);
    assert_eq!(
        with(&world, MonitorPhase::Running),
        vec![Act::StopGuest {
            vm,
            token,
            forced: false
        }]
    );
    world.done(Command::SetDesired {
        vm,
        desired: Desired::Stopped,
        forced: true,
    });
    world.desire(vm, Desired::Stopped);
    assert_eq!(
        with(&world, MonitorPhase::Running),
        vec![Act::StopGuest {
            vm,
            token,
            forced: true
        }],
        "a gentler request does not take back a forced one"
    );
    assert_eq!(
        with(&world, MonitorPhase::Stopped),
        vec![Act::Release {
            vm,
            expects: token,
            reason: ReleaseReason::Stopped
        }]
    );
    let acts = with(&world, MonitorPhase::Failed);
    assert!(
        matches!(
            &acts[..],
            [
                Act::Kill { .. },
                Act::Release {
                    reason: ReleaseReason::MonitorEnded(_),
                    ..
                }
            ]
        ),
        "{acts:?}"
    );
}

#[test]
fn a_monitor_left_by_a_start_that_ended_is_killed_and_one_that_runs_is_reported() {
    let mut world = world();
    let vm = world.create("a", 64);
    let token = world.start(vm, S);
    let ready = decide(
        &world.state,
        &view(&world, S, vec![monitor(vm, token, MonitorPhase::Ready)]),
    );
    assert!(matches!(ready[..], [Act::Kill { .. }]), "{ready:?}");
    assert_eq!(
        decide(
            &world.state,
            &view(&world, S, vec![monitor(vm, token, MonitorPhase::Running)])
        ),
        vec![Act::Activated { vm, token }]
    );
}

#[test]
fn the_source_sends_once_and_reports_its_failure() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let token = world.token(vm);
    let (migration, _) = world.migrate(vm, D);
    let mut running = monitor(vm, token, MonitorPhase::Running);
    let with =
        |monitor: &MonitorView| decide(&world.state, &view(&world, S, vec![monitor.clone()]));
    assert_eq!(
        with(&running),
        vec![Act::Send {
            vm,
            migration,
            expects: token
        }]
    );
    running.migration = part(migration, Side::Source);
    assert_eq!(with(&running), vec![]);
    running.migration = failed_part(migration, Side::Source);
    for phase in [MonitorPhase::Running, MonitorPhase::Quiet] {
        running.phase = phase;
        running.said_quiet = phase == MonitorPhase::Quiet;
        let acts = with(&running);
        assert!(matches!(acts[..], [Act::ProposeAbort { .. }]), "{acts:?}");
    }
}

#[test]
fn an_abort_before_quiet_only_ends_the_sending() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let (migration, _) = world.migrate(vm, D);
    world.abort(migration);
    let mut running = monitor(vm, world.token(vm), MonitorPhase::Running);
    running.migration = part(migration, Side::Source);
    assert_eq!(
        decide(&world.state, &view(&world, S, vec![running.clone()])),
        vec![Act::CancelSend { vm, migration }]
    );
    running.migration = failed_part(migration, Side::Source);
    assert_eq!(
        decide(&world.state, &view(&world, S, vec![running])),
        vec![]
    );
}

#[test]
fn a_quiet_source_waits_for_the_log_and_never_thaws_under_the_token_it_had() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let token = world.token(vm);
    let (migration, reserved) = world.migrate(vm, D);
    for phase in [
        MonitorPhase::Quiet,
        MonitorPhase::Frozen,
        MonitorPhase::Refused,
    ] {
        let mut world = world.clone();
        let mut quiet = monitor(vm, token, phase);
        quiet.said_quiet = true;
        quiet.migration = part(migration, Side::Source);
        let with = |world: &World, monitor: &MonitorView| {
            decide(&world.state, &view(world, S, vec![monitor.clone()]))
        };
        assert_eq!(with(&world, &quiet), vec![], "{phase:?}");
        world.abort(migration);
        let acts = with(&world, &quiet);
        assert!(
            matches!(acts[..], [Act::Rekey { expects, settle: false, .. }] if expects == token),
            "{phase:?}: {acts:?}"
        );
        let fresh = world.rekey(vm, false);
        assert!(fresh > reserved);
        assert_eq!(
            with(&world, &quiet),
            vec![Act::TakeUpToken {
                vm,
                token: fresh,
                settle: false,
                nonce: 77
            }]
        );
        // Taken up, but the permit did not come through: confirm and permit again.
        quiet.token = fresh;
        let acts = with(&world, &quiet);
        match phase {
            MonitorPhase::Refused => assert!(matches!(acts[..], [Act::Rekey { .. }]), "{acts:?}"),
            _ => assert_eq!(
                acts,
                vec![Act::Thaw {
                    vm,
                    token: fresh,
                    nonce: 77
                }]
            ),
        }
    }
}

#[test]
fn a_rekey_from_before_the_abort_does_not_free_a_quiet_source() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let token = world.token(vm);
    let (migration, _) = world.migrate(vm, D);
    let between = world.rekey(vm, false);
    let mut quiet = monitor(vm, token, MonitorPhase::Quiet);
    quiet.migration = part(migration, Side::Source);
    world.abort(migration);
    for held in [token, between] {
        quiet.token = held;
        let acts = decide(&world.state, &view(&world, S, vec![quiet.clone()]));
        assert!(
            matches!(acts[..], [Act::Rekey { expects, .. }] if expects == between),
            "{acts:?}"
        );
    }
}

#[test]
fn the_destination_prepares_claims_at_quiet_and_cuts_over_when_complete_and_acknowledged() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let expects = world.token(vm);
    let (migration, reserved) = world.migrate(vm, D);
    let mut seen = view(&world, D, vec![]);
    let decided = |view: &NodeView| decide(&world.state, view);
    assert_eq!(
        decided(&seen),
        vec![Act::PrepareIncoming {
            vm,
            migration,
            reserved
        }]
    );
    seen.prepared.insert(migration);
    let mut incoming = monitor(vm, reserved, MonitorPhase::Incoming);
    incoming.migration = part(migration, Side::Destination);
    seen.monitors = vec![incoming.clone()];
    assert_eq!(decided(&seen), vec![]);
    incoming.migration.as_mut().expect("a part").quiet_received = true;
    seen.monitors = vec![incoming.clone()];
    assert_eq!(
        decided(&seen),
        vec![Act::ClaimForCutover {
            vm,
            migration,
            reserved
        }]
    );
    seen.begun.insert((vm, reserved));
    seen.claimed.insert((vm, reserved));
    assert_eq!(decided(&seen), vec![], "not complete yet");
    incoming.phase = MonitorPhase::Complete;
    seen.monitors = vec![incoming];
    assert_eq!(
        decided(&seen),
        vec![Act::ProposeCutover {
            vm,
            migration,
            expects,
            claimed: reserved
        }]
    );
    seen.lease_valid = false;
    assert_eq!(decided(&seen), vec![]);
}

#[test]
fn a_burnt_claim_is_renewed_twice_and_then_the_migration_aborts() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let (migration, mut reserved) = world.migrate(vm, D);
    let mut incoming = monitor(vm, reserved, MonitorPhase::Complete);
    incoming.migration = part(migration, Side::Destination);
    let mut seen = view(&world, D, vec![incoming]);
    for _ in 0..RENEWALS_MAX {
        assert_eq!(
            decide(&world.state, &seen),
            vec![Act::ClaimForCutover {
                vm,
                migration,
                reserved
            }]
        );
        seen.begun.insert((vm, reserved));
        assert_eq!(
            decide(&world.state, &seen),
            vec![Act::RenewToken {
                vm,
                migration,
                burnt: reserved
            }]
        );
        world.done(Command::RenewMigrationToken {
            migration,
            burnt: reserved,
        });
        match world.state.migrations[&migration].state {
            MigrationState::Active {
                reserved: renewed, ..
            } => {
                assert!(renewed > reserved);
                reserved = renewed;
            }
            _ => panic!("not under way"),
        }
    }
    seen.begun.insert((vm, reserved));
    let acts = decide(&world.state, &seen);
    assert!(matches!(acts[..], [Act::ProposeAbort { .. }]), "{acts:?}");
    // Another life of the destination's clusterd cannot know what the one before sent.
    seen.begun.clear();
    seen.session_since = Some(world.state.applied);
    let acts = decide(&world.state, &seen);
    assert!(matches!(acts[..], [Act::ProposeAbort { .. }]), "{acts:?}");
}

#[test]
fn a_destination_without_its_monitor_proposes_the_abort_and_an_abort_discards_the_image() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let (migration, reserved) = world.migrate(vm, D);
    let mut gone = view(&world, D, vec![]);
    gone.prepared.insert(migration);
    let mut failed = monitor(vm, reserved, MonitorPhase::Failed);
    failed.migration = part(migration, Side::Destination);
    let mut cut = monitor(vm, reserved, MonitorPhase::Incoming);
    cut.migration = failed_part(migration, Side::Destination);
    for seen in [
        gone,
        view(&world, D, vec![failed]),
        view(&world, D, vec![cut.clone()]),
    ] {
        let acts = decide(&world.state, &seen);
        assert!(matches!(acts[..], [Act::ProposeAbort { .. }]), "{acts:?}");
    }
    world.abort(migration);
    assert_eq!(
        decide(&world.state, &view(&world, D, vec![cut.clone()])),
        vec![Act::DiscardIncoming {
            vm,
            migration,
            nonce: 77
        }]
    );
    // One that never heard from its source does not know its migration, but bears its token.
    cut.migration = None;
    cut.phase = MonitorPhase::Ready;
    let acts = decide(&world.state, &view(&world, D, vec![cut]));
    assert!(matches!(acts[..], [Act::Kill { .. }]), "{acts:?}");
}

#[test]
fn after_the_cutover_a_complete_image_runs_and_a_lost_one_boots_anew_with_settle() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let (migration, reserved) = world.migrate(vm, D);
    let mut complete = monitor(vm, reserved, MonitorPhase::Complete);
    complete.migration = part(migration, Side::Destination);
    // Made for a token that was replaced since: the monitor learns the newer one from its permit.
    world.rekey(vm, false);
    world.cutover(migration);
    let token = world.token(vm);
    assert!(token > reserved);
    let mut seen = view(&world, D, vec![complete.clone()]);
    let run = vec![Act::RunAfterCutover {
        vm,
        token,
        migration,
        nonce: 77,
    }];
    assert_eq!(decide(&world.state, &seen), run);
    seen.session_since = Some(world.state.applied);
    assert_eq!(
        decide(&world.state, &seen),
        run,
        "a later life runs it, too"
    );
    seen.lease_valid = false;
    assert_eq!(decide(&world.state, &seen), vec![]);
    let acts = decide(&world.state, &view(&world, D, vec![]));
    assert!(
        matches!(acts[..], [Act::Rekey { settle: true, .. }]),
        "{acts:?}"
    );
    // Re-keyed with the image still there: it is taken up, not booted anew.
    let fresh = world.rekey(vm, false);
    assert_eq!(
        decide(&world.state, &view(&world, D, vec![complete.clone()])),
        vec![Act::TakeUpToken {
            vm,
            token: fresh,
            settle: false,
            nonce: 77
        }]
    );
    complete.token = fresh;
    complete.phase = MonitorPhase::Running;
    world.activate(vm);
    assert_eq!(
        decide(&world.state, &view(&world, D, vec![complete])),
        vec![Act::ReportMigration { vm, migration }]
    );
}

#[test]
fn a_stop_that_has_begun_is_finished_and_a_start_asked_for_meanwhile_stands() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let token = world.vm(vm).ownership.token;
    let told = |phase, undrained| MonitorView {
        stop_asked: true,
        undrained,
        ..monitor(vm, token, phase)
    };
    // Stop, and start again before the disks were drained: the record says that it should run.
    world.desire(vm, Desired::Stopped);
    world.desire(vm, Desired::Running);
    let seen = view(&world, S, vec![told(MonitorPhase::Running, false)]);
    let acts = decide(&world.state, &seen);
    assert!(matches!(acts[..], [Act::StopGuest { .. }]), "{acts:?}");

    let seen = view(&world, S, vec![told(MonitorPhase::Stopped, false)]);
    let acts = decide(&world.state, &seen);
    let [Act::Release { reason, .. }] = &acts[..] else {
        panic!("{acts:?}");
    };
    assert_eq!(*reason, ReleaseReason::Stopped);
    world.done(Command::Release {
        vm,
        node: S,
        expects: token,
        reason: reason.clone(),
    });
    assert_eq!(world.vm(vm).desired, Desired::Running);
    // Whether it was a gentle stop shows no more: its next start settles, a second longer.
    assert!(world.vm(vm).ownership.settle);
}

#[test]
fn a_machine_that_stopped_with_writes_under_way_has_its_next_owner_settle() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let token = world.vm(vm).ownership.token;
    for stop_asked in [false, true] {
        let stopped = MonitorView {
            stop_asked,
            undrained: true,
            ..monitor(vm, token, MonitorPhase::Stopped)
        };
        let acts = decide(&world.state, &view(&world, S, vec![stopped]));
        assert!(
            matches!(
                &acts[..],
                [Act::Release {
                    reason: ReleaseReason::MonitorEnded(_),
                    ..
                }]
            ),
            "{acts:?}"
        );
    }
}

#[test]
fn claims_that_fail_are_tried_ever_more_slowly_though_the_re_keys_between_them_succeed() {
    let mut world = world();
    let vm = world.create("a", 64);
    world.start(vm, S);
    let mut memory = Memory::default();
    let mut pauses = Vec::new();
    for _ in 0..4 {
        let sight = Sight {
            me: S,
            incarnation: Incarnation(1),
            session_since: Some(LogIndex(6)),
            lease_valid: true,
            ..Sight::default()
        };
        let [work] = &memory.look(&world.state, sight)[..] else {
            panic!("one act");
        };
        let claims = matches!(work.acts[..], [Act::Start { .. }]);
        if claims {
            pauses.push(work.failures);
        } else {
            world.rekey(vm, true);
        }
        memory.take_in(Ended {
            vm,
            nonces: Vec::new(),
            is_flow: true,
            failed: claims,
            learnt: Vec::new(),
        });
    }
    assert_eq!(pauses, [0, 1]);
}

#[test]
fn a_machine_whose_quiet_source_died_waits_for_its_destination() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let (migration, _) = world.migrate(vm, D);
    let mut seen = view(&world, S, vec![]);
    seen.quiet_lost.insert(migration);
    assert_eq!(decide(&world.state, &seen), vec![]);
    world.abort(migration);
    let acts = decide(&world.state, &seen);
    assert!(matches!(acts[..], [Act::Release { .. }]), "{acts:?}");
}

#[test]
fn a_source_whose_monitor_is_gone_starts_nothing_while_its_migration_is_open() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let (migration, _) = world.migrate(vm, D);
    // Re-keyed on the way; the entry that it runs under the fresh token was never committed.
    world.rekey(vm, false);
    let acts = decide(&world.state, &view(&world, S, vec![]));
    assert!(
        matches!(acts[..], [Act::ProposeAbort { migration: asked, .. }] if asked == migration),
        "{acts:?}"
    );
    world.abort(migration);
    let acts = decide(&world.state, &view(&world, S, vec![]));
    assert!(
        matches!(acts[..], [Act::Start { .. } | Act::Rekey { .. }]),
        "{acts:?}"
    );
}

#[test]
fn before_its_registration_is_applied_a_life_begins_nothing() {
    let mut world = world();
    let vm = world.create("a", 64);
    world.start(vm, S);
    let mut unregistered = view(&world, S, vec![]);
    unregistered.session_since = None;
    assert_eq!(decide(&world.state, &unregistered), vec![]);
    let mut other_host_life = view(&world, S, vec![]);
    other_host_life.incarnation = Incarnation(9);
    assert_eq!(decide(&world.state, &other_host_life), vec![]);
}

#[test]
fn nothing_that_lets_a_guest_run_is_decided_without_a_lease() {
    let mut world = world();
    let fresh = world.create("fresh", 64);
    world.start(fresh, S);
    let frozen = world.running("frozen", 64, S);
    let behind = world.running("behind", 64, S);
    let old = world.token(behind);
    world.rekey(behind, false);
    let mut seen = view(
        &world,
        S,
        vec![
            monitor(frozen, world.token(frozen), MonitorPhase::Frozen),
            monitor(behind, old, MonitorPhase::Refused),
        ],
    );
    assert_eq!(decide(&world.state, &seen).len(), 3);
    seen.lease_valid = false;
    assert_eq!(decide(&world.state, &seen), vec![]);
}

#[test]
fn a_permit_needs_the_owner_and_its_present_token() {
    let mut world = world();
    let vm = world.running("a", 64, S);
    let old = world.token(vm);
    assert_eq!(
        permit_allowed(&world.state, vm, S, old),
        Ok(world.vm(vm).ownership.since)
    );
    assert!(matches!(
        permit_allowed(&world.state, vm, D, old),
        Err(PermitRefusal::NotOwner { .. })
    ));
    let fresh = world.rekey(vm, false);
    assert_eq!(
        permit_allowed(&world.state, vm, S, old),
        Err(PermitRefusal::TokenMoved {
            vm,
            asked: old,
            token: fresh
        })
    );
    assert!(matches!(
        permit_allowed(&world.state, VmId(999), S, fresh),
        Err(PermitRefusal::Unknown { .. })
    ));
}
