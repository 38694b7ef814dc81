//! How the planners' work grows up to the design size of 1,000 nodes and 100,000 machines: in proportion, not faster.
//! Work is this thread's processor time, the least of several runs: what else the machine does is not in it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cluster_model::fleet::NodeLoad;
use cluster_model::*;

/// The design size, and a quarter of it with as many machines on each node.
const LARGE: u64 = 1_000;
const SMALL: u64 = LARGE / GROWTH as u64;
const GROWTH: u32 = 4;
const VMS_PER_NODE: u64 = 100;
/// Four times the machines may take four times the work, and as much again for logarithms and caches: what grows with
/// the square takes sixteen times, and fails.
const WORK_GROWTH_MAX: u32 = 2 * GROWTH;
/// Runs of each step, of which the least counts.
const RUNS: usize = 3;
/// A step that takes less at the small size is measured as if it took this: the scheduler counts by ticks, of 4 ms here.
const WORK_MIN: Duration = Duration::from_millis(5);
/// The goal at the design size, for one step of one planner.
const WORK_MAX: Duration = Duration::from_secs(1);

fn name(text: String) -> Name {
    Name::new(text).expect("a name")
}

/// A full-size state. Records are written straight: a hundred thousand entries would test `apply`, not plans.
fn cluster(nodes: u64) -> ClusterState {
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
    for number in 2..=nodes {
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
    for number in 1..=nodes * VMS_PER_NODE {
        let id = VmId(1_000 + number);
        let mut vm = vm.clone();
        vm.id = id;
        vm.name = name(format!("v{number}"));
        vm.spec = spec(number);
        vm.ownership.token = Token(u32::try_from(number).expect("small"));
        vm.ownership.image = vm.ownership.token;
        vm.ownership.owner = Some(NodeId(number % nodes + 1));
        vm.ownership.activated = true;
        seed.vms.insert(id, vm);
    }
    seed.token_last = Token(1_000_000);
    seed.applied = LogIndex(1_000_000);
    seed
}

/// What this thread has computed so far.
fn processor_time() -> Duration {
    let text =
        std::fs::read_to_string("/proc/thread-self/schedstat").expect("the scheduler's word");
    let ns = text
        .split_whitespace()
        .next()
        .and_then(|word| word.parse().ok());
    Duration::from_nanos(ns.expect("nanoseconds"))
}

/// The work of each step by its name, in the order of the steps.
#[derive(Default)]
struct Work(Vec<(&'static str, Duration)>);

impl Work {
    fn timed<T>(&mut self, what: &'static str, work: impl FnOnce() -> T) -> T {
        let begun = processor_time();
        let result = work();
        self.0.push((what, processor_time() - begun));
        result
    }
}

/// The least work of each step at that size.
fn least(nodes: u64) -> Vec<(&'static str, Duration)> {
    let state = cluster(nodes);
    let runs: Vec<Work> = (0..RUNS).map(|_| steps(state.clone())).collect();
    let step = |at: usize| {
        let least = runs.iter().map(|run| run.0[at].1).min();
        (runs[0].0[at].0, least.expect("several runs"))
    };
    (0..runs[0].0.len()).map(step).collect()
}

#[test]
fn every_planners_work_grows_with_the_cluster_and_not_with_its_square() {
    let (small, large) = (least(SMALL), least(LARGE));
    let mut wrong = Vec::new();
    for ((what, before), (_, after)) in small.into_iter().zip(large) {
        println!("{what}: {before:?} at {SMALL} nodes, {after:?} at {LARGE}");
        if after > before.max(WORK_MIN) * WORK_GROWTH_MAX || after > WORK_MAX {
            wrong.push(format!("{what}: {before:?} became {after:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Every planner once.
fn steps(mut state: ClusterState) -> Work {
    let mut work = Work::default();
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

    let balanced = work.timed("balance", || balance::plan(&state, &observed, u64::MAX / 2));
    assert_eq!(balanced.moves.len(), balance::MOVES_MAX);

    let drained = work.timed("drain plan of one node (100 machines)", || {
        drain::plan(&state, NodeId(7), &observed, 1 << 30).expect("a node")
    });
    assert_eq!(drained.machines.len(), 100);

    work.timed("node lost, 100 machines taken from it", || {
        apply(
            &mut state,
            Command::NodeLost {
                node: NodeId(9),
                incarnation: Incarnation(1),
                why: Why::rule("test"),
            },
        )
    });
    let starts = work.timed("failover of one node (100 machines)", || {
        failover::plan(&state, &observed)
    });
    assert_eq!(starts.len(), 100);
    work.timed("100 starts applied", || {
        for command in starts {
            apply(&mut state, command);
        }
    });
    assert!(
        work.timed("failover with nothing to do", || failover::plan(
            &state, &observed
        ))
        .is_empty()
    );

    work.timed("drain started and its first steps applied", || {
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
    let steps = work.timed("queue", || queue::next(&state, &observed));
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
        work.timed("agent of one node", || decide(&state, &view))
            .len(),
        100
    );
    work
}
