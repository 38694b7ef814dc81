//! A node for the admin API that has a log of its own and nothing else: no peers, no broker, no monitors.

use std::sync::Arc;

use async_trait::async_trait;
use cluster_model::trust::Authority;
use cluster_model::{ClusterState, Envelope, LogIndex, Name, NodeId, Observed, Reply, VmId};
use clusterd::admin::soft::Soft;
use clusterd::admin::{AdminService, Asker, Backend, BackendError, ConsoleChunks};
use clusterd::broker::Broker;
use clusterd::node::Founded;
use clusterd::raft::RaftStatus;
use clusterd::trust::{Caller, Papers, Prepared, RecoveryKey, Shown};
use proto::admin::admin_server::Admin;
use proto::admin::{
    BalanceStatusRequest, LeaseListRequest, MigrationListRequest, NodeCheckReply,
    NodeDrainStatusRequest, NodeListRequest, RuleListRequest, VmListRequest, VolumeListRequest,
    WhyRequest,
};
use tokio::sync::{mpsc, watch};
use tonic::Request;

/// The node.
#[derive(Debug)]
pub struct Alone {
    state: watch::Sender<Arc<ClusterState>>,
}

#[async_trait]
impl Backend for Alone {
    fn name(&self) -> String {
        "n1".into()
    }

    fn wall_ms(&self) -> u64 {
        2_000_000
    }

    fn state(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.state.subscribe()
    }

    fn raft(&self) -> Option<RaftStatus> {
        None
    }

    async fn soft(&self) -> Soft {
        Soft::default()
    }

    async fn observed(&self) -> Result<Observed, BackendError> {
        Ok(Observed::default())
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
        Err(BackendError::InCluster("c".into()))
    }

    async fn join(&self, _: &str) -> Result<NodeId, BackendError> {
        Err(BackendError::InCluster("c".into()))
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
        Err(BackendError::Failed("there is no key".into()))
    }

    fn broker(&self) -> Result<Broker, BackendError> {
        Err(BackendError::Failed("there is no broker".into()))
    }

    async fn node_check(&self, _: &Asker, _: NodeId) -> Result<NodeCheckReply, BackendError> {
        Err(BackendError::Failed("there is no host".into()))
    }

    async fn console(
        &self,
        _: &Asker,
        _: VmId,
        _: mpsc::Receiver<Vec<u8>>,
    ) -> Result<ConsoleChunks, BackendError> {
        Err(BackendError::Failed("there is no console".into()))
    }
}

impl Alone {
    /// The admin API of a cluster in that state.
    pub fn api(state: ClusterState) -> AdminService {
        let (state, _) = watch::channel(Arc::new(state));
        AdminService::new(Arc::new(Alone { state }))
    }
}

/// A request of whoever sits on the node.
pub fn local<T>(request: T) -> Request<T> {
    let mut request = Request::new(request);
    request.extensions_mut().insert(Caller {
        shown: Shown::Local { uid: 0 },
        from: "local".into(),
    });
    request
}

/// Shows all of a state as people see it.
pub async fn look_at_everything(state: &ClusterState) {
    let service = Alone::api(state.clone());
    let _ = Admin::node_list(&service, local(NodeListRequest::default())).await;
    let _ = Admin::vm_list(&service, local(VmListRequest::default())).await;
    let _ = Admin::volume_list(&service, local(VolumeListRequest::default())).await;
    let _ = Admin::lease_list(&service, local(LeaseListRequest::default())).await;
    let _ = Admin::rule_list(&service, local(RuleListRequest::default())).await;
    let all = MigrationListRequest {
        all: true,
        vm: String::new(),
    };
    let _ = Admin::migration_list(&service, local(all)).await;
    let _ = Admin::balance_status(&service, local(BalanceStatusRequest::default())).await;
    for node in state.nodes.values() {
        let node = node.name.to_string();
        let drained = NodeDrainStatusRequest { node: node.clone() };
        let _ = Admin::node_drain_status(&service, local(drained)).await;
        why(&service, format!("node/{node}")).await;
    }
    for vm in state.vms.values() {
        why(&service, format!("vm/{}", vm.name)).await;
    }
    for migration in state.migrations.keys() {
        why(&service, format!("migration/{migration}")).await;
    }
}

async fn why(service: &AdminService, object: String) {
    let request = WhyRequest {
        object,
        not_on: String::new(),
    };
    let _ = Admin::why(service, local(request)).await;
}
