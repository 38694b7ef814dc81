//! The check of a host before it joins: alone, and with a join token against the cluster that made it. Needs no
//! daemon, changes nothing here or there: the token stays good.

use std::net::IpAddr;
use std::time::Duration;

use cluster_model::NodeRole;
use proto::broker::VolumeProbe;
use proto::peer::peer_client::PeerClient;
use proto::peer::{JoinCheckReply, JoinCheckRequest, JoinVolume};
use proto::tls::{self, Expect};
use proto::token::JoinToken;
use storage_broker::dialer::Dialer;
use storage_broker::store::{Store, VolumeRef};

use super::Finding;
use super::host::{Cpu, HostFacts};
use super::node::timed;
use crate::clock::Clock;
use crate::config::Config;
use crate::net;

/// How long a look at one volume may take.
const VOLUME_TIMEOUT: Duration = Duration::from_secs(10);

/// Looks at this host, and with `token` at what the cluster asks of it.
pub async fn check(config: &Config, token: Option<&JoinToken>) -> Vec<Finding> {
    let host = HostFacts::read(config).await;
    let answer = match token {
        None => None,
        Some(token) => Some(ask(config, token).await),
    };
    let role = answer
        .as_ref()
        .and_then(|answer| answer.as_ref().ok())
        .and_then(|answer| NodeRole::parse(&answer.reply.role));
    let mut findings = host.judged_alone(config, role, None);
    match answer {
        None => {
            findings.push(super::mtu(&host.link, &[]));
            findings.push(Finding::ok(
                "cluster",
                "not compared with a cluster: clock, processors and volumes are looked at with a join token (clusterctl node add)",
            ));
        }
        Some(Err(finding)) => {
            findings.push(super::mtu(&host.link, &[]));
            findings.push(finding);
        }
        Some(Ok(answer)) => findings.extend(compared(config, &host, &answer).await),
    }
    findings
}

/// What the cluster said.
struct Answer {
    reply: JoinCheckReply,
    /// Which member.
    address: String,
    /// By how much its clock is ahead of ours, ms.
    ahead_ms: i64,
}

/// Findings that take the cluster's word.
async fn compared(config: &Config, host: &HostFacts, answer: &Answer) -> Vec<Finding> {
    let reply = &answer.reply;
    let others: Vec<(String, Cpu)> = reply
        .cpus
        .iter()
        .map(|cpu| {
            let of_it = Cpu {
                vendor: cpu.vendor.clone(),
                model: cpu.model.clone(),
            };
            (cpu.node.clone(), of_it)
        })
        .collect();
    let mtus: Vec<(String, u32)> = reply
        .host
        .iter()
        .map(|facts| (answer.address.clone(), facts.mtu))
        .collect();
    let mut findings = vec![
        Finding::ok(
            "cluster",
            format!(
                "{} lets this host in as {}, by {}",
                reply.cluster_name, reply.role, answer.address
            ),
        ),
        super::mtu(&host.link, &mtus),
        super::clock(Some(answer.ahead_ms), &answer.address),
    ];
    if reply.role != NodeRole::Witness.as_str() {
        findings.push(super::cpu(&host.cpu, &others));
        findings.extend(volumes(config.source_address(), reply).await);
    }
    findings
}

async fn volumes(source: IpAddr, reply: &JoinCheckReply) -> Vec<Finding> {
    if reply.volumes.is_empty() {
        return vec![Finding::ok("volumes", "the cluster has none yet")];
    }
    let dialer = Dialer {
        source: (!source.is_unspecified()).then_some(source),
        ..Dialer::default()
    };
    let store = Store::new(dialer, false);
    let looks = reply.volumes.iter().map(|volume| {
        let store = &store;
        async move {
            let probe = tokio::time::timeout(VOLUME_TIMEOUT, probe(store, reply, volume)).await;
            let probe = probe.unwrap_or_else(|_| {
                Err(format!("no answer within {} s", VOLUME_TIMEOUT.as_secs()))
            });
            super::volume(&volume.name, &volume.url, &reply.cluster_id, &probe)
        }
    });
    futures::future::join_all(looks).await
}

