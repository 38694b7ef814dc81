//! A node behind the admin API.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use cluster_model::trust::Authority;
use cluster_model::{ClusterState, Envelope, Name, NodeId, Observed, Reply, Settings, VmId};
use proto::admin::admin_client::AdminClient;
use proto::admin::{MonitorCheck, NodeCheckReply, NodeCheckRequest, VmConsoleInput};
use proto::monitor::ConsoleInput;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::asker::Asker;
use super::backend::{Backend, BackendError, ConsoleChunks};
use super::soft::{Soft, SoftNode};
use crate::broker::Broker;
use crate::check;
use crate::member::PROPOSE_TIMEOUT;
use crate::node::{AskError, BeginError, Founded, NodeHandle};
use crate::raft::RaftStatus;
use crate::report::{NodeReport, Reporter};
use crate::trust::{self, Papers, Prepared, RecoveryKey};

/// How long an entry that the leader applied may take to be applied here.
const APPLY_TIMEOUT: Duration = Duration::from_secs(8);
/// How long a linearizable read may take before the answer is that there is no quorum.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the leader may take to tell the nodes' soft state.
const REPORTS_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a plan waits for a leader to tell what it rests on, and how often it asks meanwhile.
const LEADER_PATIENCE: Duration = Duration::from_secs(5);
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// How long a node may take to look at itself: its volumes above all.
const CHECK_TIMEOUT: Duration = Duration::from_secs(25);
/// Chunks of console output that wait for a slow reader.
const CONSOLE_QUEUE: usize = 64;

/// That node.
pub struct NodeBackend {
    node: NodeHandle,
    /// Shown as the state of a node that is in no cluster yet.
    empty: watch::Sender<Arc<ClusterState>>,
}

impl NodeBackend {
    /// That node.
    pub fn new(node: NodeHandle) -> NodeBackend {
        NodeBackend {
            node,
            empty: watch::channel(Arc::default()).0,
        }
    }

    fn begin_failed(&self, error: BeginError) -> BackendError {
        match error {
            BeginError::AlreadyMember { .. } => {
                BackendError::InCluster(format!("as {}", self.name()))
            }
            other => BackendError::Failed(other.to_string()),
        }
    }
}

/// What the leader tells, or why it is not known.
async fn in_time<T>(asked: impl Future<Output = Result<T, AskError>>) -> Result<T, String> {
    match tokio::time::timeout(REPORTS_TIMEOUT, asked).await {
        Ok(told) => told.map_err(|error| error.to_string()),
        Err(_) => Err(format!(
            "the leader did not answer within {} s",
            REPORTS_TIMEOUT.as_secs()
        )),
    }
}

/// A report as views want it.
fn soft_node(report: &NodeReport, heartbeat_ms: u64) -> SoftNode {
    let age_ms = report.age_ms;
    let left = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
    SoftNode {
        monitors: report.monitors.clone(),
        lease_left_ms: Some(left(report.lease_left_ms) - left(age_ms)),
        lease_slack_ms: report.lease_slack_ms.map(left),
        cpu_load: f64::from(report.cpu_permille) / 1_000.0,
        isolated: age_ms > heartbeat_ms.saturating_mul(3),
    }
}

#[async_trait]
impl Backend for NodeBackend {
    fn name(&self) -> String {
        self.node.config().name.to_string()
    }

    fn wall_ms(&self) -> u64 {
        self.node.clock().wall_ms()
    }

    fn state(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.node
            .member()
            .map_or_else(|| self.empty.subscribe(), |member| member.raft.state())
    }

    fn raft(&self) -> Option<RaftStatus> {
        self.node.member().map(|member| member.raft.metrics())
    }

