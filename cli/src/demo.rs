//! `clusterctl demo`: the main job on this machine, explained as it happens.
//!
//! Three nodes, an NFS server, two real machines that check themselves; a live migration, a drain, the
//! death of a node. It succeeds only if every guest's own check passed.

mod guests;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use proto::admin::{
    MigrationListRequest, MigrationView, NodeDrainRequest, NodeListRequest, NodeUncordonRequest,
    VmCreateRequest, VmMigrateRequest,
};
use serde_json::json;

use crate::Context;
use crate::client::{CliError, Connection, change};
use crate::commands::{migration, node, vm};
use crate::local::{LocalCluster, Plan};
use crate::output::{self, Format};
use guests::Witness;
use report::{Drain, Failover, Migration, Report, Tenure};

/// How long any one step may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);
/// How often a waiting step looks again.
const LOOK: Duration = Duration::from_millis(50);
/// The demo's machines: name, memory MiB, working set MiB, dirty rate MiB/s.
const MACHINES: [(&str, u64, u32, u32); 2] = [("web-1", 256, 64, 20), ("db-1", 512, 128, 40)];
/// Each machine's disk.
const DISK_BYTES: u64 = 64 << 20;

/// `demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The same as `-o json`: one JSON object on stdout.
    #[arg(long)]
    json: bool,
    /// Leave the cluster's folder (logs, data) behind and say where it is.
    #[arg(long)]
    keep: bool,
    /// Where to put it.
    #[arg(long)]
    folder: Option<PathBuf>,
}

