//! One test for each order of steps, and for what follows when a step fails.

use super::*;
use crate::agent::{FlowKind, MonitorMigration, Side};
use crate::command::ReleaseReason;
use crate::testing::World;

const S: NodeId = NodeId(1);
const D: NodeId = NodeId(2);
const MS: u64 = 1_000_000;

/// An executor that does what the test says, and notes the steps.
struct Bench {
    flow: Flow,
    seen: Seen,
    steps: Vec<String>,
    permit: Option<RunPermit>,
}

fn work(act: Act) -> Work {
    Work {
        vm: act.vm(),
        kind: act.flow_kind(),
        acts: vec![act],
        failures: 0,
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
        write_latency_p999_us: 0,
        stop_asked: false,
        undrained: false,
        migration: None,
        failure: None,
        lease_deadline_passed: false,
    }
}

impl Bench {
    fn new(world: &World, me: NodeId, act: Act) -> Bench {
        Bench::under(world, me, work(act), Safeguards::ALL)
    }

    fn under(world: &World, me: NodeId, work: Work, safeguards: Safeguards) -> Bench {
        let state = Arc::new(world.state.clone());
        Bench {
            seen: Seen {
                lease_deadline_ns: 5_000 * MS,
                state: state.clone(),
                monitors: Vec::new(),
                now_ns: 1_000 * MS,
            },
            flow: Flow::new(me, work, state, safeguards),
            steps: Vec::new(),
            permit: None,
        }
    }

    fn next(&mut self, answer: Answer) -> Next {
        self.seen.now_ns += MS;
        let next = self.flow.next(answer, &self.seen);
        match next {
            Next::Do(Step::Run(permit)) => {
                self.steps.push("run".into());
                self.permit = Some(permit);
                Next::Do(Step::EnsureBroker)
            }
            Next::Do(step) => {
                self.steps.push(name(&step));
                Next::Do(step)
            }
            over => over,
        }
    }

    /// Answers every step as `say` says, up to the end.
    fn run(&mut self, mut say: impl FnMut(&str, &Step, &mut Seen) -> Answer) -> Ended {
        let mut answer = Answer::Begin;
        for _ in 0..5_000 {
            match self.next(answer) {
                Next::Over { ended, .. } => return ended,
                Next::Do(step) => {
                    let last = self.steps.last().cloned().unwrap_or_default();
                    answer = say(&last, &step, &mut self.seen);
                }
            }
        }
        panic!("it does not end: {:?}", &self.steps[..20]);
    }
}

fn name(step: &Step) -> String {
    match step {
        Step::EnsureBroker => "broker".into(),
        Step::MakeDisks { .. } => "make disks".into(),
        Step::Propose(command) => match &**command {
            Command::Activated { .. } => "activated".into(),
            Command::DisksMade { .. } => "disks made".into(),
            Command::AbortMigration { .. } => "abort".into(),
            Command::Cutover { .. } => "cutover".into(),
            Command::Rekey { .. } => "propose re-key".into(),
            Command::Release { .. } => "release".into(),
            other => format!("{other:?}"),
        },
        Step::Claim { token, .. } => format!("claim {token}"),
        Step::Wait { ns, why } => format!("{why:?} {} ms", ns / MS),
        Step::VerifyAndCommit { .. } => "verify".into(),
        Step::Build { .. } => "build".into(),
        Step::Built => "built".into(),
        Step::Confirm => "confirm".into(),
        Step::Rekey { token, .. } => format!("re-key {token}"),
        Step::Run(_) => "run".into(),
        Step::End { .. } => "end".into(),
        Step::Stop { forced: false, .. } => "stop".into(),
        Step::Stop { forced: true, .. } => "stop by force".into(),
        Step::Refresh { .. } => "refresh".into(),
        Step::AskReady { .. } => "ask ready".into(),
        Step::Send { .. } => "send".into(),
        Step::CancelSend { .. } => "cancel send".into(),
        Step::Report { .. } => "report".into(),
    }
}

/// A machine with a disk that node `S` was granted after `D` was lost with it, so that it settles.
fn taken_over() -> (World, VmId, Token) {
    let mut world = World::new(3, 4_096);
    let vm = world.create("a", 64);
    world.start(vm, D);
    world.lose(D);
    let token = world.start(vm, S);
    (world, vm, token)
}

