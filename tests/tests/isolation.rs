//! Nodes that are cut off and come back without a restart.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cluster_model::Settings;
use tests::cluster::{Machine, Setup, TestCluster};

async fn losses(cluster: &TestCluster) -> anyhow::Result<Vec<String>> {
    let events = cluster.events().await?;
    let lost = events.into_iter().filter(|event| event.kind == "node.lost");
    Ok(lost.map(|event| event.detail).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_lost_comes_back_by_itself_and_is_lost_once() -> anyhow::Result<()> {
    if !tests::kvm_or_skip("isolation") {
        return Ok(());
    }
    let cluster = TestCluster::start(Setup::default()).await?;
    let leader = cluster.leader().await?;
    let nodes = cluster.nodes().await?;
    let away = nodes
        .iter()
        .find(|node| node.name != leader)
        .context("three nodes")?
        .name
        .clone();
    let state_of = async |name: &str| -> anyhow::Result<String> {
        let nodes = cluster.nodes().await?;
        let node = nodes.into_iter().find(|node| node.name == name);
        Ok(node.context("the node")?.state)
    };
    cluster.isolate(&away, false);
    cluster
        .wait("the loss", async || {
            Ok((state_of(&away).await? == "lost").then_some(()))
        })
        .await?;
    cluster.relay.heal_all();
    cluster
        .wait("its return", async || {
            Ok((state_of(&away).await? == "up").then_some(()))
        })
        .await?;
    // Only a node that holds its lease lets a guest run.
    cluster
        .create_on(&Machine::small("vm-a"), Some(&away))
        .await?;
    cluster.wait_progress("vm-a").await?;
    let vm = cluster.vm("vm-a").await?;
    ensure!(vm.node == away, "{vm:?} should run on {away}");
    let losses = losses(&cluster).await?;
    ensure!(losses.len() == 1, "{losses:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_fails_everywhere_for_a_while_costs_a_pause_and_no_restart()
-> anyhow::Result<()> {
    if !tests::kvm_or_skip("isolation") {
        return Ok(());
    }
    let cluster = TestCluster::start(Setup::default()).await?;
    let mut before = Vec::new();
    for (name, node) in [("vm-a", "n1"), ("vm-b", "n2")] {
        cluster.create_on(&Machine::small(name), Some(node)).await?;
        cluster.wait_progress(name).await?;
        before.push(cluster.vm(name).await?);
    }
    for node in ["n1", "n2", "n3"] {
        cluster.isolate(node, false);
    }
    let cut = Instant::now();
    for vm in &before {
        cluster.wait_frozen(&vm.name, &vm.node).await?;
    }
    // Longer than any leader waits for a node, counted from the last word that got through: what passes here is the subject.
    let settings = Settings::fast();
    let lost = Duration::from_millis(u64::from(settings.lost_ms)) * 2;
    tokio::time::sleep(lost.saturating_sub(cut.elapsed())).await;
    for vm in &before {
        let now = cluster.seen_by(&vm.name, &vm.node).await?;
        ensure!(now.state == "frozen", "nobody let it go on: {now:?}");
    }
    cluster.relay.heal_all();
    for vm in before {
        let guest = cluster.wait_progress(&vm.name).await?;
        let now = cluster.vm(&vm.name).await?;
        ensure!(
            guest.found_at_boot == 0 && now.token == vm.token && now.node == vm.node,
            "{vm:?} became {now:?}"
        );
    }
    let losses = losses(&cluster).await?;
    ensure!(losses.is_empty(), "{losses:?}");
    Ok(())
}
