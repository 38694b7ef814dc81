//! Where the log thread keeps things: a trait, and its implementation on sled behind a journal.
//!
//! sled's `flush()` ends in `sync_file_range`, which survives a crash of the process but not a loss of
//! power. So a commit is made durable in the [journal](super::journal), with one write and one `fdatasync`;
//! what is in it moves to sled while nothing waits for a while, and before the journal begins again sled is flushed and
//! its one data file, which we open a second time for that, synced. Values stay under 64 KiB because sled
//! moves large ones to files of their own that nobody syncs; snapshots are plain files (see
//! [`super::snapshot`]).

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::codec::{DecodeError, Reader};
use super::journal::{Journal, RECORD_BYTES_MAX};

/// The largest value that sled may be given, bytes.
pub(super) const VALUE_BYTES_MAX: usize = 64 * 1024;
/// sled's page cache, bytes: the tail of the log is in our own memory.
const CACHE_BYTES: u64 = 16 << 20;
/// Proves that this directory once held a log: without it a lost log would look like a new node.
const MARKER: &str = "raft-store";
/// The journal's file.
const JOURNAL: &str = "journal";
/// sled's key for the journal's generation: records of older ones are in sled already.
const KEY_GENERATION: &str = "journal";
/// Changes moved to sled in one go while nothing waits: about a millisecond.
const SETTLE_MAX: usize = 64;
/// What the marker says.
const MARKER_TEXT: &[u8] = b"baton raft store 1\n";

/// One change of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Writes the entry at an index.
    Put { index: u64, value: Vec<u8> },
    /// Removes every entry from an index on.
    RemoveFrom(u64),
    /// Removes every entry up to and including an index.
    RemoveThrough(u64),
    /// Writes one of the small values.
    Meta { key: Key, value: Vec<u8> },
}

/// The small values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    /// The vote.
    Vote,
    /// The commit point.
    Committed,
    /// The last entry removed from the front.
    Purged,
    /// Whose log this is.
    Node,
}

impl Key {
    const ALL: [Key; 4] = [Key::Vote, Key::Committed, Key::Purged, Key::Node];

    fn text(self) -> &'static str {
        match self {
            Key::Vote => "vote",
            Key::Committed => "committed",
            Key::Purged => "purged",
            Key::Node => "node",
        }
    }
}

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

/// The log on sled, behind a journal.
pub(super) struct SledDisk {
    log: sled::Tree,
    meta: sled::Tree,
    db: sled::Db,
    /// sled's data file, opened a second time for `fdatasync`.
    data: File,
    journal: Journal,
    /// Written, not yet in the journal.
    unsynced: Vec<Change>,
    /// In the journal, not yet in sled; the journal's size bounds it.
    pending: VecDeque<Change>,
}

