//! What a machine file must be.

use super::*;
use serde_json::{Value, json};

fn good() -> Value {
    json!({
        "vm_id": 7, "vm_name": "db-1", "node_id": 2, "node_uid": 60002, "token": 12,
        "memory_mib": 64, "vcpus": 1,
        "boot": {"self-check": {"working_set_mib": 16, "dirty_mib_s": 10}},
        "disks": [{"volume": "nfs://127.0.0.1:2049/export", "path": "db-1/0.raw", "cluster_id": "c",
                   "broker_uid": 60000, "fence_class": "gid-token", "size_bytes": 1048576, "tls_ca": ""}],
        "nics": [{"tap": "tap0", "bridge": "br0", "mac": "52:54:00:12:34:56"}],
        "incoming": {"migration_id": 9, "ticket": "ab".repeat(32), "listen": ["127.0.0.2:0"]},
    })
}

fn check(value: Value) -> Result<ValidatedSpec, SpecError> {
    ValidatedSpec::new(serde_json::from_value(value).unwrap())
}

#[test]
fn a_good_file_is_taken_whole() {
    let spec = check(good()).unwrap();
    assert_eq!(spec.disks().len(), 1);
    assert_eq!(spec.macs(), [[0x52, 0x54, 0, 0x12, 0x34, 0x56]]);
    assert_eq!(spec.incoming().unwrap().1, [0xab; 32]);
    assert!(
        !format!("{spec:?}").contains("abab"),
        "the ticket is a secret"
    );
}

#[test]
fn each_unusable_value_is_named() {
    let cases: &[(&str, Value, &str)] = &[
        ("/token", json!(0), "token"),
        ("/memory_mib", json!(0), "memory_mib"),
        ("/memory_mib", json!(99_999_999), "memory_mib"),
        ("/vcpus", json!(0), "vcpus"),
        ("/vcpus", json!(400), "vcpus"),
        (
            "/boot/self-check/working_set_mib",
            json!(61),
            "working_set_mib",
        ),
        ("/disks/0/volume", json!("ftp://x"), "disks[0].volume"),
        // TLS is required and nobody vouches for the server: never plain instead.
        (
            "/disks/0/volume",
            json!("nfs://127.0.0.1/export?tls=require"),
            "disks[0].tls_ca",
        ),
        ("/disks/0/tls_ca", json!("nonsense"), "disks[0].tls_ca"),
        ("/disks/0/path", json!("../x"), "disks[0].path"),
        ("/disks/0/size_bytes", json!(1048577), "disks[0]"),
        (
            "/disks/0/fence_class",
            json!("magic"),
            "disks[0].fence_class",
        ),
        ("/disks/0/broker_uid", json!(60002), "node_uid"),
        ("/nics/0/tap", json!("a tap with spaces"), "nics[0].tap"),
        ("/nics/0/mac", json!("53:54:00:12:34:56"), "nics[0].mac"),
        ("/nics/0/mac", json!("5254:00:12:34:56"), "nics[0].mac"),
        ("/incoming/ticket", json!("abc"), "incoming.ticket"),
        ("/incoming/listen", json!([]), "incoming.listen"),
    ];
    for (pointer, value, named) in cases {
        let mut file = good();
        *file.pointer_mut(pointer).unwrap() = value.clone();
        let error = check(file).unwrap_err().to_string();
        assert!(error.contains(named), "{pointer}: {error}");
    }
}

/// What the log answers to a machine of these measures that boots so.
fn let_in(memory_mib: u64, vcpus: u32, disks: &[u64], nics: usize, boot: &Value) -> bool {
    let command = |command| cluster_model::Envelope {
        request: cluster_model::RequestId(format!("{command:?}")),
        actor: "test".into(),
        at_ms: 1,
        asked: None,
        command,
    };
    let name = |text: &str| cluster_model::Name::new(text).unwrap();
    let mut state = cluster_model::ClusterState::default();
    let spec = json!({
        "memory_mib": memory_mib, "vcpus": vcpus, "boot": boot, "priority": 500,
        "disks": disks.iter().enumerate().map(|(index, bytes)| {
            json!({"volume": "vol", "path": format!("{index}.raw"), "size_bytes": bytes})
        }).collect::<Vec<_>>(),
        "nics": vec![json!({"bridge": "br0", "mac": "52:54:00:12:34:56"}); nics],
    });
    let commands = [
        cluster_model::Command::InitCluster {
            id: "c".into(),
            name: name("c"),
            broker_uid: 60_000,
            node_name: name("n1"),
            address: "127.0.0.1:1".into(),
        },
        cluster_model::Command::AddVolume {
            name: name("vol"),
            url: "nfs://127.0.0.1/export".into(),
            uuid: "v".into(),
            fence: cluster_model::FenceClass::GidToken,
            settle_ms: 0,
            size_bytes: 1 << 50,
            nodes: Default::default(),
            tls_ca: None,
        },
        cluster_model::Command::CreateVm {
            name: name("vm"),
            spec: serde_json::from_value(spec).unwrap(),
            images: Default::default(),
            desired: cluster_model::Desired::Running,
        },
    ];
    let mut answer = None;
    for (index, asked) in (1..).zip(commands) {
        answer = Some(state.apply(cluster_model::LogIndex(index), &command(asked)));
    }
    matches!(answer, Some(cluster_model::Reply::Done { .. }))
}

