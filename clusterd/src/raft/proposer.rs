//! Proposals go to the log in groups: everyone who waits shares a round.
//!
//! A round (write, sync, answers) costs about the same for one command as for sixteen. The proposers of a
//! round come back together, a few microseconds apart: a round that began with the first of them would make
//! all others wait for it and then for their own. So a new round begins when the last one has ended, and
//! first lets as many come as the last one had; only those that are ready to run, so nobody waits for a
//! clock. Both are hints: a round that takes long (a slow link, no quorum) holds up nobody.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use openraft::errors::{ClientWriteError, Fatal};
use openraft::raft::WriteResult;
use tokio::sync::{mpsc, oneshot};

use super::handle::{ProposeError, leader_of, stopped};
use super::machine::Machine;
use super::service::Raft;
use super::types::{CommandBytes, TypeConfig};

/// Proposals that may wait for their round; more wait to be let in.
const WAITING_MAX: usize = 4_096;
/// The largest group.
const GROUP_MAX: usize = 512;
/// How often a group lets other tasks run before it goes without them.
const TURNS: usize = 32;
/// A round that takes longer no longer keeps the next one from beginning.
const ROUND_MAX: Duration = Duration::from_millis(5);

/// What comes of a proposal: the entry's index and the encoded reply.
pub(super) type Written = Result<(u64, Bytes), ProposeError>;

/// An encoded command on its way into the log.
pub(super) struct Proposal {
    pub(super) command: Bytes,
    pub(super) answer: oneshot::Sender<Written>,
}

/// Starts the task that proposes; it ends when the sender is dropped. A round's answers are awaited for
/// `patience`.
pub(super) fn start<M: Machine>(raft: Raft<M>, patience: Duration) -> mpsc::Sender<Proposal> {
    let (proposals, waiting) = mpsc::channel(WAITING_MAX);
    tokio::spawn(run(raft, waiting, patience));
    proposals
}

async fn run<M: Machine>(raft: Raft<M>, mut waiting: mpsc::Receiver<Proposal>, patience: Duration) {
    let mut last_group = 1;
    let mut group = Vec::new();
    while waiting.recv_many(&mut group, GROUP_MAX).await > 0 {
        gather(&mut group, &mut waiting, last_group).await;
        last_group = group.len();
        // Who no longer waits has said that the outcome is unknown: not written is the better one.
        group.retain(|proposal| !proposal.answer.is_closed());
        let (commands, answers): (Vec<_>, VecDeque<_>) = group
            .drain(..)
            .map(|proposal| (CommandBytes(proposal.command), proposal.answer))
            .unzip();
        if commands.is_empty() {
            continue;
        }
        match raft.client_write_many(commands).await {
            Ok(results) => {
                let round = tokio::spawn(async move {
                    // After this the proposers have given up, too.
                    let _ = tokio::time::timeout(patience, answer(results, answers)).await;
                });
                // Whether the round ended or takes long, the next one begins.
                let _ = tokio::time::timeout(ROUND_MAX, round).await;
            }
            Err(fatal) => refuse(answers, &fatal),
        }
    }
}

/// Lets others come into `group` until it has `expected`.
async fn gather(
    group: &mut Vec<Proposal>,
    waiting: &mut mpsc::Receiver<Proposal>,
    expected: usize,
) {
    for _ in 0..TURNS {
        if group.len() >= expected {
            return;
        }
        tokio::task::yield_now().await;
        while group.len() < GROUP_MAX
            && let Ok(proposal) = waiting.try_recv()
        {
            group.push(proposal);
        }
    }
}

/// Hands out the results, which come in the proposals' order.
async fn answer(
    mut results: BoxStream<'static, Result<WriteResult<TypeConfig>, Fatal<TypeConfig>>>,
    mut answers: VecDeque<oneshot::Sender<Written>>,
) {
    while let Some(result) = results.next().await {
        let written = match result {
            Ok(Ok(written)) => Ok((written.log_id.index, written.response.0)),
            Ok(Err(ClientWriteError::ForwardToLeader(to))) => Err(ProposeError::NotLeader {
                leader: leader_of(&to),
            }),
            Ok(Err(other)) => Err(ProposeError::Unknown {
                why: other.to_string(),
            }),
            Err(fatal) => return refuse(answers, &fatal),
        };
        if let Some(answer) = answers.pop_front() {
            // The proposer may have lost its patience.
            let _ = answer.send(written);
        }
    }
    refuse(answers, &Fatal::Stopped);
}

fn refuse(answers: VecDeque<oneshot::Sender<Written>>, fatal: &Fatal<TypeConfig>) {
    for answer in answers {
        // The proposer may have lost its patience.
        let _ = answer.send(Err(stopped(fatal)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proposal() -> Proposal {
        let (answer, _) = oneshot::channel();
        Proposal {
            command: Bytes::new(),
            answer,
        }
    }

    #[tokio::test]
    async fn a_group_takes_in_everyone_who_was_ready_to_propose() {
        let (proposals, mut waiting) = mpsc::channel(WAITING_MAX);
        let proposers: Vec<_> = (0..15)
            .map(|_| {
                let proposals = proposals.clone();
                tokio::spawn(async move { proposals.send(proposal()).await.is_ok() })
            })
            .collect();
        let mut group = vec![proposal()];
        gather(&mut group, &mut waiting, 16).await;
        assert_eq!(group.len(), 16);
        for proposer in proposers {
            assert!(proposer.await.unwrap());
        }
    }

    #[tokio::test]
    async fn a_group_goes_without_those_who_do_not_come_and_waits_for_nobody_it_does_not_expect() {
        let (proposals, mut waiting) = mpsc::channel(WAITING_MAX);
        let mut group = vec![proposal()];
        gather(&mut group, &mut waiting, 16).await;
        assert_eq!(group.len(), 1);
        tokio::spawn(async move { proposals.send(proposal()).await.is_ok() });
        gather(&mut group, &mut waiting, 1).await;
        assert_eq!(group.len(), 1);
    }
}
