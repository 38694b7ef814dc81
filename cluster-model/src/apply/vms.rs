//! Rules for machines: who owns them, under which token.

use std::collections::{BTreeMap, BTreeSet};

use super::{Applied, Entry, name_taken};
use crate::command::{Outcome, Rejection, ReleaseReason};
use crate::event::{Object, Severity, Why, counted};
use crate::ids::{Name, NodeId, Token, VmId};
use crate::limits;
use crate::placement;
use crate::state::{
    ClusterState, Desired, DiskSpec, FenceClass, MigrationState, NicSpec, OnIsolation, Ownership,
    OwnershipCause, Vm, VmSpec,
};
use crate::trust::TAGS_MAX;

/// Machines in a cluster at most.
const VMS_MAX: usize = 100_000;
/// Crashes remembered of each machine.
const CRASHES_KEPT: usize = 16;
/// Crashes older than this do not count towards a hold, ms.
const CRASH_WINDOW_MS: u64 = 600_000;

impl ClusterState {
    pub(super) fn create_vm(
        &mut self,
        entry: &mut Entry<'_>,
        name: &Name,
        spec: &VmSpec,
        images: &BTreeMap<usize, String>,
        desired: Desired,
    ) -> Applied {
        if self.vm_named(name).is_some() {
            return Err(name_taken("machine", name));
        }
        if self.vms.len() >= VMS_MAX {
            return Err(Rejection::TooLarge {
                what: "machines".into(),
                max: VMS_MAX as u64,
            });
        }
        self.check_spec(spec, images)?;
        let id = VmId(entry.index.0);
        let token = self.take_token()?;
        self.vms.insert(
            id,
            Vm {
                id,
                name: name.clone(),
                spec: spec.clone(),
                desired,
                ownership: Ownership {
                    owner: None,
                    token,
                    since: entry.index,
                    cause: OwnershipCause::Created,
                    settle: false,
                    activated: false,
                    image: token,
                },
                disks_made: spec.disks.is_empty(),
                images: images.clone(),
                crashes: Vec::new(),
                held: None,
                moved_at_ms: 0,
                home: None,
                failed_on: BTreeSet::new(),
                stop_forced: false,
                first_token: token,
            },
        );
        self.note(
            entry,
            Severity::Info,
            vec![Object::Vm(id)],
            "vm.created",
            format!(
                "{name}: {}, {} MiB, {}",
                counted(spec.vcpus as usize, "vCPU"),
                spec.memory_mib,
                counted(spec.disks.len(), "disk")
            ),
            None,
        );
        Ok(Outcome::Vm(id))
    }

    /// Whether a machine can be so: its measures, then what it names in this cluster.
    fn check_spec(&self, spec: &VmSpec, images: &BTreeMap<usize, String>) -> Result<(), Rejection> {
        limits::check_spec(spec)?;
        check_policy(spec)?;
        for number in 0..spec.disks.len() {
            self.check_disk(spec, number)?;
        }
        for (number, nic) in spec.nics.iter().enumerate() {
            check_nic(number, nic)?;
        }
        for (number, path) in images {
            if *number >= spec.disks.len() || !path_fits(path) {
                return bad(
                    "images",
                    format!(
                        "image {number}: an absolute path for one of the {} disks",
                        spec.disks.len()
                    ),
                );
            }
        }
        Ok(())
    }

    fn check_disk(&self, spec: &VmSpec, number: usize) -> Result<(), Rejection> {
        let field = format!("disks[{number}]");
        let disk = &spec.disks[number];
        let Some(volume) = self.volume_named(&disk.volume) else {
            return Err(Rejection::Unknown {
                kind: "volume".into(),
                what: disk.volume.to_string(),
            });
        };
        let fenced = matches!(volume.fence, FenceClass::GidToken | FenceClass::UidToken);
        if spec.on_isolation == OnIsolation::RunUntilFenced && !fenced {
            return bad(
                "on_isolation",
                format!(
                    "run-until-fenced needs storage that fences; {} has class {}",
                    volume.name,
                    volume.fence.as_str()
                ),
            );
        }
        if !file_name_is_plain(&disk.path) {
            return bad(
                &field,
                format!(
                    "path `{}`; use a plain file name: letters, digits, '.', '-', '_', not beginning with '.'",
                    disk.path
                ),
            );
        }
        let same = |other: &DiskSpec| other.volume == disk.volume && other.path == disk.path;
        if spec.disks[..number].iter().any(same) {
            return bad(&field, format!("{} appears twice", disk.path));
        }
        let taken = self.vms.values().find(|vm| vm.spec.disks.iter().any(same));
        match taken {
            Some(other) => bad(
                &field,
                format!(
                    "{} on {} is a disk of {} already",
                    disk.path, disk.volume, other.name
                ),
            ),
            None => Ok(()),
        }
    }

