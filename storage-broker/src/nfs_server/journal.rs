//! The durable record of every file's owner, group and mode: an append-only journal with one sync per batch.
//!
//! ```text
//!  header (64 bytes) │ record (64 bytes) │ record │ …        one file, `<root>/.baton-nfs/attributes`
//! ```
//!
//! A file is known by its inode and the time of its birth, so that a file put in its place behind
//! the server's back is not taken for it. The last record of an inode holds. One thread writes:
//! it takes all that is waiting, writes it at once, syncs once, and only then answers. At start,
//! and when most of the journal is history, it is written anew (temporary file, sync, rename, sync
//! of the directory). Room for the next records is reserved ahead, so that a full volume can still
//! pass from owner to owner. A crash can tear only the last batch, of which nothing was acknowledged: a bad
//! record after which another batch begins is damage of another kind, and the server refuses to
//! start, because a lost record might be a lost fence.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

mod record;

use nix::fcntl::{FallocateFlags, fallocate};

use record::{
    Entry, RECORD_BYTES, VERSION, begins_batch, decode, decode_header, encode, encode_header,
};
pub(super) use record::{Identity, Record};

/// Changes waiting to be written at most: more callers than that wait for room.
const WAITING_MAX: usize = 1024;

/// Changes written under one sync at most; also how many records a crash can tear.
const BATCH_MAX: usize = 256;

/// The journal is written anew when it has this many records and four times as many as there are files.
const REWRITE_RECORDS_MIN: usize = 1 << 16;

/// Room held ahead of the last record.
const RESERVE_BYTES: u64 = 1 << 20;

const FILE: &str = "attributes";
const NEW_FILE: &str = "attributes.new";

/// Why the record of owners cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system refused.
    #[error(
        "cannot keep owners and modes in {path}: {source}; is the directory writable, and is there room?"
    )]
    Io {
        /// The journal.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// Not ours, or of a later version.
    #[error(
        "{path} is not an attribute journal of version {VERSION}; serve another directory, or use the program that wrote it"
    )]
    Foreign {
        /// The journal.
        path: PathBuf,
    },
    /// Damage that a crash cannot explain.
    #[error(
        "{path} is damaged at byte {offset}: who owns the files is no longer known; restore it from a backup, or remove it and give every file its owner anew"
    )]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// Where the first bad record begins.
        offset: usize,
    },
}

#[derive(Debug)]
struct Waiting {
    entry: Entry,
    done: Option<SyncSender<io::Result<()>>>,
}

/// What a journal held when it was opened.
#[derive(Debug)]
pub(crate) struct Contents {
    /// Drawn when the journal was first made; part of every handle.
    pub(super) export_id: u128,
    pub(super) records: HashMap<u64, Record>,
    /// Good records in the file, history included; `None` when there was no file.
    pub(crate) written: Option<usize>,
}

/// A handle on the journal's thread. Dropping it waits for what is under way.
#[derive(Debug)]
pub(super) struct Journal {
    queue: Option<SyncSender<Waiting>>,
    thread: Option<JoinHandle<()>>,
}

/// Reads the journal in `directory`, or begins one.
pub(crate) fn read(directory: &Path) -> Result<Contents, JournalError> {
    let path = directory.join(FILE);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Contents {
                export_id: rand::random(),
                records: HashMap::new(),
                written: None,
            });
        }
        Err(source) => return Err(JournalError::Io { path, source }),
    };
    let Some((header, body)) = bytes.split_first_chunk::<RECORD_BYTES>() else {
        return Err(JournalError::Foreign { path });
    };
    let export_id = decode_header(header).ok_or(JournalError::Foreign { path: path.clone() })?;
    let mut records = HashMap::new();
    let mut chunks = body.chunks_exact(RECORD_BYTES);
    let mut good = 0;
    for chunk in chunks.by_ref() {
        match decode(chunk) {
            Some(Entry::Put(record)) => {
                records.insert(record.identity.inode, record);
            }
            Some(Entry::Forget(identity)) => {
                records.remove(&identity.inode);
            }
            None => break,
        }
        good += 1;
    }
    if body.len() > (good + BATCH_MAX) * RECORD_BYTES || chunks.any(begins_batch) {
        return Err(JournalError::Damaged {
            path,
            offset: (good + 1) * RECORD_BYTES,
        });
    }
    Ok(Contents {
        export_id,
        records,
        written: Some(good),
    })
}

