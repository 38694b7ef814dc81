//! What a node agent may be told to do. Each act names what it was decided for, and whoever carries it
//! out compares before it acts: an act is good for that token, monitor or migration and no other.

use serde::{Deserialize, Serialize};

use super::FlowKind;
use crate::command::ReleaseReason;
use crate::ids::{MigrationId, Token, VmId};

/// One thing to do. The acts of one machine are carried out in their order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Act {
    /// Make the disks if they are not made, claim `token`, wait the settle time if asked, confirm,
    /// start a monitor, permit it, and commit [`crate::Command::Activated`].
    ///
    /// A claim without a good answer just ends the flow: the token is in [`super::NodeView::begun`] and
    /// the next decision re-keys. Any other failure goes to [`super::NodeView::start_failures`].
    Start {
        /// Which machine.
        vm: VmId,
        /// Under which token.
        token: Token,
        /// Wait, verify the group and COMMIT the whole files before the confirm.
        settle: bool,
    },
    /// Propose [`crate::Command::Rekey`].
    Rekey {
        /// Which machine.
        vm: VmId,
        /// The token it has.
        expects: Token,
        /// Whether a write of that token, or of an unknown run, may be outstanding.
        settle: bool,
        /// Why.
        reason: String,
    },
    /// A live monitor is behind its record: claim `token`, settle if asked, confirm, `Monitor.Rekey`,
    /// permit, and commit `Activated`.
    TakeUpToken {
        /// Which machine.
        vm: VmId,
        /// The record's token.
        token: Token,
        /// Settle before the confirm.
        settle: bool,
        /// Which monitor.
        nonce: u64,
    },
    /// A frozen monitor whose token has not moved: confirm that with a linearizable read, then permit.
    Thaw {
        /// Which machine.
        vm: VmId,
        /// The record's token.
        token: Token,
        /// Which monitor.
        nonce: u64,
    },
    /// End a monitor.
    Kill {
        /// Which machine.
        vm: VmId,
        /// The monitor's token.
        token: Token,
        /// Which monitor.
        nonce: u64,
        /// Why.
        why: String,
    },
    /// Stop the guest; the monitor drains and flushes unless forced, then says `Stopped`.
    StopGuest {
        /// Which machine.
        vm: VmId,
        /// Its token.
        token: Token,
        /// Leave what is not on disk yet behind.
        forced: bool,
    },
    /// Propose [`crate::Command::Release`].
    Release {
        /// Which machine.
        vm: VmId,
        /// The token it has.
        expects: Token,
        /// Why.
        reason: ReleaseReason,
    },
    /// Propose `Activated`: the monitor runs under the record's token.
    Activated {
        /// Which machine.
        vm: VmId,
        /// Its token.
        token: Token,
    },
    /// Destination: make the monitor that receives.
    PrepareIncoming {
        /// Which machine.
        vm: VmId,
        /// Which migration.
        migration: MigrationId,
        /// The token it will run under, as reserved now.
        reserved: Token,
    },
    /// Source: have the destination's addresses, then tell the monitor to send.
    Send {
        /// Which machine.
        vm: VmId,
        /// Which migration.
        migration: MigrationId,
        /// The source's token.
        expects: Token,
    },
    /// Source: the migration is aborted and the guest never stopped; end the sending.
    CancelSend {
        /// Which machine.
        vm: VmId,
        /// Which migration.
        migration: MigrationId,
    },
    /// Destination: the source is quiet; claim every file of the machine under `reserved`, each once.
    ClaimForCutover {
        /// Which machine.
        vm: VmId,
        /// Which migration.
        migration: MigrationId,
        /// The token to claim.
        reserved: Token,
    },
    /// Destination: propose [`crate::Command::RenewMigrationToken`], the reserved token is burnt.
    RenewToken {
        /// Which machine.
        vm: VmId,
        /// Which migration.
        migration: MigrationId,
        /// The burnt token.
        burnt: Token,
    },
    /// Destination: propose [`crate::Command::Cutover`].
    ProposeCutover {
        /// Which machine.
        vm: VmId,
        /// Which migration.
        migration: MigrationId,
        /// The source's token.
        expects: Token,
        /// The token that every file acknowledged.
        claimed: Token,
    },
    /// Propose [`crate::Command::AbortMigration`].
    ProposeAbort {
        /// Which machine.
        vm: VmId,
        /// Which migration.
        migration: MigrationId,
        /// Why.
        reason: String,
    },
    /// Destination: the cutover is applied; permit the complete monitor, announce the network, and
    /// commit `Activated`.
    RunAfterCutover {
        /// Which machine.
        vm: VmId,
        /// The record's token.
        token: Token,
        /// Which migration.
        migration: MigrationId,
        /// Which monitor.
        nonce: u64,
    },
    /// Destination: the abort is applied; end the incoming monitor.
    DiscardIncoming {
        /// Which machine.
        vm: VmId,
        /// Which migration.
        migration: MigrationId,
        /// Which monitor.
        nonce: u64,
    },
    /// Destination: propose [`crate::Command::ReportMigration`] with what both sides measured.
    ReportMigration {
        /// Which machine.
        vm: VmId,
        /// Which migration.
        migration: MigrationId,
    },
}

