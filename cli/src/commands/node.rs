//! `clusterctl node`: who is in the cluster, and emptying one of them.

mod add;
mod check;
mod drain;
mod join_tokens;

use std::process::ExitCode;

use clap::Subcommand;
use proto::admin::{NodeDrainStatusRequest, NodeListRequest, NodeRemoveRequest, NodeView};

use crate::Context;
use crate::client::{CliError, Connection};
use crate::output::{self, Format};

pub use add::token_line;
pub use drain::{DrainArgs, UncordonArgs, drain, plan_text, uncordon, watch_drain};

/// What can be done with nodes.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Every node.
    List,
    /// One node, whole.
    Show {
        /// Its name.
        name: String,
    },
    /// Print the one line that lets a new node in: for that node alone, once.
    Add(add::AddArgs),
    /// Lines that `node add` printed: list, revoke.
    #[command(subcommand)]
    JoinTokens(join_tokens::Command),
    /// Look at nodes' hosts, there and now: KVM, processor, memory, disk, MTU, clock, volumes, and what confines
    /// the machines' monitors. The exit code is 1 when a check failed; warnings do not count.
    Check(check::CheckArgs),
    /// Take an empty node out of the cluster.
    Remove {
        /// Its name.
        name: String,
    },
    /// Move every machine off a node, live; it takes none until it is uncordoned.
    Drain(DrainArgs),
    /// Let a drained or quarantined node take machines again.
    Uncordon(UncordonArgs),
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::List => {
            let nodes = list(&mut c.connect().await?).await?;
            match c.output {
                Format::Json => output::json(&nodes)?,
                Format::Table => output::table(
                    &[
                        "NAME",
                        "STATE",
                        "ROLE",
                        "VMS",
                        "VCPUS",
                        "MEMORY",
                        "MIGR IN/OUT",
                        "CPU LOAD",
                        "LEASE SLACK",
                        "VERSION",
                        "ADDRESS",
                    ],
                    nodes.iter().map(row).collect(),
                )?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Show { name } => show(c, &name).await,
        Command::Add(args) => add::run(c, args).await,
        Command::JoinTokens(command) => join_tokens::run(c, command).await,
        Command::Check(args) => check::run(c, args).await,
        Command::Remove { name } => {
            if !output::confirm(c.yes, &format!("Take node {name} out of the cluster?"))? {
                return Ok(ExitCode::FAILURE);
            }
            let done = c
                .connect()
                .await?
                .api
                .node_remove(NodeRemoveRequest {
                    change: c.change(),
                    node: name.clone(),
                })
                .await?
                .into_inner();
            match c.output {
                Format::Json => output::json(&done)?,
                Format::Table => output::text(format!("✔ {name} is out of the cluster"))?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Drain(args) => drain(c, args).await,
        Command::Uncordon(args) => uncordon(c, args).await,
    }
}

async fn list(connection: &mut Connection) -> Result<Vec<NodeView>, CliError> {
    Ok(connection
        .api
        .node_list(NodeListRequest {})
        .await?
        .into_inner()
        .nodes)
}

fn row(node: &NodeView) -> Vec<String> {
    vec![
        node.name.clone(),
        node.state.clone(),
        if node.leader {
            "leader".into()
        } else {
            node.role.clone()
        },
        node.vms.to_string(),
        format!("{}/{}", node.vcpus_committed, node.cpus),
        format!("{}/{} MiB", node.memory_committed_mib, node.memory_mib),
        format!("{}/{}", node.migrations_in, node.migrations_out),
        if node.state == "lost" {
            String::new()
        } else {
            format!("{:.0} %", node.cpu_load * 100.0)
        },
        if node.lease_slack_ms < 0 {
            String::new()
        } else {
            format!("{:.1} s", node.lease_slack_ms as f64 / 1e3)
        },
        node.version.clone(),
        node.address.clone(),
    ]
}

async fn show(c: &Context, name: &str) -> Result<ExitCode, CliError> {
    let mut connection = c.connect().await?;
    let nodes = list(&mut connection).await?;
    let Some(node) = nodes.iter().find(|node| node.name == name) else {
        let known: Vec<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
        return Err(CliError::Refused {
            code: "E-NOTFOUND".into(),
            message: format!("there is no node {name}; there are: {}", known.join(", ")),
        });
    };
    let drain = connection
        .api
        .node_drain_status(NodeDrainStatusRequest {
            node: name.to_owned(),
        })
        .await?
        .into_inner();
    if c.output == Format::Json {
        output::json(&serde_json::json!({ "node": node, "drain": drain }))?;
        return Ok(ExitCode::SUCCESS);
    }
    output::text(format!(
        "{}  {}{}\naddress      {}\nCPU          {} × {} ({}), load {:.0} %\nmemory       {} of {} MiB spoken for\nmachines     {}\nmigrations   {} in, {} out\nversion      {}\nincarnation  {:x}",
        node.name,
        node.state,
        if node.leader { ", leads" } else { "" },
        node.address,
        node.cpus,
        node.cpu_model,
        node.cpu_vendor,
        node.cpu_load * 100.0,
        node.memory_committed_mib,
        node.memory_mib,
        node.vms,
        node.migrations_in,
        node.migrations_out,
        node.version,
        node.incarnation,
    ))?;
    if !node.note.is_empty() {
        output::text(format!("note         {}", node.note))?;
    }
    if drain.state != "not-draining" {
        output::text(drain::drain_line(&drain))?;
    }
    Ok(ExitCode::SUCCESS)
}