impl Journal {
    /// Writes `contents` as the journal of `directory` and opens it for more.
    pub(super) fn begin(directory: &Path, contents: Contents) -> Result<Journal, JournalError> {
        let opened = match rewrite(directory, &contents) {
            Ok(file) => Ok((file, contents.records.len())),
            // A full volume is served all the same, with the journal that there is.
            Err(error)
                if is_full(&error)
                    && let Some(written) = contents.written =>
            {
                tracing::warn!(%error, "no room to write the attribute journal anew; going on with the old one");
                resume(directory, written).map(|file| (file, written))
            }
            Err(error) => Err(error),
        };
        let (file, written) = opened.map_err(|source| JournalError::Io {
            path: directory.join(FILE),
            source,
        })?;
        let (queue, waiting) = sync_channel(WAITING_MAX);
        let writer = Writer {
            directory: directory.to_owned(),
            written,
            contents,
            file,
            reserved_to: 0,
            broken: false,
        };
        let thread = std::thread::Builder::new()
            .name("nfs-attributes".into())
            .spawn(move || writer.run(waiting))
            .map_err(|source| JournalError::Io {
                path: directory.join(FILE),
                source,
            })?;
        Ok(Journal {
            queue: Some(queue),
            thread: Some(thread),
        })
    }

    /// Makes a record durable, and returns when it is. Blocks; not for async tasks.
    ///
    /// # Errors
    /// Unless there was no room, which loses nothing, it is unknown then whether the record holds after a
    /// restart, and every later call fails too.
    pub(super) fn put(&self, record: Record) -> io::Result<()> {
        let (done, reply) = sync_channel(1);
        self.send(Waiting {
            entry: Entry::Put(record),
            done: Some(done),
        })?;
        reply.recv().map_err(|_| gone())?
    }

    /// Drops a file's record, some time: until then it is one that no file fits.
    pub(super) fn forget(&self, identity: Identity) {
        // Of no consequence if it fails: the next start drops records without files.
        let _ = self.send(Waiting {
            entry: Entry::Forget(identity),
            done: None,
        });
    }

