//! What a store may say after a crash: the changes it was asked for, in order, all that it acknowledged and
//! as many more as it likes.

use std::collections::BTreeMap;

use openraft::storage::{RaftLogReader, RaftLogStorage};
use serde::{Deserialize, Serialize};

use super::super::log::LogStore;
use super::super::machine::Machine;
use super::super::types::{Entry, LogId, Vote};
use super::now;

/// One step of the store's history; an append is one for each entry.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Put(Entry),
    RemoveFrom(u64),
    Purge(LogId),
    Vote(Vote),
    Committed(LogId),
}

/// What can be seen of a store.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Seen {
    pub vote: Option<Vote>,
    pub committed: Option<LogId>,
    pub purged: Option<LogId>,
    pub entries: BTreeMap<u64, Entry>,
}

impl Seen {
    pub(super) fn of(log: &LogStore) -> Seen {
        let mut log = log.clone();
        let entries = now(log.try_get_log_entries(..)).unwrap();
        let seen = Seen {
            vote: now(log.read_vote()).unwrap(),
            committed: now(log.read_committed()).unwrap(),
            purged: now(log.get_log_state()).unwrap().last_purged_log_id,
            entries: entries
                .into_iter()
                .map(|entry| (entry.log_id.index, entry))
                .collect(),
        };
        assert_eq!(log.bounds().0, seen.last(), "the end of the log");
        seen
    }

    pub(super) fn last(&self) -> Option<LogId> {
        let last = self.entries.values().next_back();
        last.map(|entry| entry.log_id).max(self.purged)
    }

    pub(super) fn apply(&mut self, change: &Change) {
        match change {
            Change::Put(entry) => drop(self.entries.insert(entry.log_id.index, entry.clone())),
            Change::RemoveFrom(index) => drop(self.entries.split_off(index)),
            Change::Purge(upto) => {
                self.purged = Some(*upto);
                self.entries = self.entries.split_off(&(upto.index + 1));
            }
            Change::Vote(vote) => self.vote = Some(*vote),
            Change::Committed(committed) => self.committed = Some(*committed),
        }
    }

    fn differs(&self, other: &Seen) -> String {
        let ids = |seen: &Seen| {
            let ids = seen
                .entries
                .values()
                .map(|entry| format!("{}.{}", entry.log_id.leader_id.term, entry.log_id.index));
            ids.collect::<Vec<_>>().join(" ")
        };
        format!(
            "vote {:?}, committed {:?}, purged {:?}, log [{}] where [{}] with vote {:?}, committed {:?}, purged {:?} was acknowledged",
            self.vote.map(|vote| vote.leader_id.term),
            self.committed.map(|id| id.index),
            self.purged.map(|id| id.index),
            ids(self),
            ids(other),
            other.vote.map(|vote| vote.leader_id.term),
            other.committed.map(|id| id.index),
            other.purged.map(|id| id.index),
        )
    }
}

/// The state that snapshots are of: it only has to be the one that was written.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Tally {
    pub salt: u64,
    pub filler: String,
}

impl Machine for Tally {
    type Command = serde_json::Value;
    type Reply = ();
    fn apply(&mut self, _index: u64, _command: &serde_json::Value) {}
}

/// Remembers what was asked for and what was acknowledged.
#[derive(Clone, Debug, Default)]
pub(super) struct Oracle {
    /// Acknowledged at the last start.
    base: Seen,
    changes: Vec<Change>,
    acknowledged: usize,
    /// The newest state, acknowledged or not.
    pub newest: Seen,
    /// Snapshots that were being written, oldest first, and whether that was acknowledged.
    pub snapshots: Vec<(LogId, Tally, bool)>,
}

impl Oracle {
    /// Counts a change that was asked for; gives its number.
    pub(super) fn ask(&mut self, change: Change) -> usize {
        self.newest.apply(&change);
        self.changes.push(change);
        self.changes.len()
    }

    pub(super) fn acknowledge(&mut self, through: usize) {
        self.acknowledged = self.acknowledged.max(through);
    }

    /// The newest snapshot that was acknowledged.
    pub(super) fn snapshot(&self) -> Option<LogId> {
        let acknowledged = self
            .snapshots
            .iter()
            .filter(|(.., acknowledged)| *acknowledged);
        acknowledged.map(|(id, ..)| *id).max()
    }

    /// Up to where the node may have applied the log.
    pub(super) fn applied(&self) -> Option<LogId> {
        self.newest.committed.max(self.snapshot())
    }

    /// Compares what a store says at its start with what it may say, and takes that for acknowledged.
    pub(super) fn check(
        &mut self,
        seen: Seen,
        snapshot: Option<(LogId, Tally)>,
    ) -> Result<(), String> {
        let id = snapshot.as_ref().map(|(id, _)| *id);
        if id < self.snapshot() {
            return Err(format!(
                "snapshot {id:?} where {:?} was acknowledged",
                self.snapshot()
            ));
        }
        if let Some((id, tally)) = snapshot {
            let written = self.snapshots.iter().rev().find(|(other, ..)| *other == id);
            if written.is_none_or(|(_, other, _)| *other != tally) {
                return Err(format!("a snapshot {id} that was never written"));
            }
            // Older ones do not matter any more, newer ones never came to be.
            self.snapshots = vec![(id, tally, true)];
        } else {
            self.snapshots.clear();
        }
        if seen.purged > id {
            return Err(format!("purged through {:?}, snapshot {id:?}", seen.purged));
        }
        if let (Some(last), Some(snapshot)) = (seen.last(), id)
            && last < snapshot
            && last.index >= snapshot.index
        {
            // openraft does not start with such a log.
            return Err(format!(
                "the log ends with {last}, the snapshot with {snapshot}"
            ));
        }
        let mut state = self.base.clone();
        for change in &self.changes[..self.acknowledged] {
            state.apply(change);
        }
        let acknowledged = state.clone();
        let mut rest = self.changes[self.acknowledged..].iter();
        while state != seen {
            match rest.next() {
                Some(change) => state.apply(change),
                None => return Err(seen.differs(&acknowledged)),
            }
        }
        self.base = seen.clone();
        self.newest = seen;
        self.changes.clear();
        self.acknowledged = 0;
        Ok(())
    }
}