fn good(world: &World, vm: VmId, token: Token) -> impl FnMut(&str, &Step, &mut Seen) -> Answer {
    let state = Arc::new(world.state.clone());
    move |_, step, seen| match step {
        Step::Built => {
            let built = monitor(vm, token, MonitorPhase::Ready);
            seen.monitors = vec![built.clone()];
            Answer::Monitor(built)
        }
        Step::Rekey { token, .. } => {
            let mut rekeyed = seen.monitors[0].clone();
            rekeyed.token = *token;
            seen.monitors = vec![rekeyed.clone()];
            Answer::Monitor(rekeyed)
        }
        Step::Confirm => Answer::Confirmed(state.clone()),
        Step::AskReady { .. } => Answer::Ready(Ready::default()),
        _ => Answer::Done,
    }
}

#[test]
fn a_takeover_claims_settles_verifies_and_confirms_before_it_runs() {
    let (world, vm, token) = taken_over();
    let settle = true;
    let mut bench = Bench::new(&world, S, Act::Start { vm, token, settle });
    let ended = bench.run(good(&world, vm, token));
    assert!(!ended.failed && ended.learnt.is_empty());
    let claim = format!("claim {token}");
    let order: Vec<&str> = bench.steps.iter().map(String::as_str).collect();
    let position = |what: &str| {
        let at = order.iter().position(|step| step.starts_with(what));
        at.unwrap_or_else(|| panic!("no {what} in {order:?}"))
    };
    let must = [
        &claim[..],
        "Settle",
        "verify",
        "confirm",
        "run",
        "activated",
    ];
    assert!(
        must.windows(2)
            .all(|two| position(two[0]) < position(two[1])),
        "{order:?}"
    );
    assert!(
        position("build") < position(&claim),
        "the monitor is built meanwhile"
    );
    let permit = bench.permit.expect("a permit");
    assert_eq!(
        (permit.vm(), permit.token(), permit.nonce()),
        (vm, token, 77)
    );
}

#[test]
fn a_permit_lasts_no_longer_than_the_lease_that_was_held_before_the_log_was_read() {
    let (world, vm, token) = taken_over();
    let start = Act::Start {
        vm,
        token,
        settle: false,
    };
    let lapses = |safeguards| {
        let mut bench = Bench::under(&world, S, work(start.clone()), safeguards);
        let mut inner = good(&world, vm, token);
        let ended = bench.run(|last, step, seen| {
            // The answer takes long: by then the old lease is over, and a later one is held.
            if matches!(step, Step::Confirm) {
                seen.now_ns = 6_000 * MS;
                seen.lease_deadline_ns = 11_000 * MS;
            }
            inner(last, step, seen)
        });
        (ended.failed, bench.permit)
    };
    assert_eq!(lapses(Safeguards::ALL), (true, None));
    let (failed, permit) = lapses(Safeguards::without(Safeguard::LeaseOfTheConfirm));
    assert!(!failed && permit.is_some(), "the mutant would run it");
}

#[test]
fn a_claim_without_a_good_answer_ends_the_start_and_the_monitor_that_was_begun() {
    let (world, vm, token) = taken_over();
    let start = Act::Start {
        vm,
        token,
        settle: false,
    };
    for (kind, counts) in [
        (FailureKind::Burnt, false),
        (FailureKind::RefusedForGood, true),
    ] {
        let mut bench = Bench::new(&world, S, start.clone());
        let mut inner = good(&world, vm, token);
        let ended = bench.run(|last, step, seen| match step {
            Step::Claim { .. } => Answer::Failed(Failure::new(kind, "no")),
            _ => inner(last, step, seen),
        });
        let tail = &bench.steps[bench.steps.len() - 2..];
        assert_eq!(tail, ["built", "end"], "{:?}", bench.steps);
        assert!(ended.failed && bench.permit.is_none());
        let expected = vec![Learnt::StartFailed(vm, token, "no".into())];
        assert_eq!(ended.learnt, if counts { expected } else { Vec::new() });
    }
}

#[test]
fn a_log_that_does_not_answer_is_not_the_machines_fault_and_a_host_that_cannot_is() {
    let (world, vm, token) = taken_over();
    let start = Act::Start {
        vm,
        token,
        settle: false,
    };
    for (fails, kind, counts) in [
        ("confirm", FailureKind::Log, false),
        ("built", FailureKind::Host, true),
        ("verify", FailureKind::Host, true),
    ] {
        let start = match (&start, fails) {
            (Act::Start { vm, token, .. }, "verify") => Act::Start {
                vm: *vm,
                token: *token,
                settle: true,
            },
            (start, _) => start.clone(),
        };
        let mut bench = Bench::new(&world, S, start);
        let mut inner = good(&world, vm, token);
        let ended = bench.run(|last, step, seen| match last == fails {
            true => Answer::Failed(Failure::new(kind, "no")),
            false => inner(last, step, seen),
        });
        assert!(ended.failed, "{fails}");
        assert_eq!(!ended.learnt.is_empty(), counts, "{fails}");
    }
}

