//! Machines on nodes: real monitors, a real broker, the embedded NFS server.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use cluster_model::{
    Command, Desired, FenceClass, MigrationCause, MigrationId, MigrationOptions, MigrationState,
    Name, NodeId, Outcome, RequestId, Settings, VmId, Why,
};
use clusterd::agent::MigrationSummary;
use proto::monitor::Phase;

use crate::rig::{Rig, eventually};

/// The programs under test, or why the test cannot run.
fn programs() -> Result<(PathBuf, PathBuf), String> {
    let folder = std::env::current_exe().unwrap();
    let folder = folder.ancestors().nth(2).unwrap();
    let (vmm, broker) = (folder.join("vmm"), folder.join("storage-broker"));
    for program in [&vmm, &broker] {
        if !program.is_file() {
            let what = program.display();
            return Err(format!(
                "there is no {what}; build it: cargo build -p vmm -p storage-broker"
            ));
        }
    }
    if std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        return Err("/dev/kvm cannot be opened".into());
    }
    Ok((vmm, broker))
}

/// A cluster with a volume.
struct Scene {
    rig: Rig,
    _nfs: tokio::process::Child,
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

impl Scene {
    async fn set(nodes: usize) -> Result<Scene, String> {
        let (vmm, broker) = programs()?;
        let mut rig = Rig::new(&vmm, &broker);
        let nfs = serve_nfs(&rig, &broker);
        rig.cluster(nodes, Settings::fast()).await;
        let scene = Scene { rig, _nfs: nfs };
        scene.add_volume().await;
        Ok(scene)
    }

    async fn propose(&self, command: Command) -> Outcome {
        let request = RequestId(uuid::Uuid::new_v4().to_string());
        let handle = self.rig.nodes.iter().flatten().next().unwrap().handle();
        handle.propose("test", request, command).await.unwrap().1
    }

    async fn add_volume(&self) {
        let member = self.rig.handle(1).member().unwrap();
        let cluster = member.state().cluster.clone().unwrap();
        let url = format!("nfs://{}:2049/baton", self.rig.ip(90));
        let uuid = uuid::Uuid::new_v4().to_string();
        let request = proto::broker::AdoptVolumeRequest {
            volume: Some(proto::broker::Volume {
                url: url.clone(),
                cluster_id: cluster.id,
                broker_uid: cluster.broker_uid,
                ..Default::default()
            }),
            volume_uuid: uuid.clone(),
        };
        let adopted = member.broker.adopt_volume(request).await.unwrap();
        assert_eq!(adopted.fence_class, "gid-token", "{}", adopted.report);
        self.propose(Command::AddVolume {
            name: name("vol-a"),
            url,
            uuid,
            fence: FenceClass::parse(&adopted.fence_class).unwrap(),
            settle_ms: adopted.settle_ms,
            size_bytes: 1 << 30,
            nodes: Default::default(),
            tls_ca: None,
        })
        .await;
    }

    fn witness(&self, vm: &str) -> PathBuf {
        self.rig.folder.path().join(format!("witness-{vm}"))
    }

    async fn create(&self, vm: &str) -> VmId {
        let spec = serde_json::json!({
            "vcpus": 1, "memory_mib": 64,
            "boot": {"self-check": {"working_set_mib": 16, "dirty_mib_s": 10}},
            "disks": [{"volume": "vol-a", "path": format!("{vm}.raw"), "size_bytes": 8 << 20}],
            "witness": self.witness(vm),
        });
        let created = self
            .propose(Command::CreateVm {
                name: name(vm),
                spec: serde_json::from_value(spec).unwrap(),
                images: Default::default(),
                desired: Desired::Running,
            })
            .await;
        match created {
            Outcome::Vm(id) => id,
            other => panic!("{other:?}"),
        }
    }

    /// Why `to` does not let in what `from` announces for that migration.
    async fn ask_to_prepare(&self, from: NodeId, to: NodeId, id: MigrationId) -> String {
        let member = self.rig.handle(self.number_of(from)).member().unwrap();
        let address = member.state().nodes[&to].address.clone();
        let channel = member.dialer.channel(&address).unwrap();
        let request = proto::peer::PrepareIncomingRequest {
            migration_id: id.0,
            from_node: from.0,
            source_fingerprint: vec![1; 32],
        };
        let mut peer = proto::peer::peer_client::PeerClient::new(channel);
        let reply = peer.prepare_incoming(request).await.unwrap().into_inner();
        assert!(!reply.ready && reply.destination_fingerprint.is_empty());
        reply.refused
    }

