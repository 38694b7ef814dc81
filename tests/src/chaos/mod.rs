//! Faults on real processes: a cluster in network namespaces, guests that check themselves, administrators who
//! work on, and a checker that decides.
//!
//! ```text
//!  operators ──► clusterd n1…n5, monitors, brokers ──► storage server
//!                   ▲ kill, stop, cut, slow, clock       ▲ kill, stop
//!                 faults (from the seed)
//!  calm: everything healed ─► every machine runs ─► checker: copies, logs, journals, guests, witnesses, disks, groups
//! ```

mod checker;
mod copies;
mod faults;
mod logs;
pub mod network;
mod operators;
pub mod server;
mod timeline;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clusterctl::client::change;
use clusterctl::local::{LocalCluster, Plan, processes_of};
use nix::unistd::Pid;
use proto::admin::{
    MigrationListRequest, NodeUncordonRequest, SettingsSetRequest, VmListRequest, VmStartRequest,
    VmView,
};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use crate::cluster::{Machine, TestCluster};
use checker::Checker;
use copies::Ledger;
use faults::{Fault, Faults, Part};
use network::{Namespace, SUBNET};
use operators::Workplace;
use server::{Ganesha, Server, ServerKind};
use timeline::Timeline;

/// What is run.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How long faults are put in, minutes.
    #[arg(long, default_value_t = 30.0, value_parser = minutes)]
    pub minutes: f64,
    /// Nodes: 3 or 5.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(3..=5))]
    pub nodes: u8,
    /// The storage server.
    #[arg(long, value_enum, default_value = "embedded")]
    pub server: ServerKind,
    /// Draws the faults and what the administrators do; a new one each time if none is given.
    #[arg(long)]
    pub seed: Option<u64>,
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes: f64 = text
        .parse()
        .map_err(|_| "give a number of minutes".to_owned())?;
    (minutes > 0.0 && minutes <= 10_080.0)
        .then_some(minutes)
        .ok_or_else(|| "from 0.1 to 10080 (a week)".into())
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// What drew the faults.
    pub seed: u64,
    /// Seconds of faults and calm together.
    pub seconds: u64,
    /// Times that everything was healed and checked.
    pub calms: u64,
    /// Faults by kind.
    pub faults: BTreeMap<String, u64>,
    /// Events of the cluster's journal by kind.
    pub events: BTreeMap<String, u64>,
    /// Disks read from the server's side.
    pub disks_read: u64,
    /// Requests that administrators made, and that were refused or not answered.
    pub requests: u64,
    /// See `requests`.
    pub refused: u64,
    /// Monitors whose guests' execution was compared; never two copies of one machine at a time, or there is no report.
    pub monitors: u64,
    /// Freezes by a deadline.
    pub freezes: u64,
    /// How long guests executed past their deadlines, ms: 99 of 100 freezes came no later.
    pub freeze_late_p99_ms: f64,
    /// The latest.
    pub freeze_late_max_ms: f64,
}

impl Report {
    /// Faults in all.
    pub fn faults_total(&self) -> u64 {
        self.faults.values().sum()
    }

    fn event(&self, kind: &str) -> u64 {
        self.events.get(kind).copied().unwrap_or(0)
    }

    /// One line.
    pub fn summary(&self) -> String {
        format!(
            "{} s of chaos, seed {}: {} faults, {} migrations cut over and {} aborted, {} failovers, {} checks in calm, {} disks read at the server; one copy at a time in {} monitors, {} freezes late by {:.3} ms (p99) and {:.3} ms at most; nothing lost",
            self.seconds,
            self.seed,
            self.faults_total(),
            self.event("migration.cut-over"),
            self.event("migration.aborted"),
            self.failovers(),
            self.calms,
            self.disks_read,
            self.monitors,
            self.freezes,
            self.freeze_late_p99_ms,
            self.freeze_late_max_ms
        )
    }

