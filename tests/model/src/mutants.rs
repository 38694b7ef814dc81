//! Protocols broken on purpose, one rule each: every rule is shown to be needed by the history that breaks
//! without it.

use crate::bounds::Bounds;
use crate::properties;

/// The rule that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
#[value(rename_all = "verbatim")]
pub enum Mutant {
    /// A takeover does not wait for what the server has let in.
    NoSettle,
    /// A re-key with an unanswered WRITE does not wait for it either.
    RekeyWithoutSettle,
    /// The source says *quiet* with WRITEs unanswered.
    NoDrain,
    /// The destination claims and proposes without waiting for *quiet*.
    CutoverBeforeQuiet,
    /// A migration is promised the counter's next token without taking it, so that another grant takes it too.
    PrepTokenIsNext,
    /// The destination proposes the cutover while its claim is unanswered.
    CutoverBeforeClaimAnswered,
    /// A takeover or a re-key runs when its claim is acknowledged, without reading the log again. A read that
    /// begins before the last acknowledgement is the same: the log may have moved in between.
    RunWithoutConfirm,
    /// A claim without an answer is sent again under the same token.
    SameTokenSentAgain,
    /// A `clusterd` that restarts claims a token that its earlier life may have claimed.
    RestartForgetsClaims,
    /// The file's group names the node and not the grant.
    TokenPerNode,
    /// A takeover runs as soon as the log says so, before its claim.
    ActivateBeforeFencing,
    /// A quiet source that reads in the log that the machine is its own runs on, without an abort.
    InDoubtResolvedByReadOnly,
    /// A quiet source gives up waiting and runs on.
    ResumeAfterFinalWithoutAbort,
    /// A source whose monitor is gone starts the machine anew while its migration is open.
    StartWhileMigrating,
    /// A quiet source whose lease ran out and came back thaws like any other machine.
    QuietSourceThaws,
    /// A re-key of the source leaves the destination the token that was reserved before.
    RekeyLeavesReserved,
    /// An abort that commits after the cutover gives the machine back to the source.
    LateAbortApplies,
    /// A cutover that commits after the abort applies.
    LateCutoverApplies,
    /// An image that waited on the source through a cutover goes on when the machine comes back to that node.
    VoidImageRuns,
    /// Nodes are declared lost while their leases are valid.
    LostBeforeFrozen,
    /// A guest runs on when its lease has run out.
    NoFreeze,
    /// A node is granted a lease while its loss is under way to the log.
    LeaseWhileCondemned,
    /// A node uses a lease before it has applied what the log said when it was granted.
    LeaseBeforeCaughtUp,
    /// A run permit takes the lease of the moment at which it is used, and not the lease under which the log was
    /// read for it.
    PermitOutlivesLease,
    /// A quiet source thaws after the applied abort under the token that it had, without a re-key.
    ///
    /// Not caught, and listed apart: the destination never ran, so the worst that its claim can do is to have the
    /// server refuse the source, which then re-keys like any refused machine. The re-key after an abort spares
    /// the guest that refusal; the disk does not depend on it.
    ThawAfterAbortWithoutRekey,
}

impl Mutant {
    /// Rules whose absence the other rules make up for.
    pub const SPARE: [Mutant; 1] = [Mutant::ThawAfterAbortWithoutRekey];

    /// Every one of the others: each breaks something.
    pub const ALL: [Mutant; 24] = [
        Mutant::NoSettle,
        Mutant::RekeyWithoutSettle,
        Mutant::NoDrain,
        Mutant::CutoverBeforeQuiet,
        Mutant::PrepTokenIsNext,
        Mutant::CutoverBeforeClaimAnswered,
        Mutant::RunWithoutConfirm,
        Mutant::SameTokenSentAgain,
        Mutant::RestartForgetsClaims,
        Mutant::TokenPerNode,
        Mutant::ActivateBeforeFencing,
        Mutant::InDoubtResolvedByReadOnly,
        Mutant::ResumeAfterFinalWithoutAbort,
        Mutant::StartWhileMigrating,
        Mutant::QuietSourceThaws,
        Mutant::RekeyLeavesReserved,
        Mutant::LateAbortApplies,
        Mutant::LateCutoverApplies,
        Mutant::VoidImageRuns,
        Mutant::LostBeforeFrozen,
        Mutant::NoFreeze,
        Mutant::LeaseWhileCondemned,
        Mutant::LeaseBeforeCaughtUp,
        Mutant::PermitOutlivesLease,
    ];

