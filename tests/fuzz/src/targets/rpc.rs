//! Requests as the ports take them: protobuf, then the parsing at each door, then for the admin API the work itself.
//!
//! An input is a sequence of requests: which one, and its bytes. The admin API stands on a cluster in memory,
//! whose log is one vector; brokers and monitors there are none.

use std::sync::Arc;

use cluster_model::{ClusterState, Command, Envelope, NodeId, Token, VmId};
use clusterd::admin::AdminService;
use clusterd::agent::MigrationSummary;
use clusterd::member::Handover;
use clusterd::report::{NodeReport, observed};
use prost::Message;
use proto::admin::admin_server::Admin;
use proto::{admin, broker, monitor, peer};

use crate::alone::{Alone, local};
use crate::cluster;
use crate::input::{Input, field};
use crate::runtime::block_on;
use crate::target::{MemoryBound, Target};

/// The target.
pub const TARGET: Target = Target {
    name: "rpc",
    run,
    seeds,
    input_bytes_max: 4096,
    // A view of the cluster in every answer.
    memory: MemoryBound {
        base: 4 << 20,
        each: 512,
    },
};

const REQUESTS_MAX: usize = 16;

/// Decodes a request of the admin API and has it answered.
macro_rules! admin_requests {
    ($($number:literal $method:ident $request:ident,)*) => {
        async fn ask(service: &AdminService, method: u8, bytes: &[u8]) {
            match method {
                $($number => if let Ok(request) = admin::$request::decode(bytes) {
                    let _ = Admin::$method(service, local(request)).await;
                })*
                _ => other_doors(method, bytes),
            }
        }
    };
}

admin_requests! {
    0 version VersionRequest,
    1 cluster_init ClusterInitRequest,
    2 cluster_status ClusterStatusRequest,
    3 settings_get SettingsGetRequest,
    4 settings_set SettingsSetRequest,
    5 node_list NodeListRequest,
    6 node_join NodeJoinRequest,
    7 node_remove NodeRemoveRequest,
    8 node_drain NodeDrainRequest,
    9 node_drain_status NodeDrainStatusRequest,
    10 node_uncordon NodeUncordonRequest,
    11 vm_create VmCreateRequest,
    12 vm_list VmListRequest,
    13 vm_start VmStartRequest,
    14 vm_stop VmStopRequest,
    15 vm_delete VmDeleteRequest,
    16 vm_migrate VmMigrateRequest,
    17 volume_add VolumeAddRequest,
    18 volume_list VolumeListRequest,
    19 volume_remove VolumeRemoveRequest,
    20 lease_list LeaseListRequest,
    21 migration_list MigrationListRequest,
    22 migration_cancel MigrationCancelRequest,
    23 why WhyRequest,
    24 balance_run BalanceRunRequest,
    25 balance_status BalanceStatusRequest,
    26 rule_set RuleSetRequest,
    27 rule_list RuleListRequest,
    28 migration_watch MigrationWatchRequest,
    29 events EventsRequest,
    50 node_add NodeAddRequest,
    51 join_token_list JoinTokenListRequest,
    52 join_token_revoke JoinTokenRevokeRequest,
    53 token_create TokenCreateRequest,
    54 token_list TokenListRequest,
    55 token_revoke TokenRevokeRequest,
    56 audit_list AuditListRequest,
    57 ca_show CaShowRequest,
    58 ca_rotate CaRotateRequest,
    59 trust_add TrustAddRequest,
    60 trust_list TrustListRequest,
    61 trust_remove TrustRemoveRequest,
}

/// What brokers, monitors and peers are asked, as far as it is parsed before anything is done.
fn other_doors(method: u8, bytes: &[u8]) {
    match method {
        30 => {
            drop(broker::ClaimRequest::decode(bytes).map(|request| {
                storage_broker::fuzzing::broker_request(request.files, request.token)
            }))
        }
        31 => drop(broker::CreateDiskRequest::decode(bytes).map(|request| {
            let file = broker::File {
                volume: request.volume,
                path: request.path,
            };
            storage_broker::fuzzing::broker_request(vec![file], request.token)
        })),
        32 => drop(monitor::RunPermit::decode(bytes).map(|permit| {
            let expected = vmm::permit::Expected {
                vm: VmId(7),
                nonce: 7,
                highest_token: Token(7),
                disk_token: Token(7),
            };
            vmm::permit::RunPermit::new(&permit, &expected, 7)
        })),
        33 => drop(
            monitor::SendMigrationRequest::decode(bytes)
                .map(|request| vmm::monitor::SendRequest::try_from(&request)),
        ),
        34 => {
            let report = peer::HeartbeatRequest::decode(bytes)
                .ok()
                .and_then(|request| serde_json::from_slice::<NodeReport>(&request.report).ok());
            if let Some(report) = report {
                observed(
                    &ClusterState::default(),
                    &Arc::new([(NodeId(1), report)].into()),
                );
            }
        }
        35 => drop(
            peer::ProposeRequest::decode(bytes)
                .map(|request| serde_json::from_slice::<Envelope>(&request.command)),
        ),
        36 => drop(peer::JoinRequest::decode(bytes)),
        37 => drop(peer::PrepareIncomingRequest::decode(bytes)),
        38 => drop(monitor::MonitorStatus::decode(bytes)),
        40 => {
            if let Ok(here) = monitor::MigrationProgress::decode(bytes) {
                let _ = MigrationSummary::new(Some(&here), &here, &Handover::default(), true);
                let _ = MigrationSummary::new(Some(&here), &here, &Handover::default(), false);
            }
        }
        39 => drop(broker::StatDisksReply::decode(bytes)),
        _ => drop(peer::RaftMessage::decode(bytes)),
    }
}

