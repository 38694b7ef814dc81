//! Where the log thread keeps things: a trait, and its implementation on sled behind a journal.
//!
//! sled's `flush()` ends in `sync_file_range`, which survives a crash of the process but not a loss of
//! power. So a commit is made durable in the [journal](super::journal), with one write and one `fdatasync`;
//! what is in it moves to sled while nothing waits for a while, and before the journal begins again sled is flushed and
//! its one data file, which we open a second time for that, synced. Values stay under 64 KiB because sled
//! moves large ones to files of their own that nobody syncs; snapshots are plain files (see
//! [`super::snapshot`]).

mod change;
pub(super) mod table;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::files::{Files, OsFiles};
use super::journal::{JOURNAL_BYTES, Journal, RECORD_BYTES_MAX};
pub(super) use change::{Change, Key};
use change::{decode, encode, encoded_bytes};
use table::{SledTable, Table};

/// The largest value that sled may be given, bytes.
pub(super) const VALUE_BYTES_MAX: usize = 64 * 1024;
/// Proves that this directory once held a log: without it a lost log would look like a new node.
const MARKER: &str = "raft-store";
/// The journal's file.
const JOURNAL: &str = "journal";
/// sled's directory.
const TABLE: &str = "log";
/// The table's name for the journal's generation: records of older ones are in the table already.
pub(super) const KEY_GENERATION: &str = "journal";
/// Changes moved to sled in one go while nothing waits: about a millisecond.
const SETTLE_MAX: usize = 64;
/// What the marker says.
const MARKER_TEXT: &[u8] = b"baton raft store 1\n";

/// Everything that a store holds when it is opened: entries in order, and the small values.
pub(super) struct Contents {
    pub entries: Vec<(u64, Vec<u8>)>,
    pub meta: Vec<(Key, Vec<u8>)>,
}

/// A store of log entries and a few small values; owned by the log thread, so it may block.
pub(super) trait LogDisk: Send + 'static {
    /// Reads everything.
    fn load(&mut self) -> io::Result<Contents>;
    /// Makes `changes` in order; they need not be durable before [`LogDisk::sync`].
    fn write(&mut self, changes: Vec<Change>) -> io::Result<()>;
    /// Returns when everything written survives a loss of power.
    fn sync(&mut self) -> io::Result<()>;
    /// Does a little of the work that was put off, if there is any; whether more is left.
    fn settle(&mut self) -> io::Result<bool>;
    /// Reads the entries of a range.
    fn read(&mut self, range: Range<u64>) -> io::Result<Vec<(u64, Vec<u8>)>>;
}

/// Why a node may not take part with the log it has.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The node's log is gone although the node had one.
    #[error(
        "the log in {dir} is gone, so this node may not vote: remove it from the cluster and let it join again under a new number"
    )]
    Lost {
        /// Where it was.
        dir: PathBuf,
    },
    /// There is no log, and none was to be made.
    #[error(
        "there is no log in {dir} and this node was not asked to make one: restore the directory, or remove the node from the cluster and let it join again"
    )]
    Missing {
        /// Where it should be.
        dir: PathBuf,
    },
    /// The directory cannot be used.
    #[error("the log in {dir} cannot be opened")]
    Open {
        /// Where.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What was read is not what was written.
    #[error(
        "the log in {dir} is damaged ({what}), so this node may not vote: remove it from the cluster and let it join again under a new number"
    )]
    Damaged {
        /// Where.
        dir: PathBuf,
        /// What was found.
        what: String,
    },
    /// The log belongs to another node.
    #[error("the log in {dir} belongs to {found}, this is {expected}: check the data directory")]
    OtherNode {
        /// Where.
        dir: PathBuf,
        /// Whose log it is.
        found: cluster_model::NodeId,
        /// Who opened it.
        expected: cluster_model::NodeId,
    },
}

/// The log in a table, behind a journal.
pub(super) struct JournaledDisk<F: Files, T> {
    table: T,
    journal: Journal<F::File>,
    sizes: Sizes,
    /// Written, not yet in the journal.
    unsynced: Vec<Change>,
    /// In the journal, not yet in the table; the journal's size bounds it. Entries and removals, in order.
    pending: VecDeque<Change>,
    /// The small values among them, the newest of each: when they come to the table makes no difference, since
    /// whoever opens it repeats the journal first.
    small: BTreeMap<Key, Vec<u8>>,
}

