//! What a flood of strangers costs the cluster's own work: commits and heartbeats with and without it, in one run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use proto::admin::SettingsSetRequest;
use tests::cluster::{Setup, TestCluster};
use tests::figures::{self, percentile};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// Half-open connections kept at a time.
const HALF_OPEN: usize = 1_000;
/// The pause between two of a stranger's tries.
const PAUSE: Duration = Duration::from_millis(2);
/// The pause between two commits: this measures how long one takes, not how many fit.
const BREATH: Duration = Duration::from_millis(10);

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
        let peer = format!("without the flood: {before:.2} ms");
        result.add_beside(&format!("commit_{what}_ms"), during, "ms", &peer, before);
    }
    let (before, during) = (quiet.slack_ms(), flooded.slack_ms());
    let peer = format!("without the flood: {before:.0} ms");
    result.add_beside("lease_slack_least_ms", during, "ms", &peer, before);
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
}

impl Work {
    async fn measure(&mut self, cluster: &TestCluster, seconds: u64) -> anyhow::Result<()> {
        let mut api = cluster.api().await?;
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
