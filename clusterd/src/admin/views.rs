//! What the API shows: the log's records joined with the nodes' soft state. Pure.

use cluster_model::{
    ClusterState, Desired, Duty, Event, Liveness, Migration, MigrationCause, MigrationId,
    MigrationState, Name, Node, NodeId, Object, OwnershipCause, Severity, Vm, VmId, Volume,
};
use proto::admin::{
    EventView, GuestView, LeaseView, MigrationView, NodeView, Part, RoundView, VmView, VolumeView,
};
use proto::monitor::{MigrationStage, MonitorStatus, Phase};

use tonic::Status;

use super::error::{invalid, not_found};
use super::soft::{Soft, SoftNode};

/// A node as `node list` shows it.
pub fn node(state: &ClusterState, soft: &Soft, leader: Option<NodeId>, node: &Node) -> NodeView {
    let known = soft.nodes.get(&node.id);
    let migrations = |out: bool| {
        let count = state
            .migrations
            .values()
            .filter(|migration| migration.is_active())
            .filter(|migration| {
                if out {
                    migration.from == node.id
                } else {
                    migration.to == node.id
                }
            })
            .count();
        u32::try_from(count).unwrap_or(u32::MAX)
    };
    let vcpus: u32 = state.owned_by(node.id).map(|vm| vm.spec.vcpus).sum();
    let isolated = known.is_some_and(|known| known.isolated);
    NodeView {
        id: node.id.0,
        name: node.name.to_string(),
        address: node.address.clone(),
        role: node.role.as_str().into(),
        state: node_state(node, isolated).into(),
        leader: leader == Some(node.id),
        vms: u32::try_from(state.owned_by(node.id).count()).unwrap_or(u32::MAX),
        cpus: node.facts.cpus,
        vcpus_committed: vcpus,
        memory_mib: node.facts.memory_mib,
        memory_committed_mib: state.memory_committed_mib(node.id),
        migrations_in: migrations(false),
        migrations_out: migrations(true),
        lease_slack_ms: known.and_then(|known| known.lease_slack_ms).unwrap_or(-1),
        version: node.facts.version.clone(),
        cpu_model: node.facts.cpu_model.clone(),
        cpu_vendor: node.facts.cpu_vendor.clone(),
        incarnation: node.incarnation.0,
        cpu_load: known.map_or(0.0, |known| known.cpu_load),
        note: note(soft, known, node),
    }
}

/// What is to be said of a node besides: an absence, and that nothing is known of it beyond the log.
fn note(soft: &Soft, known: Option<&SoftNode>, node: &Node) -> String {
    let absent = node
        .absence
        .map(|absence| format!("announced to be away for up to {} ms", absence.duration_ms));
    let unknown = match (known, &soft.unknown) {
        (None, Some(why)) => Some(format!("what it reports is not known: {why}")),
        _ => None,
    };
    let parts: Vec<String> = [absent, unknown].into_iter().flatten().collect();
    parts.join("; ")
}

/// A node's state in one word.
pub fn node_state(node: &Node, isolated: bool) -> &'static str {
    match (node.liveness, node.duty) {
        (Liveness::Joining, _) => "joining",
        (Liveness::Lost, _) => "lost",
        (Liveness::Quarantined, _) => "quarantined",
        (Liveness::Up, _) if isolated => "isolated",
        (Liveness::Up, Duty::Draining) => "draining",
        (Liveness::Up, Duty::Drained) => "drained",
        (Liveness::Up, Duty::Active) => "up",
    }
}