    pub(super) fn delete_vm(&mut self, entry: &mut Entry<'_>, vm: VmId) -> Applied {
        let known = self.vm(vm)?;
        if let Some(owner) = known.ownership.owner {
            return Err(Rejection::Owned { vm, owner });
        }
        let name = known.name.clone();
        self.vms.remove(&vm);
        self.rules.retain(|_, rule| match rule {
            crate::state::Rule::Affinity { vms } | crate::state::Rule::AntiAffinity { vms } => {
                vms.remove(&vm);
                vms.len() > 1
            }
            crate::state::Rule::PossibleOwners { vm: ruled, .. }
            | crate::state::Rule::PreferredOwners { vm: ruled, .. } => *ruled != vm,
        });
        self.note(
            entry,
            Severity::Info,
            vec![Object::Vm(vm)],
            "vm.deleted",
            name.to_string(),
            None,
        );
        Ok(Outcome::Nothing)
    }

    pub(super) fn set_desired(
        &mut self,
        entry: &mut Entry<'_>,
        vm: VmId,
        desired: Desired,
        forced: bool,
    ) -> Applied {
        let known = self.vm_mut(vm)?;
        let name = known.name.clone();
        let forced = forced && desired == Desired::Stopped;
        let changed = known.desired != desired || (forced && !known.stop_forced);
        known.desired = desired;
        // A later, gentler request does not take back a forced one that is under way.
        known.stop_forced = desired == Desired::Stopped && (forced || known.stop_forced);
        if desired == Desired::Running {
            known.held = None;
            known.crashes.clear();
            known.failed_on.clear();
        }
        if desired == Desired::Stopped
            && let Some(migration) = self.open_migration(vm).map(|migration| migration.id)
        {
            self.end_migration_aborted(entry, migration, "the machine is to stop");
        }
        if changed {
            let (kind, words) = match desired {
                Desired::Running => ("vm.start-asked", "should run"),
                Desired::Stopped if forced => (
                    "vm.stop-forced",
                    "should stop at once, without waiting for its disks",
                ),
                Desired::Stopped => ("vm.stop-asked", "should stop"),
            };
            self.note(
                entry,
                Severity::Info,
                vec![Object::Vm(vm)],
                kind,
                format!("{name} {words}"),
                None,
            );
        }
        Ok(Outcome::Nothing)
    }

    pub(super) fn start_vm(
        &mut self,
        entry: &mut Entry<'_>,
        vm: VmId,
        node: NodeId,
        expects: Token,
        why: &Why,
    ) -> Applied {
        let known = self.vm(vm)?;
        if known.ownership.token != expects {
            return Err(stale(known, format!("token {expects}")));
        }
        if let Some(owner) = known.ownership.owner {
            return Err(Rejection::Owned { vm, owner });
        }
        if known.desired != Desired::Running {
            return Err(Rejection::NotDesired { vm });
        }
        if let Some(reason) = &known.held {
            return Err(Rejection::Held {
                vm,
                reason: reason.clone(),
            });
        }
        placement::may_run(self, known, self.node(node)?)?;
        let settle = known.ownership.settle;
        let token = self.change_owner(entry, vm, Some(node), OwnershipCause::Start, settle)?;
        let detail = format!(
            "{} is started on {} under {token}",
            self.vm_label(vm),
            self.node_label(node)
        );
        self.note(
            entry,
            Severity::Info,
            vec![Object::Vm(vm), Object::Node(node)],
            "vm.placed",
            detail,
            Some(why.clone()),
        );
        Ok(Outcome::Token(token))
    }

    /// The one place where a machine's owner or token changes: takes the next token, and with the
    /// ownership record every lease of the machine moves in the same step.
    pub(super) fn change_owner(
        &mut self,
        entry: &mut Entry<'_>,
        vm: VmId,
        owner: Option<NodeId>,
        cause: OwnershipCause,
        settle: bool,
    ) -> Result<Token, Rejection> {
        self.vm(vm)?;
        let token = self.take_token()?;
        self.grant(entry, vm, owner, cause, settle, token)?;
        Ok(token)
    }

    /// Writes an ownership record under a token that was taken before.
    pub(super) fn grant(
        &mut self,
        entry: &Entry<'_>,
        vm: VmId,
        owner: Option<NodeId>,
        cause: OwnershipCause,
        settle: bool,
        token: Token,
    ) -> Result<(), Rejection> {
        let known = self.vm_mut(vm)?;
        debug_assert!(token > known.ownership.token, "tokens only grow");
        // Only the same owner's re-key goes on with the same image.
        let image = match cause {
            OwnershipCause::Rekey => known.ownership.image,
            OwnershipCause::Created
            | OwnershipCause::Start
            | OwnershipCause::Release
            | OwnershipCause::Cutover
            | OwnershipCause::NodeLost
            | OwnershipCause::NodeRebooted => token,
        };
        known.ownership = Ownership {
            owner,
            token,
            since: entry.index,
            cause,
            settle,
            activated: false,
            image,
        };
        Ok(())
    }

