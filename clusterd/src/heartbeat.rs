//! The node's side of its lease: registers, renews, and passes each renewal on to its monitors.
//!
//! ```text
//!  sent ──► leader ──► quorum ──► reply(lease, read index) ──► applied here? ──► monitors' deadlines
//!    └── the lease counts from here, on CLOCK_BOOTTIME
//! ```
//! A renewal reaches the monitors only after this replica has applied what the leader had when it
//! granted: a machine that was taken from this node meanwhile is not among those that go on.

use std::sync::Arc;
use std::time::Duration;

use cluster_model::{Command, Grant, Liveness, NodeLease};
use proto::peer::peer_client::PeerClient;
use proto::peer::{HeartbeatReply, HeartbeatRequest};
use tokio::task::JoinSet;

use crate::leader;
use crate::member::{LeaseView, Member};
use crate::report::Reporter;

/// Heartbeats under way at once: a slow leader must not keep the node from asking its successor.
const BEATS_MAX: usize = 8;
/// The histogram of how long a renewal takes, seconds.
pub const RENEWALS: &str = "clusterd_lease_renew_duration_seconds";
/// How long a granted node waits for its replica to catch up with the grant.
const CATCH_UP: Duration = Duration::from_secs(2);
/// A registration that failed is tried again after this pause.
const REGISTER_PAUSE: Duration = Duration::from_millis(300);
/// Without a cluster's settings yet.
const FIRST_INTERVAL: Duration = Duration::from_millis(300);
/// Monitors' deadlines that are being moved at once.
const EXTENSIONS_MAX: usize = 4_096;

/// Registers this life of the node, and again whenever the log counts it as lost.
pub async fn register(member: Arc<Member>) {
    let mut state = member.raft.state();
    loop {
        let due = {
            let state = state.borrow_and_update();
            let known = state.nodes.get(&member.node).filter(|known| {
                member.session_since.borrow().is_none()
                    || known.incarnation != member.incarnation
                    || matches!(known.liveness, Liveness::Joining | Liveness::Lost)
            });
            known.map(|known| known.incarnation)
        };
        let Some(replaces) = due else {
            if state.changed().await.is_err() {
                return;
            }
            continue;
        };
        let command = Command::RegisterNode {
            node: member.node,
            incarnation: member.incarnation,
            replaces,
            address: member.config.advertise.clone(),
            facts: member.config.facts(),
        };
        match member.propose_own(command).await {
            Ok((index, _)) => {
                tracing::info!(node = %member.node, entry = %index, "registered");
                // The first one of this life counts: what lies before it an earlier life may have begun.
                member.session_since.send_if_modified(|since| {
                    let first = since.is_none();
                    if first {
                        *since = Some(index);
                    }
                    first
                });
            }
            Err(error) => {
                tracing::warn!(%error, "not registered yet");
                tokio::time::sleep(REGISTER_PAUSE).await;
            }
        }
    }
}

struct Beat {
    sequence: u64,
    reply: Option<HeartbeatReply>,
}

/// Renews the lease for as long as its task lives.
pub async fn renew(member: Arc<Member>) {
    let mut lease = NodeLease::default();
    let mut reporter = Reporter::default();
    let mut beats: JoinSet<Beat> = JoinSet::new();
    let mut extensions: JoinSet<()> = JoinSet::new();
    let mut leadership = member.raft.leadership();
    let mut state = member.raft.state();
    let mut next = tokio::time::Instant::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(next) => {}
            // A new leader is asked at once: it knows nothing of this node's lease.
            changed = leadership.changed() => if changed.is_err() { return },
            // Granted anew as soon as the log counts this node as living.
            changed = state.changed() => {
                if changed.is_err() { return }
                state.mark_unchanged();
                let up = member.state().nodes.get(&member.node)
                    .is_some_and(|known| known.liveness == Liveness::Up);
                if lease.deadline_ns() != 0 || !up { continue }
            }
            Some(beat) = beats.join_next() => {
                if let Ok(beat) = beat {
                    take_in(&member, &mut lease, beat, &mut extensions).await;
                }
                continue;
            }
            Some(_) = extensions.join_next() => continue,
        }
        next = tokio::time::Instant::now() + interval(&member);
        if beats.len() >= BEATS_MAX {
            continue;
        }
        let report = serde_json::to_vec(&reporter.report(&member)).unwrap_or_default();
        let sequence = lease.sending(member.clock.boottime_ns());
        let request = HeartbeatRequest {
            node_id: member.node.0,
            incarnation: member.incarnation.0,
            sequence,
            report,
        };
        let member = member.clone();
        beats.spawn(async move {
            let reply = ask(&member, request).await;
            Beat { sequence, reply }
        });
    }
}

fn interval(member: &Member) -> Duration {
    let state = member.state();
    if state.cluster.is_none() || member.lease.borrow().deadline_ns == 0 {
        return FIRST_INTERVAL;
    }
    Duration::from_millis(u64::from(state.settings.heartbeat_ms))
}

