//! What other nodes ask of this one.

use std::sync::Arc;

use cluster_model::{Command, MigrationId, MigrationState, Name, NodeRole, Outcome, Sha256};
use proto::peer::peer_server::{Peer, PeerServer};
use proto::peer::{
    HeartbeatReply, HeartbeatRequest, JoinReply, JoinRequest, ObservedReply, ObservedRequest,
    PrepareIncomingReply, PrepareIncomingRequest, ProposeReply, ProposeRequest, ReadIndexReply,
    ReadIndexRequest, SourceProgressReply, SourceProgressRequest,
};
use tonic::{Request, Response, Status};

use crate::leader;
use crate::member::Member;
use crate::net::MESSAGE_BYTES_MAX;
use crate::node::NodeHandle;
use crate::report;

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

#[tonic::async_trait]
impl Peer for PeerService {
    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatReply>, Status> {
        let member = self.member()?;
        Ok(Response::new(
            leader::answer(&member, request.into_inner()).await,
        ))
    }

    async fn propose(
        &self,
        request: Request<ProposeRequest>,
    ) -> Result<Response<ProposeReply>, Status> {
        let member = self.member()?;
        let reply = member.raft.serve_propose(request.into_inner()).await?;
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
        let migration = MigrationId(request.into_inner().migration_id);
        Ok(Response::new(incoming(&member, migration)))
    }

    async fn source_progress(
        &self,
        request: Request<SourceProgressRequest>,
    ) -> Result<Response<SourceProgressReply>, Status> {
        let member = self.member()?;
        let migration = MigrationId(request.into_inner().migration_id);
        let kept = member.measured(migration).source;
        // A monitor that still runs says more than what was kept of it.
        let table = member.monitors.table().borrow().clone();
        let running = table
            .values()
            .filter(|monitor| monitor.incoming != Some(migration))
            .filter(|monitor| monitor.migration() == Some(migration))
            .find_map(|monitor| monitor.status.migration.clone());
        let progress = running
            .or(kept)
            .map(|progress| serde_json::to_vec(&progress).unwrap_or_default())
            .unwrap_or_default();
        Ok(Response::new(SourceProgressReply { progress }))
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        let member = self.member()?;
        let request = request.into_inner();
        let reply = match let_in(&member, &request).await {
            Ok(reply) => reply,
            Err(refused) => JoinReply {
                refused,
                ..JoinReply::default()
            },
        };
        Ok(Response::new(reply))
    }

    async fn observed(
        &self,
        _request: Request<ObservedRequest>,
    ) -> Result<Response<ObservedReply>, Status> {
        let member = self.member()?;
        let leadership = member.raft.leadership().borrow().clone();
        let reply = if leadership.is_me {
            let now_ns = member.clock.boottime_ns();
            let reports = report::aged(&member.leader.reports().borrow(), now_ns);
            ObservedReply {
                observed: serde_json::to_vec(&*reports)
                    .map_err(|error| Status::internal(error.to_string()))?,
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

/// Where the monitor of an incoming migration listens. The agent makes it as soon as the migration's start
/// is applied here; until then, and while it is built, the answer is "not yet".
fn incoming(member: &Member, id: MigrationId) -> PrepareIncomingReply {
    let state = member.state();
    let refused = |why: String| PrepareIncomingReply {
        refused: why,
        ..PrepareIncomingReply::default()
    };
    match state.migrations.get(&id) {
        Some(migration) if migration.to != member.node => {
            return refused(format!("{id} does not come to {}", member.node));
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
    let addresses = table
        .values()
        .find(|monitor| monitor.migration() == Some(id))
        .map(|monitor| monitor.status.incoming_addresses.clone())
        .unwrap_or_default();
    let advertised = match &member.config.migration_advertise {
        None => addresses,
        Some(host) => addresses
            .iter()
            .filter_map(|address| Some(format!("{host}:{}", address.rsplit_once(':')?.1)))
            .collect(),
    };
    PrepareIncomingReply {
        ready: !advertised.is_empty(),
        addresses: advertised,
        refused: String::new(),
    }
}

async fn let_in(member: &Arc<Member>, request: &JoinRequest) -> Result<JoinReply, String> {
    let name = Name::new(request.name.clone()).map_err(|error| error.to_string())?;
    let role = match request.role.as_str() {
        "" | "voter" => NodeRole::Voter,
        "learner" => NodeRole::Learner,
        "witness" => NodeRole::Witness,
        other => {
            return Err(format!(
                "`{other}` is no role; use voter, learner or witness"
            ));
        }
    };
    let cluster = member
        .state()
        .cluster
        .clone()
        .ok_or("there is no cluster yet; try: clusterctl cluster init")?;
    let propose = async |command: Command| {
        member
            .propose_own(command)
            .await
            .map(|(_, outcome)| outcome)
            .map_err(|error| error.to_string())
    };
    // Asking again after a lost answer names the same node: the token's secret, and the key that it is
    // known by, follow from what it says of itself.
    let said = format!("{name}/{}", request.address);
    let id = format!(
        "first-sight-{:016x}",
        xxhash_rust::xxh3::xxh3_64(said.as_bytes())
    );
    let hash = Sha256(first_sight(&said));
    propose(Command::CreateJoinToken {
        id: id.clone(),
        node: name.clone(),
        role,
        secret_hash: hash,
        expires_at_ms: u64::MAX,
    })
    .await?;
    let outcome = propose(Command::JoinNode {
        token: id,
        secret_hash: hash,
        name,
        address: request.address.clone(),
        key: hash,
    })
    .await?;
    match outcome {
        Outcome::Node(node) => Ok(JoinReply {
            node_id: node.0,
            cluster_id: cluster.id,
            refused: String::new(),
        }),
        other => Err(format!("letting a node in gave {other:?}")),
    }
}

/// What stands for a secret and a key where a newcomer shows neither.
fn first_sight(said: &str) -> [u8; 32] {
    let low = xxhash_rust::xxh3::xxh3_128(said.as_bytes()).to_be_bytes();
    let high = xxhash_rust::xxh3::xxh3_128_with_seed(said.as_bytes(), 1).to_be_bytes();
    std::array::from_fn(|at| if at < 16 { low[at] } else { high[at - 16] })
}
