//! What every replica knows: the records, and the questions that can be asked of them.
//!
//! Only `apply` (in [`crate::apply`]) changes a [`ClusterState`]. Times in it (`at_ms`) are data that
//! a command carried, milliseconds since the Unix epoch; no decision of safety reads them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::Reply;
use crate::event::Event;
use crate::ids::{
    Incarnation, LogIndex, MigrationId, Name, NodeId, RequestId, Token, VmId, VolumeId,
};
use crate::settings::Settings;
use crate::trust::{Sha256, Trust};

/// Events kept in the state; older ones are in the nodes' own logs. Enough for `why` to reach back
/// over some hundred moves, small enough for a snapshot.
pub const EVENTS_MAX: usize = 2_000;
/// Answers kept so that a repeated request is answered and not done twice.
pub const REQUESTS_MAX: usize = 4_096;
/// Ended migrations kept for `migration list`.
pub const ENDED_MIGRATIONS_MAX: usize = 512;
/// Losses remembered for each node, for the quarantine of a flapping one.
pub const LOSSES_MAX: usize = 16;

/// The replicated state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClusterState {
    /// The last entry applied.
    pub applied: LogIndex,
    /// Absent until the cluster was made.
    pub cluster: Option<ClusterInfo>,
    /// The last token granted to anybody: the one counter.
    pub token_last: Token,
    /// Every node that belongs to the cluster.
    pub nodes: BTreeMap<NodeId, Node>,
    /// Every volume.
    pub volumes: BTreeMap<VolumeId, Volume>,
    /// Every machine.
    pub vms: BTreeMap<VmId, Vm>,
    /// Migrations queued, under way, and the last ones that ended.
    pub migrations: BTreeMap<MigrationId, Migration>,
    /// Drains under way or done, by node; removed by `uncordon`.
    pub drains: BTreeMap<NodeId, Drain>,
    /// Fail-backs under way, by the node that machines return to.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub failbacks: BTreeMap<NodeId, Failback>,
    /// Placement rules.
    pub rules: BTreeMap<Name, Rule>,
    /// What can be set for the whole cluster.
    pub settings: Settings,
    /// The longest `lost_ms` that was ever set: a new leader does not know under which setting an earlier
    /// one granted the leases that still run, so it gives every node this long at first.
    pub lost_ms_longest: u32,
    /// Whom the cluster trusts, and what they did.
    #[serde(default)]
    pub trust: Trust,
    /// Answers by request id.
    pub answers: BTreeMap<RequestId, Reply>,
    /// Request ids in the order of their entries, for forgetting the oldest.
    pub answer_order: VecDeque<RequestId>,
    /// What happened and why, oldest first.
    pub events: VecDeque<Arc<Event>>,
}

/// What makes this cluster this cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// A UUID; volumes carry it.
    pub id: String,
    /// What people call it.
    pub name: Name,
    /// The uid that owns this cluster's disk files on every volume.
    pub broker_uid: u32,
}

/// Votes and runs machines, runs machines only, or votes only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeRole {
    /// Has a Raft vote and runs machines.
    Voter,
    /// No vote; runs machines.
    Learner,
    /// Has a vote; runs no machines.
    Witness,
}

impl NodeRole {
    /// The role of that name.
    pub fn parse(text: &str) -> Option<NodeRole> {
        [NodeRole::Voter, NodeRole::Learner, NodeRole::Witness]
            .into_iter()
            .find(|role| role.as_str() == text)
    }

    /// The role's name, as users see it.
    pub fn as_str(self) -> &'static str {
        match self {
            NodeRole::Voter => "voter",
            NodeRole::Learner => "learner",
            NodeRole::Witness => "witness",
        }
    }

    /// Whether such a node may have a vote, and so may lead.
    pub fn may_lead(self) -> bool {
        match self {
            NodeRole::Voter | NodeRole::Witness => true,
            NodeRole::Learner => false,
        }
    }
}

/// Whether the log counts a node among the living.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Liveness {
    /// Added, but has not spoken yet.
    Joining,
    /// Holds its lease as far as the log knows.
    Up,
    /// Its lease ran out and its machines were taken from it.
    Lost,
    /// Was lost too often; runs nothing until it is uncordoned.
    Quarantined,
}

/// Whether a node takes machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Duty {
    /// Takes machines.
    Active,
    /// Takes none and is being emptied.
    Draining,
    /// Takes none; it was empty when the drain ended.
    Drained,
}

