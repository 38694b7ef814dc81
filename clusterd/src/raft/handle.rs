//! What the rest of the node does with the log: propose, read, watch.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cluster_model::{ClusterState, NodeId};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, Fatal, ForwardToLeader};
use openraft::impls::ProgressResponder;
use openraft::vote::RaftLeaderId;
use proto::peer::raft_server::RaftServer;
use tokio::sync::{mpsc, oneshot, watch};

use super::latency::Histogram;
use super::log::LogThread;
use super::machine::Machine;
use super::proposer::{self, Proposal, Written};
use super::reads::{self, ReadWaiter};
use super::service::{Raft, RaftService};
use super::state::{DigestAt, Published};
use super::status::{self, Leadership};
use super::types::{CommandBytes, LeaderId, Member, TypeConfig};
use super::{COMMAND_BYTES_MAX, Options};
use crate::net::Dialer;

/// A node's part in the replicated log; clones are the same node.
#[derive(Debug)]
pub struct RaftHandle<M: Machine = ClusterState> {
    pub(super) inner: Arc<Inner<M>>,
}

impl<M: Machine> Clone for RaftHandle<M> {
    fn clone(&self) -> Self {
        RaftHandle {
            inner: self.inner.clone(),
        }
    }
}

pub(super) struct Inner<M: Machine> {
    pub(super) options: Options,
    pub(super) dialer: Dialer,
    pub(super) raft: Raft<M>,
    pub(super) reads: mpsc::Sender<ReadWaiter>,
    pub(super) latency: Histogram,
    /// Held while the membership changes: two changes at once could leave it half way.
    pub(super) membership: tokio::sync::Mutex<()>,
    pub(super) leadership: watch::Receiver<Leadership>,
    state: watch::Receiver<Arc<M>>,
    applied: watch::Receiver<u64>,
    digest: watch::Receiver<DigestAt>,
    proposals: mpsc::Sender<Proposal>,
    log: LogThread,
}

impl<M: Machine> std::fmt::Debug for Inner<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Raft")
            .field("node", &self.options.node)
            .finish_non_exhaustive()
    }
}

/// A command that was applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied<R> {
    /// Its entry.
    pub index: u64,
    /// What the state machine answered.
    pub reply: R,
}

/// Why a proposal has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// This node does not lead; nothing was written.
    #[error("this node does not lead ({})", leader.map_or_else(|| "nobody is known to".to_owned(), |leader| format!("{leader} does")))]
    NotLeader {
        /// Who does, if known.
        leader: Option<NodeId>,
    },
    /// The command may or may not come to be applied: ask again under the same request id.
    #[error("whether the command was applied is not known: {why}")]
    Unknown {
        /// What happened.
        why: String,
    },
    /// The command can never be written.
    #[error("the command has {bytes} bytes, over {COMMAND_BYTES_MAX}: make it smaller or part it")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// What came back or was to be sent cannot be encoded or decoded.
    #[error("the command or its answer is malformed: {why}")]
    Malformed {
        /// How.
        why: String,
    },
    /// This node's log has stopped: its disk failed, or it was shut down.
    #[error("this node's log has stopped: {why}")]
    Stopped {
        /// Why.
        why: String,
    },
}

impl<M: Machine> RaftHandle<M> {
    pub(super) fn new(
        options: Options,
        dialer: Dialer,
        raft: Raft<M>,
        published: Published<M>,
        log: LogThread,
    ) -> RaftHandle<M> {
        let leadership = status::watch_leadership(raft.clone());
        let reads = reads::start(raft.clone(), options.patience);
        let proposals = proposer::start(raft.clone(), options.patience);
        let Published {
            state,
            applied,
            digest,
        } = published;
        RaftHandle {
            inner: Arc::new(Inner {
                options,
                dialer,
                raft,
                reads,
                latency: Histogram::new(),
                membership: tokio::sync::Mutex::new(()),
                leadership,
                state,
                applied,
                digest,
                proposals,
                log,
            }),
        }
    }

    /// This node's number.
    pub fn node(&self) -> NodeId {
        self.inner.options.node
    }

    /// The service that peers' Raft messages go to; add it to the routes of [`crate::net::serve`].
    pub fn service(&self) -> RaftServer<RaftService<M>> {
        RaftService::server(self.node().0, self.inner.raft.clone())
    }