    /// Machines that were placed anew because their node was lost or their monitor died.
    pub fn failovers(&self) -> u64 {
        self.event("vm.placed")
    }
}

/// Everything that runs.
pub struct World {
    cluster: TestCluster,
    networks: Vec<Namespace>,
    storage_network: Namespace,
    server: Server,
    timeline: Arc<Timeline>,
    faults: BTreeMap<String, u64>,
    /// What was done to monitors, for the checker.
    ledger: Ledger,
}

/// The machines: one dirties much, one writes much, one is stopped and started.
const MACHINES: [(&str, u64, u32, u32); 3] = [
    ("vm-a", 192, 64, 40),
    ("vm-b", 128, 32, 10),
    ("vm-c", 128, 16, 5),
];
/// The machine that is stopped and started.
const RESTLESS: &str = "vm-c";
/// Faults at a time.
const ACTIVE_MAX: usize = 2;
/// Between two faults, ms.
const PAUSE_MS: std::ops::Range<u64> = 500..6_000;
/// Faults between two calms, seconds.
const STORM_S: std::ops::Range<u64> = 25..60;
/// The disks are read at the server after so many storms, and at the end.
const DISKS_EVERY: u64 = 6;

/// Runs it. The caller has entered the network ([`network::enter`]) before its runtime began.
///
/// # Errors
/// With the violation, and where logs and timeline are kept.
pub async fn run(options: &Options, mut tell: impl FnMut(&str)) -> anyhow::Result<Report> {
    let seed = options.seed.unwrap_or_else(rand::random);
    tell(&format!("seed {seed}"));
    let mut world = World::start(options).await?;
    let outcome = storms(&mut world, options, seed, &mut tell).await;
    match outcome {
        Ok(report) => Ok(report),
        Err(error) => {
            let kept = world.cluster.keep_logs();
            let kept = kept.map_or_else(String::new, |path| path.display().to_string());
            world.timeline.note("violation", format!("{error:#}"));
            Err(error.context(format!("seed {seed}; logs and timeline: {kept}")))
        }
    }
}

async fn storms(
    world: &mut World,
    options: &Options,
    seed: u64,
    tell: &mut impl FnMut(&str),
) -> anyhow::Result<Report> {
    let begun = Instant::now();
    let end = begun + Duration::from_secs_f64(options.minutes * 60.0);
    let mut rng = StdRng::seed_from_u64(seed);
    let mut checker = Checker::default();
    let nodes = &world.cluster.local.nodes;
    let workplace = Arc::new(Workplace {
        nodes: nodes
            .iter()
            .map(|node| (node.name.clone(), node.address))
            .collect(),
        token: world.cluster.local.token()?,
        machines: MACHINES
            .iter()
            .map(|machine| machine.0.to_owned())
            .collect(),
        restless: RESTLESS.to_owned(),
        gate: tokio::sync::RwLock::new(()),
        timeline: Arc::clone(&world.timeline),
    });
    let mut operators = operators::start(&workplace, seed);
    let mut report = Report {
        seed,
        ..Report::default()
    };
    let mut faults = Faults::default();
    while Instant::now() < end {
        let storm = Duration::from_secs(rng.random_range(STORM_S));
        let until = (Instant::now() + storm).min(end);
        while Instant::now() < until {
            faults.heal(world, false)?;
            if faults.active() < ACTIVE_MAX {
                let (fault, lasts) = Fault::draw(&mut rng, usize::from(options.nodes));
                faults.put_in(world, fault, lasts, &mut rng)?;
            }
            let pause = Duration::from_millis(rng.random_range(PAUSE_MS));
            let next = tokio::time::Instant::now() + pause;
            let next = faults.next_end().map_or(next, |end| end.min(next));
            tokio::select! {
                () = tokio::time::sleep_until(next) => {}
                Some(ended) = operators.join_next() => {
                    ended.context("an administrator ended")?;
                }
            }
        }
        let _at_rest = workplace.gate.write().await;
        faults.heal(world, true)?;
        let calmed = Instant::now();
        let vms = world.calm().await?;
        let calm_ms = calmed.elapsed().as_millis();
        checker.check(world, &vms).await?;
        report.calms += 1;
        if report.calms % DISKS_EVERY == 1 || Instant::now() >= end {
            let vms = world.stop_all().await?;
            checker.check_disks(world, &vms).await?;
            world.start_all().await?;
        }
        let kinds = checker.kinds();
        let of = |kind: &str| kinds.get(kind).copied().unwrap_or(0);
        tell(&format!(
            "{:5} s: {} faults, {} migrations cut over, {} aborted, {} placed anew; calm after {calm_ms} ms",
            begun.elapsed().as_secs(),
            world.faults.values().sum::<u64>(),
            of("migration.cut-over"),
            of("migration.aborted"),
            of("vm.placed"),
        ));
    }
    let counts = world.timeline.counts();
    let count = |kind: &str| counts.get(kind).copied().unwrap_or(0);
    report.requests = count("asked") + count("refused");
    report.refused = count("refused");
    report.seconds = begun.elapsed().as_secs();
    report.faults = std::mem::take(&mut world.faults);
    report.events = checker.kinds();
    report.disks_read = checker.disks_read;
    report.monitors = checker.copies.monitors();
    ensure!(
        report.monitors > 0,
        "no monitor wrote down when its guest executed"
    );
    (
        report.freezes,
        report.freeze_late_p99_ms,
        report.freeze_late_max_ms,
    ) = checker.copies.lateness_ms();
    Ok(report)
}