/// What a node says of itself when it registers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// Logical processors offered to machines.
    pub cpus: u32,
    /// Memory offered to machines, MiB.
    pub memory_mib: u64,
    /// CPUID vendor, e.g. `AuthenticAMD`.
    pub cpu_vendor: String,
    /// Model name.
    pub cpu_model: String,
    /// Baton's version.
    pub version: String,
    /// Migration stream versions: oldest and newest spoken.
    pub stream_versions: (u16, u16),
    /// Whether a hardware watchdog is armed (fence class `time`).
    pub watchdog: bool,
    /// Whether /dev/kvm can be used.
    pub kvm: bool,
}

/// A planned absence of a node's `clusterd`: its monitors may run on for that much longer than its lease.
///
/// It does not end when the node registers again: monitors hold their deadlines themselves, and a node that
/// is back may be gone again a moment later. It ends with [`crate::Command::Returned`], which the node
/// proposes when each of its monitors has acknowledged a deadline within the lease; with the end of that
/// life of the host; or when the leader has waited for as long as the monitors may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Absence {
    /// The entry that announced it last.
    pub since: LogIndex,
    /// How much longer.
    pub duration_ms: u32,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Number.
    pub id: NodeId,
    /// Name.
    pub name: Name,
    /// Where peers and `clusterctl` reach it, `host:port`.
    pub address: String,
    /// Its present life; 0 before it first registered.
    pub incarnation: Incarnation,
    /// Vote and duty.
    pub role: NodeRole,
    /// Living or lost.
    pub liveness: Liveness,
    /// The entry by which it last came up.
    #[serde(default)]
    pub up_since: LogIndex,
    /// Takes machines or not.
    pub duty: Duty,
    /// What it said of itself.
    pub facts: NodeFacts,
    /// The AUTH_SYS uid of its data calls; never the broker's.
    pub uid: u32,
    /// An announced absence, until the node says that none of its monitors goes by it any more.
    #[serde(default)]
    pub absence: Option<Absence>,
    /// When it was lost, the last few times (`at_ms`).
    pub losses: Vec<u64>,
    /// Of the public key that its certificates carry; the first node has none until trust was founded.
    #[serde(default)]
    pub key: Option<Sha256>,
}

/// How a volume's server enforces the fence, strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FenceClass {
    /// The file's group is the token.
    GidToken,
    /// The file's owner is the token.
    UidToken,
    /// Freeze, kill and hardware watchdog bound the old owner in time.
    Time,
    /// Nothing: no automatic failover.
    None,
}

impl FenceClass {
    /// The class's name, as users see it.
    pub fn as_str(self) -> &'static str {
        match self {
            FenceClass::GidToken => "gid-token",
            FenceClass::UidToken => "uid-token",
            FenceClass::Time => "time",
            FenceClass::None => "none",
        }
    }

    /// The class of that name.
    pub fn parse(text: &str) -> Option<FenceClass> {
        [
            FenceClass::GidToken,
            FenceClass::UidToken,
            FenceClass::Time,
            FenceClass::None,
        ]
        .into_iter()
        .find(|class| class.as_str() == text)
    }
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Volume {
    /// Number.
    pub id: VolumeId,
    /// Name.
    pub name: Name,
    /// `nfs://…` or `dir:/…`.
    pub url: String,
    /// The identity that its identity file carries.
    pub uuid: String,
    /// Certified when it was added.
    pub fence: FenceClass,
    /// What certification measured, milliseconds.
    pub settle_ms: u32,
    /// Nodes that reach it; empty means all (shared storage).
    pub nodes: BTreeSet<NodeId>,
    /// Bytes in all, when it was added.
    pub size_bytes: u64,
    /// The certificates (PEM) that vouch for its server. With them every connection to it is under TLS, or
    /// there is none; without, none is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_ca: Option<String>,
}

impl Volume {
    /// Whether that node reaches this volume, as far as its record says.
    pub fn reaches(&self, node: NodeId) -> bool {
        self.nodes.is_empty() || self.nodes.contains(&node)
    }
}

/// A disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// On which volume.
    pub volume: Name,
    /// File name within the volume.
    pub path: String,
    /// Bytes, a multiple of 512.
    pub size_bytes: u64,
}

/// A network interface of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// The bridge on each node that it is plugged into.
    pub bridge: String,
    /// Its MAC address, `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
}

/// What a machine boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Boot {
    /// The self-checking guest that Baton carries.
    SelfCheck {
        /// Memory it dirties and checks, MiB.
        working_set_mib: u32,
        /// How fast it dirties it, MiB/s; 0: it only checks.
        dirty_mib_s: u32,
    },
    /// A Linux kernel; the files lie at the same path on every node that may run it.
    Linux {
        /// An ELF `vmlinux` or a bzImage.
        kernel: String,
        /// An initramfs, or none.
        initrd: Option<String>,
        /// The kernel command line.
        cmdline: String,
    },
}

