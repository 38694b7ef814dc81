//! What a Raft group does when links are cut, leaders die under load, and stores are lost or damaged.

mod raft_support;

use std::time::Duration;

use clusterd::raft::{self, ProposeError, StartError, StoreError};
use raft_support::{Cluster, Notes, PATIENCE, Settings, eventually, set};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minority_refuses_proposals_and_reads_and_follows_again_when_healed() {
    let cluster = Cluster::start(3, Settings::default()).await;
    let old = cluster.leader().await;
    old.propose(&set(0)).await.unwrap();
    cluster.settle().await;
    let alone = old.node().0;
    cluster.cut_off(alone);

    let new = eventually("the majority elects", || async {
        for node in cluster.running().filter(|node| node.id.0 != alone) {
            if node.handle().is_leader() && node.handle().confirm_leadership().await.is_ok() {
                return Some(node.handle().clone());
            }
        }
        None
    })
    .await;
    new.propose(&set(1)).await.unwrap();
    // The old leader may still believe in itself; it can neither prove it nor commit anything.
    assert!(old.confirm_leadership().await.is_err());
    let refused = old.propose(&set(2)).await.unwrap_err();
    assert!(
        matches!(
            refused,
            ProposeError::NotLeader { .. } | ProposeError::Unknown { .. }
        ),
        "{refused}"
    );
    assert!(
        old.propose_or_forward(&set(2), Duration::from_millis(300))
            .await
            .is_err()
    );
    assert!(!old.state().borrow().done.contains_key(&1));

    cluster.heal(alone);
    eventually("the old leader follows", || async {
        (old.leader() == Some(new.node()) && old.state().borrow().done.contains_key(&1))
            .then_some(())
    })
    .await;
    // What it refused may have been in its log; nobody else's, so it is nowhere.
    let state = cluster.settle().await;
    assert_eq!(state.history, [0, 1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_comes_back_does_not_depose_the_leader() {
    let cluster = Cluster::start(3, Settings::default()).await;
    let leader = cluster.leader().await;
    leader.propose(&set(0)).await.unwrap();
    cluster.settle().await;
    let term = leader.metrics().leadership.term;
    let away = cluster
        .running()
        .map(|node| node.id)
        .find(|id| *id != leader.node())
        .unwrap();
    cluster.cut_off(away.0);
    // Alone, it asks for votes again and again; only asking beforehand (pre-vote) keeps its term.
    let node = cluster.node(away.0).handle().clone();
    let mut leadership = node.leadership();
    for request in 1..=60 {
        leader.propose(&set(request)).await.unwrap();
        let _ = tokio::time::timeout(Duration::from_millis(50), leadership.changed()).await;
    }
    assert_eq!(
        node.metrics().leadership.term,
        term,
        "its term rose while it was alone"
    );
    cluster.heal(away.0);
    assert_eq!(cluster.settle().await.history.len(), 61);
    assert_eq!(leader.metrics().leadership.term, term);
    assert!(leader.is_leader());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_proposes_and_reads_what_was_written() {
    let cluster = Cluster::start(3, Settings::default()).await;
    for request in 0..30 {
        let node = cluster.node(request % 3 + 1);
        node.handle()
            .propose_or_forward(&set(request), PATIENCE)
            .await
            .unwrap();
        for reader in cluster.running() {
            reader.handle().read_index().await.unwrap();
            assert!(reader.handle().state().borrow().done.contains_key(&request));
        }
    }
    assert_eq!(cluster.settle().await.history, (0..30).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proposals_are_done_once_while_leaders_die_under_them() {
    let mut cluster = Cluster::start(
        3,
        Settings {
            snapshot_every: 100,
            keep: 20,
        },
    )
    .await;
    let mut next = 0;
    for _ in 0..3 {
        let leader = cluster.leader().await.node();
        let survivors: Vec<_> = cluster
            .running()
            .filter(|node| node.id != leader)
            .map(|node| node.handle().clone())
            .collect();
        let tasks: Vec<_> = survivors
            .into_iter()
            .enumerate()
            .map(|(client, handle)| {
                let first = next + client as u64 * 100;
                tokio::spawn(async move {
                    for request in first..first + 100 {
                        handle
                            .propose_or_forward(&set(request), PATIENCE)
                            .await
                            .unwrap();
                    }
                })
            })
            .collect();
        next += 200;
        let watcher = cluster
            .running()
            .find(|node| node.id != leader)
            .unwrap()
            .handle()
            .clone();
        eventually("some are done", || async {
            (watcher.state().borrow().history.len() as u64 > next - 180).then_some(())
        })
        .await;
        cluster.crash(leader.0);
        for task in tasks {
            task.await.unwrap();
        }
        cluster.restart(leader.0).await;
    }
    let state = cluster.settle().await;
    let mut history = state.history.clone();
    history.sort_unstable();
    assert_eq!(history, (0..next).collect::<Vec<_>>(), "each once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_log_is_gone_or_another_nodes_or_was_never_made_does_not_start() {
    let mut cluster = Cluster::start(3, Settings::default()).await;
    cluster.leader().await.propose(&set(0)).await.unwrap();
    cluster.stop(3).await;
    let options = cluster.options(3, true);
    let dialer = cluster.node(1).dialer.clone();

    let mut other = options.clone();
    other.node = cluster_model::NodeId(9);
    let refused = raft::start::<Notes>(other, dialer.clone())
        .await
        .unwrap_err();
    assert!(
        matches!(refused, StartError::Store(StoreError::OtherNode { .. })),
        "{refused:?}"
    );

    std::fs::remove_dir_all(options.dir.join("log")).unwrap();
    // Even if it may make one: it once voted with the one that is gone.
    let refused = raft::start::<Notes>(options.clone(), dialer.clone())
        .await
        .unwrap_err();
    assert!(
        matches!(refused, StartError::Store(StoreError::Lost { .. })),
        "{refused:?}"
    );

    std::fs::remove_dir_all(&options.dir).unwrap();
    let refused = raft::start::<Notes>(cluster.options(3, false), dialer)
        .await
        .unwrap_err();
    assert!(
        matches!(refused, StartError::Store(StoreError::Missing { .. })),
        "{refused:?}"
    );
    // The others go on.
    cluster.leader().await.propose(&set(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_snapshot_is_damaged_and_log_cut_does_not_start() {
    let mut cluster = Cluster::start(
        1,
        Settings {
            snapshot_every: 40,
            keep: 4,
        },
    )
    .await;
    let leader = cluster.leader().await;
    for request in 0..100 {
        leader.propose(&set(request)).await.unwrap();
    }
    eventually("the log is cut", || async { leader.metrics().purged }).await;
    drop(leader);
    cluster.stop(1).await;
    let snapshots = cluster.node(1).dir().join("snapshots");
    for file in std::fs::read_dir(snapshots).unwrap() {
        let path = file.unwrap().path();
        let mut content = std::fs::read(&path).unwrap();
        let middle = content.len() / 2;
        content[middle] ^= 1;
        std::fs::write(&path, content).unwrap();
    }
    let dialer = cluster.node(1).dialer.clone();
    let refused = raft::start::<Notes>(cluster.options(1, false), dialer)
        .await
        .unwrap_err();
    assert!(
        matches!(refused, StartError::Store(StoreError::Damaged { .. })),
        "{refused:?}"
    );
}
