//! Linearizable reads: one round of heartbeats confirms the leader for everybody who waits.
//!
//! A round proves that a quorum still followed this leader at some moment after the round began. So a request
//! joins the next round to begin, never one under way; requests that come meanwhile share that next round.

use std::time::Duration;

use cluster_model::NodeId;
use openraft::errors::{LinearizableReadError, RaftError};
use openraft::{LinearizerOption, ReadPolicy};
use tokio::sync::{mpsc, oneshot};

use super::handle::{RaftHandle, WaitError, leader_of};
use super::machine::Machine;
use super::service::Raft;

/// Requests that may wait for a round; more wait to be let in.
const WAITING_MAX: usize = 4_096;

pub(super) type ReadWaiter = oneshot::Sender<Result<Confirmed, ReadError>>;

/// Proof that this node led, at some moment after it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confirmed {
    /// The term it led in. Two leaders may share a term; the pair (term, node) is unique.
    pub term: u64,
    /// A read that has applied this entry sees everything that was acknowledged before it was asked for.
    pub index: u64,
}

/// Why a read cannot be answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// This node does not lead.
    #[error("this node does not lead ({})", leader.map_or_else(|| "nobody is known to".to_owned(), |leader| format!("{leader} does")))]
    NotLeader {
        /// Who does, if known.
        leader: Option<NodeId>,
    },
    /// No quorum answered.
    #[error("no quorum of the cluster's voters answered: {why}")]
    NoQuorum {
        /// Who did.
        why: String,
    },
    /// The answer did not come in time.
    #[error("no linearizable read within {} ms", after.as_millis())]
    TimedOut {
        /// How long it took.
        after: Duration,
    },
    /// This node's log has stopped.
    #[error("this node's log has stopped")]
    Stopped,
}

impl From<WaitError> for ReadError {
    fn from(error: WaitError) -> ReadError {
        match error {
            WaitError::Late { .. } => ReadError::TimedOut {
                after: Duration::ZERO,
            },
            WaitError::Stopped => ReadError::Stopped,
        }
    }
}

/// Starts the task that runs the rounds; it ends with the last sender.
pub(super) fn start<M: Machine>(raft: Raft<M>, patience: Duration) -> mpsc::Sender<ReadWaiter> {
    let (requests, mut waiting) = mpsc::channel::<ReadWaiter>(WAITING_MAX);
    tokio::spawn(async move {
        let mut round = Vec::new();
        while waiting.recv_many(&mut round, WAITING_MAX).await > 0 {
            let confirmed = confirm(&raft, patience).await;
            for waiter in round.drain(..) {
                // Whoever asked may have gone away.
                let _ = waiter.send(confirmed.clone());
            }
        }
    });
    requests
}

async fn confirm<M: Machine>(raft: &Raft<M>, patience: Duration) -> Result<Confirmed, ReadError> {
    let option = LinearizerOption::from(ReadPolicy::ReadIndex).with_wait_timeout(patience);
    let round = tokio::time::timeout(patience, raft.get_read_log_id(option));
    match round.await {
        Ok(Ok((read, _applied))) => Ok(Confirmed {
            term: read.committed_leader_id().term,
            index: read.index(),
        }),
        Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(to)))) => {
            Err(ReadError::NotLeader {
                leader: leader_of(&to),
            })
        }
        Ok(Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(quorum)))) => {
            Err(ReadError::NoQuorum {
                why: quorum.to_string(),
            })
        }
        Ok(Err(RaftError::Fatal(_))) => Err(ReadError::Stopped),
        Err(_) => Err(ReadError::TimedOut { after: patience }),
    }
}

impl<M: Machine> RaftHandle<M> {
    /// Proves that this node leads: a quorum answers a heartbeat that was sent after this call began. Calls
    /// that wait at the same time share a round.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn confirm_leadership(&self) -> Result<Confirmed, ReadError> {
        let (reply, answer) = oneshot::channel();
        self.inner
            .reads
            .send(reply)
            .await
            .map_err(|_| ReadError::Stopped)?;
        answer.await.map_err(|_| ReadError::Stopped)?
    }
}
