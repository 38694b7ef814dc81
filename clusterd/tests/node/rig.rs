//! Nodes of a test: each with a folder and a loopback address of its own.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use clap::Parser;
use cluster_model::trust::Sha256;
use cluster_model::{ClusterState, Command, Name, NodeId, NodeRole, RequestId, Settings};
use clusterd::admin::AdminService;
use clusterd::config::{Cli, Config};
use clusterd::node::{Node, NodeHandle};
use clusterd::trust::RecoveryKey;
use proto::token::{JoinToken, Secret};

/// No condition of these tests takes longer on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// A test's nodes.
pub struct Rig {
    pub folder: tempfile::TempDir,
    subnet: (u8, u8),
    programs: (PathBuf, PathBuf),
    /// Nodes that are started at another address than at first.
    pub moved: std::collections::BTreeSet<usize>,
    pub nodes: Vec<Option<Node>>,
}

/// Addresses that no other test of this machine uses at the same time.
fn subnet() -> (u8, u8) {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed) as u32 + std::process::id() * 4;
    ((100 + number / 250 % 100) as u8, (number % 250) as u8)
}

impl Rig {
    /// No node yet; monitors and brokers are these programs.
    pub fn new(vmm: &Path, broker: &Path) -> Rig {
        clusterd::telemetry::init();
        Rig {
            folder: tempfile::Builder::new().prefix("bn").tempdir().unwrap(),
            subnet: subnet(),
            programs: (vmm.to_owned(), broker.to_owned()),
            moved: Default::default(),
            nodes: Vec::new(),
        }
    }

    /// A rig whose nodes never start a machine.
    pub fn without_machines() -> Rig {
        Rig::new(Path::new("/bin/false"), Path::new("/bin/false"))
    }

    pub fn ip(&self, number: usize) -> IpAddr {
        let (second, third) = self.subnet;
        let at = if self.moved.contains(&number) {
            110
        } else {
            10
        };
        Ipv4Addr::new(127, second, third, at + number as u8).into()
    }

    pub fn address(&self, number: usize) -> SocketAddr {
        SocketAddr::new(self.ip(number), 7440)
    }

    pub fn config(&self, number: usize) -> Config {
        let data_dir = self.folder.path().join(format!("n{number}"));
        let flags = [
            "clusterd".to_owned(),
            format!("--data-dir={}", data_dir.display()),
            format!("--name=n{number}"),
            format!("--listen={}", self.address(number)),
            "--memory-mib=1024".to_owned(),
            "--cpus=4".to_owned(),
            format!("--vmm={}", self.programs.0.display()),
            format!("--broker={}", self.programs.1.display()),
        ];
        Cli::try_parse_from(flags).unwrap().load().unwrap()
    }

    /// Starts node `number` (from 1).
    pub async fn start(&mut self, number: usize) -> NodeHandle {
        let node = Node::start(self.config(number), |handle, routes| {
            routes.add_service(AdminService::of(handle.clone()))
        })
        .await
        .unwrap();
        let handle = node.handle();
        self.nodes
            .resize_with(self.nodes.len().max(number), || None);
        self.nodes[number - 1] = Some(node);
        handle
    }

    pub fn take(&mut self, number: usize) -> Node {
        self.nodes[number - 1].take().unwrap()
    }

    pub fn handle(&self, number: usize) -> NodeHandle {
        self.nodes[number - 1].as_ref().unwrap().handle()
    }

    /// A cluster of `count` nodes, all of them up and voting.
    pub async fn cluster(&mut self, count: usize, settings: Settings) {
        self.cluster_with_key(count, settings).await;
    }

    /// The same; gives the recovery key that is shown once.
    pub async fn cluster_with_key(&mut self, count: usize, settings: Settings) -> RecoveryKey {
        let first = self.start(1).await;
        let founded = first
            .init_cluster("test", Name::new("lab").unwrap(), settings)
            .await
            .unwrap();
        for number in 2..=count {
            self.join(number, NodeRole::Voter).await;
        }
        for number in 1..=count {
            self.until(number, "every node is up", |state| {
                state.nodes.len() == count
                    && state
                        .nodes
                        .values()
                        .all(|node| node.liveness == cluster_model::Liveness::Up)
            })
            .await;
        }
        self.all_vote(count).await;
        founded.recovery_key
    }

    /// Waits until there are as many votes as `count` nodes make: before that, a node that stops may be half of
    /// the quorum.
    async fn all_vote(&self, count: usize) {
        let raft = self.handle(1).member().unwrap().raft.clone();
        // An odd number, at most five.
        let expected = (count - (count + 1) % 2).min(5);
        eventually("the voters are chosen", || {
            let status = raft.metrics();
            let voters = status.members.values().filter(|known| known.voter);
            !status.joint && voters.count() == expected
        })
        .await;
    }

    /// Starts node `number` and lets it in.
    pub async fn join(&mut self, number: usize, role: NodeRole) -> NodeHandle {
        let token = self.token(&format!("n{number}"), role).await;
        let node = self.start(number).await;
        node.join(&token.line()).await.unwrap();
        node
    }

    /// A join token, made by node 1.
    pub async fn token(&self, node: &str, role: NodeRole) -> JoinToken {
        let first = self.handle(1);
        let state = first.state();
        let root = &state.trust.authority.as_ref().unwrap().roots[0];
        let token = JoinToken {
            cluster: state.cluster.as_ref().unwrap().id.clone(),
            ca_sha256: root.fingerprint.to_string(),
            addresses: vec![self.address(1).to_string()],
            id: format!("for-{node}"),
            secret: Secret::new(&clusterd::trust::random().unwrap()),
            node: node.to_owned(),
            expires_at_ms: first.clock().wall_ms() + 600_000,
        };
        let command = Command::CreateJoinToken {
            id: token.id.clone(),
            node: Name::new(node).unwrap(),
            role,
            secret_hash: Sha256(token.secret.hash()),
            expires_at_ms: token.expires_at_ms,
        };
        let request = RequestId(format!("token-for-{node}"));
        first.propose("test", request, command).await.unwrap();
        token
    }

    /// Waits until node `number`'s replica shows something.
    pub async fn until(&self, number: usize, what: &str, holds: impl Fn(&ClusterState) -> bool) {
        let member = self.handle(number).member().unwrap();
        let mut state = member.raft.state();
        let seen = state.wait_for(|state| holds(state));
        let seen = tokio::time::timeout(PATIENCE, seen).await.is_ok();
        assert!(
            seen,
            "n{number} never saw that {what}: {:#?}",
            member.state().nodes
        );
    }

    pub fn node_id(&self, number: usize) -> NodeId {
        self.handle(number).member().unwrap().node
    }

    /// Ends whatever runs in the folders of the nodes.
    fn end_processes(&self) {
        let folder = self.folder.path();
        for _ in 0..100 {
            let left = clusterd::process::of_folder(folder);
            if left.is_empty() {
                break;
            }
            for pid in left {
                clusterd::process::kill(pid, folder);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        for number in 1..=self.nodes.len() {
            let data_dir = folder.join(format!("n{number}"));
            clusterd::cgroups::Groups::of_host(&data_dir).sweep();
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.end_processes();
    }
}

/// Waits for a condition that nothing announces.
pub async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
