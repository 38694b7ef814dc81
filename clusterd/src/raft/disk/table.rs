//! What the journal is moved to: entries by index and a few small values by name.
//!
//! This is what the store asks of sled, and all that it takes for granted:
//!
//! - After [`Table::flush`] everything written reads back, whatever happens to the machine.
//! - What was written since may be there or not after a loss of power, each key by itself.
//! - A table that has lost more than that goes back as a whole or does not open.
//!
//! The first rests on the `sync_data` after sled's own flush. The second is weaker than what sled says of
//! itself (its log ends at the first record that is not whole), so that nothing depends on the order in which
//! it writes its pages. The third is why the journal is checked against the table's generation.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use super::super::files::{Files, OsFiles};

/// sled's page cache, bytes: the tail of the log is in our own memory.
const CACHE_BYTES: u64 = 16 << 20;
/// sled's data file, in its directory.
pub(in super::super) const DATA: &str = "db";

/// Entries by index and small values by name; see the module for what may be lost.
pub(in super::super) trait Table: Send + 'static {
    /// A small value.
    fn small(&self, name: &str) -> io::Result<Option<Vec<u8>>>;
    /// Every small value.
    fn smalls(&self) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>>;
    /// Writes a small value.
    fn set_small(&mut self, name: &str, value: Vec<u8>) -> io::Result<()>;
    /// The entries of a range, in order.
    fn entries(&self, range: Range<u64>) -> io::Result<Vec<(u64, Vec<u8>)>>;
    /// Writes entries.
    fn put(&mut self, entries: BTreeMap<u64, Vec<u8>>) -> io::Result<()>;
    /// Removes the entries of a range.
    fn remove(&mut self, range: Range<u64>) -> io::Result<()>;
    /// Returns when everything written survives a loss of power.
    fn flush(&mut self) -> io::Result<()>;
}

/// The table in sled.
pub(in super::super) struct SledTable {
    log: sled::Tree,
    meta: sled::Tree,
    db: sled::Db,
    /// sled's data file, opened a second time for `fdatasync`.
    data: File,
}

impl SledTable {
    /// Opens or makes the table in `dir`.
    pub(super) fn open(dir: &Path) -> io::Result<SledTable> {
        let db = sled::Config::new()
            .path(dir)
            .cache_capacity(CACHE_BYTES)
            // We flush; a timer's flush would only add latency at random.
            .flush_every_ms(None)
            .open()
            .map_err(to_io)?;
        Ok(SledTable {
            log: db.open_tree("log").map_err(to_io)?,
            meta: db.open_tree("meta").map_err(to_io)?,
            db,
            data: OsFiles.open(&dir.join(DATA))?,
        })
    }
}

impl Table for SledTable {
    fn small(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let value = self.meta.get(name).map_err(to_io)?;
        Ok(value.map(|value| value.to_vec()))
    }

    fn smalls(&self) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        self.meta
            .iter()
            .map(|item| {
                item.map(|(name, value)| (name.to_vec(), value.to_vec()))
                    .map_err(to_io)
            })
            .collect()
    }

    fn set_small(&mut self, name: &str, value: Vec<u8>) -> io::Result<()> {
        self.meta.insert(name, value).map(drop).map_err(to_io)
    }

    fn entries(&self, range: Range<u64>) -> io::Result<Vec<(u64, Vec<u8>)>> {
        self.log
            .range(range.start.to_be_bytes()..range.end.to_be_bytes())
            .map(|item| {
                item.map_err(to_io)
                    .and_then(|(key, value)| Ok((index_of(&key)?, value.to_vec())))
            })
            .collect()
    }

    fn put(&mut self, entries: BTreeMap<u64, Vec<u8>>) -> io::Result<()> {
        let mut batch = sled::Batch::default();
        for (index, value) in entries {
            batch.insert(&index.to_be_bytes(), value);
        }
        self.log.apply_batch(batch).map_err(to_io)
    }

    fn remove(&mut self, range: Range<u64>) -> io::Result<()> {
        let mut batch = sled::Batch::default();
        for key in self
            .log
            .range(range.start.to_be_bytes()..range.end.to_be_bytes())
            .keys()
        {
            batch.remove(key.map_err(to_io)?);
        }
        self.log.apply_batch(batch).map_err(to_io)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.db.flush().map_err(to_io)?;
        self.data.sync_data()
    }
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
