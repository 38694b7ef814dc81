//! Machines: create, run, stop, forget, move, talk to.

use std::collections::BTreeMap;

use cluster_model::{
    Boot, Command, Desired, MigrationCause, MigrationOptions, NodeId, Outcome, VmId, VmSpec, Why,
};
use proto::admin::{
    Check, Done, VmConsoleInput, VmConsoleOutput, VmCreateRequest, VmDeleteRequest, VmListReply,
    VmListRequest, VmMigrateReply, VmMigrateRequest, VmReply, VmStartRequest, VmStopRequest,
};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::asker::Asker;
use super::error::{invalid, rejected, status};
use super::predict::Basis;
use super::service::{AdminService, Answers, Asked, asked, name, node_named, vm_named};
use super::views;

/// The largest machine spec accepted, bytes of JSON.
const SPEC_BYTES_MAX: usize = 64 * 1024;
/// Typed input that waits for a console at most.
const CONSOLE_QUEUE: usize = 256;

impl AdminService {
    pub(super) async fn vm_create(
        &self,
        asker: &Asker,
        request: VmCreateRequest,
    ) -> Result<VmReply, Status> {
        let change = asked(asker, request.change)?;
        let vm_name = name(&request.name)?;
        self.cluster_state()?;
        if request.spec_json.len() > SPEC_BYTES_MAX {
            return Err(invalid(format!(
                "the machine's spec is over {SPEC_BYTES_MAX} bytes"
            )));
        }
        let spec: VmSpec = serde_json::from_str(&request.spec_json)
            .map_err(|error| invalid(format!("the machine's spec is malformed: {error}")))?;
        let kernels = match &spec.boot {
            Boot::SelfCheck { .. } => Vec::new(),
            Boot::Linux { kernel, initrd, .. } => [Some(kernel), initrd.as_ref()]
                .into_iter()
                .flatten()
                .collect(),
        };
        let files = kernels
            .into_iter()
            .map(String::as_str)
            .chain(request.images.values().map(String::as_str));
        asker.may_create(&spec, files)?;
        self.fits_some_node(&spec)?;
        let mut images = BTreeMap::new();
        for (number, path) in request.images {
            let number =
                usize::try_from(number).map_err(|_| invalid("image numbers are disk numbers"))?;
            if !std::path::Path::new(&path).is_file() {
                return Err(status(
                    Code::NotFound,
                    "E-IMAGE",
                    format!(
                        "disk {number}: there is no image {path} on this node ({}); give the path of a raw image that every node has",
                        self.backend.name()
                    ),
                ));
            }
            images.insert(number, path);
        }
        let desired = if request.start {
            Desired::Running
        } else {
            Desired::Stopped
        };
        let command = Command::CreateVm {
            name: vm_name,
            spec,
            images,
            desired,
        };
        let (_, outcome) = self.propose(&change, command).await?;
        match outcome {
            Outcome::Vm(id) => self.vm_reply(id).await,
            other => Err(status(
                Code::Internal,
                "E-INTERNAL",
                format!("creating a machine gave {other:?}"),
            )),
        }
    }

    /// Refuses a machine that is larger than every node: it could never run. One that only waits for room
    /// is let in.
    fn fits_some_node(&self, spec: &VmSpec) -> Result<(), Status> {
        let state = self.cluster_state()?;
        let largest = state
            .nodes
            .values()
            .filter(|node| node.role != cluster_model::NodeRole::Witness)
            .max_by_key(|node| node.facts.memory_mib);
        match largest {
            Some(node) if node.facts.memory_mib < spec.memory_mib => Err(status(
                Code::ResourceExhausted,
                "E-ROOM",
                format!(
                    "{} MiB of memory fit on no node: the largest, {}, offers {} MiB; give it less, or add a node: clusterctl node add",
                    spec.memory_mib, node.name, node.facts.memory_mib
                ),
            )),
            _ => Ok(()),
        }
    }

    async fn vm_reply(&self, id: VmId) -> Result<VmReply, Status> {
        let soft = self.backend.soft().await;
        let state = self.state();
        Ok(VmReply {
            vm: state.vms.get(&id).map(|vm| views::vm(&state, &soft, vm)),
        })
    }

