//! What the leader does by itself: it looks at the state, plans with the pure planners, and proposes.
//!
//! A controller keeps nothing between two looks but timers, and acts only through the log. Its request ids
//! name the decision and the entry it was taken at, so two nodes that both take themselves for the leader
//! and decide the same ask for the same thing once.

mod membership;
mod planners;

pub use membership::run as membership;
pub use planners::run as planners;

use std::sync::Arc;

use cluster_model::{ClusterState, Command, decision};

use crate::member::Member;

/// Whether this node leads, with a state that holds everything its predecessors committed.
///
/// `led` is the term for which that was made sure of before.
async fn leads(member: &Member, led: &mut u64) -> bool {
    let leadership = member.raft.leadership().borrow().clone();
    if !leadership.is_me {
        return false;
    }
    if *led != leadership.term {
        if member.raft.read_index().await.is_err() {
            return false;
        }
        *led = leadership.term;
    }
    true
}

/// Proposes a controller's command, decided in `state` by the leader of `term`.
async fn propose(
    member: &Arc<Member>,
    term: u64,
    state: &ClusterState,
    controller: &str,
    command: Command,
) {
    let request = decision::request_id(controller, &command, state);
    let what = request.0.clone();
    let actor = format!("controller/{controller}");
    match member.propose_in_term(term, &actor, request, command).await {
        Ok((index, _)) => tracing::info!(what, entry = %index, "decided"),
        // Somebody was faster, or the state has moved on: the next look sees it.
        Err(error) => tracing::info!(what, %error, "not decided"),
    }
}
