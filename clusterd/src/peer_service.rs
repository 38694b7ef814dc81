//! What other nodes ask of this one.

use std::sync::Arc;

use cluster_model::trust::Sha256;
use cluster_model::{Envelope, MigrationId, MigrationState, NodeId};
use proto::peer::peer_server::{Peer, PeerServer};
use proto::peer::{
    HeartbeatReply, HeartbeatRequest, HostFactsReply, HostFactsRequest, IssuingKeyReply,
    IssuingKeyRequest, JoinCheckReply, JoinCheckRequest, JoinReply, JoinRequest, ObservedReply,
    ObservedRequest, PrepareIncomingReply, PrepareIncomingRequest, ProposeReply, ProposeRequest,
    ReadIndexReply, ReadIndexRequest, RenewReply, RenewRequest, SourceProgressReply,
    SourceProgressRequest,
};
use tonic::{Request, Response, Status};

use crate::agent::summary;
use crate::check;
use crate::leader;
use crate::member::Member;
use crate::monitors::MonitorError;
use crate::net::MESSAGE_BYTES_MAX;
use crate::node::NodeHandle;
use crate::report;
use crate::trust::{self, Caller, Shown};

/// The service, for the routes of [`crate::net::serve`].
pub fn service(node: NodeHandle) -> PeerServer<PeerService> {
    PeerServer::new(PeerService { node })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

/// Answers peers.
#[derive(Debug)]
pub struct PeerService {
    node: NodeHandle,
}

impl PeerService {
    fn member(&self) -> Result<Arc<Member>, Status> {
        self.node.member().ok_or_else(|| {
            Status::unavailable("this node belongs to no cluster yet; try: clusterctl node add")
        })
    }
}

/// Who calls; every connection says.
fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    request
        .extensions()
        .get::<Caller>()
        .cloned()
        .ok_or_else(|| Status::unauthenticated("it is not known who calls"))
}

/// The node that calls, by its certificate, which must be the one that it says it is.
fn node_of<T>(request: &Request<T>, says: u64) -> Result<NodeId, Status> {
    match caller(request)?.shown {
        Shown::Node(identity) if identity.node.0 == says => Ok(identity.node),
        Shown::Node(identity) => {
            tracing::warn!(node = %identity.node, says, "a node speaks for another");
            Err(Status::permission_denied(format!(
                "{} cannot speak for {}",
                identity.node,
                NodeId(says)
            )))
        }
        Shown::Local { .. } | Shown::Foreign(_) | Shown::Nothing => Err(Status::unauthenticated(
            "it takes a node's certificate to speak for a node",
        )),
    }
}

#[tonic::async_trait]
impl Peer for PeerService {
    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatReply>, Status> {
        let member = self.member()?;
        node_of(&request, request.get_ref().node_id)?;
        Ok(Response::new(
            leader::answer(&member, request.into_inner()).await,
        ))
    }

    async fn propose(
        &self,
        request: Request<ProposeRequest>,
    ) -> Result<Response<ProposeReply>, Status> {
        let member = self.member()?;
        let from = node_of(&request, request.get_ref().from_node)?;
        let request = request.into_inner();
        may_propose(&member, from, &request)?;
        let reply = member.raft.serve_propose(request).await?;
        Ok(Response::new(reply))
    }

    async fn read_index(
        &self,
        request: Request<ReadIndexRequest>,
    ) -> Result<Response<ReadIndexReply>, Status> {
        let member = self.member()?;
        let reply = member.raft.serve_read_index(request.into_inner()).await?;
        Ok(Response::new(reply))
    }

    async fn prepare_incoming(
        &self,
        request: Request<PrepareIncomingRequest>,
    ) -> Result<Response<PrepareIncomingReply>, Status> {
        let member = self.member()?;
        node_of(&request, request.get_ref().from_node)?;
        let reply = incoming(&member, request.into_inner()).await;
        Ok(Response::new(reply))
    }

    async fn source_progress(
        &self,
        request: Request<SourceProgressRequest>,
    ) -> Result<Response<SourceProgressReply>, Status> {
        let member = self.member()?;
        let migration = MigrationId(request.into_inner().migration_id);
        let progress = summary::of_source(&member, migration)
            .await
            .map(|progress| serde_json::to_vec(&progress).unwrap_or_default())
            .unwrap_or_default();
        Ok(Response::new(SourceProgressReply { progress }))
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        let member = self.member()?;
        let from = caller(&request)?.from;
        let reply = trust::answer_join(&member, request.into_inner(), &from).await;
        Ok(Response::new(reply))
    }

    async fn join_check(
        &self,
        request: Request<JoinCheckRequest>,
    ) -> Result<Response<JoinCheckReply>, Status> {
        let member = self.member()?;
        let from = caller(&request)?.from;
        let reply = trust::answer_join_check(&member, request.into_inner(), &from).await;
        Ok(Response::new(reply))
    }

