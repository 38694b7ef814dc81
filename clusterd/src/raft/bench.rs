//! Measures what a commit costs against what the disk costs: three durable nodes on one machine.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster_model::{NodeId, NodeRole};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tonic::service::Routes;

use super::{Machine, Options, RaftHandle, Timing};
use crate::net::{self, Dialer};
use crate::trust::ephemeral::Authority;
use crate::trust::{Door, Judge};

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// A directory on the disk to measure; removed again at the end.
    pub dir: PathBuf,
    /// Voters.
    pub nodes: u64,
    /// Numbers of clients that propose at the same time, one measurement each.
    pub clients: Vec<usize>,
    /// How long each measurement takes.
    pub duration: Duration,
    /// Size of a command, bytes.
    pub command_bytes: usize,
}

impl BenchOptions {
    /// Three voters, 1 and 16 clients, 256-byte commands, three seconds each.
    pub fn new(dir: impl Into<PathBuf>) -> BenchOptions {
        BenchOptions {
            dir: dir.into(),
            nodes: 3,
            clients: vec![1, 16],
            duration: Duration::from_secs(3),
            command_bytes: 256,
        }
    }
}

/// What was measured, in the form that all benchmarks of this project print.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchReport {
    /// `raft`.
    pub bench: String,
    /// The machine's kernel and processors.
    pub machine: String,
    /// The figures.
    pub figures: Vec<Figure>,
}

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// What it is.
    pub name: String,
    /// Its value.
    pub value: f64,
    /// Its unit.
    pub unit: String,
    /// What it is compared with, in the same unit: one write and fdatasync on the same disk.
    pub peer: Option<f64>,
    /// `value / peer`.
    pub ratio: Option<f64>,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The disk or a socket refused.
    #[error("cannot measure in {dir}")]
    Io {
        /// Where.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The cluster did not come up or stopped.
    #[error("the cluster to measure failed: {why}")]
    Cluster {
        /// How.
        why: String,
    },
}

/// Counts: the least that a state machine can do, so that the log is measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Counter {
    /// Commands applied.
    pub applied: u64,
    /// The last filler of each client: a state that is not quite empty.
    pub last: BTreeMap<u64, String>,
}

/// Counts one up for a client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Count {
    client: u64,
    filler: String,
}

impl Machine for Counter {
    type Command = Count;
    type Reply = u64;

    fn apply(&mut self, _index: u64, command: &Count) -> u64 {
        self.applied += 1;
        self.last.insert(command.client, command.filler.clone());
        self.applied
    }
}

/// A node of the measured cluster; its server ends when this is dropped.
struct BenchNode {
    handle: RaftHandle<Counter>,
    address: String,
    stop: Option<oneshot::Sender<()>>,
}

/// Runs the benchmark.
///
/// # Errors
/// See [`BenchError`].
pub async fn run(options: BenchOptions) -> Result<BenchReport, BenchError> {
    let io_failed = |source| BenchError::Io {
        dir: options.dir.clone(),
        source,
    };
    std::fs::create_dir_all(&options.dir).map_err(io_failed)?;
    let mut figures = Vec::new();
    let nodes = start(&options).await?;
    let measured = measure(&options, &nodes, &mut figures).await;
    for mut node in nodes {
        if let Some(stop) = node.stop.take() {
            // The server may have ended by itself.
            let _ = stop.send(());
        }
        node.handle.shutdown().await;
    }
    std::fs::remove_dir_all(&options.dir).map_err(io_failed)?;
    measured?;
    Ok(BenchReport {
        bench: "raft".into(),
        machine: machine(),
        figures,
    })
}

fn figure(name: &str, value: f64, unit: &str, peer: Option<f64>) -> Figure {
    let ratio = peer.filter(|peer| *peer > 0.0).map(|peer| value / peer);
    Figure {
        name: name.into(),
        value,
        unit: unit.into(),
        peer,
        ratio,
    }
}

fn cluster_failed(error: &dyn std::fmt::Display) -> BenchError {
    BenchError::Cluster {
        why: error.to_string(),
    }
}

fn machine() -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    format!("Linux {}, {processors} processors", kernel.trim())
}

#[derive(Clone, Copy)]
struct Quantiles {
    p50: f64,
    p99: f64,
}

fn quantiles(mut took: Vec<Duration>) -> Quantiles {
    took.sort_unstable();
    let at = |percent: usize| {
        let index = (took.len() * percent / 100).min(took.len().saturating_sub(1));
        took.get(index).map_or(0.0, |took| took.as_secs_f64() * 1e6)
    };
    Quantiles {
        p50: at(50),
        p99: at(99),
    }
}

/// What a commit is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    /// A file that grows by each write, so that each sync commits its new size and blocks too: what a program does
    /// that takes no care.
    Growing,
    /// A file that has all its blocks and is overwritten, so that a sync is the disk's alone: what the log itself does.
    Preallocated,
}

/// Size of the preallocated peer, bytes: the journal's.
const PEER_BYTES: u64 = super::journal::JOURNAL_BYTES;
/// What is overwritten at once, bytes: whole blocks, as the journal's records are, so that nothing is read before.
const PEER_BLOCK: usize = 4096;

