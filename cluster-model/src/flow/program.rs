//! The steps that each act is made of.
//!
//! A line here is the order in which things happen to a guest, so the order is the safety argument: claim, settle,
//! confirm, run. What a line needs from an earlier one (a claim, a confirm, a monitor) it takes from the flow's proofs.

use super::Flow;
use crate::agent::Act;
use crate::command::Command;
use crate::ids::{MigrationId, Token};
use crate::safeguards::Safeguard;
use crate::state::MigrationState;

/// One operation of an act; see the [`super::Step`] of the same name.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Op {
    EnsureBroker,
    MakeDisks(Token),
    Propose(Box<Command>),
    Claim(Token),
    Settle,
    VerifyAndCommit(Token),
    Build(Token, Option<MigrationId>),
    Built,
    Confirm,
    /// The mutant's confirm.
    ConfirmByDecision,
    /// The confirmed log gives the machine to this node under that token.
    Allowed(Token),
    /// The monitor that the act is about, as it last described itself.
    FindMonitor(u64),
    ClaimOfOneThatRan,
    ClaimByCutover(Token),
    /// The found monitor takes up that token.
    Rekey(Token),
    /// The permit is made and handed over.
    Run,
    End(u64, String),
    /// Ends the monitor that this act has built.
    EndBuilt(&'static str),
    Stop(Token, bool),
    AwaitStop(Token),
    Refresh(Token),
    RefreshOne(u64),
    /// Proposes, unless the monitor under that token runs by now.
    UnlessRunning(Token, Box<Command>),
    AskReady(MigrationId),
    /// A moment before the destination is asked again.
    Pause,
    Send(MigrationId),
    CancelSend(MigrationId),
    LearnClaimed(Token),
    Report(MigrationId),
    /// A wait that another operation goes on after.
    Waited,
}

/// Proposes the end of a migration.
pub(super) fn abort(migration: MigrationId, reason: &str) -> Op {
    propose(Command::AbortMigration {
        migration,
        reason: reason.to_owned(),
    })
}

fn propose(command: Command) -> Op {
    Op::Propose(Box::new(command))
}

