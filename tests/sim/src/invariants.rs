//! What must hold in every history, checked after every event; each in a file of its own.

mod all_end;
mod asked;
mod bounded;
mod claimed;
mod discarded;
mod evidence;
mod fit;
mod leases;
mod log_grows;
mod one_end;
mod one_log;
mod one_runner;
mod reasons;
mod renewals;
mod replicas;
mod requests;
mod tokens;
mod writes;

use std::collections::{BTreeMap, BTreeSet};

use cluster_model::{ClusterState, LogIndex, MigrationId, NodeId, Reply, RequestId, Token, VmId};

use crate::mutants::{self, Mutant};
use crate::raft::{Entry, Vote};
use crate::world::World;

/// What really happened: the committed log, and what guests were told.
#[derive(Clone, Debug)]
pub struct Truth {
    /// Every committed entry.
    pub log: Vec<Entry>,
    /// The state after them.
    pub state: ClusterState,
    /// The highest number that a guest's flush was answered for.
    pub witness: BTreeMap<VmId, u64>,
    /// Tokens under which a disk acknowledged its claim.
    pub claimed: BTreeSet<(VmId, Token)>,
    /// The first digest seen of each applied index.
    pub digests: BTreeMap<usize, u64>,
    /// How migrations ended.
    pub ended: BTreeMap<MigrationId, &'static str>,
    /// Whom the entries made each machine's owner.
    pub holders: BTreeMap<VmId, Option<NodeId>>,
    /// At which entry each request took effect.
    pub done: BTreeMap<RequestId, u64>,
    /// When the first entry of each term was committed, as far as somebody knew it, real time.
    pub terms: BTreeMap<u64, u64>,
    /// Which node has granted leases without a pause since when, and when it did so last, real time.
    pub steady: Option<(usize, u64, u64)>,
    /// Since when each node was not seen to hold a lease, by the book, or not to be up, real time.
    pub without: BTreeMap<usize, u64>,
    /// The vote and the count of committed entries that each node had last.
    pub promised: BTreeMap<usize, (Vote, usize)>,
}

impl Truth {
    /// The log that every node begins with.
    pub fn new(log: &[Entry]) -> Truth {
        let mut truth = Truth {
            log: Vec::new(),
            state: ClusterState::default(),
            witness: BTreeMap::new(),
            claimed: BTreeSet::new(),
            digests: BTreeMap::new(),
            ended: BTreeMap::new(),
            holders: BTreeMap::new(),
            done: BTreeMap::new(),
            terms: BTreeMap::new(),
            steady: None,
            without: BTreeMap::new(),
            promised: BTreeMap::new(),
        };
        for entry in log {
            truth.log.push(entry.clone());
            apply_entry(&mut truth.state, truth.log.len(), entry, None);
        }
        let owners = truth.state.vms.values();
        truth.holders = owners.map(|vm| (vm.id, vm.ownership.owner)).collect();
        truth
    }
}

/// Applies an entry as every replica does.
pub fn apply_entry(
    state: &mut ClusterState,
    index: usize,
    entry: &Entry,
    mutant: Option<Mutant>,
) -> Option<Reply> {
    let index = LogIndex(index as u64);
    match &entry.command {
        Some(envelope) => {
            let reply = match mutants::on_apply(mutant, state, envelope) {
                Some(changed) => state.apply(index, &changed),
                None => state.apply(index, envelope),
            };
            mutants::applied(mutant, state, envelope);
            Some(reply)
        }
        None => {
            state.applied = index;
            None
        }
    }
}

/// An entry is committed.
pub fn commit(world: &mut World, entry: Entry) {
    let before = world.truth.state.clone();
    world.truth.log.push(entry.clone());
    world.truth.terms.entry(entry.leader.0).or_insert(world.now);
    let index = world.truth.log.len();
    let reply = apply_entry(&mut world.truth.state, index, &entry, world.mutant);
    let Some(envelope) = entry.command else {
        return;
    };
    if let Some(reply) = &reply {
        let said = match reply {
            Reply::Done { outcome, .. } => format!("{outcome:?}"),
            Reply::Rejected(why) => format!("refused: {why}"),
        };
        world.say(|| format!("entry {index}: {:?}: {said}", envelope.command));
    }
    tokens::check(world, &before);
    leases::check(world, &before, &envelope.command, reply.as_ref());
    one_end::check(world, &before);
    fit::check(world, &before, &envelope.command, reply.as_ref());
    reasons::check(world, &before, &envelope);
    asked::check(world, &before, &envelope.command);
    requests::check(world, &envelope, reply.as_ref());
    evidence::check(world, &before, &envelope.command, reply.as_ref());
    claimed::cut_over(world, &envelope.command, reply.as_ref());
}

/// A node's log may have changed, or its daemon has started again with it.
pub fn log_changed(world: &mut World, node: usize) {
    log_grows::check(world, node);
}

/// A node was elected.
pub fn elected(world: &mut World, node: usize) {
    log_grows::elected(world, node);
}

/// A node is about to take up what it has for committed; says whether the others have the same.
pub fn same_log(world: &mut World, node: usize) -> bool {
    one_log::check(world, node)
}

/// The leader is about to answer what reached it at `received` on its clock, µs.
pub fn answers(world: &mut World, node: usize, received: u64) {
    renewals::check(world, node, received);
}

/// The leader grants a lease.
pub fn grants(world: &mut World, node: usize) {
    bounded::granted(world, node);
}

/// The leader has looked for lost nodes.
pub fn looked(world: &mut World, node: usize) {
    bounded::check(world, node);
}

/// A node is about to end a monitor by the log.
pub fn ends(world: &mut World, node: usize, nonce: u64) {
    discarded::check(world, node, nonce);
}

/// A guest found its disk wrong.
pub fn lost(world: &mut World, wrong: String) {
    writes::lost(world, wrong);
}

/// A write landed though a newer owner had an answer.
pub fn late(world: &mut World, vm: VmId, token: Token, newer: Token) {
    writes::late(world, vm, token, newer);
}

/// A replica applied an entry.
pub fn applied(world: &mut World, node: usize, index: usize, state: &ClusterState) {
    replicas::check(world, node, index, state);
}

/// A permit let a guest run.
pub fn runs(world: &mut World, node: usize, nonce: u64) {
    claimed::check(world, node, nonce);
}

/// Something happened.
pub fn after_event(world: &mut World) {
    one_runner::check(world);
}

/// The run is over.
pub fn at_end(world: &mut World) {
    all_end::check(world);
    replicas::at_end(world);
}
