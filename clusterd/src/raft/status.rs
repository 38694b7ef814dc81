//! What can be seen of the log from outside: who leads, who lags, what failed.

use std::collections::BTreeMap;

use cluster_model::NodeId;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::{RaftMetrics, ServerState};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::handle::RaftHandle;
use super::latency::LatencySummary;
use super::machine::Machine;
use super::service::Raft;
use super::state::DigestAt;
use super::types::TypeConfig;

/// Who leads, as far as one node knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leadership {
    /// The newest term this node has seen.
    pub term: u64,
    /// Who leads in it, if somebody is known to.
    pub leader: Option<NodeId>,
    /// Where the leader is reached, `host:port`.
    pub address: Option<String>,
    /// Whether it is this node.
    pub is_me: bool,
    /// How often another leader was seen since this node started.
    pub changes: u64,
}

/// A member of the Raft group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// What people call it.
    pub name: String,
    /// `host:port`.
    pub address: String,
    /// Whether it has a vote.
    pub voter: bool,
    /// The last entry it is known to have; on the leader only.
    pub matched: Option<u64>,
    /// Entries it is behind the leader; on the leader only.
    pub lag: Option<u64>,
}

/// The state of one node's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RaftStatus {
    /// Who leads.
    pub leadership: Leadership,
    /// The last entry in the log.
    pub last_log: Option<u64>,
    /// The last entry known to be committed.
    pub committed: Option<u64>,
    /// The last entry applied.
    pub applied: Option<u64>,
    /// The last entry in the newest snapshot.
    pub snapshot: Option<u64>,
    /// The last entry removed from the log.
    pub purged: Option<u64>,
    /// Everybody in the group.
    pub members: BTreeMap<NodeId, MemberStatus>,
    /// A membership change is half way (it is finished by the next one).
    pub joint: bool,
    /// How long this node's proposals took to commit.
    pub commit_latency: LatencySummary,
    /// The state's last checkpoint digest.
    pub digest: DigestAt,
    /// Why the log has stopped, if it has.
    pub stopped: Option<String>,
}

/// Publishes who leads, from openraft's metrics.
pub(super) fn watch_leadership<M: Machine>(raft: Raft<M>) -> watch::Receiver<Leadership> {
    let mut metrics = raft.metrics();
    let mut last_seen = None;
    let first = read(&metrics.borrow_watched(), 0, &mut last_seen);
    let (published, receiver) = watch::channel(first);
    tokio::spawn(async move {
        // Ends with openraft.
        while metrics.changed().await.is_ok() {
            let changes = published.borrow().changes;
            let next = read(&metrics.borrow_watched(), changes, &mut last_seen);
            published.send_if_modified(|current| {
                let differs = *current != next;
                *current = next;
                differs
            });
        }
        published.send_modify(|current| {
            current.is_me = false;
            current.leader = None;
            current.address = None;
        });
    });
    receiver
}

/// `last_seen` is the last leader and its term: the same node in a newer term is another leader.
fn read(
    metrics: &RaftMetrics<TypeConfig>,
    changes: u64,
    last_seen: &mut Option<(u64, u64)>,
) -> Leadership {
    let term = metrics.current_term;
    let leader = metrics
        .running_state
        .is_ok()
        .then_some(metrics.current_leader)
        .flatten();
    let seen = leader.map(|leader| (term, leader));
    let another = seen.is_some() && last_seen.is_some() && seen != *last_seen;
    *last_seen = seen.or(*last_seen);
    Leadership {
        term,
        leader: leader.map(NodeId),
        address: leader
            .and_then(|leader| metrics.membership_config.membership().get_node(&leader))
            .map(|member| member.address.clone()),
        is_me: leader == Some(metrics.id) && metrics.state == ServerState::Leader,
        changes: changes + u64::from(another),
    }
}

impl<M: Machine> RaftHandle<M> {
    /// The state of this node's log.
    pub fn metrics(&self) -> RaftStatus {
        let receiver = self.inner.raft.metrics();
        let metrics = receiver.borrow_watched().clone();
        let membership = metrics.membership_config.membership();
        let voters: Vec<u64> = membership.voter_ids().collect();
        let members = membership.nodes().map(|(id, member)| {
            let replication = metrics
                .replication
                .as_ref()
                .and_then(|replication| replication.get(id));
            let matched = match replication {
                Some(matched) => matched.as_ref().map(|log_id| log_id.index),
                None => None,
            };
            let lag = replication.map(|_| {
                let next = |index: Option<u64>| index.map_or(0, |index| index + 1);
                next(metrics.last_log_index).saturating_sub(next(matched))
            });
            let status = MemberStatus {
                name: member.name.clone(),
                address: member.address.clone(),
                voter: voters.contains(id),
                matched,
                lag,
            };
            (NodeId(*id), status)
        });
        RaftStatus {
            leadership: self.inner.leadership.borrow().clone(),
            last_log: metrics.last_log_index,
            committed: metrics
                .cluster_committed
                .as_ref()
                .map(|log_id| log_id.index),
            applied: self.applied(),
            snapshot: metrics.snapshot.as_ref().map(|log_id| log_id.index),
            purged: metrics.purged.as_ref().map(|log_id| log_id.index),
            members: members.collect(),
            joint: membership.get_joint_config().len() > 1,
            commit_latency: self.inner.latency.summary(),
            digest: *self.digest().borrow(),
            stopped: metrics
                .running_state
                .as_ref()
                .err()
                .map(ToString::to_string),
        }
    }
}
