//! What the tasks of a node that belongs to a cluster share: who it is, its log, its lease, its means.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use cluster_model::{
    ClusterState, Command, Envelope, HeldLease, Incarnation, LogIndex, MigrationId, Name, NodeId,
    Outcome, Rejection, Reply, RequestId,
};
use proto::monitor::MigrationProgress;
use tokio::sync::watch;

use crate::broker::Broker;
use crate::clock::Clock;
use crate::config::Config;
use crate::leader::Leader;
use crate::monitors::Monitors;
use crate::net::Dialer;
use crate::raft::{ProposeError, RaftHandle, WaitError};
use crate::trust::Keeper;

/// How long a proposal may take, over changes of the leader, before its outcome is called unknown.
pub const PROPOSE_TIMEOUT: Duration = Duration::from_secs(8);
/// How long an entry that the leader has applied may take to be applied here.
const APPLY_TIMEOUT: Duration = Duration::from_secs(8);
/// Ended migrations whose measurements are kept for their summary.
const MEASURED_MAX: usize = 128;

/// A node that belongs to a cluster.
#[derive(Debug)]
pub struct Member {
    /// Its number.
    pub node: NodeId,
    /// The life of its host.
    pub incarnation: Incarnation,
    /// What it was started with.
    pub config: Config,
    /// Its clocks.
    pub clock: Clock,
    /// Its way to other nodes.
    pub dialer: Dialer,
    /// Its certificate, and whom it believes.
    pub keeper: Keeper,
    /// Its part in the log.
    pub raft: RaftHandle,
    /// Its storage broker.
    pub broker: Broker,
    /// Its monitors.
    pub monitors: Monitors,
    /// Its lease, the one owner of the deadline: see [`Member::held`].
    pub held: Mutex<HeldLease>,
    /// Its lease as the rest of the node sees it.
    pub lease: watch::Sender<LeaseView>,
    /// The entry by which this life registered, once it is applied here.
    pub session_since: watch::Sender<Option<LogIndex>>,
    /// What it keeps for when it leads.
    pub leader: Leader,
    /// Volumes that this node does not reach at the moment.
    pub volumes_down: watch::Sender<BTreeSet<Name>>,
    /// The cluster's id, once it is known here.
    pub cluster: OnceLock<String>,
    /// What was measured of migrations that this node has or had a part in.
    pub measured: Mutex<BTreeMap<MigrationId, Measured>>,
}

/// The node's right to let guests run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaseView {
    /// Absolute CLOCK_BOOTTIME, ns; 0 before the first grant of this life.
    pub deadline_ns: u64,
    /// The time that was left at the last renewal, ms; `None` before the second one.
    pub slack_ms: Option<u64>,
}

/// What one node measured of a migration.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// The source monitor's last word.
    pub source: Option<MigrationProgress>,
    /// This node's own steps of the handover.
    pub handover: Handover,
}

/// The destination's steps, CLOCK_MONOTONIC ns, 0 when not reached in this life.
#[derive(Clone, Copy, Debug, Default)]
pub struct Handover {
    /// The claim was sent.
    pub claim_begun_ns: u64,
    /// Every file had acknowledged it.
    pub claimed_ns: u64,
    /// The cutover was proposed.
    pub proposed_ns: u64,
    /// It was applied here.
    pub applied_ns: u64,
    /// The permit was sent.
    pub permit_ns: u64,
}

/// Why a command has no outcome.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CommandError {
    /// The log refused it.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// It may or may not be applied, or nobody could be asked.
    #[error(transparent)]
    Propose(#[from] ProposeError),
    /// It was applied by the leader, and is not applied here yet.
    #[error(transparent)]
    Behind(#[from] WaitError),
}

impl Member {
    /// The newest state applied here.
    pub fn state(&self) -> Arc<ClusterState> {
        self.raft.state().borrow().clone()
    }

    /// The cluster's id; empty before it is known here.
    pub fn cluster_id(&self) -> &str {
        if self.cluster.get().is_none()
            && let Some(cluster) = &self.state().cluster
        {
            let _ = self.cluster.set(cluster.id.clone());
        }
        self.cluster.get().map_or("", String::as_str)
    }

    /// What this node calls itself as an actor.
    pub fn actor(&self) -> String {
        format!("node/{}", self.config.name)
    }

    fn envelope(&self, actor: &str, request: RequestId, command: Command) -> Envelope {
        Envelope {
            request,
            actor: actor.to_owned(),
            at_ms: self.clock.wall_ms(),
            asked: None,
            command,
        }
    }

    /// Proposes a command under a request id and waits until its entry is applied here too.
    ///
    /// # Errors
    /// See [`CommandError`].
    pub async fn propose(
        &self,
        actor: &str,
        request: RequestId,
        command: Command,
    ) -> Result<(LogIndex, Outcome), CommandError> {
        let envelope = self.envelope(actor, request, command);
        let applied = self
            .raft
            .propose_or_forward(&envelope, PROPOSE_TIMEOUT)
            .await?;
        self.raft.wait_applied(applied.index, APPLY_TIMEOUT).await?;
        match applied.reply {
            Reply::Done { index, outcome } => Ok((index, outcome)),
            Reply::Rejected(rejection) => Err(rejection.into()),
        }
    }

    /// Proposes what this node decided as the leader of `term`, and nothing if it is that no longer: its
    /// successor knows more, and decides itself.
    ///
    /// # Errors
    /// See [`CommandError`].
    pub async fn propose_in_term(
        &self,
        term: u64,
        actor: &str,
        request: RequestId,
        command: Command,
    ) -> Result<(LogIndex, Outcome), CommandError> {
        let envelope = self.envelope(actor, request, command);
        match self.raft.propose_in_term(term, &envelope).await?.reply {
            Reply::Done { index, outcome } => Ok((index, outcome)),
            Reply::Rejected(rejection) => Err(rejection.into()),
        }
    }

    /// Proposes a command of this node's own. Each call has a request id of its own: what must happen
    /// once is a compare-and-set on the token.
    ///
    /// # Errors
    /// See [`CommandError`].
    pub async fn propose_own(&self, command: Command) -> Result<(LogIndex, Outcome), CommandError> {
        let request = RequestId(format!("{}/{}", self.node, uuid::Uuid::new_v4()));
        self.propose(&self.actor(), request, command).await
    }

    /// Whether the node holds its lease now.
    pub fn lease_is_valid(&self) -> bool {
        self.lease.borrow().deadline_ns > self.clock.boottime_ns()
    }

    /// The lease, to move it.
    pub fn held(&self) -> MutexGuard<'_, HeldLease> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which life of `clusterd` this is, for monitors: the entry by which it registered, 0 before that.
    pub fn session(&self) -> u64 {
        self.session_since.borrow().map_or(0, |since| since.0)
    }

    /// Notes a measurement of a migration.
    pub fn measure(&self, migration: MigrationId, note: impl FnOnce(&mut Measured)) {
        let mut measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        note(measured.entry(migration).or_default());
        while measured.len() > MEASURED_MAX {
            measured.pop_first();
        }
    }

    /// What this node measured of a migration.
    pub fn measured(&self, migration: MigrationId) -> Measured {
        let measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        measured.get(&migration).cloned().unwrap_or_default()
    }
}
