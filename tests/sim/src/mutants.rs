//! Faults put in on purpose: each shows that an invariant can fail, and how soon.

use cluster_model::safeguards::{Safeguard, Safeguards};
use cluster_model::{ClusterState, Command, Duty, Envelope, MigrationState, Severity, Why};

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mutant {
    /// A claim is taken for a right to run: the log is not asked again.
    NoConfirm,
    /// A permit lasts as long as the lease of the moment, which may have been granted after the machine went elsewhere.
    PermitOutlivesLease,
    /// A leader that was deposed answers reads.
    ConfirmIsLocal,
    /// A leader grants leases without a quorum.
    LeaseWithoutQuorum,
    /// A lease counts from the receipt of a grant, however old the heartbeat it answers.
    LeaseFromReceipt,
    /// The leader declares nodes lost before they can have frozen.
    LostTooEarly,
    /// A leader that leads no more hands the losses it saw to its successor.
    LossHandedOn,
    /// Guests run on when their lease has run out.
    NoFreeze,
    /// A vCPU does not look at the deadline before it enters the guest: one that a stopped process left runs on.
    EntersPastDeadline,
    /// The destination runs when it is complete, without the cutover.
    RunWithoutCutover,
    /// The destination proposes before its claim is answered.
    CutoverBeforeClaim,
    /// A quiet source thaws as a frozen one does.
    QuietSourceThaws,
    /// The source says quiet with writes unanswered.
    QuietWithWritesOut,
    /// A source that was let run again while it stopped for its cutover says quiet all the same.
    QuietWhileRunning,
    /// A takeover does not wait for what is under way in the server.
    NoSettle,
    /// A takeover does not have the server write down what it holds.
    NoCommitOnTakeover,
    /// A guest runs before its disk is claimed.
    RunBeforeClaim,
    /// A claim without an answer is sent again under the same token.
    TokenSentAgain,
    /// The server does not look at tokens.
    OldTokensWrite,
    /// A flush is answered when the writes are, before the COMMIT.
    FlushBeforeCommit,
    /// A changed write verifier is ignored.
    VerifierIgnored,
    /// An abort that comes late undoes a cutover.
    LateAbort,
    /// A cutover does not compare the token, nor mind an abort.
    NoCompareAndSet,
    /// A monitor whose machine moved away is not ended.
    VoidMonitorsStay,
    /// A re-key never settles.
    RekeyWithoutSettle,
    /// A machine that stopped because it was told to is taken for one that shut itself down.
    StopTakenForShutDown,
    /// A drain is over though a machine is left.
    DrainedTooEarly,
    /// A report that comes after a cutover rewrites how the migration ended.
    EndRewritten,
    /// The failover does not say why it starts a machine.
    NoReason,
    /// A replica looks at its own clock when it applies an entry.
    ApplyReadsClock,
    /// A snapshot leaves the leases' owners behind.
    SnapshotForgets,
    /// A node that restarts has lost what it acknowledged last, and its vote.
    LogForgotten,
    /// A cutover leaves the leases with the source.
    LeasesStay,
    /// An abort is written down and changes nothing.
    AbortsIgnored,
    /// A follower takes its leader's word for what is committed, also when that is less than it knew.
    CommitFallsBack,
    /// Answers to requests are not kept: one that is sent again takes effect again.
    RequestsForgotten,
    /// A frozen machine's monitor is ended instead of let run again.
    FrozenEnded,
    /// A node that registers again ends its absence, whatever its monitors were told.
    AbsenceForgotten,
    /// A leader grants leases to a node that cannot use them, as long as its heartbeats arrive.
    BehindIsGranted,
}