/// What a write and fdatasync takes when `writers` do so at once, each to its own file.
async fn disk(
    options: &BenchOptions,
    peer: Peer,
    writers: u64,
) -> Result<Vec<Duration>, BenchError> {
    let tasks: Vec<_> = (0..writers)
        .map(|writer| {
            let path = options.dir.join(format!("{peer:?}{writer}"));
            let (bytes, duration) = (options.command_bytes, options.duration / SLICES);
            tokio::task::spawn_blocking(move || match peer {
                Peer::Growing => grow(&path, bytes, duration),
                Peer::Preallocated => overwrite(&path, PEER_BYTES, duration),
            })
        })
        .collect();
    let mut took = Vec::new();
    for task in tasks {
        let one = task.await.map_err(|error| cluster_failed(&error))?;
        took.extend(one.map_err(|source| BenchError::Io {
            dir: options.dir.clone(),
            source,
        })?);
    }
    Ok(took)
}

/// What each append of `bytes` and fdatasync to a new file at `path` takes.
fn grow(path: &Path, bytes: usize, duration: Duration) -> io::Result<Vec<Duration>> {
    let file = File::create(path)?;
    let block = vec![b'x'; bytes];
    let offset = |write: u64| write * bytes as u64;
    timed(&file, &block, offset, duration)
}

/// What each overwriting of one block and fdatasync takes, in a file at `path` whose `size` bytes were all written
/// and synced before.
fn overwrite(path: &Path, size: u64, duration: Duration) -> io::Result<Vec<Duration>> {
    let open = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path);
    let file = open?;
    if file.metadata()?.len() != size {
        let zeros = vec![0; 1 << 20];
        for at in (0..size).step_by(zeros.len()) {
            let length = zeros.len().min((size - at) as usize);
            file.write_all_at(&zeros[..length], at)?;
        }
        file.sync_all()?;
    }
    let block = vec![b'x'; PEER_BLOCK];
    let blocks = (size / PEER_BLOCK as u64).max(1);
    let offset = |write: u64| write % blocks * PEER_BLOCK as u64;
    timed(&file, &block, offset, duration)
}

/// What each writing of `block` at the place of its number and fdatasync takes, for so long.
fn timed(
    file: &File,
    block: &[u8],
    offset: impl Fn(u64) -> u64,
    duration: Duration,
) -> io::Result<Vec<Duration>> {
    let mut took = Vec::new();
    let end = Instant::now() + duration;
    while Instant::now() < end {
        let begun = Instant::now();
        file.write_all_at(block, offset(took.len() as u64))?;
        file.sync_data()?;
        took.push(begun.elapsed());
    }
    Ok(took)
}

async fn start(options: &BenchOptions) -> Result<Vec<BenchNode>, BenchError> {
    let authority = Authority::new().map_err(|error| cluster_failed(&error))?;
    let mut nodes = Vec::new();
    for id in 1..=options.nodes {
        nodes.push(start_node(options, &authority, id).await?);
    }
    let first = nodes[0].handle.clone();
    first
        .bootstrap("n1", &nodes[0].address)
        .await
        .map_err(|error| cluster_failed(&error))?;
    let leads = tokio::time::timeout(Duration::from_secs(10), async {
        first
            .leadership()
            .wait_for(|leadership| leadership.is_me)
            .await
            .is_ok()
    });
    if leads.await != Ok(true) {
        return Err(cluster_failed(&"no leader within 10 s"));
    }
    for node in &nodes[1..] {
        let id = node.handle.node();
        first
            .add_learner(id, &format!("n{}", id.0), &node.address)
            .await
            .map_err(|error| cluster_failed(&error))?;
        first
            .promote(id, Duration::from_secs(10))
            .await
            .map_err(|error| cluster_failed(&error))?;
    }
    Ok(nodes)
}