    pub(super) fn disks_made(&mut self, vm: VmId, token: Token) -> Applied {
        let known = self.vm_mut(vm)?;
        if known.ownership.token != token {
            return Err(stale(known, format!("token {token}")));
        }
        known.disks_made = true;
        known.images.clear();
        Ok(Outcome::Nothing)
    }

    pub(super) fn activated(
        &mut self,
        entry: &mut Entry<'_>,
        vm: VmId,
        node: NodeId,
        token: Token,
    ) -> Applied {
        self.check_owner(vm, node, token)?;
        let node_name = self.node_label(node);
        let known = self.vm_mut(vm)?;
        if known.ownership.activated {
            return Ok(Outcome::Nothing);
        }
        known.ownership.activated = true;
        known.ownership.settle = false;
        known.failed_on.clear();
        let cause = known.ownership.cause;
        let name = known.name.clone();
        self.note(
            entry,
            Severity::Info,
            vec![Object::Vm(vm), Object::Node(node)],
            "vm.running",
            format!(
                "{name} runs on {node_name} under {token} ({})",
                cause_words(cause)
            ),
            None,
        );
        Ok(Outcome::Nothing)
    }

    /// Refuses whoever is not the owner under the present token.
    pub(super) fn check_owner(
        &self,
        vm: VmId,
        node: NodeId,
        token: Token,
    ) -> Result<(), Rejection> {
        let known = self.vm(vm)?;
        if known.ownership.owner == Some(node) && known.ownership.token == token {
            Ok(())
        } else {
            Err(stale(known, format!("{node} under {token}")))
        }
    }

    pub(super) fn release(
        &mut self,
        entry: &mut Entry<'_>,
        vm: VmId,
        node: NodeId,
        expects: Token,
        reason: &ReleaseReason,
    ) -> Applied {
        self.check_owner(vm, node, expects)?;
        self.tokens_left(1)?;
        if let Some(migration) = self.open_migration(vm).map(|migration| migration.id) {
            self.end_migration_aborted(entry, migration, "the machine stopped on its source");
        }
        let crashes_max = usize::from(self.settings.crashes_max);
        let at_ms = entry.at_ms;
        let node_name = self.node_label(node);
        let known = self.vm_mut(vm)?;
        let name = known.name.clone();
        // A clean stop leaves nothing behind; everything else may have left writes inside the server.
        // What an earlier owner may have left is not cleared by an owner that never ran.
        let mut settle = known.ownership.settle;
        let (severity, kind, detail) = match reason {
            ReleaseReason::Stopped => {
                settle &= !known.ownership.activated;
                // Asked to run again meanwhile, it does not show any more how it was stopped (seed 20,759).
                let forced = known.stop_forced || known.desired == Desired::Running;
                settle |= forced && known.ownership.activated;
                (
                    Severity::Info,
                    "vm.stopped",
                    format!("{name} stopped on {node_name}"),
                )
            }
            ReleaseReason::GuestShutDown => {
                settle = false;
                known.desired = Desired::Stopped;
                (
                    Severity::Info,
                    "vm.shut-down",
                    format!("{name} shut itself down on {node_name}"),
                )
            }
            ReleaseReason::MonitorEnded(how) => {
                settle = true;
                (
                    Severity::Error,
                    "vm.crashed",
                    format!("the monitor of {name} on {node_name} ended: {how}"),
                )
            }
            ReleaseReason::StartFailed(how) => {
                settle = true;
                known.failed_on.insert(node);
                (
                    Severity::Error,
                    "vm.start-failed",
                    format!("{name} could not start on {node_name}: {how}"),
                )
            }
        };
        let crashed = matches!(
            reason,
            ReleaseReason::MonitorEnded(_) | ReleaseReason::StartFailed(_)
        );
        let mut held = None;
        if crashed {
            known.crashes.push(at_ms);
            let surplus = known.crashes.len().saturating_sub(CRASHES_KEPT);
            known.crashes.drain(..surplus);
            let recent = known
                .crashes
                .iter()
                .filter(|&&crash| at_ms.saturating_sub(crash) < CRASH_WINDOW_MS)
                .count();
            if recent >= crashes_max {
                let reason = format!("it ended {recent} times within ten minutes; last: {detail}");
                let reason = super::clip(reason, super::DETAIL_BYTES_MAX);
                known.held = Some(reason.clone());
                held = Some(reason);
            }
        }
        self.change_owner(entry, vm, None, OwnershipCause::Release, settle)?;
        self.note(
            entry,
            severity,
            vec![Object::Vm(vm), Object::Node(node)],
            kind,
            detail,
            None,
        );
        if let Some(reason) = held {
            self.note(
                entry,
                Severity::Error,
                vec![Object::Vm(vm)],
                "vm.held",
                format!("{name} is not started again: {reason}; try: clusterctl vm start {name}"),
                None,
            );
        }
        Ok(Outcome::Nothing)
    }

