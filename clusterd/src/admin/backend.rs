//! What the admin API needs of the node it runs in.

use std::sync::Arc;

use async_trait::async_trait;
use cluster_model::trust::Authority;
use cluster_model::{ClusterState, Envelope, NodeId, Observed, Reply, VmId};
use proto::admin::NodeCheckReply;
use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::asker::Asker;
use super::soft::Soft;
use crate::broker::Broker;
use crate::node::Founded;
use crate::raft::RaftStatus;
use crate::trust::{Papers, Prepared, RecoveryKey};

/// Output of a console, or why it ended.
pub type ConsoleChunks = mpsc::Receiver<Result<Vec<u8>, Status>>;

/// Why the node could not do what the API asked of it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BackendError {
    /// This node is in no cluster.
    #[error(
        "this node is in no cluster; make one: clusterctl cluster init, or let it into one: clusterctl node add"
    )]
    NoCluster,
    /// It is in one already.
    #[error("this node is in a cluster already ({0})")]
    InCluster(String),
    /// No answer in time; whether the change was made is not known.
    #[error(
        "no quorum answered in time ({0}); whether the change was made is not known: ask again with the same --request-id"
    )]
    NoQuorum(String),
    /// The leader, who alone has what nodes report, did not tell it.
    #[error(
        "what nodes report is not known ({0}), and a plan without it would not be the leader's; try again, or see: clusterctl status"
    )]
    NoReports(String),
    /// Something else.
    #[error("{0}")]
    Failed(String),
}

/// The node, as the admin API sees it.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// This node's name.
    fn name(&self) -> String;
    /// The wall clock, ms since the Unix epoch.
    fn wall_ms(&self) -> u64;
    /// The replicated state as this node has applied it.
    fn state(&self) -> watch::Receiver<Arc<ClusterState>>;
    /// The log's status here; `None` while the node is in no cluster.
    fn raft(&self) -> Option<RaftStatus>;
    /// The nodes' soft state: the leader's, or where no leader answers what this node knows itself; then it says
    /// so ([`Soft::unknown`]).
    async fn soft(&self) -> Soft;
    /// What the leader's planners are fed with: a plan that is shown is the one that it would carry out.
    async fn observed(&self) -> Result<Observed, BackendError>;
    /// Hands a command to the leader and waits until it was applied here too.
    /// `credential`: what the person behind it showed.
    async fn propose(
        &self,
        envelope: Envelope,
        credential: Option<&str>,
    ) -> Result<Reply, BackendError>;
    /// Whether a quorum confirms, now, that what this node has applied is current.
    async fn confirm(&self) -> Result<(), BackendError>;
    /// Makes a cluster of this node.
    async fn init_cluster(
        &self,
        name: cluster_model::Name,
        fast: bool,
        actor: &str,
    ) -> Result<Founded, BackendError>;
    /// Joins the cluster that made the join token.
    async fn join(&self, token: &str) -> Result<NodeId, BackendError>;
    /// This node's papers; `None` before it belongs to a cluster.
    fn papers(&self) -> Option<Papers>;
    /// The generation of the CA that made its certificate, of each node of which it is known.
    async fn certificate_generations(&self) -> Vec<(NodeId, u64)>;
    /// Makes a new issuing CA, and a new root if asked, and keeps its key here until the log lets it sign.
    async fn prepare_rotation(
        &self,
        authority: &Authority,
        recovery: &RecoveryKey,
        new_root: bool,
    ) -> Result<Prepared, BackendError>;
    /// This node's storage broker.
    fn broker(&self) -> Result<Broker, BackendError>;
    /// Looks at the host of a node, there.
    async fn node_check(&self, asker: &Asker, node: NodeId)
    -> Result<NodeCheckReply, BackendError>;
    /// The serial console of a machine, wherever it runs; what arrives on `typed` is sent to it.
    async fn console(
        &self,
        asker: &Asker,
        vm: VmId,
        typed: mpsc::Receiver<Vec<u8>>,
    ) -> Result<ConsoleChunks, BackendError>;
}
