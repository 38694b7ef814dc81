//! A node: what it serves from its first moment, how it comes to belong to a cluster, and its planned stop.
//!
//! ```text
//!  uninitialised ──init_cluster──► member of a new cluster
//!        └────────join──────────► member of the cluster that lets it in
//! ```
//! Which of them it is stands in `<data>/node.json`. [`NodeHandle`] is what the admin API works with.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cluster_model::trust::{Authority, Role, Sha256};
use cluster_model::{
    ClusterInfo, ClusterState, Command, FIRST_NODE, Incarnation, LogIndex, Name, NodeId, NodeRole,
    Observed, Outcome, RequestId, Settings, VmId,
};
use proto::peer::ObservedRequest;
use proto::peer::peer_client::PeerClient;
use proto::peer::raft_server::RaftServer;
use proto::token::{AccessToken, JoinToken, Secret};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Channel;

use crate::broker::Broker;
use crate::clock::Clock;
use crate::config::Config;
use crate::confine::{BROKER_UIDS, Confiner};
use crate::late::Late;
use crate::member::{CommandError, LeaseView, Member};
use crate::monitors::{Monitor, Monitors};
use crate::net::{self, Dialer};
use crate::raft::{self, ProposeError, RaftService, StartError};
use crate::report::{self, Reports};
use crate::trust::authority::{self, RootKey};
use crate::trust::{self, Door, Keeper, KeeperError, Papers, RecoveryKey};
use crate::{agent, controllers, heartbeat, leader, peer_service, volumes};

/// How long a node that makes or joins a cluster waits for itself to be in the log.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a question to another node may take.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// A planned stop: as long as the log may wait for `clusterd` to come back.
const ABSENCE: Duration = Duration::from_millis(cluster_model::ABSENT_MS_MAX as u64);
/// How long the steps of a planned stop may take together.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);
/// How long the first administrator's token is good, ms: 90 days.
const FIRST_TOKEN_MS: u64 = 90 * 24 * 3_600 * 1_000;
/// How long another node may take to take over the lead.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(3);

/// What a node keeps of itself beside its log.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    node: NodeId,
    name: Name,
    /// Whether its log was made: from then on it is never made anew under this number.
    has_log: bool,
}

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// Its folder cannot be used.
    #[error("cannot use the data directory {}: {source}", path.display())]
    DataDir {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another daemon uses the folder.
    #[error("another clusterd uses {}; stop it first", path.display())]
    Locked {
        /// Which.
        path: PathBuf,
    },
    /// What it keeps of itself is damaged.
    #[error("{} is damaged: {why}; restore it, or remove this node and let it join anew", path.display())]
    Identity {
        /// Which file.
        path: PathBuf,
        /// How.
        why: String,
    },
    /// It cannot be reached.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// Its log does not start.
    #[error(transparent)]
    Raft(#[from] StartError),
    /// Its certificate or key cannot be used.
    #[error(transparent)]
    Trust(#[from] KeeperError),
    /// Metrics cannot be served.
    #[error(transparent)]
    Metrics(#[from] crate::metrics::MetricsError),
}

/// Why a node does not come to belong to a cluster.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// It belongs to one already.
    #[error(
        "this node already belongs to a cluster (as {node}); to move it, remove it there and empty its data directory"
    )]
    AlreadyMember {
        /// As whom.
        node: NodeId,
    },
    /// The settings cannot be.
    #[error(transparent)]
    Settings(#[from] cluster_model::SettingsError),
    /// It did not start.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The log did not take it.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The line is not a join token, or one for another node.
    #[error("{0}")]
    Token(String),
    /// No certificate could be made.
    #[error(transparent)]
    Authority(#[from] trust::authority::AuthorityError),
    /// No member lets it in.
    #[error("this node was not let in: {why}")]
    Refused {
        /// What each of them says.
        why: String,
    },
    /// The log did not come.
    #[error("this node was let in, but the cluster's log did not reach it within {} s; can members reach {address}?", BEGIN_TIMEOUT.as_secs())]
    NoLog {
        /// Where this node says it is.
        address: String,
    },
}

/// Why soft state is not known.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// This node is in no cluster.
    #[error("this node belongs to no cluster yet; try: clusterctl cluster init")]
    NotMember,
    /// Nobody leads.
    #[error("nobody is known to lead the cluster at the moment")]
    NoLeader,
    /// The other node does not answer.
    #[error("{address} does not answer: {why}")]
    Silent {
        /// Which.
        address: String,
        /// Why.
        why: String,
    },
}

/// A cluster just made, with what is shown once.
#[derive(Debug)]
pub struct Founded {
    /// The cluster.
    pub cluster: ClusterInfo,
    /// Opens its root's key.
    pub recovery_key: RecoveryKey,
    /// The first administrator's.
    pub access_token: AccessToken,
}

/// Whose the first access token is.
fn first_user() -> Name {
    // A name by its form.
    Name::new("admin").unwrap_or_else(|_| unreachable!("`admin` is a name"))
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    handle: NodeHandle,
    serving: tokio::task::JoinHandle<()>,
    stop_serving: CancellationToken,
    _lock: std::fs::File,
}

/// What the admin API and the peer service work with. Clones are the same node.
#[derive(Clone, Debug)]
pub struct NodeHandle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: Config,
    clock: Clock,
    keeper: Keeper,
    door: Door,
    dialer: Dialer,
    member: watch::Sender<Option<Arc<Member>>>,
    raft_service: Late<RaftServer<RaftService<ClusterState>>>,
    /// One beginning at a time.
    beginning: tokio::sync::Mutex<()>,
    tasks: Mutex<JoinSet<()>>,
}

