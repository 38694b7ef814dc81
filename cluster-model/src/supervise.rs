//! Migrations that take too long, or whose sides are gone: the leader proposes their abort.
//!
//! An abort proposed in vain is harmless: cutover and abort race in one log and the first one wins. So the
//! wall clock may be read here.

#[cfg(test)]
mod tests;

use crate::command::Command;
use crate::ids::NodeId;
use crate::state::{ClusterState, Liveness, Migration, MigrationState};

/// A migration may wait in the queue this many times as long as one may take.
const QUEUE_TIMEOUTS: u64 = 12;

/// The aborts to propose now; `now_ms` as `at_ms` in commands.
pub fn aborts(state: &ClusterState, now_ms: u64) -> Vec<Command> {
    let timeout_ms = u64::from(state.settings.migration_timeout_s) * 1_000;
    state
        .migrations
        .values()
        .filter_map(|migration| {
            let reason = verdict(state, migration, now_ms, timeout_ms)?;
            Some(Command::AbortMigration {
                migration: migration.id,
                reason,
            })
        })
        .collect()
}

fn verdict(
    state: &ClusterState,
    migration: &Migration,
    now_ms: u64,
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
    let took_ms = now_ms.saturating_sub(since_ms);
    (took_ms > limit_ms).then(|| {
        format!(
            "it {what} for {} s, over the limit of {} s (setting migration_timeout_s)",
            took_ms / 1_000,
            limit_ms / 1_000
        )
    })
}
