//! Random logs against an oracle that keeps its own books, and the rules that deserve a name.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::strategy::ValueTree;

use crate::command::{Command, Rejection, ReleaseReason, Reply};
use crate::event::{Object, Severity, Why};
use crate::ids::{Incarnation, LogIndex, MigrationId, NodeId, RequestId, Token, VmId};
use crate::state::{
    ClusterState, Desired, FenceClass, Liveness, MigrationCause, MigrationState, NicSpec, NodeRole,
    OnIsolation, OwnershipCause, VmSpec,
};
use crate::testing::{World, facts, name, spec};

const NODES: u64 = 4;
const NODE_MIB: u64 = 256;

/// One random step: which command, and picks that choose its arguments among what there is.
type Step = (u8, u8, u8, u8);

fn pick<T: Copy>(items: impl Iterator<Item = T>, by: u8) -> Option<T> {
    let items: Vec<T> = items.collect();
    (!items.is_empty()).then(|| items[usize::from(by) % items.len()])
}

/// The command that a step means in this state; sometimes a stale or senseless one, as in life.
fn command(world: &World, (kind, a, b, c): Step) -> Command {
    let state = &world.state;
    // Mostly what can be done, sometimes what cannot.
    let vm = pick(
        state.vms.values().filter(|vm| {
            let record = &vm.ownership;
            match kind % 30 {
                _ if c % 8 == 0 => true,
                1..=4 => record.owner.is_none(),
                5..=7 => record.owner.is_some() && !record.activated,
                10..=12 => record.activated && state.open_migration(vm.id).is_none(),
                _ => true,
            }
        }),
        a,
    )
    .map_or(VmId(0), |vm| vm.id);
    let node = NodeId(u64::from(b) % (NODES + 1) + 1);
    let record = state.vms.get(&vm).map(|vm| vm.ownership.clone());
    let mut token = record.as_ref().map_or(Token(1), |record| record.token);
    if c % 11 == 0 {
        token = Token(token.0.saturating_sub(1));
    }
    let owner = record
        .as_ref()
        .and_then(|record| record.owner)
        .unwrap_or(node);
    let migration = pick(
        state
            .migrations
            .values()
            .filter(|migration| c % 5 == 0 || migration.is_open())
            .map(|migration| migration.id),
        a,
    )
    .unwrap_or(MigrationId(0));
    let incarnation = state
        .nodes
        .get(&node)
        .map_or(Incarnation(1), |node| node.incarnation);
    match kind % 30 {
        0 => Command::CreateVm {
            name: name(&format!("v{a}")),
            spec: spec(&format!("v{a}"), 16 + u64::from(b % 8) * 16),
            images: BTreeMap::new(),
            desired: Desired::Running,
        },
        1..=4 => Command::StartVm {
            vm,
            node,
            expects: token,
            why: Why::default(),
        },
        5..=7 => Command::Activated {
            vm,
            node: owner,
            token,
        },
        8 => Command::Release {
            vm,
            node: owner,
            expects: token,
            reason: match c % 4 {
                0 => ReleaseReason::Stopped,
                1 => ReleaseReason::GuestShutDown,
                2 => ReleaseReason::MonitorEnded("x".into()),
                _ => ReleaseReason::StartFailed("x".into()),
            },
        },
        9 => Command::Rekey {
            vm,
            node: owner,
            expects: token,
            settle: c % 2 == 0,
            reason: "x".into(),
        },
        10..=12 => World::queue_command(vm, node, MigrationCause::Asked),
        13..=14 | 25..=26 => Command::StartMigration {
            migration,
            expects: state.migrations.get(&migration).map_or(token, |migration| {
                state
                    .vms
                    .get(&migration.vm)
                    .map_or(token, |vm| vm.ownership.token)
            }),
            ticket: "0f".repeat(32),
        },
        15..=16 => world.cutover_command(migration).map_or(
            Command::Cutover {
                migration,
                expects: token,
                claimed: Token(token.0 + 1),
            },
            |command| match command {
                Command::Cutover {
                    expects, claimed, ..
                } if c % 7 == 0 => Command::Cutover {
                    migration,
                    expects,
                    claimed: Token(claimed.0 - 1),
                },
                command => command,
            },
        ),
        17 => Command::AbortMigration {
            migration,
            reason: "x".into(),
        },
        18 | 24 => Command::RenewMigrationToken {
            migration,
            burnt: match state
                .migrations
                .get(&migration)
                .map(|migration| &migration.state)
            {
                Some(MigrationState::Active { reserved, .. }) => *reserved,
                _ => token,
            },
        },
        19 => Command::SetDesired {
            vm,
            desired: if c % 6 == 0 {
                Desired::Stopped
            } else {
                Desired::Running
            },
            forced: c % 4 == 0,
        },
        20 => Command::NodeLost {
            node,
            incarnation,
            why: Why::rule("x"),
        },
        21 | 27..=28 => Command::RegisterNode {
            node,
            incarnation: if c % 3 == 0 {
                Incarnation(incarnation.0 + 1)
            } else {
                incarnation
            },
            replaces: if c % 11 == 0 {
                Incarnation(incarnation.0 + 7)
            } else {
                incarnation
            },
            address: "x:1".into(),
            facts: facts(NODE_MIB),
        },
        22 => match c % 8 {
            0 if a % 3 == 0 => Command::StartDrain {
                node,
                reason: String::new(),
            },
            1 => Command::EndDrain { node },
            5 => Command::Absent {
                node,
                incarnation,
                duration_ms: 1_000,
            },
            2 => Command::Returned {
                node,
                incarnation,
                absence: state
                    .nodes
                    .get(&node)
                    .and_then(|known| known.absence)
                    .map_or(LogIndex(1), |absence| absence.since),
            },
            3 => Command::DrainTrouble {
                node,
                vm,
                reason: "x".into(),
                stuck: a % 2 == 0,
            },
            4 if a % 8 == 0 => Command::RemoveNode { node },
            6 => Command::StayAway {
                node,
                vm,
                reason: "no room".into(),
            },
            7 => Command::EndFailback { node },
            _ => Command::Uncordon {
                node,
                failback: a % 2 == 0,
            },
        },
        _ => Command::DeleteVm { vm },
    }
}

