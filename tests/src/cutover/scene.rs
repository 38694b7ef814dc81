//! A row on a cluster: who is who, where the migration is held, what is done, what came of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use proto::admin::{
    MigrationListRequest, MigrationView, NodeListRequest, SettingsSetRequest, VmMigrateRequest,
    VmView,
};
use proto::monitor as wire;
use proto::monitor::monitor_client::MonitorClient;
use vmm::devices::selfcheck::witness::{self, WitnessEvent};

use super::{Deed, Outcome, Party, Point, Row};
use crate::cluster::{Machine, Setup, TestCluster};

/// The machine of every row.
const VM: &str = "vm-a";
/// Slow enough that memory is on its way for seconds.
const SLOW_BYTES_S: u64 = 12 << 20;
/// So much of it has been sent when a row without a failpoint begins its deeds.
const UNDER_WAY_BYTES: u64 = 1 << 20;
/// Everybody of a row.
const PARTIES: [Party; 3] = [Party::Source, Party::Destination, Party::Third];

/// A cluster on which rows are played.
pub(super) struct Stage {
    pub(super) cluster: TestCluster,
}

/// How often a process was held, by the log that says so.
type Holds = BTreeMap<PathBuf, usize>;

/// A row being played.
struct Scene<'a> {
    cluster: &'a mut TestCluster,
    source: String,
    destination: String,
    third: String,
    before: VmView,
    boots: usize,
    migration: String,
    /// How often each failpoint of the row had held somebody before the row.
    held: Vec<(Party, &'static str, Holds)>,
}

impl Stage {
    /// A cluster with the machine; a patient one counts nobody as lost for some seconds.
    pub(super) async fn set(patient: bool) -> anyhow::Result<Stage> {
        let setup = Setup {
            fast: !patient,
            ..Setup::default()
        };
        let cluster = TestCluster::start(setup).await?;
        // Nodes and monitors that die again and again are the subject here.
        let request = SettingsSetRequest {
            change: Some(clusterctl::client::change(None, "test")),
            patch_json: r#"{"losses_max": 200, "crashes_max": 200}"#.into(),
        };
        cluster.api().await?.api.settings_set(request).await?;
        cluster.create(&Machine::small(VM)).await?;
        Ok(Stage { cluster })
    }

    pub(super) async fn play(&mut self, row: &Row) -> anyhow::Result<Outcome> {
        self.recover().await.context("before the row")?;
        let (source, destination, third) = self.cast(row.leader).await?;
        let before = self.cluster.wait_running(VM).await?;
        self.cluster.wait_progress(VM).await?;
        let boots = boots(&self.cluster.witness_path(VM))?;
        let mut scene = Scene {
            cluster: &mut self.cluster,
            source,
            destination,
            third,
            before,
            boots,
            migration: String::new(),
            held: Vec::new(),
        };
        scene.begin(row).await?;
        for deed in row.deeds {
            scene
                .act(*deed)
                .await
                .with_context(|| format!("{deed:?}"))?;
        }
        scene.disarm()?;
        scene.outcome(row.outcomes).await
    }

    /// Everybody is there again, nothing is armed or cut.
    async fn recover(&mut self) -> anyhow::Result<()> {
        self.cluster.relay.heal_all();
        for at in 0..self.cluster.local.nodes.len() {
            let node = &self.cluster.local.nodes[at];
            std::fs::write(node.folder.join("failpoints"), "")?;
            if node.pid == 0 {
                self.cluster.local.start_node(at)?;
            }
        }
        let count = self.cluster.local.nodes.len();
        self.cluster
            .wait("every node up", async || {
                let nodes = self.cluster.nodes().await?;
                let up = nodes.iter().filter(|node| node.state == "up").count();
                let led = nodes.iter().any(|node| node.leader);
                Ok((up == count && led).then_some(()))
            })
            .await?;
        // A node that has just come back answers from what it has applied so far.
        self.cluster
            .wait("every node knowing where the machine runs", async || {
                let mut seen = BTreeSet::new();
                for node in &self.cluster.local.nodes {
                    let Ok(vm) = self.cluster.seen_by(VM, &node.name).await else {
                        return Ok(None);
                    };
                    seen.insert((vm.node, vm.token, vm.state == "running"));
                }
                let agreed = seen.len() == 1 && seen.iter().all(|(_, _, runs)| *runs);
                Ok(agreed.then_some(()))
            })
            .await
    }

