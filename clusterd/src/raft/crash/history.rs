//! Random histories of what openraft asks of a store, cut short by a crash at any operation of its disk.

use std::future::Future;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use bytes::Bytes;
use cluster_model::NodeId;
use futures::FutureExt;
use openraft::EntryPayload;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use openraft::vote::RaftLeaderId;
use tokio::sync::mpsc;

use super::super::disk::{self, Contents, JournaledDisk, LogDisk, Sizes, StoreError};
use super::super::log::{Job, LogStore, Writer};
use super::super::snapshot::{self, SnapshotDir};
use super::super::types::{CommandBytes, Entry, LeaderId, LogId, SnapshotMeta, TypeConfig, Vote};
use super::disk::{Disk, Plan, Seeded};
use super::files::SimFiles;
use super::oracle::{Change, Oracle, Seen, Tally};
use super::table::SimTable;
use super::{Mutant, now};

const BASE: &str = "/data";
const BLOCK: u64 = 4096;

/// A store that answers before it has synced, if told so; what it put off it does with the next change.
struct Answers {
    disk: JournaledDisk<SimFiles, SimTable>,
    early: bool,
}

impl LogDisk for Answers {
    fn load(&mut self) -> io::Result<Contents> {
        self.disk.load()
    }
    fn write(&mut self, changes: Vec<disk::Change>) -> io::Result<()> {
        if self.early {
            self.disk.sync()?;
        }
        self.disk.write(changes)
    }
    fn sync(&mut self) -> io::Result<()> {
        match self.early {
            true => Ok(()),
            false => self.disk.sync(),
        }
    }
    fn settle(&mut self) -> io::Result<bool> {
        self.disk.settle()
    }
    fn read(&mut self, range: Range<u64>) -> io::Result<Vec<(u64, Vec<u8>)>> {
        self.disk.read(range)
    }
}

/// Whether a request was answered well, once it is.
type Answer = Pin<Box<dyn Future<Output = bool>>>;

/// An open store.
struct Node {
    log: LogStore,
    writer: Writer<Answers>,
    jobs: mpsc::Receiver<Job>,
    snapshots: SnapshotDir<SimFiles>,
    /// Requests that wait for the disk: what they end at, and their answers.
    waiting: Vec<(usize, Answer)>,
}

/// How a life of the store ended, if not with a violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It did all it was asked.
    Done,
    /// The plan's operation came.
    Stopped,
}

/// A store's disk and what is known of it.
pub(super) struct World {
    files: SimFiles,
    rng: Seeded,
    oracle: Oracle,
    sizes: Sizes,
    term: u64,
    /// The store was open once: it may never be made again.
    made: bool,
    /// The disk failed under a snapshot in this life: the log knows nothing of it, and openraft stops.
    snapshot_failed: bool,
}

impl World {
    pub(super) fn new(seed: u64, mutant: Option<Mutant>) -> World {
        let mut rng = Seeded(seed);
        let record_blocks = 2 + rng.below(7);
        let sizes = Sizes {
            journal_bytes: (record_blocks + 1 + rng.below(24)) * BLOCK,
            record_bytes_max: (record_blocks * BLOCK) as usize - 64,
        };
        World {
            files: SimFiles::new(Disk::new(Path::new(BASE), seed, mutant)),
            rng,
            oracle: Oracle::default(),
            sizes,
            term: 1,
            made: false,
            snapshot_failed: false,
        }
    }