    async fn soft(&self) -> Soft {
        let heartbeat_ms = u64::from(self.node.state().settings.heartbeat_ms);
        let mut soft = Soft::default();
        match in_time(self.node.reports()).await {
            Ok(reports) => {
                soft.nodes = reports
                    .iter()
                    .map(|(&id, report)| (id, soft_node(report, heartbeat_ms)))
                    .collect();
            }
            Err(why) => soft.unknown = Some(why),
        }
        // What this node knows of itself is newer than what the leader was told.
        if let Some(member) = self.node.member() {
            let report = Reporter::default().report(&member);
            let mut own = soft_node(&report, heartbeat_ms);
            if let Some(told) = soft.nodes.get(&member.node) {
                own.cpu_load = told.cpu_load;
            }
            soft.nodes.insert(member.node, own);
        }
        soft
    }

    async fn observed(&self) -> Result<Observed, BackendError> {
        let member = self.node.member().ok_or(BackendError::NoCluster)?;
        let mut leadership = member.raft.leadership();
        let until = tokio::time::Instant::now() + LEADER_PATIENCE;
        // While a leader is being chosen a plan waits for it, as a change does.
        loop {
            let why = match in_time(self.node.observed()).await {
                Ok(observed) => return Ok(observed),
                Err(why) => why,
            };
            if tokio::time::Instant::now() >= until {
                return Err(BackendError::NoReports(why));
            }
            tokio::select! {
                changed = leadership.changed() => if changed.is_err() {
                    return Err(BackendError::NoReports(why));
                },
                () = tokio::time::sleep(ASK_AGAIN) => {}
            }
        }
    }

    async fn propose(
        &self,
        envelope: Envelope,
        credential: Option<&str>,
    ) -> Result<Reply, BackendError> {
        let member = self.node.member().ok_or(BackendError::NoCluster)?;
        let applied = member
            .raft
            .propose_for(&envelope, credential, PROPOSE_TIMEOUT)
            .await
            .map_err(|error| BackendError::NoQuorum(error.to_string()))?;
        member
            .raft
            .wait_applied(applied.index, APPLY_TIMEOUT)
            .await
            .map_err(|error| BackendError::NoQuorum(error.to_string()))?;
        Ok(applied.reply)
    }

