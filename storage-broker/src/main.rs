//! The storage broker's command: the daemon beside `clusterd`, and the embedded NFS server.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use storage_broker::{daemon, nfs_server};
use tokio::signal::unix::{SignalKind, signal};

/// `json` makes the log one JSON object a line.
const LOG_FORMAT: &str = "BATON_LOG_FORMAT";

/// Volumes, disks and the storage fence of a Baton node.
#[derive(Debug, Parser)]
#[command(name = "storage-broker", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve `clusterd` on this node.
    Serve(daemon::ServeArgs),
    /// Serve a directory over NFSv3, for clusters without a storage server of their own.
    ServeNfs(nfs_server::Config),
}

#[tokio::main]
async fn main() -> ExitCode {
    proto::core_dump::rule_out();
    let log = tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr);
    if std::env::var(LOG_FORMAT).is_ok_and(|format| format == "json") {
        log.json().init();
    } else {
        log.init();
    }
    match run(Cli::parse().command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Each error names its cause itself.
            eprintln!("storage-broker: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => {
            let mut terminate = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            let stop = async {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            };
            Ok(daemon::serve(args, stop).await?)
        }
        Command::ServeNfs(config) => nfs_server::run(config).await,
    }
}
