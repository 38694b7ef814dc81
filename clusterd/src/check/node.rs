//! The check of a node that runs: its host, its clock against the others', its volumes, its monitors.

use std::sync::Arc;
use std::time::Duration;

use cluster_model::{ClusterState, Liveness, NodeId, VmId};
use proto::broker::ProbeVolumeRequest;
use proto::peer::peer_client::PeerClient;
use proto::peer::{HostFactsReply, HostFactsRequest};

use super::confinement::{self, Seen};
use super::host::{self, Cpu, HostFacts};
use super::{Finding, State};
use crate::clock::Clock;
use crate::confine::Measure;
use crate::member::Member;

/// How long another node may take to answer.
const PEER_TIMEOUT: Duration = Duration::from_secs(2);
/// Other nodes that are asked: enough to see one that differs, few enough to be quick in a cluster of 1,000.
const PEERS_MAX: usize = 32;
/// Volumes that are looked at at once.
const VOLUMES_TOGETHER: usize = 8;

/// What the check of a node found.
#[derive(Clone, Debug)]
pub struct NodeChecked {
    /// Of the host and the cluster as seen from it.
    pub findings: Vec<Finding>,
    /// Of each monitor.
    pub monitors: Vec<MonitorChecked>,
}

/// What confines a monitor.
#[derive(Clone, Debug)]
pub struct MonitorChecked {
    /// Its machine.
    pub vm: VmId,
    /// Its process.
    pub pid: u32,
    /// Its measures, as they hold now.
    pub measures: Vec<Measure>,
}

/// Looks at this node.
pub async fn check(member: &Arc<Member>) -> NodeChecked {
    let state = member.state();
    let (host, peers, volumes) = tokio::join!(
        HostFacts::read(&member.config),
        peers(member, &state),
        volumes(member, &state)
    );
    let own = state.nodes.get(&member.node);
    let mut findings = host.judged_alone(
        &member.config,
        own.map(|node| node.role),
        Some(state.memory_committed_mib(member.node)),
    );
    findings.push(super::cpu(&host.cpu, &cpus(&state, member.node)));
    let mtus: Vec<(String, u32)> = peers
        .iter()
        .map(|peer| (peer.name.clone(), peer.facts.mtu))
        .collect();
    findings.push(super::mtu(&host.link, &mtus));
    let leadership = member.raft.leadership().borrow().clone();
    let (ahead_ms, whose) = reference(&peers, leadership.leader);
    findings.push(super::clock(ahead_ms, &whose));
    findings.extend(volumes);
    let monitors = monitors(member);
    let of_each = monitors.iter().map(|monitor| monitor.measures.as_slice());
    findings.push(confinement::monitors(of_each));
    NodeChecked { findings, monitors }
}

/// The processors of the nodes that run machines beside `own`.
pub fn cpus(state: &ClusterState, own: NodeId) -> Vec<(String, Cpu)> {
    state
        .nodes
        .values()
        // One that has never registered has said nothing of itself.
        .filter(|node| node.id != own && !node.facts.cpu_vendor.is_empty() && node.facts.kvm)
        .map(|node| {
            let cpu = Cpu {
                vendor: node.facts.cpu_vendor.clone(),
                model: node.facts.cpu_model.clone(),
            };
            (node.name.to_string(), cpu)
        })
        .collect()
}

/// Answers another node's [`HostFactsRequest`].
pub async fn host_facts(member: &Member) -> HostFactsReply {
    let mtu = host::link(&member.config).await.map_or(0, |link| link.mtu);
    HostFactsReply {
        wall_ms: member.clock.wall_ms(),
        mtu,
    }
}

/// Another node's answer.
struct Peer {
    node: NodeId,
    name: String,
    facts: HostFactsReply,
    /// By how much its clock is ahead of ours, ms.
    ahead_ms: i64,
}

async fn peers(member: &Member, state: &ClusterState) -> Vec<Peer> {
    let leader = member.raft.leadership().borrow().leader;
    let mut others: Vec<_> = state
        .nodes
        .values()
        .filter(|node| node.id != member.node && node.liveness == Liveness::Up)
        .collect();
    // The leader among them in any case.
    others.sort_by_key(|node| (Some(node.id) != leader, node.id));
    let asked = others.into_iter().take(PEERS_MAX).map(|node| async move {
        let channel = member.dialer.channel(&node.address).ok()?;
        let (facts, ahead_ms) = timed(&member.clock, async move {
            let asked = PeerClient::new(channel)
                .host_facts(HostFactsRequest {})
                .await;
            let facts = asked.ok()?.into_inner();
            Some((facts.wall_ms, facts))
        })
        .await?;
        Some(Peer {
            node: node.id,
            name: node.name.to_string(),
            facts,
            ahead_ms,
        })
    });
    let answers = futures::future::join_all(asked).await;
    answers.into_iter().flatten().collect()
}

