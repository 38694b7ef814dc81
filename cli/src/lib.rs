//! `clusterctl`: what a person types to run a Baton cluster.
//!
//! Data goes to stdout, talk and progress to stderr. Every noun is a file in [`commands`].

#![forbid(unsafe_code)]

pub mod client;
pub mod commands;
pub mod demo;
pub mod local;
pub mod output;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use client::Connection;
use commands::{balance, cluster, dev, events, lease, migration, node, rule, vm, volume, why};
use output::Format;

/// What a shell gives for a program that Ctrl-C ended.
const EXIT_INTERRUPTED: u8 = 130;

/// Shown under the commands.
const AFTER_HELP: &str = "\
Examples:
  clusterctl demo                                 see a migration, a drain and a failover on this machine
  clusterctl dev up                               a cluster of three on this machine, to try things
  clusterctl vm create web-1 --disk vol-a:40GiB   make and start a machine
  clusterctl migrate web-1 --to n3                move it while it runs
  clusterctl drain n1 --dry-run                   what would leave n1, where to, and why
  clusterctl why web-1                            why it is where it is

Exit codes: 0 done, 1 refused or failed, 2 misused, 5 done in part, 130 interrupted (the work goes on).";

/// The command line of Baton, a VM cluster manager.
#[derive(Debug, Parser)]
#[command(
    name = "clusterctl",
    version,
    propagate_version = true,
    disable_help_subcommand = true,
    after_help = AFTER_HELP
)]
pub struct Args {
    /// A node of the cluster, `host:port`, or the path of a node's Unix socket; of several with commas
    /// between them the first that answers is asked.
    #[arg(
        long,
        short = 's',
        global = true,
        env = "CLUSTERCTL_SERVER",
        default_value = "127.0.0.1:7440"
    )]
    server: String,
    /// How to print results.
    #[arg(
        long,
        short = 'o',
        global = true,
        env = "CLUSTERCTL_OUTPUT",
        value_enum,
        default_value = "table"
    )]
    output: Format,
    /// Why, for the record: kept with the event and shown by `why`.
    #[arg(long, global = true, default_value = "")]
    reason: String,
    /// An id of your own for this request: repeating it repeats the answer and does nothing twice.
    #[arg(long, global = true)]
    request_id: Option<String>,
    /// Answer yes to every question.
    #[arg(long, short = 'y', global = true)]
    yes: bool,
    /// Return as soon as the work is accepted; watch it with `migration watch` or `node show`.
    #[arg(long, global = true)]
    no_wait: bool,
    /// How long to wait for the work, seconds.
    #[arg(long, global = true, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The cluster: init, status, settings.
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// Nodes: list, show, add, remove, drain, uncordon.
    #[command(subcommand)]
    Node(node::Command),
    /// Machines: create, list, show, start, stop, delete, console, migrate.
    #[command(subcommand)]
    Vm(vm::Command),
    /// Volumes: add, list, remove.
    #[command(subcommand)]
    Volume(volume::Command),
    /// Storage leases: who may write which disk, under which token.
    #[command(subcommand)]
    Lease(lease::Command),
    /// Live migrations: list, show, watch, cancel.
    #[command(subcommand)]
    Migration(migration::Command),
    /// Placement rules: set, remove, list.
    #[command(subcommand)]
    Rule(rule::Command),
    /// The balancer: run, status.
    #[command(subcommand)]
    Balance(balance::Command),
    /// What happened.
    Events(events::Args),
    /// Why a machine, node or migration is where and as it is.
    Why(why::Args),
    /// The same as `cluster status`.
    Status,
    /// The same as `node drain`.
    #[command(alias = "evacuate")]
    Drain(node::DrainArgs),
    /// The same as `node uncordon`.
    Uncordon(node::UncordonArgs),
    /// The same as `vm migrate`.
    Migrate(vm::MigrateArgs),
    /// A cluster on this machine, to try things: up, down, kill, start.
    #[command(subcommand)]
    Dev(dev::Command),
    /// Show the main job on this machine: three nodes, real machines, a migration, a drain, a failover.
    Demo(demo::Args),
}

/// What every command may use: the flags that stand above all of them.
pub struct Context {
    /// Where to connect.
    pub server: String,
    /// How to print.
    pub output: Format,
    /// `--reason`.
    pub reason: String,
    /// `--request-id`.
    pub request_id: Option<String>,
    /// `--yes`.
    pub yes: bool,
    /// `--no-wait`.
    pub no_wait: bool,
    /// `--timeout`.
    pub timeout: std::time::Duration,
}

impl Context {
    /// Connects to the node that `--server` names.
    ///
    /// # Errors
    /// When nothing answers there.
    pub async fn connect(&self) -> Result<Connection, client::CliError> {
        Connection::open(&self.server).await
    }

    /// What a changing request carries.
    pub fn change(&self) -> Option<proto::admin::Change> {
        Some(client::change(self.request_id.clone(), &self.reason))
    }
}

/// Parses the command line, does it, and says how it went: 0 well, 1 refused or failed, 2 misused,
/// 5 done in part, 130 interrupted.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(args)) {
        Ok(code) => code,
        // As `head` wants it: no word, no harm.
        Err(client::CliError::OutputClosed) => ExitCode::SUCCESS,
        Err(error @ client::CliError::Interrupted(_)) => {
            eprintln!("{error}");
            ExitCode::from(EXIT_INTERRUPTED)
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<ExitCode, client::CliError> {
    let context = Context {
        server: args.server,
        output: args.output,
        reason: args.reason,
        request_id: args.request_id,
        yes: args.yes,
        no_wait: args.no_wait,
        timeout: std::time::Duration::from_secs(args.timeout),
    };
    let c = &context;
    match args.command {
        Command::Cluster(command) => cluster::run(c, command).await,
        Command::Status => cluster::status(c).await,
        Command::Node(command) => node::run(c, command).await,
        Command::Drain(args) => node::drain(c, args).await,
        Command::Uncordon(args) => node::uncordon(c, args).await,
        Command::Vm(command) => vm::run(c, command).await,
        Command::Migrate(args) => vm::migrate(c, args).await,
        Command::Volume(command) => volume::run(c, command).await,
        Command::Lease(command) => lease::run(c, command).await,
        Command::Migration(command) => migration::run(c, command).await,
        Command::Rule(command) => rule::run(c, command).await,
        Command::Balance(command) => balance::run(c, command).await,
        Command::Events(args) => events::run(c, args).await,
        Command::Why(args) => why::run(c, args).await,
        Command::Dev(command) => dev::run(c, command).await,
        Command::Demo(args) => demo::run(c, args).await,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_tree_is_sound() {
        super::Args::command().debug_assert();
    }
}
