//! Keeps a node's trust current: believes what the log says, renews its certificate, has the issuing key
//! where it votes.
//!
//! Level-triggered: each look compares what is with what should be. A certificate is renewed at two thirds of
//! its life, and at once when the issuing CA is another; connections that stand go on with the old one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cluster_model::trust::{Authority, Standing};
use cluster_model::{ClusterState, NodeId};
use proto::peer::peer_client::PeerClient;
use proto::peer::{IssuingKeyRequest, RenewRequest};

use super::authority::{Certified, IssuingKey, NODE_LIFE};
use super::door::Door;
use super::rotation;
use crate::member::Member;
use crate::node::NodeHandle;

/// How often it looks although the log says nothing new.
const LOOK: Duration = Duration::from_secs(10);
/// How often it looks while the root is being changed: reports say how far the others are.
const ROTATION_LOOK: Duration = Duration::from_millis(500);
/// The pause after something could not be had: doubled up to [`LOOK`].
const PAUSE: Duration = Duration::from_millis(250);
/// How long another node may take to answer.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// Whether a certificate is to be renewed: of its life a third or less is left, or its issuer is not the one
/// that signs now.
pub fn is_due(ends_at_ms: u64, generation: u64, authority: &Authority, now_ms: u64) -> bool {
    let third_ms = u64::try_from(NODE_LIFE.as_millis() / 3).unwrap_or(u64::MAX);
    let left_ms = ends_at_ms.saturating_sub(now_ms);
    // One that its issuer's end cuts short cannot be made longer by asking again.
    let cut_short = ends_at_ms >= authority.issuing.ends_at_ms;
    generation < authority.issuing.generation || (left_ms <= third_ms && !cut_short)
}

/// Keeps this node's trust current for as long as its task lives.
pub async fn keep_current(node: NodeHandle, member: Arc<Member>, door: Door) {
    let mut state = member.raft.state();
    let mut pause = PAUSE;
    loop {
        state.mark_unchanged();
        let now = member.state();
        if let Err(error) = member.keeper.believe(&now) {
            tracing::error!(%error, "what the log says of trust cannot be used");
        }
        let addresses = now.nodes.values().map(|node| node.address.parse());
        door.expect(addresses.flatten().map(|address: SocketAddr| address.ip()));
        door.break_removed(|node| now.peer_standing(node) == Standing::Removed);
        let wait = match look(&member).await {
            Ok(()) => {
                pause = PAUSE;
                if rotates(&now) {
                    if let Ok(reports) = node.reports().await {
                        rotation::go_on(&member, &now, &reports).await;
                    }
                    ROTATION_LOOK
                } else {
                    LOOK
                }
            }
            Err(why) => {
                tracing::info!(why, "this node's trust is not current yet");
                pause = (pause * 2).min(LOOK);
                pause
            }
        };
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Whether a rotation of the root is under way.
fn rotates(state: &ClusterState) -> bool {
    let authority = state.trust.authority.as_ref();
    authority.is_some_and(|authority| authority.roots.len() > 1)
}

async fn look(member: &Arc<Member>) -> Result<(), String> {
    let state = member.state();
    let (Some(authority), Some(own)) = (&state.trust.authority, state.nodes.get(&member.node))
    else {
        return Ok(());
    };
    let failed = |error: super::KeeperError| error.to_string();
    let held = member.keeper.issuing();
    if !own.role.may_lead() {
        if held.is_some() {
            member.keeper.forget_issuing().map_err(failed)?;
        }
    } else if held.is_none_or(|held| held.issuing != authority.issuing)
        && !member
            .keeper
            .promote_next(&authority.issuing)
            .map_err(failed)?
    {
        let key = ask_for_issuing_key(member, authority).await?;
        member.keeper.keep_issuing(key).map_err(failed)?;
        tracing::info!(
            generation = authority.issuing.generation,
            "holds the issuing key"
        );
    }
    let papers = member.keeper.papers().ok_or("there are no papers")?;
    let now_ms = member.clock.wall_ms();
    if is_due(papers.ends_at_ms, papers.generation, authority, now_ms) {
        let certified = renew(member).await?;
        member.keeper.renewed(certified).map_err(failed)?;
        tracing::info!("this node's certificate is renewed");
    }
    Ok(())
}

/// Nodes that may hold the issuing key, likeliest first.
fn signers(member: &Member, first: NodeId) -> Vec<String> {
    let state = member.state();
    let mut signers: Vec<_> = state
        .nodes
        .values()
        .filter(|node| node.role.may_lead() && node.id != member.node)
        .collect();
    signers.sort_by_key(|node| (node.id != first, node.id));
    signers
        .into_iter()
        .map(|node| node.address.clone())
        .collect()
}

async fn ask_for_issuing_key(
    member: &Arc<Member>,
    authority: &Authority,
) -> Result<IssuingKey, String> {
    let mut said = Vec::new();
    for address in signers(member, authority.issuing.made_by) {
        let request = IssuingKeyRequest {
            generation: authority.issuing.generation,
        };
        let answer = ask(member, &address, |mut client| async move {
            client.issuing_key(request).await
        })
        .await;
        let refused = match answer {
            Ok(reply) if reply.refused.is_empty() => {
                let key = IssuingKey::from_parts(
                    authority.issuing.clone(),
                    reply.root_pem,
                    reply.key_der,
                );
                return key.map_err(|error| error.to_string());
            }
            Ok(reply) => reply.refused,
            Err(why) => why,
        };
        said.push(format!("{address}: {refused}"));
    }
    Err(format!("nobody gives the issuing key: {}", said.join("; ")))
}

async fn renew(member: &Arc<Member>) -> Result<Certified, String> {
    let key = member
        .keeper
        .public_key()
        .map_err(|error| error.to_string())?;
    let request = RenewRequest {
        node_id: member.node.0,
        public_key: key.bytes().to_vec(),
    };
    let own = super::exchange::answer_renew(member, &request);
    if let Some(certificate) = own.certificate {
        return Ok(certificate.into());
    }
    let mut said = Vec::new();
    for address in signers(member, member.raft.leader().unwrap_or_default()) {
        let request = request.clone();
        let answer = ask(member, &address, |mut client| async move {
            client.renew(request).await
        })
        .await;
        let refused = match answer {
            Ok(reply) => match reply.certificate {
                Some(certificate) => return Ok(certificate.into()),
                None => reply.refused,
            },
            Err(why) => why,
        };
        said.push(format!("{address}: {refused}"));
    }
    Err(format!(
        "nobody renews the certificate: {}",
        said.join("; ")
    ))
}

async fn ask<T, F>(
    member: &Member,
    address: &str,
    call: impl FnOnce(PeerClient<tonic::transport::Channel>) -> F,
) -> Result<T, String>
where
    F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
{
    let channel = member
        .dialer
        .channel(address)
        .map_err(|error| error.to_string())?;
    match tokio::time::timeout(ASK_TIMEOUT, call(PeerClient::new(channel))).await {
        Ok(Ok(reply)) => Ok(reply.into_inner()),
        Ok(Err(status)) => Err(status.message().to_owned()),
        Err(_) => Err("no answer in time".into()),
    }
}
