//! Who is in the Raft group: one change at a time, and each is verified.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cluster_model::NodeId;
use openraft::ChangeMembers;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};

use super::handle::{RaftHandle, leader_of};
use super::machine::Machine;
use super::reads::ReadError;
use super::types::{Member, TypeConfig};

/// How long a change of the membership may take to commit.
const CHANGE_PATIENCE: Duration = Duration::from_secs(10);
/// A learner this close to the leader's log may vote.
const LAG_MAX: u64 = 1_000;

/// Why the membership was not changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    /// Only the leader changes it.
    #[error("this node does not lead ({})", leader.map_or_else(|| "nobody is known to".to_owned(), |leader| format!("{leader} does")))]
    NotLeader {
        /// Who does, if known.
        leader: Option<NodeId>,
    },
    /// It may or may not have been changed; look at the membership and ask again.
    #[error("whether the membership changed is not known: {why}")]
    Unknown {
        /// What happened.
        why: String,
    },
    /// The change is not allowed.
    #[error("the membership cannot be changed so: {why}")]
    Refused {
        /// Why.
        why: String,
    },
    /// The new voter has not caught up.
    #[error("{node} is still {lag} entries behind: it gets its vote once it has caught up")]
    Behind {
        /// Who.
        node: NodeId,
        /// How far; `u64::MAX` if nothing was heard of it.
        lag: u64,
    },
    /// The log has stopped.
    #[error("this node's log has stopped")]
    Stopped,
}

type Change = ChangeMembers<u64, Member>;

