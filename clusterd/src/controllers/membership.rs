//! Makes the Raft group follow the log's list of nodes: lets new ones in, chooses voters, drops removed ones.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use cluster_model::membership::{MemberChange, RaftView, members, plan};
use cluster_model::{ClusterState, Command, NodeId, Object, Severity};

use super::{leads, propose};
use crate::member::Member;
use crate::raft::{MembershipError, RaftStatus};
use crate::report;

/// Followers come and go without an entry that says so.
const LOOK: Duration = Duration::from_millis(500);
/// How long a new voter may take to catch up before it is looked at anew.
const CATCH_UP: Duration = Duration::from_secs(2);
/// A follower this many entries behind answers in time.
const LAG_MAX: u64 = 1_000;
/// A node whose last report is older does not answer.
const REPORT_AGE_MAX_MS: u64 = 5_000;

/// Changes the group while this node leads.
pub async fn run(member: Arc<Member>) {
    let mut state = member.raft.state();
    let mut led = 0;
    loop {
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(LOOK) => {}
        }
        state.mark_unchanged();
        if !leads(&member, &mut led).await {
            continue;
        }
        if let Err(error) = step(&member, led).await {
            tracing::info!(%error, "the Raft group was not changed");
            tokio::time::sleep(LOOK).await;
        }
    }
}

async fn step(member: &Arc<Member>, term: u64) -> Result<(), MembershipError> {
    let state = member.state();
    if state.cluster.is_none() {
        return Ok(());
    }
    while let Some(change) = {
        let raft = member.raft.metrics();
        members(&state, &view(member, &raft), &addresses(&raft))
    } {
        carry_out(member, &state, change).await?;
    }
    let view = view(member, &member.raft.metrics());
    let Some(change) = plan(&state, &view) else {
        return Ok(());
    };
    let promoted: Vec<NodeId> = change.voters.difference(&view.voters).copied().collect();
    let demoted: Vec<NodeId> = view.voters.difference(&change.voters).copied().collect();
    // New votes before old ones go: the group is never smaller than both plans say.
    for node in &promoted {
        member.raft.promote(*node, CATCH_UP).await?;
    }
    for node in &demoted {
        member.raft.demote(*node).await?;
    }
    let note = Command::Note {
        objects: promoted
            .iter()
            .chain(&demoted)
            .map(|node| Object::Node(*node))
            .collect(),
        severity: Severity::Info,
        kind: "raft.voters".to_owned(),
        detail: format!(
            "voters: {}",
            change
                .voters
                .iter()
                .map(|&node| state.node_label(node))
                .collect::<Vec<_>>()
                .join(", ")
        ),
        why: change.why,
    };
    propose(member, term, &state, "membership", note).await;
    Ok(())
}

async fn carry_out(
    member: &Member,
    state: &ClusterState,
    change: MemberChange,
) -> Result<(), MembershipError> {
    let raft = &member.raft;
    let known = |id: &NodeId| state.nodes.get(id);
    match change {
        MemberChange::LetIn(id) => {
            if let Some(node) = known(&id) {
                raft.add_learner(id, node.name.as_str(), &node.address)
                    .await?;
                tracing::info!(node = %id, name = %node.name, address = node.address, "let into the Raft group");
            }
        }
        MemberChange::TakeOut(id) => {
            raft.remove(id).await?;
            tracing::info!(node = %id, "taken out of the Raft group");
        }
        MemberChange::Readdress(id) => {
            if let Some(node) = known(&id) {
                raft.readdress(id, node.name.as_str(), &node.address)
                    .await?;
                tracing::info!(node = %id, address = node.address, "the Raft group knows this node's address");
            }
        }
    }
    Ok(())
}

fn addresses(raft: &RaftStatus) -> BTreeMap<NodeId, String> {
    let members = raft.members.iter();
    members
        .map(|(id, status)| (*id, status.address.clone()))
        .collect()
}

fn view(member: &Member, raft: &RaftStatus) -> RaftView {
    let voters: BTreeSet<NodeId> = raft
        .members
        .iter()
        .filter(|(_, status)| status.voter)
        .map(|(id, _)| *id)
        .collect();
    let now_ns = member.clock.boottime_ns();
    let reports = report::aged(&member.leader.reports().borrow(), now_ns);
    let answers = |id: &NodeId| {
        reports
            .get(id)
            .is_some_and(|report| report.age_ms <= REPORT_AGE_MAX_MS)
    };
    let following = raft
        .members
        .iter()
        .filter(|(id, status)| {
            **id == member.node
                || (status.matched.is_some()
                    && status.lag.is_some_and(|lag| lag <= LAG_MAX)
                    && answers(id))
        })
        .map(|(id, _)| *id)
        .collect();
    RaftView {
        leader: member.node,
        voters,
        following,
    }
}