    pub(super) fn disk(&self) -> std::sync::MutexGuard<'_, Disk> {
        self.files.lock()
    }

    pub(super) fn dir(&self) -> PathBuf {
        Path::new(BASE).join("node").join("raft")
    }

    fn with(&self, disk: Disk, seed: u64) -> World {
        World {
            files: SimFiles::new(disk),
            rng: Seeded(seed),
            oracle: self.oracle.clone(),
            ..*self
        }
    }

    /// This world after a loss of power.
    pub(super) fn after_power_loss(&self, seed: u64) -> World {
        let disk = self.disk().after_power_loss(seed);
        self.with(disk, seed)
    }

    /// This world after the process was killed.
    pub(super) fn after_kill(&self, seed: u64) -> World {
        let disk = self.disk().after_kill(seed);
        self.with(disk, seed)
    }

    fn stopped(&self) -> bool {
        let disk = self.disk();
        disk.down || disk.failed
    }

    fn open_store(&self) -> Result<(Node, Option<(LogId, Tally)>), StoreError> {
        let (files, dir) = (self.files.clone(), self.dir());
        let (snapshots, snapshot) =
            SnapshotDir::open::<Tally>(files.clone(), &dir.join("snapshots"))?;
        let snapshot = snapshot.and_then(|(meta, tally)| Some((meta.last_log_id?, tally)));
        let table = files.clone();
        let disk = JournaledDisk::open_with(files, &dir, !self.made, self.sizes, |dir| {
            SimTable::open(table, dir)
        })?;
        let answers = Answers {
            disk,
            early: self.disk().is(Mutant::AnswersEarly),
        };
        let last = snapshot.as_ref().map(|(id, _)| *id);
        let (log, writer, jobs) = LogStore::prepare(&dir, NodeId(1), last, answers)?;
        let node = Node {
            log,
            writer,
            jobs,
            snapshots,
            waiting: Vec::new(),
        };
        Ok((node, snapshot))
    }

    /// Opens the store and checks what it says; nothing if its disk stopped meanwhile.
    fn open(&mut self) -> Result<Option<Node>, String> {
        match self.open_store() {
            Ok(_) if self.disk().failed => Err("opened, although its disk failed".into()),
            Ok((node, snapshot)) => {
                self.made = true;
                self.oracle.check(Seen::of(&node.log), snapshot)?;
                let leader = self
                    .oracle
                    .newest
                    .vote
                    .map_or(1, |vote| vote.leader_id.term);
                self.term = self.term.max(leader);
                Ok(Some(node))
            }
            Err(_) if self.stopped() => Ok(None),
            Err(error) => Err(format!("refused: {}", chain(&error))),
        }
    }

    /// Opens a store whose disk was damaged: whether it refused, with what it said.
    pub(super) fn open_damaged(&mut self) -> Result<Option<String>, String> {
        match self.open_store() {
            Ok((node, snapshot)) => {
                self.oracle.check(Seen::of(&node.log), snapshot)?;
                Ok(None)
            }
            Err(error) => Ok(Some(chain(&error))),
        }
    }

    /// Lets a store come back without the snapshots it acknowledged, if its log tells everything.
    pub(super) fn forget_snapshots(&mut self) {
        for (.., acknowledged) in &mut self.oracle.snapshots {
            *acknowledged = false;
        }
    }

    /// Opens the store and asks `steps` things of it.
    pub(super) fn live(&mut self, steps: usize) -> Result<End, String> {
        self.snapshot_failed = false;
        let Some(mut node) = self.open()? else {
            return Ok(End::Stopped);
        };
        // As openraft begins: what a snapshot holds beyond the log's end is purged from it.
        if let Some(snapshot) = self.oracle.snapshot()
            && self.oracle.newest.last() < Some(snapshot)
        {
            self.purge(&mut node, snapshot)?;
        }
        for _ in 0..steps {
            self.step(&mut node)?;
            if self.rng.below(5) < 3 {
                self.pump(&mut node)?;
            }
            if self.stopped() {
                // Whoever still asks gets an error.
                self.append(&mut node, 1)?;
                self.pump(&mut node)?;
                return Ok(End::Stopped);
            }
        }
        Ok(End::Done)
    }

    /// The same, and then everything is written and the store closed.
    pub(super) fn live_and_close(&mut self, steps: usize) -> Result<(), String> {
        let Some(mut node) = self.open()? else {
            return Err("stopped".into());
        };
        for _ in 0..steps {
            self.step(&mut node)?;
            self.pump(&mut node)?;
        }
        self.pump(&mut node)?;
        node.writer.round(Job::Close, || None);
        Ok(())
    }

    fn step(&mut self, node: &mut Node) -> Result<(), String> {
        match self.rng.below(100) {
            0..40 => {
                let count = 1 + self.rng.below(4);
                self.append(node, count)
            }
            40..52 => self.vote(node),
            52..60 => {
                self.term += 1;
                let from = next(self.oracle.applied());
                let end = next(self.oracle.newest.last());
                let first = from + self.rng.below(end.saturating_sub(from) + 1);
                self.truncate(node, first)?;
                match self.stopped() {
                    true => Ok(()),
                    false => self.append(node, 1),
                }
            }
            60..72 => self.commit(node),
            72..80 => {
                let upto = self.oracle.snapshot();
                let kept = self
                    .oracle
                    .newest
                    .entries
                    .values()
                    .find(|entry| Some(entry.log_id) <= upto && self.rng.once_in(3));
                match kept.map(|entry| entry.log_id) {
                    Some(upto) => self.purge(node, upto),
                    None => Ok(()),
                }
            }
            80..88 => match self.oracle.applied() {
                Some(applied) if self.oracle.snapshot() < Some(applied) => {
                    self.snapshot(node, applied).map(drop)
                }
                _ => Ok(()),
            },
            88..92 => self.install(node),
            _ => {
                while node.writer.settle() && self.rng.below(4) > 0 {}
                Ok(())
            }
        }
    }

    fn append(&mut self, node: &mut Node, count: u64) -> Result<(), String> {
        let mut entries = Vec::new();
        let mut through = 0;
        for _ in 0..count {
            let largest = self.sizes.record_bytes_max as u64 - 128;
            let bytes = match self.rng.below(10) {
                0..6 => self.rng.below(300),
                6..9 => self.rng.below(5_000),
                _ => self.rng.below(largest),
            };
            let mut payload = vec![self.rng.next() as u8; bytes.min(largest) as usize];
            if let Some(first) = payload.first_chunk_mut::<8>() {
                *first = self.rng.next().to_le_bytes();
            }
            let index = next(self.oracle.newest.last());
            let entry = Entry {
                log_id: log_id(self.term, index),
                payload: EntryPayload::Normal(CommandBytes(Bytes::from(payload))),
            };
            through = self.oracle.ask(Change::Put(entry.clone()));
            entries.push(entry);
        }
        let mut log = node.log.clone();
        self.wait_for(node, through, async move {
            let (done, durable) = TypeConfig::oneshot();
            let sent = log.append(entries, IOFlushed::signal(done)).await;
            sent.is_ok() && matches!(durable.await, Ok(Ok(())))
        })
    }

    fn vote(&mut self, node: &mut Node) -> Result<(), String> {
        self.term += 1;
        let vote = match self.rng.below(2) {
            0 => Vote::new(self.term, 1),
            _ => Vote::new_committed(self.term, 2),
        };
        let through = self.oracle.ask(Change::Vote(vote));
        let mut log = node.log.clone();
        self.wait_for(
            node,
            through,
            async move { log.save_vote(&vote).await.is_ok() },
        )
    }

    fn truncate(&mut self, node: &mut Node, first: u64) -> Result<(), String> {
        let through = self.oracle.ask(Change::RemoveFrom(first));
        let newest = &self.oracle.newest;
        let entry = first
            .checked_sub(1)
            .and_then(|last| newest.entries.get(&last));
        let last = entry.map(|entry| entry.log_id).max(newest.purged);
        let mut log = node.log.clone();
        self.wait_for(node, through, async move {
            log.truncate_after(last).await.is_ok()
        })?;
        // openraft asks nothing more before it has the answer.
        self.pump(node)
    }

    fn commit(&mut self, node: &mut Node) -> Result<(), String> {
        let (applied, newest) = (self.oracle.applied(), &self.oracle.newest);
        let entries = newest.entries.values().map(|entry| entry.log_id);
        let new: Vec<_> = entries.filter(|id| Some(*id) > applied).collect();
        if new.is_empty() {
            return Ok(());
        }
        let committed = new[self.rng.below(new.len() as u64) as usize];
        self.oracle.ask(Change::Committed(committed));
        // Not waited for, and so not acknowledged.
        drop(now(node.log.save_committed(Some(committed))));
        Ok(())
    }

    fn purge(&mut self, node: &mut Node, upto: LogId) -> Result<(), String> {
        self.oracle.ask(Change::Purge(upto));
        drop(now(node.log.purge(upto)));
        Ok(())
    }

    /// Writes a snapshot; whether that was acknowledged.
    fn snapshot(&mut self, node: &mut Node, last: LogId) -> Result<bool, String> {
        let tally = Tally {
            salt: self.rng.next(),
            filler: "x".repeat(self.rng.below(9_000) as usize),
        };
        let meta = SnapshotMeta {
            last_log_id: Some(last),
            ..SnapshotMeta::default()
        };
        let data = snapshot::encode(&meta, &tally).map_err(|error| error.to_string())?;
        self.oracle.snapshots.push((last, tally, false));
        let written = node.snapshots.write(&meta, &data).is_ok();
        if written && self.stopped() {
            return Err("a snapshot was acknowledged, although its disk failed".into());
        }
        self.snapshot_failed |= !written;
        if let Some((.., acknowledged)) = self.oracle.snapshots.last_mut() {
            *acknowledged = written;
        }
        Ok(written)
    }

    /// A leader's snapshot, as openraft installs it: a log that contradicts it is cut first.
    fn install(&mut self, node: &mut Node) -> Result<(), String> {
        let applied = self.oracle.applied();
        let last = log_id(self.term, next(applied) + self.rng.below(5));
        let newest = &self.oracle.newest;
        if newest.last().is_some_and(|end| end.index >= last.index)
            && newest.entries.get(&last.index).map(|entry| entry.log_id) != Some(last)
        {
            self.truncate(node, next(applied))?;
            if self.stopped() {
                return Ok(());
            }
        }
        if self.snapshot(node, last)? {
            self.purge(node, last)?;
        }
        Ok(())
    }

    /// Hands a request over and waits for its answer.
    fn wait_for(
        &mut self,
        node: &mut Node,
        through: usize,
        answer: impl Future<Output = bool> + 'static,
    ) -> Result<(), String> {
        node.waiting.push((through, Box::pin(answer)));
        self.listen(node)
    }

    /// Lets the log thread's work be done.
    fn pump(&mut self, node: &mut Node) -> Result<(), String> {
        while let Ok(first) = node.jobs.try_recv() {
            let jobs = &mut node.jobs;
            node.writer.round(first, || jobs.try_recv().ok());
            self.listen(node)?;
        }
        Ok(())
    }

    fn listen(&mut self, node: &mut Node) -> Result<(), String> {
        let failed = self.disk().failed && !self.snapshot_failed;
        for (through, mut answer) in std::mem::take(&mut node.waiting) {
            match (&mut answer).now_or_never() {
                None => node.waiting.push((through, answer)),
                Some(true) if failed => {
                    return Err("acknowledged, although the disk failed".into());
                }
                Some(true) => self.oracle.acknowledge(through),
                Some(false) if self.stopped() => {}
                Some(false) => return Err("an error without a cause".into()),
            }
        }
        Ok(())
    }

    pub(super) fn chance(&mut self, n: u64) -> bool {
        self.rng.once_in(n)
    }

    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.rng.below(end)
    }

    pub(super) fn plan(&self, plan: Plan) {
        self.disk().plan = plan;
    }
}

fn log_id(term: u64, index: u64) -> LogId {
    LogId {
        leader_id: LeaderId::new(term, 1),
        index,
    }
}

fn next(id: Option<LogId>) -> u64 {
    id.map_or(0, |id| id.index + 1)
}

/// An error with what caused it.
fn chain(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