    pub(super) async fn vm_list(
        &self,
        asker: &Asker,
        request: VmListRequest,
    ) -> Result<VmListReply, Status> {
        let state = self.cluster_state()?;
        let soft = self.backend.soft().await;
        let vms = match request.name.as_str() {
            "" => state
                .vms
                .values()
                .filter(|vm| asker.sees(vm))
                .map(|vm| views::vm(&state, &soft, vm))
                .collect(),
            text => vec![views::vm(&state, &soft, vm_named(asker, &state, text)?)],
        };
        Ok(VmListReply { vms })
    }

    pub(super) async fn vm_start(
        &self,
        asker: &Asker,
        request: VmStartRequest,
    ) -> Result<VmReply, Status> {
        let change = asked(asker, request.change)?;
        self.desire(change, &request.name, Desired::Running, false)
            .await
    }

    pub(super) async fn vm_stop(
        &self,
        asker: &Asker,
        request: VmStopRequest,
    ) -> Result<VmReply, Status> {
        // The monitor stops the processors, then drains and flushes the disks; forced, it does not wait
        // for them: the way out where the storage does not answer.
        let change = asked(asker, request.change)?;
        self.desire(change, &request.name, Desired::Stopped, request.force)
            .await
    }

    async fn desire(
        &self,
        change: Asked<'_>,
        text: &str,
        desired: Desired,
        forced: bool,
    ) -> Result<VmReply, Status> {
        let vm = vm_named(change.asker, &*self.cluster_state()?, text)?.id;
        let command = Command::SetDesired {
            vm,
            desired,
            forced,
        };
        self.propose(&change, command).await?;
        self.vm_reply(vm).await
    }

    pub(super) async fn vm_delete(
        &self,
        asker: &Asker,
        request: VmDeleteRequest,
    ) -> Result<Done, Status> {
        let change = asked(asker, request.change)?;
        let state = self.cluster_state()?;
        let vm = vm_named(asker, &state, &request.name)?.clone();
        if vm.desired == Desired::Running || vm.ownership.owner.is_some() {
            return Err(status(
                Code::FailedPrecondition,
                "E-RUNNING",
                format!(
                    "{} is not stopped; stop it first: clusterctl vm stop {}",
                    vm.name, vm.name
                ),
            ));
        }
        // The record first: files without a record can be found and removed, a record without files
        // could be started.
        let (index, _) = self
            .propose(&change, Command::DeleteVm { vm: vm.id })
            .await?;
        if !request.keep_disks {
            let broker = self.backend.broker()?;
            if let Err(error) = broker.delete_disks(&state, &vm).await {
                return Err(status(
                    Code::FailedPrecondition,
                    "E-DISK",
                    format!(
                        "{} is forgotten, but its disks are still there: {error}",
                        vm.name
                    ),
                ));
            }
        }
        Ok(Done { log_index: index.0 })
    }

    pub(super) async fn vm_migrate(
        &self,
        asker: &Asker,
        request: VmMigrateRequest,
    ) -> Result<VmMigrateReply, Status> {
        let change = asked(asker, request.change.clone())?;
        let state = self.cluster_state()?;
        let vm = vm_named(asker, &state, &request.name)?.clone();
        let from = vm
            .ownership
            .owner
            .ok_or_else(|| rejected(&state, &cluster_model::Rejection::NotRunning { vm: vm.id }))?;
        let (to, why) = match request.to.as_str() {
            "" => self.best_destination(&state, &vm, from).await?,
            text => (node_named(&state, text)?.id, Why::rule("asked for by name")),
        };
        let preflight = state.may_migrate(vm.id, from, to);
        let open = state.open_migration(vm.id).map(|migration| {
            cluster_model::Rejection::AlreadyMigrating {
                vm: vm.id,
                migration: migration.id,
            }
        });
        let options = MigrationOptions {
            channels: request.channels.min(16),
            bandwidth_max_bytes_s: request.bandwidth_max_bytes_s,
            downtime_max_ms: request.downtime_max_ms.min(60_000),
        };
        let basis = Basis::of(&state, Some(vm.id)).capped(options.bandwidth_max_bytes_s);
        let mut reply = VmMigrateReply {
            migration: None,
            checks: checks(&state, preflight.as_ref().err().or(open.as_ref())),
            predicted_ms: basis.predicted_ms(vm.spec.memory_mib),
            predicted_blackout_ms: u64::from(
                options.in_force(&vm, &state.settings).downtime_max_ms,
            ),
            predicted_from: basis.words(),
        };
        if request.dry_run {
            return Ok(reply);
        }
        preflight.map_err(|rejection| rejected(&state, &rejection))?;
        let command = Command::QueueMigration {
            vm: vm.id,
            to,
            options,
            cause: MigrationCause::Asked,
            why,
        };
        let (_, outcome) = self.propose(&change, command).await?;
        if let Outcome::Migration(id) = outcome {
            reply.migration = self.migration_view(id).await;
        }
        Ok(reply)
    }

