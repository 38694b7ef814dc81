//! From the kill of a node (daemon, broker, monitors) to its machine running elsewhere, default timing.

use std::time::Instant;

use anyhow::ensure;
use clap::Parser;
use tests::cluster::{Machine, Setup, TestCluster};
use tests::figures::{self, percentile};

#[derive(Parser)]
struct Args {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Kills of each kind.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut result = figures::Result::new("failover");
    let mut cluster = TestCluster::start(Setup {
        fast: false,
        relay: false,
        ..Setup::default()
    })
    .await?;
    // A node that this bench kills again and again is not to be quarantined.
    let mut api = cluster.api().await?;
    let request = proto::admin::SettingsSetRequest {
        change: Some(clusterctl::client::change(None, "bench")),
        patch_json: r#"{"losses_max": 200}"#.into(),
    };
    api.api.settings_set(request).await?;
    cluster.create(&Machine::small("vm-a")).await?;
    for (figure, leader_dies) in [("failover", false), ("failover_leader", true)] {
        let mut times = Vec::new();
        for round in 0..args.rounds {
            let ms = kill_once(&mut cluster, leader_dies).await?;
            eprintln!("{figure} {round}: {ms:.0} ms");
            times.push(ms);
        }
        result.add(&format!("{figure}_p50_ms"), percentile(&times, 0.5), "ms");
        result.add(&format!("{figure}_max_ms"), percentile(&times, 1.0), "ms");
    }
    result.print(args.json);
    Ok(())
}

async fn kill_once(cluster: &mut TestCluster, leader_dies: bool) -> anyhow::Result<f64> {
    let leader = cluster.leader().await?;
    let victim = if leader_dies {
        leader
    } else {
        cluster
            .local
            .nodes
            .iter()
            .map(|node| node.name.clone())
            .find(|name| *name != leader)
            .unwrap_or_default()
    };
    // A node that has just come back may still show where the machine was before.
    cluster
        .wait("the machine on the node to kill", async || {
            if cluster.vm("vm-a").await?.node == victim {
                return Ok(Some(()));
            }
            ensure!(cluster.migrate("vm-a", &victim).await?.state == "cut-over");
            Ok(None)
        })
        .await?;
    cluster.wait_progress("vm-a").await?;
    let at = cluster.local.index_of(&victim)?;
    let killed = Instant::now();
    cluster.local.kill_node(at);
    // Nobody is left who could promise more.
    let promised = cluster.witness("vm-a")?;
    cluster
        .wait("a restart elsewhere", async || {
            let vm = cluster.vm("vm-a").await?;
            let steps = vm.guest.as_ref().map_or(0, |guest| guest.steps);
            Ok((vm.node != victim && vm.state == "running" && steps > 0).then_some(()))
        })
        .await?;
    let ms = killed.elapsed().as_secs_f64() * 1e3;
    let guest = cluster.wait_progress("vm-a").await?;
    ensure!(
        promised > 0 && guest.found_at_boot >= promised,
        "promised {promised}, found {}",
        guest.found_at_boot
    );
    cluster.no_loss("vm-a")?;
    cluster.local.start_node(at)?;
    cluster
        .wait("the node's return", async || {
            Ok(cluster
                .nodes()
                .await?
                .into_iter()
                .find(|node| node.name == victim && node.state == "up")
                .map(|_| ()))
        })
        .await?;
    Ok(ms)
}
