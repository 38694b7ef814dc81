//! Rules for the cluster itself: its nodes, volumes, settings and placement rules.

use std::collections::{BTreeMap, BTreeSet};

use super::{Applied, Entry, name_taken};
use crate::command::{Outcome, Rejection};
use crate::event::{Object, Severity, Why, counted};
use crate::ids::{Incarnation, LogIndex, Name, NodeId, VmId, VolumeId};
use crate::settings::Settings;
use crate::settle::SETTLE_MS_MAX;
use crate::state::{
    Absence, ClusterInfo, ClusterState, Drain, Duty, LOSSES_MAX, Liveness, MigrationCause,
    MigrationState, Node, NodeFacts, NodeRole, OwnershipCause, Rule, Volume,
};
use crate::trust::Sha256;
use crate::{ABSENT_MS_MAX, FIRST_NODE};

/// Nodes in a cluster at most.
pub(super) const NODES_MAX: usize = 1_000;
/// Placement rules at most.
const RULES_MAX: usize = 10_000;
/// The longest text that a person may give as a reason, bytes.
const REASON_BYTES_MAX: usize = 1_024;
/// The longest address or identity of a volume, bytes.
const URL_BYTES_MAX: usize = 2_048;

/// The largest PEM text of a volume's certificate authority, in bytes: some certificates. It is in every
/// snapshot and in the machine file of every machine on the volume.
const TLS_CA_BYTES_MAX: usize = 16 << 10;
/// Losses older than this do not count towards quarantine, ms.
const LOSS_WINDOW_MS: u64 = 3_600_000;
/// Added to the broker's uid and a node's number to make the node's uid.
const NODE_UID_STEP: u32 = 1;

impl ClusterState {
    pub(super) fn init_cluster(
        &mut self,
        entry: &mut Entry<'_>,
        id: &str,
        name: &Name,
        broker_uid: u32,
        node_name: &Name,
        address: &str,
    ) -> Applied {
        if let Some(cluster) = &self.cluster {
            return Err(Rejection::AlreadyInitialised(cluster.name.clone()));
        }
        self.cluster = Some(ClusterInfo {
            id: id.to_owned(),
            name: name.clone(),
            broker_uid,
        });
        self.lost_ms_longest = self.settings.lost_ms;
        self.insert_node(FIRST_NODE, node_name, address, NodeRole::Voter, None);
        self.note(
            entry,
            Severity::Info,
            vec![Object::Cluster, Object::Node(FIRST_NODE)],
            "cluster.made",
            format!("cluster {name} with its first node {node_name}"),
            None,
        );
        Ok(Outcome::Node(FIRST_NODE))
    }

    pub(super) fn insert_node(
        &mut self,
        id: NodeId,
        name: &Name,
        address: &str,
        role: NodeRole,
        key: Option<Sha256>,
    ) {
        let broker_uid = self
            .cluster
            .as_ref()
            .map_or(0, |cluster| cluster.broker_uid);
        // Below the token range, above the broker, one for each node: the data calls' uid.
        let spread = u32::try_from(id.0 % 1_000_000).unwrap_or(0) + NODE_UID_STEP;
        self.nodes.insert(
            id,
            Node {
                id,
                name: name.clone(),
                address: address.to_owned(),
                incarnation: Incarnation(0),
                role,
                liveness: Liveness::Joining,
                up_since: LogIndex(0),
                duty: Duty::Active,
                facts: NodeFacts::default(),
                uid: broker_uid.saturating_add(spread),
                absence: None,
                losses: Vec::new(),
                key,
            },
        );
    }

