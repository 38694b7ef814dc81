//! The only writer of the replicated state: one command in, one answer out.
//!
//! Deterministic and total: no clock, no failure, no panic. A refused command changes nothing but the
//! memory of its answer, so a repeated request is answered as it was the first time.

mod audit;
mod cluster;
mod failback;
mod migrations;
#[cfg(test)]
mod tests;
mod trust;
mod vms;

use std::sync::Arc;

use crate::command::{Command, Envelope, Outcome, Rejection, Reply};
use crate::event::{Event, Object, Severity, Why};
use crate::ids::{LogIndex, Name, NodeId, Token, VmId};
use crate::state::{ClusterState, EVENTS_MAX, Node, REQUESTS_MAX, Vm};

/// What one entry's rules know besides the state: who asks, when, at which index.
pub(crate) struct Entry<'e> {
    pub(crate) index: LogIndex,
    pub(crate) actor: &'e str,
    pub(crate) at_ms: u64,
    sequence: u32,
}

impl Entry<'_> {
    /// Who asks, as a record keeps it.
    fn maker(&self) -> String {
        clip(self.actor.to_owned(), ACTOR_BYTES_MAX)
    }
}

/// The longest name of an asker that a record keeps, bytes.
const ACTOR_BYTES_MAX: usize = 256;
/// From this token on the cluster warns that the counter nears its end: a sixteenth of it is left.
const TOKENS_WARN_AT: u32 = Token::LIMIT - Token::LIMIT / 16;
/// The longest detail of an event, bytes: it may quote what a monitor or a guest said.
pub(crate) const DETAIL_BYTES_MAX: usize = 2_048;

/// A text cut to at most `bytes_max` bytes, at a character.
pub(crate) fn clip(mut text: String, bytes_max: usize) -> String {
    if text.len() > bytes_max {
        let cut = (0..=bytes_max)
            .rev()
            .find(|&at| text.is_char_boundary(at))
            .unwrap_or(0);
        text.truncate(cut);
    }
    text
}

pub(crate) type Applied = Result<Outcome, Rejection>;

impl ClusterState {
    /// Applies the entry at `index` and answers it.
    pub fn apply(&mut self, index: LogIndex, envelope: &Envelope) -> Reply {
        self.applied = index;
        if let Some(answer) = self.answers.get(&envelope.request) {
            return answer.clone();
        }
        let mut entry = Entry {
            index,
            actor: &envelope.actor,
            at_ms: envelope.at_ms,
            sequence: 0,
        };
        let tokens_before = self.token_last;
        let object = match &envelope.asked {
            Some(_) => envelope.command.object(self),
            None => String::new(),
        };
        let reply = match self.carry_out(&mut entry, &envelope.command) {
            Ok(outcome) => Reply::Done { index, outcome },
            Err(rejection) => Reply::Rejected(rejection),
        };
        self.warn_of_the_last_tokens(&mut entry, tokens_before);
        self.record_asked(index, envelope, object, &reply);
        self.remember(envelope, reply.clone());
        reply
    }

    /// Says once that the counter nears its end.
    fn warn_of_the_last_tokens(&mut self, entry: &mut Entry<'_>, before: Token) {
        if before.0 < TOKENS_WARN_AT && self.token_last.0 >= TOKENS_WARN_AT {
            let left = Token::LIMIT - self.token_last.0;
            self.note(
                entry,
                Severity::Warn,
                vec![Object::Cluster],
                "cluster.tokens-low",
                format!("{left} of 2^30 fencing tokens are left; plan to move into a new cluster"),
                None,
            );
        }
    }

    fn remember(&mut self, envelope: &Envelope, reply: Reply) {
        self.answers.insert(envelope.request.clone(), reply);
        self.answer_order.push_back(envelope.request.clone());
        while self.answer_order.len() > REQUESTS_MAX {
            if let Some(oldest) = self.answer_order.pop_front() {
                self.answers.remove(&oldest);
            }
        }
    }