/// A machine as `vm list` and `vm show` show it.
pub fn vm(state: &ClusterState, soft: &Soft, vm: &Vm) -> VmView {
    let owner = vm.ownership.owner;
    let monitor = owner
        .and_then(|owner| soft.monitor(owner, vm.id))
        .filter(|monitor| monitor.token == vm.ownership.token.0);
    let guest = monitor
        .and_then(|monitor| monitor.guest.as_ref())
        .filter(|guest| guest.present);
    VmView {
        id: vm.id.0,
        name: vm.name.to_string(),
        state: vm_state(state, vm, monitor).into(),
        node: owner
            .map(|owner| state.node_label(owner))
            .unwrap_or_default(),
        vcpus: vm.spec.vcpus,
        memory_mib: vm.spec.memory_mib,
        token: vm.ownership.token.0,
        since_index: vm.ownership.since.0,
        cause: ownership_cause(vm.ownership.cause).into(),
        desired: match vm.desired {
            Desired::Running => "running",
            Desired::Stopped => "stopped",
        }
        .into(),
        held: vm.held.clone().unwrap_or_default(),
        disks: leases(state, soft, vm),
        priority: u32::from(vm.spec.priority),
        failover: vm.spec.failover,
        migration: state
            .open_migration(vm.id)
            .map(|open| migration(state, soft, open)),
        guest: guest.map(|guest| GuestView {
            steps: guest.steps,
            flushed: guest.flushed,
            found_at_boot: guest.found_at_boot,
            memory_checks: guest.memory_checks,
            disk_checks: guest.disk_checks,
            errors: guest.errors,
            error: guest.error.clone(),
            longest_gap_us: guest.longest_gap_ns / 1_000,
        }),
        spec_json: serde_json::to_string(&vm.spec).unwrap_or_default(),
        monitor_pid: monitor.map_or(0, |monitor| monitor.pid),
        cpu_load: 0.0,
    }
}

/// A machine's state in one word: what should be, what the log says, what its monitor says.
fn vm_state(state: &ClusterState, vm: &Vm, monitor: Option<&MonitorStatus>) -> &'static str {
    let Some(owner) = vm.ownership.owner else {
        return match (vm.desired, &vm.held, vm.ownership.cause) {
            (Desired::Stopped, _, _) => "stopped",
            (_, Some(_), _) => "held",
            (_, _, OwnershipCause::NodeLost | OwnershipCause::NodeRebooted) => "lost",
            _ => "waiting",
        };
    };
    if vm.desired == Desired::Stopped {
        return "stopping";
    }
    let alive = state
        .nodes
        .get(&owner)
        .is_some_and(|node| node.liveness == Liveness::Up);
    match monitor.map(MonitorStatus::phase) {
        Some(Phase::Frozen) => "frozen",
        Some(Phase::Refused) => "refused",
        Some(Phase::Failed) => "failed",
        _ if !vm.ownership.activated => "starting",
        Some(Phase::Running) if state.active_migration(vm.id).is_some() => "migrating",
        Some(Phase::Quiet) => "migrating",
        // No report of it here (away from the leader): the log says that it runs.
        Some(Phase::Running) | None if alive => "running",
        Some(Phase::Stopped) => "stopping",
        _ => "starting",
    }
}

/// Why an owner is the owner, in words.
pub fn ownership_cause(cause: OwnershipCause) -> &'static str {
    match cause {
        OwnershipCause::Created => "created",
        OwnershipCause::Start => "start",
        OwnershipCause::Release => "released",
        OwnershipCause::Cutover => "live migration",
        OwnershipCause::Rekey => "re-key",
        OwnershipCause::NodeLost => "its node was lost",
        OwnershipCause::NodeRebooted => "its node rebooted",
    }
}

/// A machine's leases.
pub fn leases(state: &ClusterState, soft: &Soft, vm: &Vm) -> Vec<LeaseView> {
    let owner = vm.ownership.owner;
    let left = owner
        .and_then(|owner| soft.nodes.get(&owner))
        .and_then(|node| node.lease_left_ms);
    vm.spec
        .disks
        .iter()
        .map(|disk| LeaseView {
            vm: vm.name.to_string(),
            holder: owner
                .map(|owner| state.node_label(owner))
                .unwrap_or_default(),
            token: vm.ownership.token.0,
            state: match (owner, left) {
                (None, _) => "unowned",
                (Some(_), Some(..=0)) => "frozen",
                (Some(_), _) => "held",
            }
            .into(),
            expires_in_ms: left.map_or(-1, |left| left.max(0)),
            volume: disk.volume.to_string(),
            path: disk.path.clone(),
            size_bytes: disk.size_bytes,
        })
        .collect()
}

