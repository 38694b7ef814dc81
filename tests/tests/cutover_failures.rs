//! The cutover's failure table, row by row, on real processes: kill or cut at that point, then ask who
//! runs, what the guest says, and whether the log agrees.

use std::time::Duration;

use anyhow::ensure;
use proto::admin::{MigrationView, VmMigrateRequest};
use tests::cluster::{Machine, Setup, TestCluster};

/// A machine on a node, and where it is about to go.
struct Scene {
    cluster: TestCluster,
    source: String,
    destination: String,
    third: String,
}

const VM: &str = "vm-a";

impl Scene {
    async fn set() -> anyhow::Result<Scene> {
        let cluster = TestCluster::start(Setup::default()).await?;
        let vm = cluster.create(&Machine::small(VM)).await?;
        let others: Vec<String> = cluster
            .local
            .nodes
            .iter()
            .map(|node| node.name.clone())
            .filter(|name| *name != vm.node)
            .collect();
        Ok(Scene {
            cluster,
            source: vm.node,
            destination: others[0].clone(),
            third: others[1].clone(),
        })
    }

    /// Begins a migration that takes some seconds.
    async fn begin_slowly(&self) -> anyhow::Result<String> {
        let request = VmMigrateRequest {
            change: Some(clusterctl::client::change(None, "test")),
            name: VM.into(),
            to: self.destination.clone(),
            bandwidth_max_bytes_s: 12 << 20,
            ..VmMigrateRequest::default()
        };
        let reply = self
            .cluster
            .api()
            .await?
            .api
            .vm_migrate(request)
            .await?
            .into_inner();
        let id = reply.migration.map(|view| view.id).unwrap_or_default();
        self.cluster
            .wait("memory on its way", async || {
                let view = self.view(&id).await?;
                Ok((view.sent_bytes > 1 << 20).then_some(()))
            })
            .await?;
        Ok(id)
    }

    async fn view(&self, id: &str) -> anyhow::Result<MigrationView> {
        let request = proto::admin::MigrationListRequest {
            all: true,
            vm: String::new(),
        };
        let list = self
            .cluster
            .api()
            .await?
            .api
            .migration_list(request)
            .await?
            .into_inner()
            .migrations;
        list.into_iter()
            .find(|view| view.id == id)
            .ok_or_else(|| anyhow::anyhow!("{id} is gone"))
    }

    /// Exactly one monitor process of the machine is left in the whole cluster, on that node.
    async fn one_monitor_left_on(&self, node: &str) -> anyhow::Result<()> {
        self.cluster
            .wait(&format!("one monitor, on {node}"), async || {
                let mut found = Vec::new();
                for member in &self.cluster.local.nodes {
                    let vms = member.folder.join("vms");
                    found.extend(
                        clusterctl::local::processes_of(&vms)
                            .iter()
                            .map(|_| member.name.clone()),
                    );
                }
                Ok((found == [node.to_owned()]).then_some(()))
            })
            .await
    }

    /// The machine never stopped being itself: it runs on the source, its guest found nothing wrong.
    async fn continues_on_source(&self, id: &str) -> anyhow::Result<()> {
        let end = self.cluster.wait_migration(id).await?;
        ensure!(end.state == "aborted", "the migration is {}", end.state);
        let before = self.cluster.wait_running(VM).await?;
        ensure!(before.node == self.source, "it runs on {}", before.node);
        let guest = self.cluster.wait_progress(VM).await?;
        ensure!(guest.found_at_boot == 0, "the guest was booted again");
        // A destination that is cut off learns of the abort when it can: until then its image waits, stopped.
        self.cluster.relay.heal_all();
        self.one_monitor_left_on(&self.source).await
    }

    /// The machine runs on the destination, without having booted again.
    async fn moved(&self, id: &str) -> anyhow::Result<()> {
        let cut_over = self
            .cluster
            .wait("the cutover", async || {
                let view = self.view(id).await?;
                Ok((view.state != "active" && view.state != "queued").then_some(view))
            })
            .await?;
        ensure!(
            cut_over.state == "cut-over",
            "the migration is {}: {}",
            cut_over.state,
            cut_over.reason
        );
        let vm = self.cluster.wait_running(VM).await?;
        ensure!(vm.node == self.destination, "it runs on {}", vm.node);
        let guest = self.cluster.wait_progress(VM).await?;
        ensure!(guest.found_at_boot == 0, "the guest was booted again");
        self.one_monitor_left_on(&self.destination).await
    }

