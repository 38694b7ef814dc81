//! Everything that can happen next.

use std::fmt;

use crate::host::Node;
use crate::storage::{Group, Write};

/// One step. A history is a list of them, and reads as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// `StartMigration` is applied: t' is reserved and the destination's monitor receives.
    MigrationStarts,
    /// `RenewMigrationToken` is applied.
    TokenRenewed,
    /// The source stops its guest, has every reply and COMMIT, and says *quiet*.
    SaysQuiet,
    /// The destination proposes the cutover under the token that it claimed.
    CutoverProposed,
    /// `Cutover` is applied.
    CutoverApplied,
    /// `AbortMigration` is applied, whoever proposed it.
    AbortApplied,
    /// The destination learns of the cutover.
    CutoverLearnt,
    /// A quiet source runs under the token that it had; only a broken protocol does that.
    QuietSourceRuns,
    /// `Rekey` is applied for the owner.
    Rekeyed,
    /// `StartVm` is applied: this node owns the machine.
    Granted(Node),
    /// A SETATTR of the token that this node must claim is sent; whatever it claimed before is given up.
    ClaimSent(Node),
    /// It is sent once more; only a broken protocol does that.
    ClaimSentAgain(Node),
    /// The server executes a SETATTR.
    ClaimExecuted(Group),
    /// The claim's answer arrives: every file acknowledged.
    ClaimAnswered(Node),
    /// The claim gets no answer: its token is burnt.
    ClaimGivenUp(Node),
    /// The settle time is over: what the server had let in has landed.
    Settled(Node),
    /// A linearizable read says that the claimed token is current.
    Confirmed(Node),
    /// The guest runs under the claimed token.
    Runs(Node),
    /// The lease is back and the log, read again, says that the token has not moved: the guest thaws.
    Thaws(Node),
    /// The lease runs out: the guest freezes.
    LeaseRunsOut(Node),
    /// The leader grants a lease again (after registering, if the node was lost), and the node catches up.
    LeaseGranted(Node),
    /// The leader proposes `NodeLost`.
    LossProposed(Node),
    /// That proposal will never commit, and the leader knows.
    LossDropped(Node),
    /// `NodeLost` is applied.
    LossApplied(Node),
    /// The host dies.
    Crashes(Node),
    /// The host is back and registers its new life.
    Boots(Node),
    /// `clusterd` dies and starts again; the monitor runs on.
    ClusterdRestarts(Node),
    /// The monitor dies; its `clusterd` lives.
    MonitorDies(Node),
    /// `Release` is applied: the owner gives up a machine whose monitor is gone.
    Released(Node),
    /// The guest writes.
    WriteSent(Node),
    /// The server checks a WRITE against the file's group, and refuses it or lets it in.
    WriteChecked(Write),
    /// A WRITE that was let in changes the file.
    WriteLands(Write),
}

impl Node {
    fn name(self) -> &'static str {
        match self {
            Node::Source => "S",
            Node::Destination => "D",
            Node::Third => "T",
        }
    }
}

impl fmt::Display for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WRITE of {} under {}", self.node.name(), self.token)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::MigrationStarts => write!(f, "log: StartMigration S to D"),
            Step::TokenRenewed => write!(f, "log: RenewMigrationToken"),
            Step::SaysQuiet => write!(f, "S says quiet"),
            Step::CutoverProposed => write!(f, "D proposes the cutover"),
            Step::CutoverApplied => write!(f, "log: Cutover"),
            Step::AbortApplied => write!(f, "log: AbortMigration"),
            Step::CutoverLearnt => write!(f, "D learns of the cutover"),
            Step::QuietSourceRuns => write!(f, "S was quiet and runs under its old token"),
            Step::Rekeyed => write!(f, "log: Rekey of the owner"),
            Step::Granted(node) => write!(f, "log: StartVm on {}", node.name()),
            Step::ClaimSent(node) => write!(f, "{} sends the SETATTR of its token", node.name()),
            Step::ClaimSentAgain(node) => write!(f, "{} sends that SETATTR again", node.name()),
            Step::ClaimExecuted(group) => write!(f, "server: SETATTR of {group} is executed"),
            Step::ClaimAnswered(node) => write!(f, "{}'s claim is acknowledged", node.name()),
            Step::ClaimGivenUp(node) => write!(f, "{}'s claim gets no answer", node.name()),
            Step::Settled(node) => write!(f, "{} has settled", node.name()),
            Step::Confirmed(node) => write!(f, "{} confirms its token in the log", node.name()),
            Step::Runs(node) => write!(f, "{} runs under its token", node.name()),
            Step::Thaws(node) => write!(f, "{} thaws", node.name()),
            Step::LeaseRunsOut(node) => write!(f, "{}'s lease runs out", node.name()),
            Step::LeaseGranted(node) => write!(f, "{} is granted its lease again", node.name()),
            Step::LossProposed(node) => write!(f, "the leader proposes NodeLost {}", node.name()),
            Step::LossDropped(node) => write!(f, "NodeLost {} will not commit", node.name()),
            Step::LossApplied(node) => write!(f, "log: NodeLost {}", node.name()),
            Step::Crashes(node) => write!(f, "{}'s host dies", node.name()),
            Step::Boots(node) => write!(f, "{}'s host is back", node.name()),
            Step::ClusterdRestarts(node) => write!(f, "{}'s clusterd restarts", node.name()),
            Step::MonitorDies(node) => write!(f, "{}'s monitor dies", node.name()),
            Step::Released(node) => write!(f, "log: Release by {}", node.name()),
            Step::WriteSent(node) => write!(f, "{}'s guest writes", node.name()),
            Step::WriteChecked(write) => write!(f, "server: checks the {write}"),
            Step::WriteLands(write) => write!(f, "server: the {write} lands"),
        }
    }
}