/// A volume; what only a probe knows is added by the caller.
pub fn volume(state: &ClusterState, volume: &Volume) -> VolumeView {
    let leases = state
        .vms
        .values()
        .filter(|vm| vm.ownership.owner.is_some())
        .flat_map(|vm| &vm.spec.disks)
        .filter(|disk| disk.volume == volume.name)
        .count();
    VolumeView {
        id: volume.id.0,
        name: volume.name.to_string(),
        url: volume.url.clone(),
        fence_class: volume.fence.as_str().into(),
        settle_ms: volume.settle_ms(&state.settings),
        state: String::new(),
        size_bytes: volume.size_bytes,
        free_bytes: 0,
        leases: u32::try_from(leases).unwrap_or(u32::MAX),
        nodes: volume
            .nodes
            .iter()
            .map(|&node| state.node_label(node))
            .collect(),
        report: String::new(),
        uuid: volume.uuid.clone(),
        tls: volume.tls_ca.is_some(),
    }
}

/// A migration: its record, the source's progress while it runs, the summary once it ended.
pub fn migration(state: &ClusterState, soft: &Soft, migration: &Migration) -> MigrationView {
    let progress = soft
        .monitor(migration.from, migration.vm)
        .and_then(|monitor| monitor.migration.as_ref())
        .filter(|progress| progress.migration_id == migration.id.0);
    let mut view = MigrationView {
        id: migration.id.to_string(),
        vm: state.vm_label(migration.vm),
        from: state.node_label(migration.from),
        to: state.node_label(migration.to),
        cause: match migration.cause {
            MigrationCause::Asked => "by hand".to_owned(),
            MigrationCause::Drain(node) => format!("drain of {}", state.node_label(node)),
            MigrationCause::Balance => "balance".to_owned(),
            MigrationCause::Failback(node) => format!("fail-back to {}", state.node_label(node)),
        },
        actor: migration.actor.clone(),
        queued_at_ms: migration.queued_at_ms,
        started_at_ms: migration.started_at_ms,
        ended_at_ms: migration.ended_at_ms,
        cancellable: migration.is_open(),
        ..MigrationView::default()
    };
    match &migration.state {
        MigrationState::Queued => {
            view.state = "queued".into();
        }
        MigrationState::Active {
            expects, reserved, ..
        } => {
            view.state = "active".into();
            view.token_before = expects.0;
            view.token_after = reserved.0;
            view.stage = progress
                .map_or("setup", |progress| stage_words(progress.stage()))
                .into();
        }
        MigrationState::CutOver { at, expects, token } => {
            view.state = "cut-over".into();
            view.token_before = expects.0;
            view.stage = "done".into();
            view.token_after = token.0;
            view.cutover_index = at.0;
        }
        MigrationState::Aborted { reason, .. } => {
            view.state = "aborted".into();
            view.reason = reason.clone();
        }
    }
    if let Some(progress) = progress {
        view.round = progress.round;
        view.memory_total_bytes = progress.memory_total_bytes;
        view.remaining_bytes = progress.remaining_bytes;
        view.sent_bytes = progress.sent_bytes;
        view.rate_bytes_s = progress.rate_bytes_s;
        view.dirty_bytes_s = progress.dirty_bytes_s;
        view.predicted_blackout_us = progress.predicted_blackout_us;
        view.rounds = progress
            .rounds
            .iter()
            .map(|round| RoundView {
                number: round.number,
                pages: round.pages,
                zero_pages: round.zero_pages,
                bytes: round.bytes,
                duration_us: round.duration_us,
                dirty_pages_after: round.dirty_pages_after,
            })
            .collect();
    }
    if let Some(summary) = &migration.summary {
        fill_from_summary(&mut view, summary);
    }
    view
}

/// Fills what the destination reported after resume: see `agent::summary` for the writer.
fn fill_from_summary(view: &mut MigrationView, summary: &serde_json::Value) {
    let number = |name: &str| summary.get(name).and_then(serde_json::Value::as_u64);
    view.total_us = number("total_us").unwrap_or(0);
    view.blackout_us = number("blackout_us").unwrap_or(0);
    view.sent_bytes = number("sent_bytes").unwrap_or(view.sent_bytes);
    view.memory_total_bytes = number("memory_total_bytes").unwrap_or(view.memory_total_bytes);
    if let Some(parts) = summary.get("parts").and_then(serde_json::Value::as_array) {
        view.parts = parts
            .iter()
            .filter_map(|part| {
                Some(Part {
                    name: part.get("name")?.as_str()?.to_owned(),
                    us: part.get("us")?.as_u64()?,
                })
            })
            .collect();
    }
    if let Some(rounds) = summary.get("rounds").cloned()
        && let Ok(rounds) = serde_json::from_value::<Vec<RoundView>>(rounds)
    {
        view.rounds = rounds;
    }
    view.summary_json = summary.to_string();
}