    /// The machine was restarted somewhere and found everything that it had flushed.
    async fn restarted(&self) -> anyhow::Result<()> {
        let (vm, promised) = self
            .cluster
            .wait("a restart", async || {
                let vm = self.cluster.vm(VM).await?;
                let promised = self.cluster.witness(VM)?;
                let again = vm.state == "running"
                    && vm
                        .guest
                        .as_ref()
                        .is_some_and(|guest| guest.found_at_boot > 0);
                Ok(again.then_some((vm, promised)))
            })
            .await?;
        let found = vm.guest.map_or(0, |guest| guest.found_at_boot);
        // The witness may have grown since the restart; what was promised before lies at or below what was found.
        ensure!(
            found > 0 && promised > 0,
            "found {found}, promised {promised}"
        );
        self.cluster.wait_progress(VM).await?;
        self.one_monitor_left_on(&self.cluster.vm(VM).await?.node)
            .await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn destination_monitor_dies_while_memory_arrives_and_the_source_continues()
-> anyhow::Result<()> {
    if !tests::kvm_or_skip("cutover failures") {
        return Ok(());
    }
    let scene = Scene::set().await?;
    scene.cluster.arm(&scene.destination, "sink.setup=kill")?;
    let id = scene
        .cluster
        .begin_migration(VM, &scene.destination)
        .await?;
    scene.continues_on_source(&id).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn destination_monitor_dies_when_all_but_everything_arrived_and_the_source_continues()
-> anyhow::Result<()> {
    if !tests::kvm_or_skip("cutover failures") {
        return Ok(());
    }
    let scene = Scene::set().await?;
    scene
        .cluster
        .arm(&scene.destination, "sink.before_complete=kill")?;
    let before = scene.cluster.vm(VM).await?.token;
    let id = scene
        .cluster
        .begin_migration(VM, &scene.destination)
        .await?;
    scene.continues_on_source(&id).await?;
    let after = scene.cluster.vm(VM).await?.token;
    ensure!(
        after > before,
        "a source that said quiet must take a fresh token: t{before}, t{after}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn destination_node_dies_while_memory_is_copied_and_the_source_continues()
-> anyhow::Result<()> {
    if !tests::kvm_or_skip("cutover failures") {
        return Ok(());
    }
    let mut scene = Scene::set().await?;
    let id = scene.begin_slowly().await?;
    let at = scene.cluster.local.index_of(&scene.destination)?;
    scene.cluster.local.kill_node(at);
    scene.continues_on_source(&id).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_link_between_them_is_cut_while_memory_is_copied_and_the_source_continues()
-> anyhow::Result<()> {
    if !tests::kvm_or_skip("cutover failures") {
        return Ok(());
    }
    let scene = Scene::set().await?;
    let id = scene.begin_slowly().await?;
    scene.cluster.cut(&scene.source, &scene.destination);
    scene.continues_on_source(&id).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn source_monitor_dies_when_the_destination_has_everything_and_the_machine_survives_it()
-> anyhow::Result<()> {
    if !tests::kvm_or_skip("cutover failures") {
        return Ok(());
    }
    let scene = Scene::set().await?;
    scene
        .cluster
        .arm(&scene.source, "source.after_final=kill")?;
    let id = scene
        .cluster
        .begin_migration(VM, &scene.destination)
        .await?;
    scene.moved(&id).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn source_monitor_dies_after_quiet_before_its_state_is_sent_and_the_machine_is_restarted()
-> anyhow::Result<()> {
    if !tests::kvm_or_skip("cutover failures") {
        return Ok(());
    }
    let scene = Scene::set().await?;
    scene
        .cluster
        .arm(&scene.source, "source.after_quiet=kill")?;
    scene
        .cluster
        .begin_migration(VM, &scene.destination)
        .await?;
    scene
        .cluster
        .wait("the death of the source", async || {
            let member = &scene.cluster.local.nodes[scene.cluster.local.index_of(&scene.source)?];
            Ok(clusterctl::local::processes_of(&member.folder.join("vms"))
                .is_empty()
                .then_some(()))
        })
        .await?;
    scene.cluster.arm(&scene.source, "")?;
    scene.restarted().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn source_node_dies_while_memory_is_copied_and_the_machine_is_restarted() -> anyhow::Result<()>
{
    if !tests::kvm_or_skip("cutover failures") {
        return Ok(());
    }
    let mut scene = Scene::set().await?;
    scene.begin_slowly().await?;
    let at = scene.cluster.local.index_of(&scene.source)?;
    scene.cluster.local.kill_node(at);
    scene.restarted().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_dies_while_memory_is_copied_and_the_migration_goes_on() -> anyhow::Result<()> {
    if !tests::kvm_or_skip("cutover failures") {
        return Ok(());
    }
    let mut scene = Scene::set().await?;
    // The third node leads, so that its death is the death of the leader and of nobody else.
    let leader = scene.cluster.leader().await?;
    if leader != scene.third {
        let end = scene
            .cluster
            .migrate(
                VM,
                if leader == scene.source {
                    &scene.destination
                } else {
                    &scene.source
                },
            )
            .await;
        drop(end);
        let vm = scene.cluster.vm(VM).await?;
        let mut others: Vec<String> = scene
            .cluster
            .local
            .nodes
            .iter()
            .map(|node| node.name.clone())
            .filter(|name| *name != vm.node && *name != leader)
            .collect();
        scene.source = vm.node;
        scene.third = leader.clone();
        scene.destination = others.pop().unwrap_or_default();
    }
    if scene.source == scene.third {
        anyhow::bail!("the machine is on the leader");
    }
    let id = scene.begin_slowly().await?;
    let at = scene.cluster.local.index_of(&scene.third)?;
    scene.cluster.local.kill_node(at);
    scene.moved(&id).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn destination_daemon_dies_right_after_the_cutover_and_failover_restarts_the_machine()
-> anyhow::Result<()> {
    if !tests::kvm_or_skip("cutover failures") {
        return Ok(());
    }
    let mut scene = Scene::set().await?;
    scene
        .cluster
        .arm(&scene.destination, "agent.after_cutover=kill")?;
    scene
        .cluster
        .begin_migration(VM, &scene.destination)
        .await?;
    let at = scene.cluster.local.index_of(&scene.destination)?;
    scene
        .cluster
        .wait("the death of the destination's daemon", async || {
            let member = &scene.cluster.local.nodes[at];
            let pid = nix::unistd::Pid::from_raw(member.pid);
            // It is a child of this process: a zombie until it is waited for.
            let gone = !matches!(
                nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::WNOHANG)),
                Ok(nix::sys::wait::WaitStatus::StillAlive)
            );
            Ok(gone.then_some(()))
        })
        .await?;
    // The rest of the host dies too: a lost node.
    scene.cluster.local.kill_node(at);
    scene.restarted().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn destination_monitor_dies_after_the_cutover_before_it_runs_and_the_machine_is_restarted()
-> anyhow::Result<()> {
    if !tests::kvm_or_skip("cutover failures") {
        return Ok(());
    }
    let scene = Scene::set().await?;
    scene.cluster.arm(&scene.destination, "run.before=kill")?;
    scene
        .cluster
        .begin_migration(VM, &scene.destination)
        .await?;
    scene
        .cluster
        .wait("the cutover", async || {
            let vm = scene.cluster.vm(VM).await?;
            Ok((vm.node == scene.destination
                || vm.guest.is_some_and(|guest| guest.found_at_boot > 0))
            .then_some(()))
        })
        .await?;
    scene.cluster.arm(&scene.destination, "")?;
    scene.restarted().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_cut_off_from_everybody_stays_stopped_and_the_source_continues()
-> anyhow::Result<()> {
    if !tests::kvm_or_skip("cutover failures") {
        return Ok(());
    }
    let scene = Scene::set().await?;
    let id = scene.begin_slowly().await?;
    scene.cluster.isolate(&scene.destination, false);
    // Asked of the others: the isolated node has no quorum.
    let end = scene
        .cluster
        .wait("the abort", async || {
            let mut api = scene.cluster.api_of(&scene.source).await?;
            let request = proto::admin::MigrationListRequest {
                all: true,
                vm: String::new(),
            };
            let list = api
                .api
                .migration_list(request)
                .await?
                .into_inner()
                .migrations;
            Ok(list
                .into_iter()
                .find(|view| view.id == id && view.state == "aborted"))
        })
        .await?;
    ensure!(end.vm == VM);
    scene.cluster.relay.heal_all();
    scene.continues_on_source(&id).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_cut_off_from_everybody_freezes_and_the_machine_is_restarted_elsewhere()
-> anyhow::Result<()> {
    if !tests::kvm_or_skip("cutover failures") {
        return Ok(());
    }
    let scene = Scene::set().await?;
    scene.begin_slowly().await?;
    scene.cluster.isolate(&scene.source, true);
    scene
        .cluster
        .wait("a restart elsewhere", async || {
            let mut api = scene.cluster.api_of(&scene.third).await?;
            let request = proto::admin::VmListRequest { name: VM.into() };
            let vms = api.api.vm_list(request).await?.into_inner().vms;
            Ok(vms
                .into_iter()
                .find(|vm| vm.node != scene.source && vm.state == "running"))
        })
        .await?;
    scene.cluster.relay.heal_all();
    // Back in the cluster, the old owner finds its token moved and ends its monitor.
    tokio::time::timeout(Duration::from_secs(60), scene.restarted()).await?
}
