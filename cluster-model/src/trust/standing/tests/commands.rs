//! One of every command, to try a rule on all of them.

use std::collections::{BTreeMap, BTreeSet};

use crate::command::{Command, ReleaseReason};
use crate::event::{Severity, Why};
use crate::ids::{Incarnation, MigrationId, NodeId, Token, VmId, VolumeId};
use crate::settings::Settings;
use crate::state::{Desired, FenceClass, MigrationCause, MigrationOptions, NodeRole};
use crate::testing::{facts, hash, join, join_token, name, spec};
use crate::trust::{Authority, Issuing, Role, Root, TrustedCluster};

/// Every command there is, about that node, that machine and that migration.
pub(super) fn every_command(node: NodeId, vm: VmId, migration: MigrationId) -> Vec<Command> {
    let authority = Authority {
        roots: vec![Root {
            certificate_pem: String::new(),
            fingerprint: hash("root"),
            sealed_key: String::new(),
        }],
        issuing: Issuing {
            generation: 1,
            certificate_pem: String::new(),
            ends_at_ms: 1,
            made_by: node,
        },
    };
    let (incarnation, token) = (Incarnation(1), Token(1));
    let text = String::new;
    let id = || "id".to_owned();
    let why = Why::default;
    let desired = |desired| Command::SetDesired {
        vm,
        desired,
        forced: false,
    };
    let queue = |cause| Command::QueueMigration {
        vm,
        to: node,
        options: MigrationOptions::default(),
        cause,
        why: why(),
    };
    let mut tagged = spec("new", 64);
    tagged.tags.insert(name(&format!("of-{node}")));
    vec![
        Command::InitCluster {
            id: id(),
            name: name("c"),
            broker_uid: 1,
            node_name: name("n1"),
            address: text(),
        },
        join("l9"),
        Command::RemoveNode { node },
        Command::RegisterNode {
            node,
            incarnation,
            replaces: incarnation,
            address: text(),
            facts: facts(64),
        },
        Command::Absent {
            node,
            incarnation,
            duration_ms: 1,
        },
        Command::Returned {
            node,
            incarnation,
            absence: crate::ids::LogIndex(1),
        },
        Command::NodeLost {
            node,
            incarnation,
            why: why(),
        },
        Command::StartDrain {
            node,
            reason: text(),
        },
        Command::DrainTrouble {
            node,
            vm,
            reason: text(),
            stuck: true,
        },
        Command::EndDrain { node },
        Command::Uncordon {
            node,
            failback: true,
        },
        Command::StayAway {
            node,
            vm,
            reason: text(),
        },
        Command::EndFailback { node },
        Command::AddVolume {
            name: name("v"),
            url: text(),
            uuid: text(),
            fence: FenceClass::None,
            settle_ms: 1,
            size_bytes: 1,
            nodes: BTreeSet::new(),
            tls_ca: None,
        },
        Command::RemoveVolume {
            volume: VolumeId(1),
        },
        Command::CreateVm {
            name: name("new"),
            spec: tagged,
            images: BTreeMap::new(),
            desired: Desired::Stopped,
        },
        Command::DeleteVm { vm },
        desired(Desired::Running),
        desired(Desired::Stopped),
        Command::StartVm {
            vm,
            node,
            expects: token,
            why: why(),
        },
        Command::DisksMade { vm, token },
        Command::Activated { vm, node, token },
        Command::Release {
            vm,
            node,
            expects: token,
            reason: ReleaseReason::Stopped,
        },
        Command::Rekey {
            vm,
            node,
            expects: token,
            settle: true,
            reason: text(),
        },
        queue(MigrationCause::Asked),
        queue(MigrationCause::Drain(node)),
        queue(MigrationCause::Balance),
        queue(MigrationCause::Failback(node)),
        Command::StartMigration {
            migration,
            expects: token,
            ticket: text(),
        },
        Command::RenewMigrationToken {
            migration,
            burnt: token,
        },
        Command::Cutover {
            migration,
            expects: token,
            claimed: token,
        },
        Command::AbortMigration {
            migration,
            reason: text(),
        },
        Command::ReportMigration {
            migration,
            summary: serde_json::Value::Null,
        },
        Command::SetSettings {
            settings: Settings::default(),
        },
        Command::SetRule {
            name: name("r"),
            rule: None,
        },
        Command::FoundTrust {
            authority: authority.clone(),
            first_node_key: hash("key"),
        },
        join_token("l9", NodeRole::Voter),
        Command::RevokeJoinToken { id: id() },
        Command::CreateAccessToken {
            id: id(),
            user: name("eve"),
            role: Role::Admin,
            tags: BTreeSet::new(),
            secret_hash: hash("secret"),
            expires_at_ms: u64::MAX,
        },
        Command::RevokeAccessToken { id: id() },
        Command::RotateAuthority {
            expects: 1,
            roots: authority.roots,
            issuing: authority.issuing,
        },
        Command::RetireRoot {
            fingerprint: hash("root"),
        },
        Command::TrustCluster {
            name: name("b"),
            cluster: TrustedCluster {
                root_pem: text(),
                fingerprint: hash("b"),
            },
        },
        Command::DistrustCluster { name: name("b") },
        Command::Note {
            objects: Vec::new(),
            severity: Severity::Info,
            kind: text(),
            detail: text(),
            why: why(),
        },
    ]
}
