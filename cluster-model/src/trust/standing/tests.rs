//! Every command, from every kind of node: what is taken and what is not.

mod commands;

use std::collections::{BTreeMap, BTreeSet};
use std::mem::{Discriminant, discriminant};

use self::commands::every_command;
use super::*;
use crate::SUMMARY_BYTES_MAX;
use crate::event::{Severity, Why};
use crate::ids::{Incarnation, RequestId};
use crate::settings::Settings;
use crate::state::NodeRole;
use crate::testing::{World, name, spec};
use crate::trust::{Asked, Bearer, Needs, Role};

/// Two learners with a machine each, tagged with their names, and a migration towards each.
struct Scene {
    world: World,
    /// Learner, its machine, the migration that it is the destination of.
    sides: [(NodeId, VmId, MigrationId); 2],
    witness: NodeId,
    removed: NodeId,
}

fn scene() -> Scene {
    let mut world = World::new(1, 4_096);
    let mut add = |label: &str, role| {
        let node = world.let_in(label, role);
        world.register(node, Incarnation(1), 4_096);
        node
    };
    let learners = [add("l1", NodeRole::Learner), add("l2", NodeRole::Learner)];
    let (witness, removed) = (add("w", NodeRole::Witness), add("gone", NodeRole::Learner));
    world.done(Command::RemoveNode { node: removed });
    let sides = learners.map(|node| {
        let mut tagged = |label: String, on: NodeId| {
            let mut spec = spec(&label, 64);
            spec.tags.insert(name(&format!("of-{node}")));
            let vm = world.create_with(&label, spec);
            world.start(vm, on);
            world.activate(vm);
            vm
        };
        let (vm, coming) = (
            tagged(format!("{node}-a"), node),
            tagged(format!("{node}-b"), NodeId(1)),
        );
        let (migration, _) = world.migrate(coming, node);
        (node, vm, migration)
    });
    Scene {
        world,
        sides,
        witness,
        removed,
    }
}

/// What a learner needs to hand a command on: that it is its own, a person's role, or nothing will do.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    Own,
    /// Its own, or that role, also narrowed to the machine's tag.
    OwnOrMachine(Role),
    Machine(Role),
    Cluster(Role),
    Never,
}

/// The rules as the design has them: a second account of them, with no common part with the first.
fn rule(command: &Command) -> Rule {
    match command {
        Command::RegisterNode { .. }
        | Command::Absent { .. }
        | Command::Returned { .. }
        | Command::DisksMade { .. }
        | Command::Activated { .. }
        | Command::Release { .. }
        | Command::Rekey { .. }
        | Command::RenewMigrationToken { .. }
        | Command::Cutover { .. }
        | Command::ReportMigration { .. }
        | Command::Note { .. } => Rule::Own,
        Command::AbortMigration { .. } => Rule::OwnOrMachine(Role::Operator),
        Command::CreateVm { .. } | Command::DeleteVm { .. } | Command::SetDesired { .. } => {
            Rule::Machine(Role::Operator)
        }
        Command::QueueMigration { cause, .. } => match cause {
            MigrationCause::Asked => Rule::Machine(Role::Operator),
            MigrationCause::Drain(_) | MigrationCause::Balance | MigrationCause::Failback(_) => {
                Rule::Cluster(Role::Operator)
            }
        },
        Command::StartDrain { .. } | Command::Uncordon { .. } | Command::SetRule { .. } => {
            Rule::Cluster(Role::Operator)
        }
        Command::InitCluster { .. }
        | Command::RemoveNode { .. }
        | Command::AddVolume { .. }
        | Command::RemoveVolume { .. }
        | Command::SetSettings { .. }
        | Command::CreateJoinToken { .. }
        | Command::RevokeJoinToken { .. }
        | Command::CreateAccessToken { .. }
        | Command::RevokeAccessToken { .. }
        | Command::RotateAuthority { .. }
        | Command::RetireRoot { .. }
        | Command::TrustCluster { .. }
        | Command::DistrustCluster { .. } => Rule::Cluster(Role::Admin),
        Command::JoinNode { .. }
        | Command::NodeLost { .. }
        | Command::DrainTrouble { .. }
        | Command::EndDrain { .. }
        | Command::StayAway { .. }
        | Command::EndFailback { .. }
        | Command::StartVm { .. }
        | Command::StartMigration { .. }
        | Command::FoundTrust { .. } => Rule::Never,
    }
}

fn bearer(role: Role, tags: &[&str]) -> Who {
    Who::Bearer(Bearer {
        token: "t".into(),
        user: name("ann"),
        role,
        tags: tags.iter().map(|tag| name(tag)).collect(),
    })
}