/// Runs it.
///
/// # Errors
/// When a step fails; what was started is stopped all the same.
pub async fn run(c: &Context, args: Args) -> Result<ExitCode, CliError> {
    if let Err(error) = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        return Err(CliError::Local(format!(
            "the demo runs real machines, and /dev/kvm cannot be opened ({error}).\n  try: load kvm_intel or kvm_amd; add yourself to the group kvm; in a virtual machine ask for nested virtualisation"
        )));
    }
    let folder = match args.folder.clone() {
        Some(folder) => folder,
        // Of a name that nobody can have taken before.
        None => tempfile::Builder::new()
            .prefix("baton-demo-")
            .tempdir()?
            .keep(),
    };
    // Loopback addresses of its own, so that demos and the dev cluster do not meet.
    let third = u8::try_from(std::process::id() % 200 + 20).unwrap_or(20);
    let plan = Plan {
        folder: folder.clone(),
        subnet: [127, 43, third],
        memory_mib: 2048,
        cpus: 4,
        fast: false,
        nfs_tls: true,
        ..Plan::default()
    };
    say(
        "Baton: three nodes on this machine, real KVM machines, one NFS server. Nothing here is simulated.",
    );
    say(
        "Every connection is TLS 1.3: nodes show certificates of the cluster's own authority, the demo shows an access token.",
    );
    let mut cluster = LocalCluster::up(plan, 3, |step| say(&format!("  {step}"))).await?;
    let outcome = tokio::select! {
        outcome = perform(&mut cluster) => outcome,
        _ = tokio::signal::ctrl_c() => Err(CliError::Local("interrupted".into())),
    };
    let failed = !matches!(&outcome, Ok(report) if report.ok);
    if args.keep || failed {
        // Stop everything but leave the logs for a look.
        for at in 0..cluster.nodes.len() {
            cluster.kill_node(at);
        }
        let kept = std::env::temp_dir().join(format!("baton-demo-{}-kept", std::process::id()));
        let _ = std::fs::rename(&folder, &kept);
        cluster.plan.folder = folder.clone();
        std::fs::create_dir_all(&folder)?;
        say(&format!("logs and data: {}", kept.display()));
    }
    cluster.down()?;
    let report = outcome?;
    if args.json || c.output == Format::Json {
        output::json(&report)?;
    } else {
        output::text(report.screen())?;
    }
    Ok(if report.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn say(line: &str) {
    eprintln!("{line}");
}

fn heading(number: u32, line: &str) {
    eprintln!("\n{number}. {line}");
}

async fn perform(cluster: &mut LocalCluster) -> Result<Report, CliError> {
    let mut report = Report::default();
    let mut connection = cluster.connect(0).await?;
    let folder = cluster.plan.folder.clone();
    let witness = |name: &str| Witness::new(folder.join(format!("witness-{name}")));

    heading(
        1,
        "Two machines, each with a disk on the shared volume. They check their own memory and disk all the time.",
    );
    for (name, memory, working_set, dirty) in MACHINES {
        create(
            &mut connection,
            name,
            memory,
            working_set,
            dirty,
            &witness(name),
        )
        .await?;
    }
    for (name, ..) in MACHINES {
        let view = vm::wait_for(&mut connection, name, "running", STEP_TIMEOUT).await?;
        guests::wait_for_progress(&mut connection, name, None)
            .await
            .map_err(CliError::Local)?;
        say(&format!(
            "  {name} runs on {} under token t{}: only that token may write its disk",
            view.node, view.token
        ));
        report.tenures.push(Tenure::of(&view, "started"));
    }

    heading(
        2,
        "A live migration. Memory is copied while the machine runs; ownership and disk leases pass in one log entry.",
    );
    let before = vm::find(&mut connection, "web-1").await?;
    let to = other_node(&mut connection, &before.node).await?;
    let request = VmMigrateRequest {
        change: Some(change(None, "demo")),
        name: "web-1".into(),
        to,
        ..VmMigrateRequest::default()
    };
    let view = connection
        .api
        .vm_migrate(request)
        .await?
        .into_inner()
        .migration;
    let id = view
        .map(|view| view.id)
        .ok_or_else(|| CliError::Local("the migration has no id".into()))?;
    let end = migration::follow(&mut connection, &id, STEP_TIMEOUT).await?;
    let end = with_summary(&mut connection, end).await?;
    say(&indent(&migration::describe(&end)));
    record_migration(&mut report, &mut connection, &end).await?;

    heading(
        3,
        "A drain: everything leaves a node, live, as before a kernel update.",
    );
    let drained = vm::find(&mut connection, "db-1").await?.node;
    drain(&mut report, &mut connection, &drained).await?;

    heading(
        4,
        "The death of a node: clusterd, broker and monitors are killed at once. Its machines restart elsewhere.",
    );
    failover(&mut report, cluster, &witness).await?;

    report.conclude();
    Ok(report)
}

async fn create(
    connection: &mut Connection,
    name: &str,
    memory_mib: u64,
    working_set_mib: u32,
    dirty_mib_s: u32,
    witness: &Witness,
) -> Result<(), CliError> {
    let spec = json!({
        "vcpus": 1,
        "memory_mib": memory_mib,
        "boot": { "self-check": { "working_set_mib": working_set_mib, "dirty_mib_s": dirty_mib_s } },
        "disks": [{ "volume": "vol-a", "path": format!("{name}-0.raw"), "size_bytes": DISK_BYTES }],
        "witness": witness.path(),
    });
    let request = VmCreateRequest {
        change: Some(change(None, "demo")),
        name: name.into(),
        spec_json: spec.to_string(),
        images: Default::default(),
        start: true,
    };
    connection.api.vm_create(request).await?;
    Ok(())
}

/// A node that takes machines and is not `node`.
async fn other_node(connection: &mut Connection, node: &str) -> Result<String, CliError> {
    let nodes = connection
        .api
        .node_list(NodeListRequest {})
        .await?
        .into_inner()
        .nodes;
    nodes
        .into_iter()
        .filter(|other| other.name != node && other.state == "up")
        .min_by_key(|other| other.memory_committed_mib)
        .map(|other| other.name)
        .ok_or_else(|| CliError::Local("there is no other node".into()))
}

/// The ended migration with what both sides measured, which the destination reports a moment later.
async fn with_summary(
    connection: &mut Connection,
    end: MigrationView,
) -> Result<MigrationView, CliError> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let all = connection
            .api
            .migration_list(MigrationListRequest {
                all: true,
                vm: end.vm.clone(),
            })
            .await?
            .into_inner()
            .migrations;
        let now = all.into_iter().find(|view| view.id == end.id);
        match now {
            Some(view) if view.blackout_us > 0 || view.state == "aborted" => return Ok(view),
            _ if Instant::now() > deadline => return Ok(end),
            _ => tokio::time::sleep(LOOK).await,
        }
    }
}

async fn record_migration(
    report: &mut Report,
    connection: &mut Connection,
    end: &MigrationView,
) -> Result<(), CliError> {
    let moved = end.state == "cut-over";
    let check = if moved {
        guests::wait_for_progress(connection, &end.vm, None).await
    } else {
        Err("it was aborted".into())
    };
    match &check {
        Ok(guest) => say(&format!(
            "  {} says: {} memory and {} disk checks, no error; longest gap it saw {}",
            end.vm,
            guest.memory_checks,
            guest.disk_checks,
            output::micros(guest.longest_gap_us)
        )),
        Err(problem) => say(&format!("  {}: {problem}", end.vm)),
    }
    report.migrations.push(Migration::of(end, check.is_ok()));
    if moved {
        let view = vm::find(connection, &end.vm).await?;
        report.tenures.push(Tenure::of(
            &view,
            &format!("migrated, entry {}", end.cutover_index),
        ));
    }
    Ok(())
}

