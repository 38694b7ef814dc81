//! What a member may do to the others: who still is one, and what it may hand to the leader.
//!
//! Voters and witnesses hold the log and may lead, so nothing is gained by refusing them an entry. A learner
//! holds nothing but its own machines, and whoever takes it over gets no more than those:
//!
//! ```text
//!  from a voter or witness ───────────────────────────────────────────► taken
//!  from a learner, about itself, its machines, its migrations ────────► taken
//!  from a learner, else ──► with an access token that may call that ──► taken, in the token's user's name
//!                                └ without ──► refused
//!  from anybody else ──► refused
//! ```

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use crate::command::{Command, Envelope};
use crate::ids::{LogIndex, MigrationId, Name, NodeId, VmId};
use crate::state::{ClusterState, Desired, MigrationCause, Node};
use crate::trust::access::{Denied, Who, authorise_tagged};
use crate::trust::call::Call;

/// The largest entry that a learner hands on of its own, bytes of JSON: a migration's summary, the largest of
/// them, has up to 16 KiB.
pub const OWN_ENTRY_BYTES_MAX: usize = 32 * 1024;
/// The longest request id of such an entry, bytes: a node's number and a UUID have under 60.
pub const OWN_REQUEST_BYTES_MAX: usize = 256;

/// What a node is to the cluster, as far as this replica knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It belongs to it.
    Member {
        /// Whether it may have a vote, and so may lead.
        may_lead: bool,
    },
    /// It was let in once and is not any more: refuse it, whatever its certificate says.
    Removed,
    /// This replica has not applied the entry that lets it in: look again later.
    NotYetKnown,
}

/// Why the leader does not take an entry from a node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotYours {
    /// It does not belong to the cluster.
    #[error(
        "{node} is no member of this cluster, so nothing is taken from it; to let it in: clusterctl node add"
    )]
    NotAMember {
        /// Who.
        node: NodeId,
    },
    /// It declares a node lost, which only who leads may: it led when it saw so, and its successor may have renewed
    /// that node's lease since.
    #[error(
        "{node} does not lead any more and may not declare {object} lost; nothing to do: the leader counts that node's lease itself"
    )]
    LeadsNoMore {
        /// Who.
        node: Name,
        /// Who would be lost, in words.
        object: String,
    },
    /// A learner asked for what is neither its own nor asked for by a person.
    #[error(
        "{node} is a learner and may not change {object}: it hands on what is its own, or what an access token allows; try a voter: clusterctl node list"
    )]
    NotItsOwn {
        /// Who.
        node: Name,
        /// What it is about, in words.
        object: String,
    },
    /// The token that a learner showed does not allow it.
    #[error(transparent)]
    Denied(Denied),
    /// It wanted it done in the name of somebody else.
    #[error(
        "{node} showed the token of {user}, so it may not speak as `{actor}`; give the change no other actor"
    )]
    OtherActor {
        /// Who.
        node: Name,
        /// Whose token.
        user: Name,
        /// In whose name.
        actor: String,
    },
    /// A learner's own entry is larger than any that it has reason for.
    #[error(
        "{node} handed on an entry of more than {OWN_ENTRY_BYTES_MAX} bytes, or with a request id of more than {OWN_REQUEST_BYTES_MAX}; shorten it"
    )]
    TooLarge {
        /// Who.
        node: Name,
    },
    /// A person's change that would leave no trace in the audit.
    #[error(
        "{node} showed the token of {user} and did not say from where and by which call the change was asked for; upgrade clusterd there"
    )]
    Unrecorded {
        /// Who.
        node: Name,
        /// Whose token.
        user: Name,
    },
}

impl ClusterState {
    /// The largest entry that a learner hands on of its own, bytes of JSON: a migration's summary, the largest of
    /// them, has up to 16 KiB.
    pub const OWN_ENTRY_BYTES_MAX: usize = 32 * 1024;
    /// The longest request id of such an entry, bytes: a node's number and a UUID have under 60.
    pub const OWN_REQUEST_BYTES_MAX: usize = 256;

    /// What a node is to the cluster, as far as this replica knows: ids are log indices, so one that
    /// lies ahead of what is applied here may be a newcomer's.
    pub fn peer_standing(&self, id: NodeId) -> Standing {
        match self.nodes.get(&id) {
            Some(node) => Standing::Member {
                may_lead: node.role.may_lead(),
            },
            None if LogIndex(id.0) > self.applied => Standing::NotYetKnown,
            None => Standing::Removed,
        }
    }

