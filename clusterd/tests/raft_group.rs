//! A Raft group agrees, whoever leads, dies, comes back, joins or leaves.

mod raft_support;

use std::time::Duration;

use cluster_model::NodeId;
use clusterd::raft::{Machine, ProposeError};
use raft_support::{Cluster, Notes, PATIENCE, Set, Settings, eventually, set};

/// Terms that a dead leader may cost: with timeouts drawn anew each time, a third meeting in a row is rare.
const ELECTIONS_MAX: u64 = 3;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_apply_the_same_commands_in_the_same_order() {
    let cluster = Cluster::start(3, Settings::default()).await;
    let leader = cluster.leader().await;
    let tasks: Vec<_> = (0..8)
        .map(|client| {
            let leader = leader.clone();
            tokio::spawn(async move {
                for request in 0..25 {
                    leader.propose(&set(client * 25 + request)).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let state = cluster.settle().await;
    assert_eq!(state.history.len(), 200);
    let status = leader.metrics();
    assert_eq!(status.members.len(), 3);
    assert!(status.members.values().all(|member| member.voter));
    assert_eq!(status.commit_latency.count, 200);
    assert_eq!(status.stopped, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_an_answer_finds_its_effect_in_the_state() {
    let cluster = Cluster::start(1, Settings::default()).await;
    let leader = cluster.leader().await;
    for request in 0..50 {
        let applied = leader.propose(&set(request)).await.unwrap();
        assert_eq!(applied.reply, applied.index);
        assert!(leader.state().borrow().done.contains_key(&request));
        assert!(leader.applied().unwrap() >= applied.index);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_leader_is_replaced_and_no_acknowledged_commit_is_lost() {
    let mut cluster = Cluster::start(3, Settings::default()).await;
    let leader = cluster.leader().await;
    for request in 0..20 {
        leader.propose(&set(request)).await.unwrap();
    }
    let dead = leader.node().0;
    let term = leader.metrics().leadership.term;
    drop(leader);
    cluster.crash(dead);
    let next = cluster.leader().await;
    assert_ne!(next.node().0, dead);
    let now = next.metrics().leadership;
    // Two survivors may meet in one election; where they go on meeting, nobody leads for long.
    assert!(
        now.term > term && now.term <= term + ELECTIONS_MAX,
        "from term {term} to {}",
        now.term
    );
    assert!(now.changes >= 1);
    next.propose(&set(20)).await.unwrap();
    assert_eq!(cluster.settle().await.history, (0..=20).collect::<Vec<_>>());
    cluster.restart(dead).await;
    assert_eq!(cluster.settle().await.history, (0..=20).collect::<Vec<_>>());
}

/// Clients propose through every node; at a moment of no node's choosing all of them die.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_the_death_of_all_nodes_at_once() {
    let mut cluster = Cluster::start(
        3,
        Settings {
            snapshot_every: 60,
            keep: 10,
        },
    )
    .await;
    let mut next = 0;
    let mut acknowledged = std::collections::BTreeSet::new();
    for round in 0..3 {
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let mut clients = tokio::task::JoinSet::new();
        for node in cluster.running() {
            let (handle, tell) = (node.handle().clone(), tell.clone());
            let first = next;
            next += 10_000;
            clients.spawn(async move {
                for request in first.. {
                    let command = set(request);
                    let done = handle.propose_or_forward(&command, PATIENCE);
                    if done.await.is_err() || tell.send(request).is_err() {
                        return;
                    }
                }
            });
        }
        drop(tell);
        for _ in 0..100 + 30 * round {
            acknowledged.insert(told.recv().await.expect("somebody is answered"));
        }
        for id in [1, 2, 3] {
            cluster.crash(id);
        }
        clients.shutdown().await;
        // Answers that were under way count too.
        while let Some(request) = told.recv().await {
            acknowledged.insert(request);
        }
        for id in [1, 2, 3] {
            cluster.restart(id).await;
        }
        let state = cluster.settle().await;
        let lost: Vec<_> = acknowledged
            .iter()
            .filter(|request| !state.done.contains_key(request))
            .collect();
        assert!(lost.is_empty(), "round {round}: {lost:?} were acknowledged");
        let each = std::collections::BTreeSet::from_iter(&state.history);
        assert_eq!(each.len(), state.history.len(), "each once");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_survive_a_restart_of_all_nodes() {
    let mut cluster = Cluster::start(
        3,
        Settings {
            snapshot_every: 60,
            keep: 10,
        },
    )
    .await;
    let leader = cluster.leader().await;
    for request in 0..100 {
        leader.propose(&set(request)).await.unwrap();
    }
    let before = cluster.settle().await;
    let term = leader.metrics().leadership.term;
    drop(leader);
    for id in [1, 2, 3] {
        cluster.stop(id).await;
    }
    for id in [1, 2, 3] {
        cluster.restart(id).await;
    }
    for node in cluster.running() {
        node.handle().wait_recovered(PATIENCE).await.unwrap();
        assert_eq!(**node.handle().state().borrow(), before);
    }
    let leader = cluster.leader().await;
    assert!(
        leader.metrics().leadership.term > term,
        "a restarted leader asks again"
    );
    assert_eq!(
        leader.address_of(NodeId(2)),
        Some(cluster.node(2).address.to_string())
    );
    leader.propose(&set(100)).await.unwrap();
    assert_eq!(cluster.settle().await.history.len(), 101);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_is_too_far_behind_catches_up_by_snapshot() {
    let mut cluster = Cluster::start(
        3,
        Settings {
            snapshot_every: 50,
            keep: 5,
        },
    )
    .await;
    let leader = cluster.leader().await;
    leader.propose(&set(0)).await.unwrap();
    cluster.settle().await;
    let behind = cluster
        .running()
        .map(|node| node.id)
        .find(|id| *id != leader.node())
        .unwrap();
    let had = cluster.node(behind.0).handle().metrics().last_log.unwrap();
    cluster.stop(behind.0).await;
    for request in 1..=300 {
        leader.propose(&set(request)).await.unwrap();
    }
    // Its next entry is no longer in the leader's log.
    eventually("the leader purges", || async {
        leader.metrics().purged.filter(|purged| *purged > had)
    })
    .await;
    cluster.restart(behind.0).await;
    let state = cluster.settle().await;
    assert_eq!(state.history.len(), 301);
    let status = cluster.node(behind.0).handle().metrics();
    assert!(
        status.snapshot.is_some_and(|snapshot| snapshot > had),
        "{status:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_and_the_entries_after_it_give_what_a_full_replay_gives() {
    let mut cluster = Cluster::start(
        1,
        Settings {
            snapshot_every: 40,
            keep: 4,
        },
    )
    .await;
    let leader = cluster.leader().await;
    let mut replayed = Notes::default();
    for request in 0..150 {
        // Some come twice: the second must change nothing.
        let command = set(request / 2 * 2);
        let applied = leader.propose(&command).await.unwrap();
        replayed.apply(applied.index, &command);
    }
    eventually("a snapshot is written and the log cut", || async {
        let status = leader.metrics();
        status
            .purged
            .filter(|_| status.snapshot.is_some_and(|snapshot| snapshot < 151))
    })
    .await;
    drop(leader);
    cluster.stop(1).await;
    cluster.restart(1).await;
    assert_eq!(cluster.settle().await, replayed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_join_and_leave() {
    let mut cluster = Cluster::start(3, Settings::default()).await;
    let leader = cluster.leader().await;
    for request in 0..10 {
        leader.propose(&set(request)).await.unwrap();
    }
    cluster.add_node(4).await;
    cluster.join(4).await;
    leader.propose(&set(10)).await.unwrap();
    assert_eq!(cluster.settle().await.history.len(), 11);
    assert_eq!(leader.metrics().members.len(), 4);
    // Asked again: nothing changes, nothing fails.
    cluster.join(4).await;

    leader.remove(NodeId(4)).await.unwrap();
    leader.remove(NodeId(4)).await.unwrap();
    let status = leader.metrics();
    assert!(
        !status.members.contains_key(&NodeId(4)) && !status.joint,
        "{status:?}"
    );
    let term = status.leadership.term;
    leader.propose(&set(11)).await.unwrap();
    // The one removed learns nothing more, and disturbs nobody.
    let removed = cluster.node(4).handle().clone();
    assert!(matches!(
        removed.propose(&set(12)).await,
        Err(ProposeError::NotLeader { .. })
    ));
    assert!(!removed.state().borrow().done.contains_key(&11));
    cluster.stop(4).await;
    assert_eq!(cluster.settle().await.history.len(), 12);
    assert_eq!(leader.metrics().leadership.term, term);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_has_the_log_and_no_vote() {
    let mut cluster = Cluster::start(1, Settings::default()).await;
    cluster.add_node(2).await;
    let leader = cluster.leader().await;
    leader
        .add_learner(NodeId(2), "n2", &cluster.node(2).address.to_string())
        .await
        .unwrap();
    leader.propose(&set(0)).await.unwrap();
    assert_eq!(cluster.settle().await.history.len(), 1);
    assert!(!leader.metrics().members[&NodeId(2)].voter);
    // The leader alone is the quorum.
    cluster.stop(2).await;
    leader.propose(&set(1)).await.unwrap();
    // A number belongs to one address.
    assert!(
        leader
            .add_learner(NodeId(2), "n2", "127.0.0.1:1")
            .await
            .is_err()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_is_handed_over_on_request() {
    let cluster = Cluster::start(3, Settings::default()).await;
    let leader = cluster.leader().await;
    leader.propose(&set(0)).await.unwrap();
    cluster.settle().await;
    let to = cluster
        .running()
        .map(|node| node.id)
        .find(|id| *id != leader.node())
        .unwrap();
    leader.transfer_leadership(to, PATIENCE).await.unwrap();
    assert_eq!(cluster.leader().await.node(), to);
    assert!(
        leader
            .transfer_leadership(NodeId(77), PATIENCE)
            .await
            .is_err()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_leader_decided_is_not_written_in_another_term_even_if_it_leads_again() {
    let cluster = Cluster::start(3, Settings::default()).await;
    let leader = cluster.leader().await;
    let term = leader.leadership().borrow().term;
    leader.propose_in_term(term, &set(0)).await.unwrap();
    cluster.settle().await;
    let other = cluster
        .running()
        .map(|node| node.id)
        .find(|id| *id != leader.node())
        .unwrap();
    leader.transfer_leadership(other, PATIENCE).await.unwrap();
    let refused = leader.propose_in_term(term, &set(1)).await;
    assert!(matches!(refused, Err(ProposeError::NotLeader { .. })));
    let successor = cluster.leader().await;
    successor.propose(&set(2)).await.unwrap();
    cluster.settle().await;
    successor
        .transfer_leadership(leader.node(), PATIENCE)
        .await
        .unwrap();
    assert_eq!(cluster.leader().await.node(), leader.node());
    let now = leader.leadership().borrow().term;
    assert!(now > term);
    let refused = leader.propose_in_term(term, &set(3)).await;
    assert!(matches!(refused, Err(ProposeError::NotLeader { .. })));
    leader.propose_in_term(now, &set(4)).await.unwrap();
    let state = cluster.settle().await;
    let written: Vec<u64> = state.done.keys().copied().collect();
    assert_eq!(written, [0, 2, 4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_over_the_limit_is_refused_before_the_log() {
    let cluster = Cluster::start(1, Settings::default()).await;
    let leader = cluster.leader().await;
    let before = leader.metrics().last_log;
    let large = Set {
        request: 1,
        key: "k".into(),
        value: "x".repeat(70_000),
    };
    assert!(matches!(
        leader.propose(&large).await,
        Err(ProposeError::TooLarge { .. })
    ));
    assert!(matches!(
        leader.propose_or_forward(&large, PATIENCE).await,
        Err(ProposeError::TooLarge { .. })
    ));
    assert_eq!(leader.metrics().last_log, before);
    let fits = Set {
        request: 2,
        key: "k".into(),
        value: "x".repeat(60_000),
    };
    leader.propose(&fits).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_takes_the_same_digest_at_the_same_entry() {
    let cluster = Cluster::start(3, Settings::default()).await;
    let leader = cluster.leader().await;
    let tasks: Vec<_> = (0..16)
        .map(|client| {
            let leader = leader.clone();
            tokio::spawn(async move {
                for request in 0..70 {
                    leader.propose(&set(client * 70 + request)).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    cluster.settle().await;
    let mut digests = Vec::new();
    for node in cluster.running() {
        let mut digest = node.handle().digest();
        let taken =
            tokio::time::timeout(PATIENCE, digest.wait_for(|digest| digest.index > 0)).await;
        digests.push(*taken.expect("in time").expect("the node runs"));
    }
    assert_eq!(digests[0].index, clusterd::raft::DIGEST_EVERY);
    assert!(
        digests.iter().all(|digest| *digest == digests[0]),
        "{digests:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_for_an_entry_that_does_not_come_ends() {
    let cluster = Cluster::start(1, Settings::default()).await;
    let leader = cluster.leader().await;
    assert!(
        leader
            .wait_applied(1_000_000, Duration::from_millis(50))
            .await
            .is_err()
    );
}
