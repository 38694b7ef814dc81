//! The sending half of Raft between nodes: openraft's requests over tonic.
//!
//! Each peer has three connections: one for the log, one for heartbeats and votes (a full pipe must not
//! look like a dead leader), one for snapshots.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{
    Backoff, NetBackoff, NetSnapshot, NetStreamAppend, NetTransferLeader, NetVote, RPCOption,
    RaftNetworkFactory,
};
use openraft::raft::{
    SnapshotResponse, StreamAppendResult, TransferLeaderRequest, TransferLeaderResponse,
    VoteRequest, VoteResponse,
};
use proto::peer::RaftMessage;
use proto::peer::raft_client::RaftClient;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::carry::{Carried, LogEnd};
use super::snapshot::SnapshotData;
use super::state::Snapshot;
use super::types::{Member, TypeConfig, Vote};
use super::wire::{self, AppendRequest};
use crate::net::{Dialer, MESSAGE_BYTES_MAX};

/// A peer that leaves an append unanswered for one to two of these is given up: its disk may stall for
/// a while, and heartbeats tell a dead one sooner.
const APPEND_PATIENCE: Duration = Duration::from_secs(2);
/// A peer that refuses an append stream is tried again after this.
const REFUSED_PAUSE: Duration = Duration::from_millis(200);

type RpcError = RPCError<TypeConfig>;
type RpcResult<T> = Result<T, RpcError>;

/// Makes the clients that openraft asks for.
pub(super) struct Network {
    pub dialer: Dialer,
    pub log_end: LogEnd,
}