    /// Makes a Raft group of this node alone, if its log is new; does nothing if it has members already.
    ///
    /// # Errors
    /// When the log has stopped.
    pub async fn bootstrap(&self, name: &str, address: &str) -> Result<(), ProposeError> {
        let stopped = |error: &dyn std::fmt::Display| ProposeError::Stopped {
            why: error.to_string(),
        };
        if self
            .inner
            .raft
            .is_initialized()
            .await
            .map_err(|error| stopped(&error))?
        {
            return Ok(());
        }
        let member = Member {
            name: name.to_owned(),
            address: address.to_owned(),
        };
        let members = std::collections::BTreeMap::from([(self.node().0, member)]);
        self.inner
            .raft
            .initialize(members)
            .await
            .map_err(|error| stopped(&error))
    }

    /// The newest applied state, published at each apply. Hold the `Arc`, not the borrow.
    pub fn state(&self) -> watch::Receiver<Arc<M>> {
        self.inner.state.clone()
    }

    /// Who leads, and in which term; changes are published.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.inner.leadership.clone()
    }

    /// Who leads, as far as this node knows.
    pub fn leader(&self) -> Option<NodeId> {
        self.inner.leadership.borrow().leader
    }

    /// Whether this node takes itself for the leader; only [`RaftHandle::confirm_leadership`] proves it.
    pub fn is_leader(&self) -> bool {
        self.inner.leadership.borrow().is_me
    }

    /// The state's digest at the last multiple of [`super::DIGEST_EVERY`]; the same on every node.
    pub fn digest(&self) -> watch::Receiver<DigestAt> {
        self.inner.digest.clone()
    }

    /// Waits until the entry at `index` has been applied here.
    ///
    /// # Errors
    /// When `within` has passed, or the log has stopped.
    pub async fn wait_applied(&self, index: u64, within: Duration) -> Result<(), WaitError> {
        let mut applied = self.inner.applied.clone();
        let reached = applied.wait_for(|next| *next > index);
        match tokio::time::timeout(within, reached).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(WaitError::Stopped),
            Err(_) => Err(WaitError::Late {
                index,
                applied: self.applied(),
            }),
        }
    }

    /// After a restart: waits until everything that the cluster had committed is applied here. Before that
    /// [`RaftHandle::state`] may be older than what this node once showed.
    ///
    /// # Errors
    /// When `within` has passed (no leader was heard, say), or the log has stopped.
    pub async fn wait_recovered(&self, within: Duration) -> Result<(), WaitError> {
        match self.inner.raft.wait_for_recovery(Some(within)).await {
            Ok(metrics) => {
                let last = metrics.last_applied.map_or(0, |last| last.index);
                // openraft counts an entry as applied a moment before it is published.
                self.wait_applied(last, within).await
            }
            Err(openraft::metrics::WaitError::ShuttingDown) => Err(WaitError::Stopped),
            Err(openraft::metrics::WaitError::Timeout(..)) => {
                let index = self.metrics().last_log.unwrap_or(0);
                Err(WaitError::Late {
                    index,
                    applied: self.applied(),
                })
            }
        }
    }

    /// Where a member of the group is reached, `host:port`.
    pub fn address_of(&self, node: NodeId) -> Option<String> {
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics
            .membership_config
            .membership()
            .get_node(&node.0)
            .map(|member| member.address.clone())
    }

    /// The last entry applied here, if any.
    pub fn applied(&self) -> Option<u64> {
        self.inner.applied.borrow().checked_sub(1)
    }

    /// Proposes `command`; works on the leader only. When it answers, [`RaftHandle::state`] shows the effect.
    ///
    /// # Errors
    /// See [`ProposeError`]; after `Unknown` the command may still be applied.
    pub async fn propose(&self, command: &M::Command) -> Result<Applied<M::Reply>, ProposeError> {
        let (index, answer) = self
            .propose_bytes(encode(command)?, self.inner.options.patience)
            .await?;
        Ok(Applied {
            index,
            reply: decode(&answer)?,
        })
    }

    /// Proposes an encoded command; gives the entry's index and the encoded reply.
    pub(super) async fn propose_bytes(
        &self,
        command: Bytes,
        patience: Duration,
    ) -> Result<(u64, Bytes), ProposeError> {
        if command.len() > COMMAND_BYTES_MAX {
            return Err(ProposeError::TooLarge {
                bytes: command.len(),
            });
        }
        let proposing = async {
            let (answer, written) = oneshot::channel();
            let proposal = Proposal { command, answer };
            let proposals = &self.inner.proposals;
            if proposals.send(proposal).await.is_err() {
                return Err(stopped(&Fatal::Stopped));
            }
            // Without an answer its fate is unknown: it may have been on its way.
            written.await.unwrap_or_else(|_| {
                Err(ProposeError::Unknown {
                    why: "its round ended without an answer".to_owned(),
                })
            })
        };
        self.timed(patience, proposing).await
    }

    /// Proposes `command` as the leader of `term`: what a leader decided by what it knows as that leader. If
    /// this node leads in that term no longer when the log takes it, nothing is written, even if it leads again.
    ///
    /// # Errors
    /// See [`ProposeError`]; after `Unknown` the command may still be applied.
    pub async fn propose_in_term(
        &self,
        term: u64,
        command: &M::Command,
    ) -> Result<Applied<M::Reply>, ProposeError> {
        let command = CommandBytes(encode(command)?);
        let proposing = async {
            let (responder, written) = ProgressResponder::complete_only();
            self.inner
                .raft
                .write(command)
                .with_leader(LeaderId::new(term, self.node().0))
                .responder(responder)
                .await
                .map_err(|fatal| stopped(&fatal))?;
            match written.await {
                Ok(Ok(written)) => Ok((written.log_id.index, written.data.0)),
                Ok(Err(ClientWriteError::ForwardToLeader(to))) => Err(ProposeError::NotLeader {
                    leader: leader_of(&to),
                }),
                Ok(Err(other)) => Err(ProposeError::Unknown {
                    why: other.to_string(),
                }),
                Err(_) => Err(stopped(&Fatal::Stopped)),
            }
        };
        let (index, answer) = self.timed(self.inner.options.patience, proposing).await?;
        Ok(Applied {
            index,
            reply: decode(&answer)?,
        })
    }

    /// Waits for a proposal for `patience`, and counts how long it took.
    async fn timed(&self, patience: Duration, proposing: impl Future<Output = Written>) -> Written {
        let begun = Instant::now();
        let Ok(written) = tokio::time::timeout(patience, proposing).await else {
            let why = format!("no answer within {} ms", patience.as_millis());
            return Err(ProposeError::Unknown { why });
        };
        if written.is_ok() {
            let took = begun.elapsed();
            self.inner.latency.record(took);
            metrics::histogram!("clusterd_raft_commit_duration_seconds").record(took.as_secs_f64());
        }
        written
    }

    /// Returns when the log's disk has nothing left to do that was put off: what a measurement of the disk waits for.
    pub(super) async fn settle(&self) {
        self.inner.log.settle().await;
    }

    /// Leaves the group's work: stops openraft and closes the store, which can then be opened again.
    pub async fn shutdown(&self) {
        if let Err(error) = self.inner.raft.shutdown().await {
            tracing::warn!(%error, "the replicated log did not stop cleanly");
        }
        self.inner.log.close().await;
    }
}

/// Why an entry was not seen applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WaitError {
    /// Time is up.
    #[error("entry {index} is not applied here yet (the last one is {applied:?})")]
    Late {
        /// What was waited for.
        index: u64,
        /// What is applied.
        applied: Option<u64>,
    },
    /// Nothing will be applied any more.
    #[error("this node's log has stopped")]
    Stopped,
}

pub(super) fn leader_of(to: &ForwardToLeader<TypeConfig>) -> Option<NodeId> {
    to.leader_id.map(NodeId)
}

pub(super) fn stopped(fatal: &Fatal<TypeConfig>) -> ProposeError {
    ProposeError::Stopped {
        why: fatal.to_string(),
    }
}

pub(super) fn encode(command: &impl serde::Serialize) -> Result<Bytes, ProposeError> {
    let bytes = serde_json::to_vec(command).map_err(|error| ProposeError::Malformed {
        why: error.to_string(),
    })?;
    if bytes.len() > COMMAND_BYTES_MAX {
        return Err(ProposeError::TooLarge { bytes: bytes.len() });
    }
    Ok(bytes.into())
}

pub(super) fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, ProposeError> {
    serde_json::from_slice(bytes).map_err(|error| ProposeError::Malformed {
        why: error.to_string(),
    })
}
