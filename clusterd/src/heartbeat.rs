//! The node's side of its lease: registers, renews, and passes each renewal on to its monitors.
//!
//! ```text
//!  sent ──► leader ──► quorum ──► reply(lease, read index) ──► applied here? ──► monitors' deadlines
//!    └── the lease counts from here, on CLOCK_BOOTTIME
//! ```
//! A renewal reaches the monitors only after this replica has applied what the leader had when it
//! granted: a machine that was taken from this node meanwhile is not among those that go on.
//!
//! After a planned absence the monitors still hold the deadline that it gave them. This life moves each back
//! to its own lease, and tells the log that the absence is over when all have said so.

use std::sync::Arc;
use std::time::Duration;

use cluster_model::{Command, Grant, Liveness};
use proto::peer::peer_client::PeerClient;
use proto::peer::{HeartbeatReply, HeartbeatRequest};
use tokio::task::JoinSet;

use crate::leader;
use crate::member::Member;
use crate::monitors::Monitor;
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

/// An answered heartbeat; no grant if it was refused, or this replica cannot use it.
struct Beat {
    sequence: u64,
    grant: Option<Grant>,
}

/// What is under way for the monitors, and on the way back from an absence.
#[derive(Default)]
struct Calls {
    /// Deadlines that are being moved on.
    extensions: JoinSet<()>,
    /// Deadlines that are being moved back; those that were, by nonce.
    shortenings: JoinSet<Option<u64>>,
    /// The end of an absence, on its way into the log: one at a time.
    returning: JoinSet<()>,
}

/// Renews the lease for as long as its task lives.
pub async fn renew(member: Arc<Member>) {
    let mut reporter = Reporter::default();
    let mut beats: JoinSet<Beat> = JoinSet::new();
    let mut calls = Calls::default();
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
                if member.held().deadline_ns() != 0 || !up { continue }
            }
            Some(beat) = beats.join_next() => {
                if let Ok(beat) = beat {
                    take_in(&member, &beat, &mut calls);
                }
                continue;
            }
            Some(_) = calls.extensions.join_next() => continue,
            Some(shortened) = calls.shortenings.join_next() => {
                if let Ok(Some(nonce)) = shortened {
                    member.held().shortened(nonce);
                    come_back(&member, &mut calls);
                }
                continue;
            }
            Some(_) = calls.returning.join_next() => continue,
        }
        next = tokio::time::Instant::now() + interval(&member);
        if beats.len() >= BEATS_MAX {
            continue;
        }
        let report = serde_json::to_vec(&reporter.report(&member)).unwrap_or_default();
        let sequence = member.held().sending(member.clock.boottime_ns());
        let request = HeartbeatRequest {
            node_id: member.node.0,
            incarnation: member.incarnation.0,
            sequence,
            report,
            applied: member.raft.applied().unwrap_or_default(),
        };
        let member = member.clone();
        beats.spawn(async move {
            let grant = match ask(&member, request).await {
                Some(reply) => usable(&member, reply).await,
                None => None,
            };
            Beat { sequence, grant }
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

/// The grant of a reply, once this replica has applied what it needs.
async fn usable(member: &Member, reply: HeartbeatReply) -> Option<Grant> {
    if reply.lease_ms == 0 {
        metrics::counter!("clusterd_lease_refusals_total").increment(1);
        tracing::debug!(why = reply.refused, "no lease");
        return None;
    }
    if let Err(error) = member.raft.wait_applied(reply.read_index, CATCH_UP).await {
        tracing::warn!(%error, "the lease was granted, but this replica lags behind the grant");
        return None;
    }
    Some(Grant {
        lease_ms: reply.lease_ms,
    })
}

fn take_in(member: &Arc<Member>, beat: &Beat, calls: &mut Calls) {
    let Some(grant) = beat.grant else { return };
    let Some(deadline_ns) = member.held().granted(beat.sequence, grant) else {
        return;
    };
    publish(member, deadline_ns);
    extend_monitors(member, deadline_ns, &mut calls.extensions);
    come_back(member, calls);
}

/// On the way back from an absence: moves back what was not yet, and says when nothing is left.
fn come_back(member: &Arc<Member>, calls: &mut Calls) {
    let state = member.state();
    let Some(me) = state.nodes.get(&member.node) else {
        return;
    };
    let Some(session) = *member.session_since.borrow() else {
        return;
    };
    let now_ns = member.clock.boottime_ns();
    let table = member.monitors.table().borrow().clone();
    let mut lease = member.held();
    lease.retain(|nonce| table.contains_key(&nonce));
    if let Some(deadline_ns) = lease.shorten_to(me, now_ns) {
        for (&nonce, monitor) in table
            .iter()
            .filter(|(nonce, _)| lease.is_to_shorten(**nonce))
        {
            if calls.shortenings.len() >= EXTENSIONS_MAX {
                break;
            }
            let monitor = monitor.clone();
            calls.shortenings.spawn(async move {
                match monitor.shorten_lease(deadline_ns, session.0).await {
                    Ok(()) => Some(nonce),
                    Err(error) => {
                        tracing::info!(%error, "a deadline was not moved back yet");
                        None
                    }
                }
            });
        }
    }
    let end = lease.returned(me, table.keys().copied(), now_ns);
    drop(lease);
    if let Some(end) = end
        && calls.returning.is_empty()
    {
        let member = member.clone();
        calls.returning.spawn(async move {
            match member.propose_own(end).await {
                Ok(_) => tracing::info!("the announced absence is over"),
                Err(error) => {
                    tracing::warn!(%error, "the end of the absence is not in the log yet")
                }
            }
        });
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
        view.deadline_ns = deadline_ns;
    });
}

/// Moves the deadline of every monitor whose machine this node owns as far as it knows.
fn extend_monitors(member: &Member, deadline_ns: u64, extensions: &mut JoinSet<()>) {
    let session = member.session();
    for monitor in own_monitors(member) {
        if extensions.len() >= EXTENSIONS_MAX {
            return;
        }
        extensions.spawn(async move {
            if let Err(error) = monitor.extend_lease(deadline_ns, session).await {
                tracing::debug!(%error, "a deadline was not moved");
            }
        });
    }
}

fn own_monitors(member: &Member) -> Vec<Monitor> {
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
    member
        .propose_own(Command::Absent {
            node: member.node,
            incarnation: member.incarnation,
            duration_ms,
        })
        .await?;
    let now_ns = member.clock.boottime_ns();
    let Some(deadline_ns) = member.held().absence_committed(now_ns, duration_ms) else {
        return Ok(());
    };
    // For the monitors alone. Were it published, a flow that has not quite ended could make a run permit of it, and a permit
    // that comes late to its monitor would undo what the next life has moved back.
    let session = member.session();
    let extended = own_monitors(member).into_iter().map(|monitor| async move {
        if let Err(error) = monitor.extend_lease(deadline_ns, session).await {
            tracing::warn!(%error, "a guest will pause while clusterd is away");
        }
    });
    futures::future::join_all(extended).await;
    Ok(())
}
