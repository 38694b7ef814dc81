//! What a node sees of itself when its agent decides: its lease, its monitors, its work under way.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::ids::{Incarnation, LogIndex, MigrationId, NodeId, Token, VmId};

/// One look at a node. Everything in it belongs to one life of its `clusterd`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeView {
    /// Which node.
    pub me: NodeId,
    /// The life of its host.
    pub incarnation: Incarnation,
    /// The index of the `RegisterNode` entry by which this life of `clusterd` registered, once it is
    /// applied here. What was granted up to it may have been begun by an earlier life. Never the index
    /// that was found on disk: that may lie before a grant which the earlier life had begun already.
    /// `None`: not registered yet, and nothing is decided but to end what is void.
    pub session_since: Option<LogIndex>,
    /// Whether the node holds its lease now. Without it nothing that lets a guest run is decided.
    pub lease_valid: bool,
    /// Every monitor process on the node; one that does not answer, as it last described itself. A machine
    /// that is missing here is taken to have no monitor, so no view is made before all were looked for.
    pub monitors: Vec<MonitorView>,
    /// Work under way in this life: one flow for each machine, never a second beside it. A flow stays
    /// here until `monitors` and the state show what it did.
    pub flows: BTreeMap<VmId, FlowKind>,
    /// Tokens for which this life has begun a claim. Written before the first SETATTR is sent; a token
    /// that is here and was neither taken up nor acknowledged is burnt.
    pub begun: BTreeSet<(VmId, Token)>,
    /// Of those, the ones that every file of the machine acknowledged.
    pub claimed: BTreeSet<(VmId, Token)>,
    /// Starts that failed for a reason other than the claim (no kernel, no memory, no KVM), and why.
    pub start_failures: BTreeMap<(VmId, Token), String>,
    /// Migrations for which this life has begun to make an incoming monitor.
    pub prepared: BTreeSet<MigrationId>,
    /// Migrations whose source monitor, seen *quiet* in this life, is gone: the destination may have
    /// everything, so the machine is not given up before the log ends the migration.
    pub quiet_lost: BTreeSet<MigrationId>,
}

/// What kind of work is under way for a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlowKind {
    /// [`super::Act::Start`].
    Start,
    /// [`super::Act::TakeUpToken`].
    TakeUpToken,
    /// [`super::Act::Thaw`].
    Thaw,
    /// [`super::Act::StopGuest`].
    StopGuest,
    /// [`super::Act::Kill`] or [`super::Act::DiscardIncoming`].
    End,
    /// [`super::Act::PrepareIncoming`].
    PrepareIncoming,
    /// [`super::Act::Send`] or [`super::Act::CancelSend`].
    Send,
    /// [`super::Act::ClaimForCutover`].
    ClaimForCutover,
    /// [`super::Act::RunAfterCutover`].
    RunAfterCutover,
    /// A command of this machine is proposed and not answered yet.
    Propose,
}

/// A monitor, as it describes itself (`monitor.proto`, `MonitorStatus`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorView {
    /// Its machine.
    pub vm: VmId,
    /// The highest token it has taken up; what it runs or would run under.
    pub token: Token,
    /// Drawn when it started.
    pub nonce: u64,
    /// How it stands.
    pub phase: MonitorPhase,
    /// Source: it said *quiet*, and was not re-keyed and permitted since.
    pub said_quiet: bool,
    /// A WRITE of its present token has no answer.
    pub writes_unanswered: bool,
    /// The slowest of a thousand of its writes took that long, µs; 0: not known.
    pub write_latency_p999_us: u64,
    /// It was told to stop: when it ends, that is why.
    pub stop_asked: bool,
    /// It stopped without its disks drained: writes may be under way.
    pub undrained: bool,
    /// The migration that it has, or last had, a part in.
    pub migration: Option<MonitorMigration>,
    /// Why it failed.
    pub failure: Option<String>,
    /// Its lease deadline is past. For people: it is the phase that decides.
    pub lease_deadline_passed: bool,
}

/// The phases of `monitor.proto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MonitorPhase {
    /// Built; waits for its first permit.
    Ready,
    /// Its guest runs.
    Running,
    /// The lease ran out: vCPUs stopped, I/O held.
    Frozen,
    /// The storage server refused its token, or a write is in doubt; it wants a re-key.
    Refused,
    /// Source: stopped for the cutover, every reply in, COMMIT done.
    Quiet,
    /// Destination: memory is arriving.
    Incoming,
    /// Destination: all memory and device state arrived and verified.
    Complete,
    /// The guest shut down, or was stopped; its disks are flushed.
    Stopped,
    /// The guest or the monitor failed.
    Failed,
}

/// A monitor's part in a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorMigration {
    /// Which.
    pub id: MigrationId,
    /// On which side.
    pub side: Side,
    /// Destination: the source's *quiet* has arrived.
    pub quiet_received: bool,
    /// It failed, or was cancelled: the monitor has stopped sending or receiving, and why.
    pub failed: Option<String>,
}

/// The two sides of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Sends.
    Source,
    /// Receives.
    Destination,
}
