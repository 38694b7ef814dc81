//! A cluster to begin with, made by commands as a real one is, and everything that is decided about a state.

use std::collections::{BTreeMap, BTreeSet};

use cluster_model::fleet::{Count, Fleet};
use cluster_model::membership::RaftView;
use cluster_model::placement::best_node_in;
use cluster_model::{
    Boot, ClusterState, Command, Desired, DiskSpec, Envelope, FIRST_NODE, FenceClass, Heartbeat,
    HeldLease, Incarnation, LogIndex, LossOutcome, MigrationCause, MigrationOptions, Name, NicSpec,
    NodeFacts, NodeId, NodeLoad, NodeRole, NodeView, Observed, OnIsolation, RequestId, Sha256,
    Term, Token, VmId, VmSpec, Why, balance, decide, drain, failback, failover, membership, queue,
};

/// A name that is known to be one.
pub fn name(text: &str) -> Name {
    Name::new(text).expect("a name of this file")
}

/// A machine with a disk and a network interface.
pub fn spec(disk: &str) -> VmSpec {
    VmSpec {
        vcpus: 1,
        memory_mib: 64,
        boot: Boot::SelfCheck {
            working_set_mib: 4,
            dirty_mib_s: 0,
        },
        disks: vec![DiskSpec {
            volume: name("shared"),
            path: format!("{disk}.raw"),
            size_bytes: 1 << 20,
        }],
        nics: vec![NicSpec {
            bridge: "lan".into(),
            mac: format!("52:54:00:00:00:{:02x}", disk.len()),
        }],
        priority: 500,
        failover: true,
        on_isolation: OnIsolation::Freeze,
        downtime_max_ms: None,
        witness: None,
        tags: BTreeSet::new(),
    }
}

/// The commands of a small cluster: three nodes, a volume, a machine that runs and is being moved, one that waits.
pub fn history() -> Vec<Command> {
    let mut commands = vec![Command::InitCluster {
        id: "c".into(),
        name: name("test"),
        broker_uid: 5_000,
        node_name: name("n1"),
        address: "127.0.0.1:1".into(),
    }];
    commands.extend(join("n2"));
    commands.extend(join("n3"));
    for node in [1, 3, 5] {
        commands.push(Command::RegisterNode {
            node: NodeId(node),
            incarnation: Incarnation(1),
            replaces: Incarnation(0),
            address: format!("127.0.0.{node}:1"),
            facts: NodeFacts {
                cpus: 8,
                memory_mib: 1_024,
                cpu_vendor: "AuthenticAMD".into(),
                cpu_model: "test".into(),
                version: "0.1.0".into(),
                stream_versions: (1, 1),
                watchdog: false,
                kvm: true,
            },
        });
    }
    commands.push(Command::AddVolume {
        name: name("shared"),
        url: "nfs://127.0.0.1/shared".into(),
        uuid: "v".into(),
        fence: FenceClass::GidToken,
        settle_ms: 0,
        size_bytes: 1 << 40,
        nodes: BTreeSet::new(),
        tls_ca: None,
    });
    commands.push(create("a", "a"));
    commands.push(create("web-1", "web"));
    // Machines are numbered by their entries.
    let first = VmId(commands.len() as u64 - 1);
    let why = Why::default();
    commands.extend([
        Command::StartVm {
            vm: first,
            node: FIRST_NODE,
            expects: Token::NONE,
            why: why.clone(),
        },
        Command::Activated {
            vm: first,
            node: FIRST_NODE,
            token: Token(1),
        },
        Command::QueueMigration {
            vm: first,
            to: NodeId(3),
            options: MigrationOptions::default(),
            cause: MigrationCause::Asked,
            why,
        },
    ]);
    commands
}

/// Lets a node in: its token, then itself by it.
fn join(text: &str) -> [Command; 2] {
    let hash = Sha256([text.as_bytes()[1]; 32]);
    [
        Command::CreateJoinToken {
            id: format!("join-{text}"),
            node: name(text),
            role: NodeRole::Voter,
            secret_hash: hash,
            expires_at_ms: u64::MAX,
        },
        Command::JoinNode {
            token: format!("join-{text}"),
            secret_hash: hash,
            name: name(text),
            address: format!("{text}:1"),
            key: hash,
        },
    ]
}

fn create(text: &str, disk: &str) -> Command {
    Command::CreateVm {
        name: name(text),
        spec: spec(disk),
        images: BTreeMap::new(),
        desired: Desired::Running,
    }
}

/// The entry that a command becomes.
pub fn envelope(number: u64, command: Command) -> Envelope {
    Envelope {
        request: RequestId(format!("r{number}")),
        actor: "fuzz".into(),
        at_ms: 1_000_000 + number * 10,
        asked: None,
        command,
    }
}

/// The state after [`history`].
pub fn state() -> ClusterState {
    let mut state = ClusterState::default();
    for (number, command) in (1..).zip(history()) {
        state.apply(LogIndex(number), &envelope(number, command));
    }
    state
}

/// Makes every decision there is about a state.
pub fn decide_everything(state: &ClusterState) {
    let load = |node: &NodeId| {
        let load = NodeLoad {
            cpu_permille: 900,
            volumes_down: BTreeSet::new(),
        };
        (*node, load)
    };
    let observed = Observed {
        nodes: state.nodes.keys().map(load).collect(),
        vm_cpu_milli: state.vms.keys().map(|vm| (*vm, 500)).collect(),
    };
    failover::plan(state, &observed);
    queue::next(state, &observed);
    drain::next(state, &observed);
    failback::next(state, &observed);
    balance::plan(state, &observed, 1 << 40);
    let nodes: BTreeSet<NodeId> = state.nodes.keys().copied().collect();
    let raft = RaftView {
        leader: FIRST_NODE,
        voters: nodes.clone(),
        following: nodes,
    };
    membership::plan(state, &raft);
    membership::members(state, &raft, &BTreeMap::new());
    let mut term = Term::new(1, 1);
    let mut lease = HeldLease::default();
    for node in state.nodes.values() {
        let _ = drain::plan(state, node.id, &observed, 1 << 30);
        failback::plan(state, node.id, &observed, 1 << 30);
        let heartbeat = Heartbeat {
            node: node.id,
            incarnation: node.incarnation,
            applied: state.applied,
            received_ns: 2,
            confirmed_ns: 3,
            needs: state.applied,
        };
        if let Ok(grant) = term.grant(state, &heartbeat, 4) {
            let sequence = lease.sending(1);
            lease.granted(sequence, grant);
        }
        lease.shorten_to(node, 5);
        lease.returned(node, [1].into_iter(), 5);
        decide(state, &view(node.id));
    }
    for second in 0..20 {
        let now_ns = second * 1_000_000_000;
        let stranger = Heartbeat {
            node: NodeId(u64::MAX),
            incarnation: Incarnation(0),
            applied: LogIndex(0),
            received_ns: now_ns,
            confirmed_ns: now_ns,
            needs: LogIndex(0),
        };
        let _ = term.grant(state, &stranger, now_ns);
        for loss in term.look(state, now_ns).losses {
            term.loss_answered(&loss, LossOutcome::Unknown, now_ns);
        }
    }
    let fleet = Fleet::new(state, &observed, Count::Open);
    for vm in state.vms.values() {
        let _ = best_node_in(&fleet, vm, &BTreeSet::new());
        failover::why_not_running(state, vm);
        state.settle(vm, 0);
    }
    state.leases().count();
}

fn view(me: NodeId) -> NodeView {
    NodeView {
        me,
        ..NodeView::default()
    }
}
