//! Tokens that let nodes and people in, and who did what with them.

use cluster_model::trust::{Role, Sha256};
use cluster_model::{ClusterState, Command, Liveness, NodeRole};
use proto::admin::{
    AuditListReply, AuditListRequest, AuditView, Done, JoinTokenListReply, JoinTokenListRequest,
    JoinTokenRevokeRequest, JoinTokenView, NodeAddReply, NodeAddRequest, NodeJoinReply,
    NodeJoinRequest, TokenCreateReply, TokenCreateRequest, TokenListReply, TokenListRequest,
    TokenRevokeRequest, TokenView,
};
use proto::token::{ADDRESSES_MAX, AccessToken, JoinToken, Secret};
use tonic::{Code, Status};

use super::asker::{self, Asker};
use super::error::{invalid, status};
use super::service::{AdminService, asked, name};
use crate::trust;

/// A join token's time unless another is asked for, seconds: one hour.
const JOIN_TTL_S: u64 = 3_600;
/// The longest, seconds: a week.
const JOIN_TTL_S_MAX: u64 = 7 * 24 * 3_600;
/// An access token's time unless another is asked for, seconds: 30 days.
const ACCESS_TTL_S: u64 = 30 * 24 * 3_600;
/// The longest, seconds: a year.
const ACCESS_TTL_S_MAX: u64 = 366 * 24 * 3_600;
/// Audit records in one answer at most.
const AUDIT_ROWS_MAX: u32 = 4_096;

fn ttl(asked_s: u64, usual_s: u64, max_s: u64) -> Result<u64, Status> {
    match asked_s {
        0 => Ok(usual_s),
        asked if asked <= max_s => Ok(asked),
        _ => Err(invalid(format!(
            "--ttl: at most {} days",
            max_s / (24 * 3_600)
        ))),
    }
}

fn no_randomness(error: trust::NoRandomness) -> Status {
    status(Code::Internal, "E-INTERNAL", error.to_string())
}

fn root(state: &ClusterState) -> Result<Sha256, Status> {
    let authority = state.trust.authority.as_ref();
    authority
        .and_then(|authority| authority.roots.last())
        .map(|root| root.fingerprint)
        .ok_or_else(|| {
            status(
                Code::FailedPrecondition,
                "E-NOCLUSTER",
                "the cluster has no certificate authority yet; try again",
            )
        })
}

/// Where a node that joins asks: those that can let it in, the living first.
fn doors(state: &ClusterState) -> Vec<String> {
    let mut voters: Vec<_> = state
        .nodes
        .values()
        .filter(|node| node.role.may_lead())
        .collect();
    voters.sort_by_key(|node| (node.liveness != Liveness::Up, node.id));
    voters
        .into_iter()
        .map(|node| node.address.clone())
        .take(ADDRESSES_MAX)
        .collect()
}

fn role(text: &str) -> Result<NodeRole, Status> {
    if text.is_empty() {
        return Ok(NodeRole::Voter);
    }
    NodeRole::parse(text)
        .ok_or_else(|| invalid(format!("role `{text}`: use voter, learner or witness")))
}

impl AdminService {
    pub(super) async fn node_add(
        &self,
        asker: &Asker,
        request: NodeAddRequest,
    ) -> Result<NodeAddReply, Status> {
        let change = asked(asker, request.change)?;
        let node = name(&request.name)?;
        let role = role(&request.role)?;
        let ttl_s = ttl(request.ttl_s, JOIN_TTL_S, JOIN_TTL_S_MAX)?;
        let state = self.cluster_state()?;
        let cluster = state.cluster.as_ref().map(|cluster| cluster.id.clone());
        let secret = Secret::new(&trust::random().map_err(no_randomness)?);
        let token = JoinToken {
            cluster: cluster.unwrap_or_default(),
            ca_sha256: root(&state)?.to_string(),
            addresses: doors(&state),
            id: trust::new_id().map_err(no_randomness)?,
            secret,
            node: node.to_string(),
            expires_at_ms: self.backend.wall_ms().saturating_add(ttl_s * 1_000),
        };
        let command = Command::CreateJoinToken {
            id: token.id.clone(),
            node,
            role,
            secret_hash: Sha256(token.secret.hash()),
            expires_at_ms: token.expires_at_ms,
        };
        self.propose(&change, command).await?;
        Ok(NodeAddReply {
            id: token.id.clone(),
            line: token.line(),
            expires_at_ms: token.expires_at_ms,
        })
    }

    pub(super) async fn node_join(
        &self,
        asker: &Asker,
        request: NodeJoinRequest,
    ) -> Result<NodeJoinReply, Status> {
        asked(asker, request.change)?;
        let node_id = self.backend.join(&request.token).await?.0;
        let state = self.state();
        let cluster = state.cluster.as_ref();
        Ok(NodeJoinReply {
            node_id,
            cluster_id: cluster
                .map(|cluster| cluster.id.clone())
                .unwrap_or_default(),
            cluster_name: cluster
                .map(|cluster| cluster.name.to_string())
                .unwrap_or_default(),
        })
    }