impl Node {
    /// Starts a node: serves, and takes up its place in its cluster if it has one. `more` may add services
    /// to what it serves beside those for peers.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub async fn start(
        config: Config,
        more: impl FnOnce(&NodeHandle, Routes) -> Routes,
    ) -> Result<Node, NodeError> {
        let data_dir = config.data_dir.clone();
        let in_dir = |source| NodeError::DataDir {
            path: data_dir.clone(),
            source,
        };
        std::fs::create_dir_all(&data_dir).map_err(in_dir)?;
        let lock = std::fs::File::create(data_dir.join("lock")).map_err(in_dir)?;
        if lock.try_lock().is_err() {
            return Err(NodeError::Locked { path: data_dir });
        }
        let identity = read_identity(&data_dir)?;
        let keeper = Keeper::open(&data_dir)?;
        let listener =
            TcpListener::bind(config.listen)
                .await
                .map_err(|source| NodeError::Listen {
                    address: config.listen.to_string(),
                    source,
                })?;
        let handle = NodeHandle {
            shared: Arc::new(Shared {
                dialer: Dialer::new(config.source_address(), keeper.clone()),
                door: Door::new(keeper.clone()),
                keeper,
                clock: Clock::default(),
                member: watch::channel(None).0,
                raft_service: Late::default(),
                beginning: tokio::sync::Mutex::default(),
                tasks: Mutex::default(),
                config,
            }),
        };
        let config = &handle.shared.config;
        let routes = Routes::new(peer_service::service(handle.clone()))
            .add_service(handle.shared.raft_service.clone());
        let routes = more(&handle, routes);
        let stop_serving = CancellationToken::new();
        let socket = config.admin_socket();
        let local = proto::unix::listen(&socket)
            .await
            .map_err(|source| NodeError::Listen {
                address: socket.display().to_string(),
                source,
            })?;
        let serving = serve(&handle, listener, local, routes, &stop_serving);
        let node = Node {
            handle,
            serving,
            stop_serving,
            _lock: lock,
        };
        if let Some(address) = node.handle.shared.config.metrics_listen {
            let served = crate::metrics::serve(address, node.handle.clone()).await?;
            node.handle.spawn(served);
        }
        if let Some(identity) = identity {
            node.handle.become_member(identity).await?;
        } else {
            tracing::info!("this node belongs to no cluster yet: it waits for init or join");
        }
        Ok(node)
    }

    /// What works with this node.
    pub fn handle(&self) -> NodeHandle {
        self.handle.clone()
    }

    /// A planned stop: the log is told of the absence, the guests run on, somebody else leads.
    pub async fn stop(self) {
        let member = self.handle.member();
        if let Some(member) = &member {
            let leave = self.handle.leave(member);
            if tokio::time::timeout(STOP_TIMEOUT, leave).await.is_err() {
                tracing::warn!("the stop was not announced in time; guests may pause");
            }
        }
        self.end(member).await;
    }

    /// Stops at once, as a crash would: nothing is announced. For tests.
    pub async fn crash(self) {
        let member = self.handle.member();
        self.handle.abort_tasks();
        self.end(member).await;
    }

    async fn end(self, member: Option<Arc<Member>>) {
        self.handle.abort_tasks();
        self.stop_serving.cancel();
        let _ = self.serving.await;
        if let Some(member) = member {
            member.monitors.let_go();
            member.raft.shutdown().await;
        }
    }
}