impl Flow {
    pub(super) fn program(&self, act: &Act) -> Vec<Op> {
        let me = self.me;
        let activated = |vm, token| {
            propose(Command::Activated {
                vm,
                node: me,
                token,
            })
        };
        match act.clone() {
            Act::Start { vm, token, settle } => {
                let Some(machine) = self.machine() else {
                    return vec![Op::Allowed(token)];
                };
                let mut ops = vec![Op::EnsureBroker];
                if !machine.disks_made {
                    ops.push(Op::MakeDisks(token));
                    ops.push(propose(Command::DisksMade { vm, token }));
                }
                // The monitor only looks its disks up before its first permit, so it may be built meanwhile.
                ops.push(Op::Build(token, None));
                if self.safeguards.hold(Safeguard::ClaimBeforeRun) {
                    ops.push(Op::Claim(token));
                    ops.extend(self.settle(token, settle));
                    ops.push(Op::Built);
                    ops.push(self.confirm());
                    ops.push(Op::Run);
                } else {
                    ops.extend([Op::Built, self.confirm(), Op::Run, Op::Claim(token)]);
                }
                ops.push(activated(vm, token));
                ops
            }
            Act::TakeUpToken {
                vm,
                token,
                settle,
                nonce,
            } => {
                let mut ops = vec![Op::EnsureBroker, Op::FindMonitor(nonce), Op::Claim(token)];
                ops.extend(self.settle(token, settle));
                ops.extend([
                    self.confirm(),
                    Op::Allowed(token),
                    Op::Rekey(token),
                    Op::Run,
                    activated(vm, token),
                ]);
                ops
            }
            Act::Thaw { nonce, .. } => vec![
                Op::FindMonitor(nonce),
                Op::ClaimOfOneThatRan,
                self.confirm(),
                Op::Run,
            ],
            Act::Kill { nonce, why, .. } => vec![Op::End(nonce, why)],
            Act::DiscardIncoming { nonce, .. } => {
                vec![Op::End(nonce, "its migration was aborted".to_owned())]
            }
            Act::StopGuest { token, forced, .. } => {
                vec![Op::Stop(token, forced), Op::AwaitStop(token)]
            }
            Act::Rekey {
                vm,
                expects,
                settle,
                reason,
            } => {
                let command = Command::Rekey {
                    vm,
                    node: me,
                    expects,
                    settle,
                    reason,
                };
                vec![
                    Op::Refresh(expects),
                    Op::UnlessRunning(expects, Box::new(command)),
                ]
            }
            Act::Release {
                vm,
                expects,
                reason,
            } => vec![propose(Command::Release {
                vm,
                node: me,
                expects,
                reason,
            })],
            Act::Activated { vm, token } => vec![activated(vm, token)],
            Act::PrepareIncoming { migration, .. } => {
                match self
                    .state
                    .migrations
                    .get(&migration)
                    .map(|known| &known.state)
                {
                    Some(MigrationState::Active { reserved, .. }) => {
                        vec![Op::Build(*reserved, Some(migration)), Op::Built]
                    }
                    _ => Vec::new(),
                }
            }
            Act::Send { migration, .. } => {
                match self
                    .state
                    .migrations
                    .get(&migration)
                    .map(|known| &known.state)
                {
                    Some(MigrationState::Active { .. }) => {
                        vec![Op::AskReady(migration), Op::Send(migration)]
                    }
                    _ => Vec::new(),
                }
            }
            Act::CancelSend { migration, .. } => vec![Op::CancelSend(migration)],
            Act::ClaimForCutover { reserved, .. } => {
                if self.safeguards.hold(Safeguard::ClaimBeforeCutover) {
                    vec![Op::Claim(reserved), Op::LearnClaimed(reserved)]
                } else {
                    vec![Op::LearnClaimed(reserved)]
                }
            }
            Act::RenewToken {
                migration, burnt, ..
            } => vec![propose(Command::RenewMigrationToken { migration, burnt })],
            Act::ProposeCutover {
                migration,
                expects,
                claimed,
                ..
            } => {
                let mut ops = vec![propose(Command::Cutover {
                    migration,
                    expects,
                    claimed,
                })];
                if !self.safeguards.hold(Safeguard::ClaimBeforeCutover) {
                    ops.push(Op::Claim(claimed));
                }
                ops
            }
            Act::ProposeAbort {
                migration, reason, ..
            } => vec![abort(migration, &reason)],
            Act::RunAfterCutover {
                vm, token, nonce, ..
            } => vec![
                Op::FindMonitor(nonce),
                Op::ClaimByCutover(token),
                // Where its token was renewed since it was built.
                Op::Rekey(token),
                Op::Run,
                activated(vm, token),
            ],
            Act::ReportMigration { migration, .. } => vec![Op::Report(migration)],
        }
    }

    fn confirm(&self) -> Op {
        if self.safeguards.hold(Safeguard::ConfirmAfterClaim) {
            Op::Confirm
        } else {
            Op::ConfirmByDecision
        }
    }

    /// After a takeover: until nothing of the old owner is under way in the storage server, and what it left there
    /// is on its disk.
    fn settle(&self, token: Token, settle: bool) -> Vec<Op> {
        let has_disks = self.machine().is_some_and(|vm| !vm.spec.disks.is_empty());
        if !settle || !has_disks {
            return Vec::new();
        }
        let mut ops = Vec::new();
        if self.safeguards.hold(Safeguard::SettleOnTakeover) {
            ops.push(Op::Settle);
        }
        if self.safeguards.hold(Safeguard::CommitOnTakeover) {
            ops.push(Op::VerifyAndCommit(token));
        }
        ops
    }
}
