//! Measures commit latency against fdatasync: JSON on stdout, a table on stderr.
//!
//! `raft-bench [directory] [seconds]`: the directory chooses the disk (default: the current one).

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clusterd::raft::bench::{self, BenchOptions};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let base = arguments
        .next()
        .map_or_else(|| PathBuf::from("."), PathBuf::from);
    let seconds = match arguments.next() {
        Some(text) => text
            .to_string_lossy()
            .parse()
            .context("the second argument is a number of seconds")?,
        None => 3,
    };
    let mut options = BenchOptions::new(base.join(format!("raft-bench.{}", std::process::id())));
    options.duration = Duration::from_secs(seconds);
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    let report = runtime.block_on(bench::run(options))?;
    for figure in &report.figures {
        let ratio = figure
            .ratio
            .map_or_else(String::new, |ratio| format!("{ratio:>8.2} x"));
        eprintln!(
            "{:<36} {:>10.0} {:<4}{ratio}",
            figure.name, figure.value, figure.unit
        );
    }
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}
