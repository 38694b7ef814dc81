//! Node leases: the leader's term and the lease that a node holds. Time is an argument, in nanoseconds of a
//! clock that never stops (`CLOCK_BOOTTIME`), each host its own.
//!
//! ```text
//!  node    ──sent──────────────────────► deadline = sent + freeze: its monitors freeze
//!             \
//!  leader      received ─ quorum confirms ─ replied ─────────────► replied + lost: the node is lost
//! ```
//!
//! The node counts from when it sent, the leader from when it replied, which is later, and `lost` is longer
//! than `freeze`: so the node has frozen before anybody is told that it is lost, as long as the two clocks
//! differ in rate by less than the margin. The disk's safety rests on none of this.
//!
//! A planned absence is the one thing that gives monitors more time than the lease. It is over only when
//! nobody holds a deadline from it any more: when the returned node has had each of its monitors say so, or
//! when the leader has waited that much longer ([`crate::state::Absence`]).

mod held;
mod table;
mod term;
#[cfg(test)]
mod tests;

pub use held::{HeldLease, UNDER_WAY_MAX};
pub use term::{Heartbeat, Look, Loss, LossOutcome, REASK_NS, STOOD_STILL_NS, Term};

use serde::{Deserialize, Serialize};

use crate::ids::{LogIndex, NodeId};

const NS_IN_MS: u64 = 1_000_000;

/// What the leader grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Counted by the node from when it sent the heartbeat, ms.
    pub lease_ms: u32,
}

/// Why a node gets no lease.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseRefusal {
    /// It does not belong to the cluster.
    #[error("{node} does not belong to this cluster")]
    Unknown {
        /// Which.
        node: NodeId,
    },
    /// The log knows another life of its host.
    #[error("{node} has not registered this life of its host yet")]
    OtherIncarnation {
        /// Which.
        node: NodeId,
    },
    /// It was lost, or has not registered.
    #[error("{node} is {is}; it must register first")]
    NotUp {
        /// Which.
        node: NodeId,
        /// How it stands.
        is: String,
    },
    /// The quorum was asked before the heartbeat came: the leader may have been deposed in between.
    #[error("the quorum has not confirmed the leader since the heartbeat of {node} came")]
    Unconfirmed {
        /// Which.
        node: NodeId,
    },
    /// Its loss is on its way into the log.
    #[error("{node} is being declared lost")]
    Condemned {
        /// Which.
        node: NodeId,
    },
    /// It cannot use what it is granted: its replica does not get what a grant needs.
    #[error(
        "the log does not reach {node}: it has applied {applied} and was granted a lease at {owed} that it could not use"
    )]
    Behind {
        /// Which.
        node: NodeId,
        /// What it said that it has applied.
        applied: LogIndex,
        /// What it has owed for longer than a lease.
        owed: LogIndex,
    },
}
