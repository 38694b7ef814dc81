//! `clusterctl volume`: storage that the cluster's nodes reach.

use std::io::Read as _;
use std::path::{Path, PathBuf};
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
        /// nfs://host[:port]/export[?mountport=N][&tls=require|off] or dir:/path.
        url: String,
        /// Reach the server under TLS only (RFC 9289): the certificates (PEM, 16 KiB at most) of the authority
        /// that signed the server's.
        #[arg(long, value_name = "FILE")]
        tls_ca: Option<PathBuf>,
        /// The server's NFS has TLS and its MOUNT has none (Linux): ask MOUNT in clear, once, and record the
        /// root's file handle in the volume's address.
        #[arg(long, requires = "tls_ca")]
        mount_in_clear: bool,
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
        Command::Add {
            name,
            url,
            tls_ca,
            mount_in_clear,
            nodes,
        } => {
            let tls_ca = tls_ca.as_deref().map(read_authority).transpose()?;
            let request = VolumeAddRequest {
                change: c.change(),
                name,
                url,
                nodes,
                dry_run: false,
                tls_ca: tls_ca.unwrap_or_default(),
                mount_in_clear,
            };
            let view = connection.api.volume_add(request).await?.into_inner();
            match c.output {
                Format::Json => output::json(&view)?,
                Format::Table => {
                    output::text(format!(
                        "✔ volume {} · fence class {} · settle {} ms · tls {}",
                        view.name,
                        view.fence_class,
                        view.settle_ms,
                        yes_or_no(view.tls)
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
                        "NAME", "STATE", "FENCE", "TLS", "SETTLE", "SIZE", "FREE", "LEASES",
                        "NODES", "URL",
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

fn yes_or_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

/// More is refused by the cluster anyway; a wrong file is not read to its end.
const AUTHORITY_BYTES_MAX: u64 = 16 << 10;

fn read_authority(path: &Path) -> Result<String, CliError> {
    let mut text = String::new();
    let read = std::fs::File::open(path)
        .and_then(|file| file.take(AUTHORITY_BYTES_MAX + 1).read_to_string(&mut text));
    match read {
        Err(error) => Err(CliError::Local(format!(
            "cannot read the certificate authority {}: {error}",
            path.display()
        ))),
        Ok(_) if text.len() as u64 > AUTHORITY_BYTES_MAX => Err(CliError::Local(format!(
            "{} is longer than {AUTHORITY_BYTES_MAX} bytes: give only the certificates that sign the storage server's",
            path.display()
        ))),
        Ok(_) if text.trim().is_empty() => Err(CliError::Local(format!(
            "{} is empty: give certificates in PEM",
            path.display()
        ))),
        Ok(_) => Ok(text),
    }
}

fn row(volume: &VolumeView) -> Vec<String> {
    vec![
        volume.name.clone(),
        volume.state.clone(),
        volume.fence_class.clone(),
        if volume.url.starts_with("nfs:") {
            yes_or_no(volume.tls).into()
        } else {
            String::new()
        },
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