/// What to do with a running machine whose node lost its lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnIsolation {
    /// Stop its vCPUs until the lease is back.
    #[default]
    Freeze,
    /// Let it run until the storage server refuses it (storage-enforced fences only).
    RunUntilFenced,
}

/// What a person asked a machine to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// What it boots.
    pub boot: Boot,
    /// Its disks.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// Its network interfaces.
    #[serde(default)]
    pub nics: Vec<NicSpec>,
    /// Higher is started, moved and kept first; 0 to 1000.
    #[serde(default = "default_priority")]
    pub priority: u16,
    /// Restarted elsewhere when its node is lost.
    #[serde(default = "default_true")]
    pub failover: bool,
    /// What to do when its node is isolated.
    #[serde(default)]
    pub on_isolation: OnIsolation,
    /// The blackout that a migration of it may cost, ms.
    #[serde(default)]
    pub downtime_max_ms: Option<u32>,
    /// A host file to which the self-checking guest's flushed numbers are appended (tests).
    #[serde(default)]
    pub witness: Option<String>,
    /// What access tokens are narrowed by: who may only touch one of these tags may touch this machine.
    #[serde(default)]
    pub tags: BTreeSet<Name>,
}

fn default_priority() -> u16 {
    500
}

fn default_true() -> bool {
    true
}

/// Whether a machine should run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Desired {
    /// It should run.
    Running,
    /// It should not.
    Stopped,
}

/// Which entry gave a machine its present owner and token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OwnershipCause {
    /// The machine was created and has no owner yet.
    Created,
    /// A node was told to start it.
    Start,
    /// It stopped, or its monitor ended.
    Release,
    /// A migration's cutover.
    Cutover,
    /// The same owner took a fresh token.
    Rekey,
    /// Its node was lost.
    NodeLost,
    /// Its node came back as another life of its host: the old guest is gone.
    NodeRebooted,
}

/// Who owns a machine: the record that every lease, credential and permit follows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ownership {
    /// The owner, or nobody.
    pub owner: Option<NodeId>,
    /// The fencing token; grows with every change.
    pub token: Token,
    /// The entry that made it so.
    pub since: LogIndex,
    /// Why.
    pub cause: OwnershipCause,
    /// Whether the next run must wait the settle time after its claim: an earlier owner may have
    /// writes inside the storage server.
    pub settle: bool,
    /// Whether the owner said that the machine runs under this token.
    pub activated: bool,
    /// The token of the start or cutover that began the present image of the guest's memory; a re-key
    /// keeps it. A monitor that stands under an older one is void for ever.
    pub image: Token,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Vm {
    /// Number.
    pub id: VmId,
    /// Name.
    pub name: Name,
    /// What was asked for.
    pub spec: VmSpec,
    /// Whether it should run.
    pub desired: Desired,
    /// Who owns it.
    pub ownership: Ownership,
    /// Whether its disk files exist (made by the first owner's broker before the first start).
    pub disks_made: bool,
    /// Where an image to fill disk `n` from lies, until the disks are made.
    pub images: BTreeMap<usize, String>,
    /// When its monitor ended by itself, the last few times (`at_ms`), for holding a machine that cannot live.
    pub crashes: Vec<u64>,
    /// Why it is not started again although it should run.
    pub held: Option<String>,
    /// When it last moved (`at_ms`), for the balancer's cooldown.
    pub moved_at_ms: u64,
    /// The node that a drain took it from, until it is back there, a person moved it, or that node was taken
    /// back into duty without it.
    pub home: Option<NodeId>,
    /// Nodes that could not start it since it last ran, or since a person last asked for it.
    #[serde(default)]
    pub failed_on: BTreeSet<NodeId>,
    /// Whether it is to stop at once: writes that are not on disk yet are left behind.
    #[serde(default)]
    pub stop_forced: bool,
    /// Its oldest token: a disk file under an older one is not its own.
    #[serde(default)]
    pub first_token: Token,
}

/// One lease: the right to use a disk under the owner's token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Whose disk.
    pub vm: VmId,
    /// On which volume.
    pub volume: Name,
    /// Which file.
    pub path: String,
    /// Who may use it; nobody while the machine has no owner.
    pub holder: Option<NodeId>,
    /// Under which token.
    pub token: Token,
}