impl World {
    async fn start(options: &Options) -> anyhow::Result<World> {
        let folder = tempfile::Builder::new().prefix("baton-chaos-").tempdir()?;
        let mut plan = Plan {
            folder: folder.path().join("cluster"),
            subnet: SUBNET,
            memory_mib: 2048,
            cpus: 4,
            fast: true,
            clocks: true,
            ..Plan::default()
        };
        plan.environment
            .insert(vmm::run_log::VARIABLE.into(), "1".into());
        std::fs::create_dir_all(&plan.folder)?;
        let mut networks = Vec::new();
        for number in 1..=options.nodes {
            let name = format!("n{number}");
            let network = Namespace::make(&name, plan.ip(number))?;
            plan.enter.insert(name, network.prefix());
            networks.push(network);
        }
        let storage_network = Namespace::make("nfs", plan.ip(0))?;
        plan.enter.insert("nfs".into(), storage_network.prefix());
        let server = match options.server {
            ServerKind::Embedded => Server::Embedded,
            ServerKind::Ganesha => {
                let address = (plan.ip(0), clusterctl::local::NFS_PORT).into();
                let files = plan.folder.join("nfs");
                let mut ganesha = Ganesha::prepare(&files, storage_network.prefix(), address)?;
                plan.volume = Some(ganesha.url());
                ganesha.start()?;
                Server::Ganesha(ganesha)
            }
        };
        let timeline = Arc::new(Timeline::create(folder.path())?);
        let local = LocalCluster::up(plan, options.nodes, |_| {}).await;
        let local = match local {
            Ok(local) => local,
            Err(error) => {
                let kept = folder.keep();
                return Err(error).context(format!("kept: {}", kept.display()));
            }
        };
        let cluster = TestCluster::around(local, folder).await?;
        let request = SettingsSetRequest {
            change: Some(change(None, "chaos")),
            // What protects an operator from a broken host would end the run.
            patch_json: r#"{"losses_max": 250, "crashes_max": 250, "balance_cooldown_s": 5}"#
                .into(),
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
        Ok(World {
            cluster,
            networks,
            storage_network,
            server,
            timeline,
            faults: BTreeMap::new(),
            ledger: Ledger::default(),
        })
    }

    fn count_fault(&mut self, kind: &str) {
        *self.faults.entry(kind.to_owned()).or_default() += 1;
    }

    /// The processes of that kind on a node; of its monitors one.
    fn processes(&self, node: usize, part: Part, rng: &mut StdRng) -> Vec<Pid> {
        let wanted = match part {
            Part::Daemon => "clusterd",
            Part::Monitor => "vmm",
            Part::Broker => "storage-broker",
            Part::All => "",
        };
        let named = |pid: &i32| {
            std::fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| wanted.is_empty() || name.trim() == wanted)
        };
        let mut pids: Vec<i32> = processes_of(&self.cluster.local.nodes[node].folder)
            .into_iter()
            .filter(named)
            .collect();
        if part == Part::Monitor {
            pids = pids.choose(rng).copied().into_iter().collect();
        }
        pids.into_iter().map(Pid::from_raw).collect()
    }