/// The store of a real node.
pub(super) type SledDisk = JournaledDisk<OsFiles, SledTable>;

/// How large things are; the tests of crashes make them small.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// A new journal, bytes.
    pub journal_bytes: u64,
    /// The largest record's payload, bytes: at least one change.
    pub record_bytes_max: usize,
}

impl Default for Sizes {
    fn default() -> Sizes {
        Sizes {
            journal_bytes: JOURNAL_BYTES,
            record_bytes_max: RECORD_BYTES_MAX,
        }
    }
}

impl SledDisk {
    /// Opens the store in `dir`; makes it only if `create` says so and there never was one.
    pub(super) fn open(dir: &Path, create: bool) -> Result<SledDisk, StoreError> {
        JournaledDisk::open_with(OsFiles, dir, create, Sizes::default(), SledTable::open)
    }
}

impl<F: Files, T: Table> JournaledDisk<F, T> {
    /// Opens the store in `dir` on these files, with the table that `open_table` opens.
    pub(super) fn open_with(
        files: F,
        dir: &Path,
        create: bool,
        sizes: Sizes,
        open_table: impl FnOnce(&Path) -> io::Result<T>,
    ) -> Result<JournaledDisk<F, T>, StoreError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::InvalidData => StoreError::Damaged {
                dir: dir.to_owned(),
                what: source.to_string(),
            },
            _ => StoreError::Open {
                dir: dir.to_owned(),
                source,
            },
        };
        let (marker, journal_path) = (dir.join(MARKER), dir.join(JOURNAL));
        let table_dir = dir.join(TABLE);
        let data_path = table_dir.join(table::DATA);
        let exists = |path: &Path| files.exists(path).map_err(failed);
        let marked = exists(&marker)?;
        match (marked, exists(&data_path)? && exists(&journal_path)?) {
            (true, false) => {
                return Err(StoreError::Lost {
                    dir: dir.to_owned(),
                });
            }
            (false, _) if !create => {
                return Err(StoreError::Missing {
                    dir: dir.to_owned(),
                });
            }
            _ => {}
        }
        files.make_dirs(dir).map_err(failed)?;
        if marked {
            // Who wrote the marker may have been killed before it was durable.
            files.sync_dir(dir).map_err(failed)?;
        }
        if exists(&data_path)? {
            // After a sync that failed the page cache may show what the disk does not have.
            files.forget_cached(&data_path).map_err(failed)?;
        }
        let table = open_table(&table_dir).map_err(failed)?;
        if !marked {
            Journal::create(&files, &journal_path, sizes.journal_bytes).map_err(failed)?;
        }
        let generation = generation(&table, marked).map_err(failed)?;
        let (journal, records) =
            Journal::open(&files, &journal_path, generation).map_err(failed)?;
        let mut disk = JournaledDisk {
            table,
            journal,
            sizes,
            unsynced: Vec::new(),
            pending: VecDeque::new(),
            small: BTreeMap::new(),
        };
        for record in records {
            let changes = decode(&record)
                .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))?;
            disk.put_off(changes);
        }
        disk.checkpoint().map_err(failed)?;
        files.sync_dir(&table_dir).map_err(failed)?;
        if !marked {
            // Last: a node that stops before this point has promised nothing to anybody.
            files.write_durably(&marker, MARKER_TEXT).map_err(failed)?;
        }
        Ok(disk)
    }

    /// Moves everything in the journal to the table, makes that durable, and begins the journal again.
    fn checkpoint(&mut self) -> io::Result<()> {
        self.apply(usize::MAX)?;
        self.table.flush()?;
        // In a flush of its own: when it is durable, everything it speaks for is.
        let generation = self.journal.generation() + 1;
        self.table
            .set_small(KEY_GENERATION, generation.to_le_bytes().to_vec())?;
        self.table.flush()?;
        self.journal.restart(generation);
        Ok(())
    }

    /// Moves up to `count` changes from the journal to the table.
    fn apply(&mut self, count: usize) -> io::Result<()> {
        let count = count.min(self.pending.len());
        // What a later change of these overwrites or removes never reaches the table.
        let mut puts = BTreeMap::new();
        for change in self.pending.drain(..count) {
            match change {
                Change::Put { index, value } => drop(puts.insert(index, value)),
                Change::RemoveFrom(index) => {
                    puts.split_off(&index);
                    self.table.remove(index..u64::MAX)?;
                }
                Change::RemoveThrough(index) => {
                    puts = puts.split_off(&index.saturating_add(1));
                    self.table.remove(0..index.saturating_add(1))?;
                }
                Change::Meta { key, value } => drop(self.small.insert(key, value)),
            }
        }
        self.table.put(puts)?;
        if self.pending.is_empty() {
            for (key, value) in std::mem::take(&mut self.small) {
                self.table.set_small(key.text(), value)?;
            }
        }
        Ok(())
    }

    /// Puts changes off that are in the journal. Entries that are removed again before they came to the table
    /// never go there: on a busy log that is nearly all of them.
    fn put_off(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Meta { key, value } => drop(self.small.insert(key, value)),
                Change::RemoveThrough(last) => {
                    while let Some(Change::Put { index, .. }) = self.pending.front()
                        && *index <= last
                    {
                        self.pending.pop_front();
                    }
                    self.pending.push_back(change);
                }
                Change::Put { .. } | Change::RemoveFrom(_) => self.pending.push_back(change),
            }
        }
    }

    /// Writes changes as one record; they may go to the table as soon as that is durable, not before: a table
    /// that has some of them without the journal would have them out of order.
    fn record(&mut self, payload: &[u8], changes: Vec<Change>) -> io::Result<()> {
        if !self.journal.fits(payload.len()) {
            self.journal.sync()?;
            self.checkpoint()?;
        }
        self.journal.append(payload)?;
        self.put_off(changes);
        Ok(())
    }
}

