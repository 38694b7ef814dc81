//! Measures commit latency against fdatasync: a table on stderr and, with `--json`, an object on stdout.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use clusterd::raft::bench::{self, BenchOptions};

// As in the daemon that this measures.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Commit latency of three durable nodes beside one fdatasync on the same disk, of a file that grows and of a
/// preallocated one, in the same run.
#[derive(Parser)]
struct Args {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Where to write: chooses the disk.
    #[arg(long, default_value = ".")]
    folder: PathBuf,
    /// How long each measurement takes, seconds.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let folder = format!("raft-bench.{}", std::process::id());
    let mut options = BenchOptions::new(args.folder.join(folder));
    options.duration = Duration::from_secs(args.seconds);
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    let report = runtime.block_on(bench::run(options))?;
    for figure in &report.figures {
        let ratio = figure
            .ratio
            .map_or_else(String::new, |ratio| format!("{ratio:>8.2} x"));
        eprintln!(
            "{:<58} {:>10.2} {:<4}{ratio}",
            figure.name, figure.value, figure.unit
        );
    }
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(())
}
