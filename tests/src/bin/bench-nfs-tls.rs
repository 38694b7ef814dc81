//! `cargo xtask bench nfs-tls`: what TLS costs the data path of a disk, against the embedded NFS server.
//!
//! Client and server are two processes on this machine, over loopback. Plain and TLS take turns,
//! round by round, against the same server and the same file, so that what else the machine does meets both.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Parser;
use cluster_model::Token;
use futures::stream::{FuturesUnordered, StreamExt};
use storage_broker::dialer::Dialer;
use storage_broker::fence::{DISK_MODE, claimant, data_credential};
use storage_broker::nfs::client::SetAttributes;
use storage_broker::nfs::{FileHandle, NfsClient, Stable, mount};
use storage_broker::tls::ClientTls;
use storage_broker::volume::VolumeUrl;
use tests::figures::{self, percentile};

const BROKER_UID: u32 = 50_000;
const NODE_UID: u32 = 60_001;
const TOKEN: Token = Token(1);
const FILE_BYTES: u64 = 64 << 20;
const BLOCK: usize = 4096;
const PIECE: usize = 1 << 20;
/// 1 MiB calls in flight in the sequential runs: enough that the wire never rests.
const PIECES_IN_FLIGHT: usize = 8;
const DEPTHS: [usize; 3] = [1, 8, 32];
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Parser)]
struct Args {
    /// Prints one JSON object on stdout.
    #[arg(long)]
    json: bool,
    /// Rounds; the figures are their medians.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// 4 KiB writes in each measurement at each depth.
    #[arg(long, default_value_t = 2000)]
    writes: u64,
    /// MiB in each sequential measurement.
    #[arg(long, default_value_t = 512)]
    mib: u64,
    /// Where the served directory is made; the system's temporary directory unless given.
    #[arg(long)]
    directory: Option<std::path::PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(measure(&args))
}

/// `storage-broker serve-nfs`; killed when dropped.
struct Server {
    child: Child,
    url: String,
    authority: String,
}

impl Server {
    fn start(folder: &Path) -> anyhow::Result<Server> {
        let programs = std::env::var("BATON_PROGRAMS").context(
            "BATON_PROGRAMS does not say where storage-broker is; use cargo xtask bench nfs-tls",
        )?;
        std::fs::create_dir_all(folder.join("root"))?;
        let mut child = Command::new(Path::new(&programs).join("storage-broker"))
            .args(["serve-nfs", "--listen", "127.0.0.1:0", "--root"])
            .arg(folder.join("root"))
            .arg("--tls-self-signed")
            .arg(folder.join("tls"))
            .env("RUST_LOG", "warn")
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start storage-broker")?;
        let mut url = String::new();
        let stdout = child.stdout.take().context("the server has no stdout")?;
        BufReader::new(stdout).read_line(&mut url)?;
        let url = url.trim().to_owned();
        let authority = std::fs::read_to_string(folder.join("tls/ca.pem"));
        let server = Server {
            child,
            url,
            authority: authority.context("the server did not start")?,
        };
        Ok(server)
    }