impl Mutant {
    /// Every one of them.
    pub const ALL: [Mutant; 39] = [
        Mutant::NoConfirm,
        Mutant::PermitOutlivesLease,
        Mutant::ConfirmIsLocal,
        Mutant::LeaseWithoutQuorum,
        Mutant::LeaseFromReceipt,
        Mutant::LostTooEarly,
        Mutant::LossHandedOn,
        Mutant::NoFreeze,
        Mutant::EntersPastDeadline,
        Mutant::RunWithoutCutover,
        Mutant::CutoverBeforeClaim,
        Mutant::QuietSourceThaws,
        Mutant::QuietWithWritesOut,
        Mutant::QuietWhileRunning,
        Mutant::NoSettle,
        Mutant::NoCommitOnTakeover,
        Mutant::RunBeforeClaim,
        Mutant::TokenSentAgain,
        Mutant::OldTokensWrite,
        Mutant::FlushBeforeCommit,
        Mutant::VerifierIgnored,
        Mutant::LateAbort,
        Mutant::NoCompareAndSet,
        Mutant::VoidMonitorsStay,
        Mutant::RekeyWithoutSettle,
        Mutant::StopTakenForShutDown,
        Mutant::DrainedTooEarly,
        Mutant::EndRewritten,
        Mutant::NoReason,
        Mutant::ApplyReadsClock,
        Mutant::SnapshotForgets,
        Mutant::LogForgotten,
        Mutant::LeasesStay,
        Mutant::AbortsIgnored,
        Mutant::CommitFallsBack,
        Mutant::RequestsForgotten,
        Mutant::FrozenEnded,
        Mutant::AbsenceForgotten,
        Mutant::BehindIsGranted,
    ];
}

impl Mutant {
    /// The invariants that it breaks: it counts as caught by one of these alone. What else it breaks on the way is not
    /// what it is there for.
    pub fn harm(self) -> &'static [&'static str] {
        const TWO: [&str; 2] = ["one running copy", "only the owner runs"];
        const OLD_WRITES: [&str; 2] = ["late landing", "a flushed write is never lost"];
        match self {
            Mutant::NoConfirm
            | Mutant::PermitOutlivesLease
            | Mutant::NoFreeze
            | Mutant::EntersPastDeadline
            | Mutant::RunWithoutCutover => &TWO,
            Mutant::VoidMonitorsStay => &["void monitors end"],
            Mutant::ConfirmIsLocal | Mutant::LeaseWithoutQuorum => &["who answers leads"],
            Mutant::LeaseFromReceipt
            | Mutant::LostTooEarly
            | Mutant::LossHandedOn
            | Mutant::AbsenceForgotten => &["lost only without a lease"],
            Mutant::BehindIsGranted => &["lost in bounded time"],
            Mutant::CutoverBeforeClaim => &["claim before cutover"],
            Mutant::QuietSourceThaws => &["quiet binds", "one running copy", "only the owner runs"],
            Mutant::QuietWhileRunning => {
                &["quiet binds", "one running copy", "only the owner runs"]
            }
            Mutant::QuietWithWritesOut
            | Mutant::NoSettle
            | Mutant::TokenSentAgain
            | Mutant::OldTokensWrite
            | Mutant::RekeyWithoutSettle => &OLD_WRITES,
            Mutant::NoCommitOnTakeover | Mutant::FlushBeforeCommit | Mutant::VerifierIgnored => {
                &["a flushed write is never lost"]
            }
            Mutant::RunBeforeClaim => &["claim before run"],
            Mutant::LateAbort | Mutant::NoCompareAndSet | Mutant::EndRewritten => {
                &["a migration ends once"]
            }
            Mutant::StopTakenForShutDown => &["what was asked last stands"],
            Mutant::DrainedTooEarly => &["only where it may"],
            Mutant::NoReason => &["every automatic act has a why"],
            Mutant::ApplyReadsClock => &["replicas are equal"],
            Mutant::SnapshotForgets => &["snapshot and tail"],
            Mutant::LogForgotten => &["log only grows", "a leader has what was acknowledged"],
            Mutant::LeasesStay => &["leases follow the owner"],
            Mutant::AbortsIgnored => &["every migration ends"],
            Mutant::CommitFallsBack => &["log only grows"],
            Mutant::RequestsForgotten => &["a request takes effect once"],
            Mutant::FrozenEnded => &["ended by the log only"],
        }
    }

    /// Whether that violation is its harm.
    pub fn is_caught_by(self, violation: &str) -> bool {
        let (invariant, _) = violation.split_once(':').unwrap_or((violation, ""));
        self.harm().contains(&invariant)
    }
}