impl Network {
    fn client(&self, target: u64, node: &Member) -> Client {
        let client = self
            .dialer
            .dedicated(&node.address)
            .map(|channel| {
                RaftClient::new(channel)
                    .max_decoding_message_size(MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(MESSAGE_BYTES_MAX)
            })
            .map_err(|error| error.to_string());
        Client {
            target,
            client,
            log_end: self.log_end.clone(),
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Client;

    async fn new_client(&mut self, target: u64, node: &Member) -> Client {
        self.client(target, node)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &Member) -> Client {
        self.client(target, node)
    }

    async fn new_snapshot_client(&mut self, target: u64, node: &Member) -> Client {
        self.client(target, node)
    }
}

/// Speaks to one peer over one connection.
pub(super) struct Client {
    target: u64,
    /// Or why its address cannot be used.
    client: Result<RaftClient<Channel>, String>,
    log_end: LogEnd,
}

impl Client {
    fn client(&self) -> RpcResult<RaftClient<Channel>> {
        self.client
            .clone()
            .map_err(|why| RPCError::Unreachable(Unreachable::from_string(why)))
    }

    /// Sends one request and waits for its answer for as long as openraft allows.
    async fn ask<F, Fut>(
        &self,
        option: &RPCOption,
        request: RpcResult<RaftMessage>,
        call: F,
    ) -> RpcResult<Vec<u8>>
    where
        F: FnOnce(RaftClient<Channel>, RaftMessage) -> Fut,
        Fut: Future<Output = Result<tonic::Response<RaftMessage>, Status>>,
    {
        let answered =
            tokio::time::timeout(option.soft_ttl(), call(self.client()?, request?)).await;
        match answered {
            Ok(Ok(answer)) => Ok(answer.into_inner().payload),
            Ok(Err(status)) => Err(self.refused(&status)),
            Err(_) => Err(self.silent(option.soft_ttl())),
        }
    }

    async fn ask_vote(
        &self,
        kind: u8,
        rpc: &VoteRequest<TypeConfig>,
        option: &RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        let request = wire::json_request(self.target, kind, rpc).map_err(broken);
        let answer = self
            .ask(option, request, |mut client, request| async move {
                client.vote(request).await
            })
            .await?;
        wire::from_json(&answer).map_err(broken)
    }

    fn refused(&self, status: &Status) -> RpcError {
        let text = format!("node-{}: {}", self.target, status.message());
        match status.code() {
            // Nobody there, or somebody else: to ask again at once gains nothing.
            Code::Unavailable | Code::FailedPrecondition | Code::Unimplemented | Code::Unknown => {
                RPCError::Unreachable(Unreachable::from_string(text))
            }
            _ => RPCError::Network(NetworkError::from_string(text)),
        }
    }

    fn silent(&self, after: Duration) -> RpcError {
        RPCError::Unreachable(Unreachable::from_string(format!(
            "node-{} did not answer within {} ms",
            self.target,
            after.as_millis()
        )))
    }
}

fn broken(error: super::codec::DecodeError) -> RpcError {
    RPCError::Network(NetworkError::new(&error))
}

impl NetStreamAppend<TypeConfig> for Client {
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, RpcResult<BoxStream<'s, RpcResult<StreamAppendResult<TypeConfig>>>>>
    where
        S: Stream<Item = AppendRequest> + Send + Unpin + 'static,
    {
        Box::pin(async move {
            let mut client = self.client()?;
            let target = self.target;
            let sent = Arc::new(AtomicU64::new(0));
            let counter = sent.clone();
            let input = Carried::new(input, self.log_end.clone());
            let requests = tokio_stream::StreamExt::map_while(input, move |request| {
                counter.fetch_add(1, Ordering::Relaxed);
                wire::append_request(target, &request)
                    .inspect_err(|error| tracing::error!(%error, "an entry cannot be sent"))
                    .ok()
            });
            // The setup is bounded by the connect timeout and by this one.
            let opened = tokio::time::timeout(
                option.soft_ttl().max(APPEND_PATIENCE),
                client.append(requests),
            );
            let answers = match opened.await {
                Ok(Ok(answers)) => answers.into_inner(),
                Ok(Err(status)) => {
                    // Answered late on purpose: openraft opens the next stream at once, and a dead peer
                    // refuses thousands of times a second.
                    tokio::time::sleep(REFUSED_PAUSE).await;
                    return Err(self.refused(&status));
                }
                Err(_) => return Err(self.silent(APPEND_PATIENCE)),
            };
            let state = Some(Answers {
                answers,
                sent,
                received: 0,
            });
            let this = &*self;
            let stream: BoxStream<'s, _> =
                Box::pin(futures::stream::unfold(state, move |state| async move {
                    let mut state = state?;
                    let answer = state.next(this).await?;
                    let go_on = matches!(answer, Ok(Ok(_)));
                    Some((answer, go_on.then_some(state)))
                }));
            Ok(stream)
        })
    }
}

/// The answers of one append stream, and how many are due.
struct Answers {
    answers: Streaming<RaftMessage>,
    sent: Arc<AtomicU64>,
    received: u64,
}

impl Answers {
    async fn next(&mut self, client: &Client) -> Option<RpcResult<StreamAppendResult<TypeConfig>>> {
        loop {
            // An idle stream may be silent for ever; one that owes an answer may not.
            let owed = self.sent.load(Ordering::Relaxed) > self.received;
            match tokio::time::timeout(APPEND_PATIENCE, self.answers.message()).await {
                Ok(Ok(Some(answer))) => {
                    self.received += 1;
                    return Some(wire::parse_append_answer(&answer.payload).map_err(broken));
                }
                Ok(Ok(None)) => return None,
                Ok(Err(status)) => return Some(Err(client.refused(&status))),
                Err(_) if owed => return Some(Err(client.silent(APPEND_PATIENCE))),
                Err(_) => {}
            }
        }
    }
}

impl NetVote<TypeConfig> for Client {
    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        self.ask_vote(0, &rpc, &option).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        self.ask_vote(1, &rpc, &option).await
    }
}

impl NetSnapshot<TypeConfig> for Client {
    type SnapshotData = SnapshotData;

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let bytes = snapshot.snapshot.0;
        let head = wire::SnapshotHead {
            vote,
            meta: snapshot.meta,
            bytes: bytes.len() as u64,
        };
        let head = wire::json_request(self.target, 0, &head).map_err(broken)?;
        let chunk_bytes = option
            .snapshot_chunk_size()
            .unwrap_or(MESSAGE_BYTES_MAX / 2)
            .clamp(4096, MESSAGE_BYTES_MAX / 2);
        let chunks = futures::stream::unfold(bytes, move |mut rest| async move {
            if rest.is_empty() {
                return None;
            }
            let chunk = rest.split_to(rest.len().min(chunk_bytes));
            Some((
                RaftMessage {
                    payload: chunk.to_vec(),
                },
                rest,
            ))
        });
        let messages = futures::stream::once(async move { head }).chain(chunks);
        let mut client = self.client()?;
        let sending = pin!(tokio::time::timeout(
            option.soft_ttl(),
            client.snapshot(messages)
        ));
        let cancel = pin!(cancel);
        match futures::future::select(sending, cancel).await {
            futures::future::Either::Left((Ok(Ok(answer)), _)) => {
                Ok(wire::from_json(&answer.into_inner().payload).map_err(broken)?)
            }
            futures::future::Either::Left((Ok(Err(status)), _)) => {
                Err(self.refused(&status).into())
            }
            futures::future::Either::Left((Err(_), _)) => {
                Err(self.silent(option.soft_ttl()).into())
            }
            futures::future::Either::Right((closed, _)) => Err(closed.into()),
        }
    }
}

impl NetTransferLeader<TypeConfig> for Client {
    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<TransferLeaderResponse<TypeConfig>> {
        let request = wire::json_request(self.target, 0, &request).map_err(broken);
        let answer = self
            .ask(&option, request, |mut client, request| async move {
                client.transfer_leader(request).await
            })
            .await?;
        wire::from_json(&answer).map_err(broken)
    }
}

impl NetBackoff<TypeConfig> for Client {
    fn backoff(&self) -> Option<Backoff> {
        // The configured one.
        None
    }
}
