//! The leader's side of leases: answers heartbeats, keeps what they report, proposes losses. What it grants
//! and whom it takes for lost is [`cluster_model::Term`]'s to decide.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cluster_model::{
    Envelope, Heartbeat, Incarnation, LogIndex, Loss, LossOutcome, NodeId, Reply, Term,
};
use proto::peer::{HeartbeatReply, HeartbeatRequest};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::member::Member;
use crate::raft::ProposeError;
use crate::report::{NodeReport, Reports};

/// How long the leader's own replica may take to catch up with its confirm.
const CATCH_UP: Duration = Duration::from_secs(2);
/// The leader looks for lost nodes this often.
const LOOK: Duration = Duration::from_millis(100);

/// What a node keeps for when it leads.
#[derive(Debug)]
pub struct Leader {
    term: Mutex<Option<Term>>,
    reports: watch::Sender<Reports>,
}

impl Default for Leader {
    fn default() -> Leader {
        Leader {
            term: Mutex::default(),
            reports: watch::channel(Arc::new(BTreeMap::new())).0,
        }
    }
}

impl Leader {
    /// What nodes reported to this one while it led.
    pub fn reports(&self) -> watch::Receiver<Reports> {
        self.reports.subscribe()
    }

    /// Works on what is known in a term, made anew for a newer term than before; `None` for an older one.
    fn with_term<T>(
        &self,
        number: u64,
        now_ns: u64,
        work: impl FnOnce(&mut Term) -> T,
    ) -> Option<T> {
        let mut term = self.term.lock().unwrap_or_else(PoisonError::into_inner);
        if term.as_ref().is_none_or(|known| known.number() < number) {
            *term = Some(Term::new(number, now_ns));
        }
        term.as_mut()
            .filter(|term| term.number() == number)
            .map(work)
    }
}

/// Answers a heartbeat: grants only after a quorum has confirmed this leader since it came.
pub async fn answer(member: &Arc<Member>, request: HeartbeatRequest) -> HeartbeatReply {
    let received_ns = member.clock.boottime_ns();
    let node = NodeId(request.node_id);
    match serde_json::from_slice::<NodeReport>(&request.report) {
        Ok(mut report) if member.state().nodes.contains_key(&node) => {
            report.received_ns = received_ns;
            member.leader.reports.send_modify(|reports| {
                Arc::make_mut(reports).insert(node, report);
            });
        }
        Ok(_) => {}
        Err(error) => tracing::debug!(%node, %error, "a report is malformed"),
    }
    let refuse = |why: String| HeartbeatReply {
        refused: why,
        leader_id: member.raft.leader().map_or(0, |leader| leader.0),
        ..HeartbeatReply::default()
    };
    let confirmed_ns = member.clock.boottime_ns();
    let confirmed = match member.raft.confirm_leadership().await {
        Ok(confirmed) => confirmed,
        Err(error) => return refuse(error.to_string()),
    };
    if let Err(error) = member.raft.wait_applied(confirmed.index, CATCH_UP).await {
        return refuse(error.to_string());
    }
    let state = member.state();
    let now_ns = member.clock.boottime_ns();
    let heartbeat = Heartbeat {
        node,
        incarnation: Incarnation(request.incarnation),
        applied: LogIndex(request.applied),
        received_ns,
        confirmed_ns,
        needs: LogIndex(confirmed.index),
    };
    let granted = member.leader.with_term(confirmed.term, now_ns, |term| {
        term.grant(&state, &heartbeat, now_ns)
    });
    match granted {
        Some(Ok(grant)) => HeartbeatReply {
            lease_ms: grant.lease_ms,
            refused: String::new(),
            leader_id: member.node.0,
            read_index: confirmed.index,
        },
        Some(Err(refusal)) => refuse(refusal.to_string()),
        None => refuse("this node has led in a newer term since".to_owned()),
    }
}

/// Declares nodes lost while this node leads. Losses go into the log side by side: one without an answer
/// keeps nobody from looking.
pub async fn declare_lost(member: Arc<Member>) {
    let mut losses = JoinSet::new();
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            Some(_) = losses.join_next() => continue,
        }
        let leadership = member.raft.leadership().borrow().clone();
        if !leadership.is_me {
            continue;
        }
        let state = member.state();
        let now_ns = member.clock.boottime_ns();
        let look = member
            .leader
            .with_term(leadership.term, now_ns, |term| term.look(&state, now_ns))
            .unwrap_or_default();
        if look.stood_still {
            tracing::warn!("this leader stood still; every node gets the full time again");
        }
        for loss in look.losses {
            losses.spawn(declare(member.clone(), leadership.term, loss));
        }
    }
}

async fn declare(member: Arc<Member>, term: u64, loss: Loss) {
    let node = loss.node;
    tracing::warn!(%node, "declaring a node lost");
    // Here alone, and in the term in which it was seen: another leader may have renewed that lease since.
    let envelope = Envelope {
        request: loss.request.clone(),
        actor: "controller/leases".to_owned(),
        at_ms: member.clock.wall_ms(),
        asked: None,
        command: loss.command.clone(),
    };
    let outcome = match member.raft.propose_in_term(term, &envelope).await {
        Ok(applied) => match applied.reply {
            Reply::Done { .. } => {
                metrics::counter!("clusterd_nodes_lost_total").increment(1);
                LossOutcome::Recorded
            }
            Reply::Rejected(why) => {
                tracing::warn!(%node, %why, "the log refused a loss");
                LossOutcome::Refused
            }
        },
        Err(
            error @ (ProposeError::Unknown { .. }
            | ProposeError::Malformed { .. }
            | ProposeError::Stopped { .. }),
        ) => {
            tracing::warn!(%node, %error, "whether a loss is recorded is not known yet");
            LossOutcome::Unknown
        }
        // Another leader looks anew.
        Err(error @ (ProposeError::NotLeader { .. } | ProposeError::TooLarge { .. })) => {
            tracing::warn!(%node, %error, "a loss is not recorded");
            LossOutcome::Refused
        }
    };
    let now_ns = member.clock.boottime_ns();
    member.leader.with_term(term, now_ns, |known| {
        known.loss_answered(&loss, outcome, now_ns);
    });
}
