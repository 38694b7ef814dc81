//! Proposals and reads from any node: ask the leader, whoever that is by now.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use proto::peer::peer_client::PeerClient;
use proto::peer::{ProposeReply, ProposeRequest, ReadIndexReply, ReadIndexRequest};
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::handle::{Applied, ProposeError, RaftHandle, decode, encode};
use super::machine::Machine;
use super::reads::{Confirmed, ReadError};
use crate::net::MESSAGE_BYTES_MAX;

/// How long one leader may take before we look whether there is another: it may be cut off and not know.
const TRY: Duration = Duration::from_secs(2);
/// Without news of a leader we look again after this long.
const PAUSE: Duration = Duration::from_millis(50);

/// What became of one attempt.
enum Attempt<T, E> {
    Done(T),
    /// It will not get better.
    Failed(E),
    /// Nothing was written; try again.
    Again(E),
    /// It may have been written; try again.
    Unsure(E),
}

impl<M: Machine> RaftHandle<M> {
    /// Proposes `command` here or at the leader, again and again over leader changes until `within` has
    /// passed. The command carries its own request id, so asking again never does it twice.
    ///
    /// # Errors
    /// `NotLeader` if it surely was not written, `Unknown` if it may have been.
    pub async fn propose_or_forward(
        &self,
        command: &M::Command,
        within: Duration,
    ) -> Result<Applied<M::Reply>, ProposeError> {
        self.propose_for(command, None, within).await
    }

    /// The same for a person who showed `credential`: the leader looks at it where this node may not speak for
    /// people.
    ///
    /// # Errors
    /// See [`RaftHandle::propose_or_forward`].
    pub async fn propose_for(
        &self,
        command: &M::Command,
        credential: Option<&str>,
        within: Duration,
    ) -> Result<Applied<M::Reply>, ProposeError> {
        let bytes = encode(command)?;
        let deadline = Instant::now() + within;
        let mut unsure = false;
        loop {
            let patience = TRY.min(deadline.saturating_duration_since(Instant::now()));
            let error = match self.try_propose(bytes.clone(), credential, patience).await {
                Attempt::Done((index, answer)) => {
                    return Ok(Applied {
                        index,
                        reply: decode(&answer)?,
                    });
                }
                Attempt::Failed(error) => return Err(error),
                Attempt::Again(error) => error,
                Attempt::Unsure(error) => {
                    unsure = true;
                    error
                }
            };
            if !self.wait_for_leader(deadline).await {
                return Err(match (unsure, error) {
                    (true, error @ ProposeError::Unknown { .. }) => error,
                    (true, error) => ProposeError::Unknown {
                        why: error.to_string(),
                    },
                    (false, error) => error,
                });
            }
        }
    }

    async fn try_propose(
        &self,
        bytes: Bytes,
        credential: Option<&str>,
        patience: Duration,
    ) -> Attempt<(u64, Bytes), ProposeError> {
        let leader = self.inner.leadership.borrow().clone();
        if leader.is_me {
            return match self.propose_bytes(bytes, patience).await {
                Ok(done) => Attempt::Done(done),
                Err(error @ ProposeError::NotLeader { .. }) => Attempt::Again(error),
                Err(error @ ProposeError::Unknown { .. }) => Attempt::Unsure(error),
                Err(error) => Attempt::Failed(error),
            };
        }
        let not_leader = ProposeError::NotLeader {
            leader: leader.leader,
        };
        let Some(client) = self.peer(leader.address.as_deref()) else {
            return Attempt::Again(not_leader);
        };
        let request = ProposeRequest {
            command: bytes.to_vec(),
            from_node: self.node().0,
            credential: credential.unwrap_or_default().to_owned(),
        };
        match ask(client, patience, |mut client| async move {
            client.propose(request).await
        })
        .await
        {
            Ok(reply) if reply.not_leader.is_empty() => {
                Attempt::Done((reply.log_index, reply.outcome.into()))
            }
            Ok(_) => Attempt::Again(not_leader),
            Err(status) => match status.code() {
                Code::InvalidArgument | Code::Unimplemented => {
                    Attempt::Failed(ProposeError::Malformed {
                        why: status.message().to_owned(),
                    })
                }
                _ => Attempt::Unsure(ProposeError::Unknown {
                    why: status.message().to_owned(),
                }),
            },
        }
    }