#[test]
fn a_token_is_told_to_a_monitor_only_after_the_log_says_that_it_is_current() {
    let (mut world, vm, token) = taken_over();
    let act = Act::TakeUpToken {
        vm,
        token,
        settle: false,
        nonce: 77,
    };
    let mut bench = Bench::new(&world, S, act);
    bench.seen.monitors = vec![monitor(vm, Token(1), MonitorPhase::Frozen)];
    // Meanwhile the node was lost, and the machine was given to another.
    world.lose(S);
    let ended = bench.run(good(&world, vm, token));
    assert!(ended.failed && bench.permit.is_none());
    assert!(
        !bench.steps.iter().any(|step| step.starts_with("re-key")),
        "{:?}",
        bench.steps
    );
}

#[test]
fn the_settle_time_covers_ten_times_the_slowest_writes_of_the_machine() {
    let (world, vm, token) = taken_over();
    let act = Act::TakeUpToken {
        vm,
        token,
        settle: true,
        nonce: 77,
    };
    let mut slow = monitor(vm, Token(1), MonitorPhase::Frozen);
    slow.write_latency_p999_us = 10_000_000;
    let mut bench = Bench::new(&world, S, act);
    bench.seen.monitors = vec![slow];
    bench.run(good(&world, vm, token));
    let settles = |step: &String| step.starts_with("Settle") && step.ends_with(" 100000 ms");
    assert!(bench.steps.iter().any(settles), "{:?}", bench.steps);
}

#[test]
fn a_frozen_machine_thaws_under_the_claim_that_it_ran_under_and_a_ready_one_does_not() {
    let (world, vm, token) = taken_over();
    let thaw = Act::Thaw {
        vm,
        token,
        nonce: 77,
    };
    for (phase, thaws) in [(MonitorPhase::Frozen, true), (MonitorPhase::Ready, false)] {
        let mut bench = Bench::new(&world, S, thaw.clone());
        bench.seen.monitors = vec![monitor(vm, token, phase)];
        let ended = bench.run(good(&world, vm, token));
        assert_eq!((ended.failed, bench.permit.is_some()), (!thaws, thaws));
    }
}

#[test]
fn a_re_key_is_not_asked_for_a_machine_that_runs_again_by_now() {
    let (world, vm, token) = taken_over();
    let rekey = Act::Rekey {
        vm,
        expects: token,
        settle: false,
        reason: "refused".into(),
    };
    for (phase, asks) in [
        (MonitorPhase::Running, false),
        (MonitorPhase::Refused, true),
    ] {
        let mut bench = Bench::new(&world, S, rekey.clone());
        bench.seen.monitors = vec![monitor(vm, token, MonitorPhase::Refused)];
        let ended = bench.run(|_, step, seen| {
            if matches!(step, Step::Refresh { .. }) {
                seen.monitors[0].phase = phase;
            }
            Answer::Done
        });
        assert!(!ended.failed);
        let asked = bench.steps.contains(&"propose re-key".to_owned());
        assert_eq!(asked, asks, "{:?}", bench.steps);
    }
}

#[test]
fn a_guest_that_does_not_stop_is_stopped_when_its_patience_is_over() {
    let (world, vm, token) = taken_over();
    let stop = Act::StopGuest {
        vm,
        token,
        forced: false,
    };
    let mut bench = Bench::new(&world, S, stop);
    bench.seen.monitors = vec![monitor(vm, token, MonitorPhase::Running)];
    let begun = bench.seen.now_ns;
    let ended = bench.run(|_, step, seen| {
        if let Step::Wait { ns, .. } = step {
            seen.now_ns += ns;
        }
        Answer::Done
    });
    assert!(!ended.failed);
    let tail = &bench.steps[bench.steps.len() - 2..];
    assert_eq!(tail, ["stop by force", "refresh"]);
    assert!(bench.seen.now_ns - begun >= STOP_PATIENCE_NS);
}

/// A migration of a running machine from `S` to `D`, started.
fn migrating() -> (World, VmId, MigrationId, Token) {
    let mut world = World::new(3, 4_096);
    let vm = world.running("a", 64, S);
    let (migration, reserved) = world.migrate(vm, D);
    (world, vm, migration, reserved)
}

