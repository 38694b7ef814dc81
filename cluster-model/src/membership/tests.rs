//! Voters by number of nodes, replacement, and what is never done.

use super::*;
use crate::command::Command;
use crate::state::NodeRole;
use crate::testing::World;

fn set(ids: &[u64]) -> BTreeSet<NodeId> {
    ids.iter().copied().map(NodeId).collect()
}

fn planned(world: &World, voters: &[u64], following: &[u64]) -> Option<Vec<u64>> {
    let raft = RaftView {
        leader: NodeId(1),
        voters: set(voters),
        following: set(following),
    };
    plan(&world.state, &raft).map(|change| change.voters.iter().map(|id| id.0).collect())
}

#[test]
fn voters_are_an_odd_number_up_to_five() {
    /// Nodes, voters, who follows, and the voters that are planned.
    type Case = (u64, &'static [u64], &'static [u64], Option<&'static [u64]>);
    let table: &[Case] = &[
        (1, &[1], &[1], None),
        (2, &[1], &[1, 2], None),
        (3, &[1], &[1, 2], None),
        (3, &[1], &[1, 2, 3], Some(&[1, 2, 3])),
        (4, &[1, 2, 3], &[1, 2, 3, 4], None),
        (5, &[1, 2, 3], &[1, 2, 3, 4, 5], Some(&[1, 2, 3, 4, 5])),
        (7, &[1, 2, 3, 4, 5], &[1, 2, 3, 4, 5, 6, 7], None),
        (
            7,
            &[1, 2, 3, 4, 5, 6, 7],
            &[1, 2, 3, 4, 5, 6, 7],
            Some(&[1, 2, 3, 4, 5]),
        ),
    ];
    for (nodes, voters, following, expected) in table {
        let world = World::new(*nodes, 64);
        assert_eq!(
            planned(&world, voters, following).as_deref(),
            *expected,
            "{nodes} nodes, voters {voters:?}, following {following:?}"
        );
    }
}

#[test]
fn a_lost_voter_is_replaced_where_another_follows_and_kept_where_none_does() {
    let mut world = World::new(4, 64);
    world.lose(NodeId(3));
    assert_eq!(planned(&world, &[1, 2, 3], &[1, 2, 4]), Some(vec![1, 2, 4]));
    assert_eq!(planned(&world, &[1, 2, 3], &[1, 2]), None);
}

#[test]
fn nothing_is_changed_without_a_majority_before_and_after() {
    let mut world = World::new(5, 64);
    for node in [2, 3] {
        world.lose(NodeId(node));
    }
    assert_eq!(planned(&world, &[1, 2, 3], &[1, 4, 5]), None);
}

#[test]
fn a_node_that_left_loses_its_vote_and_a_learner_never_gets_one() {
    let mut world = World::new(3, 64);
    world.done(Command::RemoveNode { node: NodeId(3) });
    assert_eq!(planned(&world, &[1, 2, 3], &[1, 2]), Some(vec![1]));
    let NodeId(index) = world.let_in("learner", NodeRole::Learner);
    world.register(NodeId(index), crate::Incarnation(1), 64);
    assert_eq!(planned(&world, &[1], &[1, 2, index]), None);
    let NodeId(index) = world.let_in("witness", NodeRole::Witness);
    world.register(NodeId(index), crate::Incarnation(1), 0);
    assert_eq!(
        planned(&world, &[1], &[1, 2, index]),
        Some(vec![1, 2, index])
    );
}

#[test]
fn a_change_is_followed_by_rest() {
    // Whatever it starts from, the plan is its own fixed point.
    for nodes in 1..=8u64 {
        let world = World::new(nodes, 64);
        let all: Vec<u64> = (1..=nodes).collect();
        for first in 1..=nodes {
            let voters: Vec<u64> = (1..=first).collect();
            if let Some(change) = planned(&world, &voters, &all) {
                assert_eq!(planned(&world, &change, &all), None, "{nodes} {voters:?}");
            }
        }
    }
}

/// The group as it is, each member where the log has it but for those that moved.
fn due(world: &World, members: &[u64], following: &[u64], moved: &[u64]) -> Option<MemberChange> {
    let raft = RaftView {
        leader: NodeId(1),
        voters: set(members),
        following: set(following),
    };
    let addresses = members.iter().map(|&id| {
        let known = world.state.nodes.get(&NodeId(id));
        let known = known.map_or_else(String::new, |node| node.address.clone());
        let at = if moved.contains(&id) {
            "192.0.2.1:7440".to_owned()
        } else {
            known
        };
        (NodeId(id), at)
    });
    super::members(&world.state, &raft, &addresses.collect())
}

#[test]
fn members_follow_the_nodes_of_the_log_and_their_addresses() {
    use MemberChange::{LetIn, Readdress, TakeOut};
    let world = World::new(3, 64);
    let all: &[u64] = &[1, 2, 3];
    assert_eq!(due(&world, all, all, &[]), None);
    assert_eq!(due(&world, &[1, 2], &[1, 2], &[]), Some(LetIn(NodeId(3))));
    assert_eq!(
        due(&world, &[1, 2, 3, 4], all, &[]),
        Some(TakeOut(NodeId(4)))
    );
    // One that is reached elsewhere does not follow; it is let in again by the next change.
    assert_eq!(due(&world, all, &[1, 2], &[3]), Some(TakeOut(NodeId(3))));
    assert_eq!(due(&world, all, all, &[1]), Some(Readdress(NodeId(1))));
}

#[test]
fn a_member_stays_where_it_is_while_the_votes_that_are_left_could_commit_nothing() {
    let world = World::new(3, 64);
    let all: &[u64] = &[1, 2, 3];
    assert_eq!(due(&world, all, &[1], &[3]), None);
    // The other one of the two that follow: without it nobody would be left to agree.
    assert_eq!(due(&world, all, &[1, 3], &[3]), None);
    assert_eq!(
        due(&world, all, &[1], &[1]),
        Some(MemberChange::Readdress(NodeId(1)))
    );
}