impl<M: Machine> RaftHandle<M> {
    /// Lets a node in without a vote; the leader begins to send it the log. A member already in is left as
    /// it is.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn add_learner(
        &self,
        node: NodeId,
        name: &str,
        address: &str,
    ) -> Result<(), MembershipError> {
        let member = Member {
            name: name.to_owned(),
            address: address.to_owned(),
        };
        let _one = self.begin_change().await?;
        let known = self
            .metrics()
            .members
            .get(&node)
            .map(|known| known.address.clone());
        match known {
            Some(known) if known == address => Ok(()),
            Some(known) => Err(MembershipError::Refused {
                why: format!("{node} is a member at {known}: remove it first"),
            }),
            None => {
                self.change(ChangeMembers::AddNodes(BTreeMap::from([(node.0, member)])))
                    .await
            }
        }
    }

    /// Changes in place where this node, the leader, is reached. Another member's connections would stay where
    /// they are: it is removed and let in again.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn readdress(
        &self,
        node: NodeId,
        name: &str,
        address: &str,
    ) -> Result<(), MembershipError> {
        let member = Member {
            name: name.to_owned(),
            address: address.to_owned(),
        };
        let _one = self.begin_change().await?;
        if node != self.node() || !self.metrics().members.contains_key(&node) {
            return Err(MembershipError::Refused {
                why: format!("{node} is not the member that leads"),
            });
        }
        self.change_keeping(
            ChangeMembers::SetNodes(BTreeMap::from([(node.0, member)])),
            true,
        )
        .await
    }

    /// Gives a learner a vote, once it has caught up (waits up to `within` for that).
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn promote(&self, node: NodeId, within: Duration) -> Result<(), MembershipError> {
        let _one = self.begin_change().await?;
        if self
            .metrics()
            .members
            .get(&node)
            .is_some_and(|member| member.voter)
        {
            return Ok(());
        }
        self.wait_caught_up(node, within).await?;
        self.change(ChangeMembers::AddVoterIds(BTreeSet::from([node.0])))
            .await
    }

    /// Takes a node's vote and lets it go on as a learner.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn demote(&self, node: NodeId) -> Result<(), MembershipError> {
        let _one = self.begin_change().await?;
        if !self
            .metrics()
            .members
            .get(&node)
            .is_some_and(|member| member.voter)
        {
            return Ok(());
        }
        self.change_keeping(ChangeMembers::RemoveVoters(BTreeSet::from([node.0])), true)
            .await
    }

    /// Takes a node out of the group: for ever, unless it is let in again at another address.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn remove(&self, node: NodeId) -> Result<(), MembershipError> {
        let _one = self.begin_change().await?;
        match self.metrics().members.get(&node) {
            None => Ok(()),
            Some(member) if member.voter => {
                self.change(ChangeMembers::RemoveVoters(BTreeSet::from([node.0])))
                    .await
            }
            Some(_) => {
                self.change(ChangeMembers::RemoveNodes(BTreeSet::from([node.0])))
                    .await
            }
        }
    }

    /// Hands leadership to the voter `to` and waits for it to lead.
    ///
    /// # Errors
    /// `Unknown` when it does not lead within `within`: somebody else may, or this node still does.
    pub async fn transfer_leadership(
        &self,
        to: NodeId,
        within: Duration,
    ) -> Result<(), MembershipError> {
        if self.leader() == Some(to) {
            return Ok(());
        }
        let leadership = self.inner.leadership.borrow().clone();
        if !leadership.is_me {
            return Err(MembershipError::NotLeader {
                leader: leadership.leader,
            });
        }
        if !self
            .metrics()
            .members
            .get(&to)
            .is_some_and(|member| member.voter)
        {
            return Err(MembershipError::Refused {
                why: format!("{to} has no vote"),
            });
        }
        self.inner
            .raft
            .trigger()
            .transfer_leader(to.0)
            .await
            .map_err(|_| MembershipError::Stopped)?;
        let mut leadership = self.leadership();
        match tokio::time::timeout(within, leadership.wait_for(|now| now.leader == Some(to))).await
        {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(MembershipError::Stopped),
            Err(_) => Err(MembershipError::Unknown {
                why: format!("{to} did not take over within {} ms", within.as_millis()),
            }),
        }
    }

    /// One change at a time; a change that a lost leader left half way is finished first.
    async fn begin_change(&self) -> Result<tokio::sync::MutexGuard<'_, ()>, MembershipError> {
        let one = tokio::time::timeout(CHANGE_PATIENCE, self.inner.membership.lock())
            .await
            .map_err(|_| MembershipError::Refused {
                why: "another change of the membership is under way".into(),
            })?;
        // A leader that has just been elected first commits what its predecessors left.
        self.read_index().await.map_err(|error| match error {
            ReadError::NotLeader { leader } => MembershipError::NotLeader { leader },
            ReadError::Stopped => MembershipError::Stopped,
            error => MembershipError::Refused {
                why: error.to_string(),
            },
        })?;
        let wanted = {
            let metrics = self.inner.raft.metrics();
            let metrics = metrics.borrow_watched();
            let configs = metrics.membership_config.membership().get_joint_config();
            (configs.len() > 1).then(|| configs.last().cloned().unwrap_or_default())
        };
        if let Some(voters) = wanted {
            tracing::warn!(
                ?voters,
                "finishing a change of the membership that was left half way"
            );
            self.change_keeping(ChangeMembers::ReplaceAllVoters(voters), true)
                .await?;
        }
        Ok(one)
    }

    async fn change(&self, change: Change) -> Result<(), MembershipError> {
        self.change_keeping(change, false).await
    }

    async fn change_keeping(
        &self,
        change: Change,
        keep_as_learners: bool,
    ) -> Result<(), MembershipError> {
        let changing = self.inner.raft.change_membership(change, keep_as_learners);
        let changed = tokio::time::timeout(CHANGE_PATIENCE, changing)
            .await
            .map_err(|_| MembershipError::Unknown {
                why: format!("no answer within {} s", CHANGE_PATIENCE.as_secs()),
            })?;
        changed.map_err(refused)?;
        let metrics = self.inner.raft.metrics();
        let half_way = metrics
            .borrow_watched()
            .membership_config
            .membership()
            .get_joint_config()
            .len()
            > 1;
        if half_way {
            return Err(MembershipError::Unknown {
                why: "it is half way; ask again to finish it".into(),
            });
        }
        Ok(())
    }

    async fn wait_caught_up(&self, node: NodeId, within: Duration) -> Result<(), MembershipError> {
        let mut metrics = self.inner.raft.metrics();
        let deadline = tokio::time::Instant::now() + within;
        loop {
            let status = self.metrics();
            if !status.leadership.is_me {
                return Err(MembershipError::NotLeader {
                    leader: status.leadership.leader,
                });
            }
            let Some(member) = status.members.get(&node) else {
                return Err(MembershipError::Refused {
                    why: format!("{node} is not a learner of this cluster"),
                });
            };
            let lag = match member.matched {
                Some(_) => member.lag.unwrap_or(u64::MAX),
                None => u64::MAX,
            };
            if lag <= LAG_MAX {
                return Ok(());
            }
            match tokio::time::timeout_at(deadline, metrics.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(MembershipError::Stopped),
                Err(_) => return Err(MembershipError::Behind { node, lag }),
            }
        }
    }
}

fn refused(error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>) -> MembershipError {
    match error {
        RaftError::Fatal(_) => MembershipError::Stopped,
        RaftError::APIError(ClientWriteError::ForwardToLeader(to)) => MembershipError::NotLeader {
            leader: leader_of(&to),
        },
        RaftError::APIError(error @ ClientWriteError::LogEntryDiscarded(_)) => {
            MembershipError::Unknown {
                why: error.to_string(),
            }
        }
        RaftError::APIError(error) => MembershipError::Refused {
            why: error.to_string(),
        },
    }
}
