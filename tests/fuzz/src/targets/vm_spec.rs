//! What people and `clusterd` write down: machine specs, machine files, node configurations, addresses, names.
//!
//! The first byte says which; the rest is the text, or (from 16 on) what is changed in a right one.

use std::os::fd::AsRawFd;

use clap::Parser;
use cluster_model::settings::Settings;
use cluster_model::{Command, Desired, LogIndex, Name, Rule, VmSpec, parse_mac};
use storage_broker::volume::{DiskPath, VolumeUrl};
use vmm::devices::virtio::net::MacAddress;
use vmm::spec::{MachineFile, ValidatedSpec};

use crate::cluster;
use crate::file;
use crate::input::Input;
use crate::json::disturb;
use crate::target::{MemoryBound, Target};

/// The target.
pub const TARGET: Target = Target {
    name: "vm_spec",
    run,
    seeds,
    input_bytes_max: 4096,
    // The largest is the table of command-line flags that a configuration is read under.
    memory: MemoryBound {
        base: 2 << 20,
        each: 512,
    },
};

fn run(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else {
        return;
    };
    match kind {
        0 => machine(text),
        1 => {
            if let Ok(file) = serde_json::from_slice::<MachineFile>(text) {
                let _ = ValidatedSpec::new(file);
            }
        }
        2 => configuration(text),
        3 => settings(text),
        4 => drop(serde_json::from_slice::<Rule>(text)),
        16.. => changed(*kind, text),
        _ => {
            if let Ok(text) = std::str::from_utf8(text) {
                words(text);
            }
        }
    }
}

/// A right text with some values changed.
fn changed(kind: u8, changes: &[u8]) {
    let right = seeds().into_iter().find(|seed| seed[0] == kind % 4);
    let value = right.and_then(|seed| serde_json::from_slice(&seed[1..]).ok());
    if let Some(mut value) = value {
        disturb(&mut value, &mut Input(changes));
        run(&[&[kind % 4], value.to_string().as_bytes()].concat());
    }
}

/// A spec that the log takes.
fn machine(text: &[u8]) {
    let Ok(spec) = serde_json::from_slice::<VmSpec>(text) else {
        return;
    };
    let mut state = cluster::state();
    let command = Command::CreateVm {
        name: cluster::name("new"),
        spec,
        images: Default::default(),
        desired: Desired::Running,
    };
    state.apply(LogIndex(100), &cluster::envelope(100, command));
    cluster::decide_everything(&state);
}

fn configuration(text: &[u8]) {
    let Ok(file) = file::holding(text) else {
        return;
    };
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let program = "/proc/self/exe";
    let flags = [
        "clusterd", "--config", &path, "--vmm", program, "--broker", program,
    ];
    if let Ok(cli) = clusterd::config::Cli::try_parse_from(flags) {
        let _ = cli.load();
    }
}

fn settings(text: &[u8]) {
    if let Ok(settings) = serde_json::from_slice::<Settings>(text) {
        let _ = settings.validate();
    }
}

/// Texts that are parsed on their own; what is understood is written back so that it is understood the same.
fn words(text: &str) {
    if let Ok(url) = text.parse::<VolumeUrl>() {
        assert_eq!(url.to_string().parse(), Ok(url), "another volume");
    }
    if let Ok(path) = text.parse::<DiskPath>() {
        assert_eq!(path.to_string().parse(), Ok(path.clone()), "another disk");
        let (directories, name) = path.parts();
        assert!(
            !name.is_empty() && !directories.contains(&".."),
            "out of the volume"
        );
    }
    if let Ok(name) = Name::new(text) {
        assert_eq!(name.as_str(), text);
    }
    if let Ok(mac) = text.parse::<MacAddress>() {
        assert_eq!(mac.to_string().parse(), Ok(mac), "another interface");
    }
    let _ = parse_mac(text);
}

fn seeds() -> Vec<Vec<u8>> {
    let spec = serde_json::to_string(&cluster::spec("a")).unwrap_or_default();
    let linux = spec.replace(
        r#"{"self-check":{"working_set_mib":4,"dirty_mib_s":0}}"#,
        r#"{"linux":{"kernel":"/k","initrd":"/i","cmdline":"console=ttyS0"}}"#,
    );
    let file = r#"{"vm_id":7,"vm_name":"db-1","node_id":2,"node_uid":60002,"token":12,"memory_mib":64,"vcpus":1,
        "boot":{"self-check":{"working_set_mib":16,"dirty_mib_s":10}},
        "disks":[{"volume":"nfs://127.0.0.1:2049/export","path":"db-1/0.raw","cluster_id":"c","broker_uid":60000,
        "fence_class":"gid-token","size_bytes":1048576}],
        "nics":[{"tap":"tap0","bridge":"br0","mac":"52:54:00:12:34:56"}],
        "incoming":{"migration_id":9,"ticket":"TICKET","listen":["127.0.0.2:0"]}}"#
        .replace("TICKET", &"ab".repeat(32));
    let configuration = "name = 'n7'\nlisten = '127.0.0.9:7000'\nadvertise = 'host:7000'\nmemory-mib = 512\n\
        cpus = 2\nmigration-ports = '1000-1003'\ndata-dir = '/tmp/x'\nbridge = ['lan=br0']\n";
    let settings = serde_json::to_string(&Settings::fast()).unwrap_or_default();
    let texts = [
        (0, spec.as_str()),
        (0, &linux),
        (1, &file),
        (2, configuration),
        (3, &settings),
        (4, r#"{"kind":"anti-affinity","vms":[8,9]}"#),
        (5, "nfs://[::1]:2049/srv?mountport=20048"),
        (5, "nfs://nas.example/srv/vm"),
        (5, "dir:/var/lib/vm"),
        (5, "vms/web1.raw"),
        (5, "52:54:00:12:34:56"),
        (5, "web-1"),
    ];
    let changes = [16, 17, 19].map(|kind| vec![kind, 1, 1, 0, 0xff]);
    texts
        .iter()
        .map(|(kind, text)| [&[*kind], text.as_bytes()].concat())
        .chain(changes)
        .collect()
}