    /// The node that owns a machine, once the log says that it runs.
    async fn running_on(&self, vm: VmId, from: usize) -> NodeId {
        self.rig
            .until(from, "the machine runs", |state| {
                state.vms[&vm].ownership.activated
            })
            .await;
        self.rig.handle(from).state().vms[&vm]
            .ownership
            .owner
            .unwrap()
    }

    fn number_of(&self, node: NodeId) -> usize {
        (1..=self.rig.nodes.len())
            .find(|&number| {
                self.rig.nodes[number - 1].is_some() && self.rig.node_id(number) == node
            })
            .unwrap()
    }

    fn status(&self, node: NodeId, vm: VmId) -> Option<proto::monitor::MonitorStatus> {
        let handle = self.rig.handle(self.number_of(node));
        Some((*handle.monitor_of(vm)?.status).clone())
    }

    /// The guest works, and found nothing wrong.
    async fn works(&self, node: NodeId, vm: VmId) -> proto::monitor::GuestReport {
        let report = || {
            self.status(node, vm)
                .and_then(|status| status.guest)
                .unwrap_or_default()
        };
        let before = report();
        eventually("the guest goes on", || {
            let now = report();
            now.steps > before.steps && now.flushed > before.flushed && now.disk_checks > 0
        })
        .await;
        let now = report();
        assert_eq!(now.errors, 0, "{}", now.error);
        now
    }

    async fn migrate(
        &self,
        vm: VmId,
        to: NodeId,
        options: MigrationOptions,
    ) -> cluster_model::MigrationId {
        let queued = self
            .propose(Command::QueueMigration {
                vm,
                to,
                options,
                cause: MigrationCause::Asked,
                why: Why::rule("a test"),
            })
            .await;
        match queued {
            Outcome::Migration(id) => id,
            other => panic!("{other:?}"),
        }
    }

