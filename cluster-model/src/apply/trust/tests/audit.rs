//! What is recorded of what people ask for, and what must never be told.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::{access_token, authority, found, founded, issuing, rotate, trusted};
use crate::command::{Command, Envelope};
use crate::ids::{LogIndex, NodeId, RequestId};
use crate::state::{ClusterState, NodeRole};
use crate::testing::{World, hash, join, join_token, name};
use crate::trust::{AUDIT_MAX, Asked, Role};

fn asked_for(world: &World, reason: &str, command: Command) -> Envelope {
    Envelope {
        actor: "ann".into(),
        asked: Some(Asked {
            from: "192.0.2.7".into(),
            reason: reason.into(),
            method: "Test".into(),
        }),
        ..world.envelope(command)
    }
}

#[test]
fn what_people_ask_for_is_recorded_done_or_refused_and_once() {
    let mut world = World::new(2, 64);
    let vm = world.create("web-1", 64);
    assert!(world.state.trust.audit.is_empty(), "nobody asked so far");
    let mut ask = |reason: &str, command: Command| {
        let envelope = asked_for(&world, reason, command);
        let next = LogIndex(world.state.applied.0 + 1);
        world.apply_at(next, envelope.clone());
        world
            .state
            .apply(LogIndex(world.state.applied.0 + 1), &envelope);
        world.state.trust.audit.back().cloned().expect("a record")
    };
    let record = ask("old", Command::DeleteVm { vm });
    assert_eq!(record.object, "vm/web-1", "named although it is gone");
    assert_eq!(record.actor, "ann");
    assert_eq!(record.asked.from, "192.0.2.7");
    assert_eq!(record.asked.reason, "old");
    assert_eq!(record.refused, "");
    let record = ask("again", Command::DeleteVm { vm });
    assert!(record.refused.contains("there is no vm"), "{record:?}");
    let node = NodeId(2);
    assert_eq!(ask("", Command::RemoveNode { node }).object, "node/n2");
    let long = "é".repeat(5_000);
    let record = ask(&long, uncordon(1));
    assert!(record.asked.reason.len() <= 1_024);
    assert_eq!(
        world.state.trust.audit.len(),
        4,
        "a repeat leaves no second record"
    );
}

#[test]
fn the_audit_keeps_the_last_records() {
    let mut world = World::new(1, 64);
    for _ in 0..AUDIT_MAX + 3 {
        let envelope = asked_for(&world, "", Command::RemoveNode { node: NodeId(9) });
        let next = LogIndex(world.state.applied.0 + 1);
        world.apply_at(next, envelope);
    }
    let audit = &world.state.trust.audit;
    assert_eq!(audit.len(), AUDIT_MAX);
    assert_eq!(
        audit.back().map(|last| last.index),
        Some(world.state.applied)
    );
}

fn uncordon(node: u64) -> Command {
    Command::Uncordon {
        node: NodeId(node),
        failback: false,
    }
}

#[test]
fn a_command_says_what_it_is_about_in_peoples_names() {
    let mut world = World::new(2, 64);
    let vm = world.running("web-1", 64, NodeId(1));
    let (migration, _) = world.migrate(vm, NodeId(2));
    let volume = *world.state.volumes.keys().next().expect("a volume");
    let id = || "x".to_owned();
    for (command, expected) in [
        (Command::RemoveVolume { volume }, "volume/shared"),
        (Command::DeleteVm { vm }, "vm/web-1"),
        (uncordon(2), "node/n2"),
        (uncordon(99), "node/node-99"),
        (join_token("n5", NodeRole::Voter), "node/n5"),
        (join("n5"), "node/n5"),
        (Command::RevokeJoinToken { id: id() }, "join-token/x"),
        (access_token("x", &[], 1), "token/x"),
        (Command::RevokeAccessToken { id: id() }, "token/x"),
        (Command::DistrustCluster { name: name("b") }, "cluster/b"),
        (found(authority()), ""),
        (
            Command::SetRule {
                name: name("apart"),
                rule: None,
            },
            "rule/apart",
        ),
    ] {
        assert_eq!(command.object(&world.state), expected);
    }
    let cancel = Command::AbortMigration {
        migration,
        reason: String::new(),
    };
    assert_eq!(
        cancel.object(&world.state),
        format!("migration/m-{}", migration.0)
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_event_answer_or_audit_record_tells_a_secrets_hash(
        steps in prop::collection::vec((0..8_u8, 0..4_u8, 0..3_u8), 1..60),
    ) {
        let mut world = founded();
        let mut hashes = BTreeSet::new();
        for (kind, which, secret) in steps {
            let id = format!("t{which}");
            let secret_hash = hash(&format!("secret-{which}-{secret}"));
            hashes.insert(secret_hash);
            let command = match kind {
                0 | 1 => Command::CreateJoinToken {
                    id,
                    node: name(&format!("m{which}")),
                    role: NodeRole::Learner,
                    secret_hash,
                    expires_at_ms: world.now_ms + 100,
                },
                2 | 3 => Command::JoinNode {
                    token: id,
                    secret_hash,
                    name: name(&format!("m{which}")),
                    address: "x:1".into(),
                    key: hash(&format!("key-{which}-{secret}")),
                },
                4 => Command::RevokeJoinToken { id },
                5 | 6 => Command::CreateAccessToken {
                    id,
                    user: name("ann"),
                    role: Role::Viewer,
                    tags: BTreeSet::new(),
                    secret_hash,
                    expires_at_ms: world.now_ms + 100,
                },
                _ => Command::RevokeAccessToken { id },
            };
            let envelope = asked_for(&world, "why", command);
            let next = LogIndex(world.state.applied.0 + 1);
            world.now_ms += 10;
            world.apply_at(next, envelope);
        }
        let told = format!(
            "{:?} {:?} {:?}",
            world.state.events, world.state.answers, world.state.trust.audit
        );
        for hash in hashes {
            prop_assert!(!told.contains(&hash.to_string()), "{}", told);
        }
    }

    #[test]
    fn trust_goes_through_a_snapshot_unchanged(
        steps in prop::collection::vec((0..6_u8, 0..4_u8), 1..30),
    ) {
        let mut world = founded();
        for (kind, which) in steps {
            let label = format!("m{which}");
            let command = match kind {
                0 => join_token(&label, NodeRole::Witness),
                1 => join(&label),
                2 => access_token(&label, &["web"], u64::MAX),
                3 => rotate(u64::from(which), &["old", "new"], issuing(u64::from(which) + 1)),
                4 => Command::RetireRoot { fingerprint: hash("old") },
                _ => Command::TrustCluster { name: name(&label), cluster: trusted(&label) },
            };
            let envelope = asked_for(&world, "", command);
            world.apply_at(LogIndex(world.state.applied.0 + 1), envelope);
        }
        let bytes = serde_json::to_vec(&world.state).expect("a snapshot");
        let back: ClusterState = serde_json::from_slice(&bytes).expect("a snapshot");
        prop_assert_eq!(&back, &world.state);
        let mut replayed = ClusterState::default();
        for (index, envelope) in &world.log {
            replayed.apply(*index, envelope);
        }
        prop_assert_eq!(replayed, back);
    }
}

#[test]
fn an_entry_from_before_there_was_an_audit_is_still_read() {
    let old = r#"{"request":"r","actor":"a","at_ms":1,"command":{"uncordon":{"node":1}}}"#;
    let envelope: Envelope = serde_json::from_str(old).expect("an entry");
    assert_eq!(envelope.asked, None);
    assert_eq!(envelope.request, RequestId("r".into()));
}