impl NodeHandle {
    /// What this node was started with.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// Its clocks.
    pub fn clock(&self) -> &Clock {
        &self.shared.clock
    }

    /// Its way to other nodes.
    pub fn dialer(&self) -> &Dialer {
        &self.shared.dialer
    }

    /// Its membership, once it belongs to a cluster.
    pub fn member(&self) -> Option<Arc<Member>> {
        self.shared.member.borrow().clone()
    }

    /// The newest state applied here; empty before the node belongs to a cluster.
    pub fn state(&self) -> Arc<ClusterState> {
        self.member()
            .map(|member| member.state())
            .unwrap_or_default()
    }

    /// Proposes a command for `actor`; done once for one `request`.
    ///
    /// # Errors
    /// See [`CommandError`].
    pub async fn propose(
        &self,
        actor: &str,
        request: RequestId,
        command: Command,
    ) -> Result<(LogIndex, Outcome), CommandError> {
        let member = self.member().ok_or(CommandError::Rejected(
            cluster_model::Rejection::NotInitialised,
        ))?;
        member.propose(actor, request, command).await
    }

    /// Makes a cluster of this node alone, with a certificate authority of its own.
    ///
    /// # Errors
    /// See [`BeginError`].
    pub async fn init_cluster(
        &self,
        actor: &str,
        name: Name,
        settings: Settings,
    ) -> Result<Founded, BeginError> {
        settings.validate()?;
        let _one = self.shared.beginning.lock().await;
        if let Some(member) = self.member() {
            // An earlier try may have got as far as a log without its trust; its certificate is then made anew.
            if member.state().trust.authority.is_some() || member.node != FIRST_NODE {
                return Err(BeginError::AlreadyMember { node: member.node });
            }
        }
        let keeper = &self.shared.keeper;
        let now_ms = self.shared.clock.wall_ms();
        let earlier = keeper.papers().map(|papers| papers.cluster);
        let id = earlier.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        let recovery = RecoveryKey::new().map_err(authority::AuthorityError::from)?;
        let root = RootKey::make(&recovery, now_ms)?;
        let issuing = root.issue(1, FIRST_NODE, now_ms)?;
        let key = keeper.public_key().map_err(NodeError::from)?;
        let own = authority::identity(&id, FIRST_NODE, NodeRole::Voter);
        let certified = issuing.certify(&own, &key, now_ms)?;
        let founding = Command::FoundTrust {
            authority: Authority {
                roots: vec![root.root.clone()],
                issuing: issuing.issuing.clone(),
            },
            first_node_key: key.hash(),
        };
        keeper.keep_issuing(issuing).map_err(NodeError::from)?;
        keeper
            .install(Papers {
                cluster: id.clone(),
                chain_pem: certified.chain_pem,
                ends_at_ms: certified.ends_at_ms,
                generation: certified.generation,
                roots: vec![root.root.certificate_pem.clone()],
                foreign: Default::default(),
            })
            .map_err(NodeError::from)?;
        let member = match self.member() {
            Some(member) => member,
            None => {
                let identity = self.identity(FIRST_NODE);
                self.become_member(identity).await?
            }
        };
        let config = &self.shared.config;
        member
            .raft
            .bootstrap(config.name.as_str(), &config.advertise)
            .await
            .map_err(CommandError::from)?;
        let propose = async |what: &str, command| {
            let request = RequestId(format!("init/{id}/{what}"));
            member.propose(actor, request, command).await
        };
        if member.state().cluster.is_none() {
            let command = Command::InitCluster {
                id: id.clone(),
                name,
                broker_uid: rand::random_range(BROKER_UIDS),
                node_name: config.name.clone(),
                address: config.advertise.clone(),
            };
            propose("cluster", command).await?;
        }
        propose("trust", founding).await?;
        if settings != Settings::default() {
            propose("settings", Command::SetSettings { settings }).await?;
        }
        let secret = Secret::new(&trust::random().map_err(authority::AuthorityError::from)?);
        let token = AccessToken {
            ca_sha256: root.root.fingerprint.to_string(),
            id: trust::new_id().map_err(authority::AuthorityError::from)?,
            secret,
        };
        let first = Command::CreateAccessToken {
            id: token.id.clone(),
            user: first_user(),
            role: Role::Admin,
            tags: Default::default(),
            secret_hash: Sha256(token.secret.hash()),
            expires_at_ms: now_ms.saturating_add(FIRST_TOKEN_MS),
        };
        propose("token", first).await?;
        let state = member.state();
        let cluster = state.cluster.clone().ok_or(CommandError::Rejected(
            cluster_model::Rejection::NotInitialised,
        ))?;
        Ok(Founded {
            cluster,
            recovery_key: recovery,
            access_token: token,
        })
    }

