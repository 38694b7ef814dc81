//! The API over a node that is a state and what its leader says, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use cluster_model::fleet::{NodeLoad, Observed};
use cluster_model::trust::{Authority, Bearer, Role, Who};
use cluster_model::{
    Boot, ClusterState, Command, Desired, DiskSpec, Envelope, FIRST_NODE, FenceClass, Incarnation,
    LogIndex, MigrationCause, Name, Node, NodeFacts, NodeId, OnIsolation, Outcome, Reply,
    RequestId, VmId, VmSpec, Why,
};
use proto::admin::admin_server::Admin;
use proto::admin::{
    Change, NodeCheckReply, NodeDrainRequest, NodeListRequest, NodeUncordonRequest, VmListRequest,
    VmMigrateRequest,
};
use tokio::sync::{mpsc, watch};
use tonic::{Code, Request, Status};

use super::soft::Soft;
use super::{AdminService, Asker, Backend, BackendError, ConsoleChunks};
use crate::broker::Broker;
use crate::node::Founded;
use crate::raft::RaftStatus;
use crate::trust::{Caller, Papers, Prepared, RecoveryKey, Shown};

struct Fixed {
    state: watch::Sender<Arc<ClusterState>>,
    /// What the leader tells, or why it does not.
    observed: Result<Observed, String>,
}

fn none<T>() -> Result<T, BackendError> {
    Err(BackendError::Failed("there is none".into()))
}

#[async_trait]
impl Backend for Fixed {
    fn name(&self) -> String {
        "n1".into()
    }

    fn wall_ms(&self) -> u64 {
        1_000_000
    }

    fn state(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.state.subscribe()
    }

    fn raft(&self) -> Option<RaftStatus> {
        None
    }

    async fn soft(&self) -> Soft {
        Soft {
            unknown: self.observed.clone().err(),
            ..Soft::default()
        }
    }

    async fn observed(&self) -> Result<Observed, BackendError> {
        self.observed.clone().map_err(BackendError::NoReports)
    }

    async fn propose(&self, envelope: Envelope, _: Option<&str>) -> Result<Reply, BackendError> {
        let mut state = ClusterState::clone(&self.state.borrow());
        let reply = state.apply(LogIndex(state.applied.0 + 1), &envelope);
        self.state.send_replace(Arc::new(state));
        Ok(reply)
    }

    async fn confirm(&self) -> Result<(), BackendError> {
        Ok(())
    }

    async fn init_cluster(&self, _: Name, _: bool, _: &str) -> Result<Founded, BackendError> {
        none()
    }

    async fn join(&self, _: &str) -> Result<NodeId, BackendError> {
        none()
    }

    fn papers(&self) -> Option<Papers> {
        None
    }

    async fn certificate_generations(&self) -> Vec<(NodeId, u64)> {
        Vec::new()
    }

    async fn prepare_rotation(
        &self,
        _: &Authority,
        _: &RecoveryKey,
        _: bool,
    ) -> Result<Prepared, BackendError> {
        none()
    }

    fn broker(&self) -> Result<Broker, BackendError> {
        none()
    }

    async fn node_check(&self, _: &Asker, _: NodeId) -> Result<NodeCheckReply, BackendError> {
        none()
    }

    async fn console(
        &self,
        _: &Asker,
        _: VmId,
        _: mpsc::Receiver<Vec<u8>>,
    ) -> Result<ConsoleChunks, BackendError> {
        none()
    }
}

fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