fn stage_words(stage: MigrationStage) -> &'static str {
    match stage {
        MigrationStage::Unspecified | MigrationStage::Setup => "setup",
        MigrationStage::MemoryCopy => "memory copy",
        MigrationStage::ModifiedPages => "modified pages",
        MigrationStage::StorageHandover => "storage handover",
        MigrationStage::Resume => "resume",
        MigrationStage::NetworkCleanup => "network cleanup",
        MigrationStage::Failed => "failed",
    }
}

/// An event with its objects under the names that people use.
pub fn event(state: &ClusterState, event: &Event) -> EventView {
    let why = event.why.as_ref();
    EventView {
        index: event.index.0,
        sequence: event.sequence,
        at_ms: event.at_ms,
        severity: severity(event.severity).into(),
        objects: event
            .objects
            .iter()
            .map(|&object| object_label(state, object))
            .collect(),
        kind: event.kind.clone(),
        detail: event.detail.clone(),
        actor: event.actor.clone(),
        rule: why.map(|why| why.rule.clone()).unwrap_or_default(),
        inputs: why
            .map(|why| why.inputs.clone().into_iter().collect())
            .unwrap_or_default(),
    }
}

/// A severity's name.
pub fn severity(severity: Severity) -> &'static str {
    match severity {
        Severity::Info => "info",
        Severity::Warn => "warn",
        Severity::Error => "error",
    }
}

/// An object as people write it: `vm/db-1`.
pub fn object_label(state: &ClusterState, object: Object) -> String {
    match object {
        Object::Cluster => "cluster".into(),
        Object::Node(node) => format!("node/{}", state.node_label(node)),
        Object::Vm(vm) => format!("vm/{}", state.vm_label(vm)),
        Object::Volume(volume) => {
            let name = state
                .volumes
                .get(&volume)
                .map(|volume| volume.name.to_string());
            format!("volume/{}", name.unwrap_or_else(|| volume.to_string()))
        }
        Object::Migration(migration) => format!("migration/{migration}"),
    }
}

/// The object that a person means by `vm/db-1`, `node/n1`, `volume/vol-a`, `migration/m-12`, `cluster`, or a
/// bare name: a machine's, else a node's, a migration's, a volume's.
///
/// # Errors
/// There is none; says what was probably meant.
pub fn parse_object(state: &ClusterState, text: &str) -> Result<Object, Status> {
    if text == "cluster" {
        return Ok(Object::Cluster);
    }
    let node = |text: &str| {
        let name = Name::new(text).ok()?;
        state.node_named(&name).map(|node| Object::Node(node.id))
    };
    let volume = |text: &str| {
        let name = Name::new(text).ok()?;
        state
            .volume_named(&name)
            .map(|volume| Object::Volume(volume.id))
    };
    let vm = |text: &str| vm_named(state, text).map(|vm| Object::Vm(vm.id));
    let migration =
        |text: &str| parse_migration(state, text).map(|migration| Object::Migration(migration.id));
    let Some((kind, name)) = text.split_once('/') else {
        return vm(text)
            .or_else(|| node(text))
            .or_else(|| migration(text))
            .or_else(|| volume(text))
            .ok_or_else(|| not_found(state, "vm", text));
    };
    let found = match kind {
        "vm" => vm(name),
        "node" => node(name),
        "volume" => volume(name),
        "migration" => migration(name),
        other => {
            return Err(invalid(format!(
                "`{other}` is no kind of object; use vm, node, volume, migration or cluster"
            )));
        }
    };
    found.ok_or_else(|| not_found(state, kind, name))
}

/// The machine of that name, or numbered `vm-12`.
pub fn vm_named<'s>(state: &'s ClusterState, text: &str) -> Option<&'s Vm> {
    let by_name = Name::new(text).ok().and_then(|name| state.vm_named(&name));
    by_name.or_else(|| {
        state
            .vms
            .get(&VmId(text.strip_prefix("vm-")?.parse().ok()?))
    })
}

/// The migration with that id, `m-12` or `12`.
pub fn parse_migration<'s>(state: &'s ClusterState, text: &str) -> Option<&'s Migration> {
    let digits = text.strip_prefix("m-").unwrap_or(text);
    state.migrations.get(&MigrationId(digits.parse().ok()?))
}