impl SledDisk {
    /// Opens the store in `dir`; makes it only if `create` says so and there never was one.
    pub(super) fn open(dir: &Path, create: bool) -> Result<SledDisk, StoreError> {
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
        let data_path = dir.join("log").join("db");
        let marked = marker.exists();
        match (marked, data_path.exists() && journal_path.exists()) {
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
        std::fs::create_dir_all(dir).map_err(failed)?;
        let db = sled::Config::new()
            .path(dir.join("log"))
            .cache_capacity(CACHE_BYTES)
            // We flush; a timer's flush would only add latency at random.
            .flush_every_ms(None)
            .open()
            .map_err(|error| failed(to_io(error)))?;
        let log = db.open_tree("log").map_err(|error| failed(to_io(error)))?;
        let meta = db.open_tree("meta").map_err(|error| failed(to_io(error)))?;
        let data = File::options()
            .read(true)
            .write(true)
            .open(&data_path)
            .map_err(failed)?;
        if !marked {
            Journal::create(&journal_path).map_err(failed)?;
        }
        let generation = generation(&meta, marked).map_err(failed)?;
        let (journal, records) = Journal::open(&journal_path, generation).map_err(failed)?;
        let mut disk = SledDisk {
            log,
            meta,
            db,
            data,
            journal,
            unsynced: Vec::new(),
            pending: VecDeque::new(),
        };
        for record in records {
            let changes = decode(&record)
                .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))?;
            disk.pending.extend(changes);
        }
        disk.checkpoint().map_err(failed)?;
        sync_dir(&dir.join("log")).map_err(failed)?;
        if !marked {
            // Last: a node that stops before this point has promised nothing to anybody.
            write_durably(&marker, MARKER_TEXT).map_err(failed)?;
        }
        Ok(disk)
    }

    /// Moves everything in the journal to sled, makes that durable, and begins the journal again.
    fn checkpoint(&mut self) -> io::Result<()> {
        self.apply(usize::MAX)?;
        self.flush()?;
        // In a flush of its own: when it is durable, everything it speaks for is.
        let generation = self.journal.generation() + 1;
        self.meta
            .insert(KEY_GENERATION, &generation.to_le_bytes())
            .map_err(to_io)?;
        self.flush()?;
        self.journal.restart(generation);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.db.flush().map_err(to_io)?;
        self.data.sync_data()
    }

    /// Moves up to `count` changes from the journal to sled.
    fn apply(&mut self, count: usize) -> io::Result<()> {
        let count = count.min(self.pending.len());
        // What a later change of these overwrites or removes never reaches sled.
        let mut puts = BTreeMap::new();
        let mut metas: BTreeMap<Key, Vec<u8>> = BTreeMap::new();
        for change in self.pending.drain(..count) {
            match change {
                Change::Put { index, value } => drop(puts.insert(index, value)),
                Change::RemoveFrom(index) => {
                    puts.split_off(&index);
                    remove(&self.log, index..u64::MAX)?;
                }
                Change::RemoveThrough(index) => {
                    puts = puts.split_off(&index.saturating_add(1));
                    remove(&self.log, 0..index.saturating_add(1))?;
                }
                Change::Meta { key, value } => drop(metas.insert(key, value)),
            }
        }
        let mut batch = sled::Batch::default();
        for (index, value) in puts {
            batch.insert(&index.to_be_bytes(), value);
        }
        self.log.apply_batch(batch).map_err(to_io)?;
        for (key, value) in metas {
            self.meta.insert(key.text(), value).map_err(to_io)?;
        }
        Ok(())
    }

    fn record(&mut self, payload: &mut Vec<u8>) -> io::Result<()> {
        if !payload.is_empty() {
            if !self.journal.fits(payload.len()) {
                self.checkpoint()?;
            }
            self.journal.append(payload)?;
            payload.clear();
        }
        Ok(())
    }
}

impl LogDisk for SledDisk {
    fn load(&mut self) -> io::Result<Contents> {
        let entries = self.read(0..u64::MAX)?;
        let mut meta = Vec::new();
        for item in self.meta.iter() {
            let (name, value) = item.map_err(to_io)?;
            if name == KEY_GENERATION {
                continue;
            }
            let key = Key::ALL
                .into_iter()
                .find(|key| *key.text().as_bytes() == *name);
            let key = key.ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("unknown small value {name:?}"),
                )
            })?;
            meta.push((key, value.to_vec()));
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
        let mut payload = Vec::with_capacity(bytes.min(RECORD_BYTES_MAX));
        for change in std::mem::take(&mut self.unsynced) {
            if payload.len() + encoded_bytes(&change) > RECORD_BYTES_MAX {
                self.record(&mut payload)?;
            }
            encode(&mut payload, &change)?;
            self.pending.push_back(change);
        }
        self.record(&mut payload)?;
        self.journal.sync()
    }

    fn settle(&mut self) -> io::Result<bool> {
        self.apply(SETTLE_MAX)?;
        Ok(!self.pending.is_empty())
    }

    fn read(&mut self, range: Range<u64>) -> io::Result<Vec<(u64, Vec<u8>)>> {
        self.apply(usize::MAX)?;
        self.log
            .range(range.start.to_be_bytes()..range.end.to_be_bytes())
            .map(|item| {
                item.map_err(to_io)
                    .and_then(|(key, value)| Ok((index_of(&key)?, value.to_vec())))
            })
            .collect()
    }
}

