//! What can be asked of the replicated state, and what it answers.

mod object;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::event::{Object, Severity, Why};
use crate::ids::{
    Incarnation, LogIndex, MigrationId, Name, NodeId, RequestId, Token, VmId, VolumeId,
};
pub use crate::rejection::Rejection;
use crate::settings::Settings;
use crate::state::{
    Desired, FenceClass, MigrationCause, MigrationOptions, NodeFacts, NodeRole, Rule, VmSpec,
};
use crate::trust::{Asked, Authority, Issuing, Role, Root, Sha256, TrustedCluster};

/// One entry of the log: a command, who asks, and the id under which it is done once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Envelope {
    /// Chosen by whoever asks; repeating it repeats the answer.
    pub request: RequestId,
    /// A person, `node/n1`, or a controller such as `controller/failover`.
    pub actor: String,
    /// The proposer's wall clock, ms since the Unix epoch. Shown to people; decides nothing of safety.
    pub at_ms: u64,
    /// From where, why and by which call, when a person or a program asks: then the audit keeps it.
    #[serde(default)]
    pub asked: Option<Asked>,
    /// What is asked.
    pub command: Command,
}

/// Why an owner gives a machine up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReleaseReason {
    /// It was stopped as asked; its disks are flushed and nothing is outstanding. What is asked for now stands: a
    /// machine that was told to start while it stopped is started again.
    Stopped,
    /// The guest shut itself down; disks flushed, nothing outstanding. It should not run any more.
    GuestShutDown,
    /// Its monitor ended, or failed, with writes that may be outstanding.
    MonitorEnded(String),
    /// It could not be started here.
    StartFailed(String),
}