/// Looks at a volume as the storage broker would.
async fn probe(
    store: &Store,
    reply: &JoinCheckReply,
    volume: &JoinVolume,
) -> Result<VolumeProbe, String> {
    let parsed = VolumeRef::parse(
        &volume.url,
        &volume.tls_ca,
        &reply.cluster_id,
        reply.broker_uid,
    )
    .map_err(|error| error.to_string())?;
    let probe = match store.probe(&parsed).await {
        Ok(probe) => probe,
        // What a probe finds out is its answer, also when it is bad.
        Err(error) => {
            return Ok(VolumeProbe {
                error: error.to_string(),
                ..VolumeProbe::default()
            });
        }
    };
    let identity = probe.identity;
    Ok(VolumeProbe {
        reachable: true,
        owner_cluster_id: identity.map_or_else(String::new, |identity| identity.cluster_id),
        free_bytes: probe.free_bytes,
        writable: probe.writable,
        ..VolumeProbe::default()
    })
}

/// Asks the members that the token names, one after the other.
async fn ask(config: &Config, token: &JoinToken) -> Result<Answer, Finding> {
    let name = "cluster";
    if token.node != config.name.as_str() {
        return Err(Finding::failed(
            name,
            format!(
                "the join token is for a node named {}, and this one is {}",
                token.node, config.name
            ),
            format!(
                "name = \"{}\" in clusterd.toml, or a token for this name: clusterctl node add {}",
                token.node, config.name
            ),
        ));
    }
    let failed = |why: String| {
        Finding::failed(
            name,
            why,
            "look at the way from this host to the members' port (7440), and, where a certificate's time is spoken of, at this host's clock",
        )
    };
    let root = token.root().map_err(|error| failed(error.to_string()))?;
    let tls = tls::client(Expect::Root(root), None).map_err(|error| failed(error.to_string()))?;
    let clock = Clock::default();
    let mut said = Vec::new();
    for address in &token.addresses {
        let channel = net::stranger(config.source_address(), address, tls.clone())
            .map_err(|error| failed(error.to_string()))?;
        let request = JoinCheckRequest {
            name: token.node.clone(),
            token_id: token.id.clone(),
            secret: token.secret.expose().to_owned(),
        };
        let mut client = PeerClient::new(channel).max_decoding_message_size(net::MESSAGE_BYTES_MAX);
        let mut why = "it does not answer".to_owned();
        // The first question pays for the connection and its handshake, and would make the clock look late.
        let asked = timed(&clock, async {
            match client.join_check(request.clone()).await {
                Ok(reply) => Some((0, reply.into_inner())),
                Err(status) => {
                    why = crate::trust::deepest(&status);
                    None
                }
            }
        });
        let Some((reply, _)) = asked.await else {
            said.push(format!("{address}: {why}"));
            continue;
        };
        if reply.used {
            return Err(Finding::warning(
                name,
                reply.refused,
                "if it was this host that used it and the answer was lost: clusterd join, with the same token",
            ));
        }
        if !reply.refused.is_empty() {
            return Err(Finding::failed(
                name,
                reply.refused,
                format!("another token: clusterctl node add {}", config.name),
            ));
        }
        if reply.cluster_id != token.cluster {
            said.push(format!(
                "{address}: it is of another cluster than the token"
            ));
            continue;
        }
        let again = timed(&clock, async {
            let reply = client.join_check(request).await.ok()?.into_inner();
            Some((reply.host?.wall_ms, reply))
        });
        return match again.await {
            Some((reply, ahead_ms)) => Ok(Answer {
                reply,
                address: address.clone(),
                ahead_ms,
            }),
            None => Err(failed(format!("{address} answered once and no more"))),
        };
    }
    Err(failed(said.join("; ")))
}