    /// The property that its history breaks: the harm itself where there is one, not the rule's own shadow. For a
    /// spare rule the one that it would be expected to break.
    pub fn harm(self) -> &'static str {
        match self {
            Mutant::NoSettle
            | Mutant::RekeyWithoutSettle
            | Mutant::NoDrain
            | Mutant::PrepTokenIsNext
            | Mutant::CutoverBeforeClaimAnswered
            | Mutant::RunWithoutConfirm
            | Mutant::SameTokenSentAgain
            | Mutant::RestartForgetsClaims
            | Mutant::TokenPerNode
            | Mutant::ActivateBeforeFencing => properties::NO_LATE_LANDING,
            Mutant::CutoverBeforeQuiet
            | Mutant::InDoubtResolvedByReadOnly
            | Mutant::ResumeAfterFinalWithoutAbort
            | Mutant::StartWhileMigrating
            | Mutant::QuietSourceThaws
            | Mutant::LateCutoverApplies
            | Mutant::LateAbortApplies
            | Mutant::LostBeforeFrozen
            | Mutant::NoFreeze
            | Mutant::LeaseWhileCondemned
            | Mutant::LeaseBeforeCaughtUp
            | Mutant::PermitOutlivesLease
            | Mutant::ThawAfterAbortWithoutRekey => properties::ONE_RUNS,
            Mutant::RekeyLeavesReserved => properties::TOKENS_GROW,
            Mutant::VoidImageRuns => properties::OWNER_RUNS,
        }
    }

    /// Bounds within which it is found soon.
    pub fn bounds(self) -> Bounds {
        let (migrations, rekeys, renewals, faults) = match self {
            Mutant::NoSettle
            | Mutant::ActivateBeforeFencing
            | Mutant::NoFreeze
            | Mutant::LostBeforeFrozen
            | Mutant::LeaseWhileCondemned => (0, 0, 0, 1),
            Mutant::RekeyWithoutSettle | Mutant::TokenPerNode => (0, 1, 0, 0),
            Mutant::SameTokenSentAgain => (0, 2, 0, 0),
            Mutant::RestartForgetsClaims => (0, 2, 0, 1),
            Mutant::RunWithoutConfirm | Mutant::PermitOutlivesLease => (0, 1, 0, 1),
            Mutant::LeaseBeforeCaughtUp => (1, 0, 0, 1),
            Mutant::ThawAfterAbortWithoutRekey => (1, 1, 1, 1),
            Mutant::NoDrain
            | Mutant::CutoverBeforeQuiet
            | Mutant::InDoubtResolvedByReadOnly
            | Mutant::ResumeAfterFinalWithoutAbort => (1, 0, 0, 0),
            Mutant::PrepTokenIsNext => (1, 2, 0, 0),
            Mutant::RekeyLeavesReserved | Mutant::LateCutoverApplies => (1, 1, 0, 0),
            Mutant::CutoverBeforeClaimAnswered
            | Mutant::StartWhileMigrating
            | Mutant::QuietSourceThaws
            | Mutant::LateAbortApplies
            | Mutant::VoidImageRuns => (1, 1, 0, 1),
        };
        Bounds {
            name: "mutant",
            migrations,
            rekeys,
            renewals,
            faults,
            writes: 2,
            leases_hold: true,
        }
    }
}