async fn drain(
    report: &mut Report,
    connection: &mut Connection,
    drained: &str,
) -> Result<(), CliError> {
    let ask = |dry_run| NodeDrainRequest {
        change: Some(change(None, "demo")),
        node: drained.to_owned(),
        dry_run,
    };
    let plan = connection.api.node_drain(ask(true)).await?.into_inner();
    say(&indent(&node::plan_text(&plan)));
    let known = report
        .migrations
        .iter()
        .map(|m| m.id.clone())
        .collect::<Vec<_>>();
    connection.api.node_drain(ask(false)).await?;
    let status = node::watch_drain(connection, drained, STEP_TIMEOUT).await?;
    say(&format!(
        "  {drained} is {}: {} left it in {}",
        status.state,
        output::counted(status.gone, "machine"),
        output::millis(status.elapsed_ms)
    ));
    let list = connection
        .api
        .migration_list(MigrationListRequest {
            all: true,
            vm: String::new(),
        })
        .await?
        .into_inner();
    for end in list.migrations {
        if known.contains(&end.id) {
            continue;
        }
        let end = with_summary(connection, end).await?;
        say(&indent(&migration::describe(&end)));
        record_migration(report, connection, &end).await?;
    }
    report.drain = Some(Drain {
        node: drained.to_owned(),
        state: status.state,
        moved: status.gone,
        total_ms: status.elapsed_ms,
        longest_blackout_ms: status.longest_blackout_us as f64 / 1e3,
    });
    let request = NodeUncordonRequest {
        change: Some(change(None, "demo")),
        node: drained.to_owned(),
        failback: false,
    };
    connection.api.node_uncordon(request).await?;
    say(&format!("  {drained} takes machines again"));
    Ok(())
}

async fn failover(
    report: &mut Report,
    cluster: &mut LocalCluster,
    witness: &impl Fn(&str) -> Witness,
) -> Result<(), CliError> {
    let mut connection = cluster.connect(0).await?;
    let (victim_node, victims) = guests::busiest_node(&mut connection).await?;
    let at = cluster.index_of(&victim_node)?;
    say(&format!(
        "  {victim_node} runs {}; killing it now",
        victims.join(" and ")
    ));
    let killed = Instant::now();
    cluster.kill_node(at);
    let mut connection = cluster.connect_any().await?;
    let detected = guests::wait_for_loss(&mut connection, &victim_node, STEP_TIMEOUT).await?;
    let detected_ms = (detected - killed).as_millis() as u64;
    say(&format!(
        "  {} after the kill the leader counts {victim_node} as lost: its machines froze long before, had they still lived",
        output::millis(detected_ms)
    ));
    let mut machines = Vec::new();
    let mut running_ms = 0;
    for name in &victims {
        // Before it runs again: what it had said to be safe on disk.
        let promised = witness(name).last()?;
        let view =
            guests::wait_elsewhere(&mut connection, name, &victim_node, STEP_TIMEOUT).await?;
        running_ms = running_ms.max(killed.elapsed().as_millis() as u64);
        let guest = guests::wait_for_progress(&mut connection, name, Some(1)).await;
        let found = guest.as_ref().map_or(0, |guest| guest.found_at_boot);
        let verified = guest.is_ok() && found >= promised;
        say(&format!(
            "  {name} runs on {} under t{}; it had flushed block {promised} and found {found} on its disk: {}",
            view.node,
            view.token,
            if verified {
                "nothing lost"
            } else {
                "LOST DATA"
            }
        ));
        if let Err(problem) = &guest {
            say(&format!("  {name}: {problem}"));
        }
        report
            .tenures
            .push(Tenure::of(&view, "restarted after the loss of its node"));
        machines.push(report::Restarted {
            vm: name.clone(),
            to: view.node,
            promised,
            found,
            verified,
        });
    }
    report.failover = Some(Failover {
        node: victim_node,
        detected_ms,
        running_ms,
        machines,
    });
    Ok(())
}

fn indent(text: &str) -> String {
    text.lines()
        .map(|line| format!("  {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}