    pub(super) fn remove_node(&mut self, entry: &mut Entry<'_>, node: NodeId) -> Applied {
        let name = self.node(node)?.name.clone();
        let owned: Vec<String> = self.owned_by(node).map(|vm| vm.name.to_string()).collect();
        if !owned.is_empty() {
            return Err(Rejection::NodeInUse {
                node,
                reason: format!(
                    "still has {}; empty it first: clusterctl drain {name}",
                    owned.join(", ")
                ),
            });
        }
        let open = self
            .migrations
            .values()
            .any(|m| m.is_open() && (m.from == node || m.to == node));
        if open {
            return Err(Rejection::NodeInUse {
                node,
                reason: "has migrations under way; wait, or: clusterctl migration list".into(),
            });
        }
        if self.nodes.len() == 1 {
            return Err(Rejection::NodeInUse {
                node,
                reason: "is the last node of the cluster".into(),
            });
        }
        self.nodes.remove(&node);
        self.drains.remove(&node);
        self.forget_home(node);
        self.trust.join_tokens.retain(|_, token| token.node != name);
        self.note(
            entry,
            Severity::Info,
            vec![Object::Node(node)],
            "node.removed",
            format!("{name} left the cluster"),
            None,
        );
        Ok(Outcome::Nothing)
    }

    pub(super) fn register_node(
        &mut self,
        entry: &mut Entry<'_>,
        node: NodeId,
        (incarnation, replaces): (Incarnation, Incarnation),
        address: &str,
        facts: &NodeFacts,
    ) -> Applied {
        let known = self.node(node)?;
        if known.incarnation != incarnation && known.incarnation != replaces {
            return Err(Rejection::OtherIncarnation { node });
        }
        let rebooted = known.incarnation != Incarnation(0) && known.incarnation != incarnation;
        let (before, former) = (known.liveness, known.incarnation);
        let name = known.name.clone();
        let mut ended: Vec<VmId> = Vec::new();
        if rebooted {
            ended.extend(self.owned_by(node).map(|vm| vm.id));
            self.tokens_left(ended.len())?;
            self.take_machines_from(entry, node, OwnershipCause::NodeRebooted)?;
            self.abort_migrations_of(entry, node, &format!("{name} rebooted"));
        }
        let quarantine = before == Liveness::Quarantined;
        let known = self.node_mut(node)?;
        known.incarnation = incarnation;
        known.address = address.to_owned();
        known.facts = facts.clone();
        // Monitors of a former life of the host ended with it; those of this one may still go by an absence.
        if rebooted {
            known.absence = None;
        }
        if !quarantine {
            known.liveness = Liveness::Up;
            if before != Liveness::Up || rebooted {
                known.up_since = entry.index;
            }
        }
        if before != Liveness::Up || rebooted {
            let reboot = match (rebooted, ended.len()) {
                (false, _) => String::new(),
                (true, 0) => ", after a reboot of its host".into(),
                (true, some) => format!(
                    ", after a reboot of its host, which ended {}",
                    counted(some, "machine")
                ),
            };
            let severity = match ended.is_empty() {
                true => Severity::Info,
                false => Severity::Error,
            };
            let mut objects = vec![Object::Node(node)];
            objects.extend(ended.iter().map(|&vm| Object::Vm(vm)));
            let why = (!ended.is_empty()).then(|| {
                Why::rule("a host that rebooted runs nothing of its former life: its machines are placed anew, each under the next token")
                    .with("former life", former)
                    .with("present life", incarnation)
            });
            self.note(
                entry,
                severity,
                objects,
                "node.up",
                format!(
                    "{name} is up: {} CPUs, {} MiB{reboot}",
                    facts.cpus, facts.memory_mib
                ),
                why,
            );
        }
        Ok(Outcome::Nothing)
    }

    pub(super) fn absent(
        &mut self,
        entry: &mut Entry<'_>,
        node: NodeId,
        incarnation: Incarnation,
        duration_ms: u32,
    ) -> Applied {
        if duration_ms > ABSENT_MS_MAX {
            return Err(Rejection::TooLarge {
                what: "announced absence (ms)".into(),
                max: u64::from(ABSENT_MS_MAX),
            });
        }
        let known = self.node_mut(node)?;
        if known.incarnation != incarnation {
            return Err(Rejection::OtherIncarnation { node });
        }
        if known.liveness != Liveness::Up {
            return Err(Rejection::NodeUnfit {
                node,
                reason: "it is not up".into(),
            });
        }
        // Monitors that did not hear of the second announcement may still go by the first.
        let earlier_ms = known.absence.map_or(0, |absence| absence.duration_ms);
        known.absence = Some(Absence {
            since: entry.index,
            duration_ms: duration_ms.max(earlier_ms),
        });
        let name = known.name.clone();
        self.note(
            entry,
            Severity::Info,
            vec![Object::Node(node)],
            "node.absent",
            format!("clusterd of {name} stops for up to {duration_ms} ms; its machines run on"),
            None,
        );
        Ok(Outcome::Nothing)
    }

