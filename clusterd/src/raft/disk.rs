//! Where the log thread keeps things: a trait, and its implementation on sled.
//!
//! sled's `flush()` ends in `sync_file_range`, which survives a crash of the process but not a loss of
//! power. [`SledDisk::sync`] therefore opens sled's one data file itself and calls `fdatasync` on it
//! after each flush. Values stay under 64 KiB because sled moves large ones to files of their own that
//! nobody syncs; snapshots are plain files (see [`super::snapshot`]).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The largest value that sled may be given, bytes.
pub(super) const VALUE_BYTES_MAX: usize = 64 * 1024;
/// sled's page cache, bytes: the tail of the log is in our own memory.
const CACHE_BYTES: u64 = 16 << 20;
/// Proves that this directory once held a log: without it a lost log would look like a new node.
const MARKER: &str = "raft-store";
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
    Meta { key: &'static str, value: Vec<u8> },
}

/// Everything that a store holds when it is opened: entries in order, and the small values.
pub(super) struct Contents {
    pub entries: Vec<(u64, Vec<u8>)>,
    pub meta: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A store of log entries and a few small values; owned by the log thread, so it may block.
pub(super) trait LogDisk: Send + 'static {
    /// Reads everything.
    fn load(&mut self) -> io::Result<Contents>;
    /// Makes `changes` in order; they need not be durable before [`LogDisk::sync`].
    fn write(&mut self, changes: Vec<Change>) -> io::Result<()>;
    /// Returns when everything written survives a loss of power.
    fn sync(&mut self) -> io::Result<()>;
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

/// The log on sled.
pub(super) struct SledDisk {
    log: sled::Tree,
    meta: sled::Tree,
    db: sled::Db,
    /// sled's data file, opened a second time for `fdatasync`.
    data: File,
}

impl SledDisk {
    /// Opens the store in `dir`; makes it only if `create` says so and there never was one.
    pub(super) fn open(dir: &Path, create: bool) -> Result<SledDisk, StoreError> {
        let failed = |source| StoreError::Open { dir: dir.to_owned(), source };
        let marker = dir.join(MARKER);
        let data_path = dir.join("log").join("db");
        let (marked, present) = (marker.exists(), data_path.exists());
        match (marked, present) {
            (true, false) => return Err(StoreError::Lost { dir: dir.to_owned() }),
            (false, _) if !create => return Err(StoreError::Missing { dir: dir.to_owned() }),
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
        let data = File::options().read(true).write(true).open(&data_path).map_err(failed)?;
        let mut disk = SledDisk { log, meta, db, data };
        disk.sync().map_err(failed)?;
        sync_dir(&dir.join("log")).map_err(failed)?;
        if !marked {
            // Last: a node that stops before this point has promised nothing to anybody.
            write_durably(&marker, MARKER_TEXT).map_err(failed)?;
        }
        Ok(disk)
    }
}

impl LogDisk for SledDisk {
    fn load(&mut self) -> io::Result<Contents> {
        let entries = self
            .log
            .iter()
            .map(|item| item.map_err(to_io).and_then(|(key, value)| Ok((index_of(&key)?, value.to_vec()))))
            .collect::<io::Result<_>>()?;
        let meta = self
            .meta
            .iter()
            .map(|item| item.map_err(to_io).map(|(key, value)| (key.to_vec(), value.to_vec())))
            .collect::<io::Result<_>>()?;
        Ok(Contents { entries, meta })
    }

    fn write(&mut self, changes: Vec<Change>) -> io::Result<()> {
        let mut puts = sled::Batch::default();
        let mut pending = false;
        for change in changes {
            if let Change::Put { index, value } = change {
                puts.insert(&index.to_be_bytes(), value);
                pending = true;
                continue;
            }
            if std::mem::take(&mut pending) {
                self.log.apply_batch(std::mem::take(&mut puts)).map_err(to_io)?;
            }
            match change {
                Change::Put { .. } => {}
                Change::RemoveFrom(index) => self.remove(index..u64::MAX)?,
                Change::RemoveThrough(index) => self.remove(0..index.saturating_add(1))?,
                Change::Meta { key, value } => {
                    self.meta.insert(key, value).map_err(to_io)?;
                }
            }
        }
        if pending {
            self.log.apply_batch(puts).map_err(to_io)?;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.db.flush().map_err(to_io)?;
        self.data.sync_data()
    }

    fn read(&mut self, range: Range<u64>) -> io::Result<Vec<(u64, Vec<u8>)>> {
        self.log
            .range(range.start.to_be_bytes()..range.end.to_be_bytes())
            .map(|item| item.map_err(to_io).and_then(|(key, value)| Ok((index_of(&key)?, value.to_vec()))))
            .collect()
    }
}

impl SledDisk {
    fn remove(&mut self, range: Range<u64>) -> io::Result<()> {
        let mut batch = sled::Batch::default();
        for key in self.log.range(range.start.to_be_bytes()..range.end.to_be_bytes()).keys() {
            batch.remove(key.map_err(to_io)?);
        }
        self.log.apply_batch(batch).map_err(to_io)
    }
}

fn index_of(key: &[u8]) -> io::Result<u64> {
    key.try_into().map(u64::from_be_bytes).map_err(|_| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{} bytes where an index belongs", key.len()))
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
