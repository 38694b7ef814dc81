//! The certificate authority, and other clusters that are trusted.

use std::collections::BTreeMap;

use cluster_model::trust::{Sha256, TrustedCluster};
use cluster_model::{Command, Node, NodeId};
use proto::admin::{
    CaRotateReply, CaRotateRequest, CaShowReply, CaShowRequest, Done, RootView, TrustAddRequest,
    TrustListReply, TrustListRequest, TrustRemoveRequest, TrustView,
};
use tonic::{Code, Status};

use super::asker::Asker;
use super::error::{invalid, status};
use super::service::{AdminService, asked, name};
use crate::trust::RecoveryKey;

impl AdminService {
    pub(super) async fn ca_show(&self, _: &Asker, _: CaShowRequest) -> Result<CaShowReply, Status> {
        let state = self.cluster_state()?;
        let authority = state.trust.authority.as_ref().ok_or_else(no_authority)?;
        let papers = self.backend.papers();
        let known: BTreeMap<NodeId, u64> = self
            .backend
            .certificate_generations()
            .await
            .into_iter()
            .collect();
        // A node of which nothing is known counts as behind.
        let is_behind = |node: &&Node| {
            known
                .get(&node.id)
                .is_none_or(|generation| *generation < authority.issuing.generation)
        };
        let mut behind: Vec<String> = state
            .nodes
            .values()
            .filter(is_behind)
            .map(|node| node.name.to_string())
            .collect();
        behind.sort();
        Ok(CaShowReply {
            roots: authority
                .roots
                .iter()
                .map(|root| RootView {
                    sha256: root.fingerprint.to_string(),
                    certificate_pem: root.certificate_pem.clone(),
                })
                .collect(),
            generation: authority.issuing.generation,
            issuing_ends_at_ms: authority.issuing.ends_at_ms,
            issuing_made_by: state.node_label(authority.issuing.made_by),
            certificate_ends_at_ms: papers.as_ref().map_or(0, |papers| papers.ends_at_ms),
            certificate_generation: papers.as_ref().map_or(0, |papers| papers.generation),
            behind,
        })
    }

    pub(super) async fn ca_rotate(
        &self,
        asker: &Asker,
        request: CaRotateRequest,
    ) -> Result<CaRotateReply, Status> {
        let change = asked(asker, request.change)?;
        let state = self.cluster_state()?;
        let authority = state.trust.authority.as_ref().ok_or_else(no_authority)?;
        let recovery: RecoveryKey = request
            .recovery_key
            .parse()
            .map_err(|error: crate::trust::RecoveryKeyError| invalid(error.to_string()))?;
        if authority.roots.len() > 1 {
            return Err(status(
                Code::FailedPrecondition,
                "E-ROTATION",
                "a rotation of the root is under way; look: clusterctl cluster ca show",
            ));
        }
        let prepared = self
            .backend
            .prepare_rotation(authority, &recovery, request.root)
            .await?;
        let command = Command::RotateAuthority {
            expects: authority.issuing.generation,
            roots: prepared.roots,
            issuing: prepared.issuing.clone(),
        };
        self.propose(&change, command).await?;
        Ok(CaRotateReply {
            generation: prepared.issuing.generation,
            recovery_key: prepared
                .recovery_key
                .map(|key| key.reveal())
                .unwrap_or_default(),
            ca_sha256: prepared.fingerprint.to_string(),
        })
    }

    pub(super) async fn trust_add(
        &self,
        asker: &Asker,
        request: TrustAddRequest,
    ) -> Result<Done, Status> {
        let change = asked(asker, request.change)?;
        let certificates = proto::tls::certificates(&request.root_pem)
            .map_err(|error| invalid(format!("--ca: {error}")))?;
        let [root] = certificates.as_slice() else {
            return Err(invalid(
                "--ca: one certificate, the other cluster's root; it is shown by: clusterctl cluster ca show -o json",
            ));
        };
        proto::tls::root_store([request.root_pem.as_str()])
            .map_err(|error| invalid(format!("--ca: {error}")))?;
        let command = Command::TrustCluster {
            name: name(&request.name)?,
            cluster: TrustedCluster {
                fingerprint: Sha256(proto::tls::fingerprint(root)),
                root_pem: request.root_pem,
            },
        };
        let (index, _) = self.propose(&change, command).await?;
        Ok(Done { log_index: index.0 })
    }

    pub(super) async fn trust_list(
        &self,
        _: &Asker,
        _: TrustListRequest,
    ) -> Result<TrustListReply, Status> {
        let state = self.cluster_state()?;
        let clusters = state
            .trust
            .clusters
            .iter()
            .map(|(name, cluster)| TrustView {
                name: name.to_string(),
                sha256: cluster.fingerprint.to_string(),
            });
        Ok(TrustListReply {
            clusters: clusters.collect(),
        })
    }

    pub(super) async fn trust_remove(
        &self,
        asker: &Asker,
        request: TrustRemoveRequest,
    ) -> Result<Done, Status> {
        let change = asked(asker, request.change)?;
        let command = Command::DistrustCluster {
            name: name(&request.name)?,
        };
        let (index, _) = self.propose(&change, command).await?;
        Ok(Done { log_index: index.0 })
    }
}

fn no_authority() -> Status {
    status(
        Code::FailedPrecondition,
        "E-NOCLUSTER",
        "the cluster has no certificate authority yet; try: clusterctl cluster init",
    )
}