/// Every change that the log knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Makes the cluster, with its first node (which is [`crate::FIRST_NODE`]).
    InitCluster {
        /// A UUID.
        id: String,
        /// The cluster's name.
        name: Name,
        /// The uid that will own disk files.
        broker_uid: u32,
        /// The first node's name.
        node_name: Name,
        /// The first node's address.
        address: String,
    },
    /// Lets a node in by its join token; its number is this entry's index.
    JoinNode {
        /// The token's id.
        token: String,
        /// Of the secret that the node showed.
        secret_hash: Sha256,
        /// The node's name: the one the token was made for.
        name: Name,
        /// `host:port`.
        address: String,
        /// Of its public key, which its certificates will carry.
        key: Sha256,
    },
    /// Takes a node out; it must own nothing.
    RemoveNode {
        /// Which.
        node: NodeId,
    },
    /// A node's `clusterd` started and speaks for itself.
    RegisterNode {
        /// Which.
        node: NodeId,
        /// The life of its host.
        incarnation: Incarnation,
        /// The life that the log showed to it: what an earlier life asked for and comes late changes nothing.
        #[serde(default)]
        replaces: Incarnation,
        /// Where it is reached.
        address: String,
        /// What it offers.
        facts: NodeFacts,
    },
    /// A planned stop of `clusterd`: its monitors may run that much longer, and the leader waits for as long
    /// before it counts the node as lost.
    Absent {
        /// Which.
        node: NodeId,
        /// The life that goes.
        incarnation: Incarnation,
        /// At most [`crate::ABSENT_MS_MAX`].
        duration_ms: u32,
    },
    /// Back from a planned absence: each monitor of the node has acknowledged a deadline within the node's
    /// lease, so that nothing goes by the absence any more.
    Returned {
        /// Which.
        node: NodeId,
        /// Its life.
        incarnation: Incarnation,
        /// The entry that announced the absence; a newer one goes on.
        absence: LogIndex,
    },
    /// The leader saw a node's lease run out: its machines are taken from it.
    NodeLost {
        /// Which.
        node: NodeId,
        /// The life that was lost; a node that registered anew since is not.
        incarnation: Incarnation,
        /// What the leader saw.
        why: Why,
    },
    /// Begins to empty a node.
    StartDrain {
        /// Which.
        node: NodeId,
        /// The asker's words.
        reason: String,
    },
    /// A machine's move failed during a drain, or it cannot move.
    DrainTrouble {
        /// Which node is drained.
        node: NodeId,
        /// Which machine.
        vm: VmId,
        /// What happened.
        reason: String,
        /// Whether it stays for good, or is tried again.
        stuck: bool,
    },
    /// The drain's work is over: empty, or only machines left that cannot move.
    EndDrain {
        /// Which.
        node: NodeId,
    },
    /// Takes a node back into duty (and out of quarantine).
    Uncordon {
        /// Which.
        node: NodeId,
        /// Whether the machines that a drain took from it return.
        #[serde(default)]
        failback: bool,
    },
    /// A machine does not return to the node that a drain took it from.
    StayAway {
        /// The node.
        node: NodeId,
        /// Which machine.
        vm: VmId,
        /// Why.
        reason: String,
    },
    /// The fail-back's work is over: every machine is back, or stays where it is.
    EndFailback {
        /// To which node.
        node: NodeId,
    },
    /// Adds a volume that was probed, adopted and certified.
    AddVolume {
        /// Name.
        name: Name,
        /// `nfs://…` or `dir:/…`.
        url: String,
        /// From its identity file.
        uuid: String,
        /// As certified.
        fence: FenceClass,
        /// As certified, ms.
        settle_ms: u32,
        /// Bytes in all.
        size_bytes: u64,
        /// Nodes that reach it; empty: all.
        nodes: BTreeSet<NodeId>,
        /// The certificates (PEM) that vouch for its server; with them it is reached under TLS only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tls_ca: Option<String>,
    },
    /// Forgets a volume that no machine uses.
    RemoveVolume {
        /// Which.
        volume: VolumeId,
    },
    /// Records a machine.
    CreateVm {
        /// Name.
        name: Name,
        /// What it is.
        spec: VmSpec,
        /// Images to fill its disks from, by disk number.
        images: BTreeMap<usize, String>,
        /// Whether it should run at once.
        desired: Desired,
    },
    /// Forgets a machine that nobody owns.
    DeleteVm {
        /// Which.
        vm: VmId,
    },
    /// Says whether a machine should run. Asking for `running` lifts a hold.
    SetDesired {
        /// Which.
        vm: VmId,
        /// What it should be.
        desired: Desired,
        /// With `stopped`: at once; writes that are not on disk yet are left behind.
        #[serde(default)]
        forced: bool,
    },
    /// Gives a machine that nobody owns to a node, to start it there.
    StartVm {
        /// Which.
        vm: VmId,
        /// Where.
        node: NodeId,
        /// The token it has now.
        expects: Token,
        /// Why there.
        why: Why,
    },
    /// The owner's broker made the disk files.
    DisksMade {
        /// Which machine.
        vm: VmId,
        /// The token they were made under.
        token: Token,
    },
    /// The owner's monitor runs under this token.
    Activated {
        /// Which machine.
        vm: VmId,
        /// Who says so.
        node: NodeId,
        /// Under which token.
        token: Token,
    },
    /// The owner gives a machine up.
    Release {
        /// Which.
        vm: VmId,
        /// Who owns it.
        node: NodeId,
        /// Under which token.
        expects: Token,
        /// Why.
        reason: ReleaseReason,
    },
    /// The owner takes a fresh token; a migration under way takes one too.
    Rekey {
        /// Which machine.
        vm: VmId,
        /// Who owns it.
        node: NodeId,
        /// Under which token.
        expects: Token,
        /// Whether a write of the old token may be outstanding.
        settle: bool,
        /// Why.
        reason: String,
    },
    /// Asks for a live migration; the leader starts it when there is room.
    QueueMigration {
        /// Which machine.
        vm: VmId,
        /// Where to.
        to: NodeId,
        /// How.
        options: MigrationOptions,
        /// Why.
        cause: MigrationCause,
        /// Why there.
        why: Why,
    },
    /// Starts a queued migration: reserves the destination's token and room.
    StartMigration {
        /// Which.
        migration: MigrationId,
        /// The source's token.
        expects: Token,
        /// 32 random bytes in hex, drawn by the proposer.
        ticket: String,
    },
    /// The destination burnt its reserved token (a claim without a good answer).
    RenewMigrationToken {
        /// Which.
        migration: MigrationId,
        /// The burnt token.
        burnt: Token,
    },
    /// Ownership and leases pass to the destination.
    Cutover {
        /// Which.
        migration: MigrationId,
        /// The source's token.
        expects: Token,
        /// The token under which every file acknowledged the destination's claim.
        claimed: Token,
    },
    /// Ends a migration without a change of owner.
    AbortMigration {
        /// Which.
        migration: MigrationId,
        /// Why.
        reason: String,
    },
    /// What both sides measured.
    ReportMigration {
        /// Which.
        migration: MigrationId,
        /// A JSON object of at most [`crate::SUMMARY_BYTES_MAX`] bytes.
        summary: serde_json::Value,
    },
    /// Replaces the settings.
    SetSettings {
        /// All of them.
        settings: Settings,
    },
    /// Adds or replaces a placement rule.
    SetRule {
        /// Its name.
        name: Name,
        /// The rule; `None` removes it.
        rule: Option<Rule>,
    },
    /// Gives the cluster its certificate authority, once, right after it was made.
    FoundTrust {
        /// As the first node made it: one root, one issuing CA.
        authority: Authority,
        /// Of the public key of [`crate::FIRST_NODE`], which let itself in.
        first_node_key: Sha256,
    },
    /// Makes a token that lets one node in, once.
    CreateJoinToken {
        /// Drawn by the proposer.
        id: String,
        /// The node's name.
        node: Name,
        /// What it will be.
        role: NodeRole,
        /// Of its secret.
        secret_hash: Sha256,
        /// From then on it lets nobody in, ms since the Unix epoch.
        expires_at_ms: u64,
    },
    /// Forgets a join token.
    RevokeJoinToken {
        /// Which.
        id: String,
    },
    /// Makes a token that a person or a program shows.
    CreateAccessToken {
        /// Drawn by the proposer.
        id: String,
        /// Whose it is.
        user: Name,
        /// What they may do.
        role: Role,
        /// Machines they may do it to; empty: all, and the cluster too.
        tags: BTreeSet<Name>,
        /// Of its secret.
        secret_hash: Sha256,
        /// From then on it is worth nothing, ms since the Unix epoch.
        expires_at_ms: u64,
    },
    /// Forgets an access token: from this entry on it is worth nothing.
    RevokeAccessToken {
        /// Which.
        id: String,
    },
    /// Replaces the issuing CA, or begins to trust a second root.
    RotateAuthority {
        /// The generation of the issuing CA that the caller believes to be the present one.
        expects: u64,
        /// The roots from now on; one of them at least is trusted now.
        roots: Vec<Root>,
        /// The next generation; or, where a second root is added, unchanged.
        issuing: Issuing,
    },
    /// Ends the rotation of a root: the old one is not trusted any more.
    RetireRoot {
        /// Of the root's certificate.
        fingerprint: Sha256,
    },
    /// Trusts another cluster: its machines may come here.
    TrustCluster {
        /// What it is called here.
        name: Name,
        /// Its root.
        cluster: TrustedCluster,
    },
    /// Trusts another cluster no more.
    DistrustCluster {
        /// Which.
        name: Name,
    },
    /// Records an automatic act or refusal that changes nothing else.
    Note {
        /// What it is about.
        objects: Vec<Object>,
        /// How much it matters.
        severity: Severity,
        /// A stable kind, e.g. `failover.held`.
        kind: String,
        /// In words.
        detail: String,
        /// The rule and its inputs.
        why: Why,
    },
}

/// What a command gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Done; there is nothing to name.
    Nothing,
    /// A node's number.
    Node(NodeId),
    /// A machine's number.
    Vm(VmId),
    /// A volume's number.
    Volume(VolumeId),
    /// A migration's number.
    Migration(MigrationId),
    /// A token granted.
    Token(Token),
}

/// The answer to an entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It was done, by that entry.
    Done {
        /// The entry.
        index: LogIndex,
        /// What it gave.
        outcome: Outcome,
    },
    /// It was refused and changed nothing.
    Rejected(Rejection),
}

impl Reply {
    /// The outcome, or why not.
    ///
    /// # Errors
    /// The rejection.
    pub fn into_result(self) -> Result<(LogIndex, Outcome), Rejection> {
        match self {
            Reply::Done { index, outcome } => Ok((index, outcome)),
            Reply::Rejected(rejection) => Err(rejection),
        }
    }
}