    fn carry_out(&mut self, entry: &mut Entry<'_>, command: &Command) -> Applied {
        if self.cluster.is_none() && !matches!(command, Command::InitCluster { .. }) {
            return Err(Rejection::NotInitialised);
        }
        match command {
            Command::InitCluster {
                id,
                name,
                broker_uid,
                node_name,
                address,
            } => self.init_cluster(entry, id, name, *broker_uid, node_name, address),
            Command::JoinNode {
                token,
                secret_hash,
                name,
                address,
                key,
            } => self.join_node(entry, (token, secret_hash), name, address, *key),
            Command::RemoveNode { node } => self.remove_node(entry, *node),
            Command::RegisterNode {
                node,
                incarnation,
                replaces,
                address,
                facts,
            } => self.register_node(entry, *node, (*incarnation, *replaces), address, facts),
            Command::Absent {
                node,
                incarnation,
                duration_ms,
            } => self.absent(entry, *node, *incarnation, *duration_ms),
            Command::Returned {
                node,
                incarnation,
                absence,
            } => self.returned(*node, *incarnation, *absence),
            Command::NodeLost {
                node,
                incarnation,
                why,
            } => self.node_lost(entry, *node, *incarnation, why),
            Command::StartDrain { node, reason } => self.start_drain(entry, *node, reason),
            Command::DrainTrouble {
                node,
                vm,
                reason,
                stuck,
            } => self.drain_trouble(entry, *node, *vm, reason, *stuck),
            Command::EndDrain { node } => self.end_drain(entry, *node),
            Command::Uncordon { node, failback } => self.uncordon(entry, *node, *failback),
            Command::StayAway { node, vm, reason } => self.stay_away(entry, *node, *vm, reason),
            Command::EndFailback { node } => self.end_failback(entry, *node),
            Command::AddVolume {
                name,
                url,
                uuid,
                fence,
                settle_ms,
                size_bytes,
                nodes,
                tls_ca,
            } => {
                let volume = crate::state::Volume {
                    id: crate::ids::VolumeId(entry.index.0),
                    name: name.clone(),
                    url: url.clone(),
                    uuid: uuid.clone(),
                    fence: *fence,
                    settle_ms: *settle_ms,
                    nodes: nodes.clone(),
                    size_bytes: *size_bytes,
                    tls_ca: tls_ca.clone(),
                };
                self.add_volume(entry, volume)
            }
            Command::RemoveVolume { volume } => self.remove_volume(entry, *volume),
            Command::CreateVm {
                name,
                spec,
                images,
                desired,
            } => self.create_vm(entry, name, spec, images, *desired),
            Command::DeleteVm { vm } => self.delete_vm(entry, *vm),
            Command::SetDesired {
                vm,
                desired,
                forced,
            } => self.set_desired(entry, *vm, *desired, *forced),
            Command::StartVm {
                vm,
                node,
                expects,
                why,
            } => self.start_vm(entry, *vm, *node, *expects, why),
            Command::DisksMade { vm, token } => self.disks_made(*vm, *token),
            Command::Activated { vm, node, token } => self.activated(entry, *vm, *node, *token),
            Command::Release {
                vm,
                node,
                expects,
                reason,
            } => self.release(entry, *vm, *node, *expects, reason),
            Command::Rekey {
                vm,
                node,
                expects,
                settle,
                reason,
            } => self.rekey(entry, *vm, *node, *expects, *settle, reason),
            Command::QueueMigration {
                vm,
                to,
                options,
                cause,
                why,
            } => self.queue_migration(entry, *vm, *to, options, cause, why),
            Command::StartMigration {
                migration,
                expects,
                ticket,
            } => self.start_migration(entry, *migration, *expects, ticket),
            Command::RenewMigrationToken { migration, burnt } => {
                self.renew_migration_token(entry, *migration, *burnt)
            }
            Command::Cutover {
                migration,
                expects,
                claimed,
            } => self.cutover(entry, *migration, *expects, *claimed),
            Command::AbortMigration { migration, reason } => {
                self.abort_migration(entry, *migration, reason)
            }
            Command::ReportMigration { migration, summary } => {
                self.report_migration(*migration, summary)
            }
            Command::SetSettings { settings } => self.set_settings(entry, settings),
            Command::SetRule { name, rule } => self.set_rule(entry, name, rule.as_ref()),
            Command::FoundTrust {
                authority,
                first_node_key,
            } => self.found_trust(entry, authority, *first_node_key),
            Command::CreateJoinToken {
                id,
                node,
                role,
                secret_hash,
                expires_at_ms,
            } => {
                let token = crate::trust::JoinToken {
                    node: node.clone(),
                    role: *role,
                    secret_hash: *secret_hash,
                    expires_at_ms: *expires_at_ms,
                    made_by: entry.maker(),
                    used_by: None,
                };
                self.create_join_token(entry, id, token)
            }
            Command::RevokeJoinToken { id } => self.revoke_join_token(entry, id),
            Command::CreateAccessToken {
                id,
                user,
                role,
                tags,
                secret_hash,
                expires_at_ms,
            } => {
                let token = crate::trust::AccessToken {
                    user: user.clone(),
                    role: *role,
                    tags: tags.clone(),
                    secret_hash: *secret_hash,
                    expires_at_ms: *expires_at_ms,
                    made_by: entry.maker(),
                };
                self.create_access_token(entry, id, token)
            }
            Command::RevokeAccessToken { id } => self.revoke_access_token(entry, id),
            Command::RotateAuthority {
                expects,
                roots,
                issuing,
            } => self.rotate_authority(entry, *expects, roots, issuing),
            Command::RetireRoot { fingerprint } => self.retire_root(entry, fingerprint),
            Command::TrustCluster { name, cluster } => self.trust_cluster(entry, name, cluster),
            Command::DistrustCluster { name } => self.distrust_cluster(entry, name),
            Command::Note {
                objects,
                severity,
                kind,
                detail,
                why,
            } => {
                self.note(
                    entry,
                    *severity,
                    objects.clone(),
                    kind,
                    detail.clone(),
                    Some(why.clone()),
                );
                Ok(Outcome::Nothing)
            }
        }
    }