impl Act {
    /// The machine that it is about.
    pub fn vm(&self) -> VmId {
        match self {
            Act::Start { vm, .. }
            | Act::Rekey { vm, .. }
            | Act::TakeUpToken { vm, .. }
            | Act::Thaw { vm, .. }
            | Act::Kill { vm, .. }
            | Act::StopGuest { vm, .. }
            | Act::Release { vm, .. }
            | Act::Activated { vm, .. }
            | Act::PrepareIncoming { vm, .. }
            | Act::Send { vm, .. }
            | Act::CancelSend { vm, .. }
            | Act::ClaimForCutover { vm, .. }
            | Act::RenewToken { vm, .. }
            | Act::ProposeCutover { vm, .. }
            | Act::ProposeAbort { vm, .. }
            | Act::RunAfterCutover { vm, .. }
            | Act::DiscardIncoming { vm, .. }
            | Act::ReportMigration { vm, .. } => *vm,
        }
    }

    /// Whether a guest runs at the end of it: decided only under a valid lease.
    pub fn lets_a_guest_run(&self) -> bool {
        match self {
            Act::Start { .. }
            | Act::TakeUpToken { .. }
            | Act::Thaw { .. }
            | Act::ProposeCutover { .. }
            | Act::RunAfterCutover { .. } => true,
            Act::Rekey { .. }
            | Act::Kill { .. }
            | Act::StopGuest { .. }
            | Act::Release { .. }
            | Act::Activated { .. }
            | Act::PrepareIncoming { .. }
            | Act::Send { .. }
            | Act::CancelSend { .. }
            | Act::ClaimForCutover { .. }
            | Act::RenewToken { .. }
            | Act::ProposeAbort { .. }
            | Act::DiscardIncoming { .. }
            | Act::ReportMigration { .. } => false,
        }
    }

    /// The monitor that it ends.
    pub fn ends(&self) -> Option<u64> {
        match self {
            Act::Kill { nonce, .. } | Act::DiscardIncoming { nonce, .. } => Some(*nonce),
            _ => None,
        }
    }

    /// What kind of flow it makes; `None` for ends, which go beside one.
    pub fn flow_kind(&self) -> Option<FlowKind> {
        match self {
            Act::Kill { .. } | Act::DiscardIncoming { .. } => None,
            Act::Start { .. } => Some(FlowKind::Start),
            Act::TakeUpToken { .. } => Some(FlowKind::TakeUpToken),
            Act::Thaw { .. } => Some(FlowKind::Thaw),
            Act::StopGuest { .. } => Some(FlowKind::StopGuest),
            Act::PrepareIncoming { .. } => Some(FlowKind::PrepareIncoming),
            Act::Send { .. } | Act::CancelSend { .. } => Some(FlowKind::Send),
            Act::ClaimForCutover { .. } => Some(FlowKind::ClaimForCutover),
            Act::RunAfterCutover { .. } => Some(FlowKind::RunAfterCutover),
            Act::Rekey { .. }
            | Act::Release { .. }
            | Act::Activated { .. }
            | Act::RenewToken { .. }
            | Act::ProposeCutover { .. }
            | Act::ProposeAbort { .. }
            | Act::ReportMigration { .. } => Some(FlowKind::Propose),
        }
    }
}
