//! `clusterctl vm`: machines.

mod console;
mod create;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Subcommand;
use proto::admin::{
    VmDeleteRequest, VmListRequest, VmMigrateRequest, VmStartRequest, VmStopRequest, VmView,
};

use crate::Context;
use crate::client::{CliError, Connection};
use crate::commands::migration;
use crate::output::{self, Format};

pub use create::parse_bytes;

/// How often a machine is looked at while it starts or stops.
const LOOK: Duration = Duration::from_millis(50);

/// What can be done with machines.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a machine, and its disks.
    Create(Box<create::CreateArgs>),
    /// Every machine.
    List,
    /// One machine, whole.
    Show {
        /// Its name.
        name: String,
    },
    /// Run it, on the best node.
    Start {
        /// Its name.
        name: String,
    },
    /// Stop it.
    Stop {
        /// Its name.
        name: String,
        /// At once, without asking the guest.
        #[arg(long)]
        force: bool,
    },
    /// Forget it and delete its disks.
    Delete {
        /// Its name.
        name: String,
        /// Leave the disk files on their volumes.
        #[arg(long)]
        keep_disks: bool,
    },
    /// Its serial console; Ctrl-] leaves.
    Console {
        /// Its name.
        name: String,
    },
    /// Move it to another node while it runs.
    Migrate(MigrateArgs),
}