    async fn host_facts(
        &self,
        _request: Request<HostFactsRequest>,
    ) -> Result<Response<HostFactsReply>, Status> {
        let member = self.member()?;
        Ok(Response::new(check::node::host_facts(&member).await))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewReply>, Status> {
        let member = self.member()?;
        Ok(Response::new(trust::answer_renew(
            &member,
            request.get_ref(),
        )))
    }

    async fn issuing_key(
        &self,
        request: Request<IssuingKeyRequest>,
    ) -> Result<Response<IssuingKeyReply>, Status> {
        let member = self.member()?;
        let caller = caller(&request)?;
        Ok(Response::new(trust::answer_issuing_key(
            &member,
            request.get_ref(),
            &caller,
        )))
    }

    async fn observed(
        &self,
        request: Request<ObservedRequest>,
    ) -> Result<Response<ObservedReply>, Status> {
        let member = self.member()?;
        let leadership = member.raft.leadership().borrow().clone();
        let reply = if leadership.is_me {
            let reports = member.leader.reports().borrow().clone();
            let observed = if request.get_ref().for_plans {
                serde_json::to_vec(&report::observed(&member.state(), &reports))
            } else {
                let now_ns = member.clock.boottime_ns();
                serde_json::to_vec(&*report::aged(&reports, now_ns))
            };
            ObservedReply {
                observed: observed.map_err(|error| Status::internal(error.to_string()))?,
                ..ObservedReply::default()
            }
        } else {
            ObservedReply {
                not_leader: format!("{} does not lead", member.node),
                ..ObservedReply::default()
            }
        };
        Ok(Response::new(reply))
    }
}

/// Whether a node may hand this command on; what it may is the log's own rule.
fn may_propose(member: &Member, from: NodeId, request: &ProposeRequest) -> Result<(), Status> {
    let envelope: Envelope = serde_json::from_slice(&request.command)
        .map_err(|error| Status::invalid_argument(format!("the command is malformed: {error}")))?;
    let state = member.state();
    let shown = proto::token::parse_bearer(&request.credential);
    let who = match shown {
        None => None,
        Some((id, secret)) => Some(
            state
                .bearer(id, &Sha256(secret.hash()), member.clock.wall_ms())
                .map_err(|refusal| Status::unauthenticated(refusal.to_string()))?,
        ),
    };
    state
        .may_propose(from, who.as_ref(), &envelope)
        .map_err(|refusal| {
            tracing::warn!(node = %from, %refusal, "a node asks for what it may not");
            // `InvalidArgument` says that nothing was written: asking again does not help.
            Status::invalid_argument(refusal.to_string())
        })
}

/// Where the monitor of an incoming migration listens, once it knows whom to let in. The agent makes it as soon as
/// the migration's start is applied here; until then, and while it is built, the answer is "not yet".
async fn incoming(member: &Member, request: PrepareIncomingRequest) -> PrepareIncomingReply {
    let id = MigrationId(request.migration_id);
    let state = member.state();
    let refused = |why: String| PrepareIncomingReply {
        refused: why,
        ..PrepareIncomingReply::default()
    };
    match state.migrations.get(&id) {
        Some(migration) if migration.to != member.node => {
            return refused(format!("{id} does not come to {}", member.node));
        }
        // Only the node that has the machine may say which monitor sends it.
        Some(migration) if migration.from.0 != request.from_node => {
            return refused(format!("{id} comes from {}", migration.from));
        }
        Some(migration) => match &migration.state {
            MigrationState::Active { .. } | MigrationState::Queued => {}
            MigrationState::CutOver { .. } | MigrationState::Aborted { .. } => {
                return refused(format!("{id} has ended"));
            }
        },
        None if id <= MigrationId(state.applied.0) => {
            return refused(format!("there is no migration {id}"));
        }
        None => return PrepareIncomingReply::default(),
    }
    let table = member.monitors.table().borrow().clone();
    let Some(monitor) = table
        .values()
        .find(|monitor| monitor.migration() == Some(id))
        .filter(|monitor| !monitor.status.incoming_addresses.is_empty())
    else {
        return PrepareIncomingReply::default();
    };
    match monitor.expect_source(id, request.source_fingerprint).await {
        Ok(()) => {}
        Err(error) if is_final(&error) => return refused(error.to_string()),
        Err(error) => {
            // Busy, or on its way out: the source asks again.
            tracing::debug!(%error, migration = %id, "the incoming monitor was not told of its source");
            return PrepareIncomingReply::default();
        }
    }
    let addresses = monitor.status.incoming_addresses.iter();
    let addresses = match &member.config.migration_advertise {
        None => addresses.cloned().collect(),
        Some(host) => addresses
            .filter_map(|address| Some(format!("{host}:{}", address.rsplit_once(':')?.1)))
            .collect(),
    };
    PrepareIncomingReply {
        ready: true,
        addresses,
        refused: String::new(),
        destination_fingerprint: monitor.status.channel_fingerprint.clone(),
    }
}

/// Whether the monitor would answer the same again.
fn is_final(error: &MonitorError) -> bool {
    use tonic::Code::{FailedPrecondition, InvalidArgument};
    matches!(error, MonitorError::Refused { status, .. }
        if matches!(status.code(), FailedPrecondition | InvalidArgument))
}
