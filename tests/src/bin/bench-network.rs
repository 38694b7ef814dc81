//! `cargo xtask bench network`: how long a TCP peer of a Linux guest is left without an answer by a live migration.
//!
//! Needs root: the cluster runs in a network namespace of its own, with a bridge for each node.

use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::Parser;
use tests::cluster::TestCluster;
use tests::figures::{self, percentile};
use tests::lab::{self, EchoPeer};
use tests::linux::{LinuxGuest, Terminal};

const VM: &str = "linux-1";
/// How long the peer is watched without a migration, for comparison.
const QUIET: Duration = Duration::from_secs(10);

#[derive(Parser)]
struct Args {
    /// Prints one JSON object on stdout.
    #[arg(long)]
    json: bool,
    /// Migrations.
    #[arg(long, default_value_t = 20)]
    migrations: usize,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let guest = LinuxGuest::find()?;
    // Before any other thread is started: threads and processes inherit their starter's network.
    lab::enter()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut cluster = lab::cluster_with_guest(&guest, VM).await?;
        let outcome = measure(&cluster, &args).await;
        if outcome.is_err()
            && let Some(kept) = cluster.keep_logs()
        {
            eprintln!("the cluster's logs: {}", kept.display());
        }
        outcome
    })
}

async fn measure(cluster: &TestCluster, args: &Args) -> anyhow::Result<()> {
    let mut peer = EchoPeer::connect().await?;
    let begun = Instant::now();
    while begun.elapsed() < QUIET {
        peer.wait_answers(1).await?;
    }
    let quiet_ms = peer.longest_pause(begun).as_secs_f64() * 1e3;
    let (mut gaps, mut blackouts) = (Vec::new(), Vec::new());
    for round in 0..args.migrations {
        let to = lab::next_node(cluster, VM, round).await?;
        let begun = Instant::now();
        let end = cluster.migrate(VM, &to).await?;
        ensure!(
            end.state == "cut-over",
            "migration {round}: {} {}",
            end.state,
            end.reason
        );
        peer.wait_answers(50).await?;
        let (gap_ms, blackout_ms) = (
            peer.longest_pause(begun).as_secs_f64() * 1e3,
            end.blackout_us as f64 / 1e3,
        );
        eprintln!("migration {round}: gap {gap_ms:.1} ms, blackout {blackout_ms:.1} ms");
        gaps.push(gap_ms);
        blackouts.push(blackout_ms);
    }
    let status = Terminal::open(cluster, VM).await?.status().await?;
    ensure!(status.errors == 0, "the guest's worker found: {status:?}");
    let mut result = figures::Result::new("network");
    let blackout_p50_ms = percentile(&blackouts, 0.5);
    result.add_beside(
        "network_gap_p50_ms",
        percentile(&gaps, 0.5),
        "ms",
        "blackout",
        blackout_p50_ms,
    );
    result.add("network_gap_p99_ms", percentile(&gaps, 0.99), "ms");
    result.add("network_blackout_p50_ms", blackout_p50_ms, "ms");
    result.add("network_quiet_longest_ms", quiet_ms, "ms");
    result.print(args.json);
    Ok(())
}
