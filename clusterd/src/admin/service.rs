//! The generated service's methods: each proves who asks, and hands its request to the file of its noun.

use std::pin::Pin;
use std::sync::Arc;

use cluster_model::{
    ClusterState, Command, Envelope, LogIndex, Name, Node, Outcome, RequestId, Volume,
};
use futures::Stream;
use proto::admin::admin_server::{Admin, AdminServer};
use proto::admin::*;
use tonic::{Request, Response, Status, Streaming};

use super::asker::Asker;
use super::backend::Backend;
use super::error::{bad_name, invalid, not_found, rejected};
use super::views;

/// The longest id that a client may choose for a request, bytes.
const REQUEST_ID_BYTES_MAX: usize = 128;
/// The longest name of an actor, bytes.
const ACTOR_BYTES_MAX: usize = 128;

/// A stream of answers.
pub type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The admin API of one node.
#[derive(Clone)]
pub struct AdminService {
    pub(super) backend: Arc<dyn Backend>,
}

impl AdminService {
    /// The API of that node.
    pub fn new(backend: Arc<dyn Backend>) -> AdminService {
        AdminService { backend }
    }

    /// The API of a running node, ready to be served.
    pub fn of(node: crate::node::NodeHandle) -> AdminServer<AdminService> {
        let backend = super::NodeBackend::new(node);
        AdminServer::new(AdminService::new(Arc::new(backend)))
    }

    /// The replicated state as applied here.
    pub(super) fn state(&self) -> Arc<ClusterState> {
        self.backend.state().borrow().clone()
    }

    /// The replicated state, refusing where there is no cluster yet.
    pub(super) fn cluster_state(&self) -> Result<Arc<ClusterState>, Status> {
        let state = self.state();
        if state.cluster.is_some() {
            Ok(state)
        } else {
            Err(super::BackendError::NoCluster.into())
        }
    }

    /// Proposes a command under the id that the client chose.
    pub(super) async fn propose(
        &self,
        change: &Asked<'_>,
        command: Command,
    ) -> Result<(LogIndex, Outcome), Status> {
        self.propose_as(&change.request, change, command).await
    }

    /// Proposes one of several commands of one request, each under an id of its own.
    pub(super) async fn propose_part(
        &self,
        change: &Asked<'_>,
        part: &str,
        command: Command,
    ) -> Result<(LogIndex, Outcome), Status> {
        self.propose_as(&format!("{}/{part}", change.request), change, command)
            .await
    }

    async fn propose_as(
        &self,
        request: &str,
        change: &Asked<'_>,
        command: Command,
    ) -> Result<(LogIndex, Outcome), Status> {
        let envelope = Envelope {
            request: RequestId(request.to_owned()),
            actor: change.actor.clone(),
            at_ms: self.backend.wall_ms(),
            asked: Some(change.asker.record(&change.reason)),
            command,
        };
        self.backend
            .propose(envelope, change.asker.credential())
            .await?
            .into_result()
            .map_err(|rejection| rejected(&self.state(), &rejection))
    }
}

/// Who asks for a change, parsed.
pub(super) struct Asked<'a> {
    pub(super) asker: &'a Asker,
    pub(super) request: String,
    pub(super) actor: String,
    pub(super) reason: String,
}

/// Parses what every change carries.
pub(super) fn asked(asker: &Asker, change: Option<Change>) -> Result<Asked<'_>, Status> {
    let change = change.ok_or_else(|| {
        invalid("the request carries no `change`; use a clusterctl of this version")
    })?;
    let fits = |text: &str, max: usize| text.len() <= max && !text.chars().any(char::is_control);
    if change.request_id.is_empty() || !fits(&change.request_id, REQUEST_ID_BYTES_MAX) {
        return Err(invalid(format!(
            "--request-id: 1 to {REQUEST_ID_BYTES_MAX} printable characters"
        )));
    }
    if !fits(&change.actor, ACTOR_BYTES_MAX) || !fits(&change.reason, 1_024) {
        return Err(invalid(
            "actor and reason: printable characters, 128 and 1,024 bytes at most",
        ));
    }
    Ok(Asked {
        asker,
        request: format!("api/{}", change.request_id),
        // Who proved to be somebody is that one, whatever the request says.
        actor: asker.name(&change.actor),
        reason: change.reason,
    })
}

/// Parses a name.
pub(super) fn name(text: &str) -> Result<Name, Status> {
    Name::new(text).map_err(|error| bad_name(&error))
}

/// The node of that name.
pub(super) fn node_named<'s>(state: &'s ClusterState, text: &str) -> Result<&'s Node, Status> {
    let name = name(text.strip_prefix("node/").unwrap_or(text))?;
    state
        .node_named(&name)
        .ok_or_else(|| not_found(state, "node", name.as_str()))
}

/// The machine of that name.
pub(super) fn vm_named<'s>(
    asker: &Asker,
    state: &'s ClusterState,
    text: &str,
) -> Result<&'s cluster_model::Vm, Status> {
    let text = text.strip_prefix("vm/").unwrap_or(text);
    let vm = views::vm_named(state, text);
    asker.may_touch(vm)?;
    vm.ok_or_else(|| not_found(state, "vm", text))
}

