//! Why a command about trust is refused, each with what to try.
//!
//! Whoever only guesses learns nothing: an unknown token and a wrong secret are one refusal. No refusal
//! carries a secret or its hash.

use serde::{Deserialize, Serialize};

use crate::ids::Name;
use crate::trust::Sha256;

/// Why a command about trust was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum TrustRefusal {
    /// There is no certificate authority yet.
    #[error("the cluster has no certificate authority; try: clusterctl cluster init")]
    NotFounded,
    /// There is one already, and it is another.
    #[error(
        "the cluster has a certificate authority already; to change it: clusterctl cluster ca rotate"
    )]
    AlreadyFounded,
    /// A root or issuing CA that cannot be.
    #[error("the certificate authority cannot be so: {problem}")]
    BadAuthority {
        /// What is wrong and what would be right.
        problem: String,
    },
    /// Somebody rotated it meanwhile.
    #[error(
        "the issuing CA is of generation {is}, not {expected}: it was rotated meanwhile; look: clusterctl cluster ca show"
    )]
    AuthorityMoved {
        /// The generation that the caller believed in.
        expected: u64,
        /// The present one.
        is: u64,
    },
    /// No trusted root has that fingerprint.
    #[error("no trusted root has the fingerprint {fingerprint}; look: clusterctl cluster ca show")]
    UnknownRoot {
        /// As it was asked for.
        fingerprint: Sha256,
    },
    /// Without it nobody would be trusted.
    #[error(
        "this is the only root, every certificate leads to it; make a new one first: clusterctl cluster ca rotate --root"
    )]
    OnlyRoot,
    /// A token's id that cannot be.
    #[error("a token's id has 1 to {max} letters, digits, '-' and '_'")]
    BadTokenId {
        /// The bound, bytes.
        max: u64,
    },
    /// Another token has that id.
    #[error("there is another token with the id {id}; draw a new id and try again")]
    TokenIdTaken {
        /// The id.
        id: String,
    },
    /// A token that would never be good.
    #[error("the token would be worth nothing from the start; give it a longer time: --ttl")]
    ExpiredAtOnce,
    /// Another join token for that name stands.
    #[error(
        "a join token for `{node}` stands already; use it, or revoke it first: clusterctl join-tokens revoke {id}"
    )]
    JoinTokenStands {
        /// The node's name.
        node: Name,
        /// The token that stands.
        id: String,
    },
    /// No join token has that id.
    #[error("there is no join token {id}; try: clusterctl join-tokens list")]
    UnknownJoinToken {
        /// As it was asked for.
        id: String,
    },
    /// No such token, or not its secret: which of both is not said.
    #[error(
        "this join token lets nobody in; have another one made on a member: clusterctl node add"
    )]
    JoinTokenWrong,
    /// Its time is over.
    #[error(
        "the join token for `{node}` has expired; have another one made on a member: clusterctl node add {node}"
    )]
    JoinTokenExpired {
        /// The node's name.
        node: Name,
    },
    /// Another has come in by it, or the same one has left the doorstep.
    #[error(
        "the join token for `{node}` was used already; if that was not you, remove the node (clusterctl node remove {node}) and have another token made"
    )]
    JoinTokenUsed {
        /// The node's name.
        node: Name,
    },
    /// It was made for another name.
    #[error("the join token is for the node `{node}`, not for `{name}`; join as `{node}`")]
    JoinTokenForOther {
        /// The token's node.
        node: Name,
        /// The name that was given.
        name: Name,
    },
    /// Another node has that public key: the disk of one was copied to the other.
    #[error(
        "this key is that of the node `{node}` already; remove the key files that were copied here, and join again"
    )]
    KeyTaken {
        /// Whose key it is.
        node: Name,
    },
    /// No access token has that id.
    #[error("there is no access token {id}; try: clusterctl token list")]
    UnknownAccessToken {
        /// As it was asked for.
        id: String,
    },
    /// A trusted cluster of that name, with another root.
    #[error(
        "another cluster is trusted as `{name}`; choose another name, or first: clusterctl cluster trust remove {name}"
    )]
    ClusterNameTaken {
        /// The name.
        name: Name,
    },
    /// The same root under another name.
    #[error("that root is trusted as the cluster `{name}` already")]
    RootTrustedAs {
        /// The name it has.
        name: Name,
    },
    /// No cluster of that name is trusted.
    #[error("no cluster is trusted as `{name}`; try: clusterctl cluster trust list")]
    UnknownCluster {
        /// As it was asked for.
        name: Name,
    },
}
