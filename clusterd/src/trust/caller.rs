//! Who is at the other end of a connection that this node accepted.

use cluster_model::Name;
use proto::tls::Identity;

/// Who calls. Every request carries it among its extensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// What the connection shows of them.
    pub shown: Shown,
    /// Where they call from: an address, or `local`.
    pub from: String,
}

/// What a connection shows of whom it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shown {
    /// A process of this host, on the Unix socket, with its uid as the kernel says.
    Local {
        /// The uid.
        uid: u32,
    },
    /// A node of this cluster, by its certificate.
    Node(Identity),
    /// A node of a cluster that is trusted under this name.
    Foreign(Name),
    /// No certificate: someone with a token, or nobody.
    Nothing,
}
