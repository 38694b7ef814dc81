//! `clusterctl volume`: storage that the cluster's nodes reach.

use std::process::ExitCode;

use clap::Subcommand;
use proto::admin::{VolumeAddRequest, VolumeListRequest, VolumeRemoveRequest, VolumeView};

use crate::Context;
use crate::client::CliError;
use crate::output::{self, Format};

/// What can be done with volumes.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Probe a volume, mark it as this cluster's, and try whether its server enforces the fence.
    Add {
        /// What to call it.
        name: String,
        /// nfs://host[:port]/export[?mountport=N] or dir:/path.
        url: String,
        /// Nodes that reach it; all when left out.
        #[arg(long, value_delimiter = ',')]
        nodes: Vec<String>,
    },
    /// Every volume.
    List,
    /// Forget a volume that no machine uses; its files stay.
    Remove {
        /// Its name.
        name: String,
    },
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, command: Command) -> Result<ExitCode, CliError> {
    let mut connection = c.connect().await?;
    match command {
        Command::Add { name, url, nodes } => {
            let request = VolumeAddRequest {
                change: c.change(),
                name,
                url,
                nodes,
                dry_run: false,
            };
            let view = connection.api.volume_add(request).await?.into_inner();
            match c.output {
                Format::Json => output::json(&view)?,
                Format::Table => {
                    output::text(format!(
                        "✔ volume {} · fence class {} · settle {} ms",
                        view.name, view.fence_class, view.settle_ms
                    ))?;
                    for line in view.report.lines() {
                        output::text(format!("  {line}"))?;
                    }
                    if view.fence_class == "none" {
                        output::text(
                            "  Nothing stops a lost owner from writing here: its machines are not restarted elsewhere without you.",
                        )?;
                    }
                }
            }
        }
        Command::List => {
            let volumes = connection
                .api
                .volume_list(VolumeListRequest {})
                .await?
                .into_inner()
                .volumes;
            match c.output {
                Format::Json => output::json(&volumes)?,
                Format::Table => output::table(
                    &[
                        "NAME", "STATE", "FENCE", "SETTLE", "SIZE", "FREE", "LEASES", "NODES",
                        "URL",
                    ],
                    volumes.iter().map(row).collect(),
                )?,
            }
        }
        Command::Remove { name } => {
            let done = connection
                .api
                .volume_remove(VolumeRemoveRequest {
                    change: c.change(),
                    name: name.clone(),
                })
                .await?
                .into_inner();
            match c.output {
                Format::Json => output::json(&done)?,
                Format::Table => {
                    output::text(format!("✔ volume {name} forgotten; its files stay"))?
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn row(volume: &VolumeView) -> Vec<String> {
    vec![
        volume.name.clone(),
        volume.state.clone(),
        volume.fence_class.clone(),
        format!("{} ms", volume.settle_ms),
        output::bytes(volume.size_bytes),
        if volume.free_bytes > 0 {
            output::bytes(volume.free_bytes)
        } else {
            String::new()
        },
        volume.leases.to_string(),
        if volume.nodes.is_empty() {
            "all".into()
        } else {
            volume.nodes.join(",")
        },
        volume.url.clone(),
    ]
}