    fn send(&self, waiting: Waiting) -> io::Result<()> {
        let queue = self.queue.as_ref().ok_or_else(gone)?;
        queue.send(waiting).map_err(|_| gone())
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.queue.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn gone() -> io::Error {
    io::Error::other("the attribute journal is closed")
}

struct Writer {
    directory: PathBuf,
    contents: Contents,
    file: File,
    /// Records in the file, history included.
    written: usize,
    /// Up to where room is reserved, or was asked for in vain.
    reserved_to: u64,
    /// After a failed write nobody knows what the disk holds.
    broken: bool,
}

impl Writer {
    fn run(mut self, queue: Receiver<Waiting>) {
        self.reserve();
        while let Ok(first) = queue.recv() {
            let mut batch = vec![first];
            batch.extend(queue.try_iter().take(BATCH_MAX - 1));
            let result = self.write(&batch);
            if let Err(error) = &result {
                if self.broken {
                    tracing::error!(%error, "the attribute journal cannot be written; no owner, group or mode changes until the server is restarted");
                } else {
                    tracing::warn!(%error, "the attribute journal has no room; no owner, group or mode changes until there is");
                }
            }
            for waiting in batch {
                if let Some(done) = waiting.done {
                    let own =
                        result
                            .as_ref()
                            .map(|_| ())
                            .map_err(|error| match error.raw_os_error() {
                                Some(code) => io::Error::from_raw_os_error(code),
                                None => io::Error::other(error.to_string()),
                            });
                    let _ = done.send(own);
                }
            }
        }
    }

    fn write(&mut self, batch: &[Waiting]) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other(
                "an earlier write of the attribute journal failed",
            ));
        }
        let records = batch.iter().enumerate();
        let bytes: Vec<u8> = records
            .flat_map(|(n, waiting)| encode(&waiting.entry, n == 0))
            .collect();
        self.broken = true;
        let end = self.end();
        if let Err(error) = self.file.write_all_at(&bytes, end) {
            // Nothing of the batch was answered: the file as it was is the truth.
            if is_full(&error) && self.file.set_len(end).is_ok() {
                self.reserved_to = 0;
                self.broken = false;
            }
            return Err(error);
        }
        self.file.sync_data()?;
        self.written += batch.len();
        for waiting in batch {
            match waiting.entry {
                Entry::Put(record) => {
                    self.contents.records.insert(record.identity.inode, record);
                }
                Entry::Forget(identity) => {
                    let records = &mut self.contents.records;
                    if records
                        .get(&identity.inode)
                        .is_some_and(|r| r.identity == identity)
                    {
                        records.remove(&identity.inode);
                    }
                }
            }
        }
        if self.written >= REWRITE_RECORDS_MIN.max(4 * self.contents.records.len()) {
            match rewrite(&self.directory, &self.contents) {
                Ok(file) => {
                    self.file = file;
                    self.written = self.contents.records.len();
                    self.reserved_to = 0;
                }
                Err(error) if is_full(&error) => {
                    tracing::warn!(%error, "no room to write the attribute journal anew");
                }
                Err(error) => return Err(error),
            }
        }
        self.broken = false;
        self.reserve();
        Ok(())
    }

    /// Where the next record goes.
    fn end(&self) -> u64 {
        (self.written as u64 + 1) * RECORD_BYTES as u64
    }

    /// Holds room for what comes, where the file system can.
    fn reserve(&mut self) {
        let end = self.end();
        if end + RESERVE_BYTES / 2 <= self.reserved_to {
            return;
        }
        let (Ok(offset), Ok(length)) = (i64::try_from(end), i64::try_from(RESERVE_BYTES)) else {
            return;
        };
        let mode = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&self.file, mode, offset, length) {
            Ok(()) => self.reserved_to = end + RESERVE_BYTES,
            Err(error) => {
                tracing::debug!(%error, "no room reserved for the attribute journal");
            }
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Opens the journal as it is, without what a crash tore.
fn resume(directory: &Path, written: usize) -> io::Result<File> {
    let file = OpenOptions::new().write(true).open(directory.join(FILE))?;
    file.set_len((written as u64 + 1) * RECORD_BYTES as u64)?;
    file.sync_all()?;
    Ok(file)
}

/// Replaces the journal by one without history; the old one holds until the new one is durable.
fn rewrite(directory: &Path, contents: &Contents) -> io::Result<File> {
    let temporary = directory.join(NEW_FILE);
    replace(directory, &temporary, contents).inspect_err(|_| {
        // Unfinished, it only takes room.
        let _ = std::fs::remove_file(&temporary);
    })
}

fn replace(directory: &Path, temporary: &Path, contents: &Contents) -> io::Result<File> {
    let mut bytes = encode_header(contents.export_id).to_vec();
    for record in contents.records.values() {
        bytes.extend(encode(&Entry::Put(*record), true));
    }
    let file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .open(temporary)?;
    file.write_all_at(&bytes, 0)?;
    file.sync_all()?;
    std::fs::rename(temporary, directory.join(FILE))?;
    File::open(directory)?.sync_all()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::super::permission::Attributes;
    use super::*;

    fn record(inode: u64, gid: u32) -> Record {
        Record {
            identity: Identity { inode, born_ns: 5 },
            generation: inode * 3,
            attributes: Attributes {
                uid: 1,
                gid,
                mode: 0o060,
                changed_ns: 9,
            },
            create_verifier: 4,
        }
    }

    fn fresh(directory: &Path) -> Journal {
        Journal::begin(directory, read(directory).unwrap()).unwrap()
    }

    #[test]
    fn a_journal_that_could_not_be_written_anew_goes_on_behind_its_last_good_record() {
        let directory = tempfile::tempdir().unwrap();
        let journal = fresh(directory.path());
        for gid in 0..20 {
            journal.put(record(7, gid)).unwrap();
        }
        drop(journal);
        let path = directory.path().join(FILE);
        let mut torn = std::fs::read(&path).unwrap();
        torn.extend([0xa5; 100]);
        std::fs::write(&path, torn).unwrap();

        let contents = read(directory.path()).unwrap();
        let written = contents.written.unwrap();
        assert_eq!(written, 20);
        let mut writer = Writer {
            directory: directory.path().to_owned(),
            file: resume(directory.path(), written).unwrap(),
            written,
            contents,
            reserved_to: 0,
            broken: false,
        };
        let waiting = |entry| Waiting { entry, done: None };
        writer.write(&[waiting(Entry::Put(record(8, 1)))]).unwrap();
        let contents = read(directory.path()).unwrap();
        assert_eq!(contents.written, Some(21));
        assert_eq!(
            contents.records,
            HashMap::from([(7, record(7, 19)), (8, record(8, 1))])
        );
    }

    #[test]
    fn the_last_record_of_a_file_survives_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let journal = fresh(directory.path());
        let export_id = read(directory.path()).unwrap().export_id;
        for gid in 0..20 {
            journal.put(record(7, gid)).unwrap();
        }
        journal.put(record(8, 1)).unwrap();
        journal.forget(record(8, 1).identity);
        drop(journal);
        for _ in 0..2 {
            let contents = read(directory.path()).unwrap();
            assert_eq!(contents.export_id, export_id);
            assert_eq!(contents.records, HashMap::from([(7, record(7, 19))]));
            drop(Journal::begin(directory.path(), contents).unwrap());
        }
    }

    #[test]
    fn a_torn_last_record_costs_only_itself() {
        let directory = tempfile::tempdir().unwrap();
        let journal = fresh(directory.path());
        journal.put(record(7, 1)).unwrap();
        journal.put(record(7, 2)).unwrap();
        drop(journal);
        let path = directory.path().join(FILE);
        let whole = std::fs::read(&path).unwrap();
        for cut in 1..RECORD_BYTES {
            std::fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            let contents = read(directory.path()).unwrap();
            assert_eq!(contents.records, HashMap::from([(7, record(7, 1))]));
        }
    }

    #[test]
    fn damage_in_the_middle_is_told_and_not_passed_over() {
        let directory = tempfile::tempdir().unwrap();
        let journal = fresh(directory.path());
        for inode in 0..5 {
            journal.put(record(inode, 1)).unwrap();
        }
        drop(journal);
        let path = directory.path().join(FILE);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[RECORD_BYTES * 3 + 9] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = read(directory.path()).unwrap_err();
        assert!(
            matches!(error, JournalError::Damaged { offset: 192, .. }),
            "{error}"
        );
        std::fs::write(&path, b"something else").unwrap();
        assert!(matches!(
            read(directory.path()),
            Err(JournalError::Foreign { .. })
        ));
    }

    #[test]
    fn many_callers_share_syncs_and_all_of_their_records_hold() {
        let directory = tempfile::tempdir().unwrap();
        let journal = fresh(directory.path());
        std::thread::scope(|scope| {
            for inode in 0..16 {
                let journal = &journal;
                scope.spawn(move || {
                    (0..20).for_each(|gid| journal.put(record(inode, gid)).unwrap())
                });
            }
        });
        drop(journal);
        let contents = read(directory.path()).unwrap();
        assert_eq!(contents.records.len(), 16);
        assert!(
            contents
                .records
                .values()
                .all(|record| record.attributes.gid == 19)
        );
    }
}