/// Options of one migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MigrationOptions {
    /// TCP connections; 0: the setting.
    pub channels: u32,
    /// Bytes a second; 0: no cap.
    pub bandwidth_max_bytes_s: u64,
    /// Ceiling of the blackout, ms; 0: the machine's or the setting.
    pub downtime_max_ms: u32,
}

impl MigrationOptions {
    /// Every option as it holds for that machine: what was asked for, else the machine's, else the cluster's.
    #[must_use]
    pub fn in_force(&self, vm: &Vm, settings: &Settings) -> MigrationOptions {
        let or = |asked: u32, otherwise: u32| if asked == 0 { otherwise } else { asked };
        let downtime_max_ms = vm.spec.downtime_max_ms.unwrap_or(settings.downtime_max_ms);
        MigrationOptions {
            channels: or(self.channels, settings.migration_channels),
            bandwidth_max_bytes_s: self.bandwidth_max_bytes_s,
            downtime_max_ms: or(self.downtime_max_ms, downtime_max_ms),
        }
    }
}

/// Why a migration was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationCause {
    /// A person asked for it.
    Asked,
    /// A drain of that node.
    Drain(NodeId),
    /// The balancer.
    Balance,
    /// Going home after a drain.
    Failback(NodeId),
}

/// How a migration stands. Ended is for ever.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum MigrationState {
    /// Waits for room among the simultaneous ones.
    Queued,
    /// Under way: the destination may claim under `reserved`.
    Active {
        /// The token that the source owns the machine under.
        expects: Token,
        /// The token that the destination will own it under.
        reserved: Token,
        /// The entry that reserved it.
        reserved_at: LogIndex,
        /// How often `reserved` was replaced because the destination burnt it.
        renewals: u8,
        /// Authorises the memory channels; single use.
        ticket: String,
    },
    /// The destination owns the machine.
    CutOver {
        /// The entry that was the cutover.
        at: LogIndex,
        /// The token that it took the place of: the source's.
        expects: Token,
        /// The token it took.
        token: Token,
    },
    /// Ended without a change of owner.
    Aborted {
        /// The entry that ended it.
        at: LogIndex,
        /// Why.
        reason: String,
    },
}

/// A live migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Migration {
    /// Number.
    pub id: MigrationId,
    /// Which machine.
    pub vm: VmId,
    /// Source.
    pub from: NodeId,
    /// Destination.
    pub to: NodeId,
    /// How it stands.
    pub state: MigrationState,
    /// As asked.
    pub options: MigrationOptions,
    /// Why it was asked for.
    pub cause: MigrationCause,
    /// Who asked.
    pub actor: String,
    /// When it was queued.
    pub queued_at_ms: u64,
    /// When it was started; 0 before.
    pub started_at_ms: u64,
    /// When it ended; 0 before.
    pub ended_at_ms: u64,
    /// What both sides measured, reported by the destination after resume; JSON object.
    pub summary: Option<serde_json::Value>,
}

impl Migration {
    /// Queued or under way.
    pub fn is_open(&self) -> bool {
        matches!(
            self.state,
            MigrationState::Queued | MigrationState::Active { .. }
        )
    }

    /// Under way.
    pub fn is_active(&self) -> bool {
        matches!(self.state, MigrationState::Active { .. })
    }
}

/// A drain of one node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drain {
    /// Which node.
    pub node: NodeId,
    /// Who asked, and their words.
    pub actor: String,
    /// Their words.
    pub reason: String,
    /// The entry that began it: its migrations are younger.
    pub since: LogIndex,
    /// When it began.
    pub started_at_ms: u64,
    /// When it ended; 0 while it runs.
    pub ended_at_ms: u64,
    /// How often each machine's move failed; a machine that reaches the bound stays and is named.
    pub failures: BTreeMap<VmId, u8>,
    /// Machines that cannot move, and why.
    pub stuck: BTreeMap<VmId, String>,
    /// Machines that were on it when the drain began, for fail-back.
    pub machines: BTreeSet<VmId>,
}

/// Machines return to a node that a drain took them from: those whose [`Vm::home`] it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failback {
    /// Which node.
    pub node: NodeId,
    /// Who asked.
    pub actor: String,
    /// The entry that began it.
    pub since: LogIndex,
    /// How often each machine's move failed.
    pub failures: BTreeMap<VmId, u8>,
    /// Machines that do not return, and why.
    pub stays: BTreeMap<VmId, String>,
}

