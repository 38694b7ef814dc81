//! What a source may still promise once something else has moved its machine on.

use std::path::Path;

use cluster_model::ids::Token;
use migration_core::MachineSource;
use serde_json::json;

use super::super::*;
use super::source::Source;

const LEASE_NS: u64 = 600_000_000_000;

/// A self-checking guest with a disk.
fn spec(directory: &Path) -> ValidatedSpec {
    let size_bytes = 8 << 20;
    let image = std::fs::File::create(directory.join("disk.raw")).unwrap();
    image.set_len(size_bytes).unwrap();
    let file = json!({
        "vm_id": 1, "vm_name": "checked", "node_id": 1, "node_uid": 60001, "token": 5,
        "memory_mib": 32, "vcpus": 1,
        "boot": {"self-check": {"working_set_mib": 16, "dirty_mib_s": 10}},
        "disks": [{
            "volume": format!("dir:{}", directory.display()), "path": "disk.raw", "cluster_id": "test",
            "broker_uid": 60000, "fence_class": "none", "size_bytes": size_bytes,
        }],
    });
    ValidatedSpec::new(serde_json::from_value(file).unwrap()).unwrap()
}

fn permit(monitor: &Monitor, token: u32) -> wire::RunPermit {
    wire::RunPermit {
        vm_id: 1,
        token,
        log_index: 1,
        lease_deadline_ns: clock::boottime_ns() + LEASE_NS,
        nonce: monitor.nonce,
    }
}

/// A monitor whose guest runs on a lease of `lease_ns`; `None` where there is no KVM.
async fn running(directory: &Path, lease_ns: u64) -> Option<Arc<Monitor>> {
    let mut kvm = std::fs::File::options();
    if let Err(error) = kvm.read(true).write(true).open("/dev/kvm") {
        proto::skip!("a guest that runs", "/dev/kvm cannot be opened: {error}");
        return None;
    }
    let spec = spec(directory);
    let handles = Handles::open(&spec, &directory.join("ctl")).unwrap();
    let monitor = Monitor::start(spec, handles, Vec::new()).await.unwrap();
    let permit = wire::RunPermit {
        lease_deadline_ns: clock::boottime_ns() + lease_ns,
        ..permit(&monitor, 5)
    };
    monitor.run(&permit).await.unwrap();
    Some(monitor)
}

async fn until(monitor: &Monitor, phase: Phase) {
    let mut changes = monitor.watch();
    let there = async {
        while monitor.lock().phase != phase {
            changes.changed().await.unwrap();
        }
    };
    let there = tokio::time::timeout(Duration::from_secs(60), there).await;
    assert!(there.is_ok(), "{}, not {phase}", monitor.lock().phase);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_after_quiet_is_saved_and_takes_effect_here_once_the_log_has_said_abort() {
    let directory = tempfile::tempdir().unwrap();
    let Some(monitor) = running(directory.path(), LEASE_NS).await else {
        return;
    };
    let source = Source::new(monitor.clone());
    source.pause().await.unwrap();
    source.drain_disks().await.unwrap();
    source.mark_quiet().unwrap();
    // Said just before the vCPUs stopped, heard just now.
    monitor.platform.machine.events().tell(MachineEvent::Reset);
    let saved = source.save_device_state().await.unwrap();
    let saved = crate::state::MachineState::from_bytes(&saved).unwrap();
    assert_eq!(saved.ended, Some(MachineEvent::Reset));
    assert_eq!(monitor.lock().phase, Phase::Quiet { rekeyed: false });

    monitor.rekey(Token(7), monitor.nonce).await.unwrap();
    monitor.run(&permit(&monitor, 7)).await.unwrap();
    until(&monitor, Phase::Stopped).await;
    assert!(!monitor.lock().undrained, "in order, as by request");
    monitor.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_as_the_machine_stops_for_its_cutover_takes_effect_when_that_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let Some(monitor) = running(directory.path(), LEASE_NS).await else {
        return;
    };
    let source = Source::new(monitor.clone());
    source.pause().await.unwrap();
    monitor
        .platform
        .machine
        .events()
        .tell(MachineEvent::ShutDown);
    // Its disks drain and nothing disturbs the attempt, which then fails.
    source.drain_disks().await.unwrap();
    assert_eq!(monitor.lock().phase, Phase::Stopping);
    monitor.give_up_cutover().await;
    until(&monitor, Phase::Stopped).await;
    assert!(!monitor.lock().undrained, "in order, as by request");
    monitor.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_runs_out_while_the_disks_drain_holds_them_and_no_quiet_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let Some(monitor) = running(directory.path(), 2_000_000_000).await else {
        return;
    };
    let source = Source::new(monitor.clone());
    source.pause().await.unwrap();
    let disks = monitor.platform.machine.disks();
    assert!(disks.iter().all(|disk| !disk.is_held()));
    until(&monitor, Phase::Frozen).await;
    assert!(disks.iter().all(|disk| disk.is_held()));
    assert!(source.drain_disks().await.is_err());
    assert!(source.mark_quiet().is_err());
    // Frozen, as by any lapse: a permit is enough.
    monitor.run(&permit(&monitor, 5)).await.unwrap();
    assert!(disks.iter().all(|disk| !disk.is_held()));
    monitor.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_outlives_its_stop_leaves_the_disks_to_the_guest_and_no_quiet_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let Some(monitor) = running(directory.path(), LEASE_NS).await else {
        return;
    };
    let source = Source::new(monitor.clone());
    source.pause().await.unwrap();
    assert_eq!(monitor.lock().phase, Phase::Stopping);

    // Its storage wants a re-key and its node gives it one, before the drain has looked again.
    monitor.freeze(Event::DiskRefused);
    monitor.rekey(Token(7), monitor.nonce).await.unwrap();
    monitor.run(&permit(&monitor, 7)).await.unwrap();
    let drained = source.drain_disks().await;
    assert!(drained.is_err(), "drained under a running guest");
    let disks = monitor.platform.machine.disks();
    assert!(disks.iter().all(|disk| !disk.is_held()));
    assert!(source.mark_quiet().is_err());
    {
        let state = monitor.lock();
        assert_eq!((state.phase, state.said_quiet), (Phase::Running, false));
        assert!(state.cutover_permit.is_none());
    }

    // The next attempt is not held up by what became of this one.
    let source = Source::new(monitor.clone());
    source.pause().await.unwrap();
    source.drain_disks().await.unwrap();
    assert!(disks.iter().all(|disk| disk.is_held()));
    source.mark_quiet().unwrap();
    {
        let state = monitor.lock();
        assert_eq!(state.phase, Phase::Quiet { rekeyed: false });
        assert!(state.said_quiet && state.cutover_permit.is_none());
    }
    monitor.end().await;
}
