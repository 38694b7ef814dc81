//! Which queued migrations can start now, and which can no longer.

#[cfg(test)]
mod tests;

use std::cmp::Reverse;

use crate::command::Rejection;
use crate::fleet::{Count, Fleet, Observed};
use crate::ids::{MigrationId, Token};
use crate::placement::{compatible, may_run_in};
use crate::state::{ClusterState, Desired, Liveness, Migration, MigrationState, Vm};

/// What to do with a queued migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Propose [`crate::Command::StartMigration`], with a ticket drawn by the proposer.
    Start {
        /// Which.
        migration: MigrationId,
        /// The source's token.
        expects: Token,
    },
    /// Propose [`crate::Command::AbortMigration`].
    Abort {
        /// Which.
        migration: MigrationId,
        /// Why.
        reason: String,
    },
}

/// The next steps of the queue, the most important machine first. What has to wait is not named.
///
/// A migration that waits for a slot lets a less important one with free slots pass: it takes nothing from it.
pub fn next(state: &ClusterState, observed: &Observed) -> Vec<Next> {
    let mut queued: Vec<(&Migration, Option<&Vm>)> = state
        .migrations
        .values()
        .filter(|migration| migration.state == MigrationState::Queued)
        .map(|migration| (migration, state.vms.get(&migration.vm)))
        .collect();
    if queued.is_empty() {
        return Vec::new();
    }
    queued.sort_by_key(|(migration, vm)| (Reverse(vm.map(|vm| vm.spec.priority)), migration.id));
    let mut fleet = Fleet::new(state, observed, Count::Active);
    let mut steps = Vec::new();
    for (migration, vm) in queued {
        let verdict = match vm {
            Some(vm) => judge(&fleet, migration, vm),
            None => Verdict::Never("the machine was deleted".into()),
        };
        match (verdict, vm) {
            (Verdict::Now, Some(vm)) => {
                fleet.promise_move(vm, migration.from, migration.to);
                steps.push(Next::Start {
                    migration: migration.id,
                    expects: vm.ownership.token,
                });
            }
            (Verdict::Never(reason), _) => steps.push(Next::Abort {
                migration: migration.id,
                reason,
            }),
            (Verdict::Wait | Verdict::Now, _) => {}
        }
    }
    steps
}

enum Verdict {
    Now,
    Wait,
    Never(String),
}

fn judge(fleet: &Fleet<'_>, migration: &Migration, vm: &Vm) -> Verdict {
    let state = fleet.state;
    if vm.ownership.owner != Some(migration.from) {
        return Verdict::Never("the machine is no longer on its source".into());
    }
    if vm.desired == Desired::Stopped {
        return Verdict::Never("the machine is to stop".into());
    }
    let (Some(source), Some(destination)) = (
        state.nodes.get(&migration.from),
        state.nodes.get(&migration.to),
    ) else {
        return Verdict::Never("a node of it left the cluster".into());
    };
    if !vm.ownership.activated || source.liveness != Liveness::Up {
        return Verdict::Wait;
    }
    let fits = compatible(source, destination).and_then(|()| may_run_in(fleet, vm, destination));
    match fits {
        Ok(()) => {}
        Err(Rejection::NoRoom { .. }) => return Verdict::Wait,
        // A path that is down may come back; a volume that the node never had does not.
        Err(Rejection::VolumeUnreachable { volume, .. })
            if fleet.volume_down(destination.id, &volume) =>
        {
            return Verdict::Wait;
        }
        Err(never) => return Verdict::Never(never.to_string()),
    }
    let slots_left = fleet.used(source.id).moves_out < state.settings.migrations_out_max
        && fleet.used(destination.id).moves_in < state.settings.migrations_in_max;
    if slots_left {
        Verdict::Now
    } else {
        Verdict::Wait
    }
}