    pub(super) async fn join_token_list(
        &self,
        _: &Asker,
        _: JoinTokenListRequest,
    ) -> Result<JoinTokenListReply, Status> {
        let now_ms = self.backend.wall_ms();
        let state = self.cluster_state()?;
        let tokens = state.trust.join_tokens.iter().map(|(id, token)| {
            let stands = match (&token.used_by, token.expires_at_ms <= now_ms) {
                (Some(_), _) => "used",
                (None, true) => "expired",
                (None, false) => "waiting",
            };
            JoinTokenView {
                id: id.clone(),
                node: token.node.to_string(),
                role: token.role.as_str().to_owned(),
                expires_at_ms: token.expires_at_ms,
                made_by: token.made_by.clone(),
                state: stands.to_owned(),
            }
        });
        Ok(JoinTokenListReply {
            tokens: tokens.collect(),
        })
    }

    pub(super) async fn join_token_revoke(
        &self,
        asker: &Asker,
        request: JoinTokenRevokeRequest,
    ) -> Result<Done, Status> {
        let change = asked(asker, request.change)?;
        let command = Command::RevokeJoinToken { id: request.id };
        let (index, _) = self.propose(&change, command).await?;
        Ok(Done { log_index: index.0 })
    }

    pub(super) async fn token_create(
        &self,
        asker: &Asker,
        request: TokenCreateRequest,
    ) -> Result<TokenCreateReply, Status> {
        let change = asked(asker, request.change)?;
        let role = Role::parse(&request.role).ok_or_else(|| {
            invalid(format!(
                "role `{}`: use viewer, operator or admin",
                request.role
            ))
        })?;
        let tags = asker::tags(&request.tags)?;
        let ttl_s = ttl(request.ttl_s, ACCESS_TTL_S, ACCESS_TTL_S_MAX)?;
        let token = AccessToken {
            ca_sha256: root(&*self.cluster_state()?)?.to_string(),
            id: trust::new_id().map_err(no_randomness)?,
            secret: Secret::new(&trust::random().map_err(no_randomness)?),
        };
        let expires_at_ms = self.backend.wall_ms().saturating_add(ttl_s * 1_000);
        let command = Command::CreateAccessToken {
            id: token.id.clone(),
            user: name(&request.user)?,
            role,
            tags,
            secret_hash: Sha256(token.secret.hash()),
            expires_at_ms,
        };
        self.propose(&change, command).await?;
        Ok(TokenCreateReply {
            id: token.id.clone(),
            token: token.line(),
            expires_at_ms,
        })
    }

    pub(super) async fn token_list(
        &self,
        _: &Asker,
        _: TokenListRequest,
    ) -> Result<TokenListReply, Status> {
        let now_ms = self.backend.wall_ms();
        let state = self.cluster_state()?;
        let tokens = state
            .trust
            .access_tokens
            .iter()
            .map(|(id, token)| TokenView {
                id: id.clone(),
                user: token.user.to_string(),
                role: token.role.as_str().to_owned(),
                tags: token.tags.iter().map(ToString::to_string).collect(),
                expires_at_ms: token.expires_at_ms,
                made_by: token.made_by.clone(),
                expired: token.expires_at_ms <= now_ms,
            });
        Ok(TokenListReply {
            tokens: tokens.collect(),
        })
    }

    pub(super) async fn token_revoke(
        &self,
        asker: &Asker,
        request: TokenRevokeRequest,
    ) -> Result<Done, Status> {
        let change = asked(asker, request.change)?;
        let command = Command::RevokeAccessToken { id: request.id };
        let (index, _) = self.propose(&change, command).await?;
        Ok(Done { log_index: index.0 })
    }

    pub(super) async fn audit_list(
        &self,
        _: &Asker,
        request: AuditListRequest,
    ) -> Result<AuditListReply, Status> {
        let state = self.cluster_state()?;
        let limit = match request.limit {
            0 => AUDIT_ROWS_MAX,
            limit => limit.min(AUDIT_ROWS_MAX),
        };
        let is = |wanted: &str, is: &str| wanted.is_empty() || wanted == is;
        let mut records: Vec<AuditView> = state
            .trust
            .audit
            .iter()
            .rev()
            .filter(|record| record.at_ms >= request.since_ms)
            .filter(|record| is(&request.actor, &record.actor))
            .filter(|record| is(&request.object, &record.object))
            .take(limit as usize)
            .map(|record| AuditView {
                index: record.index.0,
                at_ms: record.at_ms,
                actor: record.actor.clone(),
                from: record.asked.from.clone(),
                method: record.asked.method.clone(),
                object: record.object.clone(),
                reason: record.asked.reason.clone(),
                request: record.request.clone(),
                refused: record.refused.clone(),
            })
            .collect();
        records.reverse();
        Ok(AuditListReply { records })
    }
}