/// Three nodes, a volume, and `web-1` running on the first of them.
fn cluster() -> ClusterState {
    let mut state = ClusterState::default();
    let mut index = 0;
    let mut done = |state: &mut ClusterState, command: Command| -> Outcome {
        index += 1;
        let envelope = Envelope {
            request: RequestId(index.to_string()),
            actor: "test".into(),
            at_ms: index,
            asked: None,
            command,
        };
        let reply = state.apply(LogIndex(index), &envelope);
        reply.into_result().expect("done").1
    };
    done(
        &mut state,
        Command::InitCluster {
            id: "c".into(),
            name: name("test"),
            broker_uid: 5_000,
            node_name: name("n1"),
            address: "127.0.0.1:1".into(),
        },
    );
    done(
        &mut state,
        Command::RegisterNode {
            node: FIRST_NODE,
            incarnation: Incarnation(1),
            replaces: Incarnation(0),
            address: "127.0.0.1:1".into(),
            facts: NodeFacts {
                cpus: 8,
                memory_mib: 1_024,
                cpu_vendor: "AuthenticAMD".into(),
                version: "0.1.0".into(),
                stream_versions: (1, 1),
                kvm: true,
                ..NodeFacts::default()
            },
        },
    );
    // Alike in all but who they are.
    for number in [2, 3] {
        let node = Node {
            id: NodeId(number),
            name: name(&format!("n{number}")),
            ..state.nodes[&FIRST_NODE].clone()
        };
        state.nodes.insert(node.id, node);
    }
    done(
        &mut state,
        Command::AddVolume {
            name: name("shared"),
            url: "nfs://127.0.0.1/shared".into(),
            uuid: "v".into(),
            fence: FenceClass::GidToken,
            settle_ms: 0,
            size_bytes: 1 << 40,
            nodes: BTreeSet::new(),
            tls_ca: None,
        },
    );
    let created = done(
        &mut state,
        Command::CreateVm {
            name: name("web-1"),
            spec: VmSpec {
                vcpus: 1,
                memory_mib: 64,
                boot: Boot::SelfCheck {
                    working_set_mib: 4,
                    dirty_mib_s: 0,
                },
                disks: vec![DiskSpec {
                    volume: name("shared"),
                    path: "web-1.raw".into(),
                    size_bytes: 1 << 20,
                }],
                nics: Vec::new(),
                priority: 500,
                failover: true,
                on_isolation: OnIsolation::Freeze,
                downtime_max_ms: None,
                witness: None,
                tags: BTreeSet::from([name("web")]),
            },
            images: BTreeMap::new(),
            desired: Desired::Running,
        },
    );
    let Outcome::Vm(vm) = created else {
        panic!("{created:?}");
    };
    let expects = state.vms[&vm].ownership.token;
    let started = done(
        &mut state,
        Command::StartVm {
            vm,
            node: FIRST_NODE,
            expects,
            why: Why::default(),
        },
    );
    let Outcome::Token(token) = started else {
        panic!("{started:?}");
    };
    let node = FIRST_NODE;
    done(&mut state, Command::Activated { vm, node, token });
    state
}

/// Node 2 does not reach the volume, and only the leader has heard of it.
fn volume_down_at_2() -> Observed {
    let down = NodeLoad {
        volumes_down: BTreeSet::from([name("shared")]),
        ..NodeLoad::default()
    };
    Observed {
        nodes: BTreeMap::from([(NodeId(2), down)]),
        ..Observed::default()
    }
}

fn api(state: ClusterState, observed: Result<Observed, String>) -> AdminService {
    let (state, _) = watch::channel(Arc::new(state));
    AdminService::new(Arc::new(Fixed { state, observed }))
}

fn unknown() -> Result<Observed, String> {
    Err("nobody is known to lead".into())
}

fn change() -> Option<Change> {
    Some(Change {
        request_id: "r".into(),
        ..Change::default()
    })
}

fn local<T>(request: T) -> Request<T> {
    let mut request = Request::new(request);
    request.extensions_mut().insert(Caller {
        shown: Shown::Local { uid: 0 },
        from: "local".into(),
    });
    request
}

fn drain(dry_run: bool) -> Request<NodeDrainRequest> {
    local(NodeDrainRequest {
        change: change(),
        node: "n1".into(),
        dry_run,
    })
}

fn migrate() -> Request<VmMigrateRequest> {
    local(VmMigrateRequest {
        change: change(),
        name: "web-1".into(),
        ..VmMigrateRequest::default()
    })
}

fn code(status: &Status) -> (Code, &str) {
    let stable = status.metadata().get("baton-code");
    let stable = stable.and_then(|code| code.to_str().ok());
    (status.code(), stable.unwrap_or_default())
}

