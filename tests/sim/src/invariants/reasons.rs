//! Whatever changes by itself leaves a record of it; and where a planner decided, the record says by what rule.

use std::collections::BTreeSet;

use cluster_model::{ClusterState, Command, Envelope, MigrationState, Object};

use crate::world::World;

/// Checks the entry that was just committed.
pub fn check(world: &mut World, before: &ClusterState, envelope: &Envelope) {
    if envelope.actor == "admin" {
        return;
    }
    let state = &world.truth.state;
    let index = world.truth.log.len() as u64;
    let events = state.events.iter().rev();
    let events = events.take_while(|event| event.index.0 == index);
    let decided = matches!(
        envelope.command,
        Command::NodeLost { .. } | Command::StartVm { .. } | Command::QueueMigration { .. }
    );
    let (mut recorded, mut reasoned) = (BTreeSet::new(), false);
    for event in events {
        reasoned |= event.why.as_ref().is_some_and(|why| !why.rule.is_empty());
        if !event.detail.is_empty() {
            recorded.extend(event.objects.iter().copied());
        }
    }
    let changed = changed(before, state);
    let silent: Vec<_> = changed.difference(&recorded).collect();
    let wrong = if !silent.is_empty() {
        Some(format!("{silent:?} changed and no event says so"))
    } else if decided && !changed.is_empty() && !reasoned {
        Some("no rule is named".into())
    } else {
        unexplained(before, state)
    };
    if let Some(wrong) = wrong {
        let what = format!("{:?} by {}: {wrong}", envelope.command, envelope.actor);
        world.violate("every automatic act has a why", what);
    }
}

/// What of it an administrator would ask about: where machines are and may be, how nodes stand, how moves end.
fn changed(before: &ClusterState, state: &ClusterState) -> BTreeSet<Object> {
    let mut changed = BTreeSet::new();
    for node in state.nodes.values() {
        let known = before.nodes.get(&node.id);
        if known.is_none_or(|known| (known.liveness, known.duty) != (node.liveness, node.duty)) {
            changed.insert(Object::Node(node.id));
        }
    }
    for vm in state.vms.values() {
        let known = before.vms.get(&vm.id);
        let same = known.is_some_and(|known| {
            let (old, new) = (&known.ownership, &vm.ownership);
            (old.owner, old.token, &known.held) == (new.owner, new.token, &vm.held)
        });
        if !same {
            changed.insert(Object::Vm(vm.id));
        }
    }
    for migration in state.migrations.values() {
        let known = before.migrations.get(&migration.id);
        let stage = |state: &MigrationState| std::mem::discriminant(state);
        if known.is_none_or(|known| stage(&known.state) != stage(&migration.state)) {
            changed.insert(Object::Migration(migration.id));
        }
    }
    changed
}

/// A migration that was just aborted, or a machine that was just put aside, without a reason.
fn unexplained(before: &ClusterState, state: &ClusterState) -> Option<String> {
    let empty = |reason: &str| reason.trim().is_empty();
    for migration in state.migrations.values() {
        if let MigrationState::Aborted { reason, .. } = &migration.state
            && empty(reason)
            && before.migrations.get(&migration.id) != Some(migration)
        {
            return Some(format!("{} was aborted without a reason", migration.id));
        }
    }
    let held = state
        .vms
        .values()
        .find(|vm| vm.held.as_deref().is_some_and(empty));
    held.map(|vm| format!("{} is held without a reason", vm.id))
}
