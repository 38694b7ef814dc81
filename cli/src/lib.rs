//! `clusterctl`: what a person types to run a Baton cluster.
//!
//! Data goes to stdout, talk and progress to stderr. Every noun is a file in [`commands`].

#![forbid(unsafe_code)]

pub mod client;
pub mod commands;
pub mod contexts;
pub mod demo;
pub mod local;
pub mod output;
pub mod private_file;
mod prompt;
pub mod span;

use std::convert::Infallible;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use client::{CliError, Connection, Endpoint};
use commands::{
    audit, balance, cluster, context, dev, events, lease, migration, node, rule, token, vm, volume,
    why,
};
use contexts::{Contexts, Given};
use output::Format;
use proto::token::Secret;

/// What a shell gives for a program that Ctrl-C ended.
const EXIT_INTERRUPTED: u8 = 130;

/// Shown under the commands.
const AFTER_HELP: &str = "\
Examples:
  clusterctl demo                                 see a migration, a drain and a failover on this machine
  clusterctl dev up                               a cluster of three on this machine, to try things
  sudo clusterctl cluster init                    on its first node: make a cluster
  clusterctl node add n2                          print the line that lets a node in
  clusterctl context add prod n1:7440             on your own machine: know the cluster, with your token
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
    /// between them the first that answers is asked. Else the context says where, else it is this host's own
    /// socket, /var/lib/baton/clusterd.sock.
    #[arg(long, short = 's', global = true, env = "CLUSTERCTL_SERVER")]
    server: Option<String>,
    /// The cluster to ask, as `context add` named it.
    #[arg(
        long,
        short = 'C',
        global = true,
        value_name = "NAME",
        env = "CLUSTERCTL_CONTEXT"
    )]
    context: Option<String>,
    /// The access token for --server (BT1.…). Others on this host can read arguments: prefer --token-file, or
    /// CLUSTERCTL_TOKEN in the environment.
    #[arg(long, global = true, value_parser = secret, conflicts_with = "token_file")]
    token: Option<Secret>,
    /// A file with the access token.
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
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

/// The variable that may hold the access token.
const TOKEN_VARIABLE: &str = "CLUSTERCTL_TOKEN";

/// Takes any text: what is wrong with it is told without repeating it.
fn secret(text: &str) -> Result<Secret, Infallible> {
    Ok(Secret::from_text(text))
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The cluster: init, status, settings, ca, trust.
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// Nodes: list, show, check, add, join-tokens, remove, drain, uncordon.
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
    /// Access tokens: create, list, revoke.
    #[command(subcommand)]
    Token(token::Command),
    /// Clusters that you know: add, list, use, show, remove.
    #[command(subcommand)]
    Context(context::Command),
    /// Who changed what, from where, why.
    Audit(audit::Args),
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
    /// Where to connect and what to show there, as far as it was given.
    pub given: Given,
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
    /// Where to connect and what to show there.
    ///
    /// # Errors
    /// When the context that is meant is not there, or the file of contexts cannot be used.
    pub fn endpoint(&self) -> Result<Endpoint, CliError> {
        self.given.endpoint(|| match contexts::path() {
            Ok(path) => Contexts::load(&path),
            // A service without a home has no contexts, and needs none.
            Err(_) if self.given.context.is_none() => Ok(Contexts::default()),
            Err(error) => Err(error),
        })
    }

    /// Connects to a node of the cluster that is meant.
    ///
    /// # Errors
    /// When nothing answers there, or who answers is not of that cluster.
    pub async fn connect(&self) -> Result<Connection, CliError> {
        Connection::open(&self.endpoint()?).await
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
        Err(CliError::OutputClosed) => ExitCode::SUCCESS,
        Err(error @ CliError::Interrupted(_)) => {
            eprintln!("{error}");
            ExitCode::from(EXIT_INTERRUPTED)
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// What was given of server, token and context. The token's variable is read here: it must be no default that
/// the help shows, and a flag wins over it.
fn given(args: &Args) -> Result<Given, CliError> {
    let token = match (&args.token, &args.token_file) {
        (Some(text), _) => Some(client::token(text.expose())?),
        (None, Some(path)) => Some(client::token_file(path)?),
        (None, None) => match std::env::var(TOKEN_VARIABLE) {
            Ok(text) if !text.trim().is_empty() => Some(client::token(&text)?),
            _ => None,
        },
    };
    // A variable that is set to nothing says nothing.
    let said = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let (server, context) = (said(&args.server), said(&args.context));
    if let (Some(server), Some(context)) = (&server, &context) {
        eprintln!(
            "note: --server (or CLUSTERCTL_SERVER) says where: {server}; of context {context} only the token is used"
        );
    }
    Ok(Given {
        server,
        token,
        context,
    })
}

async fn run(args: Args) -> Result<ExitCode, CliError> {
    let context = Context {
        given: given(&args)?,
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
        Command::Token(command) => token::run(c, command).await,
        Command::Context(command) => context::run(c, command).await,
        Command::Audit(args) => audit::run(c, args).await,
        Command::Events(args) => events::run(c, args).await,
        Command::Why(args) => why::run(c, args).await,
        Command::Dev(command) => dev::run(c, command).await,
        Command::Demo(args) => demo::run(c, args).await,
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[test]
    fn the_command_tree_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_trust_commands_are_read_as_they_are_documented() {
        for line in [
            "cluster init lab --fast",
            "cluster ca show",
            "cluster ca rotate --root --recovery-key-file /k",
            "cluster trust add east --ca /ca.pem",
            "cluster trust remove east",
            "node add n2 --ttl 30m --role witness",
            "node join-tokens list",
            "node check",
            "node check n1 n2 -o json",
            "node check --all",
            "node join-tokens revoke j1",
            "token create ada --role operator --tag web --tag db --ttl 30d",
            "token revoke t1 -y",
            "audit --since 1h --actor ada --object vm/web-1 --limit 5",
            "context add lab n1:7440,n2:7440 --token-file /t --no-check",
            "context use lab",
            "-C lab status",
            "status -C lab",
        ] {
            let words = std::iter::once("clusterctl").chain(line.split(' '));
            assert!(Args::try_parse_from(words).is_ok(), "{line}");
        }
        for line in [
            "cluster ca rotate --recovery-key k",
            "node add n2 --ttl soon",
            "node check n1 --all",
            "node add n2 --ttl 0m",
            "token create ada",
            "token create ada --role king",
            "audit --limit 0",
            "status --token a --token-file b",
        ] {
            let words = std::iter::once("clusterctl").chain(line.split(' '));
            assert!(Args::try_parse_from(words).is_err(), "{line}");
        }
    }

    #[test]
    fn a_token_among_the_arguments_is_never_repeated() {
        let words = ["clusterctl", "--token", "BT1.hidden", "status"];
        let args = Args::try_parse_from(words).expect("a line");
        assert!(!format!("{args:?}").contains("hidden"));
        let error = given(&args).expect_err("no token").to_string();
        assert!(
            error.contains("E-TOKEN") && !error.contains("hidden"),
            "{error}"
        );
        let words = [
            "clusterctl",
            "--token",
            "BT1.hidden",
            "--token-file",
            "x",
            "status",
        ];
        let error = Args::try_parse_from(words).expect_err("both").to_string();
        assert!(!error.contains("hidden"), "{error}");
    }
}