async fn ask(member: &Arc<Member>, request: HeartbeatRequest) -> Option<HeartbeatReply> {
    let begun = std::time::Instant::now();
    let reply = answer_to(member, request).await?;
    metrics::histogram!(RENEWALS).record(begun.elapsed().as_secs_f64());
    Some(reply)
}

async fn answer_to(member: &Arc<Member>, request: HeartbeatRequest) -> Option<HeartbeatReply> {
    let leader = member.raft.leadership().borrow().clone();
    if leader.is_me {
        return Some(leader::answer(member, request).await);
    }
    let channel = member.dialer.channel(leader.address.as_deref()?).ok()?;
    let mut client =
        PeerClient::new(channel).max_encoding_message_size(crate::net::MESSAGE_BYTES_MAX);
    // A reply later than the lease's length grants nothing.
    let patience = Duration::from_millis(u64::from(member.state().settings.freeze_ms));
    match tokio::time::timeout(patience, client.heartbeat(request)).await {
        Ok(Ok(reply)) => Some(reply.into_inner()),
        Ok(Err(status)) => {
            tracing::debug!(leader = ?leader.leader, status = status.message(), "a heartbeat failed");
            None
        }
        Err(_) => None,
    }
}

async fn take_in(
    member: &Arc<Member>,
    lease: &mut NodeLease,
    beat: Beat,
    extensions: &mut JoinSet<()>,
) {
    let Some(reply) = beat.reply else { return };
    if reply.lease_ms == 0 {
        metrics::counter!("clusterd_lease_refusals_total").increment(1);
        tracing::debug!(why = reply.refused, "no lease");
        return;
    }
    if let Err(error) = member.raft.wait_applied(reply.read_index, CATCH_UP).await {
        tracing::warn!(%error, "the lease was granted, but this replica lags behind the grant");
        return;
    }
    let grant = Grant {
        lease_ms: reply.lease_ms,
    };
    if let Some(deadline_ns) = lease.granted(beat.sequence, grant) {
        publish(member, deadline_ns);
        extend_monitors(member, deadline_ns, extensions);
    }
}

fn publish(member: &Member, deadline_ns: u64) {
    let now_ns = member.clock.boottime_ns();
    member.lease.send_modify(|view| {
        let slack_ns = view.deadline_ns.saturating_sub(now_ns);
        if view.deadline_ns != 0 {
            view.slack_ms = Some(slack_ns / 1_000_000);
            metrics::gauge!("clusterd_lease_slack_seconds").set(slack_ns as f64 / 1e9);
            if slack_ns == 0 {
                tracing::warn!("the lease had run out; it is back");
                metrics::counter!("clusterd_lease_expirations_total").increment(1);
            }
        }
        // Never backwards: an announced absence may have moved it further.
        view.deadline_ns = view.deadline_ns.max(deadline_ns);
    });
}

/// Moves the deadline of every monitor whose machine this node owns as far as it knows.
fn extend_monitors(member: &Member, deadline_ns: u64, extensions: &mut JoinSet<()>) {
    for monitor in own_monitors(member) {
        if extensions.len() >= EXTENSIONS_MAX {
            return;
        }
        extensions.spawn(async move {
            if let Err(error) = monitor.extend_lease(deadline_ns).await {
                tracing::debug!(%error, "a deadline was not moved");
            }
        });
    }
}

fn own_monitors(member: &Member) -> Vec<crate::monitors::Monitor> {
    let state = member.state();
    let table = member.monitors.table().borrow().clone();
    table
        .values()
        .filter(|monitor| {
            state
                .vms
                .get(&monitor.vm())
                .is_some_and(|vm| vm.ownership.owner == Some(member.node))
        })
        .cloned()
        .collect()
}

/// A planned stop: the log says that this node's `clusterd` will be away for `duration`, and then its
/// monitors may run on that much longer. Call it when nothing renews any more.
///
/// # Errors
/// Says why the guests will pause when their lease runs out.
pub async fn announce_absence(
    member: &Member,
    duration: Duration,
) -> Result<(), crate::member::CommandError> {
    let duration_ms = u32::try_from(duration.as_millis())
        .unwrap_or(u32::MAX)
        .min(cluster_model::ABSENT_MS_MAX);
    let view = *member.lease.borrow();
    member
        .propose_own(Command::Absent {
            node: member.node,
            incarnation: member.incarnation,
            duration_ms,
        })
        .await?;
    if view.deadline_ns <= member.clock.boottime_ns() {
        return Ok(());
    }
    let deadline_ns = view.deadline_ns + u64::from(duration_ms) * 1_000_000;
    member
        .lease
        .send_modify(|view: &mut LeaseView| view.deadline_ns = deadline_ns);
    let extended = own_monitors(member).into_iter().map(|monitor| async move {
        if let Err(error) = monitor.extend_lease(deadline_ns).await {
            tracing::warn!(%error, "a guest will pause while clusterd is away");
        }
    });
    futures::future::join_all(extended).await;
    Ok(())
}