async fn start_node(
    options: &BenchOptions,
    authority: &Authority,
    id: u64,
) -> Result<BenchNode, BenchError> {
    let io_failed = |source| BenchError::Io {
        dir: options.dir.clone(),
        source,
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .map_err(io_failed)?;
    let address = listener.local_addr().map_err(io_failed)?.to_string();
    let raft = Options {
        create: true,
        timing: Timing::default(),
        ..Options::new(NodeId(id), options.dir.join(format!("n{id}")))
    };
    let keeper = authority
        .keeper(NodeId(id), NodeRole::Voter)
        .map_err(|error| cluster_failed(&error))?;
    let door = Door::new(keeper.clone());
    let dialer = Dialer::new(IpAddr::V4(Ipv4Addr::LOCALHOST), keeper);
    let handle = super::start::<Counter>(raft, dialer)
        .await
        .map_err(|error| cluster_failed(&error))?;
    let (stop, stopped) = oneshot::channel::<()>();
    let routes = Routes::new(handle.service());
    tokio::spawn(async move {
        let stopped = async move {
            // A dropped sender means stop as well.
            let _ = stopped.await;
        };
        // Whoever has a certificate of this measurement's own authority may say anything.
        let judge: Judge = Arc::new(|_, _| Ok(()));
        if let Err(error) = net::serve(listener, &door, judge, routes, stopped).await {
            tracing::error!(%error, "a measured node's server failed");
        }
    });
    Ok(BenchNode {
        handle,
        address,
        stop: Some(stop),
    })
}

/// The number of clients whose p50 is the bench's headline: `commit_over_fdatasync` and its like.
const HEADLINE_CLIENTS: usize = 16;

/// Slices that a measurement is cut into: the disk alone, the disk under as many writers as there are nodes, and the
/// commits take turns, since a disk that others share is now fast and now slow.
const SLICES: u32 = 6;

async fn measure(
    options: &BenchOptions,
    nodes: &[BenchNode],
    figures: &mut Vec<Figure>,
) -> Result<(), BenchError> {
    let leader = nodes
        .iter()
        .find(|node| node.handle.is_leader())
        .ok_or_else(|| cluster_failed(&"nobody leads"))?;
    for &clients in &options.clients {
        // Connections, caches and the allocator settle first.
        let slice = options.duration / SLICES;
        propose(&leader.handle, clients, options, slice).await?;
        let (mut growing, mut alone, mut shared) = (Vec::new(), Vec::new(), Vec::new());
        let mut took = Vec::new();
        let mut committing = Duration::ZERO;
        for _ in 0..SLICES {
            // What the stores put off would be measured with the disk.
            for node in nodes {
                node.handle.settle().await;
            }
            growing.extend(disk(options, Peer::Growing, 1).await?);
            alone.extend(disk(options, Peer::Preallocated, 1).await?);
            // All nodes of this measurement share one disk, which a real cluster's do not.
            shared.extend(disk(options, Peer::Preallocated, options.nodes).await?);
            let begun = Instant::now();
            took.extend(propose(&leader.handle, clients, options, slice).await?);
            committing += begun.elapsed();
        }
        let rate = took.len() as f64 / committing.as_secs_f64();
        let (growing, alone, shared, commit) = (
            quantiles(growing),
            quantiles(alone),
            quantiles(shared),
            quantiles(took),
        );
        let name =
            |what: &str| format!("commit {what}, {} nodes, {clients} clients", options.nodes);
        let beside = |what: &str| format!("fdatasync {what}, beside {clients} clients");
        figures.push(figure(&beside("growing p50"), growing.p50, "us", None));
        figures.push(figure(&beside("preallocated p50"), alone.p50, "us", None));
        figures.push(figure(&beside("preallocated p99"), alone.p99, "us", None));
        figures.push(figure(
            &beside(&format!(
                "preallocated p50 of {} writers at once",
                options.nodes
            )),
            shared.p50,
            "us",
            Some(alone.p50),
        ));
        figures.push(figure(&name("p50"), commit.p50, "us", Some(alone.p50)));
        figures.push(figure(&name("p99"), commit.p99, "us", Some(alone.p99)));
        figures.push(figure(&name("rate"), rate, "1/s", None));
        if clients == HEADLINE_CLIENTS {
            for (name, peer) in [
                ("commit_over_fdatasync", growing.p50),
                ("commit_over_fdatasync_preallocated", alone.p50),
            ] {
                figures.push(figure(name, commit.p50 / peer, "x", None));
            }
        }
    }
    Ok(())
}

/// Proposes from `clients` tasks, each waiting for its answer; gives how long each commit took.
async fn propose(
    leader: &RaftHandle<Counter>,
    clients: usize,
    options: &BenchOptions,
    duration: Duration,
) -> Result<Vec<Duration>, BenchError> {
    let end = Instant::now() + duration;
    let tasks: Vec<_> = (0..clients as u64)
        .map(|client| {
            let (leader, filler) = (leader.clone(), "x".repeat(options.command_bytes));
            tokio::spawn(async move {
                let command = Count { client, filler };
                let mut took = Vec::new();
                while Instant::now() < end {
                    let begun = Instant::now();
                    leader.propose(&command).await?;
                    took.push(begun.elapsed());
                }
                Ok::<_, super::ProposeError>(took)
            })
        })
        .collect();
    let mut all = Vec::new();
    for task in tasks {
        let took = task.await.map_err(|error| cluster_failed(&error))?;
        all.extend(took.map_err(|error| cluster_failed(&error))?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peer_grows_and_the_other_keeps_its_size() {
        let folder = tempfile::tempdir().expect("a folder");
        let duration = Duration::from_millis(20);
        let size = 4 * PEER_BLOCK as u64;
        let length = |path: &Path| std::fs::metadata(path).expect("a file").len();

        let path = folder.path().join("preallocated");
        // Often enough to come round.
        let mut writes = 0;
        while writes < 9 {
            writes += overwrite(&path, size, duration).expect("it writes").len();
        }
        assert_eq!(length(&path), size);

        let path = folder.path().join("growing");
        let writes = grow(&path, 256, duration).expect("it writes").len() as u64;
        assert!(writes > 0);
        assert_eq!(length(&path), writes * 256);
    }
}
