//! The machine file: what a monitor is told to be. The monitor checks it again (`vmm`'s `spec`).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use cluster_model::state::{Boot, OnIsolation};
use cluster_model::{ClusterState, MigrationId, NodeId, Token, Vm, VmId};
use serde::Serialize;
use serde_json::Value;

use crate::broker::{self, BrokerError};
use crate::cgroups::{self, Limits};
use crate::confine::Confinement;

/// A machine file, but for its monitor's confinement: that is known only when the monitor is started.
#[derive(Clone, Debug)]
pub struct MachineFile {
    /// The machine.
    pub vm: VmId,
    /// What its monitor may use.
    pub limits: Limits,
    contents: Value,
}

impl MachineFile {
    /// The file of a monitor that is confined so.
    pub fn confined(mut self, confinement: &Confinement) -> Vec<u8> {
        // Plain data with text keys: it always has a JSON form.
        self.contents["confinement"] = serde_json::to_value(confinement).unwrap_or_default();
        serde_json::to_vec_pretty(&self.contents).unwrap_or_default()
    }
}

/// The file's contents, field by field what `vmm` reads.
#[derive(Debug, Serialize)]
struct Contents<'s> {
    vm_id: VmId,
    vm_name: &'s str,
    node_id: NodeId,
    node_uid: u32,
    node_address: Option<IpAddr>,
    token: Token,
    memory_mib: u64,
    vcpus: u32,
    boot: &'s Boot,
    disks: Vec<MachineDisk<'s>>,
    nics: Vec<MachineNic<'s>>,
    witness: Option<&'s str>,
    on_isolation: OnIsolation,
    incoming: Option<Incoming>,
}

#[derive(Debug, Serialize)]
struct MachineDisk<'s> {
    volume: String,
    path: &'s str,
    cluster_id: String,
    broker_uid: u32,
    fence_class: String,
    size_bytes: u64,
    /// Left out where there is none, so that monitors of an earlier version read the file.
    #[serde(skip_serializing_if = "String::is_empty")]
    tls_ca: String,
}

#[derive(Debug, Serialize)]
struct MachineNic<'s> {
    tap: String,
    bridge: &'s str,
    mac: &'s str,
}

/// What a destination waits for.
#[derive(Clone, Serialize)]
pub struct Incoming {
    /// The migration.
    pub migration_id: MigrationId,
    /// Its ticket, in hex.
    pub ticket: String,
    /// Where the memory stream is accepted.
    pub listen: Vec<SocketAddr>,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming")
            .field("migration_id", &self.migration_id)
            .field("ticket", &"(secret)")
            .field("listen", &self.listen)
            .finish()
    }
}

/// Where the machine is to run.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// This node.
    pub node: NodeId,
    /// The address its connections come from.
    pub address: IpAddr,
}

/// Writes the machine file of `vm` for a monitor on this node under `token`; `bridges` are those that
/// are called otherwise on this host.
///
/// # Errors
/// When the record names a volume that there is not.
pub fn write(
    state: &ClusterState,
    vm: &Vm,
    token: Token,
    place: Place,
    bridges: &BTreeMap<String, String>,
    incoming: Option<Incoming>,
) -> Result<MachineFile, BrokerError> {
    let disks = vm
        .spec
        .disks
        .iter()
        .zip(broker::files(state, vm)?)
        .map(|(disk, file)| {
            let volume = file.volume.unwrap_or_default();
            MachineDisk {
                volume: volume.url,
                path: &disk.path,
                cluster_id: volume.cluster_id,
                broker_uid: volume.broker_uid,
                fence_class: volume.fence_class,
                size_bytes: disk.size_bytes,
                tls_ca: volume.tls_ca,
            }
        })
        .collect();
    let nics = vm
        .spec
        .nics
        .iter()
        .enumerate()
        .map(|(number, nic)| MachineNic {
            tap: tap_name(token, number),
            bridge: bridges.get(&nic.bridge).unwrap_or(&nic.bridge),
            mac: &nic.mac,
        })
        .collect();
    let contents = Contents {
        vm_id: vm.id,
        vm_name: vm.name.as_str(),
        node_id: place.node,
        node_uid: state.nodes.get(&place.node).map_or(0, |node| node.uid),
        node_address: (!place.address.is_unspecified()).then_some(place.address),
        token,
        memory_mib: vm.spec.memory_mib,
        vcpus: vm.spec.vcpus,
        boot: &vm.spec.boot,
        disks,
        nics,
        witness: vm.spec.witness.as_deref(),
        on_isolation: vm.spec.on_isolation,
        incoming,
    };
    Ok(MachineFile {
        vm: vm.id,
        limits: cgroups::limits(vm.spec.memory_mib, vm.spec.vcpus),
        // Plain data with text keys: it always has a JSON form.
        contents: serde_json::to_value(&contents).unwrap_or_default(),
    })
}

/// The tap device of a machine's network interface, at most 15 bytes. A token belongs to one grant, so
/// the taps of a migration's two sides never collide, wherever they are.
pub fn tap_name(token: Token, number: usize) -> String {
    format!("bt{}n{number}", token.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::confine::Measure;

    #[test]
    fn the_file_says_whom_the_monitor_becomes_and_what_was_done_to_it() {
        let file = MachineFile {
            vm: VmId(7),
            limits: cgroups::limits(64, 1),
            contents: serde_json::json!({"vm_id": 7}),
        };
        let confinement = Confinement {
            uid: Some(805_306_375),
            measures: vec![Measure::missing("cpu-limit", "no controller")],
        };
        let written: Value = serde_json::from_slice(&file.confined(&confinement)).unwrap();
        let expected = serde_json::json!({
            "vm_id": 7,
            "confinement": {
                "uid": 805_306_375,
                "measures": [{"name": "cpu-limit", "applied": false, "detail": "no controller"}],
            },
        });
        assert_eq!(written, expected);
    }
}