    async fn connect(&self, tls: bool) -> anyhow::Result<NfsClient> {
        let (query, authority) = if tls {
            ("?tls=require", self.authority.as_str())
        } else {
            ("", "")
        };
        let volume: VolumeUrl = format!("{}{query}", self.url).parse()?;
        let dialer = Dialer::default().with_tls(ClientTls::of_volume(&volume, authority)?);
        let VolumeUrl::Nfs(url) = volume else {
            bail!("not an NFS volume: {}", self.url)
        };
        Ok(mount(&url, &dialer, CALL_TIMEOUT).await?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Errors mean that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The rounds' values of one measurement, plain and under TLS.
#[derive(Default)]
struct Pair {
    plain: Vec<f64>,
    tls: Vec<f64>,
}

impl Pair {
    fn add(&mut self, tls: bool, value: f64) {
        if tls {
            self.tls.push(value);
        } else {
            self.plain.push(value);
        }
    }

    fn print(&self, result: &mut figures::Result, name: &str, unit: &str) {
        let (tls, plain) = (percentile(&self.tls, 0.5), percentile(&self.plain, 0.5));
        result.add_beside(name, tls, unit, "plain", plain);
    }
}

async fn measure(args: &Args) -> anyhow::Result<()> {
    let folder = match &args.directory {
        Some(parent) => tempfile::tempdir_in(parent)?,
        None => tempfile::tempdir()?,
    };
    let server = Server::start(folder.path())?;
    let plain = server.connect(false).await?;
    let secure = server.connect(true).await?;
    let file = prepare(&plain).await?;
    let mut handshakes = Pair::default();
    let mut writes: [Pair; DEPTHS.len()] = Default::default();
    let (mut sequential_writes, mut sequential_reads) = (Pair::default(), Pair::default());
    for round in 0..args.rounds {
        // Whoever goes first in one round goes second in the next.
        let order = if round % 2 == 0 {
            [false, true]
        } else {
            [true, false]
        };
        for tls in order {
            let begun = Instant::now();
            drop(server.connect(tls).await?);
            handshakes.add(tls, begun.elapsed().as_secs_f64() * 1e3);
        }
        for (depth, pair) in DEPTHS.into_iter().zip(&mut writes) {
            for tls in order {
                let client = if tls { &secure } else { &plain };
                pair.add(tls, small_writes(client, &file, depth, args.writes).await?);
            }
        }
        for tls in order {
            let client = if tls { &secure } else { &plain };
            let rate = sequential(client, &file, args.mib, true).await?;
            sequential_writes.add(tls, rate);
            let rate = sequential(client, &file, args.mib, false).await?;
            sequential_reads.add(tls, rate);
        }
        eprintln!("round {} of {}", round + 1, args.rounds);
    }
    let mut result = figures::Result::new("nfs-tls");
    for (depth, pair) in DEPTHS.into_iter().zip(&writes) {
        let name = format!("tls_write_4k_file_sync_qd{depth}");
        pair.print(&mut result, &name, "IOPS");
    }
    sequential_writes.print(&mut result, "tls_write_1m_unstable", "MB/s");
    sequential_reads.print(&mut result, "tls_read_1m", "MB/s");
    handshakes.print(&mut result, "tls_mount", "ms");
    result.print(args.json);
    Ok(())
}

/// A disk under a token, written once to its end.
async fn prepare(client: &NfsClient) -> anyhow::Result<FileHandle> {
    let attributes = SetAttributes {
        mode: Some(DISK_MODE),
        gid: Some(TOKEN.gid()),
        size_bytes: Some(FILE_BYTES),
    };
    let owner = claimant(BROKER_UID, TOKEN);
    let file = client.create(owner, client.root(), "disk", attributes);
    let file = file.await?;
    sequential(client, &file, FILE_BYTES >> 20, true).await?;
    client
        .commit(data_credential(NODE_UID, TOKEN), &file)
        .await?;
    Ok(file)
}

/// Random 4 KiB WRITEs, FILE_SYNC, that many at once: a second.
async fn small_writes(
    client: &NfsClient,
    file: &FileHandle,
    depth: usize,
    count: u64,
) -> anyhow::Result<f64> {
    let holder = data_credential(NODE_UID, TOKEN);
    let data = Bytes::from(vec![2; BLOCK]);
    let write = |number: u64| {
        let offset = number * 7919 % (FILE_BYTES / BLOCK as u64) * BLOCK as u64;
        client.write(holder, file, offset, &data, Stable::FILE_SYNC)
    };
    let mut numbers = 0..count;
    let begun = Instant::now();
    let mut flight: FuturesUnordered<_> = numbers.by_ref().take(depth).map(write).collect();
    while let Some(reply) = flight.next().await {
        anyhow::ensure!(reply?.count as usize == BLOCK, "a short write");
        flight.extend(numbers.next().map(write));
    }
    Ok(count as f64 / begun.elapsed().as_secs_f64())
}

/// 1 MiB WRITEs (UNSTABLE: the wire, not the disk) or READs in a row: MB/s.
async fn sequential(
    client: &NfsClient,
    file: &FileHandle,
    mib: u64,
    write: bool,
) -> anyhow::Result<f64> {
    let holder = data_credential(NODE_UID, TOKEN);
    let data = Bytes::from((0..PIECE).map(|at| (at * 31) as u8).collect::<Vec<_>>());
    let transfer = |number: u64| {
        let offset = number * PIECE as u64 % FILE_BYTES;
        let data = data.clone();
        async move {
            let done = if write {
                let reply = client.write(holder, file, offset, &data, Stable::UNSTABLE);
                reply.await?.count as usize
            } else {
                let reply = client.read(holder, file, offset, PIECE as u32);
                reply.await?.data.len()
            };
            anyhow::ensure!(done == PIECE, "a short transfer: {done}");
            Ok(())
        }
    };
    let mut numbers = 0..mib;
    let begun = Instant::now();
    let mut flight: FuturesUnordered<_> = numbers
        .by_ref()
        .take(PIECES_IN_FLIGHT)
        .map(transfer)
        .collect();
    while let Some(done) = flight.next().await {
        done?;
        flight.extend(numbers.next().map(transfer));
    }
    Ok((mib << 20) as f64 / 1e6 / begun.elapsed().as_secs_f64())
}
