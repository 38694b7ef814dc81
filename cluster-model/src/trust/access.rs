//! Who asks, and whether they may: the one place that decides over calls of the admin API.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;

use crate::ids::{Name, NodeId};
use crate::state::{ClusterState, Vm, VmSpec};
use crate::trust::call::Reach;
use crate::trust::{Call, Role, Sha256};

/// Who asks, as the edge that took the request has proved it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// Over the node's own socket, which only its service and root can open: may do everything.
    Local {
        /// The kernel's word for it.
        uid: u32,
    },
    /// A node, by its certificate, for itself: it only looks. With a person's call it passes on what the person
    /// showed, and then it is the person who asks; what it may hand to the leader says
    /// [`ClusterState::may_propose`].
    Node(NodeId),
    /// Whoever showed an access token.
    Bearer(Bearer),
    /// A trusted cluster, by a certificate that leads to its root: its machines may come, it may call nothing.
    Foreign(Name),
    /// Whoever showed nothing that holds.
    Nobody,
}

/// What an access token says of whoever shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bearer {
    /// The token's id.
    pub token: String,
    /// Whose it is.
    pub user: Name,
    /// What they may do.
    pub role: Role,
    /// To machines with one of these tags; empty: to all, and to the cluster.
    pub tags: BTreeSet<Name>,
}

impl Who {
    /// What they may do at most, if anything.
    pub fn role(&self) -> Option<Role> {
        match self {
            Who::Local { .. } => Some(Role::Admin),
            Who::Node(_) => Some(Role::Viewer),
            Who::Bearer(bearer) => Some(bearer.role),
            Who::Foreign(_) | Who::Nobody => None,
        }
    }

    /// The tags that they are narrowed to, if they are.
    pub fn narrowed_to(&self) -> Option<&BTreeSet<Name>> {
        match self {
            Who::Bearer(bearer) if !bearer.tags.is_empty() => Some(&bearer.tags),
            Who::Bearer(_) | Who::Local { .. } | Who::Node(_) | Who::Foreign(_) | Who::Nobody => {
                None
            }
        }
    }

    /// Whether a list shows them this machine, and what is about it.
    pub fn sees(&self, vm: &Vm) -> bool {
        self.role().is_some()
            && self
                .narrowed_to()
                .is_none_or(|tags| !tags.is_disjoint(&vm.spec.tags))
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::Local { uid } => write!(f, "the local user {uid}"),
            Who::Node(node) => write!(f, "{node}"),
            Who::Bearer(bearer) => write!(f, "{} ({})", bearer.user, bearer.role.as_str()),
            Who::Foreign(cluster) => write!(f, "the cluster `{cluster}`"),
            Who::Nobody => f.write_str("a caller without a token"),
        }
    }
}

/// What would let a refused caller do it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Needs {
    /// A token of that role, or of a higher one.
    Role(Role),
    /// The caller's token is narrowed to these tags, and the machine has none of them (or there is none:
    /// which of both is not said).
    Tags(BTreeSet<Name>),
    /// A token that is not narrowed.
    Unnarrowed(BTreeSet<Name>),
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |tags: &BTreeSet<Name>| {
            let tags: Vec<&str> = tags.iter().map(Name::as_str).collect();
            tags.join(", ")
        };
        match self {
            Needs::Role(role) => write!(
                f,
                "it takes the role {0}; ask an admin for a token: clusterctl token create --role {0}",
                role.as_str()
            ),
            Needs::Tags(tags) => write!(
                f,
                "the token is for machines tagged {} only; choose one of those, or ask an admin for a token with another tag",
                list(tags)
            ),
            Needs::Unnarrowed(tags) => write!(
                f,
                "the token is for machines tagged {} only; it takes a token without tags",
                list(tags)
            ),
        }
    }
}

/// Who may not do what, and what would let them. Says nothing about what exists.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{who} may not call {call}: {needs}")]
pub struct Denied {
    /// Who asked, in words.
    pub who: String,
    /// For what.
    pub call: Call,
    /// What would let them.
    pub needs: Needs,
}

/// Whether somebody may make a call, on that machine if it is about one.
///
/// A list is asked for with no machine and shows what [`Who::sees`]. A machine that is to be created is none
/// yet: [`authorise_new`].
///
/// # Errors
/// Who may not do what, and what role or tag would do.
pub fn authorise(who: &Who, call: Call, on: Option<&Vm>) -> Result<(), Denied> {
    authorise_tagged(who, call, on.map(|vm| &vm.spec.tags))
}

/// Whether somebody may create such a machine.
///
/// # Errors
/// As [`authorise`]: whose token is narrowed to tags may only create machines that carry one of them.
pub fn authorise_new(who: &Who, spec: &VmSpec) -> Result<(), Denied> {
    authorise_tagged(who, Call::VmCreate, Some(&spec.tags))
}

pub(super) fn authorise_tagged(
    who: &Who,
    call: Call,
    machine: Option<&BTreeSet<Name>>,
) -> Result<(), Denied> {
    let denied = |needs| {
        Err(Denied {
            who: who.to_string(),
            call,
            needs,
        })
    };
    if who.role() < Some(call.role()) {
        return denied(Needs::Role(call.role()));
    }
    let Some(tags) = who.narrowed_to() else {
        return Ok(());
    };
    let touches = machine.map(|machine| !machine.is_disjoint(tags));
    match (call.reach(), touches) {
        (Reach::Look, None | Some(true)) | (Reach::Machine, Some(true)) => Ok(()),
        (Reach::Look, Some(false)) | (Reach::Machine, None | Some(false)) => {
            denied(Needs::Tags(tags.clone()))
        }
        (Reach::Cluster, _) => denied(Needs::Unnarrowed(tags.clone())),
    }
}

/// Why an access token is worth nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefusal {
    /// There is no such token, or that is not its secret: which of both is not said.
    #[error(
        "this access token is not known here, or was revoked; ask an admin for another one: clusterctl token create"
    )]
    Unknown,
    /// Its time is over.
    #[error("this access token has expired; ask an admin for another one: clusterctl token create")]
    Expired,
}

impl ClusterState {
    /// Who it is that shows an access token, given the hash of the secret they showed.
    ///
    /// A hash is no proof: it stands in every replica. Whoever asks this has hashed the secret itself.
    ///
    /// # Errors
    /// [`TokenRefusal`]; that a token has expired is said to those alone who know its secret.
    pub fn bearer(
        &self,
        token: &str,
        secret_hash: &Sha256,
        now_ms: u64,
    ) -> Result<Who, TokenRefusal> {
        let known = self
            .trust
            .access_tokens
            .get(token)
            .filter(|known| known.secret_hash.matches(secret_hash))
            .ok_or(TokenRefusal::Unknown)?;
        if known.expires_at_ms <= now_ms {
            return Err(TokenRefusal::Expired);
        }
        Ok(Who::Bearer(Bearer {
            token: token.to_owned(),
            user: known.user.clone(),
            role: known.role,
            tags: known.tags.clone(),
        }))
    }
}