    /// Joins the cluster that made `line`, a join token.
    ///
    /// # Errors
    /// See [`BeginError`].
    pub async fn join(&self, line: &str) -> Result<(NodeId, ClusterInfo), BeginError> {
        let token = JoinToken::parse(line).map_err(|error| BeginError::Token(error.to_string()))?;
        let _one = self.shared.beginning.lock().await;
        if let Some(member) = self.member() {
            return Err(BeginError::AlreadyMember { node: member.node });
        }
        let config = &self.shared.config;
        if token.node != config.name.as_str() {
            return Err(BeginError::Token(format!(
                "this join token lets in a node named {}, and this one is {}; start it with --name {}, or make a token for {}: clusterctl node add {}",
                token.node, config.name, token.node, config.name, config.name
            )));
        }
        let keeper = &self.shared.keeper;
        let (node, papers) =
            trust::ask_to_join(&self.shared.dialer, keeper, &token, &config.advertise)
                .await
                .map_err(|why| BeginError::Refused { why })?;
        keeper.install(papers).map_err(NodeError::from)?;
        let member = self.become_member(self.identity(node)).await?;
        let mut state = member.raft.state();
        let there =
            state.wait_for(|state| state.cluster.is_some() && state.nodes.contains_key(&node));
        let no_log = || BeginError::NoLog {
            address: config.advertise.clone(),
        };
        let state = tokio::time::timeout(BEGIN_TIMEOUT, there)
            .await
            .map_err(|_| no_log())?
            .map_err(|_| no_log())?
            .clone();
        let cluster = state.cluster.clone().ok_or_else(no_log)?;
        Ok((node, cluster))
    }

    /// What nodes reported to the leader lately.
    ///
    /// # Errors
    /// See [`AskError`].
    pub async fn reports(&self) -> Result<Reports, AskError> {
        let member = self.member().ok_or(AskError::NotMember)?;
        if member.raft.leadership().borrow().is_me {
            let now_ns = member.clock.boottime_ns();
            return Ok(report::aged(&member.leader.reports().borrow(), now_ns));
        }
        let reports = self.told_by_leader(&member, ObservedRequest { for_plans: false });
        reports.await.map(Arc::new)
    }

    /// What the leader's planners are fed with at the moment.
    ///
    /// # Errors
    /// See [`AskError`].
    pub async fn observed(&self) -> Result<Observed, AskError> {
        let member = self.member().ok_or(AskError::NotMember)?;
        if member.raft.leadership().borrow().is_me {
            let reports = member.leader.reports().borrow().clone();
            return Ok(report::observed(&member.state(), &reports));
        }
        self.told_by_leader(&member, ObservedRequest { for_plans: true })
            .await
    }

    async fn told_by_leader<T: DeserializeOwned>(
        &self,
        member: &Member,
        request: ObservedRequest,
    ) -> Result<T, AskError> {
        let address = member.raft.leadership().borrow().address.clone();
        let address = address.ok_or(AskError::NoLeader)?;
        let mut client = PeerClient::new(self.channel(&address)?)
            .max_decoding_message_size(net::MESSAGE_BYTES_MAX);
        let reply = ask(&address, client.observed(request)).await?;
        if !reply.not_leader.is_empty() {
            return Err(AskError::NoLeader);
        }
        serde_json::from_slice(&reply.observed).map_err(|error| AskError::Silent {
            address,
            why: error.to_string(),
        })
    }

