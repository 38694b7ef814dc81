//! The Raft log: what openraft asks of it, answered from memory; one thread makes it durable.
//!
//! ```text
//!  openraft ──append──► tail in memory ──► log thread ──► LogDisk
//!     ▲                                     │  takes all that waits, writes it, syncs once
//!     └────────── "it is durable" ──────────┘
//! ```
//! Entries can be read as soon as `append` returns, so replication runs while the leader's own disk
//! still works. A disk that failed once is never used again: what it holds is unknown, and openraft stops
//! the node.

mod memory;
mod thread;

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cluster_model::NodeId;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use tokio::sync::{mpsc, oneshot};

use super::carry::LogEnd;
use super::codec::{self, DecodeError};
use super::disk::{Change, Key, LogDisk, StoreError, VALUE_BYTES_MAX};
use super::types::{Entry, LogId, TypeConfig, Vote};
use memory::{Memory, check, decode, weight};
pub(super) use thread::LogThread;
pub(super) use thread::{Job, Writer};

/// Entries handed to replication at once, bytes: a message stays far below its limit.
const BATCH_BYTES_MAX: usize = 1 << 20;
/// Entries read from the disk at once on the way to replication.
const DISK_READ_MAX: u64 = 64;
/// Jobs that may wait for the log thread; more make openraft wait.
const JOBS_MAX: usize = 4_096;

/// The log as openraft and its replication tasks see it; clones share it.
#[derive(Clone)]
pub(super) struct LogStore {
    memory: Arc<Mutex<Memory>>,
    jobs: mpsc::Sender<Job>,
    end: LogEnd,
}

impl LogStore {
    /// Reads everything `disk` holds, checks it (against the newest snapshot, too), and starts the log
    /// thread.
    ///
    /// # Errors
    /// When anything read is not what a node with this number once wrote there.
    pub(super) fn open(
        dir: &Path,
        node: NodeId,
        snapshot: Option<LogId>,
        disk: impl LogDisk,
    ) -> Result<(LogStore, LogThread), StoreError> {
        let (log, writer, waiting) = LogStore::prepare(dir, node, snapshot, disk)?;
        let thread = LogThread::start(writer, waiting, log.jobs.clone()).map_err(|source| {
            StoreError::Open {
                dir: dir.to_owned(),
                source,
            }
        })?;
        Ok((log, thread))
    }

    /// The same without the thread: the caller gives the writer what waits for it.
    pub(super) fn prepare<D: LogDisk>(
        dir: &Path,
        node: NodeId,
        snapshot: Option<LogId>,
        mut disk: D,
    ) -> Result<(LogStore, Writer<D>, mpsc::Receiver<Job>), StoreError> {
        let contents = disk.load().map_err(|source| StoreError::Open {
            dir: dir.to_owned(),
            source,
        })?;
        let new = contents.meta.is_empty() && contents.entries.is_empty();
        let (memory, owner) = check(contents, snapshot).map_err(|what| StoreError::Damaged {
            dir: dir.to_owned(),
            what: what.to_string(),
        })?;
        match owner {
            Some(found) if found != node => {
                return Err(StoreError::OtherNode {
                    dir: dir.to_owned(),
                    found,
                    expected: node,
                });
            }
            None if !new => {
                let what = "it does not say whose it is".to_owned();
                return Err(StoreError::Damaged {
                    dir: dir.to_owned(),
                    what,
                });
            }
            Some(_) => {}
            None => {
                let value = codec::seal(&node.0.to_le_bytes());
                disk.write(vec![Change::Meta {
                    key: Key::Node,
                    value,
                }])
                .and_then(|()| disk.sync())
                .map_err(|source| StoreError::Open {
                    dir: dir.to_owned(),
                    source,
                })?;
            }
        }
        let end = LogEnd::default();
        end.set(memory.range().end);
        let memory = Arc::new(Mutex::new(memory));
        let (jobs, waiting) = mpsc::channel(JOBS_MAX);
        let writer = Writer::new(disk, memory.clone());
        Ok((LogStore { memory, jobs, end }, writer, waiting))
    }

    /// Where the log ends, kept up to date.
    pub(super) fn end(&self) -> LogEnd {
        self.end.clone()
    }

    /// The last entry and the last purged one, as openraft calls them: `(last, purged)`.
    pub(super) fn bounds(&self) -> (Option<LogId>, Option<LogId>) {
        let memory = lock(&self.memory);
        (memory.last, memory.purged)
    }

    async fn send(&self, job: Job) -> io::Result<()> {
        self.jobs.send(job).await.map_err(|_| thread::gone())
    }

    /// The entries of `range` that the log contains; stops early once over `bytes_max` (if given).
    async fn entries(&self, range: Range<u64>, bytes_max: Option<usize>) -> io::Result<Vec<Entry>> {
        loop {
            let (from_disk, mut recent, truncations) = {
                let memory = lock(&self.memory);
                let present = memory.range();
                let (start, end) = (range.start.max(present.start), range.end.min(present.end));
                let tail_start = memory.tail_start();
                let from_disk = start..end.min(tail_start);
                let mut recent = Vec::new();
                let mut bytes = 0;
                // With a bound, what is on the disk comes alone: the caller asks again for the rest.
                if start < end && (bytes_max.is_none() || from_disk.is_empty()) {
                    let skip = (start.max(tail_start) - tail_start) as usize;
                    let take = end.saturating_sub(start.max(tail_start)) as usize;
                    for entry in memory.tail.iter().skip(skip).take(take) {
                        bytes += weight(entry);
                        if bytes_max.is_some_and(|max| bytes > max) && !recent.is_empty() {
                            break;
                        }
                        recent.push(entry.clone());
                    }
                }
                (from_disk, recent, memory.truncations)
            };
            if from_disk.is_empty() {
                return Ok(recent);
            }
            let from_disk = match bytes_max {
                Some(_) => from_disk.start..from_disk.end.min(from_disk.start + DISK_READ_MAX),
                None => from_disk,
            };
            let mut entries = self.read_disk(from_disk).await?;
            let memory = lock(&self.memory);
            if memory.truncations == truncations {
                if let Some(max) = bytes_max {
                    let mut bytes = 0;
                    let fits = entries.iter().take_while(|entry| {
                        bytes += weight(entry);
                        bytes <= max
                    });
                    let count = fits.count().max(1);
                    entries.truncate(count);
                }
                entries.append(&mut recent);
                return Ok(entries);
            }
        }
    }