    /// Whether the leader takes an entry that `from` (by its certificate) hands to it, with the access
    /// token that came along, if one did and it holds.
    ///
    /// A repeated request is no exception: by the time that it is applied its answer may be forgotten.
    ///
    /// # Errors
    /// [`NotYours`]: who may not change what, and what to try.
    pub fn may_propose(
        &self,
        from: NodeId,
        credential: Option<&Who>,
        envelope: &Envelope,
    ) -> Result<(), NotYours> {
        let Some(node) = self.nodes.get(&from) else {
            return Err(NotYours::NotAMember { node: from });
        };
        if node.role.may_lead() {
            return match envelope.command {
                Command::NodeLost { .. } => Err(NotYours::LeadsNoMore {
                    node: node.name.clone(),
                    object: envelope.command.object(self),
                }),
                _ => Ok(()),
            };
        }
        // Its own acts bear its own name, and are nobody's wish: they forge neither event nor audit.
        let speaks_for_itself =
            envelope.asked.is_none() && envelope.actor == format!("node/{}", node.name);
        if speaks_for_itself && self.is_of(node, &envelope.command) {
            return small_enough(node, envelope);
        }
        let command = &envelope.command;
        let (Some(who @ Who::Bearer(bearer)), Some(call)) = (credential, call_of(command)) else {
            let object = command.object(self);
            return Err(NotYours::NotItsOwn {
                node: node.name.clone(),
                object: if object.is_empty() {
                    "the cluster".to_owned()
                } else {
                    object
                },
            });
        };
        authorise_tagged(who, call, self.tags_touched(command)).map_err(NotYours::Denied)?;
        if envelope.actor != bearer.user.as_str() {
            return Err(NotYours::OtherActor {
                node: node.name.clone(),
                user: bearer.user.clone(),
                actor: envelope.actor.clone(),
            });
        }
        if envelope.asked.is_none() {
            return Err(NotYours::Unrecorded {
                node: node.name.clone(),
                user: bearer.user.clone(),
            });
        }
        Ok(())
    }

    /// Whether a command is about the node itself, a machine that it owns, or a migration that it is a side of.
    fn is_of(&self, node: &Node, command: &Command) -> bool {
        let me = node.id;
        let owns = |vm: &VmId| {
            self.vms
                .get(vm)
                .is_some_and(|vm| vm.ownership.owner == Some(me))
        };
        let destination = |migration: &MigrationId| {
            self.migrations
                .get(migration)
                .is_some_and(|migration| migration.to == me)
        };
        let source = |migration: &MigrationId| {
            self.migrations
                .get(migration)
                .is_some_and(|migration| migration.from == me)
        };
        match command {
            Command::RegisterNode { node, .. }
            | Command::Absent { node, .. }
            | Command::Returned { node, .. } => *node == me,
            Command::DisksMade { vm, .. } => owns(vm),
            Command::Activated { vm, node, .. }
            | Command::Release { vm, node, .. }
            | Command::Rekey { vm, node, .. } => *node == me && owns(vm),
            Command::RenewMigrationToken { migration, .. }
            | Command::Cutover { migration, .. }
            | Command::ReportMigration { migration, .. } => destination(migration),
            Command::AbortMigration { migration, .. } => {
                source(migration) || destination(migration)
            }
            Command::Note { .. } => true,
            Command::InitCluster { .. }
            | Command::JoinNode { .. }
            | Command::RemoveNode { .. }
            | Command::NodeLost { .. }
            | Command::StartDrain { .. }
            | Command::DrainTrouble { .. }
            | Command::EndDrain { .. }
            | Command::Uncordon { .. }
            | Command::StayAway { .. }
            | Command::EndFailback { .. }
            | Command::AddVolume { .. }
            | Command::RemoveVolume { .. }
            | Command::CreateVm { .. }
            | Command::DeleteVm { .. }
            | Command::SetDesired { .. }
            | Command::StartVm { .. }
            | Command::QueueMigration { .. }
            | Command::StartMigration { .. }
            | Command::SetSettings { .. }
            | Command::SetRule { .. }
            | Command::FoundTrust { .. }
            | Command::CreateJoinToken { .. }
            | Command::RevokeJoinToken { .. }
            | Command::CreateAccessToken { .. }
            | Command::RevokeAccessToken { .. }
            | Command::RotateAuthority { .. }
            | Command::RetireRoot { .. }
            | Command::TrustCluster { .. }
            | Command::DistrustCluster { .. } => false,
        }
    }

