//! A Raft group in one process: real sockets on loopback, real stores in a temporary directory. Each node's tasks
//! run on a runtime of their own, so that a crash takes all of them at once, wherever they are.

// Each test file uses its own part of this.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use cluster_model::{NodeId, NodeRole};
use clusterd::net::{self, Dialer};
use clusterd::raft::{self, Machine, Options, RaftHandle, StartError, StoreError, Timing};
use clusterd::trust::ephemeral::Authority;
use clusterd::trust::{Door, Judge, Keeper};
use proto::peer::peer_server::{Peer, PeerServer};
use proto::peer::{
    HeartbeatReply, HeartbeatRequest, HostFactsReply, HostFactsRequest, IssuingKeyReply,
    IssuingKeyRequest, JoinCheckReply, JoinCheckRequest, JoinReply, JoinRequest, ObservedReply,
    ObservedRequest, PrepareIncomingReply, PrepareIncomingRequest, ProposeReply, ProposeRequest,
    ReadIndexReply, ReadIndexRequest, RenewReply, RenewRequest, SourceProgressReply,
    SourceProgressRequest,
};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

/// Bound of every wait: an election takes a second at most, a loaded machine many.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A map that does each request once and remembers the order of everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notes {
    pub values: BTreeMap<String, String>,
    pub done: BTreeMap<u64, u64>,
    pub history: Vec<u64>,
}

/// Sets a value, once for each request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Set {
    pub request: u64,
    pub key: String,
    pub value: String,
}

impl Machine for Notes {
    type Command = Set;
    /// The index of the entry that did it first.
    type Reply = u64;

    fn apply(&mut self, index: u64, command: &Set) -> u64 {
        if let Some(first) = self.done.get(&command.request) {
            return *first;
        }
        self.done.insert(command.request, index);
        self.history.push(command.request);
        self.values
            .insert(command.key.clone(), command.value.clone());
        index
    }
}

pub fn set(request: u64) -> Set {
    Set {
        request,
        key: format!("key{}", request % 10),
        value: format!("value{request}"),
    }
}

pub type Handle = RaftHandle<Notes>;

/// Only what the log needs of a peer.
struct LogPeer(Handle);

#[tonic::async_trait]
impl Peer for LogPeer {
    async fn heartbeat(
        &self,
        _: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatReply>, Status> {
        Err(Status::unimplemented("this peer has only a log"))
    }
    async fn propose(
        &self,
        request: Request<ProposeRequest>,
    ) -> Result<Response<ProposeReply>, Status> {
        self.0
            .serve_propose(request.into_inner())
            .await
            .map(Response::new)
    }
    async fn read_index(
        &self,
        request: Request<ReadIndexRequest>,
    ) -> Result<Response<ReadIndexReply>, Status> {
        self.0
            .serve_read_index(request.into_inner())
            .await
            .map(Response::new)
    }
    async fn prepare_incoming(
        &self,
        _: Request<PrepareIncomingRequest>,
    ) -> Result<Response<PrepareIncomingReply>, Status> {
        Err(Status::unimplemented("this peer has only a log"))
    }
    async fn join(&self, _: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        Err(Status::unimplemented("this peer has only a log"))
    }
    async fn join_check(
        &self,
        _: Request<JoinCheckRequest>,
    ) -> Result<Response<JoinCheckReply>, Status> {
        Err(Status::unimplemented("this peer has only a log"))
    }
    async fn host_facts(
        &self,
        _: Request<HostFactsRequest>,
    ) -> Result<Response<HostFactsReply>, Status> {
        Err(Status::unimplemented("this peer has only a log"))
    }
    async fn renew(&self, _: Request<RenewRequest>) -> Result<Response<RenewReply>, Status> {
        Err(Status::unimplemented("this peer has only a log"))
    }
    async fn issuing_key(
        &self,
        _: Request<IssuingKeyRequest>,
    ) -> Result<Response<IssuingKeyReply>, Status> {
        Err(Status::unimplemented("this peer has only a log"))
    }
    async fn source_progress(
        &self,
        _: Request<SourceProgressRequest>,
    ) -> Result<Response<SourceProgressReply>, Status> {
        Err(Status::unimplemented("this peer has only a log"))
    }
    async fn observed(
        &self,
        _: Request<ObservedRequest>,
    ) -> Result<Response<ObservedReply>, Status> {
        Err(Status::unimplemented("this peer has only a log"))
    }
}

pub struct Node {
    pub id: NodeId,
    pub address: SocketAddr,
    pub dialer: Dialer,
    keeper: Keeper,
    door: Door,
    dir: PathBuf,
    running: Option<Running>,
}

struct Running {
    handle: Handle,
    stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
    tasks: Tasks,
}

/// Where a node's tasks run; dropping it drops them where they are.
struct Tasks(Option<Runtime>);

impl Tasks {
    fn new() -> Tasks {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build();
        Tasks(Some(runtime.expect("a runtime")))
    }

    fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        self.0.as_ref().expect("it runs").spawn(task)
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        // Waits for nothing: a runtime may not be waited for by a task of another.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Node {
    pub fn handle(&self) -> &Handle {
        &self.running.as_ref().expect("the node runs").handle
    }

    pub fn dir(&self) -> &PathBuf {
        &self.dir
    }

    pub fn runs(&self) -> bool {
        self.running.is_some()
    }
}

pub struct Cluster {
    pub nodes: BTreeMap<u64, Node>,
    pub settings: Settings,
    dir: tempfile::TempDir,
    net: [u8; 2],
    authority: Authority,
}

/// Clusters made by this process, so that each has its own addresses.
static CLUSTERS: AtomicU8 = AtomicU8::new(1);

#[derive(Clone, Copy)]
pub struct Settings {
    pub snapshot_every: u64,
    pub keep: u64,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            snapshot_every: 5_000,
            keep: 1_000,
        }
    }
}

impl Cluster {
    /// Nodes 1 to `count`, all voters, node 1 leading.
    pub async fn start(count: u64, settings: Settings) -> Cluster {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let net = [
            1 + (std::process::id() % 250) as u8,
            CLUSTERS.fetch_add(1, Ordering::Relaxed),
        ];
        let mut cluster = Cluster {
            nodes: BTreeMap::new(),
            settings,
            dir,
            net,
            authority: Authority::new().expect("an authority"),
        };
        for id in 1..=count {
            cluster.add_node(id).await;
        }
        let first = cluster.node(1).handle().clone();
        first
            .bootstrap("n1", &cluster.node(1).address.to_string())
            .await
            .expect("bootstrap");
        first
            .leadership()
            .wait_for(|now| now.is_me)
            .await
            .expect("node 1 leads");
        for id in 2..=count {
            cluster.join(id).await;
        }
        cluster
    }

    /// Makes a node with an empty log, not yet a member of anything.
    pub async fn add_node(&mut self, id: u64) {
        // Every node has an address of its own: while it is stopped, no connection of the others takes
        // its port as a source port.
        let ip = Ipv4Addr::new(127, self.net[0], self.net[1], 10 + id as u8);
        let listener = TcpListener::bind((ip, 0)).await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let keeper = self
            .authority
            .keeper(NodeId(id), NodeRole::Voter)
            .expect("papers");
        let door = Door::new(keeper.clone());
        let dialer = Dialer::new(IpAddr::V4(ip), keeper.clone());
        let dir = self.dir.path().join(format!("n{id}"));
        self.nodes.insert(
            id,
            Node {
                id: NodeId(id),
                address,
                dialer,
                keeper,
                door,
                dir,
                running: None,
            },
        );
        self.run(id, listener, true).await;
    }

    /// Lets a node in as a voter.
    pub async fn join(&self, id: u64) {
        let leader = self.leader().await;
        let address = self.node(id).address.to_string();
        leader
            .add_learner(NodeId(id), &format!("n{id}"), &address)
            .await
            .expect("add a learner");
        leader
            .promote(NodeId(id), PATIENCE)
            .await
            .expect("promote it");
    }

