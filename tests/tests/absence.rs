//! A planned stop of `clusterd` whose successor is gone again: what the monitors were given for the absence must not
//! outlast what the cluster waits for.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use proto::admin::{NodeListRequest, NodeView};
use proto::monitor::monitor_client::MonitorClient;
use proto::monitor::{DescribeRequest, MonitorStatus, Phase};
use tests::cluster::{Machine, PATIENCE, Setup, TestCluster};

/// How long a monitor may take to describe itself.
const DESCRIBE: Duration = Duration::from_secs(2);

/// What the monitors of a node say of themselves, asked of each over its own socket: nobody stands between.
async fn monitors(node: &Path) -> Vec<MonitorStatus> {
    let mut statuses = Vec::new();
    let Ok(folders) = std::fs::read_dir(node.join("vms")) else {
        return statuses;
    };
    for folder in folders.flatten() {
        let socket = folder.path().join("ctl");
        if !socket.exists() {
            continue;
        }
        let mut client = MonitorClient::new(proto::unix::channel(socket));
        let asked = tokio::time::timeout(DESCRIBE, client.describe(DescribeRequest {})).await;
        // One that has ended leaves its folder behind for a while.
        if let Ok(Ok(status)) = asked {
            statuses.push(status.into_inner());
        }
    }
    statuses
}

async fn runs(node: &Path, vm: &str) -> bool {
    let monitors = monitors(node).await;
    let mut of_vm = monitors.iter().filter(|status| status.vm_name == vm);
    of_vm.any(|status| status.phase() == Phase::Running)
}

/// A node as another one sees it: the stopped one cannot be asked.
async fn node_by(cluster: &TestCluster, by: &str, name: &str) -> anyhow::Result<NodeView> {
    let mut api = cluster.api_of(by).await?;
    let nodes = api.api.node_list(NodeListRequest {}).await?.into_inner();
    let node = nodes.nodes.into_iter().find(|node| node.name == name);
    node.context("the node")
}

async fn wait_for_end(pid: i32) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG))? {
            WaitStatus::StillAlive if begun.elapsed() < PATIENCE => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            WaitStatus::StillAlive => bail!("clusterd ({pid}) does not stop"),
            _ => return Ok(()),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_gone_again_after_a_planned_restart_never_runs_a_second_copy()
-> anyhow::Result<()> {
    if !tests::kvm_or_skip("absence") {
        return Ok(());
    }
    let mut cluster = TestCluster::start(Setup::default()).await?;
    let leader = cluster.leader().await?;
    let nodes = cluster.nodes().await?;
    let away = nodes.iter().find(|node| node.name != leader);
    let away = away.context("three nodes")?.name.clone();
    // Without a disk nothing but the leases keeps the copies apart.
    let machine = Machine {
        disk_bytes: 0,
        ..Machine::small("vm-a")
    };
    cluster.create_on(&machine, Some(&away)).await?;

    let at = cluster.local.index_of(&away)?;
    let folders: Vec<_> = cluster
        .local
        .nodes
        .iter()
        .map(|node| node.folder.clone())
        .collect();
    let pid = cluster.local.nodes[at].pid;
    kill(Pid::from_raw(pid), Signal::SIGTERM)?;
    wait_for_end(pid).await?;
    let note = node_by(&cluster, &leader, &away).await?.note;
    ensure!(note.contains("announced to be away"), "{note:?}");
    ensure!(
        runs(&folders[at], "vm-a").await,
        "a planned stop touches no guest"
    );

    cluster.local.start_node(at)?;
    cluster
        .wait("the end of the absence", async || {
            let node = node_by(&cluster, &leader, &away).await?;
            Ok((node.state == "up" && node.note.is_empty()).then_some(()))
        })
        .await?;
    let ahead = monitors(&folders[at]).await;
    let now_ns = proto::clock::boottime_ns();
    let ahead = ahead.iter().map(|status| status.lease_deadline_ns);
    let longest_ns = ahead.max().unwrap_or(0).saturating_sub(now_ns);
    ensure!(
        longest_ns < 5_000_000_000,
        "a monitor may run for {} ms more, and its node says that the absence is over",
        longest_ns / 1_000_000
    );
    let pid = cluster.local.nodes[at].pid;
    kill(Pid::from_raw(pid), Signal::SIGSTOP)?;

    // Somebody else runs it soon, and from then on nobody does there.
    let begun = Instant::now();
    let others = || folders.iter().enumerate().filter(|(other, _)| *other != at);
    let moved = loop {
        let mut elsewhere = false;
        for (_, folder) in others() {
            elsewhere |= runs(folder, "vm-a").await;
        }
        // Asked after the new one: it runs on while the old one answers.
        let here = runs(&folders[at], "vm-a").await;
        ensure!(
            !(elsewhere && here),
            "vm-a runs on two nodes, {:?} after the stop",
            begun.elapsed()
        );
        if elsewhere {
            break begun.elapsed();
        }
        ensure!(begun.elapsed() < PATIENCE, "vm-a does not run elsewhere");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    println!("vm-a runs elsewhere {moved:?} after its node was gone");
    kill(Pid::from_raw(pid), Signal::SIGCONT)?;
    cluster.wait_progress("vm-a").await?;
    Ok(())
}