    /// The tags of the machine that a call by a person touches with this command.
    fn tags_touched<'s>(&'s self, command: &'s Command) -> Option<&'s BTreeSet<Name>> {
        let of_vm = |vm: &VmId| self.vms.get(vm).map(|vm| &vm.spec.tags);
        match command {
            Command::CreateVm { spec, .. } => Some(&spec.tags),
            Command::DeleteVm { vm }
            | Command::SetDesired { vm, .. }
            | Command::QueueMigration { vm, .. } => of_vm(vm),
            Command::AbortMigration { migration, .. } => self
                .migrations
                .get(migration)
                .and_then(|migration| of_vm(&migration.vm)),
            Command::InitCluster { .. }
            | Command::JoinNode { .. }
            | Command::RemoveNode { .. }
            | Command::RegisterNode { .. }
            | Command::Absent { .. }
            | Command::Returned { .. }
            | Command::NodeLost { .. }
            | Command::StartDrain { .. }
            | Command::DrainTrouble { .. }
            | Command::EndDrain { .. }
            | Command::Uncordon { .. }
            | Command::StayAway { .. }
            | Command::EndFailback { .. }
            | Command::AddVolume { .. }
            | Command::RemoveVolume { .. }
            | Command::StartVm { .. }
            | Command::DisksMade { .. }
            | Command::Activated { .. }
            | Command::Release { .. }
            | Command::Rekey { .. }
            | Command::StartMigration { .. }
            | Command::RenewMigrationToken { .. }
            | Command::Cutover { .. }
            | Command::ReportMigration { .. }
            | Command::SetSettings { .. }
            | Command::SetRule { .. }
            | Command::FoundTrust { .. }
            | Command::CreateJoinToken { .. }
            | Command::RevokeJoinToken { .. }
            | Command::CreateAccessToken { .. }
            | Command::RevokeAccessToken { .. }
            | Command::RotateAuthority { .. }
            | Command::RetireRoot { .. }
            | Command::TrustCluster { .. }
            | Command::DistrustCluster { .. }
            | Command::Note { .. } => None,
        }
    }
}

/// The state keeps thousands of requests and events: one learner's entries must not fill every node's memory.
fn small_enough(node: &Node, envelope: &Envelope) -> Result<(), NotYours> {
    let bytes = serde_json::to_vec(envelope).map_or(usize::MAX, |json| json.len());
    if envelope.request.0.len() <= OWN_REQUEST_BYTES_MAX && bytes <= OWN_ENTRY_BYTES_MAX {
        Ok(())
    } else {
        Err(NotYours::TooLarge {
            node: node.name.clone(),
        })
    }
}

/// The call by which a person asks for a command; none for what only nodes and controllers ask for.
fn call_of(command: &Command) -> Option<Call> {
    match command {
        Command::InitCluster { .. } => Some(Call::ClusterInit),
        Command::RemoveNode { .. } => Some(Call::NodeRemove),
        Command::StartDrain { .. } => Some(Call::NodeDrain),
        Command::Uncordon { .. } => Some(Call::NodeUncordon),
        Command::AddVolume { .. } => Some(Call::VolumeAdd),
        Command::RemoveVolume { .. } => Some(Call::VolumeRemove),
        Command::CreateVm { .. } => Some(Call::VmCreate),
        Command::DeleteVm { .. } => Some(Call::VmDelete),
        Command::SetDesired {
            desired: Desired::Running,
            ..
        } => Some(Call::VmStart),
        Command::SetDesired {
            desired: Desired::Stopped,
            ..
        } => Some(Call::VmStop),
        Command::QueueMigration { cause, .. } => Some(match cause {
            MigrationCause::Asked => Call::VmMigrate,
            MigrationCause::Drain(_) => Call::NodeDrain,
            MigrationCause::Balance => Call::BalanceRun,
            MigrationCause::Failback(_) => Call::NodeUncordon,
        }),
        Command::AbortMigration { .. } => Some(Call::MigrationCancel),
        Command::SetSettings { .. } => Some(Call::SettingsSet),
        Command::SetRule { .. } => Some(Call::RuleSet),
        Command::CreateJoinToken { .. } => Some(Call::NodeAdd),
        Command::RevokeJoinToken { .. } => Some(Call::JoinTokenRevoke),
        Command::CreateAccessToken { .. } => Some(Call::TokenCreate),
        Command::RevokeAccessToken { .. } => Some(Call::TokenRevoke),
        Command::RotateAuthority { .. } | Command::RetireRoot { .. } => Some(Call::CaRotate),
        Command::TrustCluster { .. } => Some(Call::TrustAdd),
        Command::DistrustCluster { .. } => Some(Call::TrustRemove),
        // A newcomer's proof is a secret, and what a learner could hand on of it is the hash, which it
        // knows of every token: newcomers knock at a voter.
        Command::JoinNode { .. }
        | Command::FoundTrust { .. }
        | Command::RegisterNode { .. }
        | Command::Absent { .. }
        | Command::Returned { .. }
        | Command::NodeLost { .. }
        | Command::DrainTrouble { .. }
        | Command::EndDrain { .. }
        | Command::StayAway { .. }
        | Command::EndFailback { .. }
        | Command::StartVm { .. }
        | Command::DisksMade { .. }
        | Command::Activated { .. }
        | Command::Release { .. }
        | Command::Rekey { .. }
        | Command::StartMigration { .. }
        | Command::RenewMigrationToken { .. }
        | Command::Cutover { .. }
        | Command::ReportMigration { .. }
        | Command::Note { .. } => None,
    }
}
