//! Nodes become a cluster, and stay one over restarts and losses.

use std::time::Duration;

use cluster_model::{Liveness, NodeRole, Settings};

use crate::rig::{Rig, eventually};

fn settings() -> Settings {
    Settings::fast()
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_form_a_cluster_and_all_hold_a_vote_and_a_lease() {
    let mut rig = Rig::without_machines();
    rig.cluster(3, settings()).await;
    for number in 1..=3 {
        let member = rig.handle(number).member().unwrap();
        let raft = member.raft.clone();
        eventually("three voters", || {
            raft.metrics()
                .members
                .values()
                .filter(|member| member.voter)
                .count()
                == 3
        })
        .await;
        eventually("the node holds its lease", || member.lease_is_valid()).await;
    }
    let token = rig.token("n9", NodeRole::Voter).await;
    let again = rig.handle(2).join(&token.line()).await;
    assert!(again.is_err(), "a member cannot join again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashed_node_is_declared_lost_and_comes_back() {
    let mut rig = Rig::without_machines();
    rig.cluster(3, settings()).await;
    let lost = rig.node_id(3);
    rig.take(3).crash().await;
    rig.until(1, "n3 is lost", |state| {
        state.nodes[&lost].liveness == Liveness::Lost
    })
    .await;
    let why = rig.handle(1).state();
    let event = why
        .events
        .iter()
        .find(|event| event.kind == "node.lost")
        .unwrap();
    assert!(
        event
            .why
            .as_ref()
            .unwrap()
            .inputs
            .contains_key("last reply, ms ago")
    );
    rig.start(3).await;
    rig.until(1, "n3 is back", |state| {
        state.nodes[&lost].liveness == Liveness::Up
    })
    .await;
    let member = rig.handle(3).member().unwrap();
    eventually("n3 holds its lease again", || member.lease_is_valid()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_planned_stop_is_announced_and_loses_nobody() {
    let mut rig = Rig::without_machines();
    rig.cluster(3, settings()).await;
    // The leader among them: it hands its lead over.
    let leader = (1..=3)
        .find(|&number| rig.handle(number).member().unwrap().raft.is_leader())
        .unwrap();
    let other = leader % 3 + 1;
    let node = rig.node_id(leader);
    rig.take(leader).stop().await;
    rig.until(other, "the absence is known", |state| {
        state.nodes[&node].absence.is_some()
    })
    .await;
    // Well over the lost-time of the fast profile.
    let waited = Duration::from_millis(u64::from(settings().lost_ms) * 2);
    let lost = tokio::time::timeout(waited, async {
        let member = rig.handle(other).member().unwrap();
        let mut state = member.raft.state();
        state
            .wait_for(|state| state.nodes[&node].liveness == Liveness::Lost)
            .await
            .is_ok()
    });
    assert!(lost.await.is_err(), "an announced absence is no loss");
    rig.start(leader).await;
    rig.until(other, "it is back", |state| {
        state.nodes[&node].absence.is_none()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_on_one_folder_is_refused() {
    let mut rig = Rig::without_machines();
    rig.start(1).await;
    let first = rig.take(1);
    let config = first.handle().config().clone();
    let second = clusterd::node::Node::start(config, |_, routes| routes).await;
    assert!(matches!(
        second,
        Err(clusterd::node::NodeError::Locked { .. })
    ));
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_started_at_another_address_is_reached_there() {
    let mut rig = Rig::without_machines();
    rig.cluster(3, settings()).await;
    let leads = |number: usize| rig.handle(number).member().unwrap().raft.is_leader();
    // First one that follows, then the one that leads: it hands its lead over when it stops.
    let leader = (1..=3).find(|&number| leads(number)).unwrap();
    for number in [leader % 3 + 1, leader] {
        let other = (1..=3).find(|&other| other != number).unwrap();
        let node = rig.node_id(number);
        rig.take(number).stop().await;
        rig.moved.insert(number);
        rig.start(number).await;
        let address = rig.address(number).to_string();
        rig.until(other, "it registered its address", |state| {
            state.nodes[&node].address == address
        })
        .await;
        let raft = rig.handle(other).member().unwrap().raft.clone();
        eventually("the group reaches it there, and it votes", || {
            let status = raft.metrics();
            let known = status.members.get(&node);
            known.is_some_and(|known| known.voter && known.address == address)
        })
        .await;
        // The log reaches it: what is decided from now on, and that it is back.
        rig.until(number, "it is back and holds its lease", |state| {
            state.nodes[&node].absence.is_none() && state.nodes[&node].address == address
        })
        .await;
    }
}