impl Scene {
    fn hands(
        &self,
        from: NodeId,
        actor: &str,
        credential: Option<&Who>,
        command: &Command,
    ) -> Result<(), NotYours> {
        let envelope = Envelope {
            actor: actor.into(),
            asked: credential.map(|_| Asked::default()),
            ..self.world.envelope(command.clone())
        };
        self.world.state.may_propose(from, credential, &envelope)
    }

    /// Commands about one of the two learners.
    fn about(&self, side: usize) -> Vec<Command> {
        let (node, vm, migration) = self.sides[side];
        every_command(node, vm, migration)
    }
}

#[test]
fn the_list_of_commands_is_complete() {
    let kinds: BTreeMap<String, Discriminant<Command>> =
        every_command(NodeId(1), VmId(1), MigrationId(1))
            .iter()
            .map(|command| {
                let json = serde_json::to_value(command).expect("a command");
                let kind = json
                    .as_object()
                    .and_then(|fields| fields.keys().next().cloned());
                (kind.expect("a kind"), discriminant(command))
            })
            .collect();
    // An unknown kind is answered with the list of those that are known.
    let error = serde_json::from_str::<Command>(r#"{"no-such-command":{}}"#)
        .expect_err("no such command")
        .to_string();
    let known: BTreeSet<&str> = error.split('`').skip(3).step_by(2).collect();
    let listed: BTreeSet<&str> = kinds.keys().map(String::as_str).collect();
    assert_eq!(known, listed);
    assert!(listed.len() > 35, "{}", listed.len());
}

#[test]
fn a_learner_hands_on_what_is_its_own_and_nothing_else() {
    let scene = scene();
    let me = scene.sides[0].0;
    for command in scene.about(0) {
        let own = matches!(rule(&command), Rule::Own | Rule::OwnOrMachine(_));
        let taken = scene.hands(me, "node/l1", None, &command);
        assert_eq!(taken.is_ok(), own, "{command:?}: {taken:?}");
        // Nobody else's name, and no person's wish.
        for actor in ["node/l2", "l1", "ann", "controller/failover", ""] {
            assert!(
                scene.hands(me, actor, None, &command).is_err(),
                "{command:?}"
            );
        }
        let wish = Envelope {
            actor: "node/l1".into(),
            asked: Some(Asked::default()),
            ..scene.world.envelope(command.clone())
        };
        assert!(scene.world.state.may_propose(me, None, &wish).is_err());
    }
    for command in scene.about(1) {
        // A note is about nobody, it only says who says it.
        let own = matches!(command, Command::Note { .. });
        let taken = scene.hands(me, "node/l1", None, &command);
        assert_eq!(taken.is_ok(), own, "{command:?}");
    }
}

#[test]
fn the_source_of_a_migration_may_end_it_and_no_more() {
    let mut scene = scene();
    let (me, vm, _) = scene.sides[0];
    let (migration, _) = scene.world.migrate(vm, NodeId(1));
    for command in every_command(me, vm, migration) {
        let of_migration = command.object(&scene.world.state).starts_with("migration/");
        if of_migration {
            let taken = scene.hands(me, "node/l1", None, &command).is_ok();
            assert_eq!(
                taken,
                matches!(command, Command::AbortMigration { .. }),
                "{command:?}"
            );
        }
    }
}

#[test]
fn what_a_learner_lost_is_its_own_no_more() {
    let mut scene = scene();
    let (me, vm, migration) = scene.sides[0];
    scene.world.lose(me);
    for command in every_command(me, vm, migration) {
        let of_machine = command.object(&scene.world.state).starts_with("vm/");
        let taken = scene.hands(me, "node/l1", None, &command);
        assert!(!of_machine || taken.is_err(), "{command:?}");
    }
}

#[test]
fn a_voter_and_a_witness_hand_on_anything_but_a_loss_and_who_is_no_member_nothing() {
    let scene = scene();
    let admin = bearer(Role::Admin, &[]);
    let unknown = NodeId(scene.world.state.applied.0 + 7);
    for command in scene.about(0) {
        for voter in [NodeId(1), scene.witness] {
            // A loss was seen by who led then; the leader that it is handed to may have renewed that lease since.
            let of_a_leader = matches!(command, Command::NodeLost { .. });
            let handed = scene.hands(voter, "anybody", None, &command);
            assert_eq!(handed.is_err(), of_a_leader, "{command:?}: {handed:?}");
        }
        for stranger in [scene.removed, unknown] {
            assert_eq!(
                scene.hands(stranger, "ann", Some(&admin), &command),
                Err(NotYours::NotAMember { node: stranger }),
                "{command:?}"
            );
        }
    }
}

#[test]
fn with_a_persons_token_a_learner_hands_on_what_that_person_may_in_their_name() {
    let scene = scene();
    let me = scene.sides[0].0;
    // Each side's machines carry a tag of their own.
    let (own_tag, other_tag) = (format!("of-{me}"), format!("of-{}", scene.sides[1].0));
    for command in scene.about(0) {
        for role in [Role::Viewer, Role::Operator, Role::Admin] {
            let hands = |who: &Who| scene.hands(me, "ann", Some(who), &command).is_ok();
            let (whole, narrowed) = match rule(&command) {
                Rule::Own | Rule::Never => (false, false),
                Rule::OwnOrMachine(least) | Rule::Machine(least) => (role >= least, role >= least),
                Rule::Cluster(least) => (role >= least, false),
            };
            assert_eq!(hands(&bearer(role, &[])), whole, "{role:?} {command:?}");
            assert_eq!(
                hands(&bearer(role, &[&own_tag])),
                narrowed,
                "{role:?} {command:?}"
            );
            assert!(!hands(&bearer(role, &[&other_tag])), "{role:?} {command:?}");
        }
        // What is not proved by a token is proved by nothing.
        for who in [
            Who::Local { uid: 0 },
            Who::Node(NodeId(1)),
            Who::Foreign(name("b")),
            Who::Nobody,
        ] {
            assert!(scene.hands(me, "ann", Some(&who), &command).is_err());
        }
    }
}

#[test]
fn a_learner_is_told_what_would_do() {
    let scene = scene();
    let (me, vm, _) = scene.sides[0];
    let command = Command::DeleteVm { vm };
    let told = |actor: &str, who: Option<&Who>| {
        scene.hands(me, actor, who, &command).expect_err("refused")
    };
    let text = told("node/l1", None).to_string();
    assert!(
        text.starts_with("l1 is a learner and may not change vm/"),
        "{text}"
    );
    assert!(matches!(
        told("ann", Some(&bearer(Role::Viewer, &[]))),
        NotYours::Denied(Denied {
            needs: Needs::Role(Role::Operator),
            ..
        })
    ));
    let other = told("bob", Some(&bearer(Role::Operator, &[])));
    assert_eq!(
        other,
        NotYours::OtherActor {
            node: name("l1"),
            user: name("ann"),
            actor: "bob".into(),
        }
    );
    let settings = Command::SetSettings {
        settings: Settings::default(),
    };
    let text = scene
        .hands(me, "node/l1", None, &settings)
        .expect_err("refused")
        .to_string();
    assert!(text.contains("may not change the cluster"), "{text}");
}

#[test]
fn a_removed_node_is_told_from_one_that_this_replica_does_not_know_yet() {
    let scene = scene();
    let state = &scene.world.state;
    let member = |may_lead| Standing::Member { may_lead };
    assert_eq!(state.peer_standing(NodeId(1)), member(true));
    assert_eq!(state.peer_standing(scene.witness), member(true));
    assert_eq!(state.peer_standing(scene.sides[0].0), member(false));
    assert_eq!(state.peer_standing(scene.removed), Standing::Removed);
    assert_eq!(
        state.peer_standing(NodeId(state.applied.0)),
        Standing::Removed
    );
    let ahead = NodeId(state.applied.0 + 1);
    assert_eq!(state.peer_standing(ahead), Standing::NotYetKnown);
}

#[test]
fn a_persons_change_that_would_leave_no_trace_is_not_taken() {
    let scene = scene();
    let (me, vm, _) = scene.sides[0];
    let admin = bearer(Role::Admin, &[]);
    let mut envelope = Envelope {
        actor: "ann".into(),
        ..scene.world.envelope(Command::DeleteVm { vm })
    };
    let propose = |envelope: &Envelope| scene.world.state.may_propose(me, Some(&admin), envelope);
    assert_eq!(
        propose(&envelope),
        Err(NotYours::Unrecorded {
            node: name("l1"),
            user: name("ann"),
        })
    );
    envelope.asked = Some(Asked::default());
    assert_eq!(propose(&envelope), Ok(()));
}

#[test]
fn a_learners_own_entries_are_small() {
    let scene = scene();
    let me = scene.sides[0].0;
    let note = |detail: usize, request: usize| {
        let envelope = scene.world.envelope(Command::Note {
            objects: Vec::new(),
            severity: Severity::Info,
            kind: "k".into(),
            detail: "x".repeat(detail),
            why: Why::default(),
        });
        let envelope = Envelope {
            actor: "node/l1".into(),
            request: RequestId("r".repeat(request)),
            ..envelope
        };
        scene.world.state.may_propose(me, None, &envelope)
    };
    assert_eq!(note(SUMMARY_BYTES_MAX, OWN_REQUEST_BYTES_MAX), Ok(()));
    let too_large = Err(NotYours::TooLarge { node: name("l1") });
    assert_eq!(note(OWN_ENTRY_BYTES_MAX, 1), too_large);
    assert_eq!(note(1, OWN_REQUEST_BYTES_MAX + 1), too_large);
}