    /// This node's monitor of a machine that it owns, for its console.
    pub fn monitor_of(&self, vm: VmId) -> Option<Monitor> {
        let member = self.member()?;
        let state = member.state();
        let owned = state.vms.get(&vm)?.ownership.owner == Some(member.node);
        let table = member.monitors.table().borrow().clone();
        table
            .values()
            .filter(|monitor| owned && monitor.vm() == vm)
            .max_by_key(|monitor| monitor.token())
            .cloned()
    }

    /// The channel to the node that owns a machine, to pass a request on to it.
    ///
    /// # Errors
    /// When its address cannot be.
    pub fn owner_channel(&self, vm: VmId) -> Result<Option<Channel>, AskError> {
        let state = self.state();
        let owner = state
            .vms
            .get(&vm)
            .and_then(|vm| vm.ownership.owner)
            .and_then(|owner| state.nodes.get(&owner));
        owner.map(|owner| self.channel(&owner.address)).transpose()
    }

    /// The channel to a node, to pass a request on to it.
    ///
    /// # Errors
    /// When there is none of that number, or its address cannot be.
    pub fn node_channel(&self, node: NodeId) -> Result<Channel, AskError> {
        let state = self.state();
        let node = state.nodes.get(&node).ok_or_else(|| AskError::Silent {
            address: node.to_string(),
            why: "it is not in the cluster".into(),
        })?;
        self.channel(&node.address)
    }

    fn channel(&self, address: &str) -> Result<Channel, AskError> {
        self.shared
            .dialer
            .channel(address)
            .map_err(|error| AskError::Silent {
                address: address.to_owned(),
                why: error.to_string(),
            })
    }

    fn identity(&self, node: NodeId) -> Identity {
        Identity {
            node,
            name: self.shared.config.name.clone(),
            has_log: false,
        }
    }

    /// Takes up this node's place: its log, its monitors, and the tasks that keep them in agreement.
    async fn become_member(&self, mut identity: Identity) -> Result<Arc<Member>, NodeError> {
        let shared = &self.shared;
        let config = &shared.config;
        let data_dir = &config.data_dir;
        let failed = |source| NodeError::DataDir {
            path: data_dir.clone(),
            source,
        };
        write_identity(data_dir, &identity).map_err(failed)?;
        let mut options = raft::Options::new(identity.node, data_dir.join("raft"));
        options.create = !identity.has_log;
        let broker = Broker::new(config.broker.clone(), data_dir, config.source_address());
        let confiner = Confiner::of_host(config.monitor_uids, data_dir);
        let (raft, monitors) = tokio::join!(
            raft::start::<ClusterState>(options, shared.dialer.clone()),
            Monitors::recover(config.vmm.clone(), data_dir, confiner)
        );
        let raft = raft?;
        let monitors = monitors.map_err(failed)?;
        if !identity.has_log {
            identity.has_log = true;
            write_identity(data_dir, &identity).map_err(failed)?;
        }
        shared.raft_service.set(raft.service());
        let member = Arc::new(Member {
            node: identity.node,
            incarnation: incarnation(),
            config: config.clone(),
            clock: shared.clock.clone(),
            dialer: shared.dialer.clone(),
            keeper: shared.keeper.clone(),
            raft,
            broker,
            monitors,
            held: Mutex::default(),
            lease: watch::channel(LeaseView::default()).0,
            session_since: watch::channel(None).0,
            leader: leader::Leader::default(),
            volumes_down: watch::channel(Default::default()).0,
            cluster: Default::default(),
            measured: Mutex::default(),
        });
        tracing::info!(node = %member.node, name = %config.name, address = config.advertise, "this node is a member");
        self.spawn(trust::keep_current(
            self.clone(),
            member.clone(),
            shared.door.clone(),
        ));
        self.spawn(heartbeat::register(member.clone()));
        self.spawn(heartbeat::renew(member.clone()));
        self.spawn(leader::declare_lost(member.clone()));
        self.spawn(agent::run(member.clone()));
        self.spawn(controllers::planners(member.clone()));
        self.spawn(controllers::membership(member.clone()));
        self.spawn(volumes::watch(member.clone()));
        let for_broker = member.clone();
        self.spawn(async move {
            // Ready before the first machine needs it.
            if let Err(error) = for_broker.broker.ensure().await {
                tracing::warn!(%error, "no storage broker yet");
            }
        });
        shared.member.send_replace(Some(member.clone()));
        Ok(member)
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self
            .shared
            .tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        tasks.spawn(task);
    }