impl<F: Files, T: Table> LogDisk for JournaledDisk<F, T> {
    fn load(&mut self) -> io::Result<Contents> {
        let entries = self.read(0..u64::MAX)?;
        let mut meta = Vec::new();
        for (name, value) in self.table.smalls()? {
            if name == KEY_GENERATION.as_bytes() {
                continue;
            }
            let key = Key::ALL
                .into_iter()
                .find(|key| key.text().as_bytes() == name);
            let key = key.ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("unknown small value {:?}", String::from_utf8_lossy(&name)),
                )
            })?;
            meta.push((key, value));
        }
        Ok(Contents { entries, meta })
    }

    fn write(&mut self, changes: Vec<Change>) -> io::Result<()> {
        self.unsynced.extend(changes);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.unsynced.is_empty() {
            return Ok(());
        }
        let bytes: usize = self.unsynced.iter().map(encoded_bytes).sum();
        let mut payload = Vec::with_capacity(bytes.min(self.sizes.record_bytes_max));
        let mut written = Vec::with_capacity(self.unsynced.len());
        for change in std::mem::take(&mut self.unsynced) {
            if payload.len() + encoded_bytes(&change) > self.sizes.record_bytes_max {
                self.record(&payload, std::mem::take(&mut written))?;
                payload.clear();
            }
            encode(&mut payload, &change)?;
            written.push(change);
        }
        self.record(&payload, written)?;
        self.journal.sync()
    }

    fn settle(&mut self) -> io::Result<bool> {
        self.apply(SETTLE_MAX)?;
        Ok(!self.pending.is_empty())
    }

    fn read(&mut self, range: Range<u64>) -> io::Result<Vec<(u64, Vec<u8>)>> {
        self.apply(usize::MAX)?;
        self.table.entries(range)
    }
}

/// The journal's generation that the table speaks of; a new store begins with the first.
fn generation(table: &impl Table, marked: bool) -> io::Result<u64> {
    match table.small(KEY_GENERATION)? {
        Some(value) => value
            .try_into()
            .map(u64::from_le_bytes)
            .map_err(|_| damaged("the generation")),
        None if !marked => Ok(1),
        None => Err(damaged("the generation is missing")),
    }
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