    /// Gives the roles: whoever leads is what the row wants, and the machine is moved where it must be for that.
    async fn cast(&mut self, leader: Party) -> anyhow::Result<(String, String, String)> {
        let leads = self.cluster.leader().await?;
        let here = self.cluster.wait_running(VM).await?.node;
        let others = |not: &[&str]| -> Vec<String> {
            let names = self.cluster.local.nodes.iter().map(|node| &node.name);
            let names = names.filter(|name| !not.contains(&name.as_str()));
            names.cloned().collect()
        };
        let source = match leader {
            Party::Source => leads.clone(),
            Party::Destination | Party::Third if here != leads => here.clone(),
            Party::Destination | Party::Third => others(&[&leads])[0].clone(),
        };
        if source != here {
            let end = self.cluster.migrate(VM, &source).await?;
            ensure!(
                end.state == "cut-over",
                "not moved to {source}: {}",
                end.reason
            );
        }
        let destination = match leader {
            Party::Destination => leads.clone(),
            Party::Source => others(&[&source])[0].clone(),
            Party::Third => others(&[&source, &leads])[0].clone(),
        };
        let third = others(&[&source, &destination])[0].clone();
        Ok((source, destination, third))
    }
}

impl Scene<'_> {
    fn name(&self, party: Party) -> &str {
        match party {
            Party::Source => &self.source,
            Party::Destination => &self.destination,
            Party::Third => &self.third,
        }
    }

    fn index(&self, party: Party) -> anyhow::Result<usize> {
        Ok(self.cluster.local.index_of(self.name(party))?)
    }

    fn folder(&self, party: Party) -> anyhow::Result<&Path> {
        Ok(&self.cluster.local.nodes[self.index(party)?].folder)
    }

    fn disarm(&self) -> anyhow::Result<()> {
        for party in PARTIES {
            self.cluster.arm(self.name(party), "")?;
        }
        Ok(())
    }

    /// Arms, migrates, and waits until the migration is where the row wants it.
    async fn begin(&mut self, row: &Row) -> anyhow::Result<()> {
        let (first, later): (&[_], &[_]) = match &row.point {
            Point::Copying => (&[], &[]),
            Point::Held(held) => (held, &[]),
            Point::HeldThen(first, later) => (std::slice::from_ref(first), later),
        };
        for &(party, name) in first.iter().chain(later) {
            let before = self.holds(party, name)?;
            self.held.push((party, name, before));
        }
        for party in PARTIES {
            let mine = first
                .iter()
                .chain(later)
                .filter(|(whose, _)| *whose == party);
            let armed: Vec<String> = mine.map(|(_, name)| format!("{name}=hold")).collect();
            self.cluster.arm(self.name(party), &armed.join(","))?;
        }
        let slow = matches!(row.point, Point::Copying);
        let request = VmMigrateRequest {
            change: Some(clusterctl::client::change(None, "test")),
            name: VM.into(),
            to: self.destination.clone(),
            bandwidth_max_bytes_s: if slow { SLOW_BYTES_S } else { 0 },
            ..VmMigrateRequest::default()
        };
        let reply = self.cluster.api().await?.api.vm_migrate(request).await?;
        let begun = reply.into_inner().migration;
        self.migration = begun.context("the migration has no id")?.id;
        if slow {
            self.cluster
                .wait("memory on its way", async || {
                    let view = self.view().await?;
                    Ok((view.sent_bytes > UNDER_WAY_BYTES).then_some(()))
                })
                .await?;
        }
        for &(party, name) in first {
            self.reached(party, name).await?;
        }
        Ok(())
    }

    /// How often each process of that node has been held there so far, by its own log.
    fn holds(&self, party: Party, failpoint: &str) -> anyhow::Result<Holds> {
        let folder = self.folder(party)?;
        let mut logs = vec![folder.join("clusterd.log")];
        let monitors = monitors(folder).into_iter();
        logs.extend(monitors.map(|monitor| monitor.join("log")));
        let quoted = format!("\"{failpoint}\"");
        let held = |line: &&str| line.contains("failpoint holds") && line.contains(&quoted);
        let count = |log: PathBuf| {
            // A monitor's folder may go away at any time.
            let text = std::fs::read(&log).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            (log, text.lines().filter(held).count())
        };
        Ok(logs.into_iter().map(count).collect())
    }

    async fn reached(&self, party: Party, name: &str) -> anyhow::Result<()> {
        let known = self
            .held
            .iter()
            .find(|held| (held.0, held.1) == (party, name));
        let before = &known.context("the row does not arm it")?.2;
        self.cluster
            .wait(&format!("{party:?} held at {name}"), async || {
                let now = self.holds(party, name)?;
                let again = now
                    .iter()
                    .any(|(log, count)| count > before.get(log).unwrap_or(&0));
                Ok(again.then_some(()))
            })
            .await
    }

    async fn view(&self) -> anyhow::Result<MigrationView> {
        let request = MigrationListRequest {
            all: true,
            vm: String::new(),
        };
        let mut api = self.cluster.api().await?;
        let list = api.api.migration_list(request).await?.into_inner();
        let mut views = list.migrations.into_iter();
        let id = &self.migration;
        views
            .find(|view| view.id == *id)
            .with_context(|| format!("{id} is gone"))
    }

    async fn act(&mut self, deed: Deed) -> anyhow::Result<()> {
        match deed {
            Deed::KillHost(party) => {
                let at = self.index(party)?;
                self.cluster.local.kill_node(at);
            }
            Deed::KillDaemon(party) => {
                let at = self.index(party)?;
                self.cluster.local.kill_clusterd(at);
            }
            Deed::StartDaemon(party) => {
                let at = self.index(party)?;
                self.cluster.local.start_node(at)?;
            }
            Deed::KillMonitor(party) => self.kill_monitors(party).await?,
            Deed::StopDaemon(party) => {
                let pid = self.cluster.local.nodes[self.index(party)?].pid;
                let pid = nix::unistd::Pid::from_raw(pid);
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP)?;
            }
            Deed::Cut(one, other) => self.cluster.cut(self.name(one), self.name(other)),
            Deed::CutOneWay(from, to) => {
                let (from, to) = (self.name(from), self.name(to));
                let (from, to) = (self.cluster.ip(from), self.cluster.ip(to));
                self.cluster.relay.cut_one_way(from, to);
            }
            Deed::Isolate(party) => self.cluster.isolate(self.name(party), true),
            Deed::IsolateFromNodes(party) => self.cluster.isolate(self.name(party), false),
            Deed::Heal => self.cluster.relay.heal_all(),
            Deed::Release => self.disarm()?,
            Deed::Reached(party, name) => self.reached(party, name).await?,
            Deed::Applied(party) => {
                let node = self.name(party);
                self.cluster
                    .wait("the cutover applied", async || {
                        let seen = self.cluster.seen_by(VM, node).await?;
                        Ok((seen.node == self.destination).then_some(()))
                    })
                    .await?;
            }
            Deed::Lost(party) => {
                let lost = self.name(party);
                self.cluster
                    .wait("the loss", async || {
                        let mut api = self.api_without(party).await?;
                        let request = NodeListRequest {};
                        let nodes = api.api.node_list(request).await?.into_inner().nodes;
                        let seen = nodes.into_iter().find(|node| node.name == lost);
                        Ok(seen.filter(|node| node.state == "lost").map(|_| ()))
                    })
                    .await?;
            }
            Deed::StaysStopped(party) => {
                self.stopped_until(party, async || {
                    let request = MigrationListRequest {
                        all: true,
                        vm: String::new(),
                    };
                    let mut api = self.api_without(party).await?;
                    let list = api.api.migration_list(request).await?.into_inner();
                    let mut views = list.migrations.into_iter();
                    let view = views.find(|view| view.id == self.migration);
                    Ok(view.filter(|view| view.state != "active").map(|_| ()))
                })
                .await?;
            }
            Deed::WaitsStopped(party) => {
                let until = tokio::time::Instant::now() + Duration::from_secs(1);
                self.stopped_until(party, async || {
                    Ok((tokio::time::Instant::now() > until).then_some(()))
                })
                .await?;
            }
        }
        Ok(())
    }

    /// A connection to a node that is not that one, and lives.
    async fn api_without(&self, party: Party) -> anyhow::Result<clusterctl::client::Connection> {
        let nodes = &self.cluster.local.nodes;
        let other = nodes
            .iter()
            .position(|node| node.name != self.name(party) && node.pid != 0)
            .context("nobody else lives")?;
        Ok(self.cluster.local.connect(other).await?)
    }

    /// Every monitor of that node as it describes itself, on its own socket.
    async fn monitors_of(&self, party: Party) -> anyhow::Result<Vec<wire::MonitorStatus>> {
        let mut all = Vec::new();
        for folder in monitors(self.folder(party)?) {
            let channel = proto::unix::channel(folder.join("ctl"));
            let asked = MonitorClient::new(channel)
                .describe(wire::DescribeRequest {})
                .await;
            // One that is gone has left its folder, or not yet.
            if let Ok(status) = asked {
                all.push(status.into_inner());
            }
        }
        Ok(all)
    }

    /// Waits for something while no guest of that node takes a step.
    async fn stopped_until(
        &self,
        party: Party,
        mut until: impl AsyncFnMut() -> anyhow::Result<Option<()>>,
    ) -> anyhow::Result<()> {
        let runs = |status: &wire::MonitorStatus| status.phase() == wire::Phase::Running;
        let looked = self
            .cluster
            .wait("the others' decision", async || {
                let statuses = self.monitors_of(party).await?;
                if statuses.is_empty() {
                    return Ok(Some(Err(format!("{party:?} has no monitor to look at"))));
                }
                if let Some(status) = statuses.iter().find(|status| runs(status)) {
                    return Ok(Some(Err(format!("{party:?}'s guest runs: {status:?}"))));
                }
                Ok(until().await?.map(Ok))
            })
            .await?;
        looked.map_err(anyhow::Error::msg)
    }

    async fn kill_monitors(&self, party: Party) -> anyhow::Result<()> {
        let folder = self.folder(party)?.join("vms");
        for pid in clusterctl::local::processes_of(&folder) {
            let pid = nix::unistd::Pid::from_raw(pid);
            // It may have ended already.
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        self.cluster
            .wait("the monitor's end", async || {
                let left = clusterctl::local::processes_of(&folder);
                Ok(left.is_empty().then_some(()))
            })
            .await
    }

    /// Waits until the machine runs and works and one monitor of it is left; then says what became of it.
    async fn outcome(&mut self, allowed: &[Outcome]) -> anyhow::Result<Outcome> {
        let decided = self
            .cluster
            .wait("the log's decision", async || {
                let view = self.view().await?;
                Ok((view.state != "active" && view.state != "queued").then_some(view))
            })
            .await?;
        let cut_over = decided.state == "cut-over";
        let restarts = allowed.contains(&Outcome::Restarts);
        let path = self.cluster.witness_path(VM);
        // Where only a restart is allowed, running again is not enough: its old image may still run for a moment.
        let vm = self
            .cluster
            .wait(&format!("one of {allowed:?}"), async || {
                let vm = self.cluster.vm(VM).await?;
                let again = boots(&path)? > self.boots;
                let there = vm.state == "running" && vm.guest.is_some();
                let settled = again || allowed != [Outcome::Restarts];
                Ok((there && settled).then_some(vm))
            })
            .await?;
        self.cluster.wait_progress(VM).await?;
        self.cluster.no_loss(VM)?;
        let vm = self.one_monitor_left(vm).await?;
        let again = boots(&path)? - self.boots;
        let outcome = match (again, cut_over) {
            (0, true) if vm.node == self.destination => Outcome::Moves,
            (0, false) if vm.node == self.source && vm.token > self.before.token => {
                Outcome::ContinuesRekeyed
            }
            (0, false) if vm.node == self.source => Outcome::Continues,
            (1, _) if restarts && vm.token > self.before.token => Outcome::Restarts,
            _ => bail!(
                "booted {again} times since, {} on {} under t{} (it was t{} on {}); the migration: {} {}",
                vm.state,
                vm.node,
                vm.token,
                self.before.token,
                self.source,
                decided.state,
                decided.reason
            ),
        };
        ensure!(
            allowed.contains(&outcome),
            "{outcome:?}, which is none of {allowed:?}; the migration: {} {}",
            decided.state,
            decided.reason
        );
        Ok(outcome)
    }

    /// Exactly one monitor process of the machine is left in the whole cluster, where the log says that it runs.
    async fn one_monitor_left(&self, vm: VmView) -> anyhow::Result<VmView> {
        // Whoever was cut off learns of the end when it can: until then its image waits, stopped.
        self.cluster.relay.heal_all();
        self.cluster
            .wait(&format!("one monitor, on {}", vm.node), async || {
                let mut found = Vec::new();
                for member in &self.cluster.local.nodes {
                    let processes = clusterctl::local::processes_of(&member.folder.join("vms"));
                    found.extend(processes.iter().map(|_| member.name.clone()));
                }
                let vm = self.cluster.vm(VM).await?;
                Ok((vm.state == "running" && found == [vm.node.clone()]).then_some(vm))
            })
            .await
    }
}

/// The folders of a node's monitors.
fn monitors(node: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(node.join("vms")) else {
        return Vec::new();
    };
    entries.flatten().map(|entry| entry.path()).collect()
}

/// How often the machine was booted, by its witness.
fn boots(witness: &Path) -> anyhow::Result<usize> {
    let events = witness::read(witness)?;
    let boots = events
        .iter()
        .filter(|event| matches!(event, WitnessEvent::Found { .. }));
    Ok(boots.count())
}