#[test]
fn what_the_door_lets_in_at_its_limits_the_monitor_can_be_and_beyond_both_refuse() {
    use crate::guest::boot_params;
    use cluster_model::limits;
    let linux = |cmdline: usize| json!({"linux": {"kernel": "/k", "initrd": null, "cmdline": "x".repeat(cmdline)}});
    let guest = |mib: u64| json!({"self-check": {"working_set_mib": mib, "dirty_mib_s": 0}});
    let (memory, vcpus) = (limits::MEMORY_MIB, limits::VCPUS);
    let (least, most) = (*memory.start(), *memory.end());
    let disk = [limits::SELF_CHECK_DISK_BYTES_MIN];
    let full = [*limits::DISK_BYTES.end(); limits::DISKS_MAX];
    let slots_left = limits::SLOTS_MAX - limits::DISKS_MAX;
    let set = limits::SELF_CHECK_WORKING_SET_MIB_MAX;
    let cmdline = limits::CMDLINE_BYTES_MAX;
    for (memory_mib, vcpus, disks, nics, boot, right) in [
        (least, 1, &disk[..], 0, guest(least - 4), true),
        (most, *vcpus.end(), &disk[..], 0, guest(set), true),
        (
            most,
            *vcpus.end(),
            &full[..],
            slots_left,
            linux(cmdline),
            true,
        ),
        (least, 1, &[], 0, guest(least - 3), false),
        (least, 1, &[], 0, guest(0), false),
        (most, 1, &[], 0, guest(set + 1), false),
        (least - 1, 1, &[], 0, linux(0), false),
        (most + 1, 1, &[], 0, linux(0), false),
        (least, 0, &[], 0, linux(0), false),
        (least, 64, &[], 0, linux(0), false),
        (least, 1, &full[..], slots_left + 1, linux(0), false),
        (least, 1, &disk[1..], limits::NICS_MAX + 1, linux(0), false),
        (least, 1, &[], 0, linux(cmdline + 1), false),
    ] {
        let what = format!("{memory_mib} MiB, {vcpus} vCPUs, {boot}");
        let door = let_in(memory_mib, vcpus, disks, nics, &boot);
        assert_eq!(door, right, "the door: {what}");
        let mut file = good();
        file["memory_mib"] = json!(memory_mib);
        file["vcpus"] = json!(vcpus);
        file["nics"] = vec![file["nics"][0].clone(); nics].into();
        file["boot"] = boot;
        let shape = file["disks"][0].clone();
        let sized = |bytes: &u64| {
            let mut disk = shape.clone();
            disk["size_bytes"] = json!(bytes);
            disk
        };
        file["disks"] = disks.iter().map(sized).collect();
        let checked = check(file).map(|spec| spec.file().clone());
        assert_eq!(checked.is_ok(), right, "the monitor: {what}");
        if let Ok(MachineFile {
            boot: Boot::SelfCheck {
                working_set_mib, ..
            },
            ..
        }) = checked
        {
            let disk = disks.first().map(|&bytes| crate::guest::GuestDisk {
                mmio_address: 1,
                bytes,
            });
            let params = boot_params(1, memory_mib, vcpus, working_set_mib.into(), 0, disk, 1);
            assert!(params.is_ok(), "the guest: {what}: {params:?}");
        }
    }
}

#[test]
fn an_unknown_field_is_refused() {
    let mut file = good();
    file["surprise"] = json!(1);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("machine.json");
    std::fs::write(&path, file.to_string()).unwrap();
    let error = ValidatedSpec::read(&path).unwrap_err().to_string();
    assert!(
        error.contains("machine.json") && error.contains("surprise"),
        "{error}"
    );
}

#[test]
fn running_until_fenced_needs_storage_that_fences() {
    let mut file = good();
    file["on_isolation"] = json!("run-until-fenced");
    assert!(check(file.clone()).is_ok());
    file["disks"][0]["fence_class"] = json!("time");
    assert!(
        check(file)
            .unwrap_err()
            .to_string()
            .contains("on_isolation")
    );
}