/// The oracle: what has been granted and what has ended, as seen from outside.
#[derive(Default)]
struct Books {
    granted: BTreeSet<Token>,
    ended: BTreeMap<MigrationId, bool>,
}

impl Books {
    fn check(
        &mut self,
        before: &ClusterState,
        command: &Command,
        reply: &Reply,
        after: &ClusterState,
    ) {
        if matches!(reply, Reply::Rejected(_)) {
            let mut same = after.clone();
            same.applied = before.applied;
            same.answers = before.answers.clone();
            same.answer_order = before.answer_order.clone();
            assert_eq!(&same, before, "a refused command changed something");
            return;
        }
        self.tokens(before, command, after);
        self.migrations(after);
        let room = |node: NodeId| {
            let most = after.nodes[&node].facts.memory_mib - after.settings.memory_reserve_mib;
            assert!(
                after.memory_committed_mib(node) <= most,
                "{node} is over its memory"
            );
        };
        match command {
            Command::StartVm { node, .. } => room(*node),
            Command::StartMigration { migration, .. }
                if after.migrations[migration].is_active() =>
            {
                room(after.migrations[migration].to);
            }
            _ => {}
        }
        for vm in after.vms.values() {
            if let Some(owner) = vm.ownership.owner {
                let node = after.nodes.get(&owner).expect("an owner is a node");
                assert!(
                    matches!(node.liveness, Liveness::Up) && node.role != NodeRole::Witness,
                    "{owner} is {:?} and owns {}",
                    node.liveness,
                    vm.id
                );
            }
        }
        let leases: Vec<_> = after.leases().collect();
        assert_eq!(
            leases.len(),
            after
                .vms
                .values()
                .map(|vm| vm.spec.disks.len())
                .sum::<usize>()
        );
        for lease in leases {
            let record = &after.vms[&lease.vm].ownership;
            assert_eq!((lease.holder, lease.token), (record.owner, record.token));
        }
    }

