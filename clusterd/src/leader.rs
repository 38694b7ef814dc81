//! The leader's side of leases: answers heartbeats, keeps what they report, declares nodes lost.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cluster_model::{Command, Envelope, Incarnation, LeaseTable, NodeId, Reply, RequestId};
use proto::peer::{HeartbeatReply, HeartbeatRequest};
use tokio::sync::watch;

use crate::member::Member;
use crate::raft::ProposeError;
use crate::report::{NodeReport, Reports};

/// How long the leader's own replica may take to catch up with its confirm.
const CATCH_UP: Duration = Duration::from_secs(2);
/// The leader looks for lost nodes at least this often...
const LOOK: Duration = Duration::from_millis(100);
/// ...and if it could not for this long it stood still itself, and everybody gets the full time again.
const STOOD_STILL_NS: u64 = 1_500_000_000;

/// What a node keeps for when it leads.
#[derive(Debug)]
pub struct Leader {
    term: Mutex<Option<Term>>,
    reports: watch::Sender<Reports>,
}

#[derive(Debug)]
struct Term {
    number: u64,
    table: LeaseTable,
    /// Nodes whose loss is proposed and not answered: they are granted nothing.
    condemned: BTreeSet<NodeId>,
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

    /// Works on the table of a term, made anew for a newer term than before; `None` for an older one.
    fn with_term<T>(
        &self,
        number: u64,
        now_ns: u64,
        work: impl FnOnce(&mut Term) -> T,
    ) -> Option<T> {
        let mut term = self.term.lock().unwrap_or_else(PoisonError::into_inner);
        let known = term.as_ref().map(|term| term.number);
        if known.is_none_or(|known| known < number) {
            *term = Some(Term {
                number,
                table: LeaseTable::new(now_ns),
                condemned: BTreeSet::new(),
            });
        }
        term.as_mut().filter(|term| term.number == number).map(work)
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
    let granted = member.leader.with_term(confirmed.term, now_ns, |term| {
        if term.condemned.contains(&node) {
            return Err(format!("{node} is being declared lost"));
        }
        term.table
            .grant(
                &state,
                node,
                Incarnation(request.incarnation),
                received_ns,
                confirmed_ns,
                now_ns,
            )
            .map_err(|refusal| refusal.to_string())
    });
    match granted {
        Some(Ok(grant)) => HeartbeatReply {
            lease_ms: grant.lease_ms,
            refused: String::new(),
            leader_id: member.node.0,
            read_index: confirmed.index,
        },
        Some(Err(why)) => refuse(why),
        None => refuse("this node has led in a newer term since".to_owned()),
    }
}

/// Declares nodes lost while this node leads.
pub async fn declare_lost(member: Arc<Member>) {
    let mut last_look_ns = member.clock.boottime_ns();
    loop {
        tokio::time::sleep(LOOK).await;
        let now_ns = member.clock.boottime_ns();
        let stood_still = now_ns.saturating_sub(last_look_ns) > STOOD_STILL_NS;
        last_look_ns = now_ns;
        let leadership = member.raft.leadership().borrow().clone();
        if !leadership.is_me {
            continue;
        }
        let state = member.state();
        let lost = member.leader.with_term(leadership.term, now_ns, |term| {
            if stood_still {
                tracing::warn!("this leader stood still; every node gets the full time again");
                term.table = LeaseTable::new(now_ns);
            }
            let lost = term.table.lost(&state, now_ns);
            for command in &lost {
                if let Command::NodeLost { node, .. } = command {
                    term.condemned.insert(*node);
                }
            }
            lost
        });
        for command in lost.unwrap_or_default() {
            declare(&member, leadership.term, command).await;
        }
        last_look_ns = member.clock.boottime_ns();
    }
}

async fn declare(member: &Arc<Member>, term: u64, command: Command) {
    let Command::NodeLost {
        node, incarnation, ..
    } = command
    else {
        return;
    };
    tracing::warn!(%node, "declaring a node lost");
    // One id for one loss: an answer that was lost may be asked for again.
    let request = RequestId(format!(
        "lost/{node}/{incarnation}/term-{term}/{}",
        member.state().applied.0
    ));
    // Here alone, and in the term in which it was seen: another leader may have renewed that lease since.
    let envelope = Envelope {
        request,
        actor: "controller/leases".to_owned(),
        at_ms: member.clock.wall_ms(),
        asked: None,
        command,
    };
    loop {
        match member.raft.propose_in_term(term, &envelope).await {
            Ok(applied) => {
                match applied.reply {
                    Reply::Done { .. } => {
                        metrics::counter!("clusterd_nodes_lost_total").increment(1);
                    }
                    Reply::Rejected(why) => tracing::warn!(%node, %why, "the log refused a loss"),
                }
                break;
            }
            Err(error @ ProposeError::Unknown { .. }) => {
                tracing::warn!(%node, %error, "whether a loss is recorded is not known yet");
            }
            // Another leader looks anew; a log that has stopped records nothing more.
            Err(error) => {
                tracing::warn!(%node, %error, "a loss is not recorded");
                break;
            }
        }
        tokio::time::sleep(LOOK).await;
    }
    let now_ns = member.clock.boottime_ns();
    member
        .leader
        .with_term(term, now_ns, |term| term.condemned.remove(&node));
}
