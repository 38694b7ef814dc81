//! Which steps an act is made of.

use cluster_model::agent::Act;
use cluster_model::{Command, Token, VmId};

use super::{Flow, Step};
use crate::mutants::Mutant;
use crate::world::{MS, World, node_id};

impl World {
    pub(super) fn steps(&self, node: usize, flow: &Flow, act: &Act) -> Vec<Step> {
        let mutant = self.mutant;
        let me = node_id(node);
        let settles = |vm: VmId, token: Token, settle: bool| {
            let ms = flow
                .state
                .vms
                .get(&vm)
                .map_or(1_000, |vm| flow.state.settle(vm, 0).ms);
            match settle {
                true if mutant == Some(Mutant::NoSettle) => vec![Step::Verify(vm, token)],
                true if mutant == Some(Mutant::NoCommitOnTakeover) => {
                    vec![Step::Settle(ms * MS)]
                }
                true => vec![Step::Settle(ms * MS), Step::Verify(vm, token)],
                false => Vec::new(),
            }
        };
        let confirm = match mutant {
            Some(Mutant::NoConfirm) => Vec::new(),
            _ => vec![Step::Confirm],
        };
        let activated = |vm, token| {
            Step::Propose(Box::new(Command::Activated {
                vm,
                node: me,
                token,
            }))
        };
        match act.clone() {
            Act::Start { vm, token, settle } => {
                let mut steps = Vec::new();
                if flow.state.vms.get(&vm).is_some_and(|vm| !vm.disks_made) {
                    steps.push(Step::Propose(Box::new(Command::DisksMade { vm, token })));
                }
                steps.push(Step::Build(vm, token));
                if mutant == Some(Mutant::RunBeforeClaim) {
                    steps.extend(confirm);
                    steps.push(Step::Permit(vm, token));
                    steps.push(Step::Claim(vm, token));
                } else {
                    steps.push(Step::Claim(vm, token));
                    steps.extend(settles(vm, token, settle));
                    steps.extend(confirm);
                    steps.push(Step::Permit(vm, token));
                }
                steps.push(activated(vm, token));
                steps
            }
            Act::TakeUpToken {
                vm,
                token,
                settle,
                nonce,
            } => {
                let mut steps = vec![Step::Claim(vm, token)];
                steps.extend(settles(vm, token, settle));
                steps.extend(confirm);
                steps.push(Step::Allowed(vm, token));
                steps.push(Step::Rekey(nonce, token));
                steps.push(Step::Permit(vm, token));
                steps.push(activated(vm, token));
                steps
            }
            Act::Thaw { vm, token, .. } => {
                let mut steps = confirm;
                steps.push(Step::Permit(vm, token));
                steps
            }
            Act::Kill { nonce, .. } | Act::DiscardIncoming { nonce, .. } => vec![Step::End(nonce)],
            Act::Rekey {
                vm,
                expects,
                settle,
                reason,
            } => vec![Step::Propose(Box::new(Command::Rekey {
                vm,
                node: me,
                expects,
                settle,
                reason,
            }))],
            Act::StopGuest { vm, token, .. } => vec![Step::Stop(vm, token)],
            Act::Release {
                vm,
                expects,
                reason,
            } => vec![Step::Propose(Box::new(Command::Release {
                vm,
                node: me,
                expects,
                reason,
            }))],
            Act::Activated { vm, token } => vec![activated(vm, token)],
            Act::PrepareIncoming {
                vm,
                migration,
                reserved,
            } => vec![Step::BuildIncoming(vm, migration, reserved)],
            Act::Send { vm, migration, .. } => vec![Step::AskReady(vm, migration)],
            Act::CancelSend { vm, migration } => vec![Step::CancelSend(vm, migration)],
            Act::ClaimForCutover { vm, reserved, .. } => {
                let (claim, claimed) = (Step::Claim(vm, reserved), Step::Claimed(vm, reserved));
                match mutant {
                    Some(Mutant::CutoverBeforeClaim) => {
                        vec![claimed, Step::Settle(300 * MS), claim]
                    }
                    _ => vec![claim, claimed],
                }
            }
            Act::RenewToken {
                migration, burnt, ..
            } => vec![Step::Propose(Box::new(Command::RenewMigrationToken {
                migration,
                burnt,
            }))],
            Act::ProposeCutover {
                migration,
                expects,
                claimed,
                ..
            } => vec![Step::Propose(Box::new(Command::Cutover {
                migration,
                expects,
                claimed,
            }))],
            Act::ProposeAbort {
                migration, reason, ..
            } => vec![Step::Propose(Box::new(Command::AbortMigration {
                migration,
                reason,
            }))],
            Act::RunAfterCutover {
                vm, token, nonce, ..
            } => vec![
                Step::ByCutover(vm),
                Step::Rekey(nonce, token),
                Step::Permit(vm, token),
                activated(vm, token),
            ],
            Act::ReportMigration { migration, .. } => {
                vec![Step::Propose(Box::new(Command::ReportMigration {
                    migration,
                    summary: serde_json::json!({ "verified": true }),
                }))]
            }
        }
    }
}