    pub(super) async fn vm_console(
        &self,
        asker: &Asker,
        mut input: Streaming<VmConsoleInput>,
    ) -> Result<Answers<VmConsoleOutput>, Status> {
        let first = input
            .message()
            .await?
            .ok_or_else(|| invalid("the console's first message names the machine"))?;
        let state = self.cluster_state()?;
        let vm = vm_named(asker, &state, &first.name)?;
        if vm.ownership.owner.is_none() {
            return Err(rejected(
                &state,
                &cluster_model::Rejection::NotRunning { vm: vm.id },
            ));
        }
        let (typed, queue) = mpsc::channel(CONSOLE_QUEUE);
        let output = self.backend.console(asker, vm.id, queue).await?;
        tokio::spawn(async move {
            if !first.data.is_empty() && typed.send(first.data).await.is_err() {
                return;
            }
            while let Ok(Some(message)) = input.message().await {
                if typed.send(message.data).await.is_err() {
                    return;
                }
            }
        });
        let output =
            ReceiverStream::new(output).map(|chunk| chunk.map(|data| VmConsoleOutput { data }));
        Ok(Box::pin(output))
    }

    /// The node that the planner would choose, and why.
    async fn best_destination(
        &self,
        state: &cluster_model::ClusterState,
        vm: &cluster_model::Vm,
        from: NodeId,
    ) -> Result<(NodeId, Why), Status> {
        let observed = self.backend.observed().await?;
        super::nodes::choose(state, vm, from, &observed).map_err(|reasons| {
            status(
                Code::FailedPrecondition,
                "E-NOPLACE",
                format!("{} can go nowhere else: {reasons}", vm.name),
            )
        })
    }
}

/// Preflight's checks, in their order; those after the first failure were not reached.
fn checks(
    state: &cluster_model::ClusterState,
    failed: Option<&cluster_model::Rejection>,
) -> Vec<Check> {
    use cluster_model::Rejection as R;
    const NAMES: [&str; 8] = [
        "running",
        "not migrating",
        "destination",
        "cpu maker",
        "version",
        "volumes",
        "rules",
        "room",
    ];
    let position = failed.map(|rejection| match rejection {
        R::NotRunning { .. } | R::NotDesired { .. } | R::Held { .. } => 0,
        R::AlreadyMigrating { .. } => 1,
        R::CpuDiffers { .. } => 3,
        R::VersionsDiffer { .. } => 4,
        R::VolumeUnreachable { .. } => 5,
        R::RuleForbids { .. } => 6,
        R::NoRoom { .. } => 7,
        _ => 2,
    });
    NAMES
        .iter()
        .enumerate()
        .take_while(|(number, _)| position.is_none_or(|position| *number <= position))
        .map(|(number, name)| Check {
            name: (*name).to_owned(),
            passed: position != Some(number),
            detail: if position == Some(number) {
                failed
                    .map(|rejection| rejection.in_words(state))
                    .unwrap_or_default()
            } else {
                String::new()
            },
        })
        .collect()
}