    /// Makes changes and returns when they are durable.
    async fn durable(&self, new: Vec<Change>) -> io::Result<()> {
        let mut changes: Vec<Change> = lock(&self.memory).take_commit().into_iter().collect();
        changes.extend(new);
        let (reply, answer) = oneshot::channel();
        self.send(Job::Durable { changes, reply }).await?;
        answer.await.map_err(|_| thread::gone())?
    }

    async fn read_disk(&self, range: Range<u64>) -> io::Result<Vec<Entry>> {
        let (reply, answer) = oneshot::channel();
        self.send(Job::Read {
            range: range.clone(),
            reply,
        })
        .await?;
        let values = answer.await.map_err(|_| thread::gone())??;
        if values.len() as u64 != range.end - range.start {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{} of the entries {range:?} are on the disk", values.len()),
            ));
        }
        values
            .iter()
            .map(|(index, value)| decode(*index, value))
            .collect::<Result<_, _>>()
            .map_err(invalid)
    }
}

fn invalid(error: DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn lock(memory: &Mutex<Memory>) -> MutexGuard<'_, Memory> {
    // No step that changes it can panic half way.
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

fn to_range(range: &impl RangeBounds<u64>) -> Range<u64> {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    start..end.max(start)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        self.entries(to_range(&range), None).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(lock(&self.memory).vote)
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, io::Error> {
        self.entries(start..end, Some(BATCH_BYTES_MAX)).await
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let (last_log_id, last_purged_log_id) = self.bounds();
        Ok(LogState {
            last_purged_log_id,
            last_log_id,
        })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let mut value = Vec::new();
        codec::put_vote(&mut value, vote);
        let change = Change::Meta {
            key: Key::Vote,
            value: codec::seal(&value),
        };
        self.durable(vec![change]).await?;
        lock(&self.memory).vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        // Written with the next change, or when the log closes: to wake the log thread for it alone costs every
        // commit, and an older commit point only means that more is learnt again after a restart.
        let mut memory = lock(&self.memory);
        memory.committed = committed;
        memory.commit_unwritten = true;
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(lock(&self.memory).committed)
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: IOFlushed<TypeConfig>,
    ) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        let mut changes = Vec::with_capacity(entries.len() + 1);
        // What it commits was asked for before.
        changes.extend(lock(&self.memory).take_commit());
        for entry in &entries {
            let mut value = Vec::new();
            codec::put_entry(&mut value, entry).map_err(invalid)?;
            if value.len() > VALUE_BYTES_MAX {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!(
                        "entry {} has {} bytes, over {VALUE_BYTES_MAX}",
                        entry.log_id.index,
                        value.len()
                    ),
                ));
            }
            changes.push(Change::Put {
                index: entry.log_id.index,
                value,
            });
        }
        let end = {
            let mut memory = lock(&self.memory);
            for entry in entries {
                memory.push(entry);
            }
            memory.range().end
        };
        self.end.set(end);
        self.send(Job::Append {
            changes,
            end,
            callback,
        })
        .await
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let from = {
            let mut memory = lock(&self.memory);
            let from = last
                .map_or(0, |last| last.index + 1)
                .max(memory.range().start);
            while memory
                .tail
                .back()
                .is_some_and(|entry| entry.log_id.index >= from)
            {
                if let Some(entry) = memory.tail.pop_back() {
                    memory.tail_bytes -= weight(&entry);
                }
            }
            memory.last = last.min(memory.last).max(memory.purged);
            memory.durable_end = memory.durable_end.min(from);
            memory.truncations += 1;
            from
        };
        self.end.set(from);
        // Durable before openraft goes on: a snapshot that contradicts what is removed here may follow, and a
        // log that came back beside it would be one that never was.
        self.durable(vec![Change::RemoveFrom(from)]).await
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        {
            let mut memory = lock(&self.memory);
            if memory.purged.is_some_and(|purged| purged >= upto) {
                return Ok(());
            }
            memory.purged = Some(upto);
            memory.last = memory.last.max(Some(upto));
            memory.first = upto.index + 1;
            while memory
                .tail
                .front()
                .is_some_and(|entry| entry.log_id.index <= upto.index)
            {
                memory.drop_front();
            }
        }
        let mut value = Vec::new();
        codec::put_log_id(&mut value, Some(&upto));
        let mut changes: Vec<Change> = lock(&self.memory).take_commit().into_iter().collect();
        changes.extend([
            Change::Meta {
                key: Key::Purged,
                value: codec::seal(&value),
            },
            Change::RemoveThrough(upto.index),
        ]);
        self.send(Job::Lazy { changes }).await
    }
}

#[cfg(test)]
mod tests;
