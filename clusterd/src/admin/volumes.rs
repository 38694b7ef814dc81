//! Volumes and leases.

use cluster_model::{Command, FenceClass, Outcome};
use proto::admin::{
    Done, LeaseListReply, LeaseListRequest, VolumeAddRequest, VolumeListReply, VolumeListRequest,
    VolumeRemoveRequest, VolumeView,
};
use proto::broker::{AdoptVolumeRequest, ProbeVolumeRequest, VolumeProbe};
use tonic::{Code, Status};

use super::asker::Asker;
use super::error::{invalid, status};
use super::service::{AdminService, asked, name, node_named, vm_named, volume_named};
use super::views;
use super::volume_security::Security;

impl AdminService {
    /// Probes, adopts and certifies a volume, then records it.
    pub(super) async fn volume_add(
        &self,
        asker: &Asker,
        request: VolumeAddRequest,
    ) -> Result<VolumeView, Status> {
        let change = asked(asker, request.change)?;
        let volume_name = name(&request.name)?;
        let state = self.cluster_state()?;
        let cluster = state
            .cluster
            .clone()
            .ok_or(super::BackendError::NoCluster)?;
        let mut nodes = std::collections::BTreeSet::new();
        for node in &request.nodes {
            nodes.insert(node_named(&state, node)?.id);
        }
        if let Some(known) = state.volume_named(&volume_name) {
            return Err(status(
                Code::AlreadyExists,
                "E-EXISTS",
                format!(
                    "there is a volume named `{volume_name}` already ({}); choose another name",
                    known.url
                ),
            ));
        }
        let security = Security::settle(request.url, &request.tls_ca)
            .map_err(|error| invalid(error.to_string()))?;
        if request.mount_in_clear && security.authority.is_none() {
            return Err(invalid(
                "mount-in-clear goes with TLS (`--tls-ca`): without it everything is in clear",
            ));
        }
        let tls_ca = security.authority.clone().unwrap_or_default();
        let broker = self.backend.broker()?;
        let probe = broker
            .probe_volume(ProbeVolumeRequest {
                url: security.url.clone(),
                cluster_id: cluster.id.clone(),
                broker_uid: cluster.broker_uid,
                tls_ca: tls_ca.clone(),
                ask_tls: security.asks(),
                root_in_clear: request.mount_in_clear,
            })
            .await
            .map_err(|error| broker_failed(&error))?;
        check_probe(&security.url, &cluster.id, &probe)?;
        let url = if request.mount_in_clear {
            probe.url.clone()
        } else {
            security.url.clone()
        };
        let notices = security.notices(probe.offers_tls).join("\n");
        let mut view = VolumeView {
            name: volume_name.to_string(),
            url: url.clone(),
            size_bytes: probe.size_bytes,
            free_bytes: probe.free_bytes,
            state: "healthy".into(),
            tls: security.authority.is_some(),
            report: notices.clone(),
            ..VolumeView::default()
        };
        if request.dry_run {
            return Ok(view);
        }
        let adopted = broker
            .adopt_volume(AdoptVolumeRequest {
                volume: Some(proto::broker::Volume {
                    url: url.clone(),
                    cluster_id: cluster.id.clone(),
                    broker_uid: cluster.broker_uid,
                    fence_class: String::new(),
                    tls_ca,
                }),
                volume_uuid: uuid::Uuid::new_v4().to_string(),
            })
            .await
            .map_err(|error| broker_failed(&error))?;
        let fence = FenceClass::parse(&adopted.fence_class).ok_or_else(|| {
            status(
                Code::Internal,
                "E-FAILED",
                format!(
                    "the broker certified an unknown fence class `{}`",
                    adopted.fence_class
                ),
            )
        })?;
        let command = Command::AddVolume {
            name: volume_name.clone(),
            url,
            uuid: adopted.volume_uuid.clone(),
            fence,
            settle_ms: adopted.settle_ms,
            size_bytes: probe.size_bytes,
            nodes,
            tls_ca: security.authority,
        };
        let (_, outcome) = self.propose(&change, command).await?;
        if let Outcome::Volume(id) = outcome
            && let Some(volume) = self.state().volumes.get(&id)
        {
            let recorded = views::volume(&self.state(), volume);
            view = VolumeView {
                free_bytes: view.free_bytes,
                state: view.state,
                ..recorded
            };
        }
        view.report = match notices.as_str() {
            "" => adopted.report,
            notices => format!("{}\n{notices}", adopted.report.trim_end()),
        };
        Ok(view)
    }

