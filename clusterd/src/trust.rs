//! This node's place in the cluster's trust: its key and certificate, whom it believes, and, on a voter, the
//! key that signs for others.
//!
//! ```text
//!  <data>/trust/node.key       this node's key (0600); never leaves this host
//!               papers.json    its certificate, the roots it believes
//!               issuing.json   on voters: the issuing CA's key, sealed under the node's own
//! ```
//! What the log says of trust is [`cluster_model::trust`]; what TLS makes of it is [`proto::tls`].

pub mod authority;
mod caller;
mod door;
pub mod ephemeral;
mod exchange;
mod judge;
mod keeper;
mod local;
mod renewal;
mod rotation;
mod sealed;

pub use caller::{Caller, Shown};
pub use door::{Door, Guard, Guest, Judge};
pub use exchange::{
    answer_issuing_key, answer_join, answer_join_check, answer_renew, ask_to_join, deepest,
};
pub use judge::judge;
pub use keeper::{Keeper, KeeperError, Papers};
pub use local::guests as local_guests;
pub use renewal::keep_current;
pub use rotation::{Prepared, newest_root_believed, prepare_rotation};
pub use sealed::{NoRandomness, RecoveryKey, RecoveryKeyError, random};

/// An id for a token: 10 random bytes in hexadecimal digits.
///
/// # Errors
/// When the kernel gives no random numbers.
pub fn new_id() -> Result<String, NoRandomness> {
    random::<10>().map(|bytes| sealed::hex(&bytes))
}