    /// Waits until everything that should be is: nodes up and in service, machines running, nothing moving.
    async fn calm(&self) -> anyhow::Result<Vec<VmView>> {
        for node in &self.cluster.local.nodes {
            ensure!(
                lives(node.pid),
                "{}'s clusterd ended, and nobody killed it: see {}",
                node.name,
                node.folder.join("clusterd.log").display()
            );
        }
        let mut seen = String::new();
        self.cluster
            .wait("every node in service", async || {
                let nodes = self.cluster.nodes().await?;
                for node in &nodes {
                    if matches!(node.state.as_str(), "draining" | "drained" | "quarantined") {
                        let request = NodeUncordonRequest {
                            change: Some(change(None, "chaos")),
                            node: node.name.clone(),
                            failback: false,
                        };
                        self.cluster.api().await?.api.node_uncordon(request).await?;
                    }
                }
                let states: Vec<_> = nodes.iter().map(|node| node.state.as_str()).collect();
                seen = states.join(", ");
                let up = states.iter().all(|state| *state == "up");
                Ok((up && nodes.len() == self.cluster.local.nodes.len()).then_some(()))
            })
            .await
            .with_context(|| format!("the nodes' states: {seen}"))?;
        self.start_all().await
    }

    /// Starts what is stopped or held, and waits until every guest has worked and nothing moves.
    async fn start_all(&self) -> anyhow::Result<Vec<VmView>> {
        for (name, ..) in MACHINES {
            self.cluster
                .wait(&format!("{name} running"), async || {
                    let vm = self.cluster.vm(name).await?;
                    if vm.desired != "running" || !vm.held.is_empty() {
                        let request = VmStartRequest {
                            change: Some(change(None, "chaos")),
                            name: name.into(),
                        };
                        self.cluster.api().await?.api.vm_start(request).await?;
                        return Ok(None);
                    }
                    Ok((vm.state == "running").then_some(()))
                })
                .await?;
            self.cluster.wait_progress(name).await?;
        }
        self.cluster
            .wait("every migration to end", async || {
                let request = MigrationListRequest {
                    all: false,
                    vm: String::new(),
                };
                let mut api = self.cluster.api().await?;
                let open = api.api.migration_list(request).await?.into_inner();
                Ok(open.migrations.is_empty().then_some(()))
            })
            .await?;
        self.machines().await
    }

    async fn stop_all(&self) -> anyhow::Result<Vec<VmView>> {
        for (name, ..) in MACHINES {
            self.cluster.stop(name).await?;
        }
        self.machines().await
    }

    async fn machines(&self) -> anyhow::Result<Vec<VmView>> {
        let request = VmListRequest::default();
        let mut api = self.cluster.api().await?;
        Ok(api.api.vm_list(request).await?.into_inner().vms)
    }
}

/// Whether a process runs, and is not only waited for.
fn lives(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit(") ")
            .next()
            .is_some_and(|rest| !rest.starts_with(['Z', 'X']))
    })
}
