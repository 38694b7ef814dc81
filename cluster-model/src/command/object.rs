//! What a command is about, in people's names: for the audit, and for saying what somebody may not do.

use super::Command;
use crate::event::Object;
use crate::ids::{MigrationId, NodeId, VmId, VolumeId};
use crate::state::ClusterState;

impl Command {
    /// What this command is about, e.g. `vm/web-1`, `node/n2`, `migration/m-12`; empty: the cluster itself.
    ///
    /// To be asked before the command is applied: afterwards what it removes has no name any more.
    pub fn object(&self, state: &ClusterState) -> String {
        match self {
            Command::InitCluster { .. }
            | Command::SetSettings { .. }
            | Command::FoundTrust { .. }
            | Command::RotateAuthority { .. }
            | Command::RetireRoot { .. } => String::new(),
            Command::JoinNode { name, .. } | Command::CreateJoinToken { node: name, .. } => {
                format!("node/{name}")
            }
            Command::RevokeJoinToken { id } => format!("join-token/{id}"),
            Command::CreateAccessToken { id, .. } | Command::RevokeAccessToken { id } => {
                format!("token/{id}")
            }
            Command::TrustCluster { name, .. } | Command::DistrustCluster { name } => {
                format!("cluster/{name}")
            }
            Command::RemoveNode { node }
            | Command::RegisterNode { node, .. }
            | Command::Absent { node, .. }
            | Command::Returned { node, .. }
            | Command::NodeLost { node, .. }
            | Command::StartDrain { node, .. }
            | Command::DrainTrouble { node, .. }
            | Command::EndDrain { node }
            | Command::Uncordon { node, .. }
            | Command::StayAway { node, .. }
            | Command::EndFailback { node } => named_node(state, *node),
            Command::AddVolume { name, .. } => format!("volume/{name}"),
            Command::RemoveVolume { volume } => named_volume(state, *volume),
            Command::CreateVm { name, .. } => format!("vm/{name}"),
            Command::DeleteVm { vm }
            | Command::SetDesired { vm, .. }
            | Command::StartVm { vm, .. }
            | Command::DisksMade { vm, .. }
            | Command::Activated { vm, .. }
            | Command::Release { vm, .. }
            | Command::Rekey { vm, .. }
            | Command::QueueMigration { vm, .. } => named_vm(state, *vm),
            Command::StartMigration { migration, .. }
            | Command::RenewMigrationToken { migration, .. }
            | Command::Cutover { migration, .. }
            | Command::AbortMigration { migration, .. }
            | Command::ReportMigration { migration, .. } => named_migration(*migration),
            Command::SetRule { name, .. } => format!("rule/{name}"),
            Command::Note { objects, .. } => match objects.first() {
                None | Some(Object::Cluster) => String::new(),
                Some(Object::Node(node)) => named_node(state, *node),
                Some(Object::Vm(vm)) => named_vm(state, *vm),
                Some(Object::Volume(volume)) => named_volume(state, *volume),
                Some(Object::Migration(migration)) => named_migration(*migration),
            },
        }
    }
}

fn named_node(state: &ClusterState, node: NodeId) -> String {
    format!("node/{}", state.node_label(node))
}

fn named_vm(state: &ClusterState, vm: VmId) -> String {
    format!("vm/{}", state.vm_label(vm))
}

fn named_volume(state: &ClusterState, volume: VolumeId) -> String {
    match state.volumes.get(&volume) {
        Some(known) => format!("volume/{}", known.name),
        None => format!("volume/{volume}"),
    }
}

fn named_migration(migration: MigrationId) -> String {
    format!("migration/{migration}")
}