    /// Records an event of this entry.
    pub(crate) fn note(
        &mut self,
        entry: &mut Entry<'_>,
        severity: Severity,
        objects: Vec<Object>,
        kind: &str,
        detail: String,
        why: Option<Why>,
    ) {
        self.events.push_back(Arc::new(Event {
            index: entry.index,
            sequence: entry.sequence,
            at_ms: entry.at_ms,
            actor: entry.actor.to_owned(),
            severity,
            objects,
            kind: kind.to_owned(),
            detail: clip(detail, DETAIL_BYTES_MAX),
            why,
        }));
        entry.sequence += 1;
        while self.events.len() > EVENTS_MAX {
            self.events.pop_front();
        }
    }

    /// Takes the next token from the one counter.
    pub(crate) fn take_token(&mut self) -> Result<Token, Rejection> {
        let token = self.token_last.next().ok_or(Rejection::TokensUsedUp)?;
        self.token_last = token;
        Ok(token)
    }

    /// Whether `count` more tokens can be granted: asked before an entry changes anything, so that an
    /// entry that needs several is all or nothing.
    pub(crate) fn tokens_left(&self, count: usize) -> Result<(), Rejection> {
        if self.token_last.0 as usize + count < Token::LIMIT as usize {
            Ok(())
        } else {
            Err(Rejection::TokensUsedUp)
        }
    }

    pub(crate) fn node(&self, node: NodeId) -> Result<&Node, Rejection> {
        self.nodes.get(&node).ok_or_else(|| Rejection::Unknown {
            kind: "node".into(),
            what: node.to_string(),
        })
    }

    pub(crate) fn node_mut(&mut self, node: NodeId) -> Result<&mut Node, Rejection> {
        self.nodes.get_mut(&node).ok_or_else(|| Rejection::Unknown {
            kind: "node".into(),
            what: node.to_string(),
        })
    }

    pub(crate) fn vm(&self, vm: VmId) -> Result<&Vm, Rejection> {
        self.vms.get(&vm).ok_or_else(|| Rejection::Unknown {
            kind: "vm".into(),
            what: vm.to_string(),
        })
    }

    pub(crate) fn vm_mut(&mut self, vm: VmId) -> Result<&mut Vm, Rejection> {
        self.vms.get_mut(&vm).ok_or_else(|| Rejection::Unknown {
            kind: "vm".into(),
            what: vm.to_string(),
        })
    }

    /// What people call a node, or its number once it is gone.
    pub fn node_label(&self, node: NodeId) -> String {
        self.nodes
            .get(&node)
            .map_or_else(|| node.to_string(), |node| node.name.to_string())
    }

    /// What people call a machine, or its number once it is gone.
    pub fn vm_label(&self, vm: VmId) -> String {
        self.vms
            .get(&vm)
            .map_or_else(|| vm.to_string(), |vm| vm.name.to_string())
    }
}

pub(crate) fn name_taken(kind: &str, name: &Name) -> Rejection {
    Rejection::NameTaken {
        kind: kind.to_owned(),
        name: name.clone(),
    }
}
