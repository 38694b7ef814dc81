//! What nodes ask of each other for the sake of trust: to be let in, a new certificate, the issuing key.

use std::sync::Arc;
use std::time::Duration;

use cluster_model::trust::Sha256;
use cluster_model::{
    ClusterState, Command, Name, NodeId, Outcome, Rejection, RequestId, TrustRefusal,
};
use proto::peer::peer_client::PeerClient;
use proto::peer::{
    Certificate, IssuingKeyReply, IssuingKeyRequest, JoinCheckReply, JoinCheckRequest, JoinReply,
    JoinRequest, JoinVolume, NodeCpu, RenewReply, RenewRequest,
};
use proto::tls::{self, Expect};
use proto::token::{JoinToken, Secret};

use super::authority::{Certified, PublicKey, identity};
use super::caller::{Caller, Shown};
use super::keeper::{Keeper, Papers};
use crate::check::node;
use crate::member::{Member, PROPOSE_TIMEOUT};
use crate::net::Dialer;

/// How long an answer to a join may take: the entry, and the certificate.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5).saturating_add(PROPOSE_TIMEOUT);

impl From<Certified> for Certificate {
    fn from(certified: Certified) -> Certificate {
        Certificate {
            chain_pem: certified.chain_pem,
            ends_at_ms: certified.ends_at_ms,
            generation: certified.generation,
        }
    }
}

impl From<Certificate> for Certified {
    fn from(certificate: Certificate) -> Certified {
        Certified {
            chain_pem: certificate.chain_pem,
            ends_at_ms: certificate.ends_at_ms,
            generation: certificate.generation,
        }
    }
}

/// Certifies `node` by the issuing key that this node has.
fn certify(
    member: &Member,
    state: &ClusterState,
    node: NodeId,
    key: &PublicKey,
) -> Result<Certified, String> {
    let issuing = member
        .keeper
        .issuing()
        .ok_or("this node does not hold the issuing key (yet); ask another voter")?;
    let known = state
        .nodes
        .get(&node)
        .ok_or("there is no such node in the cluster; if it was removed, let it join anew")?;
    if known.key != Some(key.hash()) {
        return Err("the log knows this node by another key".into());
    }
    let cluster = state.cluster.as_ref().ok_or("there is no cluster yet")?;
    issuing
        .certify(
            &identity(&cluster.id, node, known.role),
            key,
            member.clock.wall_ms(),
        )
        .map_err(|error| error.to_string())
}

/// Answers a node that shows a join token.
pub async fn answer_join(member: &Arc<Member>, request: JoinRequest, from: &str) -> JoinReply {
    let let_in = let_in(member, request, from).await;
    let_in.unwrap_or_else(|refused| JoinReply {
        refused,
        ..JoinReply::default()
    })
}

async fn let_in(
    member: &Arc<Member>,
    request: JoinRequest,
    from: &str,
) -> Result<JoinReply, String> {
    let name = Name::new(request.name).map_err(|error| error.to_string())?;
    let key = PublicKey::parse(&request.public_key).map_err(|error| error.to_string())?;
    // Asked before the token is spent: who cannot sign lets nobody in.
    if member.keeper.issuing().is_none() {
        return Err("this node does not hold the issuing key; it will be asked of another".into());
    }
    let command = Command::JoinNode {
        token: request.token_id,
        secret_hash: Sha256(Secret::from_text(&request.secret).hash()),
        name,
        address: request.address,
        key: key.hash(),
    };
    let id = RequestId(format!("join/{}", uuid::Uuid::new_v4()));
    let (_, outcome) = member
        .propose(&member.actor(), id, command)
        .await
        .map_err(|error| {
            tracing::warn!(from, %error, "a node was not let in");
            error.to_string()
        })?;
    let Outcome::Node(node) = outcome else {
        return Err(format!("letting a node in gave {outcome:?}"));
    };
    let state = member.state();
    let authority = state
        .trust
        .authority
        .as_ref()
        .ok_or("the cluster has no certificate authority")?;
    let certified = certify(member, &state, node, &key)?;
    Ok(JoinReply {
        node_id: node.0,
        cluster_id: member.cluster_id().to_owned(),
        refused: String::new(),
        certificate: Some(certified.into()),
        roots: authority
            .roots
            .iter()
            .map(|root| root.certificate_pem.clone())
            .collect(),
    })
}

