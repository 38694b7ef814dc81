//! Rules for live migrations: reserve at setup, then cutover or abort, whichever comes first in the log.

use super::{Applied, Entry};
use crate::command::{Outcome, Rejection};
use crate::event::{Object, Severity, Why};
use crate::ids::{MigrationId, NodeId, Token, VmId};
use crate::placement;
use crate::state::{
    ClusterState, Desired, ENDED_MIGRATIONS_MAX, Liveness, Migration, MigrationCause,
    MigrationOptions, MigrationState, NodeRole, OwnershipCause,
};
use crate::{RENEWALS_MAX, SUMMARY_BYTES_MAX};

/// Queued and active migrations at most.
const OPEN_MIGRATIONS_MAX: usize = 10_000;
/// A ticket: 32 bytes in hex.
const TICKET_HEX_LEN: usize = 64;

impl ClusterState {
    pub(super) fn queue_migration(
        &mut self,
        entry: &mut Entry<'_>,
        vm: VmId,
        to: NodeId,
        options: &MigrationOptions,
        cause: &MigrationCause,
        why: &Why,
    ) -> Applied {
        let known = self.vm(vm)?;
        let Some(from) = known.ownership.owner else {
            return Err(Rejection::NotRunning { vm });
        };
        if let Some(migration) = self.open_migration(vm) {
            return Err(Rejection::AlreadyMigrating {
                vm,
                migration: migration.id,
            });
        }
        if self
            .migrations
            .values()
            .filter(|migration| migration.is_open())
            .count()
            >= OPEN_MIGRATIONS_MAX
        {
            return Err(Rejection::TooLarge {
                what: "open migrations".into(),
                max: OPEN_MIGRATIONS_MAX as u64,
            });
        }
        self.may_migrate(vm, from, to)?;
        let id = MigrationId(entry.index.0);
        self.migrations.insert(
            id,
            Migration {
                id,
                vm,
                from,
                to,
                state: MigrationState::Queued,
                options: options.clone(),
                cause: cause.clone(),
                actor: entry.actor.to_owned(),
                queued_at_ms: entry.at_ms,
                started_at_ms: 0,
                ended_at_ms: 0,
                summary: None,
            },
        );
        let detail = format!(
            "{} {} → {}",
            self.vm_label(vm),
            self.node_label(from),
            self.node_label(to)
        );
        self.note(
            entry,
            Severity::Info,
            vec![
                Object::Migration(id),
                Object::Vm(vm),
                Object::Node(from),
                Object::Node(to),
            ],
            "migration.queued",
            detail,
            Some(why.clone()),
        );
        Ok(Outcome::Migration(id))
    }

    /// Preflight, as far as the log knows: everything that would make the migration fail later.
    ///
    /// # Errors
    /// The first thing that forbids it.
    pub fn may_migrate(&self, vm: VmId, from: NodeId, to: NodeId) -> Result<(), Rejection> {
        let known = self.vm(vm)?;
        let (source, destination) = (self.node(from)?, self.node(to)?);
        if from == to {
            return Err(Rejection::SameNode { vm, node: to });
        }
        if known.desired != Desired::Running {
            return Err(Rejection::NotDesired { vm });
        }
        placement::takes_machines(destination)?;
        placement::compatible(source, destination)?;
        placement::may_run(self, known, destination)
    }

