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
        ("/disks/0/size_bytes", json!(513), "disks[0].size_bytes"),
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