/// The safeguards of a node under a mutant: all, or all but the one that it leaves out of the product's own code.
pub fn safeguards(mutant: Option<Mutant>) -> Safeguards {
    use Safeguard as Guard;
    let without = match mutant {
        Some(Mutant::NoConfirm) => Guard::ConfirmAfterClaim,
        Some(Mutant::PermitOutlivesLease) => Guard::LeaseOfTheConfirm,
        Some(Mutant::NoSettle) => Guard::SettleOnTakeover,
        Some(Mutant::NoCommitOnTakeover) => Guard::CommitOnTakeover,
        Some(Mutant::RunBeforeClaim) => Guard::ClaimBeforeRun,
        Some(Mutant::TokenSentAgain) => Guard::ClaimOnce,
        Some(Mutant::CutoverBeforeClaim) => Guard::ClaimBeforeCutover,
        Some(Mutant::QuietSourceThaws) => Guard::QuietBinds,
        Some(Mutant::VoidMonitorsStay) => Guard::VoidMonitorsEnd,
        Some(Mutant::RekeyWithoutSettle) => Guard::RekeySettles,
        Some(Mutant::StopTakenForShutDown) => Guard::StopIsNoShutDown,
        Some(Mutant::FrozenEnded) => Guard::FrozenThaws,
        _ => return Safeguards::ALL,
    };
    Safeguards::without(without)
}

/// Changes what an entry asks, the same on every replica.
pub fn on_apply(
    mutant: Option<Mutant>,
    state: &mut ClusterState,
    envelope: &Envelope,
) -> Option<Envelope> {
    match (mutant, &envelope.command) {
        (
            Some(Mutant::NoCompareAndSet),
            Command::Cutover {
                migration, claimed, ..
            },
        ) => {
            let known = state.migrations.get_mut(migration)?;
            let MigrationState::Aborted { at, .. } = known.state else {
                return None;
            };
            let token = state.vms.get(&known.vm)?.ownership.token;
            known.state = MigrationState::Active {
                expects: token,
                reserved: *claimed,
                reserved_at: at,
                renewals: 0,
                ticket: String::new(),
            };
            let mut changed = envelope.clone();
            if let Command::Cutover { expects, .. } = &mut changed.command {
                *expects = token;
            }
            Some(changed)
        }
        (Some(Mutant::EndRewritten), Command::ReportMigration { migration, .. }) => {
            let known = state.migrations.get_mut(migration)?;
            if let MigrationState::CutOver { at, .. } = known.state {
                let reason = "reported".into();
                known.state = MigrationState::Aborted { at, reason };
            }
            None
        }
        (Some(Mutant::DrainedTooEarly), Command::DrainTrouble { node, .. }) => {
            state.nodes.get_mut(node)?.duty = Duty::Drained;
            None
        }
        (Some(Mutant::AbortsIgnored), Command::AbortMigration { reason, .. }) => {
            let mut changed = envelope.clone();
            changed.command = Command::Note {
                objects: Vec::new(),
                severity: Severity::Warn,
                kind: "mutant".into(),
                detail: reason.clone(),
                why: Why::default(),
            };
            Some(changed)
        }
        (Some(Mutant::NoReason), Command::StartVm { .. }) => {
            let mut changed = envelope.clone();
            if let Command::StartVm { why, .. } = &mut changed.command {
                *why = Why::default();
            }
            Some(changed)
        }
        (Some(Mutant::LateAbort), Command::AbortMigration { migration, .. }) => {
            let known = state.migrations.get_mut(migration)?;
            if let MigrationState::CutOver { at, expects, token } = known.state {
                known.state = MigrationState::Active {
                    expects,
                    reserved: token,
                    reserved_at: at,
                    renewals: 0,
                    ticket: String::new(),
                };
                let from = known.from;
                let record = &mut state.vms.get_mut(&known.vm)?.ownership;
                record.owner = Some(from);
            }
            None
        }
        _ => None,
    }
}

/// Changes the state that an entry left, the same on every replica.
pub fn applied(mutant: Option<Mutant>, state: &mut ClusterState, envelope: &Envelope) {
    if let (Some(Mutant::AbsenceForgotten), Command::RegisterNode { node, .. }) =
        (mutant, &envelope.command)
        && let Some(known) = state.nodes.get_mut(node)
    {
        known.absence = None;
    }
    if mutant == Some(Mutant::RequestsForgotten) {
        state.answers.clear();
        state.answer_order.clear();
    }
    if let (Some(Mutant::LeasesStay), Command::Cutover { migration, .. }) =
        (mutant, &envelope.command)
        && let Some(known) = state.migrations.get(migration)
        && matches!(known.state, MigrationState::CutOver { .. })
    {
        let (vm, from) = (known.vm, known.from);
        if let Some(vm) = state.vms.get_mut(&vm) {
            vm.ownership.owner = Some(from);
        }
    }
}