/// `migrate`.
#[derive(Debug, clap::Args)]
pub struct MigrateArgs {
    /// The machine.
    name: String,
    /// Where to; the best node when left out.
    #[arg(long, default_value = "")]
    to: String,
    /// TCP connections.
    #[arg(long, default_value_t = 0)]
    channels: u32,
    /// At most this many bytes a second: 100MiB.
    #[arg(long, default_value = "0", value_parser = parse_bytes)]
    bandwidth: u64,
    /// Ceiling of the blackout, ms.
    #[arg(long, default_value_t = 0)]
    downtime_max_ms: u32,
    /// Only check whether it could.
    #[arg(long)]
    dry_run: bool,
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Create(args) => create::run(c, &args).await,
        Command::List => {
            let vms = list(&mut c.connect().await?, "").await?;
            match c.output {
                Format::Json => output::json(&vms)?,
                Format::Table => output::table(
                    &[
                        "NAME", "STATE", "NODE", "CPU", "MEMORY", "DISKS", "TOKEN", "FAILOVER",
                        "PRIORITY",
                    ],
                    vms.iter().map(row).collect(),
                )?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Show { name } => {
            let vm = find(&mut c.connect().await?, &name).await?;
            match c.output {
                Format::Json => output::json(&vm)?,
                Format::Table => output::text(describe(&vm))?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Start { name } => {
            let mut connection = c.connect().await?;
            connection
                .api
                .vm_start(VmStartRequest {
                    change: c.change(),
                    name: name.clone(),
                })
                .await?;
            settle(c, &mut connection, &name, "running").await
        }
        Command::Stop { name, force } => {
            let mut connection = c.connect().await?;
            connection
                .api
                .vm_stop(VmStopRequest {
                    change: c.change(),
                    name: name.clone(),
                    force,
                })
                .await?;
            settle(c, &mut connection, &name, "stopped").await
        }
        Command::Delete { name, keep_disks } => {
            let what = if keep_disks { "" } else { " and its disks" };
            if !output::confirm(c.yes, &format!("Delete {name}{what}?"))? {
                return Ok(ExitCode::FAILURE);
            }
            let request = VmDeleteRequest {
                change: c.change(),
                name: name.clone(),
                keep_disks,
            };
            let done = c
                .connect()
                .await?
                .api
                .vm_delete(request)
                .await?
                .into_inner();
            match c.output {
                Format::Json => output::json(&done)?,
                Format::Table => output::text(format!("✔ {name}{what} deleted"))?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Console { name } => console::run(c, name).await,
        Command::Migrate(args) => migrate(c, args).await,
    }
}

async fn list(connection: &mut Connection, name: &str) -> Result<Vec<VmView>, CliError> {
    Ok(connection
        .api
        .vm_list(VmListRequest {
            name: name.to_owned(),
        })
        .await?
        .into_inner()
        .vms)
}

/// The machine of that name.
///
/// # Errors
/// When there is none.
pub async fn find(connection: &mut Connection, name: &str) -> Result<VmView, CliError> {
    list(connection, name)
        .await?
        .pop()
        .ok_or_else(|| CliError::Refused {
            code: "E-NOTFOUND".into(),
            message: format!("there is no machine {name}; try: clusterctl vm list"),
        })
}

/// Waits until the machine is in that state and prints it.
async fn settle(
    c: &Context,
    connection: &mut Connection,
    name: &str,
    state: &str,
) -> Result<ExitCode, CliError> {
    let vm = if c.no_wait {
        find(connection, name).await?
    } else {
        wait_for(connection, name, state, c.timeout).await?
    };
    match c.output {
        Format::Json => output::json(&vm)?,
        Format::Table if c.no_wait => {}
        Format::Table if state == "running" => {
            output::text(format!("✔ {name} runs on {} under t{}", vm.node, vm.token))?;
        }
        Format::Table => output::text(format!("✔ {name} is {state}"))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits until a machine is in a state; a machine that is held will not get there.
///
/// # Errors
/// When it is held, or the time is over.
pub async fn wait_for(
    connection: &mut Connection,
    name: &str,
    state: &str,
    timeout: Duration,
) -> Result<VmView, CliError> {
    let deadline = Instant::now() + timeout;
    loop {
        let vm = find(connection, name).await?;
        if vm.state == state {
            return Ok(vm);
        }
        if !vm.held.is_empty() && state == "running" {
            return Err(CliError::Refused {
                code: "E-HELD".into(),
                message: format!("{name} does not run: {}", vm.held),
            });
        }
        if Instant::now() > deadline {
            return Err(CliError::Refused {
                code: "E-TIMEOUT".into(),
                message: format!(
                    "{name} is {}, not {state}, after {} s; see: clusterctl why vm/{name}",
                    vm.state,
                    timeout.as_secs()
                ),
            });
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn row(vm: &VmView) -> Vec<String> {
    let disks: u64 = vm.disks.iter().map(|disk| disk.size_bytes).sum();
    vec![
        vm.name.clone(),
        vm.state.clone(),
        vm.node.clone(),
        vm.vcpus.to_string(),
        format!("{} MiB", vm.memory_mib),
        if vm.disks.is_empty() {
            String::new()
        } else {
            output::bytes(disks)
        },
        format!("t{}", vm.token),
        if vm.failover {
            "restart".into()
        } else {
            "off".into()
        },
        vm.priority.to_string(),
    ]
}

/// A machine's tags, out of its spec.
fn tags(vm: &VmView) -> Vec<String> {
    serde_json::from_str::<serde_json::Value>(&vm.spec_json)
        .ok()
        .and_then(|spec| {
            let tags = spec.get("tags")?.as_array()?;
            Some(
                tags.iter()
                    .filter_map(|tag| tag.as_str().map(str::to_owned))
                    .collect(),
            )
        })
        .unwrap_or_default()
}

fn describe(vm: &VmView) -> String {
    let mut lines = vec![
        format!(
            "{}  {}{}",
            vm.name,
            vm.state,
            if vm.node.is_empty() {
                String::new()
            } else {
                format!(" on {}", vm.node)
            }
        ),
        format!(
            "size         {}, {} MiB",
            output::counted(vm.vcpus, "vCPU"),
            vm.memory_mib
        ),
        format!(
            "ownership    token t{} since entry {} ({}), should be {}",
            vm.token, vm.since_index, vm.cause, vm.desired
        ),
    ];
    let tags = tags(vm);
    if !tags.is_empty() {
        lines.push(format!("tags         {}", tags.join(", ")));
    }
    if !vm.held.is_empty() {
        lines.push(format!("held         {}", vm.held));
    }
    for disk in &vm.disks {
        lines.push(format!(
            "disk         {}:{} {} ({})",
            disk.volume,
            disk.path,
            output::bytes(disk.size_bytes),
            disk.state
        ));
    }
    if let Some(migration) = &vm.migration {
        lines.push(format!(
            "migration    {} → {}: {} {}",
            migration.from, migration.to, migration.state, migration.stage
        ));
    }
    if let Some(guest) = &vm.guest {
        lines.push(format!(
            "guest says   {} steps, {} memory and {} disk checks, {} errors{}, flushed block {}, longest gap {}",
            guest.steps,
            guest.memory_checks,
            guest.disk_checks,
            guest.errors,
            if guest.error.is_empty() { String::new() } else { format!(" ({})", guest.error) },
            guest.flushed,
            output::micros(guest.longest_gap_us),
        ));
    }
    lines.push(format!("why here     clusterctl why vm/{}", vm.name));
    lines.join("\n")
}

/// `clusterctl migrate`.
///
/// # Errors
/// What the node refused.
pub async fn migrate(c: &Context, args: MigrateArgs) -> Result<ExitCode, CliError> {
    let mut connection = c.connect().await?;
    let request = VmMigrateRequest {
        change: c.change(),
        name: args.name,
        to: args.to,
        channels: args.channels,
        bandwidth_max_bytes_s: args.bandwidth,
        downtime_max_ms: args.downtime_max_ms,
        dry_run: args.dry_run,
    };
    let reply = connection.api.vm_migrate(request).await?.into_inner();
    if c.output == Format::Table {
        let passed = reply.checks.iter().filter(|check| check.passed).count();
        eprintln!("Checks    {passed} of {} passed", reply.checks.len());
        for check in reply.checks.iter().filter(|check| !check.passed) {
            eprintln!("  ✘ {}: {}", check.name, check.detail);
        }
        eprintln!(
            "Predicted {} · blackout ≤ {} ms",
            output::millis(reply.predicted_ms),
            reply.predicted_blackout_ms
        );
    }
    if args.dry_run {
        if c.output == Format::Json {
            output::json(&reply)?;
        }
        let good = reply.checks.iter().all(|check| check.passed);
        return Ok(if good {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let Some(view) = reply.migration else {
        return Err(CliError::Local(
            "the node accepted the migration but did not name it".into(),
        ));
    };
    if c.no_wait {
        match c.output {
            Format::Json => output::json(&view)?,
            Format::Table => output::text(format!(
                "{} is queued: clusterctl migration watch {}",
                view.id, view.id
            ))?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    let end = migration::follow(&mut connection, &view.id, c.timeout).await?;
    migration::print_end(c, &end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machines_tags_are_shown_and_none_are_not() {
        let vm = |spec: &str| VmView {
            name: "web-1".into(),
            spec_json: spec.into(),
            ..VmView::default()
        };
        let shown = describe(&vm(r#"{"tags":["db","web"]}"#));
        assert!(shown.contains("\ntags         db, web\n"), "{shown}");
        for none in [r#"{"tags":[]}"#, "{}", ""] {
            assert!(!describe(&vm(none)).contains("tags"), "{none}");
        }
    }
}