/// A placement rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Rule {
    /// The machines run on one node.
    Affinity {
        /// Which.
        vms: BTreeSet<VmId>,
    },
    /// No two of the machines run on one node.
    AntiAffinity {
        /// Which.
        vms: BTreeSet<VmId>,
    },
    /// The machine runs only on these nodes.
    PossibleOwners {
        /// Which machine.
        vm: VmId,
        /// Where it may run.
        nodes: BTreeSet<NodeId>,
    },
    /// The machine runs on these nodes where it can.
    PreferredOwners {
        /// Which machine.
        vm: VmId,
        /// Where it would rather run.
        nodes: BTreeSet<NodeId>,
    },
}

impl ClusterState {
    /// The node of that name.
    pub fn node_named(&self, name: &Name) -> Option<&Node> {
        self.nodes.values().find(|node| &node.name == name)
    }

    /// The machine of that name.
    pub fn vm_named(&self, name: &Name) -> Option<&Vm> {
        self.vms.values().find(|vm| &vm.name == name)
    }

    /// The volume of that name.
    pub fn volume_named(&self, name: &Name) -> Option<&Volume> {
        self.volumes.values().find(|volume| &volume.name == name)
    }

    /// The migration of that machine that is queued or under way.
    pub fn open_migration(&self, vm: VmId) -> Option<&Migration> {
        self.migrations
            .values()
            .find(|migration| migration.vm == vm && migration.is_open())
    }

    /// The migration of that machine that is under way.
    pub fn active_migration(&self, vm: VmId) -> Option<&Migration> {
        self.migrations
            .values()
            .find(|migration| migration.vm == vm && migration.is_active())
    }

    /// Every lease: one for each disk of each machine, held by the machine's owner.
    pub fn leases(&self) -> impl Iterator<Item = Lease> + '_ {
        self.vms.values().flat_map(|vm| {
            vm.spec.disks.iter().map(|disk| Lease {
                vm: vm.id,
                volume: disk.volume.clone(),
                path: disk.path.clone(),
                holder: vm.ownership.owner,
                token: vm.ownership.token,
            })
        })
    }

    /// Machines that a node owns.
    pub fn owned_by(&self, node: NodeId) -> impl Iterator<Item = &Vm> + '_ {
        self.vms
            .values()
            .filter(move |vm| vm.ownership.owner == Some(node))
    }

    /// Memory (MiB) and virtual processors spoken for on a node: its machines, and those on their way to it.
    pub fn committed(&self, node: NodeId) -> (u64, u64) {
        let coming = self
            .migrations
            .values()
            .filter(|migration| migration.is_active() && migration.to == node)
            .filter_map(|migration| self.vms.get(&migration.vm));
        self.owned_by(node)
            .chain(coming)
            .fold((0, 0), |(memory_mib, vcpus), vm| {
                let spec = &vm.spec;
                (memory_mib + spec.memory_mib, vcpus + u64::from(spec.vcpus))
            })
    }

    /// Memory spoken for on a node, MiB.
    pub fn memory_committed_mib(&self, node: NodeId) -> u64 {
        self.committed(node).0
    }

    /// Memory of a node that machines may still take, MiB, after the reserve.
    pub fn memory_free_mib(&self, node: &Node) -> u64 {
        node.facts
            .memory_mib
            .saturating_sub(self.settings.memory_reserve_mib)
            .saturating_sub(self.memory_committed_mib(node.id))
    }

    /// Whether every volume of a machine can fence its old owner without a person's help.
    pub fn fence_allows_failover(&self, vm: &Vm) -> bool {
        vm.spec.disks.iter().all(|disk| {
            self.volume_named(&disk.volume)
                .is_some_and(|volume| volume.fence != FenceClass::None)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{World, spec};

    #[test]
    fn an_option_of_a_move_is_what_was_asked_for_else_the_machines_else_the_clusters() {
        let mut world = World::new(1, 1_024);
        world.settings(|settings| {
            settings.downtime_max_ms = 200;
            settings.migration_channels = 3;
        });
        let plain = world.create("plain", 64);
        let mut asked = spec("own", 64);
        asked.downtime_max_ms = Some(50);
        let own = world.create_with("own", asked);
        let settings = &world.state.settings;
        let options = |channels, bandwidth_max_bytes_s, downtime_max_ms| MigrationOptions {
            channels,
            bandwidth_max_bytes_s,
            downtime_max_ms,
        };
        for (vm, given, in_force) in [
            (plain, options(0, 0, 0), options(3, 0, 200)),
            (own, options(0, 0, 0), options(3, 0, 50)),
            (plain, options(8, 7, 10), options(8, 7, 10)),
            (own, options(8, 7, 10), options(8, 7, 10)),
        ] {
            assert_eq!(given.in_force(world.vm(vm), settings), in_force);
        }
    }
}
