//! Who is trusted: the cluster's certificate authority, the tokens that let nodes and people in, and what
//! each of them may do.
//!
//! ```text
//!  root CA ──signs──► issuing CA (90 days) ──signs──► node certificates (7 days)
//!     └ key sealed with a recovery key that nobody keeps but the operator
//! ```
//! Nothing here is a secret in clear: of tokens the hash is kept, of the root's key the sealed form, of the
//! issuing key nothing at all (voters hold it, each sealed on its own disk).

mod access;
mod call;
mod refusal;
mod standing;

pub use access::{Bearer, Denied, Needs, TokenRefusal, Who, authorise, authorise_new};
pub use call::Call;
pub use refusal::TrustRefusal;
pub use standing::{NotYours, OWN_ENTRY_BYTES_MAX, OWN_REQUEST_BYTES_MAX, Standing};

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::{LogIndex, Name, NodeId};
use crate::state::NodeRole;

/// Join tokens that stand at a time: a node is added in minutes.
pub const JOIN_TOKENS_MAX: usize = 1_024;
/// Access tokens that stand at a time: people and their programs.
pub const ACCESS_TOKENS_MAX: usize = 4_096;
/// Clusters trusted besides this one.
pub const TRUSTED_CLUSTERS_MAX: usize = 64;
/// The longest certificate kept, bytes of PEM.
pub const PEM_BYTES_MAX: usize = 16 * 1024;
/// The longest sealed key kept, bytes of hex.
pub const SEALED_KEY_BYTES_MAX: usize = 4 * 1024;
/// The longest id of a token, bytes: a UUID has 36.
pub const TOKEN_ID_BYTES_MAX: usize = 64;
/// Audit records kept in the state; older ones are in the nodes' own logs.
pub const AUDIT_MAX: usize = 4_096;
/// Tags that one access token or one machine may carry.
pub const TAGS_MAX: usize = 32;

/// A SHA-256 hash, of a token's secret or of a certificate.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Sha256(pub [u8; 32]);

/// Why a text is not a [`Sha256`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a SHA-256 hash has 64 hexadecimal digits")]
pub struct HashError;

impl Sha256 {
    /// Whether both are the same, in a time that does not depend on where they differ.
    pub fn matches(&self, other: &Sha256) -> bool {
        let differing = self.0.iter().zip(&other.0);
        differing.fold(0, |seen, (a, b)| seen | (a ^ b)) == 0
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl From<Sha256> for String {
    fn from(hash: Sha256) -> String {
        hash.to_string()
    }
}

impl TryFrom<String> for Sha256 {
    type Error = HashError;
    fn try_from(text: String) -> Result<Sha256, HashError> {
        let digits = text.as_bytes();
        if digits.len() != 64 || !digits.is_ascii() {
            return Err(HashError);
        }
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |at: usize| (pair[at] as char).to_digit(16).ok_or(HashError);
            *byte = (digit(0)? << 4 | digit(1)?) as u8;
        }
        Ok(Sha256(hash))
    }
}

/// Whom the cluster trusts, and with what. Replicated.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Trust {
    /// The certificate authority; absent until the cluster was founded.
    pub authority: Option<Authority>,
    /// Tokens that each let one node in, by their id.
    pub join_tokens: BTreeMap<String, JoinToken>,
    /// Tokens that people and programs show, by their id.
    pub access_tokens: BTreeMap<String, AccessToken>,
    /// Other clusters whose machines may come here, by the name they were given.
    pub clusters: BTreeMap<Name, TrustedCluster>,
    /// Who changed what, oldest first.
    pub audit: VecDeque<Arc<AuditRecord>>,
}

/// The certificate authority as everybody knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Authority {
    /// Roots that certificates may lead to: one, or during a rotation the old and the new.
    pub roots: Vec<Root>,
    /// What signs certificates now.
    pub issuing: Issuing,
}

/// A root CA.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Root {
    /// Its certificate.
    pub certificate_pem: String,
    /// Of the certificate's DER form: what tokens pin.
    pub fingerprint: Sha256,
    /// Its key, sealed with the recovery key (AES-256-GCM), in hex.
    pub sealed_key: String,
}

/// The CA that signs joins and renewals.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Issuing {
    /// Grows with each rotation; a node whose certificate is of an older one renews it at once.
    pub generation: u64,
    /// Its certificate, signed by the newest root.
    pub certificate_pem: String,
    /// When it ends, ms since the Unix epoch. Shown, and warned of; nothing is decided by it here.
    pub ends_at_ms: u64,
    /// Where its key was made: where voters ask for it first.
    pub made_by: NodeId,
}

/// Lets one node in, once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JoinToken {
    /// The node's name.
    pub node: Name,
    /// What it will be.
    pub role: NodeRole,
    /// Of its secret.
    pub secret_hash: Sha256,
    /// From then on it lets nobody in, ms since the Unix epoch.
    pub expires_at_ms: u64,
    /// Who made it.
    pub made_by: String,
    /// The node that came in by it; a node that lost the answer asks again with the same token and the
    /// same address and key, and is who it is.
    pub used_by: Option<JoinedAs>,
}

/// Who came in by a join token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JoinedAs {
    /// The node.
    pub node: NodeId,
    /// Of its public key.
    pub key: Sha256,
    /// When, ms since the Unix epoch.
    pub at_ms: u64,
}

/// What a person or a program may do, least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Looks.
    Viewer,
    /// Runs machines: creates, starts, stops, moves, drains, balances.
    Operator,
    /// Everything, nodes, volumes, settings and tokens too.
    Admin,
}

impl Role {
    /// The role's name, as users see it.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        }
    }

    /// The role of that name.
    pub fn parse(text: &str) -> Option<Role> {
        [Role::Viewer, Role::Operator, Role::Admin]
            .into_iter()
            .find(|role| role.as_str() == text)
    }
}

/// What a person or a program shows to be let do something.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AccessToken {
    /// Whose it is.
    pub user: Name,
    /// What they may do.
    pub role: Role,
    /// Machines they may do it to: those with one of these tags; empty: all, and the cluster too.
    pub tags: BTreeSet<Name>,
    /// Of its secret.
    pub secret_hash: Sha256,
    /// From then on it is worth nothing, ms since the Unix epoch.
    pub expires_at_ms: u64,
    /// Who made it.
    pub made_by: String,
}

/// Another cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrustedCluster {
    /// Its root's certificate.
    pub root_pem: String,
    /// Of that certificate.
    pub fingerprint: Sha256,
}

/// Who asked for a change, from where and why: carried by the entry that made it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    /// The address that the request came from, or `local`.
    pub from: String,
    /// The asker's words.
    pub reason: String,
    /// What was called, e.g. `VmCreate`.
    pub method: String,
}

/// One change that a person or a program asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AuditRecord {
    /// Its entry.
    pub index: LogIndex,
    /// When, ms since the Unix epoch.
    pub at_ms: u64,
    /// Who.
    pub actor: String,
    /// From where, why, by which call.
    pub asked: Asked,
    /// Under which request id.
    pub request: String,
    /// What it was about, e.g. `vm/web-1`; the cluster itself when empty.
    pub object: String,
    /// Why it was refused; empty when it was done.
    pub refused: String,
}