    /// The index that a linearizable read must have applied; it has been applied here when this returns, so
    /// [`RaftHandle::state`] may be read. Works on any node.
    ///
    /// # Errors
    /// When nobody confirmed it in time.
    pub async fn read_index(&self) -> Result<u64, ReadError> {
        let patience = self.inner.options.patience;
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let error = match self.try_read_index(TRY.min(left)).await {
                Attempt::Done(index) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    return match self
                        .wait_applied(index, left)
                        .await
                        .map_err(ReadError::from)
                    {
                        Ok(()) => Ok(index),
                        Err(ReadError::TimedOut { .. }) => {
                            Err(ReadError::TimedOut { after: patience })
                        }
                        Err(error) => Err(error),
                    };
                }
                Attempt::Failed(error) => return Err(error),
                Attempt::Again(error) | Attempt::Unsure(error) => error,
            };
            if !self.wait_for_leader(deadline).await {
                return Err(error);
            }
        }
    }

    async fn try_read_index(&self, patience: Duration) -> Attempt<u64, ReadError> {
        let leader = self.inner.leadership.borrow().clone();
        if leader.is_me {
            return match tokio::time::timeout(patience, self.confirm_leadership()).await {
                Ok(Ok(Confirmed { index, .. })) => Attempt::Done(index),
                Ok(Err(ReadError::Stopped)) => Attempt::Failed(ReadError::Stopped),
                Ok(Err(error)) => Attempt::Again(error),
                Err(_) => Attempt::Again(ReadError::TimedOut { after: patience }),
            };
        }
        let not_leader = ReadError::NotLeader {
            leader: leader.leader,
        };
        let Some(client) = self.peer(leader.address.as_deref()) else {
            return Attempt::Again(not_leader);
        };
        match ask(client, patience, |mut client| async move {
            client.read_index(ReadIndexRequest {}).await
        })
        .await
        {
            Ok(reply) if reply.not_leader.is_empty() => Attempt::Done(reply.index),
            Ok(_) => Attempt::Again(not_leader),
            Err(status) => Attempt::Again(ReadError::NoQuorum {
                why: status.message().to_owned(),
            }),
        }
    }

    /// Answers a peer's `Peer.Propose`.
    ///
    /// # Errors
    /// A status that says whether the command may have been written: `InvalidArgument` never.
    pub async fn serve_propose(&self, request: ProposeRequest) -> Result<ProposeReply, Status> {
        // Read at the door: an entry that a state machine cannot read would stop every node.
        serde_json::from_slice::<M::Command>(&request.command).map_err(|error| {
            Status::invalid_argument(format!("the command is malformed: {error}"))
        })?;
        match self.propose_bytes(request.command.into(), TRY).await {
            Ok((log_index, answer)) => Ok(ProposeReply {
                outcome: answer.to_vec(),
                log_index,
                ..ProposeReply::default()
            }),
            Err(error @ ProposeError::NotLeader { leader }) => Ok(ProposeReply {
                not_leader: error.to_string(),
                leader_id: leader.map_or(0, |leader| leader.0),
                ..ProposeReply::default()
            }),
            Err(error @ (ProposeError::TooLarge { .. } | ProposeError::Malformed { .. })) => {
                Err(Status::invalid_argument(error.to_string()))
            }
            Err(error @ ProposeError::Unknown { .. }) => Err(Status::aborted(error.to_string())),
            Err(error @ ProposeError::Stopped { .. }) => {
                Err(Status::unavailable(error.to_string()))
            }
        }
    }

    /// Answers a peer's `Peer.ReadIndex`.
    ///
    /// # Errors
    /// When this node leads and could not confirm it.
    pub async fn serve_read_index(
        &self,
        _request: ReadIndexRequest,
    ) -> Result<ReadIndexReply, Status> {
        match self.confirm_leadership().await {
            Ok(Confirmed { index, .. }) => Ok(ReadIndexReply {
                index,
                ..ReadIndexReply::default()
            }),
            Err(error @ ReadError::NotLeader { leader }) => Ok(ReadIndexReply {
                not_leader: error.to_string(),
                leader_id: leader.map_or(0, |leader| leader.0),
                ..ReadIndexReply::default()
            }),
            Err(error) => Err(Status::unavailable(error.to_string())),
        }
    }

    fn peer(&self, address: Option<&str>) -> Option<PeerClient<Channel>> {
        let channel = self.inner.dialer.channel(address?).ok()?;
        Some(
            PeerClient::new(channel)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX),
        )
    }

    /// Waits for news of a leader, or a moment; `false` when the deadline has come.
    async fn wait_for_leader(&self, deadline: Instant) -> bool {
        let mut leadership = self.inner.leadership.clone();
        leadership.mark_unchanged();
        let until = deadline.min(Instant::now() + PAUSE);
        if let Ok(Err(_)) = tokio::time::timeout_at(until, leadership.changed()).await {
            // openraft has ended: there will be no news.
            tokio::time::sleep_until(until).await;
        }
        Instant::now() < deadline
    }
}

async fn ask<T, F, Fut>(
    client: PeerClient<Channel>,
    patience: Duration,
    call: F,
) -> Result<T, Status>
where
    F: FnOnce(PeerClient<Channel>) -> Fut,
    Fut: Future<Output = Result<tonic::Response<T>, Status>>,
{
    match tokio::time::timeout(patience, call(client)).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!(
            "no answer within {} ms",
            patience.as_millis()
        ))),
    }
}