    pub(super) fn returned(
        &mut self,
        node: NodeId,
        incarnation: Incarnation,
        absence: LogIndex,
    ) -> Applied {
        let known = self.node_mut(node)?;
        if known.incarnation != incarnation {
            return Err(Rejection::OtherIncarnation { node });
        }
        // One that was announced since goes on.
        if known.absence.is_some_and(|known| known.since == absence) {
            known.absence = None;
        }
        Ok(Outcome::Nothing)
    }

    pub(super) fn node_lost(
        &mut self,
        entry: &mut Entry<'_>,
        node: NodeId,
        incarnation: Incarnation,
        why: &Why,
    ) -> Applied {
        let known = self.node(node)?;
        if known.incarnation != incarnation {
            return Err(Rejection::OtherIncarnation { node });
        }
        if matches!(known.liveness, Liveness::Lost | Liveness::Quarantined) {
            return Ok(Outcome::Nothing);
        }
        let name = known.name.clone();
        let owned: Vec<VmId> = self.owned_by(node).map(|vm| vm.id).collect();
        self.tokens_left(owned.len())?;
        let losses_max = usize::from(self.settings.losses_max);
        let at_ms = entry.at_ms;
        let known = self.node_mut(node)?;
        known.absence = None;
        known.losses.push(at_ms);
        let surplus = known.losses.len().saturating_sub(LOSSES_MAX);
        known.losses.drain(..surplus);
        let recent = known
            .losses
            .iter()
            .filter(|&&lost| at_ms.saturating_sub(lost) < LOSS_WINDOW_MS)
            .count();
        let quarantine = recent >= losses_max;
        known.liveness = if quarantine {
            Liveness::Quarantined
        } else {
            Liveness::Lost
        };
        let mut objects = vec![Object::Node(node)];
        objects.extend(owned.iter().map(|&vm| Object::Vm(vm)));
        self.note(
            entry,
            Severity::Error,
            objects,
            "node.lost",
            format!("{name} is lost with {}", counted(owned.len(), "machine")),
            Some(why.clone()),
        );
        if quarantine {
            self.note(
                entry,
                Severity::Warn,
                vec![Object::Node(node)],
                "node.quarantined",
                format!("{name} was lost {recent} times within an hour; clear it: clusterctl node uncordon {name}"),
                None,
            );
        }
        self.take_machines_from(entry, node, OwnershipCause::NodeLost)?;
        self.abort_migrations_of(entry, node, &format!("{name} was lost"));
        Ok(Outcome::Nothing)
    }

    /// Takes every machine from a node, each under the next token, to be settled before it runs again.
    fn take_machines_from(
        &mut self,
        entry: &mut Entry<'_>,
        node: NodeId,
        cause: OwnershipCause,
    ) -> Result<(), Rejection> {
        let owned: Vec<VmId> = self.owned_by(node).map(|vm| vm.id).collect();
        for vm in owned {
            self.change_owner(entry, vm, None, cause, true)?;
            if cause == OwnershipCause::NodeLost {
                self.hold_after_loss(entry, vm)?;
            }
        }
        Ok(())
    }