    pub(super) fn rekey(
        &mut self,
        entry: &mut Entry<'_>,
        vm: VmId,
        node: NodeId,
        expects: Token,
        settle: bool,
        reason: &str,
    ) -> Applied {
        self.check_owner(vm, node, expects)?;
        self.tokens_left(2)?;
        let settle = settle || self.vm(vm)?.ownership.settle;
        let token = self.change_owner(entry, vm, Some(node), OwnershipCause::Rekey, settle)?;
        // A migration under way was promised a token below the one just taken: it gets a new one, so
        // that tokens never fall.
        if let Some(migration) = self.active_migration(vm).map(|migration| migration.id) {
            let fresh = self.take_token()?;
            if let Some(migration) = self.migrations.get_mut(&migration)
                && let MigrationState::Active {
                    expects,
                    reserved,
                    reserved_at,
                    ..
                } = &mut migration.state
            {
                *expects = token;
                *reserved = fresh;
                *reserved_at = entry.index;
            }
        }
        let detail = format!(
            "{} takes {token} on {}: {reason}",
            self.vm_label(vm),
            self.node_label(node)
        );
        self.note(
            entry,
            Severity::Warn,
            vec![Object::Vm(vm), Object::Node(node)],
            "lease.rekeyed",
            detail,
            None,
        );
        Ok(Outcome::Token(token))
    }
}

fn cause_words(cause: OwnershipCause) -> &'static str {
    match cause {
        OwnershipCause::Created => "created",
        OwnershipCause::Start => "started",
        OwnershipCause::Release => "released",
        OwnershipCause::Cutover => "live migration",
        OwnershipCause::Rekey => "re-keyed",
        OwnershipCause::NodeLost => "its node was lost",
        OwnershipCause::NodeRebooted => "its node rebooted",
    }
}

fn stale(vm: &Vm, expected: String) -> Rejection {
    Rejection::Stale {
        vm: vm.id,
        owner: vm.ownership.owner,
        token: vm.ownership.token,
        expected,
    }
}

/// A name that stays inside its volume on every file system, and hides from nobody.
fn bad(field: &str, problem: impl Into<String>) -> Result<(), Rejection> {
    Err(Rejection::BadSpec {
        field: field.to_owned(),
        problem: problem.into(),
    })
}

/// What the cluster is to do with a machine, whatever hardware it has.
fn check_policy(spec: &VmSpec) -> Result<(), Rejection> {
    if spec.priority > 1_000 {
        return bad("priority", format!("{}; use 0 to 1000", spec.priority));
    }
    if spec
        .downtime_max_ms
        .is_some_and(|ms| ms == 0 || ms > 60_000)
    {
        return bad("downtime_max_ms", "use 1 to 60000");
    }
    if spec.tags.len() > TAGS_MAX {
        return bad(
            "tags",
            format!("{}; use at most {TAGS_MAX}", spec.tags.len()),
        );
    }
    if spec.witness.as_ref().is_some_and(|path| !path_fits(path)) {
        return bad("witness", "use an absolute path");
    }
    Ok(())
}

fn check_nic(number: usize, nic: &NicSpec) -> Result<(), Rejection> {
    /// An interface's name, without its closing zero.
    const NAME_BYTES_MAX: usize = 15;
    let field = format!("nics[{number}]");
    if limits::parse_mac(&nic.mac).is_none() {
        return bad(
            &field,
            format!(
                "`{}` is not a unicast MAC address like 52:54:00:12:34:56",
                nic.mac
            ),
        );
    }
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if nic.bridge.is_empty() || nic.bridge.len() > NAME_BYTES_MAX || !nic.bridge.bytes().all(plain)
    {
        return bad(
            &field,
            format!("`{}` is not the name of a bridge", nic.bridge),
        );
    }
    Ok(())
}

fn path_fits(path: &str) -> bool {
    path.starts_with('/') && path.len() <= limits::PATH_BYTES_MAX
}

fn file_name_is_plain(path: &str) -> bool {
    !path.is_empty()
        && path.len() <= 128
        && !path.starts_with('.')
        && path
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b))
}
