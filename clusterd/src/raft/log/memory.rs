//! What is known of the log without asking the disk, and how it is read back from one.

use std::collections::VecDeque;
use std::ops::Range;

use cluster_model::NodeId;

use super::super::codec::{self, DecodeError, Reader};
use super::super::disk::{Change, Contents, Key};
use super::super::types::{Entry, LogId, Vote};

/// Entries kept in memory, bytes; older durable ones are read from the disk.
pub(super) const TAIL_BYTES_MAX: usize = 32 << 20;

/// What is known without asking the disk.
#[derive(Default)]
pub(super) struct Memory {
    pub(super) vote: Option<Vote>,
    pub(super) committed: Option<LogId>,
    /// Whether `committed` has yet to be given to the log thread.
    pub(super) commit_unwritten: bool,
    pub(super) purged: Option<LogId>,
    pub(super) last: Option<LogId>,
    /// Where the log begins, if anything is in it.
    pub(super) first: u64,
    /// The newest entries, without a gap, up to `last`.
    pub(super) tail: VecDeque<Entry>,
    pub(super) tail_bytes: usize,
    /// Entries below this index are durable, so the tail may let go of them.
    pub(super) durable_end: u64,
    /// Counts truncations: a read that spans disk and memory notices one in between.
    pub(super) truncations: u64,
}

impl Memory {
    /// The indexes that the log contains.
    pub(super) fn range(&self) -> Range<u64> {
        if self.last <= self.purged {
            let start = self.purged.map_or(0, |purged| purged.index + 1);
            return start..start;
        }
        self.first..self.last.map_or(self.first, |last| last.index + 1)
    }

    pub(super) fn tail_start(&self) -> u64 {
        self.tail
            .front()
            .map_or_else(|| self.range().end, |entry| entry.log_id.index)
    }

    /// The commit point as a change, if the log thread does not have it yet.
    pub(super) fn take_commit(&mut self) -> Option<Change> {
        if !std::mem::take(&mut self.commit_unwritten) {
            return None;
        }
        let mut value = Vec::new();
        codec::put_log_id(&mut value, self.committed.as_ref());
        Some(Change::Meta {
            key: Key::Committed,
            value: codec::seal(&value),
        })
    }

    pub(super) fn push(&mut self, entry: Entry) {
        if self.last <= self.purged {
            self.first = entry.log_id.index;
        }
        self.last = Some(entry.log_id);
        self.tail_bytes += weight(&entry);
        self.tail.push_back(entry);
    }

    /// Lets go of the oldest durable entries while the tail is over its bound.
    pub(super) fn trim(&mut self) {
        while self.tail_bytes > TAIL_BYTES_MAX {
            match self.tail.front() {
                Some(entry) if entry.log_id.index < self.durable_end => self.drop_front(),
                _ => break,
            }
        }
    }

    pub(super) fn drop_front(&mut self) {
        if let Some(entry) = self.tail.pop_front() {
            self.tail_bytes -= weight(&entry);
        }
    }
}

pub(super) fn weight(entry: &Entry) -> usize {
    let payload = match &entry.payload {
        openraft::EntryPayload::Normal(command) => command.0.len(),
        // A membership is small; its exact size does not matter for the bound.
        openraft::EntryPayload::Blank | openraft::EntryPayload::Membership(_) => 256,
    };
    payload + codec::ENTRY_OVERHEAD
}

/// Turns what the disk holds into what is known, or says what is wrong with it.
pub(super) fn check(
    contents: Contents,
    snapshot: Option<LogId>,
) -> Result<(Memory, Option<NodeId>), DecodeError> {
    let mut memory = Memory::default();
    let mut owner = None;
    for (key, sealed) in &contents.meta {
        let value = codec::unseal("small value", sealed)?;
        let mut reader = Reader::new("small value", value);
        match key {
            Key::Vote => memory.vote = Some(codec::take_vote(&mut reader)?),
            Key::Committed => memory.committed = codec::take_log_id(&mut reader)?,
            Key::Purged => memory.purged = codec::take_log_id(&mut reader)?,
            Key::Node => owner = Some(NodeId(reader.u64()?)),
        }
        reader.end()?;
    }
    memory.last = memory.purged;
    let start = memory.range().start;
    // A crash between "purged" and the removal leaves entries that no longer count.
    for (index, value) in contents.entries.iter().filter(|(index, _)| *index >= start) {
        let entry = decode(*index, value)?;
        let expected = memory.range().end;
        if *index != expected {
            return Err(DecodeError::new(
                "log",
                format!("entry {expected} is missing before {index}"),
            ));
        }
        if memory
            .last
            .is_some_and(|last| last.leader_id > entry.log_id.leader_id)
        {
            return Err(DecodeError::new(
                "log",
                format!("entry {index} is older than its predecessor"),
            ));
        }
        memory.push(entry);
    }
    memory.durable_end = memory.range().end;
    memory.trim();
    // The commit point is written lazily and in order; it can only be ahead of a log cut by hand.
    if memory.purged > snapshot {
        return Err(DecodeError::new(
            "log",
            "the snapshot that replaced its beginning is gone",
        ));
    }
    if memory.committed > memory.last.max(snapshot) {
        return Err(DecodeError::new(
            "log",
            "committed entries are missing at its end",
        ));
    }
    Ok((memory, owner))
}

pub(super) fn decode(index: u64, value: &[u8]) -> Result<Entry, DecodeError> {
    let mut reader = Reader::new("entry", value);
    let entry = codec::take_entry(&mut reader)?;
    reader.end()?;
    if entry.log_id.index == index {
        Ok(entry)
    } else {
        Err(DecodeError::new(
            "entry",
            format!(
                "entry {} stands in the place of {index}",
                entry.log_id.index
            ),
        ))
    }
}