/// Asks for a wall clock and tells by how much it is ahead of ours: what it said counts for the middle of the
/// time between question and answer.
pub(super) async fn timed<T>(
    clock: &Clock,
    ask: impl Future<Output = Option<(u64, T)>>,
) -> Option<(T, i64)> {
    let asked_at_ms = clock.wall_ms();
    let (theirs_ms, answer) = tokio::time::timeout(PEER_TIMEOUT, ask).await.ok()??;
    let middle_ms = asked_at_ms.midpoint(clock.wall_ms());
    let signed = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
    Some((answer, signed(theirs_ms).saturating_sub(signed(middle_ms))))
}

/// With whose clock ours is compared: the leader's, or where we lead or it is silent, the middle one of the others.
fn reference(peers: &[Peer], leader: Option<NodeId>) -> (Option<i64>, String) {
    if let Some(peer) = peers.iter().find(|peer| Some(peer.node) == leader) {
        return (Some(peer.ahead_ms), format!("{}, which leads", peer.name));
    }
    let mut sorted: Vec<&Peer> = peers.iter().collect();
    sorted.sort_by_key(|peer| peer.ahead_ms);
    match sorted.get(sorted.len() / 2) {
        Some(peer) => (Some(peer.ahead_ms), peer.name.clone()),
        None => (None, "no other node".to_owned()),
    }
}

async fn volumes(member: &Member, state: &ClusterState) -> Vec<Finding> {
    let here: Vec<_> = state
        .volumes
        .values()
        .filter(|volume| volume.reaches(member.node))
        .collect();
    if here.is_empty() {
        return vec![Finding::ok("volumes", "the cluster has none for this node")];
    }
    let broker_uid = state
        .cluster
        .as_ref()
        .map_or(0, |cluster| cluster.broker_uid);
    let mut findings = Vec::new();
    for together in here.chunks(VOLUMES_TOGETHER) {
        let looks = together.iter().map(|volume| async move {
            let request = ProbeVolumeRequest {
                url: volume.url.clone(),
                cluster_id: member.cluster_id().to_owned(),
                broker_uid,
                tls_ca: volume.tls_ca.clone().unwrap_or_default(),
                ..Default::default()
            };
            let probe = member.broker.probe_volume(request).await;
            let probe = probe.map_err(|error| error.to_string());
            super::volume(
                volume.name.as_str(),
                &volume.url,
                member.cluster_id(),
                &probe,
            )
        });
        findings.extend(futures::future::join_all(looks).await);
    }
    findings
}

fn monitors(member: &Member) -> Vec<MonitorChecked> {
    let table = member.monitors.table().borrow().clone();
    let groups = &member.monitors.confiner().groups;
    let mut monitors: Vec<MonitorChecked> = table
        .values()
        .map(|monitor| MonitorChecked {
            vm: monitor.vm(),
            pid: monitor.pid,
            measures: confinement::measures(
                &monitor.status.measures,
                monitor.name(),
                groups,
                &Seen::of(monitor.pid),
            ),
        })
        .collect();
    monitors.sort_by_key(|monitor| (monitor.vm, monitor.pid));
    monitors
}

impl From<Finding> for proto::admin::Finding {
    fn from(finding: Finding) -> proto::admin::Finding {
        let state: State = finding.state;
        proto::admin::Finding {
            name: finding.name,
            state: state.as_str().into(),
            detail: finding.detail,
            r#try: finding.advice,
        }
    }
}

impl From<Measure> for proto::admin::MeasureView {
    fn from(measure: Measure) -> proto::admin::MeasureView {
        proto::admin::MeasureView {
            name: measure.name,
            applied: measure.applied,
            detail: measure.detail,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(node: u64, ahead_ms: i64) -> Peer {
        Peer {
            node: NodeId(node),
            name: format!("n{node}"),
            facts: HostFactsReply::default(),
            ahead_ms,
        }
    }

    #[test]
    fn a_clock_is_compared_with_the_leaders_and_a_leaders_with_the_middle_one() {
        let peers = [peer(2, 9_000), peer(3, 5), peer(4, -7)];
        let told = |leader| reference(&peers, leader);
        assert_eq!(
            told(Some(NodeId(2))),
            (Some(9_000), "n2, which leads".into())
        );
        for leader in [Some(NodeId(1)), None] {
            assert_eq!(told(leader), (Some(5), "n3".into()));
        }
        assert_eq!(reference(&[], None).0, None);
    }

    #[tokio::test]
    async fn a_clock_that_agrees_is_found_to_agree() {
        let clock = Clock::default();
        let theirs = clock.clone();
        let answer = timed(
            &clock,
            async move { Some((theirs.wall_ms() + 5_000, "facts")) },
        )
        .await;
        let (facts, ahead_ms) = answer.unwrap();
        assert_eq!(facts, "facts");
        assert!((4_900..=5_100).contains(&ahead_ms), "{ahead_ms}");
    }
}
