//! Which nodes are in the Raft group, where they are reached, and which have a vote: an odd number up to five,
//! chosen and replaced by themselves.
//!
//! Two voters are worse than one (either's loss stops both) and four are no better than three, so the number is
//! odd. A voter that is lost is replaced, not just removed. A plan changes the set once; the next one sees
//! the result.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::event::Why;
use crate::ids::NodeId;
use crate::state::{ClusterState, Liveness};

/// Votes at most: more make every commit slower and protect little more.
pub const VOTERS_MAX: usize = 5;

/// What the leader sees of Raft.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RaftView {
    /// The leader: always among the voters.
    pub leader: NodeId,
    /// Who has a vote now.
    pub voters: BTreeSet<NodeId>,
    /// Who answers the leader and is close enough behind it to vote without delay. The leader counts.
    pub following: BTreeSet<NodeId>,
}

/// A change of who is in the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemberChange {
    /// It belongs to the cluster: let it in without a vote, at the address that the log has for it.
    LetIn(NodeId),
    /// It left the cluster, or is reached elsewhere now; the next change lets it in there.
    TakeOut(NodeId),
    /// The leader itself is reached elsewhere: nobody sends it the log, so its address can be changed in place.
    Readdress(NodeId),
}

/// The next change of who is in the group, if one is due and safe. `addresses`: where the group reaches each of its
/// members; a node that was started at another address has registered that in the log.
///
/// Another member's address is not changed in place, because the leader's connections to it stay where they are:
/// it is taken out, which costs it its vote for a moment, and let in again.
pub fn members(
    state: &ClusterState,
    raft: &RaftView,
    addresses: &BTreeMap<NodeId, String>,
) -> Option<MemberChange> {
    let changes = state.nodes.values().filter_map(|node| {
        let known = addresses.get(&node.id);
        match known {
            None => Some(MemberChange::LetIn(node.id)),
            Some(known) if *known == node.address => None,
            Some(_) if node.id == raft.leader => Some(MemberChange::Readdress(node.id)),
            Some(_) => Some(MemberChange::TakeOut(node.id)),
        }
    });
    let gone = addresses
        .keys()
        .filter(|id| !state.nodes.contains_key(id) && **id != raft.leader)
        .map(|id| MemberChange::TakeOut(*id));
    changes.chain(gone).find(|change| match change {
        MemberChange::LetIn(_) | MemberChange::Readdress(_) => true,
        MemberChange::TakeOut(id) => {
            // Not if the votes that are left could commit nothing, the change among it.
            let mut left = raft.voters.clone();
            left.remove(id);
            most_follow(raft, &raft.voters) && most_follow(raft, &left)
        }
    })
}

fn most_follow(raft: &RaftView, voters: &BTreeSet<NodeId>) -> bool {
    let follows = |id: &&NodeId| **id == raft.leader || raft.following.contains(id);
    voters.iter().filter(follows).count() * 2 > voters.len()
}

/// A change of the set of voters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VoterChange {
    /// The whole new set.
    pub voters: BTreeSet<NodeId>,
    /// Why.
    pub why: Why,
}

/// The next change of the voters, if one is due and safe.
///
/// It is safe when most of the present voters follow (or nothing could be committed) and most of the new
/// ones do (or nothing could be committed after it).
pub fn plan(state: &ClusterState, raft: &RaftView) -> Option<VoterChange> {
    let healthy = |id: &NodeId| {
        *id == raft.leader
            || raft.following.contains(id)
                && state
                    .nodes
                    .get(id)
                    .is_some_and(|node| node.liveness == Liveness::Up)
    };
    let eligible: BTreeSet<NodeId> = state
        .nodes
        .values()
        .filter(|node| node.role.may_lead())
        .map(|node| node.id)
        .collect();
    let target = odd_at_most(eligible.len().min(VOTERS_MAX)).max(1);

    // Kept in this order: the leader, voters that are well, others that are well, voters that are not (a
    // vote that is only missing for a while is better than none), never one that is gone or may not vote.
    let mut ranked: Vec<(u8, NodeId)> = eligible
        .iter()
        .chain(std::iter::once(&raft.leader))
        .map(|id| {
            let rank = match (*id == raft.leader, raft.voters.contains(id), healthy(id)) {
                (true, _, _) => 0,
                (false, true, true) => 1,
                (false, false, true) => 2,
                (false, true, false) => 3,
                (false, false, false) => 4,
            };
            (rank, *id)
        })
        .filter(|(rank, _)| *rank < 4)
        .collect();
    ranked.sort_unstable();
    ranked.dedup();
    let wanted = odd_at_most(ranked.len().min(target)).max(1);
    let voters: BTreeSet<NodeId> = ranked.iter().take(wanted).map(|(_, id)| *id).collect();

    let most = |set: &BTreeSet<NodeId>| set.iter().filter(|id| healthy(id)).count() * 2 > set.len();
    // A set that only shrinks because nobody healthy is there to fill it keeps its size: a vote that may
    // come back still protects the log.
    let only_waits = voters.len() < raft.voters.len()
        && raft.voters.iter().all(|id| eligible.contains(id))
        && raft.voters.len() <= target;
    if voters == raft.voters || only_waits || !most(&raft.voters) || !most(&voters) {
        return None;
    }
    let names = |set: &BTreeSet<NodeId>| {
        set.iter()
            .map(|&id| state.node_label(id))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let why = Why::rule("an odd number of healthy voters, at most five; lost ones are replaced")
        .with("before", names(&raft.voters))
        .with("after", names(&voters))
        .with("nodes that may vote", eligible.len());
    Some(VoterChange { voters, why })
}

fn odd_at_most(count: usize) -> usize {
    if count.is_multiple_of(2) {
        count.saturating_sub(1)
    } else {
        count
    }
}
