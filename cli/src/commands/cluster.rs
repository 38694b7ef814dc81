//! `clusterctl cluster`: make it, look at it, set it.

mod ca;
mod init;
mod trust;

use std::process::ExitCode;

use clap::Subcommand;
use proto::admin::{
    ClusterStatusReply, ClusterStatusRequest, SettingsGetRequest, SettingsSetRequest,
};

use crate::Context;
use crate::client::CliError;
use crate::output::{self, Format};

/// What can be done with the cluster.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a cluster of the node on this host (asked on its own socket); prints its secrets, once.
    Init(init::Args),
    /// The certificate authority: show, rotate.
    #[command(subcommand)]
    Ca(ca::Command),
    /// Other clusters that are trusted: add, list, remove.
    #[command(subcommand)]
    Trust(trust::Command),
    /// One screen: quorum, capacity, work, alerts.
    Status,
    /// Print the settings.
    Settings,
    /// Change settings: `clusterctl cluster set migrations_out_max=4 downtime_max_ms=200`.
    Set {
        /// `setting=value`, as many as you like.
        #[arg(required = true)]
        settings: Vec<String>,
    },
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Init(args) => init::run(c, args).await,
        Command::Ca(command) => ca::run(c, command).await,
        Command::Trust(command) => trust::run(c, command).await,
        Command::Status => status(c).await,
        Command::Settings => {
            let reply = c
                .connect()
                .await?
                .api
                .settings_get(SettingsGetRequest {})
                .await?
                .into_inner();
            print_settings(c, &reply.json)
        }
        Command::Set { settings } => {
            let mut patch = serde_json::Map::new();
            for setting in settings {
                let Some((name, value)) = setting.split_once('=') else {
                    return Err(CliError::Local(format!(
                        "`{setting}`: write setting=value, for example downtime_max_ms=200"
                    )));
                };
                let value = serde_json::from_str(value)
                    .unwrap_or_else(|_| serde_json::Value::String(value.to_owned()));
                patch.insert(name.to_owned(), value);
            }
            let patch_json = serde_json::Value::Object(patch).to_string();
            let reply = c
                .connect()
                .await?
                .api
                .settings_set(SettingsSetRequest {
                    change: c.change(),
                    patch_json,
                })
                .await?
                .into_inner();
            print_settings(c, &reply.json)
        }
    }
}

fn print_settings(c: &Context, json: &str) -> Result<ExitCode, CliError> {
    let settings: serde_json::Value = serde_json::from_str(json)?;
    match c.output {
        Format::Json => output::json(&settings)?,
        Format::Table => {
            let rows = settings
                .as_object()
                .into_iter()
                .flatten()
                .map(|(name, value)| {
                    vec![name.clone(), value.to_string().trim_matches('"').to_owned()]
                })
                .collect();
            output::table(&["SETTING", "VALUE"], rows)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `clusterctl status`.
///
/// # Errors
/// What the node refused.
pub async fn status(c: &Context) -> Result<ExitCode, CliError> {
    let status = c
        .connect()
        .await?
        .api
        .cluster_status(ClusterStatusRequest {})
        .await?
        .into_inner();
    match c.output {
        Format::Json => output::json(&status)?,
        Format::Table => output::text(screen(&status))?,
    }
    Ok(if status.quorum {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn screen(s: &ClusterStatusReply) -> String {
    let quorum = if s.quorum {
        format!(
            "OK · leader {} (term {}) · voters {}",
            s.leader,
            s.term,
            s.voters.join(" ")
        )
    } else {
        format!(
            "LOST · {} answers alone; nothing changes owner until a majority of {} is back",
            s.node,
            s.voters.join(" ")
        )
    };
    let learners = if s.learners.is_empty() {
        String::new()
    } else {
        format!(" · learners {}", s.learners.join(" "))
    };
    let tolerates = if s.tolerates_one_loss {
        "any one node may be lost".to_owned()
    } else {
        format!(
            "NOT safe against the loss of one node: {}",
            s.tolerates_why_not
        )
    };
    let alerts = if s.alerts.is_empty() {
        "none".to_owned()
    } else {
        s.alerts.join("\n          ")
    };
    format!(
        "Cluster   {} ({}) · clusterd {} · answered by {}\n\
         Quorum    {quorum}{learners} · log {} of {}\n\
         Capacity  vCPUs {} on {} CPUs · memory {} of {} MiB · {tolerates}\n\
         Nodes     {} of {} up\n\
         VMs       {} running of {}\n\
         Storage   {} · {} held · last token t{}\n\
         Work      {} under way · {} queued\n\
         Alerts    {alerts}",
        s.name,
        s.cluster_id,
        s.version,
        s.node,
        s.applied_index,
        s.commit_index,
        s.vcpus_committed,
        s.cpus,
        s.memory_committed_mib,
        s.memory_mib,
        s.nodes_up,
        s.nodes_all,
        s.vms_running,
        s.vms_all,
        output::counted(s.volumes, "volume"),
        output::counted(s.leases_held, "lease"),
        s.token_last,
        output::counted(s.migrations_active, "migration"),
        s.migrations_queued,
    )
}