/// The journal's generation that sled speaks of; a new store begins with the first.
fn generation(meta: &sled::Tree, marked: bool) -> io::Result<u64> {
    match meta.get(KEY_GENERATION).map_err(to_io)? {
        Some(value) => value
            .as_ref()
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

fn remove(log: &sled::Tree, range: Range<u64>) -> io::Result<()> {
    let mut batch = sled::Batch::default();
    for key in log
        .range(range.start.to_be_bytes()..range.end.to_be_bytes())
        .keys()
    {
        batch.remove(key.map_err(to_io)?);
    }
    log.apply_batch(batch).map_err(to_io)
}

const TAG_PUT: u8 = 1;
const TAG_REMOVE_FROM: u8 = 2;
const TAG_REMOVE_THROUGH: u8 = 3;
/// The tag of a small value is this and its place in [`Key::ALL`].
const TAG_META: u8 = 16;

fn encoded_bytes(change: &Change) -> usize {
    match change {
        Change::Put { value, .. } | Change::Meta { value, .. } => 1 + 8 + 4 + value.len(),
        Change::RemoveFrom(_) | Change::RemoveThrough(_) => 1 + 8,
    }
}

fn encode(out: &mut Vec<u8>, change: &Change) -> io::Result<()> {
    let put_value = |out: &mut Vec<u8>, value: &[u8]| {
        let length = u32::try_from(value.len()).map_err(|_| damaged("a value over 4 GiB"))?;
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(value);
        Ok(())
    };
    match change {
        Change::Put { index, value } => {
            out.push(TAG_PUT);
            out.extend_from_slice(&index.to_le_bytes());
            put_value(out, value)
        }
        Change::RemoveFrom(index) => {
            out.push(TAG_REMOVE_FROM);
            out.extend_from_slice(&index.to_le_bytes());
            Ok(())
        }
        Change::RemoveThrough(index) => {
            out.push(TAG_REMOVE_THROUGH);
            out.extend_from_slice(&index.to_le_bytes());
            Ok(())
        }
        Change::Meta { key, value } => {
            out.push(TAG_META + *key as u8);
            put_value(out, value)
        }
    }
}

fn decode(record: &[u8]) -> Result<Vec<Change>, DecodeError> {
    let mut reader = Reader::new("journal", record);
    let mut changes = Vec::new();
    while !reader.is_empty() {
        changes.push(match reader.u8()? {
            TAG_PUT => {
                let (index, length) = (reader.u64()?, reader.u32()? as usize);
                Change::Put {
                    index,
                    value: reader.bytes(length)?.to_vec(),
                }
            }
            TAG_REMOVE_FROM => Change::RemoveFrom(reader.u64()?),
            TAG_REMOVE_THROUGH => Change::RemoveThrough(reader.u64()?),
            tag => {
                let key = tag
                    .checked_sub(TAG_META)
                    .and_then(|place| Key::ALL.get(usize::from(place)))
                    .ok_or_else(|| DecodeError::new("journal", format!("unknown change {tag}")))?;
                let length = reader.u32()? as usize;
                Change::Meta {
                    key: *key,
                    value: reader.bytes(length)?.to_vec(),
                }
            }
        });
    }
    Ok(changes)
}

fn index_of(key: &[u8]) -> io::Result<u64> {
    key.try_into().map(u64::from_be_bytes).map_err(|_| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} bytes where an index belongs", key.len()),
        )
    })
}

fn to_io(error: sled::Error) -> io::Error {
    match error {
        sled::Error::Io(error) => error,
        other => io::Error::other(other.to_string()),
    }
}

/// Writes a whole file so that after any crash either the old or the new one is there.
pub(super) fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    use std::io::Write;
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// Makes a directory's entries durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