    fn monitors_of(&self, vm: VmId) -> usize {
        let nodes = self.rig.nodes.iter().flatten();
        nodes
            .map(|node| {
                let member = node.handle().member().unwrap();
                let table = member.monitors.table().borrow().clone();
                table.values().filter(|monitor| monitor.vm() == vm).count()
            })
            .sum()
    }
}

fn serve_nfs(rig: &Rig, broker: &Path) -> tokio::process::Child {
    let root = rig.folder.path().join("nfs");
    std::fs::create_dir_all(&root).unwrap();
    let log = std::fs::File::create(rig.folder.path().join("nfs.log")).unwrap();
    tokio::process::Command::new(broker)
        .args([
            "serve-nfs",
            "--listen",
            &format!("{}:2049", rig.ip(90)),
            "--root",
        ])
        .arg(root)
        .args(["--export", "/baton"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

macro_rules! scene {
    ($test:literal, $nodes:literal) => {
        match Scene::set($nodes).await {
            Ok(scene) => scene,
            Err(why) => {
                proto::skip!($test, "{why}");
                return;
            }
        }
    };
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_starts_moves_live_and_stops() {
    let scene = scene!("a_machine_starts_moves_live_and_stops", 3);
    let vm = scene.create("vm-a").await;
    let source = scene.running_on(vm, 1).await;
    scene.works(source, vm).await;
    let ids: Vec<NodeId> = (1..=3).map(|number| scene.rig.node_id(number)).collect();
    let destination = ids.into_iter().find(|id| *id != source).unwrap();

    let id = scene
        .migrate(vm, destination, MigrationOptions::default())
        .await;
    scene
        .rig
        .until(1, "the migration has a summary", |state| {
            let migration = &state.migrations[&id];
            assert!(
                !matches!(migration.state, MigrationState::Aborted { .. }),
                "{migration:?}"
            );
            migration.summary.is_some()
        })
        .await;
    let state = scene.rig.handle(1).state();
    let migration = &state.migrations[&id];
    assert!(matches!(migration.state, MigrationState::CutOver { .. }));
    assert_eq!(state.vms[&vm].ownership.owner, Some(destination));
    let summary: MigrationSummary =
        serde_json::from_value(migration.summary.clone().unwrap()).unwrap();
    assert!(summary.same_host);
    assert!(
        summary.blackout_us > 0 && summary.total_us > summary.blackout_us,
        "{summary:?}"
    );
    let sum: u64 = summary.parts.iter().map(|part| part.us).sum();
    assert!(sum.abs_diff(summary.blackout_us) <= 5, "{summary:?}");
    eprintln!("{summary:#?}");
    let guest = scene.works(destination, vm).await;
    assert_eq!(guest.found_at_boot, 0, "it was not booted again");
    eventually("the source's monitor is gone", || {
        scene.monitors_of(vm) == 1
    })
    .await;
    let third = state
        .nodes
        .keys()
        .find(|id| ![source, destination].contains(id));
    for (asker, why) in [(third.unwrap(), "comes from"), (&source, "has ended")] {
        let refused = scene.ask_to_prepare(*asker, destination, id).await;
        assert!(refused.contains(why), "{refused}");
    }

    scene
        .propose(Command::SetDesired {
            vm,
            desired: Desired::Stopped,
            forced: false,
        })
        .await;
    scene
        .rig
        .until(1, "nobody owns it", |state| {
            state.vms[&vm].ownership.owner.is_none()
        })
        .await;
    eventually("no monitor is left", || scene.monitors_of(vm) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_of_a_confined_monitor_agrees_with_the_kernel_and_its_groups_go_with_it() {
    let scene = scene!(
        "a_check_of_a_confined_monitor_agrees_with_the_kernel_and_its_groups_go_with_it",
        1
    );
    let vm = scene.create("vm-a").await;
    let node = scene.running_on(vm, 1).await;
    scene.works(node, vm).await;
    let member = scene.rig.handle(1).member().unwrap();
    let checked = clusterd::check::node::check(&member).await;
    let [monitor] = checked.monitors.as_slice() else {
        panic!("{checked:#?}");
    };
    let pid = scene.status(node, vm).unwrap().pid;
    assert_eq!(monitor.pid, pid, "as this host numbers it");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for measure in &monitor.measures {
        let contradicted = measure.detail.contains("though it should be");
        assert!(!contradicted, "{measure:?}\n{status}");
    }
    let said = |name: &str| {
        let measure = monitor.measures.iter().find(|measure| measure.name == name);
        measure.is_some_and(|measure| measure.applied)
    };
    let volume = checked
        .findings
        .iter()
        .find(|finding| finding.name == "volume vol-a");
    assert_eq!(
        volume.unwrap().state,
        clusterd::check::State::Ok,
        "{checked:#?}"
    );
    eprintln!(
        "{}\n{:#?}",
        clusterd::check::table(&checked.findings),
        monitor.measures
    );
    if !nix::unistd::geteuid().is_root() {
        proto::skip!("the rest", "only root confines monitors in every way");
        return;
    }
    assert!(said("uid") && said("processes"), "{monitor:#?}");
    let folder = format!(
        "/vm-{}",
        clusterd::monitors::name_of_start(vm, scene.rig.handle(1).state().vms[&vm].ownership.token)
    );
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert_eq!(groups.contains(&folder), said("memory-limit"), "{groups}");
    scene
        .propose(Command::SetDesired {
            vm,
            desired: Desired::Stopped,
            forced: true,
        })
        .await;
    eventually("no monitor is left", || scene.monitors_of(vm) == 0).await;
    let confiner = member.monitors.confiner().clone();
    eventually("its groups are gone", || {
        confiner.groups.remove(folder.trim_start_matches("/vm-"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_of_clusterd_touches_no_guest_when_it_comes_back_in_time() {
    let mut scene = scene!(
        "a_crash_of_clusterd_touches_no_guest_when_it_comes_back_in_time",
        1
    );
    let vm = scene.create("vm-a").await;
    let node = scene.running_on(vm, 1).await;
    scene.works(node, vm).await;
    let before = scene.status(node, vm).unwrap();
    scene.rig.take(1).crash().await;
    scene.rig.start(1).await;
    eventually("the monitor is found again", || {
        scene.status(node, vm).is_some()
    })
    .await;
    let deadline = scene.status(node, vm).unwrap().lease_deadline_ns;
    eventually("its lease is renewed", || {
        scene
            .status(node, vm)
            .is_some_and(|status| status.lease_deadline_ns > deadline)
    })
    .await;
    let after = scene.status(node, vm).unwrap();
    assert_eq!(
        (after.pid, after.nonce, after.token),
        (before.pid, before.nonce, before.token)
    );
    assert_eq!(after.phase(), Phase::Running);
    scene.works(node, vm).await;
    assert_eq!(
        scene.rig.handle(1).state().vms[&vm].ownership.token.0,
        before.token
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_planned_stop_longer_than_the_lease_touches_no_guest() {
    let mut scene = scene!("a_planned_stop_longer_than_the_lease_touches_no_guest", 1);
    let vm = scene.create("vm-a").await;
    let node = scene.running_on(vm, 1).await;
    scene.works(node, vm).await;
    let monitor = scene.rig.handle(1).monitor_of(vm).unwrap();
    scene.rig.take(1).stop().await;
    // Longer than freeze and lost together; what passes here is the subject.
    let settings = Settings::fast();
    let away = Duration::from_millis(u64::from(settings.freeze_ms + settings.lost_ms));
    let until = tokio::time::Instant::now() + away;
    while tokio::time::Instant::now() < until {
        let status = monitor.describe().await.unwrap();
        assert_eq!(status.phase(), Phase::Running);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    scene.rig.start(1).await;
    eventually("the monitor is found again", || {
        scene.status(node, vm).is_some()
    })
    .await;
    scene.works(node, vm).await;
    let after = scene.status(node, vm).unwrap();
    assert_eq!(
        (after.nonce, after.token),
        (monitor.nonce(), monitor.token().0)
    );
    // A monitor that freezes in this time stands from its deadline to the daemon's return.
    let standstill = away - Duration::from_millis(u64::from(settings.freeze_ms));
    let gap = Duration::from_nanos(after.guest.unwrap().longest_gap_ns);
    assert!(gap < standstill / 4, "the guest stood still for {gap:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_of_a_node_that_is_away_too_long_freezes_and_thaws_in_place() {
    let mut scene = scene!(
        "a_machine_of_a_node_that_is_away_too_long_freezes_and_thaws_in_place",
        1
    );
    let vm = scene.create("vm-a").await;
    let node = scene.running_on(vm, 1).await;
    scene.works(node, vm).await;
    let monitor = scene.rig.handle(1).monitor_of(vm).unwrap();
    scene.rig.take(1).crash().await;
    // The monitor freezes by itself: nobody is there to tell it.
    let frozen = async {
        while monitor.describe().await.unwrap().phase() != Phase::Frozen {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(crate::rig::PATIENCE, frozen)
        .await
        .unwrap();
    scene.rig.start(1).await;
    eventually("it runs again", || {
        scene
            .status(node, vm)
            .is_some_and(|status| status.phase() == Phase::Running)
    })
    .await;
    let after = scene.status(node, vm).unwrap();
    assert_eq!(after.nonce, monitor.nonce());
    assert_eq!(after.token, monitor.token().0, "a pause moves no token");
    scene.works(node, vm).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_of_a_lost_node_is_restarted_elsewhere_and_its_old_monitor_ended() {
    let mut scene = scene!(
        "a_machine_of_a_lost_node_is_restarted_elsewhere_and_its_old_monitor_ended",
        3
    );
    let vm = scene.create("vm-a").await;
    let lost = scene.running_on(vm, 1).await;
    scene.works(lost, vm).await;
    let number = scene.number_of(lost);
    let other = number % 3 + 1;
    let before = scene.rig.handle(other).state().vms[&vm].ownership.token;
    // Only the daemon dies: its monitor stays behind, as that of an isolated host.
    scene.rig.take(number).crash().await;
    scene
        .rig
        .until(other, "it runs elsewhere", |state| {
            let record = &state.vms[&vm].ownership;
            record.activated && record.owner != Some(lost) && record.token > before
        })
        .await;
    let node = scene.rig.handle(other).state().vms[&vm]
        .ownership
        .owner
        .unwrap();
    let guest = scene.works(node, vm).await;
    // The old monitor writes on until it freezes: what it promised meanwhile counts as well.
    let text = std::fs::read_to_string(scene.witness("vm-a")).unwrap();
    let boots = boots(&text);
    let [(_, 0), .., (found, promised)] = boots[..] else {
        panic!("two boots, the first of an empty disk: {text}");
    };
    assert!(promised > 0, "the first guest flushed: {text}");
    assert!(
        found >= promised && guest.found_at_boot == found,
        "what was flushed is there: found {found} of {promised}, {guest:?}"
    );
    scene.rig.start(number).await;
    eventually("the stray monitor is ended", || scene.monitors_of(vm) == 1).await;
    scene.works(node, vm).await;
}

/// What each boot found on its disk, with the highest number that was flushed before it, as a witness file says.
fn boots(witness: &str) -> Vec<(u64, u64)> {
    let mut promised = 0;
    let mut boots = Vec::new();
    for line in witness.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [kind, number, "life", _] = words[..] else {
            panic!("not a witness's line: {line:?}");
        };
        let number: u64 = number.parse().unwrap();
        match kind {
            "found" => boots.push((number, promised)),
            "flushed" => promised = promised.max(number),
            other => panic!("not a witness's word: {other:?}"),
        }
    }
    boots
}

#[test]
fn a_witness_is_read_by_its_numbers_and_not_by_its_lives() {
    let text = "found 0 life 1\nflushed 90 life 1\nflushed 100 life 1\nfound 100 life 2\nflushed 7 life 2\n";
    assert_eq!(boots(text), [(0, 0), (100, 100)]);
}
