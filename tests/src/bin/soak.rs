//! Migrates and fails over again and again, and lets the guests check themselves.
//!
//! Succeeds only if every guest's own checks stood from beginning to end and no flushed block was lost.

use std::time::Instant;

use anyhow::ensure;
use clap::Parser;
use tests::cluster::{Machine, Setup, TestCluster};
use tests::figures::percentile;

#[derive(Parser)]
struct Args {
    /// Live migrations in all.
    #[arg(long, default_value_t = 200)]
    migrations: u32,
    /// Node deaths in all, spread among the migrations.
    #[arg(long, default_value_t = 20)]
    failovers: u32,
    /// Default timing instead of the fast profile.
    #[arg(long)]
    default_timing: bool,
}

/// The machines: one dirties much, one writes much.
const MACHINES: [(&str, u64, u32, u32); 2] = [("vm-a", 256, 128, 60), ("vm-b", 128, 32, 10)];

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let begun = Instant::now();
    let setup = Setup {
        fast: !args.default_timing,
        relay: false,
        ..Setup::default()
    };
    let mut cluster = TestCluster::start(setup).await?;
    let outcome = soak(&mut cluster, &args).await;
    match &outcome {
        Ok(summary) => println!("{summary} in {} s", begun.elapsed().as_secs()),
        Err(_) => {
            if let Some(kept) = cluster.keep_logs() {
                eprintln!("logs and data: {}", kept.display());
            }
        }
    }
    outcome.map(|_| ())
}

async fn soak(cluster: &mut TestCluster, args: &Args) -> anyhow::Result<String> {
    let request = proto::admin::SettingsSetRequest {
        change: Some(clusterctl::client::change(None, "soak")),
        patch_json: r#"{"losses_max": 200}"#.into(),
    };
    cluster.api().await?.api.settings_set(request).await?;
    for (name, memory_mib, working_set_mib, dirty_mib_s) in MACHINES {
        let machine = Machine {
            memory_mib,
            working_set_mib,
            dirty_mib_s,
            ..Machine::small(name)
        };
        cluster.create(&machine).await?;
    }
    let mut blackouts = Vec::new();
    let mut failovers = 0;
    for number in 0..args.migrations {
        let (name, ..) = MACHINES[number as usize % MACHINES.len()];
        let vm = cluster.wait_running(name).await?;
        let targets: Vec<String> = cluster
            .local
            .nodes
            .iter()
            .map(|node| node.name.clone())
            .filter(|node| *node != vm.node)
            .collect();
        let to = &targets[number as usize / 2 % targets.len()];
        let end = cluster.migrate(name, to).await?;
        ensure!(
            end.state == "cut-over",
            "migration {number}: {}",
            end.reason
        );
        let guest = cluster.wait_progress(name).await?;
        blackouts.push(end.blackout_us as f64 / 1e3);
        if number % 10 == 0 {
            eprintln!(
                "migration {number}: {name} {} → {to}, blackout {:.1} ms, {} memory and {} disk checks",
                vm.node,
                end.blackout_us as f64 / 1e3,
                guest.memory_checks,
                guest.disk_checks
            );
        }
        // Spread the deaths evenly.
        let due =
            u64::from(number + 1) * u64::from(args.failovers) / u64::from(args.migrations.max(1));
        while failovers < due {
            failovers += 1;
            fail_over(cluster, name, failovers).await?;
        }
    }
    for (name, ..) in MACHINES {
        let guest = cluster.wait_progress(name).await?;
        ensure!(guest.errors == 0, "{name}: {}", guest.error);
    }
    Ok(format!(
        "{} migrations (blackout p50 {:.1} ms, p99 {:.1} ms) and {failovers} failovers, every guest's own checks stood",
        args.migrations,
        percentile(&blackouts, 0.5),
        percentile(&blackouts, 0.99)
    ))
}

async fn fail_over(cluster: &mut TestCluster, name: &str, number: u64) -> anyhow::Result<()> {
    let victim = cluster.wait_running(name).await?.node;
    let at = cluster.local.index_of(&victim)?;
    let mut victims = Vec::new();
    for (name, ..) in MACHINES {
        if cluster.vm(name).await?.node == victim {
            victims.push(name);
        }
    }
    let killed = Instant::now();
    cluster.local.kill_node(at);
    let mut promised = Vec::new();
    for name in &victims {
        promised.push(cluster.witness(name)?);
    }
    for (name, promised) in victims.iter().zip(promised) {
        let vm = cluster
            .wait("a restart elsewhere", async || {
                let vm = cluster.vm(name).await?;
                Ok(
                    (vm.node != victim && vm.state == "running" && vm.guest.is_some())
                        .then_some(vm),
                )
            })
            .await?;
        let guest = cluster.wait_progress(name).await?;
        ensure!(
            guest.found_at_boot >= promised,
            "failover {number}: {name} had flushed {promised}, found {}",
            guest.found_at_boot
        );
        eprintln!(
            "failover {number}: {name} {victim} → {} after {} ms",
            vm.node,
            killed.elapsed().as_millis()
        );
    }
    cluster.local.start_node(at)?;
    cluster
        .wait("the node's return", async || {
            Ok(cluster
                .nodes()
                .await?
                .into_iter()
                .find(|node| node.name == victim && node.state == "up")
                .map(|_| ()))
        })
        .await
}