    /// Holds a machine that must not be restarted by itself after its node was lost: where the storage
    /// cannot fence the lost owner, or where its spec says so. A person's `vm start` lifts the hold.
    fn hold_after_loss(&mut self, entry: &mut Entry<'_>, vm: VmId) -> Result<(), Rejection> {
        let known = self.vm(vm)?;
        let reason = if !self.fence_allows_failover(known) {
            Rejection::NoFence { vm }.to_string()
        } else if !known.spec.failover {
            "its node was lost and failover is off for it; to run it elsewhere: clusterctl vm start"
                .to_owned()
        } else {
            return Ok(());
        };
        let name = known.name.clone();
        self.vm_mut(vm)?.held = Some(reason.clone());
        self.note(
            entry,
            Severity::Error,
            vec![Object::Vm(vm)],
            "vm.held",
            format!("{name} is not restarted: {reason}"),
            None,
        );
        Ok(())
    }

    fn abort_migrations_of(&mut self, entry: &mut Entry<'_>, node: NodeId, reason: &str) {
        let open: Vec<_> = self
            .migrations
            .values()
            .filter(|migration| {
                migration.is_open() && (migration.from == node || migration.to == node)
            })
            .map(|migration| migration.id)
            .collect();
        for migration in open {
            self.end_migration_aborted(entry, migration, reason);
        }
    }

    pub(super) fn start_drain(
        &mut self,
        entry: &mut Entry<'_>,
        node: NodeId,
        reason: &str,
    ) -> Applied {
        if reason.len() > REASON_BYTES_MAX {
            return Err(Rejection::TooLarge {
                what: "reason (bytes)".into(),
                max: REASON_BYTES_MAX as u64,
            });
        }
        let known = self.node(node)?;
        let name = known.name.clone();
        let running = self
            .drains
            .get(&node)
            .is_some_and(|drain| drain.ended_at_ms == 0);
        // One that ended with machines left may be tried again.
        if running {
            return Err(Rejection::DrainState {
                node,
                is: "being drained already".into(),
                hint: "watch it: clusterctl node show".into(),
            });
        }
        self.failbacks.remove(&node);
        let machines: BTreeSet<VmId> = self.owned_by(node).map(|vm| vm.id).collect();
        for &vm in &machines {
            let known = self.vm_mut(vm)?;
            known.home = known.home.or(Some(node));
        }
        self.node_mut(node)?.duty = Duty::Draining;
        self.drains.insert(
            node,
            Drain {
                node,
                actor: entry.actor.to_owned(),
                reason: reason.to_owned(),
                since: entry.index,
                started_at_ms: entry.at_ms,
                ended_at_ms: 0,
                failures: BTreeMap::new(),
                stuck: BTreeMap::new(),
                machines,
            },
        );
        // What was on its way there stays where it is.
        let coming: Vec<_> = self
            .migrations
            .values()
            .filter(|migration| migration.to == node && migration.is_open())
            .map(|migration| migration.id)
            .collect();
        for migration in coming {
            self.end_migration_aborted(entry, migration, &format!("{name} is being drained"));
        }
        self.note(
            entry,
            Severity::Info,
            vec![Object::Node(node)],
            "drain.started",
            if reason.is_empty() {
                format!("{name} is being emptied")
            } else {
                format!("{name} is being emptied: {reason}")
            },
            None,
        );
        Ok(Outcome::Nothing)
    }

    pub(super) fn drain_trouble(
        &mut self,
        entry: &mut Entry<'_>,
        node: NodeId,
        vm: VmId,
        reason: &str,
        stuck: bool,
    ) -> Applied {
        self.running_drain(node)?;
        let label = self.vm_label(vm);
        if self.vm(vm)?.ownership.owner != Some(node) {
            return Err(Rejection::DrainState {
                node,
                is: format!("no longer where {label} is"),
                hint: "look again: clusterctl vm show".into(),
            });
        }
        let reason = &super::clip(reason.to_owned(), REASON_BYTES_MAX);
        let tries_max = self.settings.drain_tries_max;
        let drain = self.running_drain(node)?;
        let failures = drain.failures.entry(vm).or_default();
        *failures = failures.saturating_add(1);
        let tries = *failures;
        let stays = stuck || tries >= tries_max;
        if stays {
            drain.stuck.insert(vm, reason.to_owned());
        }
        self.note(
            entry,
            Severity::Warn,
            vec![Object::Vm(vm), Object::Node(node)],
            if stays { "drain.stuck" } else { "drain.retry" },
            if stays {
                format!("{label} stays: {reason}")
            } else {
                format!("{label} will be tried again ({tries} of {tries_max} failed): {reason}")
            },
            None,
        );
        Ok(Outcome::Nothing)
    }