fn run(data: &[u8]) {
    let mut input = Input(data);
    let service = Alone::api(cluster::state());
    for _ in 0..REQUESTS_MAX {
        if input.is_empty() {
            break;
        }
        let method = input.u8();
        block_on(ask(&service, method, input.field()));
    }
}

fn request(method: u8, message: &impl Message) -> Vec<u8> {
    [vec![method], field(&message.encode_to_vec())].concat()
}

fn seeds() -> Vec<Vec<u8>> {
    let change = |id: &str| {
        Some(admin::Change {
            request_id: id.into(),
            actor: "somebody".into(),
            reason: "because".into(),
        })
    };
    let spec_json = serde_json::to_string(&cluster::spec("new")).unwrap_or_default();
    let create = admin::VmCreateRequest {
        change: change("1"),
        name: "db-1".into(),
        spec_json,
        start: true,
        ..Default::default()
    };
    let migrate = admin::VmMigrateRequest {
        change: change("2"),
        name: "a".into(),
        to: "n3".into(),
        ..Default::default()
    };
    let rule = admin::RuleSetRequest {
        change: change("3"),
        name: "apart".into(),
        rule_json: r#"{"kind":"anti-affinity","vms":[8,9]}"#.into(),
    };
    let settings = admin::SettingsSetRequest {
        change: change("4"),
        patch_json: r#"{"heartbeat_ms":400,"freeze_ms":2000,"lost_ms":2800}"#.into(),
    };
    let drain = admin::NodeDrainRequest {
        change: change("5"),
        node: "n1".into(),
        dry_run: false,
    };
    let why = admin::WhyRequest {
        object: "vm/web-1".into(),
        not_on: "n2".into(),
    };
    let volume = broker::Volume {
        url: "nfs://127.0.0.1:2049/export?mountport=20048".into(),
        cluster_id: "c".into(),
        broker_uid: 60_000,
        ..Default::default()
    };
    let claim = broker::ClaimRequest {
        files: vec![broker::File {
            volume: Some(volume),
            path: "vms/a.raw".into(),
        }],
        token: 7,
    };
    let send = monitor::SendMigrationRequest {
        migration_id: 9,
        addresses: vec!["127.0.0.1:7450".into()],
        ticket: vec![5; 32],
        destination_fingerprint: vec![6; 32],
        ..Default::default()
    };
    let report = peer::HeartbeatRequest {
        node_id: 1,
        report: serde_json::to_vec(&NodeReport::default()).unwrap_or_default(),
        ..Default::default()
    };
    let propose = peer::ProposeRequest {
        command: serde_json::to_vec(&cluster::envelope(
            1,
            Command::Uncordon {
                node: NodeId(1),
                failback: true,
            },
        ))
        .unwrap_or_default(),
        from_node: 1,
        credential: String::new(),
    };
    let progress = monitor::MigrationProgress {
        rounds: vec![monitor::Round {
            number: 1,
            pages: 7,
            ..Default::default()
        }],
        timings: Some(monitor::Timings {
            started_ns: 1_000,
            vcpus_stopped_ns: 2_000_000,
            quiet_ns: 3_000_000,
            ..Default::default()
        }),
        ..Default::default()
    };
    let drained = admin::NodeDrainStatusRequest { node: "n1".into() };
    let stop = admin::VmStopRequest {
        change: change("6"),
        name: "a".into(),
        force: true,
    };
    let delete = admin::VmDeleteRequest {
        change: change("7"),
        name: "web-1".into(),
        keep_disks: true,
    };
    let run = admin::BalanceRunRequest {
        change: change("8"),
        dry_run: false,
    };
    let empty = |method: u8| vec![method, 0, 0];
    vec![
        [
            request(11, &create),
            request(16, &migrate),
            empty(12),
            empty(21),
            empty(20),
        ]
        .concat(),
        [
            request(26, &rule),
            empty(27),
            request(8, &drain),
            request(9, &drained),
        ]
        .concat(),
        [
            request(4, &settings),
            empty(3),
            empty(5),
            empty(18),
            empty(25),
        ]
        .concat(),
        [
            request(23, &why),
            request(14, &stop),
            request(15, &delete),
            request(24, &run),
        ]
        .concat(),
        request(30, &claim),
        request(40, &progress),
        request(33, &send),
        [request(34, &report), request(35, &propose)].concat(),
        [empty(2), empty(28), empty(29)].concat(),
    ]
}
