//! Migrations that take too long, or whose sides are gone: the leader proposes their abort.
//!
//! An abort proposed in vain is harmless: cutover and abort race in one log and the first one wins. So the
//! wall clock may be read here; but it may also be hours behind, so the leader counts by its own steady clock
//! as well how long it has seen a migration, and the longer time counts.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crate::command::Command;
use crate::ids::{MigrationId, NodeId};
use crate::state::{ClusterState, Liveness, Migration, MigrationState};

/// A migration may wait in the queue this many times as long as one may take.
const QUEUE_TIMEOUTS: u64 = 12;

/// Since when this leader has seen each open migration, queued or under way.
#[derive(Clone, Debug, Default)]
pub struct Supervisor {
    seen_ms: BTreeMap<(MigrationId, bool), u64>,
}

impl Supervisor {
    /// The aborts to propose now; `wall_ms` as `at_ms` in commands, `steady_ms` of a clock that only grows.
    /// To be asked regularly.
    pub fn aborts(&mut self, state: &ClusterState, wall_ms: u64, steady_ms: u64) -> Vec<Command> {
        let open: Vec<&Migration> = state
            .migrations
            .values()
            .filter(|migration| migration.is_open())
            .collect();
        let seen: BTreeMap<(MigrationId, bool), u64> = open
            .iter()
            .map(|migration| {
                let key = (migration.id, migration.is_active());
                (key, self.seen_ms.get(&key).copied().unwrap_or(steady_ms))
            })
            .collect();
        self.seen_ms = seen;
        let timeout_ms = u64::from(state.settings.migration_timeout_s) * 1_000;
        open.into_iter()
            .filter_map(|migration| {
                let since_ms = self.seen_ms[&(migration.id, migration.is_active())];
                let seen_ms = steady_ms.saturating_sub(since_ms);
                let reason = verdict(state, migration, wall_ms, seen_ms, timeout_ms)?;
                Some(Command::AbortMigration {
                    migration: migration.id,
                    reason,
                })
            })
            .collect()
    }
}

fn verdict(
    state: &ClusterState,
    migration: &Migration,
    wall_ms: u64,
    seen_ms: u64,
    timeout_ms: u64,
) -> Option<String> {
    let (what, since_ms, limit_ms) = match migration.state {
        MigrationState::Queued => (
            "waited in the queue",
            migration.queued_at_ms,
            timeout_ms.saturating_mul(QUEUE_TIMEOUTS),
        ),
        MigrationState::Active { .. } => ("was under way", migration.started_at_ms, timeout_ms),
        MigrationState::CutOver { .. } | MigrationState::Aborted { .. } => return None,
    };
    let gone = |node: NodeId| {
        state
            .nodes
            .get(&node)
            .is_none_or(|node| matches!(node.liveness, Liveness::Lost | Liveness::Quarantined))
    };
    for (side, node) in [("source", migration.from), ("destination", migration.to)] {
        if gone(node) {
            let label = state.node_label(node);
            return Some(format!("the {side} {label} is lost"));
        }
    }
    let took_ms = wall_ms.saturating_sub(since_ms).max(seen_ms);
    (took_ms > limit_ms).then(|| {
        format!(
            "it {what} for {} s, over the limit of {} s (setting migration_timeout_s)",
            took_ms / 1_000,
            limit_ms / 1_000
        )
    })
}
