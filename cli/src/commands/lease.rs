//! `clusterctl lease`: who may write which disk, under which token.

use std::process::ExitCode;

use clap::Subcommand;
use proto::admin::{LeaseListRequest, LeaseView};

use crate::Context;
use crate::client::CliError;
use crate::output::{self, Format};

/// What can be done with leases.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Every lease, or those of one machine.
    List {
        /// The machine.
        #[arg(default_value = "")]
        vm: String,
    },
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, command: Command) -> Result<ExitCode, CliError> {
    let Command::List { vm } = command;
    let vm = vm.strip_prefix("vm/").unwrap_or(&vm).to_owned();
    let leases = c
        .connect()
        .await?
        .api
        .lease_list(LeaseListRequest { vm })
        .await?
        .into_inner()
        .leases;
    match c.output {
        Format::Json => output::json(&leases)?,
        Format::Table => output::table(
            &[
                "LEASE",
                "HOLDER",
                "TOKEN",
                "STATE",
                "EXPIRES IN",
                "COVERS",
                "SIZE",
            ],
            leases.iter().map(row).collect(),
        )?,
    }
    Ok(ExitCode::SUCCESS)
}

fn row(lease: &LeaseView) -> Vec<String> {
    vec![
        format!("vm/{}", lease.vm),
        lease.holder.clone(),
        format!("t{}", lease.token),
        lease.state.clone(),
        if lease.expires_in_ms < 0 {
            String::new()
        } else {
            format!("{:.1} s", lease.expires_in_ms as f64 / 1e3)
        },
        format!("{}:{}", lease.volume, lease.path),
        output::bytes(lease.size_bytes),
    ]
}