    pub(super) async fn volume_list(
        &self,
        _: &Asker,
        _: VolumeListRequest,
    ) -> Result<VolumeListReply, Status> {
        let state = self.cluster_state()?;
        let cluster = state
            .cluster
            .clone()
            .ok_or(super::BackendError::NoCluster)?;
        let broker = self.backend.broker().ok();
        let views = state.volumes.values().map(|volume| {
            let (broker, cluster) = (broker.clone(), cluster.clone());
            let mut view = views::volume(&state, volume);
            let tls_ca = volume.tls_ca.clone().unwrap_or_default();
            async move {
                let Some(broker) = broker else {
                    view.state = "unknown".into();
                    return view;
                };
                let probe = ProbeVolumeRequest {
                    url: view.url.clone(),
                    cluster_id: cluster.id,
                    broker_uid: cluster.broker_uid,
                    tls_ca,
                    ..Default::default()
                };
                match broker.probe_volume(probe).await {
                    Ok(probe) if probe.reachable => {
                        view.state = if probe.writable {
                            "healthy"
                        } else {
                            "read-only"
                        }
                        .into();
                        view.free_bytes = probe.free_bytes;
                        view.size_bytes = probe.size_bytes;
                    }
                    Ok(probe) => {
                        view.state = "unreachable".into();
                        view.report = probe.error;
                    }
                    Err(error) => {
                        view.state = "unknown".into();
                        view.report = error.to_string();
                    }
                }
                view
            }
        });
        Ok(VolumeListReply {
            volumes: futures::future::join_all(views).await,
        })
    }

    pub(super) async fn volume_remove(
        &self,
        asker: &Asker,
        request: VolumeRemoveRequest,
    ) -> Result<Done, Status> {
        let change = asked(asker, request.change)?;
        let volume = volume_named(&*self.cluster_state()?, &request.name)?.id;
        let (index, _) = self
            .propose(&change, Command::RemoveVolume { volume })
            .await?;
        Ok(Done { log_index: index.0 })
    }

    pub(super) async fn lease_list(
        &self,
        asker: &Asker,
        request: LeaseListRequest,
    ) -> Result<LeaseListReply, Status> {
        let state = self.cluster_state()?;
        let soft = self.backend.soft().await;
        let only = if request.vm.is_empty() {
            None
        } else {
            Some(vm_named(asker, &state, &request.vm)?.id)
        };
        let leases = state
            .vms
            .values()
            .filter(|vm| only.is_none_or(|only| only == vm.id) && asker.sees(vm))
            .flat_map(|vm| views::leases(&state, &soft, vm))
            .collect();
        Ok(LeaseListReply { leases })
    }
}

fn broker_failed(error: &crate::broker::BrokerError) -> Status {
    status(Code::FailedPrecondition, "E-VOLUME", error.to_string())
}

/// Refuses a volume that cannot be this cluster's.
fn check_probe(url: &str, cluster_id: &str, probe: &VolumeProbe) -> Result<(), Status> {
    if !probe.reachable {
        return Err(status(
            Code::FailedPrecondition,
            "E-VOLUME",
            // The client's error names the volume by itself where it knows it.
            match probe.error.strip_prefix(url) {
                Some(rest) => format!("{url} cannot be reached{rest}"),
                None => format!("{url} cannot be reached: {}", probe.error),
            },
        ));
    }
    if !probe.owner_cluster_id.is_empty() && probe.owner_cluster_id != cluster_id {
        return Err(status(
            Code::FailedPrecondition,
            "E-FOREIGN",
            format!(
                "{url} is a volume of another cluster ({}); if that cluster is gone for good, remove its .baton-volume.json there",
                probe.owner_cluster_id
            ),
        ));
    }
    if !probe.writable {
        let why = if probe.error.is_empty() {
            "it is read-only, or its root belongs to somebody else"
        } else {
            &probe.error
        };
        return Err(invalid(format!(
            "{url} cannot be written: {why}; export it read-write to every node, its root writable"
        )));
    }
    Ok(())
}