/// The volume of that name.
pub(super) fn volume_named<'s>(state: &'s ClusterState, text: &str) -> Result<&'s Volume, Status> {
    let name = name(text.strip_prefix("volume/").unwrap_or(text))?;
    state
        .volume_named(&name)
        .ok_or_else(|| not_found(state, "volume", name.as_str()))
}

/// The migration with that id.
pub(super) fn migration_named<'s>(
    asker: &Asker,
    state: &'s ClusterState,
    text: &str,
) -> Result<&'s cluster_model::Migration, Status> {
    let text = text.strip_prefix("migration/").unwrap_or(text);
    let migration = views::parse_migration(state, text);
    asker.may_touch(migration.and_then(|migration| state.vms.get(&migration.vm)))?;
    migration.ok_or_else(|| not_found(state, "migration", text))
}

/// Writes the methods that only hand on.
macro_rules! hand_on {
    ($($method:ident($request:ty) -> $reply:ty;)*) => {
        #[tonic::async_trait]
        impl Admin for AdminService {
            $(
                async fn $method(&self, request: Request<$request>) -> Result<Response<$reply>, Status> {
                    // A call's request is called after it.
                    let name = stringify!($request).trim_end_matches("Request");
                    let asker = self.asker(name, &request)?;
                    let reply = AdminService::$method(self, &asker, request.into_inner()).await?;
                    Ok(Response::new(reply))
                }
            )*

            type VmConsoleStream = Answers<VmConsoleOutput>;
            async fn vm_console(
                &self,
                request: Request<Streaming<VmConsoleInput>>,
            ) -> Result<Response<Self::VmConsoleStream>, Status> {
                let asker = self.asker("VmConsole", &request)?;
                let answers = AdminService::vm_console(self, &asker, request.into_inner()).await?;
                Ok(Response::new(answers))
            }

            type MigrationWatchStream = Answers<MigrationView>;
            async fn migration_watch(
                &self,
                request: Request<MigrationWatchRequest>,
            ) -> Result<Response<Self::MigrationWatchStream>, Status> {
                let asker = self.asker("MigrationWatch", &request)?;
                let answers = AdminService::migration_watch(self, &asker, request.into_inner()).await?;
                Ok(Response::new(answers))
            }

            type EventsStream = Answers<EventView>;
            async fn events(&self, request: Request<EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
                let asker = self.asker("Events", &request)?;
                let answers = AdminService::events(self, &asker, request.into_inner()).await?;
                Ok(Response::new(answers))
            }
        }
    };
}

hand_on! {
    version(VersionRequest) -> VersionReply;
    cluster_init(ClusterInitRequest) -> ClusterInitReply;
    cluster_status(ClusterStatusRequest) -> ClusterStatusReply;
    settings_get(SettingsGetRequest) -> SettingsReply;
    settings_set(SettingsSetRequest) -> SettingsReply;
    node_list(NodeListRequest) -> NodeListReply;
    node_add(NodeAddRequest) -> NodeAddReply;
    node_join(NodeJoinRequest) -> NodeJoinReply;
    join_token_list(JoinTokenListRequest) -> JoinTokenListReply;
    join_token_revoke(JoinTokenRevokeRequest) -> Done;
    node_check(NodeCheckRequest) -> NodeCheckReply;
    node_remove(NodeRemoveRequest) -> Done;
    node_drain(NodeDrainRequest) -> DrainPlan;
    node_drain_status(NodeDrainStatusRequest) -> DrainStatus;
    node_uncordon(NodeUncordonRequest) -> NodeUncordonReply;
    vm_create(VmCreateRequest) -> VmReply;
    vm_list(VmListRequest) -> VmListReply;
    vm_start(VmStartRequest) -> VmReply;
    vm_stop(VmStopRequest) -> VmReply;
    vm_delete(VmDeleteRequest) -> Done;
    vm_migrate(VmMigrateRequest) -> VmMigrateReply;
    volume_add(VolumeAddRequest) -> VolumeView;
    volume_list(VolumeListRequest) -> VolumeListReply;
    volume_remove(VolumeRemoveRequest) -> Done;
    lease_list(LeaseListRequest) -> LeaseListReply;
    migration_list(MigrationListRequest) -> MigrationListReply;
    migration_cancel(MigrationCancelRequest) -> MigrationView;
    why(WhyRequest) -> WhyReply;
    balance_run(BalanceRunRequest) -> BalancePlan;
    balance_status(BalanceStatusRequest) -> BalancePlan;
    rule_set(RuleSetRequest) -> Done;
    rule_list(RuleListRequest) -> RuleListReply;
    token_create(TokenCreateRequest) -> TokenCreateReply;
    token_list(TokenListRequest) -> TokenListReply;
    token_revoke(TokenRevokeRequest) -> Done;
    audit_list(AuditListRequest) -> AuditListReply;
    ca_show(CaShowRequest) -> CaShowReply;
    ca_rotate(CaRotateRequest) -> CaRotateReply;
    trust_add(TrustAddRequest) -> Done;
    trust_list(TrustListRequest) -> TrustListReply;
    trust_remove(TrustRemoveRequest) -> Done;
}
