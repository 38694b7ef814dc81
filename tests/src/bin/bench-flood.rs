//! What a flood of strangers costs the cluster's own work: commits and heartbeats with and without it, in one run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use proto::admin::SettingsSetRequest;
use tests::cluster::{Setup, TestCluster};
use tests::figures::{self, percentile};
use tests::scrape::{self, Buckets};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// Half-open connections kept at a time.
const HALF_OPEN: usize = 1_000;
/// The pause between two of a stranger's tries.
const PAUSE: Duration = Duration::from_millis(2);
/// The pause between two commits: this measures how long one takes, not how many fit.
const BREATH: Duration = Duration::from_millis(10);

/// How often nodes renew their leases here, ms: so that a run has enough of them for a p99.
const HEARTBEAT_MS: u32 = 100;
/// How long a renewal takes, as every node counts it.
const RENEWALS: &str = "clusterd_lease_renew_duration_seconds";

#[derive(Parser)]
struct Args {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// How long each of the measurements takes, seconds; there are three of each kind, in turn.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let cluster = TestCluster::start(Setup {
        relay: false,
        ..Setup::default()
    })
    .await?;
    let request = SettingsSetRequest {
        change: Some(clusterctl::client::change(None, "bench")),
        patch_json: format!("{{\"heartbeat_ms\": {HEARTBEAT_MS}}}"),
    };
    cluster.api().await?.api.settings_set(request).await?;
    let (mut quiet, mut flooded) = (Work::default(), Work::default());
    let tries = Arc::new(AtomicU64::new(0));
    for _ in 0..3 {
        quiet.measure(&cluster, args.seconds).await?;
        let flood = Flood::start(&cluster, &tries);
        flooded.measure(&cluster, args.seconds).await?;
        flood.stop();
    }
    let mut result = figures::Result::new("flood");
    for (what, share) in [("p50", 0.5), ("p99", 0.99)] {
        let (before, during) = (
            percentile(&quiet.commits_ms, share),
            percentile(&flooded.commits_ms, share),
        );
        let name = format!("commit_{what}_ms");
        result.add_beside(&name, during, "ms", "without the flood", before);
    }
    for (what, share) in [("p50", 0.5), ("p99", 0.99)] {
        let (before, during) = (
            scrape::quantile(&quiet.renewals, share) * 1e3,
            scrape::quantile(&flooded.renewals, share) * 1e3,
        );
        let name = format!("heartbeat_{what}_ms");
        result.add_beside(&name, during, "ms", "without the flood", before);
    }
    let count = flooded.renewals.last().map_or(0.0, |(_, count)| *count);
    result.add("heartbeats_under_the_flood", count, "");
    let (before, during) = (quiet.slack_ms(), flooded.slack_ms());
    result.add_beside(
        "lease_slack_least_ms",
        during,
        "ms",
        "without the flood",
        before,
    );
    result.add("strangers_tries", tries.load(Ordering::Relaxed) as f64, "");
    let lost = cluster.events().await?;
    let lost = lost
        .iter()
        .filter(|event| event.kind == "node.lost")
        .count();
    result.add("nodes_lost", lost as f64, "");
    result.print(args.json);
    anyhow::ensure!(lost == 0, "a node was lost under the flood");
    Ok(())
}

/// What the cluster's own work took.
#[derive(Default)]
struct Work {
    commits_ms: Vec<f64>,
    slacks_ms: Vec<f64>,
    renewals: Buckets,
}

impl Work {
    async fn measure(&mut self, cluster: &TestCluster, seconds: u64) -> anyhow::Result<()> {
        let mut api = cluster.api().await?;
        let before = renewals(cluster).await?;
        let end = Instant::now() + Duration::from_secs(seconds);
        let mut downtime_ms = 200;
        while Instant::now() < end {
            downtime_ms = 400 - downtime_ms + 1;
            let request = SettingsSetRequest {
                change: Some(clusterctl::client::change(None, "bench")),
                patch_json: format!("{{\"downtime_max_ms\": {downtime_ms}}}"),
            };
            let begun = Instant::now();
            api.api.settings_set(request).await?;
            self.commits_ms.push(begun.elapsed().as_secs_f64() * 1e3);
            tokio::time::sleep(BREATH).await;
        }
        let after = renewals(cluster).await?;
        scrape::add(&mut self.renewals, &scrape::since(&before, &after));
        for node in cluster.nodes().await? {
            if node.lease_slack_ms >= 0 {
                self.slacks_ms.push(node.lease_slack_ms as f64);
            }
        }
        Ok(())
    }

    fn slack_ms(&self) -> f64 {
        self.slacks_ms.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

/// The renewals of all nodes until now.
async fn renewals(cluster: &TestCluster) -> anyhow::Result<Buckets> {
    let mut all = Buckets::new();
    for node in &cluster.local.nodes {
        let figures = scrape::figures(cluster, &node.name).await?;
        scrape::add(&mut all, &scrape::buckets(&figures, RENEWALS));
    }
    Ok(all)
}

/// Strangers at every node's port: some say nothing, some say nonsense.
struct Flood {
    stop: Arc<AtomicBool>,
}

impl Flood {
    fn start(cluster: &TestCluster, tries: &Arc<AtomicU64>) -> Flood {
        let stop = Arc::new(AtomicBool::new(false));
        for node in &cluster.local.nodes {
            let (address, stop, tries) = (node.address, stop.clone(), tries.clone());
            let quiet = (stop.clone(), tries.clone());
            tokio::spawn(async move {
                let mut open = std::collections::VecDeque::new();
                while !quiet.0.load(Ordering::Relaxed) {
                    if let Ok(stream) = TcpStream::connect(address).await {
                        quiet.1.fetch_add(1, Ordering::Relaxed);
                        open.push_back(stream);
                    }
                    if open.len() > HALF_OPEN / 3 {
                        open.pop_front();
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            });
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    if let Ok(mut stream) = TcpStream::connect(address).await {
                        tries.fetch_add(1, Ordering::Relaxed);
                        // Whether anybody listens any more does not matter.
                        let _ = stream.write_all(&[0x16; 2_048]).await;
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            });
        }
        Flood { stop }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