    async fn confirm(&self) -> Result<(), BackendError> {
        let member = self.node.member().ok_or(BackendError::NoCluster)?;
        let read = async {
            let index = member
                .raft
                .read_index()
                .await
                .map_err(|error| error.to_string())?;
            member
                .raft
                .wait_applied(index, CONFIRM_TIMEOUT)
                .await
                .map_err(|error| error.to_string())
        };
        match tokio::time::timeout(CONFIRM_TIMEOUT, read).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => Err(BackendError::NoQuorum(why)),
            Err(_) => Err(BackendError::NoQuorum(format!(
                "no answer in {} s",
                CONFIRM_TIMEOUT.as_secs()
            ))),
        }
    }

    async fn init_cluster(
        &self,
        name: Name,
        fast: bool,
        actor: &str,
    ) -> Result<Founded, BackendError> {
        let settings = if fast {
            Settings::fast()
        } else {
            Settings::default()
        };
        self.node
            .init_cluster(actor, name, settings)
            .await
            .map_err(|error| self.begin_failed(error))
    }

    async fn join(&self, token: &str) -> Result<NodeId, BackendError> {
        self.node
            .join(token)
            .await
            .map(|(node, _)| node)
            .map_err(|error| self.begin_failed(error))
    }

    fn papers(&self) -> Option<Papers> {
        self.node.member()?.keeper.papers()
    }

    async fn certificate_generations(&self) -> Vec<(NodeId, u64)> {
        match in_time(self.node.reports()).await {
            Ok(reports) => reports
                .iter()
                .map(|(node, report)| (*node, report.trust.generation))
                .collect(),
            Err(why) => {
                tracing::info!(why, "the nodes' certificates are not known");
                Vec::new()
            }
        }
    }

    async fn prepare_rotation(
        &self,
        authority: &Authority,
        recovery: &RecoveryKey,
        new_root: bool,
    ) -> Result<Prepared, BackendError> {
        let member = self.node.member().ok_or(BackendError::NoCluster)?;
        trust::prepare_rotation(&member, authority, recovery, new_root)
            .map_err(|error| BackendError::Failed(error.to_string()))
    }

    fn broker(&self) -> Result<Broker, BackendError> {
        self.node
            .member()
            .map(|member| member.broker.clone())
            .ok_or(BackendError::NoCluster)
    }

    async fn node_check(
        &self,
        asker: &Asker,
        node: NodeId,
    ) -> Result<NodeCheckReply, BackendError> {
        let member = self.node.member().ok_or(BackendError::NoCluster)?;
        let state = member.state();
        let label = state.node_label(node);
        if node == member.node {
            let checked = check::node::check(&member).await;
            return Ok(NodeCheckReply {
                node: label,
                checks: checked.findings.into_iter().map(Into::into).collect(),
                monitors: checked
                    .monitors
                    .into_iter()
                    .map(|monitor| MonitorCheck {
                        vm: state
                            .vms
                            .get(&monitor.vm)
                            .map_or_else(|| monitor.vm.to_string(), |vm| vm.name.to_string()),
                        pid: monitor.pid,
                        measures: monitor.measures.into_iter().map(Into::into).collect(),
                    })
                    .collect(),
            });
        }
        let silent = |why: String| {
            BackendError::Failed(format!(
                "{label} cannot be asked: {why}; on it: systemctl status clusterd"
            ))
        };
        let channel = self
            .node
            .node_channel(node)
            .map_err(|error| silent(error.to_string()))?;
        // It answers for itself: whoever it is by the log, it is not handed on a second time.
        let mut request = tonic::Request::new(NodeCheckRequest {
            node: String::new(),
        });
        asker.hand_on(request.metadata_mut());
        let mut client = AdminClient::new(channel);
        let asked = tokio::time::timeout(CHECK_TIMEOUT, client.node_check(request)).await;
        match asked {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(status)) => Err(silent(status.message().to_owned())),
            Err(_) => Err(silent(format!(
                "no answer within {} s",
                CHECK_TIMEOUT.as_secs()
            ))),
        }
    }

    async fn console(
        &self,
        asker: &Asker,
        vm: VmId,
        typed: mpsc::Receiver<Vec<u8>>,
    ) -> Result<ConsoleChunks, BackendError> {
        let failed = |status: Status| {
            BackendError::Failed(format!(
                "the console cannot be reached: {}",
                status.message()
            ))
        };
        if let Some(monitor) = self.node.monitor_of(vm) {
            let input = ReceiverStream::new(typed).map(|data| ConsoleInput { data });
            let output = monitor.console(input).await.map_err(failed)?;
            return Ok(pass_on(output, |chunk| chunk.data));
        }
        let channel = self
            .node
            .owner_channel(vm)
            .map_err(|error| BackendError::Failed(error.to_string()))?
            .ok_or_else(|| BackendError::Failed("the machine does not run".into()))?;
        // Its owner answers for it; the first message names it.
        let first = tokio_stream::once(VmConsoleInput {
            name: vm.to_string(),
            data: Vec::new(),
        });
        let rest = ReceiverStream::new(typed).map(|data| VmConsoleInput {
            name: String::new(),
            data,
        });
        let mut request = tonic::Request::new(first.chain(rest));
        asker.hand_on(request.metadata_mut());
        let output = AdminClient::new(channel)
            .vm_console(request)
            .await
            .map_err(failed)?
            .into_inner();
        Ok(pass_on(output, |chunk| chunk.data))
    }
}

/// Carries a stream of chunks into a channel.
fn pass_on<T: Send + 'static>(mut from: Streaming<T>, data: fn(T) -> Vec<u8>) -> ConsoleChunks {
    let (sender, receiver) = mpsc::channel(CONSOLE_QUEUE);
    tokio::spawn(async move {
        loop {
            let chunk = match from.message().await {
                Ok(Some(chunk)) => Ok(data(chunk)),
                Ok(None) => return,
                Err(status) => Err(status),
            };
            let ended = chunk.is_err();
            if sender.send(chunk).await.is_err() || ended {
                return;
            }
        }
    });
    receiver
}