    fn running_drain(&mut self, node: NodeId) -> Result<&mut Drain, Rejection> {
        match self.drains.get_mut(&node) {
            Some(drain) if drain.ended_at_ms == 0 => Ok(drain),
            _ => Err(Rejection::DrainState {
                node,
                is: "not being drained".into(),
                hint: "begin: clusterctl drain".into(),
            }),
        }
    }

    pub(super) fn end_drain(&mut self, entry: &mut Entry<'_>, node: NodeId) -> Applied {
        let left: Vec<VmId> = self.owned_by(node).map(|vm| vm.id).collect();
        let at_ms = entry.at_ms;
        let name = self.node(node)?.name.clone();
        let drain = self.running_drain(node)?;
        if let Some(vm) = left.iter().find(|vm| !drain.stuck.contains_key(vm)) {
            return Err(Rejection::NodeInUse {
                node,
                reason: format!("still has {vm}, which can move"),
            });
        }
        drain.ended_at_ms = at_ms.max(1);
        let machines = drain.machines.len();
        if left.is_empty() {
            self.node_mut(node)?.duty = Duty::Drained;
            self.note(
                entry,
                Severity::Info,
                vec![Object::Node(node)],
                "drain.done",
                format!(
                    "{name} is drained and safe to power off; {} left it",
                    counted(machines, "machine")
                ),
                None,
            );
        } else {
            self.note(
                entry,
                Severity::Warn,
                vec![Object::Node(node)],
                "drain.incomplete",
                format!(
                    "{name} keeps {} that cannot move",
                    counted(left.len(), "machine")
                ),
                None,
            );
        }
        Ok(Outcome::Nothing)
    }

    pub(super) fn uncordon(
        &mut self,
        entry: &mut Entry<'_>,
        node: NodeId,
        failback: bool,
    ) -> Applied {
        let known = self.node_mut(node)?;
        let name = known.name.clone();
        known.duty = Duty::Active;
        if known.liveness == Liveness::Quarantined {
            known.losses.clear();
            // It counts as lost until it registers; a living one does that at its next heartbeat.
            known.liveness = Liveness::Lost;
        }
        self.drains.remove(&node);
        // What the drain had queued stays; what is under way already goes on to its end.
        let queued: Vec<_> = self
            .migrations
            .values()
            .filter(|migration| {
                migration.state == MigrationState::Queued
                    && migration.cause == MigrationCause::Drain(node)
            })
            .map(|migration| migration.id)
            .collect();
        for migration in queued {
            self.end_migration_aborted(entry, migration, "the drain was ended by uncordon");
        }
        self.note(
            entry,
            Severity::Info,
            vec![Object::Node(node)],
            "node.uncordoned",
            format!("{name} takes machines again"),
            None,
        );
        if failback {
            self.begin_failback(entry, node);
        } else {
            self.forget_home(node);
        }
        Ok(Outcome::Nothing)
    }

