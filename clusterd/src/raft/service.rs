//! The receiving half of Raft between nodes.

use std::pin::Pin;

use futures::{Stream, StreamExt};
use openraft::raft::{TransferLeaderRequest, VoteRequest};
use proto::peer::RaftMessage;
use proto::peer::raft_server::{Raft as RaftRpc, RaftServer};
use tonic::{Request, Response, Status, Streaming};

use super::codec::DecodeError;
use super::machine::Machine;
use super::snapshot::{SNAPSHOT_BYTES_MAX, SnapshotData};
use super::state::{Snapshot, StateMachine};
use super::types::TypeConfig;
use super::wire::{self, SnapshotHead};
use crate::net::MESSAGE_BYTES_MAX;

pub(super) type Raft<M> = openraft::Raft<TypeConfig, StateMachine<M>>;

/// Serves the Raft messages of peers.
pub struct RaftService<M: Machine> {
    node: u64,
    raft: Raft<M>,
}

impl<M: Machine> RaftService<M> {
    pub(super) fn server(node: u64, raft: Raft<M>) -> RaftServer<RaftService<M>> {
        RaftServer::new(RaftService { node, raft })
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The body of a request, if it is for this node.
    fn mine<'a>(&self, payload: &'a [u8]) -> Result<&'a [u8], Status> {
        mine(self.node, payload)
    }
}

fn mine(node: u64, payload: &[u8]) -> Result<&[u8], Status> {
    let (target, body) = wire::target(payload).map_err(malformed)?;
    if target == node {
        Ok(body)
    } else {
        Err(Status::failed_precondition(format!(
            "this is node-{node}, not node-{target}"
        )))
    }
}

fn malformed(error: DecodeError) -> Status {
    Status::invalid_argument(error.to_string())
}

fn stopped(error: impl std::fmt::Display) -> Status {
    Status::unavailable(error.to_string())
}

fn answer(value: &impl serde::Serialize) -> Result<Response<RaftMessage>, Status> {
    let payload = wire::to_json(value).map_err(|error| Status::internal(error.to_string()))?;
    Ok(Response::new(RaftMessage { payload }))
}

#[tonic::async_trait]
impl<M: Machine> RaftRpc for RaftService<M> {
    type AppendStream = Pin<Box<dyn Stream<Item = Result<RaftMessage, Status>> + Send>>;

    async fn append(
        &self,
        request: Request<Streaming<RaftMessage>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let node = self.node;
        let requests = tokio_stream::StreamExt::map_while(request.into_inner(), move |message| {
            let request = message.and_then(|message| {
                wire::parse_append_request(mine(node, &message.payload)?).map_err(malformed)
            });
            match request {
                Ok(request) => Some(request),
                Err(status) => {
                    // The answers end here too; the leader opens a new stream.
                    tracing::debug!(%status, "an append stream ended");
                    None
                }
            }
        });
        let answers = self
            .raft
            .stream_append(requests)
            .map(|answer| match answer {
                Ok(answer) => Ok(wire::append_answer(&answer)),
                Err(fatal) => Err(stopped(fatal)),
            });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn vote(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let payload = request.into_inner().payload;
        let (kind, rpc): (u8, VoteRequest<TypeConfig>) =
            wire::parse_json(self.mine(&payload)?).map_err(malformed)?;
        let vote = match kind {
            0 => self.raft.vote(rpc).await,
            1 => self.raft.pre_vote(rpc).await,
            other => {
                return Err(Status::unimplemented(format!(
                    "unknown kind {other} of vote"
                )));
            }
        };
        answer(&vote.map_err(stopped)?)
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<RaftMessage>>,
    ) -> Result<Response<RaftMessage>, Status> {
        let mut messages = request.into_inner();
        let first = messages
            .message()
            .await?
            .ok_or_else(|| Status::invalid_argument("no snapshot came"))?;
        let (_, head): (u8, SnapshotHead) =
            wire::parse_json(self.mine(&first.payload)?).map_err(malformed)?;
        if head.bytes > SNAPSHOT_BYTES_MAX {
            return Err(Status::invalid_argument(format!(
                "the snapshot has {} bytes, over {SNAPSHOT_BYTES_MAX}",
                head.bytes
            )));
        }
        let mut content = Vec::new();
        while let Some(chunk) = messages.message().await? {
            if content.len() as u64 + chunk.payload.len() as u64 > head.bytes {
                return Err(Status::invalid_argument(
                    "the snapshot is longer than announced",
                ));
            }
            content.extend_from_slice(&chunk.payload);
        }
        if content.len() as u64 != head.bytes {
            return Err(Status::invalid_argument(format!(
                "{} of the snapshot's {} bytes came",
                content.len(),
                head.bytes
            )));
        }
        let data = SnapshotData(content.into());
        // Checked before openraft takes it: what it cannot install would stop this node.
        let (meta, data) = tokio::task::spawn_blocking(move || {
            super::snapshot::decode::<M>(&data).map(|(meta, _)| (meta, data))
        })
        .await
        .map_err(stopped)?
        .map_err(malformed)?;
        if meta != head.meta {
            return Err(Status::invalid_argument(
                "the snapshot is not the one announced",
            ));
        }
        let installed = self
            .raft
            .install_full_snapshot(
                head.vote,
                Snapshot {
                    meta,
                    snapshot: data,
                },
            )
            .await;
        answer(&installed.map_err(stopped)?)
    }

    async fn transfer_leader(
        &self,
        request: Request<RaftMessage>,
    ) -> Result<Response<RaftMessage>, Status> {
        let payload = request.into_inner().payload;
        let (_, request): (u8, TransferLeaderRequest<TypeConfig>) =
            wire::parse_json(self.mine(&payload)?).map_err(malformed)?;
        answer(
            &self
                .raft
                .handle_transfer_leader(request)
                .await
                .map_err(stopped)?,
        )
    }
}
