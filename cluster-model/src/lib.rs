//! The pure half of Baton: what the cluster knows, and every decision it takes.
//!
//! Nothing here reads a clock, a socket, a file, the environment or a random number, starts a task or
//! panics on input. [`ClusterState::apply`] is the only writer of the replicated state.

#![forbid(unsafe_code)]

pub mod admission;
pub mod agent;
mod apply;
pub mod balance;
pub mod command;
pub mod decision;
pub mod drain;
pub mod event;
pub mod failback;
pub mod failover;
pub mod fleet;
pub mod flow;
pub mod ids;
pub mod lease;
pub mod limits;
pub mod membership;
pub mod permit;
pub mod phase;
pub mod placement;
pub mod queue;
pub mod rejection;
pub mod safeguards;
pub mod settings;
pub mod settle;
pub mod state;
pub mod supervise;
#[cfg(test)]
mod testing;
pub mod trust;

pub use agent::{
    Act, FlowKind, MonitorMigration, MonitorPhase, MonitorView, NodeView, PermitRefusal, Side,
    decide, permit_allowed,
};
pub use command::{Command, Envelope, Outcome, ReleaseReason, Reply};
pub use event::{Event, Object, Severity, Why, counted};
pub use fleet::{Fleet, NodeLoad, Observed};
pub use ids::{
    Incarnation, LogIndex, MigrationId, Name, NameError, NodeId, RequestId, Token, VmId, VolumeId,
};
pub use lease::{Grant, Heartbeat, HeldLease, LeaseRefusal, Loss, LossOutcome, Term};
pub use limits::parse_mac;
pub use placement::{Choice, NoPlace, Score};
pub use rejection::Rejection;
pub use settings::{BalanceLevel, Settings, SettingsError};
pub use settle::Settle;
pub use state::{
    Absence, Boot, ClusterInfo, ClusterState, Desired, DiskSpec, Drain, Duty, Failback, FenceClass,
    Lease, Liveness, Migration, MigrationCause, MigrationOptions, MigrationState, NicSpec, Node,
    NodeFacts, NodeRole, OnIsolation, Ownership, OwnershipCause, Rule, Vm, VmSpec, Volume,
};
pub use trust::{
    AccessToken, Asked, AuditRecord, Authority, Bearer, Call, Denied, Issuing, JoinToken, JoinedAs,
    NotYours, Role, Root, Sha256, Standing, TokenRefusal, Trust, TrustRefusal, TrustedCluster, Who,
    authorise, authorise_new,
};

/// The node that makes the cluster; every later one is numbered by the entry that added it.
pub const FIRST_NODE: NodeId = NodeId(1);
/// The longest announced absence of a `clusterd`, ms: a restart or an upgrade, not a way to switch
/// failover off.
pub const ABSENT_MS_MAX: u32 = 60_000;
/// The largest migration summary, bytes: the log's entries stay small.
pub const SUMMARY_BYTES_MAX: usize = 16 * 1024;
/// A burnt migration token is replaced this often before the migration aborts.
pub const RENEWALS_MAX: u8 = 2;