    pub(super) fn add_volume(&mut self, entry: &mut Entry<'_>, volume: Volume) -> Applied {
        if self.volume_named(&volume.name).is_some() {
            return Err(name_taken("volume", &volume.name));
        }
        if let Some(known) = self
            .volumes
            .values()
            .find(|known| known.uuid == volume.uuid)
        {
            return Err(Rejection::BadSpec {
                field: "url".into(),
                problem: format!("this is volume `{}` already ({})", known.name, known.url),
            });
        }
        for node in &volume.nodes {
            self.node(*node)?;
        }
        if volume.url.len() > URL_BYTES_MAX || volume.uuid.len() > URL_BYTES_MAX {
            return Err(Rejection::TooLarge {
                what: "volume address (bytes)".into(),
                max: URL_BYTES_MAX as u64,
            });
        }
        if volume
            .tls_ca
            .as_ref()
            .is_some_and(|authority| authority.len() > TLS_CA_BYTES_MAX)
        {
            return Err(Rejection::TooLarge {
                what: "volume's certificate authority (bytes)".into(),
                max: TLS_CA_BYTES_MAX as u64,
            });
        }
        if volume.settle_ms > SETTLE_MS_MAX {
            return Err(Rejection::TooLarge {
                what: "volume's settle time (ms)".into(),
                max: u64::from(SETTLE_MS_MAX),
            });
        }
        let id = volume.id;
        self.note(
            entry,
            Severity::Info,
            vec![Object::Volume(id)],
            "volume.added",
            format!(
                "{} at {}, fence class {}{}",
                volume.name,
                volume.url,
                volume.fence.as_str(),
                match volume.tls_ca {
                    Some(_) => ", TLS required",
                    None => "",
                }
            ),
            None,
        );
        self.volumes.insert(id, volume);
        Ok(Outcome::Volume(id))
    }

    pub(super) fn remove_volume(&mut self, entry: &mut Entry<'_>, volume: VolumeId) -> Applied {
        let Some(known) = self.volumes.get(&volume) else {
            return Err(Rejection::Unknown {
                kind: "volume".into(),
                what: volume.to_string(),
            });
        };
        let name = known.name.clone();
        let users: Vec<String> = self
            .vms
            .values()
            .filter(|vm| vm.spec.disks.iter().any(|disk| disk.volume == name))
            .map(|vm| vm.name.to_string())
            .collect();
        if !users.is_empty() {
            return Err(Rejection::VolumeInUse {
                volume: name,
                vms: users.join(", "),
            });
        }
        self.volumes.remove(&volume);
        self.note(
            entry,
            Severity::Info,
            vec![Object::Volume(volume)],
            "volume.removed",
            name.to_string(),
            None,
        );
        Ok(Outcome::Nothing)
    }

    pub(super) fn set_settings(&mut self, entry: &mut Entry<'_>, settings: &Settings) -> Applied {
        settings.validate().map_err(Rejection::BadSettings)?;
        if self.settings != *settings {
            self.lost_ms_longest = self.lost_ms_longest.max(settings.lost_ms);
            self.settings = settings.clone();
            self.note(
                entry,
                Severity::Info,
                vec![Object::Cluster],
                "settings.changed",
                "settings changed".into(),
                None,
            );
        }
        Ok(Outcome::Nothing)
    }

    pub(super) fn set_rule(
        &mut self,
        entry: &mut Entry<'_>,
        name: &Name,
        rule: Option<&Rule>,
    ) -> Applied {
        match rule {
            Some(rule) => {
                if self.rules.len() >= RULES_MAX && !self.rules.contains_key(name) {
                    return Err(Rejection::TooLarge {
                        what: "rules".into(),
                        max: RULES_MAX as u64,
                    });
                }
                match rule {
                    Rule::Affinity { vms } | Rule::AntiAffinity { vms } => {
                        for vm in vms {
                            self.vm(*vm)?;
                        }
                    }
                    Rule::PossibleOwners { vm, nodes } | Rule::PreferredOwners { vm, nodes } => {
                        self.vm(*vm)?;
                        for node in nodes {
                            self.node(*node)?;
                        }
                    }
                }
                self.rules.insert(name.clone(), rule.clone());
                self.note(
                    entry,
                    Severity::Info,
                    vec![Object::Cluster],
                    "rule.set",
                    name.to_string(),
                    None,
                );
            }
            None => {
                if self.rules.remove(name).is_none() {
                    return Err(Rejection::Unknown {
                        kind: "rule".into(),
                        what: name.to_string(),
                    });
                }
                self.note(
                    entry,
                    Severity::Info,
                    vec![Object::Cluster],
                    "rule.removed",
                    name.to_string(),
                    None,
                );
            }
        }
        Ok(Outcome::Nothing)
    }
}