    pub(super) fn start_migration(
        &mut self,
        entry: &mut Entry<'_>,
        id: MigrationId,
        expects: Token,
        ticket: &str,
    ) -> Applied {
        let migration = self.migration(id)?;
        let (vm, from, to) = (migration.vm, migration.from, migration.to);
        match &migration.state {
            MigrationState::Queued => {}
            // The same start again, after its answer was lost.
            MigrationState::Active { reserved, .. } => return Ok(Outcome::Token(*reserved)),
            _ => return Err(wrong_state(migration, "it cannot start")),
        }
        if ticket.len() != TICKET_HEX_LEN || !ticket.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(Rejection::BadSpec {
                field: "ticket".into(),
                problem: "32 bytes in hex".into(),
            });
        }
        self.check_owner(vm, from, expects)?;
        if !self.vm(vm)?.ownership.activated {
            return Err(Rejection::MigrationState {
                migration: id,
                is: "queued".into(),
                cannot: "it cannot start before its machine runs".into(),
            });
        }
        if self.node(from)?.liveness != Liveness::Up {
            return Err(Rejection::NodeUnfit {
                node: from,
                reason: "the source is not up".into(),
            });
        }
        self.may_migrate(vm, from, to)?;
        self.migration_slot(from, true)?;
        self.migration_slot(to, false)?;
        let reserved = self.take_token()?;
        let (index, at_ms) = (entry.index, entry.at_ms);
        if let Some(migration) = self.migrations.get_mut(&id) {
            migration.state = MigrationState::Active {
                expects,
                reserved,
                reserved_at: index,
                renewals: 0,
                ticket: ticket.to_owned(),
            };
            migration.started_at_ms = at_ms;
        }
        let detail = format!(
            "{} {} ({expects}) → {} ({reserved})",
            self.vm_label(vm),
            self.node_label(from),
            self.node_label(to)
        );
        self.note(
            entry,
            Severity::Info,
            vec![
                Object::Migration(id),
                Object::Vm(vm),
                Object::Node(from),
                Object::Node(to),
            ],
            "migration.started",
            detail,
            None,
        );
        Ok(Outcome::Token(reserved))
    }

    /// Whether a node has a slot left for one more migration out of it, or into it.
    ///
    /// # Errors
    /// [`Rejection::TooManyMigrations`].
    pub fn migration_slot(&self, node: NodeId, out: bool) -> Result<(), Rejection> {
        let running = self
            .migrations
            .values()
            .filter(|migration| migration.is_active())
            .filter(|migration| {
                if out {
                    migration.from == node
                } else {
                    migration.to == node
                }
            })
            .count();
        let running = u32::try_from(running).unwrap_or(u32::MAX);
        let (max, direction) = if out {
            (self.settings.migrations_out_max, "out")
        } else {
            (self.settings.migrations_in_max, "in")
        };
        if running < max {
            Ok(())
        } else {
            Err(Rejection::TooManyMigrations {
                node,
                direction: direction.into(),
                running,
                max,
            })
        }
    }

    pub(super) fn renew_migration_token(
        &mut self,
        entry: &mut Entry<'_>,
        id: MigrationId,
        burnt: Token,
    ) -> Applied {
        let migration = self.migration(id)?;
        let MigrationState::Active {
            reserved, renewals, ..
        } = &migration.state
        else {
            return Err(wrong_state(migration, "its token cannot be renewed"));
        };
        if *reserved != burnt {
            // Replaced since: by a re-key of the source, or by this very request.
            return Ok(Outcome::Token(*reserved));
        }
        if *renewals >= RENEWALS_MAX {
            return Err(Rejection::RenewalsUsedUp {
                migration: id,
                tries: RENEWALS_MAX + 1,
            });
        }
        let vm = migration.vm;
        let fresh = self.take_token()?;
        if let Some(migration) = self.migrations.get_mut(&id)
            && let MigrationState::Active {
                reserved,
                reserved_at,
                renewals,
                ..
            } = &mut migration.state
        {
            *reserved = fresh;
            *reserved_at = entry.index;
            *renewals += 1;
        }
        self.note(
            entry,
            Severity::Warn,
            vec![Object::Migration(id), Object::Vm(vm)],
            "migration.token-renewed",
            format!("a claim of {burnt} got no good answer; the destination claims {fresh}"),
            None,
        );
        Ok(Outcome::Token(fresh))
    }

    pub(super) fn cutover(
        &mut self,
        entry: &mut Entry<'_>,
        id: MigrationId,
        expects: Token,
        claimed: Token,
    ) -> Applied {
        let migration = self.migration(id)?;
        let (vm, from, to) = (migration.vm, migration.from, migration.to);
        match &migration.state {
            MigrationState::Active {
                expects: expected,
                reserved,
                ..
            } => {
                if *expected != expects || *reserved != claimed {
                    return Err(Rejection::MigrationState {
                        migration: id,
                        is: format!("active from {expected} to {reserved}"),
                        cannot: format!("it cannot cut over from {expects} to {claimed}"),
                    });
                }
            }
            // The same cutover again, after its answer was lost.
            MigrationState::CutOver { token, .. } if *token == claimed => {
                return Ok(Outcome::Token(claimed));
            }
            _ => return Err(wrong_state(migration, "it cannot cut over")),
        }
        self.check_owner(vm, from, expects)?;
        if self.node(to)?.liveness != Liveness::Up || self.node(to)?.role == NodeRole::Witness {
            return Err(Rejection::NodeUnfit {
                node: to,
                reason: "the destination is not up".into(),
            });
        }
        self.grant(entry, vm, Some(to), OwnershipCause::Cutover, false, claimed)?;
        let (index, at_ms) = (entry.index, entry.at_ms);
        if let Some(migration) = self.migrations.get_mut(&id) {
            migration.state = MigrationState::CutOver {
                at: index,
                expects,
                token: claimed,
            };
            migration.ended_at_ms = at_ms;
        }
        // A person's move is where it belongs from now on; so is a return.
        let home = self.vm(vm)?.home;
        let settled = self
            .migrations
            .get(&id)
            .is_some_and(|migration| migration.cause == MigrationCause::Asked || home == Some(to));
        let known = self.vm_mut(vm)?;
        known.moved_at_ms = at_ms;
        if settled {
            known.home = None;
        }
        let detail = format!(
            "{} passed from {} ({expects}) to {} ({claimed}) with all its leases",
            self.vm_label(vm),
            self.node_label(from),
            self.node_label(to)
        );
        self.note(
            entry,
            Severity::Info,
            vec![
                Object::Migration(id),
                Object::Vm(vm),
                Object::Node(from),
                Object::Node(to),
            ],
            "migration.cut-over",
            detail,
            None,
        );
        self.forget_old_migrations();
        Ok(Outcome::Token(claimed))
    }

    pub(super) fn abort_migration(
        &mut self,
        entry: &mut Entry<'_>,
        id: MigrationId,
        reason: &str,
    ) -> Applied {
        let migration = self.migration(id)?;
        match migration.state {
            MigrationState::Queued | MigrationState::Active { .. } => {
                let reason: String = reason.chars().take(512).collect();
                self.end_migration_aborted(entry, id, &reason);
                Ok(Outcome::Nothing)
            }
            MigrationState::Aborted { .. } => Ok(Outcome::Nothing),
            MigrationState::CutOver { .. } => {
                Err(wrong_state(migration, "it can no longer be cancelled"))
            }
        }
    }

    /// Ends an open migration; changes no token and no owner.
    pub(super) fn end_migration_aborted(
        &mut self,
        entry: &mut Entry<'_>,
        id: MigrationId,
        reason: &str,
    ) {
        let (index, at_ms) = (entry.index, entry.at_ms);
        let Some(migration) = self
            .migrations
            .get_mut(&id)
            .filter(|migration| migration.is_open())
        else {
            return;
        };
        migration.state = MigrationState::Aborted {
            at: index,
            reason: reason.to_owned(),
        };
        migration.ended_at_ms = at_ms;
        let (vm, from, to) = (migration.vm, migration.from, migration.to);
        let cause = migration.cause.clone();
        let detail = format!(
            "{} stays on {}: {reason}",
            self.vm_label(vm),
            self.node_label(from)
        );
        self.note(
            entry,
            Severity::Warn,
            vec![
                Object::Migration(id),
                Object::Vm(vm),
                Object::Node(from),
                Object::Node(to),
            ],
            "migration.aborted",
            detail,
            None,
        );
        if let MigrationCause::Failback(node) = cause {
            self.failback_failed(entry, node, vm, reason);
        }
        self.forget_old_migrations();
    }

    fn forget_old_migrations(&mut self) {
        let ended: Vec<MigrationId> = self
            .migrations
            .values()
            .filter(|migration| !migration.is_open())
            .map(|migration| migration.id)
            .collect();
        for id in ended
            .iter()
            .take(ended.len().saturating_sub(ENDED_MIGRATIONS_MAX))
        {
            self.migrations.remove(id);
        }
    }

    pub(super) fn report_migration(
        &mut self,
        id: MigrationId,
        summary: &serde_json::Value,
    ) -> Applied {
        let bytes = summary.to_string().len();
        if bytes > SUMMARY_BYTES_MAX || !summary.is_object() {
            return Err(Rejection::TooLarge {
                what: "migration summary (bytes)".into(),
                max: SUMMARY_BYTES_MAX as u64,
            });
        }
        let migration = self.migration(id)?;
        if migration.is_open() {
            return Err(wrong_state(migration, "it has no summary yet"));
        }
        if let Some(migration) = self.migrations.get_mut(&id) {
            migration.summary = Some(summary.clone());
        }
        Ok(Outcome::Nothing)
    }

    fn migration(&self, id: MigrationId) -> Result<&Migration, Rejection> {
        self.migrations.get(&id).ok_or_else(|| Rejection::Unknown {
            kind: "migration".into(),
            what: id.to_string(),
        })
    }
}

fn wrong_state(migration: &Migration, cannot: &str) -> Rejection {
    let is = match &migration.state {
        MigrationState::Queued => "queued".to_owned(),
        MigrationState::Active { .. } => "under way".to_owned(),
        MigrationState::CutOver { at, .. } => format!("through (cutover was entry {at})"),
        MigrationState::Aborted { reason, .. } => format!("aborted ({reason})"),
    };
    Rejection::MigrationState {
        migration: migration.id,
        is,
        cannot: cannot.to_owned(),
    }
}