    fn tokens(&mut self, before: &ClusterState, command: &Command, after: &ClusterState) {
        let mut fresh = |token: Token| {
            assert!(self.granted.insert(token), "{token} was granted twice");
            assert!(token <= after.token_last);
        };
        let reserved = |state: &ClusterState, id: MigrationId| match state
            .migrations
            .get(&id)
            .map(|migration| &migration.state)
        {
            Some(MigrationState::Active { reserved, .. }) => Some(*reserved),
            _ => None,
        };
        for vm in after.vms.values() {
            let old = before.vms.get(&vm.id).map(|vm| &vm.ownership);
            let new = &vm.ownership;
            assert!(new.image <= new.token);
            if old.is_some_and(|old| old.token == new.token) {
                assert_eq!(
                    old.expect("known").owner,
                    new.owner,
                    "the owner moved without the token"
                );
                continue;
            }
            assert!(
                old.is_none_or(|old| old.token < new.token),
                "{} fell back",
                vm.id
            );
            match command {
                Command::Cutover { migration, .. } => {
                    assert_eq!(reserved(before, *migration), Some(new.token));
                    assert_eq!(new.image, new.token);
                }
                _ => fresh(new.token),
            }
            let expected = match command {
                Command::CreateVm { .. } => OwnershipCause::Created,
                Command::StartVm { .. } => OwnershipCause::Start,
                Command::Release { .. } => OwnershipCause::Release,
                Command::Cutover { .. } => OwnershipCause::Cutover,
                Command::Rekey { .. } => OwnershipCause::Rekey,
                Command::NodeLost { .. } => OwnershipCause::NodeLost,
                Command::RegisterNode { .. } => OwnershipCause::NodeRebooted,
                other => panic!("{other:?} changed an owner"),
            };
            assert_eq!(new.cause, expected);
            if expected == OwnershipCause::Rekey {
                assert_eq!(
                    old.map(|old| (old.owner, old.image)),
                    Some((new.owner, new.image))
                );
            } else {
                assert_eq!(new.image, new.token);
            }
        }
        for &id in after.migrations.keys() {
            if let Some(new) = reserved(after, id)
                && reserved(before, id) != Some(new)
            {
                fresh(new);
            }
        }
    }

