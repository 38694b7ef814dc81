//! Live migrations of a 1 GiB machine, idle and dirtying 100 MiB/s: throughput and blackout, everything
//! included (stop, last pages, device state, claim, the commit on three durable voters, resume).

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use anyhow::ensure;
use clap::Parser;
use proto::admin::MigrationView;
use tests::cluster::{Machine, Setup, TestCluster};
use tests::figures::{self, percentile};

#[derive(Parser)]
struct Args {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Migrations of each kind.
    #[arg(long, default_value_t = 20)]
    migrations: u32,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut result = figures::Result::new("migrate");
    let idle = run("idle", 0, args.migrations).await?;
    let busy = run("busy", 100, args.migrations).await?;
    let loopback = loopback_gib_s()?;
    let rate = |end: &MigrationView| {
        end.memory_total_bytes as f64 / (1u64 << 30) as f64 / (end.total_us as f64 / 1e6)
    };
    let blackout = |ends: &[MigrationView]| {
        ends.iter()
            .map(|end| end.blackout_us as f64 / 1e3)
            .collect::<Vec<_>>()
    };
    let throughput: Vec<f64> = idle.iter().map(rate).collect();
    result.add_beside(
        "throughput_gib_s",
        percentile(&throughput, 0.5),
        "GiB/s",
        "one raw TCP stream over loopback",
        loopback,
    );
    let sent: Vec<f64> = idle
        .iter()
        .map(|end| end.sent_bytes as f64 / end.memory_total_bytes as f64)
        .collect();
    result.add("sent_over_memory_idle", percentile(&sent, 0.5), "×");
    result.add(
        "blackout_idle_p50_ms",
        percentile(&blackout(&idle), 0.5),
        "ms",
    );
    result.add(
        "blackout_idle_p99_ms",
        percentile(&blackout(&idle), 0.99),
        "ms",
    );
    result.add(
        "blackout_100mib_p50_ms",
        percentile(&blackout(&busy), 0.5),
        "ms",
    );
    result.add(
        "blackout_100mib_p99_ms",
        percentile(&blackout(&busy), 0.99),
        "ms",
    );
    let total = |ends: &[MigrationView]| {
        ends.iter()
            .map(|end| end.total_us as f64 / 1e3)
            .collect::<Vec<_>>()
    };
    result.add("total_idle_p50_ms", percentile(&total(&idle), 0.5), "ms");
    result.add("total_100mib_p50_ms", percentile(&total(&busy), 0.5), "ms");
    let mut names: Vec<&str> = busy
        .iter()
        .flat_map(|end| &end.parts)
        .map(|part| part.name.as_str())
        .collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let parts: Vec<f64> = busy
            .iter()
            .flat_map(|end| &end.parts)
            .filter(|part| part.name == name)
            .map(|part| part.us as f64 / 1e3)
            .collect();
        result.add(
            &format!("part_100mib_{}_p50_ms", name.replace(' ', "_")),
            percentile(&parts, 0.5),
            "ms",
        );
    }
    result.print(args.json);
    Ok(())
}

async fn run(name: &str, dirty_mib_s: u32, migrations: u32) -> anyhow::Result<Vec<MigrationView>> {
    // Default timing, no relay: what is measured is Baton.
    let cluster = TestCluster::start(Setup {
        fast: false,
        memory_mib: 3072,
        relay: false,
        ..Setup::default()
    })
    .await?;
    let machine = Machine {
        memory_mib: 1024,
        // Nearly all of its memory holds patterns: zero pages would flatter the throughput.
        working_set_mib: 960,
        dirty_mib_s,
        ..Machine::small(name)
    };
    cluster.create(&machine).await?;
    let mut ends = Vec::new();
    for number in 0..migrations {
        let vm = cluster.vm(name).await?;
        let to = cluster
            .local
            .nodes
            .iter()
            .map(|node| node.name.clone())
            .find(|node| *node != vm.node)
            .unwrap_or_default();
        let end = cluster.migrate(name, &to).await?;
        ensure!(end.state == "cut-over", "{name} {number}: {}", end.reason);
        eprintln!(
            "{name} {number}: total {:.0} ms, blackout {:.1} ms, {} rounds",
            end.total_us as f64 / 1e3,
            end.blackout_us as f64 / 1e3,
            end.rounds.len()
        );
        cluster.wait_progress(name).await?;
        ends.push(end);
    }
    Ok(ends)
}

/// What one TCP stream over loopback carries on this machine, now, GiB/s.
fn loopback_gib_s() -> anyhow::Result<f64> {
    const BYTES: usize = 2 << 30;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut sender = TcpStream::connect(listener.local_addr()?)?;
    let (mut receiver, _) = listener.accept()?;
    let begun = Instant::now();
    let sending = std::thread::spawn(move || -> std::io::Result<()> {
        let chunk = vec![0x5au8; 1 << 20];
        for _ in 0..BYTES / chunk.len() {
            sender.write_all(&chunk)?;
        }
        Ok(())
    });
    let mut chunk = vec![0u8; 1 << 20];
    while receiver.read(&mut chunk)? > 0 {}
    let seconds = begun.elapsed().as_secs_f64();
    sending
        .join()
        .map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    Ok(BYTES as f64 / (1u64 << 30) as f64 / seconds)
}
