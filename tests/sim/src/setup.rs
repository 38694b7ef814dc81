//! The log with which every simulated cluster begins: its nodes, a volume, some machines.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cluster_model::{
    Boot, Command, Desired, DiskSpec, Envelope, FenceClass, NodeFacts, NodeRole, OnIsolation,
    RequestId, Settings, Sha256, VmSpec,
};

use crate::raft::Entry;
use crate::world::name;

/// Memory of a node, MiB.
pub const NODE_MEMORY_MIB: u64 = 4_096;

/// What a node says of itself.
pub fn facts() -> NodeFacts {
    NodeFacts {
        cpus: 8,
        memory_mib: NODE_MEMORY_MIB,
        cpu_vendor: "AuthenticAMD".into(),
        cpu_model: "simulated".into(),
        version: "0.1.0".into(),
        stream_versions: (1, 1),
        watchdog: false,
        kvm: true,
    }
}

/// The first entries, all of term 1.
pub fn log(nodes: usize, machines: usize) -> Vec<Entry> {
    let mut commands = vec![Command::InitCluster {
        id: "simulated".into(),
        name: name("sim"),
        broker_uid: 5_000,
        node_name: name("n1"),
        address: "127.0.0.1:1".into(),
    }];
    for number in 2..=nodes {
        commands.extend(join(number));
    }
    commands.push(Command::AddVolume {
        name: name("shared"),
        url: "nfs://127.0.0.9/shared".into(),
        uuid: "v".into(),
        fence: FenceClass::GidToken,
        settle_ms: 0,
        size_bytes: 1 << 40,
        nodes: BTreeSet::new(),
        tls_ca: None,
    });
    commands.push(Command::SetSettings {
        settings: Settings {
            migration_timeout_s: 20,
            // A run is a bad hour in a minute: nothing is put aside for good.
            crashes_max: 255,
            losses_max: 255,
            ..Settings::default()
        },
    });
    for machine in 0..machines {
        commands.push(Command::CreateVm {
            name: name(&format!("vm{}", machine + 1)),
            spec: spec(machine),
            images: BTreeMap::new(),
            desired: Desired::Running,
        });
    }
    commands
        .into_iter()
        .enumerate()
        .map(|(at, command)| Entry {
            leader: (1, 0),
            command: Some(Arc::new(Envelope {
                request: RequestId(format!("setup/{at}")),
                actor: "admin".into(),
                at_ms: 1_700_000_000_000,
                asked: None,
                command,
            })),
        })
        .collect()
}

/// Lets a node in: its token, then itself by it.
fn join(number: usize) -> [Command; 2] {
    let node = name(&format!("n{number}"));
    let hash = Sha256([number as u8; 32]);
    [
        Command::CreateJoinToken {
            id: format!("join-{node}"),
            node: node.clone(),
            role: NodeRole::Voter,
            secret_hash: hash,
            expires_at_ms: u64::MAX,
        },
        Command::JoinNode {
            token: format!("join-{node}"),
            secret_hash: hash,
            name: node,
            address: format!("127.0.0.{number}:1"),
            key: hash,
        },
    ]
}

fn spec(machine: usize) -> VmSpec {
    VmSpec {
        vcpus: 1,
        memory_mib: 1_024,
        boot: Boot::SelfCheck {
            working_set_mib: 4,
            dirty_mib_s: 0,
        },
        disks: vec![DiskSpec {
            volume: name("shared"),
            path: format!("vm{}.raw", machine + 1),
            size_bytes: 1 << 20,
        }],
        nics: Vec::new(),
        priority: 500,
        failover: true,
        on_isolation: OnIsolation::Freeze,
        downtime_max_ms: None,
        witness: None,
        tags: BTreeSet::new(),
    }
}