    async fn run(&mut self, id: u64, listener: TcpListener, create: bool) {
        let options = self.options(id, create);
        let node = self.nodes.get_mut(&id).expect("the node");
        let tasks = Tasks::new();
        let (dialer, door) = (node.dialer.clone(), node.door.clone());
        let handle = eventually("the node starts", || {
            let (options, dialer) = (options.clone(), dialer.clone());
            let starting = tasks.spawn(raft::start::<Notes>(options, dialer));
            async move {
                match starting.await.expect("it ends") {
                    Ok(handle) => Some(handle),
                    // After a crash the store is locked until the last of the old tasks is gone.
                    Err(StartError::Store(StoreError::Open { .. })) => None,
                    Err(refused) => panic!("n{id} does not start: {refused:?}"),
                }
            }
        })
        .await;
        let mut routes = Routes::builder();
        routes.add_service(handle.service());
        routes.add_service(PeerServer::new(LogPeer(handle.clone())));
        let (stop, stopped) = oneshot::channel::<()>();
        let listener = listener.into_std().expect("a listener of the system's");
        let server = tasks.spawn(async move {
            let stopped = async move {
                let _ = stopped.await;
            };
            let listener = TcpListener::from_std(listener).expect("on this runtime");
            // These tests are about the log; who may speak is looked at elsewhere.
            let judge: Judge = Arc::new(|_, _| Ok(()));
            net::serve(listener, &door, judge, routes.routes(), stopped)
                .await
                .expect("serve");
        });
        node.running = Some(Running {
            handle,
            stop,
            server,
            tasks,
        });
    }

    pub fn options(&self, id: u64, create: bool) -> Options {
        Options {
            create,
            timing: Timing::fast(),
            snapshot_every: self.settings.snapshot_every,
            keep: self.settings.keep,
            ..Options::new(NodeId(id), self.node(id).dir.clone())
        }
    }

    pub fn node(&self, id: u64) -> &Node {
        &self.nodes[&id]
    }

    /// A node dies where it stands: nothing is finished, flushed or said, and its tasks are gone. The store is
    /// locked for as long as the test holds a handle of this node.
    pub fn crash(&mut self, id: u64) {
        let node = self.nodes.get_mut(&id).expect("the node");
        drop(node.running.take().expect("it runs"));
        // The old one's connections were served by tasks that are gone.
        node.dialer = Dialer::new(node.address.ip(), node.keeper.clone());
    }

    /// Stops a node in good order: its server, its log, its store.
    pub async fn stop(&mut self, id: u64) {
        let running = self
            .nodes
            .get_mut(&id)
            .expect("the node")
            .running
            .take()
            .expect("it runs");
        let _ = running.stop.send(());
        running.handle.shutdown().await;
        running.server.await.expect("its server ends");
    }

    /// Starts it again at the same address with the log it has.
    pub async fn restart(&mut self, id: u64) {
        let address = self.node(id).address;
        let listener = eventually("the port is free again", || async {
            TcpListener::bind(address).await.ok()
        })
        .await;
        self.run(id, listener, false).await;
    }

    pub fn running(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values().filter(|node| node.runs())
    }

    /// The leader, once a quorum confirms it.
    pub async fn leader(&self) -> Handle {
        eventually("somebody leads", || async {
            for node in self.running() {
                if node.handle().is_leader() && node.handle().confirm_leadership().await.is_ok() {
                    return Some(node.handle().clone());
                }
            }
            None
        })
        .await
    }

    /// Cuts a node off from all others, both ways.
    pub fn cut_off(&self, id: u64) {
        for other in self.nodes.values().filter(|other| other.id.0 != id) {
            other.dialer.links().cut(self.node(id).address);
            self.node(id).dialer.links().cut(other.address);
        }
    }

    pub fn heal(&self, id: u64) {
        for other in self.nodes.values().filter(|other| other.id.0 != id) {
            other.dialer.links().heal(self.node(id).address);
            self.node(id).dialer.links().heal(other.address);
        }
    }

    /// Waits until every running node has applied what the leader has, and their states are the same.
    pub async fn settle(&self) -> Notes {
        let leader = self.leader().await;
        let index = leader.read_index().await.expect("a read index");
        let expected = (**leader.state().borrow()).clone();
        for node in self.running() {
            node.handle()
                .wait_applied(index, PATIENCE)
                .await
                .expect("it catches up");
            let state = node.handle().state().borrow().clone();
            assert_eq!(
                state.digest(),
                expected.digest(),
                "{} has another state",
                node.id
            );
            assert_eq!(*state, expected, "{} has another state", node.id);
        }
        expected
    }
}

/// Asks again and again until there is an answer.
pub async fn eventually<T, F>(what: &str, mut ask: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