    fn migrations(&mut self, after: &ClusterState) {
        let mut open = BTreeSet::new();
        for migration in after.migrations.values() {
            let through = match &migration.state {
                MigrationState::Queued => None,
                MigrationState::Active {
                    expects, reserved, ..
                } => {
                    let record = &after.vms[&migration.vm].ownership;
                    assert_eq!(*expects, record.token);
                    assert!(*reserved > record.token);
                    None
                }
                MigrationState::CutOver { .. } => Some(true),
                MigrationState::Aborted { .. } => Some(false),
            };
            match through {
                Some(through) => {
                    let known = *self.ended.entry(migration.id).or_insert(through);
                    assert_eq!(known, through, "{} ended twice", migration.id);
                }
                None => {
                    assert!(
                        !self.ended.contains_key(&migration.id),
                        "{} came back",
                        migration.id
                    );
                    assert!(
                        open.insert(migration.vm),
                        "two migrations of {}",
                        migration.vm
                    );
                    assert_eq!(
                        after.vms[&migration.vm].ownership.owner,
                        Some(migration.from)
                    );
                }
            }
        }
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(any::<Step>(), 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_log_keeps_the_books_of_the_oracle(steps in steps()) {
        let mut world = World::new(NODES, NODE_MIB);
        let mut books = Books::default();
        for step in steps {
            let command = command(&world, step);
            let before = world.state.clone();
            let reply = world.ask(command.clone());
            books.check(&before, &command, &reply, &world.state);
        }
    }

    #[test]
    fn a_request_repeated_later_is_answered_as_before_and_changes_nothing(
        steps in steps(), again in any::<prop::sample::Index>(),
    ) {
        let mut world = World::new(NODES, NODE_MIB);
        for step in steps {
            let command = command(&world, step);
            world.ask(command);
        }
        let (_, envelope) = world.log[again.index(world.log.len())].clone();
        let answer = world.state.answers[&envelope.request].clone();
        let before = world.state.clone();
        let next = LogIndex(before.applied.0 + 1);
        prop_assert_eq!(world.state.apply(next, &envelope), answer);
        world.state.applied = before.applied;
        prop_assert_eq!(world.state, before);
    }

    #[test]
    fn a_snapshot_and_the_tail_give_what_the_whole_log_gives(
        steps in steps(), cut in any::<prop::sample::Index>(),
    ) {
        let mut world = World::new(NODES, NODE_MIB);
        for step in steps {
            let command = command(&world, step);
            world.ask(command);
        }
        let cut = cut.index(world.log.len());
        let mut replayed = ClusterState::default();
        for (number, (index, envelope)) in world.log.iter().enumerate() {
            if number == cut {
                let bytes = serde_json::to_vec(&replayed).expect("a snapshot");
                replayed = serde_json::from_slice(&bytes).expect("a snapshot");
            }
            let wire = serde_json::to_vec(envelope).expect("an entry");
            replayed.apply(*index, &serde_json::from_slice(&wire).expect("an entry"));
        }
        prop_assert_eq!(replayed, world.state);
    }
}

#[test]
fn the_random_logs_reach_every_end() {
    // A generator that never cuts over would let every property above pass in vain.
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut cutovers, mut aborts, mut rekeys, mut losses, mut renewals) = (0, 0, 0, 0, 0);
    for _ in 0..200 {
        let steps = steps().new_tree(&mut runner).expect("steps").current();
        let mut world = World::new(NODES, NODE_MIB);
        for step in steps {
            let command = command(&world, step);
            let done = matches!(world.ask(command.clone()), Reply::Done { .. });
            match command {
                Command::Cutover { .. } if done => cutovers += 1,
                Command::AbortMigration { .. } if done => aborts += 1,
                Command::Rekey { .. } if done => rekeys += 1,
                Command::NodeLost { .. } if done => losses += 1,
                Command::RenewMigrationToken { .. } if done => renewals += 1,
                _ => {}
            }
        }
    }
    for (what, count) in [
        ("cutovers", cutovers),
        ("aborts", aborts),
        ("rekeys", rekeys),
        ("losses", losses),
        ("renewals", renewals),
    ] {
        assert!(count >= 20, "only {count} {what} in 200 logs");
    }
}

#[test]
fn cutover_and_abort_race_and_the_first_wins() {
    let mut world = World::new(2, 1_024);
    let vm = world.running("a", 64, NodeId(1));
    let (first, _) = world.migrate(vm, NodeId(2));
    let cutover = world.cutover_command(first).expect("under way");
    let mut aborted = world.clone();
    aborted.abort(first);
    assert!(matches!(
        aborted.refused(cutover.clone()),
        Rejection::MigrationState { .. }
    ));
    assert_eq!(aborted.vm(vm).ownership.owner, Some(NodeId(1)));
    world.done(cutover.clone());
    let late = Command::AbortMigration {
        migration: first,
        reason: "late".into(),
    };
    assert!(matches!(
        world.refused(late),
        Rejection::MigrationState { .. }
    ));
    assert_eq!(world.vm(vm).ownership.owner, Some(NodeId(2)));
    // Proposed again because the answer was lost: the same answer, and nothing more.
    let token = world.token(vm);
    world.done(cutover);
    assert_eq!(world.token(vm), token);
}

#[test]
fn a_rekey_of_the_source_lifts_the_reserved_token_above_it() {
    let mut world = World::new(2, 1_024);
    let vm = world.running("a", 64, NodeId(1));
    let (migration, reserved) = world.migrate(vm, NodeId(2));
    let rekeyed = world.rekey(vm, false);
    assert!(rekeyed > reserved);
    let stale = Command::Cutover {
        migration,
        expects: rekeyed,
        claimed: reserved,
    };
    assert!(matches!(
        world.refused(stale),
        Rejection::MigrationState { .. }
    ));
    world.cutover(migration);
    assert!(world.token(vm) > rekeyed);
}

#[test]
fn a_registration_of_an_earlier_life_that_comes_late_changes_nothing() {
    let mut world = World::new(2, 1_024);
    let (first, second, third) = (Incarnation(1), Incarnation(2), Incarnation(3));
    let late = Command::RegisterNode {
        node: NodeId(2),
        incarnation: second,
        replaces: first,
        address: "127.0.0.1:1".into(),
        facts: facts(1_024),
    };
    // The second life asked, and died before its question arrived.
    world.register(NodeId(2), third, 1_024);
    let vm = world.running("vm-a", 64, NodeId(2));
    let refused = world.refused(late);
    assert_eq!(refused, Rejection::OtherIncarnation { node: NodeId(2) });
    assert_eq!(world.state.nodes[&NodeId(2)].incarnation, third);
    assert_eq!(world.state.vms[&vm].ownership.owner, Some(NodeId(2)));
}

#[test]
fn a_host_that_rebooted_keeps_no_machine_and_why_is_told_of_each() {
    let mut world = World::new(2, 1_024);
    let (vm, other) = (
        world.running("a", 64, NodeId(2)),
        world.running("b", 64, NodeId(1)),
    );
    let token = world.vm(vm).ownership.token;
    let life = world.state.nodes[&NodeId(2)].incarnation;
    world.register(NodeId(2), Incarnation(life.0 + 1), 1_024);
    let record = &world.vm(vm).ownership;
    assert_eq!((record.owner, record.settle), (None, true));
    assert!(record.token > token);
    let told = |vm: VmId| {
        let events = world.state.events.iter();
        let mut of_it = events
            .filter(|event| event.kind == "node.up" && event.objects.contains(&Object::Vm(vm)));
        of_it.next_back().cloned()
    };
    let event = told(vm).expect("an event that names the machine");
    assert_eq!(event.severity, Severity::Error);
    assert!(event.detail.ends_with("which ended 1 machine"), "{event:?}");
    let why = event.why.as_ref();
    assert!(why.is_some_and(|why| !why.rule.is_empty()));
    assert_eq!(told(other), None);
}

#[test]
fn a_lost_node_keeps_no_machine_and_what_it_ran_settles_first() {
    let mut world = World::new(3, 1_024);
    let vm = world.running("a", 64, NodeId(1));
    let incoming = world.running("b", 64, NodeId(2));
    let (migration, _) = world.migrate(incoming, NodeId(1));
    world.lose(NodeId(1));
    let record = &world.vm(vm).ownership;
    assert_eq!((record.owner, record.settle), (None, true));
    assert!(matches!(
        world.state.migrations[&migration].state,
        MigrationState::Aborted { .. }
    ));
    assert_eq!(world.vm(incoming).ownership.owner, Some(NodeId(2)));
    let late = Command::Cutover {
        migration,
        expects: Token(1),
        claimed: Token(2),
    };
    world.refused(late);
}

#[test]
fn a_forced_stop_may_leave_writes_behind_so_the_next_start_settles() {
    for forced in [false, true] {
        let mut world = World::new(3, 1_024);
        let vm = world.running("a", 64, NodeId(1));
        world.done(Command::SetDesired {
            vm,
            desired: Desired::Stopped,
            forced,
        });
        world.done(Command::Release {
            vm,
            node: NodeId(1),
            expects: world.token(vm),
            reason: ReleaseReason::Stopped,
        });
        assert_eq!(world.vm(vm).ownership.settle, forced);
        world.desire(vm, Desired::Running);
        assert!(!world.vm(vm).stop_forced, "a start forgets it");
    }
}

#[test]
fn a_machine_without_a_fence_is_held_after_a_loss_until_a_person_starts_it() {
    for (fence, failover, held) in [
        (FenceClass::GidToken, true, false),
        (FenceClass::GidToken, false, true),
        (FenceClass::None, true, true),
    ] {
        let mut world = World::with_fence(3, 1_024, fence);
        let mut asked = spec("a", 64);
        asked.failover = failover;
        let vm = world.create_with("a", asked);
        world.start(vm, NodeId(1));
        world.activate(vm);
        world.lose(NodeId(1));
        assert_eq!(world.vm(vm).held.is_some(), held, "{fence:?} {failover}");
        let start = Command::StartVm {
            vm,
            node: NodeId(2),
            expects: world.token(vm),
            why: Why::default(),
        };
        if held {
            assert!(matches!(
                world.refused(start.clone()),
                Rejection::Held { .. }
            ));
            world.desire(vm, Desired::Running);
        }
        world.done(start);
        assert!(world.vm(vm).ownership.settle);
    }
}

#[test]
fn a_machine_that_no_monitor_could_be_is_refused_and_leaves_nothing() {
    let fenced = FenceClass::GidToken;
    let plain = FenceClass::None;
    type Spoil = fn(&mut VmSpec);
    let table: &[(FenceClass, Spoil, &str)] = &[
        (fenced, |spec| spec.vcpus = 64, "vcpus"),
        (fenced, |spec| spec.memory_mib = 2 << 20, "memory_mib"),
        (
            fenced,
            |spec| spec.disks[0].size_bytes = 64 << 10,
            "disks[0]",
        ),
        (
            fenced,
            |spec| spec.disks[0].path = "../x".into(),
            "disks[0]",
        ),
        (
            fenced,
            |spec| spec.disks.push(spec.disks[0].clone()),
            "disks[1]",
        ),
        (fenced, |spec| spec.nics = vec![nic(); 9], "disks"),
        (
            fenced,
            |spec| {
                spec.nics = vec![NicSpec {
                    mac: "53:54:00:12:34:56".into(),
                    ..nic()
                }];
            },
            "nics[0]",
        ),
        // Until the storage fences it, it would run for ever.
        (
            plain,
            |spec| spec.on_isolation = OnIsolation::RunUntilFenced,
            "on_isolation",
        ),
    ];
    for (fence, spoil, named) in table {
        let mut world = World::with_fence(2, 1_024, *fence);
        let mut asked = spec("a", 64);
        asked.nics = vec![nic()];
        let create = |spec| Command::CreateVm {
            name: name("a"),
            spec,
            images: BTreeMap::new(),
            desired: Desired::Running,
        };
        let mut wrong = asked.clone();
        spoil(&mut wrong);
        let refused = world.refused(create(wrong));
        assert!(
            matches!(&refused, Rejection::BadSpec { field, .. } if field == named),
            "{named}: {refused}"
        );
        assert!(world.state.vms.is_empty());
        world.done(create(asked));
    }
}

fn nic() -> NicSpec {
    NicSpec {
        bridge: "br0".into(),
        mac: "52:54:00:12:34:56".into(),
    }
}

#[test]
fn a_machine_that_cannot_live_is_held() {
    let mut world = World::new(2, 1_024);
    let vm = world.create("a", 64);
    for round in 1..=3 {
        let token = world.start(vm, NodeId(1));
        world.activate(vm);
        world.done(Command::Release {
            vm,
            node: NodeId(1),
            expects: token,
            reason: ReleaseReason::MonitorEnded("x".repeat(10_000)),
        });
        assert_eq!(world.vm(vm).held.is_some(), round == 3);
    }
    assert!(
        world
            .state
            .events
            .iter()
            .all(|event| event.detail.len() <= super::DETAIL_BYTES_MAX)
    );
}

#[test]
fn a_drain_that_ended_with_machines_left_can_be_tried_again() {
    let mut world = World::new(2, 1_024);
    let vm = world.running("a", 64, NodeId(1));
    let start = Command::StartDrain {
        node: NodeId(1),
        reason: String::new(),
    };
    world.done(start.clone());
    world.refused(start.clone());
    world.done(Command::DrainTrouble {
        node: NodeId(1),
        vm,
        reason: "x".into(),
        stuck: true,
    });
    world.done(Command::EndDrain { node: NodeId(1) });
    world.done(start);
    assert!(world.state.drains[&NodeId(1)].stuck.is_empty());
}

#[test]
fn the_last_tokens_are_announced_and_then_refused() {
    let mut world = World::new(2, 1_024);
    world.state.token_last = Token(super::TOKENS_WARN_AT - 1);
    let vm = world.create("a", 64);
    let warned = |world: &World| {
        world
            .state
            .events
            .iter()
            .filter(|event| event.kind == "cluster.tokens-low")
            .count()
    };
    assert_eq!(warned(&world), 1);
    world.start(vm, NodeId(1));
    assert_eq!(warned(&world), 1);
    world.state.token_last = Token(Token::LIMIT - 2);
    let rekey = Command::Rekey {
        vm,
        node: NodeId(1),
        expects: world.token(vm),
        settle: false,
        reason: String::new(),
    };
    assert_eq!(world.refused(rekey), Rejection::TokensUsedUp);
    let lost = Command::NodeLost {
        node: NodeId(1),
        incarnation: Incarnation(1),
        why: Why::default(),
    };
    // One token is left, and one machine is lost.
    world.done(lost);
    assert_eq!(world.token(vm), Token(Token::LIMIT - 1));
}

#[test]
fn the_oldest_answers_are_forgotten_in_the_order_of_their_entries() {
    let mut world = World::new(1, 64);
    for _ in 0..crate::state::REQUESTS_MAX + 10 {
        world.ask(Command::DeleteVm { vm: VmId(1) });
    }
    assert_eq!(world.state.answers.len(), crate::state::REQUESTS_MAX);
    assert_eq!(world.state.answer_order.len(), crate::state::REQUESTS_MAX);
    assert!(!world.state.answers.contains_key(&RequestId("r1".into())));
}

#[test]
fn a_text_is_cut_at_a_character() {
    assert_eq!(super::clip("aä".into(), 2), "a");
    assert_eq!(super::clip("aä".into(), 3), "aä");
}

#[test]
fn a_volumes_certificate_authority_is_recorded_and_bounded() {
    let mut world = World::new(1, 1024);
    let add = |authority: String| Command::AddVolume {
        name: name("secure"),
        url: "nfs://10.0.0.9/secure?tls=require".into(),
        uuid: "uuid-secure".into(),
        fence: FenceClass::GidToken,
        settle_ms: 100,
        size_bytes: 1 << 30,
        nodes: BTreeSet::new(),
        tls_ca: Some(authority),
    };
    let refused = world.refused(add("x".repeat((16 << 10) + 1)));
    assert!(matches!(refused, Rejection::TooLarge { .. }), "{refused}");
    world.done(add("x".repeat(16 << 10)));
    let volume = world.state.volume_named(&name("secure")).unwrap();
    assert_eq!(volume.tls_ca.as_ref().map(String::len), Some(16 << 10));
    // What an earlier version recorded says nothing of it.
    let mut old = serde_json::to_value(volume).unwrap();
    old.as_object_mut().unwrap().remove("tls_ca");
    let read: crate::state::Volume = serde_json::from_value(old).unwrap();
    assert_eq!(read.tls_ca, None);
}

#[test]
fn a_stop_by_force_settles_though_the_machine_was_asked_to_run_again_before_it_was_released() {
    let mut world = World::new(3, 4_096);
    let vm = world.running("a", 64, NodeId(1));
    for (desired, forced) in [(Desired::Stopped, true), (Desired::Running, false)] {
        world.done(Command::SetDesired {
            vm,
            desired,
            forced,
        });
    }
    let expects = world.token(vm);
    world.done(Command::Release {
        vm,
        node: NodeId(1),
        expects,
        reason: ReleaseReason::Stopped,
    });
    assert!(world.vm(vm).ownership.settle);
}