    fn abort_tasks(&self) {
        let mut tasks = self
            .shared
            .tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *tasks = JoinSet::new();
    }

    /// The steps of a planned stop.
    async fn leave(&self, member: &Arc<Member>) {
        self.abort_tasks();
        match heartbeat::announce_absence(member, ABSENCE).await {
            Ok(()) => tracing::info!(absence_s = ABSENCE.as_secs(), "absence announced"),
            Err(error) => tracing::warn!(%error, "the absence was not announced; guests may pause"),
        }
        if !member.raft.is_leader() {
            return;
        }
        let status = member.raft.metrics();
        let successor = status
            .members
            .iter()
            .filter(|(id, status)| **id != member.node && status.voter)
            .max_by_key(|(_, status)| status.matched)
            .map(|(id, _)| *id);
        if let Some(successor) = successor {
            match member
                .raft
                .transfer_leadership(successor, TRANSFER_TIMEOUT)
                .await
            {
                Ok(()) => tracing::info!(to = %successor, "the lead is handed over"),
                Err(error) => tracing::warn!(%error, "the lead was not handed over"),
            }
        }
    }
}

/// Serves the same to peers on the network and to `clusterctl` on this host.
fn serve(
    node: &NodeHandle,
    listener: TcpListener,
    local: tokio_stream::wrappers::UnixListenerStream,
    routes: Routes,
    stop: &CancellationToken,
) -> tokio::task::JoinHandle<()> {
    let judge: trust::Judge = {
        let node = node.clone();
        Arc::new(move |caller, path| trust::judge(&node.state(), caller, path))
    };
    let for_peers = {
        let (door, judge) = (node.shared.door.clone(), judge.clone());
        let (routes, stop) = (routes.clone(), stop.clone());
        async move { net::serve(listener, &door, judge, routes, stop.cancelled_owned()).await }
    };
    let for_host = tonic::transport::Server::builder()
        .layer(trust::Guard::new(judge))
        .add_routes(routes)
        .serve_with_incoming_shutdown(trust::local_guests(local), stop.clone().cancelled_owned());
    let stop = stop.clone();
    tokio::spawn(async move {
        let host = tokio::spawn(async move {
            if let Err(error) = for_host.await {
                tracing::error!(%error, "this node no longer answers on its socket");
            }
        });
        if let Err(error) = for_peers.await {
            tracing::error!(%error, "this node can no longer be reached");
        }
        stop.cancelled().await;
        // Streams that clusterctl follows do not hold the stop up.
        host.abort();
    })
}

async fn ask<T>(
    address: &str,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, AskError> {
    let silent = |why: String| AskError::Silent {
        address: address.to_owned(),
        why,
    };
    match tokio::time::timeout(ASK_TIMEOUT, call).await {
        Ok(Ok(reply)) => Ok(reply.into_inner()),
        Ok(Err(status)) => Err(silent(status.message().to_owned())),
        Err(_) => Err(silent("no answer in time".to_owned())),
    }
}

/// Which life of its host this is: from the kernel's boot id.
fn incarnation() -> Incarnation {
    let boot_id = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    // 0 means "never registered".
    Incarnation(xxhash_rust::xxh3::xxh3_64(boot_id.trim_ascii()).max(1))
}

fn identity_path(data_dir: &Path) -> PathBuf {
    data_dir.join("node.json")
}

fn read_identity(data_dir: &Path) -> Result<Option<Identity>, NodeError> {
    let path = identity_path(data_dir);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(NodeError::DataDir { path, source }),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| NodeError::Identity {
            path,
            why: error.to_string(),
        })
}

/// Written whole or not at all.
fn write_identity(data_dir: &Path, identity: &Identity) -> io::Result<()> {
    use std::io::Write;
    let path = identity_path(data_dir);
    let new = path.with_extension("new");
    let mut file = std::fs::File::create(&new)?;
    file.write_all(&serde_json::to_vec_pretty(identity)?)?;
    file.sync_all()?;
    std::fs::rename(&new, &path)?;
    std::fs::File::open(data_dir)?.sync_all()
}

impl From<ProposeError> for BeginError {
    fn from(error: ProposeError) -> BeginError {
        BeginError::Command(error.into())
    }
}
