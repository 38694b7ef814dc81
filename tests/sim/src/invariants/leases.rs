//! A lease's holder is whom the entries made its machine's owner, under the owner's token: kept here by a book of its own,
//! which knows the commands and nothing of how the state is written.

use cluster_model::{ClusterState, Command, NodeId, OwnershipCause, Reply, VmId};

use crate::invariants::Truth;
use crate::world::World;

/// Enters what was just committed into the book, and compares every lease with it.
pub fn check(world: &mut World, before: &ClusterState, command: &Command, reply: Option<&Reply>) {
    // A repeated request is answered as it was the first time, and does nothing.
    let now = world.truth.log.len() as u64;
    if matches!(reply, Some(Reply::Done { index, .. }) if index.0 == now) {
        enter(world, before, command);
    }
    let truth = &world.truth;
    let wrong = truth.state.leases().find(|lease| {
        let owner = truth.holders.get(&lease.vm).copied().flatten();
        let token = truth.state.vms.get(&lease.vm).map(|vm| vm.ownership.token);
        owner != lease.holder || token != Some(lease.token)
    });
    if let Some(lease) = wrong {
        let book = world.truth.holders.get(&lease.vm);
        world.violate(
            "leases follow the owner",
            format!("{lease:?}, and by the book {book:?}"),
        );
    }
}

fn enter(world: &mut World, before: &ClusterState, command: &Command) {
    let now = world.truth.log.len() as u64;
    let Truth {
        holders: book,
        state,
        ..
    } = &mut world.truth;
    match command {
        Command::StartVm { vm, node, .. } => {
            book.insert(*vm, Some(*node));
        }
        Command::Cutover { migration, .. } => {
            if let Some(known) = before.migrations.get(migration) {
                book.insert(known.vm, Some(known.to));
            }
        }
        Command::Release { vm, .. } => {
            book.insert(*vm, None);
        }
        Command::NodeLost { node, .. } => {
            for holder in book.values_mut().filter(|holder| **holder == Some(*node)) {
                *holder = None;
            }
        }
        // A host that comes back from a reboot has no machines; one that only says so again keeps them.
        Command::RegisterNode { node, .. } => {
            let rebooted: Vec<VmId> = held_by(book, *node)
                .filter(|vm| {
                    let record = state.vms.get(vm).map(|vm| &vm.ownership);
                    record.is_some_and(|record| {
                        record.cause == OwnershipCause::NodeRebooted && record.since.0 == now
                    })
                })
                .collect();
            for vm in rebooted {
                book.insert(vm, None);
            }
        }
        _ => {}
    }
}

fn held_by(
    book: &std::collections::BTreeMap<VmId, Option<NodeId>>,
    node: NodeId,
) -> impl Iterator<Item = VmId> + '_ {
    book.iter()
        .filter(move |(_, holder)| **holder == Some(node))
        .map(|(vm, _)| *vm)
}
