//! Who may call what between nodes: one look at each request, before any service sees it.

use cluster_model::ClusterState;
use cluster_model::trust::Standing;
use tonic::Status;

use super::caller::{Caller, Shown};

/// The services, as their paths begin.
const RAFT: &str = "/baton.peer.v1.Raft/";
const PEER: &str = "/baton.peer.v1.Peer/";
/// Calls of a node that has no certificate, or one that has ended: they bring their own proof.
const OPEN: [&str; 3] = [
    "/baton.peer.v1.Peer/Join",
    "/baton.peer.v1.Peer/JoinCheck",
    "/baton.peer.v1.Peer/Renew",
];

/// Whether `caller` may make the call `path` at all. The admin API looks closer by itself.
///
/// # Errors
/// The answer to give instead.
pub fn judge(state: &ClusterState, caller: &Caller, path: &str) -> Result<(), Status> {
    let (raft, peer) = (path.starts_with(RAFT), path.starts_with(PEER));
    if (!raft && !peer) || OPEN.contains(&path) {
        return Ok(());
    }
    let node = match &caller.shown {
        Shown::Node(identity) => identity.node,
        Shown::Local { .. } | Shown::Foreign(_) | Shown::Nothing => {
            return Err(Status::unauthenticated(
                "this is between the nodes of the cluster; it takes a node's certificate",
            ));
        }
    };
    match state.peer_standing(node) {
        Standing::Member { may_lead } if may_lead || !raft => Ok(()),
        Standing::Member { .. } => Err(Status::permission_denied(format!(
            "{node} has no vote, and so nothing to say in the log's own affairs"
        ))),
        // This replica lags behind the entry that let it in; the certificate says that there is one.
        Standing::NotYetKnown => Ok(()),
        Standing::Removed => Err(Status::permission_denied(format!(
            "{node} was removed from the cluster"
        ))),
    }
}