#[test]
fn a_destination_that_does_not_get_ready_ends_the_migration() {
    let (world, vm, migration, _) = migrating();
    let token = world.state.vms[&vm].ownership.token;
    let send = Act::Send {
        vm,
        migration,
        expects: token,
    };
    for refuses in [true, false] {
        let mut bench = Bench::new(&world, S, send.clone());
        bench.seen.monitors = vec![monitor(vm, token, MonitorPhase::Running)];
        let ended = bench.run(|_, step, seen| match step {
            Step::AskReady { .. } => Answer::NotReady {
                why: "no memory".into(),
                for_good: refuses,
            },
            Step::Wait { ns, .. } => {
                seen.now_ns += 50 * ns;
                Answer::Done
            }
            _ => Answer::Done,
        });
        assert!(ended.failed);
        assert_eq!(bench.steps.last().map(String::as_str), Some("abort"));
        assert!(!bench.steps.contains(&"send".to_owned()));
        assert_eq!(bench.steps.len() == 2, refuses, "{:?}", bench.steps);
    }
}

#[test]
fn a_claim_for_a_cutover_is_learnt_when_it_is_acknowledged_and_aborts_where_the_storage_refuses() {
    let (world, vm, migration, reserved) = migrating();
    let claim = Act::ClaimForCutover {
        vm,
        migration,
        reserved,
    };
    let with = |answer: Answer| {
        let mut bench = Bench::new(&world, D, claim.clone());
        let ended = bench.run(|_, step, _| match step {
            Step::Claim { .. } => answer.clone(),
            _ => Answer::Done,
        });
        (ended.learnt, ended.failed, bench.steps.last().cloned())
    };
    let claimed = format!("claim {reserved}");
    let learnt = vec![Learnt::Claimed(vm, reserved)];
    assert_eq!(with(Answer::Done), (learnt, false, Some(claimed.clone())));
    let failure = |kind| Answer::Failed(Failure::new(kind, "no"));
    let burnt = with(failure(FailureKind::Burnt));
    assert_eq!(burnt, (Vec::new(), false, Some(claimed)));
    let refused = with(failure(FailureKind::RefusedForGood));
    assert_eq!(refused, (Vec::new(), false, Some("abort".into())));
}

#[test]
fn a_destination_runs_by_the_applied_cutover_alone() {
    let (mut world, vm, migration, reserved) = migrating();
    let act = Act::RunAfterCutover {
        vm,
        token: reserved,
        migration,
        nonce: 77,
    };
    let mut complete = monitor(vm, reserved, MonitorPhase::Complete);
    complete.migration = Some(MonitorMigration {
        id: migration,
        side: Side::Destination,
        quiet_received: true,
        failed: None,
    });
    let run = |world: &World| {
        let mut bench = Bench::new(world, D, act.clone());
        bench.seen.monitors = vec![complete.clone()];
        let ended = bench.run(good(world, vm, reserved));
        (ended.failed, bench.steps)
    };
    assert_eq!(run(&world), (true, Vec::new()), "before it is applied");
    world.cutover(migration);
    let (failed, steps) = run(&world);
    assert_eq!(
        (failed, steps),
        (false, vec!["run".into(), "activated".into()])
    );
}

#[test]
fn what_follows_an_end_that_failed_is_not_done() {
    let (world, vm, token) = taken_over();
    let acts = vec![
        Act::Kill {
            vm,
            token,
            nonce: 77,
            why: "it failed".into(),
        },
        Act::Release {
            vm,
            expects: token,
            reason: ReleaseReason::Stopped,
        },
    ];
    for fails in [true, false] {
        let work = Work {
            vm,
            acts: acts.clone(),
            kind: Some(FlowKind::Propose),
            failures: 3,
        };
        let mut bench = Bench::under(&world, S, work, Safeguards::ALL);
        bench.seen.monitors = vec![monitor(vm, token, MonitorPhase::Failed)];
        let ended = bench.run(|_, step, _| match step {
            Step::End { .. } if fails => Answer::Failed(Failure::new(FailureKind::Host, "no")),
            _ => Answer::Done,
        });
        assert_eq!(ended.failed, fails);
        assert_eq!(bench.steps.contains(&"release".to_owned()), !fails);
    }
}

#[test]
fn the_pause_after_a_failure_doubles_up_to_its_bound() {
    let (world, vm, token) = taken_over();
    let pause = |failures| {
        let work = Work {
            failures,
            ..work(Act::Activated { vm, token })
        };
        let mut bench = Bench::under(&world, S, work, Safeguards::ALL);
        let Next::Do(_) = bench.next(Answer::Begin) else {
            panic!("a step");
        };
        let failure = Failure::new(FailureKind::Log, "no");
        match bench.next(Answer::Failed(failure)) {
            Next::Over { pause_ns, .. } => pause_ns / MS,
            Next::Do(step) => panic!("{step:?}"),
        }
    };
    assert_eq!(
        [pause(0), pause(1), pause(4), pause(30)],
        [50, 100, 800, 2_000]
    );
}