#[tokio::test]
async fn a_dry_run_and_a_move_without_a_destination_know_what_the_leader_knows() {
    // Of two alike the older is taken, unless it is known that the volume is down there.
    for (observed, expected) in [(Observed::default(), "n2"), (volume_down_at_2(), "n3")] {
        let service = api(cluster(), Ok(observed));
        let plan = Admin::node_drain(&service, drain(true)).await.unwrap();
        let moves = plan.into_inner().moves;
        assert_eq!(moves.len(), 1);
        assert_eq!(
            (moves[0].how.as_str(), moves[0].to.as_str()),
            ("live", expected)
        );

        Admin::vm_migrate(&service, migrate()).await.unwrap();
        let state = service.state();
        let queued = state.migrations.values().next().expect("a migration");
        assert_eq!(queued.cause, MigrationCause::Asked);
        assert_eq!(state.node_label(queued.to), expected);
    }
}

#[tokio::test]
async fn a_plan_that_would_not_be_the_leaders_is_not_made() {
    let service = api(cluster(), unknown());
    let expected = (Code::Unavailable, "E-NOREPORTS");
    let refused = Admin::node_drain(&service, drain(true)).await.unwrap_err();
    assert_eq!(code(&refused), expected);
    assert!(
        refused.message().contains("nobody is known to lead"),
        "{refused}"
    );
    let refused = Admin::node_drain(&service, drain(false)).await.unwrap_err();
    assert_eq!(code(&refused), expected);
    let refused = Admin::vm_migrate(&service, migrate()).await.unwrap_err();
    assert_eq!(code(&refused), expected);
    let back = NodeUncordonRequest {
        change: change(),
        node: "n1".into(),
        failback: true,
    };
    let refused = Admin::node_uncordon(&service, local(back))
        .await
        .unwrap_err();
    assert_eq!(code(&refused), expected);
    assert_eq!(*service.state(), cluster(), "nothing was changed");
}

#[tokio::test]
async fn a_node_of_which_nothing_is_known_says_so() {
    let list = async |observed| {
        let service = api(cluster(), observed);
        let list = Admin::node_list(&service, local(NodeListRequest::default())).await;
        let nodes = list.unwrap().into_inner().nodes;
        nodes.into_iter().map(|node| node.note).collect::<Vec<_>>()
    };
    for note in list(unknown()).await {
        assert_eq!(
            note,
            "what it reports is not known: nobody is known to lead"
        );
    }
    assert_eq!(list(Ok(Observed::default())).await, ["", "", ""]);
}

#[tokio::test]
async fn uncordon_leaves_the_return_to_the_leaders_planner() {
    let mut state = cluster();
    // As a drain leaves them: empty, and the machine at home there.
    state.nodes.get_mut(&NodeId(3)).expect("a node").duty = cluster_model::Duty::Drained;
    for vm in state.vms.values_mut() {
        vm.home = Some(NodeId(3));
    }
    let service = api(state, Ok(volume_down_at_2()));
    let back = NodeUncordonRequest {
        change: change(),
        node: "n3".into(),
        failback: true,
    };
    let reply = Admin::node_uncordon(&service, local(back)).await.unwrap();
    let moves = reply.into_inner().failback;
    assert_eq!(moves.len(), 1);
    assert_eq!(
        (
            moves[0].vm.as_str(),
            moves[0].how.as_str(),
            moves[0].to.as_str()
        ),
        ("web-1", "live", "n3")
    );
    let state = service.state();
    assert!(state.migrations.is_empty(), "the handler queues nothing");
    assert!(state.failbacks.contains_key(&NodeId(3)));
}

#[tokio::test]
async fn who_asks_decides_what_is_shown_in_any_task() {
    let service = api(cluster(), Ok(Observed::default()));
    // Whoever is not known is refused at the door, before there is an asker.
    let nobody = Request::new(VmListRequest::default());
    let refused = Admin::vm_list(&service, nobody).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    // The list of somebody narrowed to other machines is empty in a task of its own, too.
    let narrowed = |tag: &str| {
        let who = Who::Bearer(Bearer {
            token: "t".into(),
            user: name("ann"),
            role: Role::Viewer,
            tags: BTreeSet::from([name(tag)]),
        });
        Asker::of(who, cluster_model::Call::VmList)
    };
    for (tag, shown) in [("web", 1), ("db", 0)] {
        let (service, asker) = (service.clone(), narrowed(tag));
        let list = tokio::spawn(async move {
            AdminService::vm_list(&service, &asker, VmListRequest::default()).await
        });
        assert_eq!(list.await.unwrap().unwrap().vms.len(), shown, "{tag}");
    }
}