/// Answers a host that shows a join token and asks what it would join. Nothing is written: the token stays good.
/// Who guesses learns as little as from [`answer_join`].
pub async fn answer_join_check(
    member: &Member,
    request: JoinCheckRequest,
    from: &str,
) -> JoinCheckReply {
    let state = member.state();
    let admitted = Name::new(request.name)
        .map_err(|error| (error.to_string(), false))
        .and_then(|name| {
            let hash = Sha256(Secret::from_text(&request.secret).hash());
            let now_ms = member.clock.wall_ms();
            state
                .would_join(&request.token_id, &hash, &name, now_ms)
                .map_err(|rejection| {
                    let used = TrustRefusal::JoinTokenUsed { node: name };
                    (rejection.to_string(), rejection == Rejection::Trust(used))
                })
        });
    let role = match admitted {
        Ok(role) => role,
        Err((refused, used)) => {
            tracing::warn!(
                from,
                refused,
                "a host that is no node's asks what it would join"
            );
            return JoinCheckReply {
                refused,
                used,
                ..JoinCheckReply::default()
            };
        }
    };
    let (name, id, broker_uid) = state
        .cluster
        .as_ref()
        .map(|cluster| {
            (
                cluster.name.to_string(),
                cluster.id.clone(),
                cluster.broker_uid,
            )
        })
        .unwrap_or_default();
    let cpus = node::cpus(&state, NodeId(0)).into_iter();
    let volumes = state.volumes.values();
    JoinCheckReply {
        refused: String::new(),
        used: false,
        cluster_name: name,
        cluster_id: id,
        broker_uid,
        role: role.as_str().into(),
        host: Some(node::host_facts(member).await),
        cpus: cpus
            .map(|(node, cpu)| NodeCpu {
                node,
                vendor: cpu.vendor,
                model: cpu.model,
            })
            .collect(),
        volumes: volumes
            .filter(|volume| volume.nodes.is_empty())
            .map(|volume| JoinVolume {
                name: volume.name.to_string(),
                url: volume.url.clone(),
                tls_ca: volume.tls_ca.clone().unwrap_or_default(),
            })
            .collect(),
    }
}

/// Answers a node that asks for a new certificate.
pub fn answer_renew(member: &Member, request: &RenewRequest) -> RenewReply {
    let key = PublicKey::parse(&request.public_key).map_err(|error| error.to_string());
    let certified =
        key.and_then(|key| certify(member, &member.state(), NodeId(request.node_id), &key));
    match certified {
        Ok(certified) => RenewReply {
            certificate: Some(certified.into()),
            refused: String::new(),
        },
        Err(refused) => RenewReply {
            certificate: None,
            refused,
        },
    }
}

/// Answers a voter that asks for the issuing key.
pub fn answer_issuing_key(
    member: &Member,
    request: &IssuingKeyRequest,
    caller: &Caller,
) -> IssuingKeyReply {
    let refused = |refused: &str| IssuingKeyReply {
        refused: refused.to_owned(),
        ..IssuingKeyReply::default()
    };
    let state = member.state();
    let voter = match &caller.shown {
        // As the log says, not as the certificate does: it may be older.
        Shown::Node(identity) => state
            .nodes
            .get(&identity.node)
            .is_some_and(|node| node.role.may_lead()),
        Shown::Local { .. } | Shown::Foreign(_) | Shown::Nothing => false,
    };
    if !voter {
        tracing::warn!(
            from = caller.from,
            "somebody who does not vote asked for the issuing key"
        );
        return refused("only voters hold the issuing key");
    }
    match member.keeper.issuing() {
        Some(key) if key.issuing.generation == request.generation => IssuingKeyReply {
            key_der: key.key_der(),
            root_pem: key.root_pem.clone(),
            refused: String::new(),
        },
        _ => refused("this node does not hold that issuing key"),
    }
}

/// Shows a join token to the members that it names, one after the other; gives this node's number and
/// its papers.
///
/// # Errors
/// What each of them said.
pub async fn ask_to_join(
    dialer: &Dialer,
    keeper: &Keeper,
    token: &JoinToken,
    advertise: &str,
) -> Result<(NodeId, Papers), String> {
    let root = token.root().map_err(|error| error.to_string())?;
    let key = keeper.public_key().map_err(|error| error.to_string())?;
    let config = tls::client(Expect::Root(root), None).map_err(|error| error.to_string())?;
    let mut said = Vec::new();
    for address in &token.addresses {
        let channel = dialer
            .with_config(address, config.clone())
            .map_err(|error| error.to_string())?;
        let request = JoinRequest {
            name: token.node.clone(),
            address: advertise.to_owned(),
            token_id: token.id.clone(),
            secret: token.secret.expose().to_owned(),
            public_key: key.bytes().to_vec(),
        };
        let asked =
            tokio::time::timeout(JOIN_TIMEOUT, PeerClient::new(channel).join(request)).await;
        let refused = match asked {
            Ok(Ok(reply)) => match joined(token, reply.into_inner()) {
                Ok(joined) => return Ok(joined),
                Err(refused) => refused,
            },
            Ok(Err(status)) => deepest(&status),
            Err(_) => "it does not answer".to_owned(),
        };
        said.push(format!("{address}: {refused}"));
    }
    Err(said.join("; "))
}

fn joined(token: &JoinToken, reply: JoinReply) -> Result<(NodeId, Papers), String> {
    if !reply.refused.is_empty() {
        return Err(reply.refused);
    }
    let certificate = reply
        .certificate
        .ok_or("it let this node in and gave it no certificate")?;
    if reply.cluster_id != token.cluster {
        return Err("it is of another cluster than the token".into());
    }
    let papers = Papers {
        cluster: reply.cluster_id,
        chain_pem: certificate.chain_pem,
        ends_at_ms: certificate.ends_at_ms,
        generation: certificate.generation,
        roots: reply.roots,
        foreign: Default::default(),
    };
    Ok((NodeId(reply.node_id), papers))
}

/// The innermost cause: a connection's errors are wrapped in several that say nothing.
pub fn deepest(status: &tonic::Status) -> String {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(status);
    let mut said = status.message().to_owned();
    while let Some(error) = cause {
        said = error.to_string();
        cause = error.source();
    }
    said
}
