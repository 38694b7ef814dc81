//! How long the planners take at the design size: 1,000 nodes and 100,000 machines.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use cluster_model::fleet::NodeLoad;
use cluster_model::*;

const NODES: u64 = 1_000;
const VMS: u64 = 100_000;
/// Generous: a debug build on a machine that does other things.
const BOUND: Duration = Duration::from_secs(20);

fn name(text: String) -> Name {
    Name::new(text).expect("a name")
}

/// A full-size state. Records are written straight: a hundred thousand entries would test `apply`, not plans.
fn cluster() -> ClusterState {
    let mut seed = ClusterState::default();
    let mut index = 0;
    let mut apply = |command: Command| {
        index += 1;
        let envelope = Envelope {
            request: RequestId(index.to_string()),
            actor: "test".into(),
            at_ms: index,
            asked: None,
            command,
        };
        seed.apply(LogIndex(index), &envelope)
            .into_result()
            .expect("done")
    };
    apply(Command::InitCluster {
        id: "c".into(),
        name: name("big".into()),
        broker_uid: 5_000,
        node_name: name("n1".into()),
        address: "x:1".into(),
    });
    apply(Command::RegisterNode {
        node: NodeId(1),
        incarnation: Incarnation(1),
        replaces: Incarnation(0),
        address: "x:1".into(),
        facts: NodeFacts {
            cpus: 128,
            memory_mib: 512 * 1_024,
            stream_versions: (1, 1),
            ..NodeFacts::default()
        },
    });
    apply(Command::AddVolume {
        name: name("shared".into()),
        url: "nfs://x/y".into(),
        uuid: "u".into(),
        fence: FenceClass::GidToken,
        settle_ms: 0,
        size_bytes: 1 << 50,
        nodes: BTreeSet::new(),
        tls_ca: None,
    });
    let disk = |number: u64| DiskSpec {
        volume: name("shared".into()),
        path: format!("{number}.raw"),
        size_bytes: 1 << 30,
    };
    let spec = |number: u64| VmSpec {
        vcpus: 2,
        memory_mib: 2_048 + number % 7 * 512,
        boot: Boot::SelfCheck {
            working_set_mib: 1,
            dirty_mib_s: 0,
        },
        disks: vec![disk(number)],
        nics: Vec::new(),
        priority: u16::try_from(number % 1_000).expect("small"),
        failover: true,
        on_isolation: OnIsolation::Freeze,
        downtime_max_ms: None,
        witness: None,
        tags: BTreeSet::new(),
    };
    apply(Command::CreateVm {
        name: name("first".into()),
        spec: spec(0),
        images: BTreeMap::new(),
        desired: Desired::Running,
    });
    let node = seed.nodes[&NodeId(1)].clone();
    for number in 2..=NODES {
        let id = NodeId(number);
        let node = Node {
            id,
            name: name(format!("n{number}")),
            ..node.clone()
        };
        seed.nodes.insert(id, node);
    }
    let vm = seed.vms.values().next().expect("a machine").clone();
    seed.vms.clear();
    for number in 1..=VMS {
        let id = VmId(1_000 + number);
        let mut vm = vm.clone();
        vm.id = id;
        vm.name = name(format!("v{number}"));
        vm.spec = spec(number);
        vm.ownership.token = Token(u32::try_from(number).expect("small"));
        vm.ownership.image = vm.ownership.token;
        vm.ownership.owner = Some(NodeId(number % NODES + 1));
        vm.ownership.activated = true;
        seed.vms.insert(id, vm);
    }
    seed.token_last = Token(1_000_000);
    seed.applied = LogIndex(1_000_000);
    seed
}

fn timed<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let result = work();
    let took = begun.elapsed();
    eprintln!("{what}: {} ms", took.as_millis());
    assert!(took < BOUND, "{what} took {took:?}");
    result
}

#[test]
fn every_planner_is_fast_at_the_design_size() {
    let mut state = cluster();
    let apply = |state: &mut ClusterState, command: Command| {
        let index = LogIndex(state.applied.0 + 1);
        let envelope = Envelope {
            request: RequestId(format!("s{}", index.0)),
            actor: "test".into(),
            at_ms: index.0,
            asked: None,
            command,
        };
        state.apply(index, &envelope).into_result().expect("done")
    };
    let mut observed = Observed::default();
    for (number, &node) in state.nodes.keys().enumerate() {
        let cpu_permille = if number % 10 == 0 { 900 } else { 200 };
        observed.nodes.insert(
            node,
            NodeLoad {
                cpu_permille,
                ..NodeLoad::default()
            },
        );
    }
    for &vm in state.vms.keys() {
        observed.vm_cpu_milli.insert(vm, 1_000);
    }

    let balanced = timed("balance", || balance::plan(&state, &observed, u64::MAX / 2));
    assert_eq!(balanced.moves.len(), balance::MOVES_MAX);

    let drained = timed("drain plan of one node (100 machines)", || {
        drain::plan(&state, NodeId(7), &observed, 1 << 30).expect("a node")
    });
    assert_eq!(drained.machines.len(), 100);

    timed("node lost, 100 machines taken from it", || {
        apply(
            &mut state,
            Command::NodeLost {
                node: NodeId(9),
                incarnation: Incarnation(1),
                why: Why::rule("test"),
            },
        )
    });
    let starts = timed("failover of one node (100 machines)", || {
        failover::plan(&state, &observed)
    });
    assert_eq!(starts.len(), 100);
    timed("100 starts applied", || {
        for command in starts {
            apply(&mut state, command);
        }
    });
    assert!(
        timed("failover with nothing to do", || failover::plan(
            &state, &observed
        ))
        .is_empty()
    );

    timed("drain started and its first steps applied", || {
        apply(
            &mut state,
            Command::StartDrain {
                node: NodeId(7),
                reason: String::new(),
            },
        );
        for command in drain::next(&state, &observed) {
            apply(&mut state, command);
        }
    });
    let steps = timed("queue", || queue::next(&state, &observed));
    assert_eq!(steps.len(), 2);

    let view = NodeView {
        me: NodeId(7),
        incarnation: Incarnation(1),
        session_since: Some(LogIndex(0)),
        lease_valid: true,
        ..NodeView::default()
    };
    // Nothing of node 7 is seen: every machine of it is given up.
    assert_eq!(
        timed("agent of one node", || decide(&state, &view)).len(),
        100
    );
}
