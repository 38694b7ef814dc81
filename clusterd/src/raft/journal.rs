//! A small file in front of the store: what is in it survives a loss of power, after one write and one sync.
//!
//! ```text
//! record   magic u32 | length u32 | generation u64 | sequence u48 | place u16 | xxh3 u64 | payload | zeros to 4 KiB
//! file     record 0 | record 1 | … | record n | older generations' records, or zeros
//! ```
//! sled alone needs two waits for the disk a commit (its own `sync_file_range`, then our `fdatasync`) and
//! rewrites tree nodes under them; this needs one, in a file whose blocks exist already. Records begin at
//! block boundaries, so that a torn write damages nothing that was acknowledged before. When the file is
//! full its content has been moved to sled and it begins again with the next generation.
//!
//! Records written under one sync may survive a loss of power in any selection. Each therefore says its place
//! among those of its sync: everything before its sync's first was durable when it was written, so that a
//! damaged record is told from one that nobody was promised.

use std::io;
use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

use super::codec::{DecodeError, Reader};
use super::files::{FileAt, Files, TEMPORARY};

/// Size of a new file, bytes: at least 8,000 commits between two moves to sled. That is more entries than
/// the log keeps, so that on a busy log most of them are purged before they would be moved.
pub(super) const JOURNAL_BYTES: u64 = 32 << 20;
/// A file beyond this is not ours to read into memory.
const FILE_BYTES_MAX: u64 = 1 << 30;
/// The largest payload of one record, bytes; more is split.
pub(super) const RECORD_BYTES_MAX: usize = 1 << 20;
const BLOCK: usize = 4096;
const MAGIC: u32 = 0x4c4a_5442;
const HEADER: usize = 4 + 4 + 8 + 8 + 8;
/// Bits of a record's number; those above are its place in its sync.
const SEQUENCE_BITS: u32 = 48;

/// The journal, open for one generation.
pub(super) struct Journal<F> {
    file: F,
    generation: u64,
    sequence: u64,
    /// Records written since the last sync.
    unsynced: u64,
    position: u64,
    /// Of the file, which an earlier version may have made.
    size: u64,
    /// Reused for each record.
    buffer: Vec<u8>,
}

impl<F: FileAt> Journal<F> {
    /// Makes an empty journal of `bytes` with all its blocks written, so that later syncs change no metadata.
    pub(super) fn create(files: &impl Files<File = F>, path: &Path, bytes: u64) -> io::Result<()> {
        let temporary = path.with_extension(TEMPORARY);
        let file = files.create(&temporary)?;
        let zeros = vec![0; bytes.min(1 << 20) as usize];
        for at in (0..bytes).step_by(zeros.len()) {
            file.write_all_at(&zeros, at)?;
        }
        file.sync_all()?;
        files.rename(&temporary, path)?;
        files.sync_dir(path.parent().unwrap_or(Path::new(".")))
    }

    /// Opens the journal and gives the payloads of `generation`, in order.
    ///
    /// # Errors
    /// When the file cannot be read, a record that was acknowledged is damaged (one that was durable when a
    /// later one was written), or there is a record of a later generation: the table has lost what it had.
    pub(super) fn open(
        files: &impl Files<File = F>,
        path: &Path,
        generation: u64,
    ) -> io::Result<(Journal<F>, Vec<Vec<u8>>)> {
        let file = files.open(path)?;
        // Who wrote it may have been killed before its sync, and what is read here moves to the table at once;
        // after a sync that failed the page cache may show what the disk does not have.
        file.sync_data()?;
        files.forget_cached(path)?;
        let size = file.length()?;
        if size < BLOCK as u64 || size > FILE_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                DecodeError::new("journal", format!("it has {size} bytes")),
            ));
        }
        let mut content = vec![0; (size - size % BLOCK as u64) as usize];
        file.read_exact_at(&mut content, 0)?;
        let mut payloads = Vec::new();
        let mut position = 0;
        while let Some(record) = parse(&content[position..]).filter(|record| {
            record.generation == generation && record.sequence == payloads.len() as u64
        }) {
            payloads.push(record.payload.to_vec());
            position += blocks(record.payload.len());
        }
        let end = payloads.len() as u64;
        let refused = |why: String| {
            io::Error::new(io::ErrorKind::InvalidData, DecodeError::new("journal", why))
        };
        for at in (position..content.len()).step_by(BLOCK) {
            let Some(record) = parse(&content[at..]) else {
                continue;
            };
            if record.generation > generation {
                return Err(refused(format!(
                    "it is of generation {}, and the table has gone back to {generation}",
                    record.generation
                )));
            }
            let durable = record.sequence.saturating_sub(record.place);
            if record.generation == generation && durable > end {
                return Err(refused(format!(
                    "record {end} is damaged and one of a later sync is not"
                )));
            }
        }
        let journal = Journal {
            file: direct(files, path).unwrap_or(file),
            generation,
            sequence: end,
            unsynced: 0,
            position: position as u64,
            size: content.len() as u64,
            buffer: Vec::new(),
        };
        Ok((journal, payloads))
    }

    /// Begins again at the front: everything of older generations is void.
    pub(super) fn restart(&mut self, generation: u64) {
        self.generation = generation;
        self.sequence = 0;
        self.unsynced = 0;
        self.position = 0;
    }

    /// This journal's generation.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether a record with such a payload still fits.
    pub(super) fn fits(&self, payload_bytes: usize) -> bool {
        self.position + blocks(payload_bytes) as u64 <= self.size
    }

    /// Writes a record that fits; [`Journal::sync`] makes it durable.
    pub(super) fn append(&mut self, payload: &[u8]) -> io::Result<()> {
        let length = u32::try_from(payload.len())
            .ok()
            .filter(|_| payload.len() <= RECORD_BYTES_MAX && self.fits(payload.len()))
            .ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "the journal's record is too large",
                )
            })?;
        let record = aligned(&mut self.buffer, blocks(payload.len()));
        record[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        record[4..8].copy_from_slice(&length.to_le_bytes());
        record[8..16].copy_from_slice(&self.generation.to_le_bytes());
        let number = self.sequence | self.unsynced << SEQUENCE_BITS;
        record[16..24].copy_from_slice(&number.to_le_bytes());
        let checksum = checksum(&record[..HEADER - 8], payload);
        record[24..HEADER].copy_from_slice(&checksum.to_le_bytes());
        let (content, rest) = record[HEADER..].split_at_mut(payload.len());
        content.copy_from_slice(payload);
        rest.fill(0);
        self.file.write_all_at(record, self.position)?;
        self.position += record.len() as u64;
        self.sequence += 1;
        self.unsynced += 1;
        // A place has to fit in what is left of the number.
        match self.unsynced >> (u64::BITS - SEQUENCE_BITS) {
            0 => Ok(()),
            _ => self.sync(),
        }
    }

    /// Returns when every record written survives a loss of power.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        self.unsynced = 0;
        Ok(())
    }
}

/// The file, written past the page cache, where its file system can do that: the write then goes to the disk
/// at once and the sync has no pages to look for.
fn direct<F: Files>(files: &F, path: &Path) -> io::Result<F::File> {
    let file = files.open_direct(path)?;
    // A disk with larger blocks than ours refuses this as it would refuse our writes.
    file.read_exact_at(aligned(&mut Vec::new(), BLOCK), 0)?;
    Ok(file)
}

/// `length` bytes of `buffer` that begin at a block's boundary in memory, as direct writes ask.
fn aligned(buffer: &mut Vec<u8>, length: usize) -> &mut [u8] {
    if buffer.len() < length + BLOCK {
        buffer.resize(length + BLOCK, 0);
    }
    let start = buffer.as_ptr().align_offset(BLOCK);
    &mut buffer[start..start + length]
}

struct Record<'a> {
    generation: u64,
    sequence: u64,
    /// How many records of its sync came before it.
    place: u64,
    payload: &'a [u8],
}

/// The record at the front of `bytes`, if a whole one is there.
fn parse(bytes: &[u8]) -> Option<Record<'_>> {
    let mut reader = Reader::new("journal", bytes);
    if reader.u32().ok()? != MAGIC {
        return None;
    }
    let length = reader.u32().ok()? as usize;
    let (generation, number, expected) =
        (reader.u64().ok()?, reader.u64().ok()?, reader.u64().ok()?);
    let payload = reader.bytes(length).ok()?;
    let covered = &bytes[..HEADER - 8];
    (length <= RECORD_BYTES_MAX && checksum(covered, payload) == expected).then_some(Record {
        generation,
        sequence: number & ((1 << SEQUENCE_BITS) - 1),
        place: number >> SEQUENCE_BITS,
        payload,
    })
}

fn checksum(header: &[u8], payload: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(header);
    hash.update(payload);
    hash.digest()
}

/// Bytes that a record takes in the file.
fn blocks(payload_bytes: usize) -> usize {
    (HEADER + payload_bytes).next_multiple_of(BLOCK)
}

/// Makes whatever looks like a record one, as a reader that does not look at checksums takes it.
#[cfg(test)]
pub(super) fn make_checksums_right(content: &mut [u8]) {
    for at in (0..content.len()).step_by(BLOCK) {
        let record = &mut content[at..];
        let length = u32::from_le_bytes(record[4..8].try_into().unwrap()) as usize;
        if record[0..4] == MAGIC.to_le_bytes() && HEADER + length <= record.len() {
            let right = checksum(&record[..HEADER - 8], &record[HEADER..HEADER + length]);
            record[HEADER - 8..HEADER].copy_from_slice(&right.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::super::files::OsFiles;
    use super::*;

    fn new() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        Journal::create(&OsFiles, &path, JOURNAL_BYTES).unwrap();
        (dir, path)
    }

    fn flip(path: &Path, at: u64) {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        FileExt::read_exact_at(&file, &mut byte, at).unwrap();
        FileExt::write_all_at(&file, &[byte[0] ^ 1], at).unwrap();
    }

    #[test]
    fn records_read_back_in_order_and_older_generations_are_void() {
        let (_dir, path) = new();
        let (mut journal, records) = Journal::open(&OsFiles, &path, 1).unwrap();
        assert!(records.is_empty());
        for n in 0..10u8 {
            journal.append(&vec![n; 3_000 * usize::from(n)]).unwrap();
        }
        journal.sync().unwrap();
        let (_, records) = Journal::open(&OsFiles, &path, 1).unwrap();
        assert_eq!(records.len(), 10);
        assert_eq!(records[7], vec![7; 21_000]);
        assert!(Journal::open(&OsFiles, &path, 2).unwrap().1.is_empty());
        journal.restart(2);
        journal.append(b"new").unwrap();
        assert_eq!(
            Journal::open(&OsFiles, &path, 2).unwrap().1,
            [b"new".to_vec()]
        );
    }

    #[test]
    fn a_torn_record_at_the_end_was_not_acknowledged_and_a_damaged_one_before_it_was() {
        let (_dir, path) = new();
        let (mut journal, _) = Journal::open(&OsFiles, &path, 1).unwrap();
        for n in 0..3u8 {
            journal.append(&[n; 10]).unwrap();
            journal.sync().unwrap();
        }
        // Record 2 begins in the third block.
        flip(&path, 2 * BLOCK as u64 + HEADER as u64 + 5);
        assert_eq!(Journal::open(&OsFiles, &path, 1).unwrap().1.len(), 2);
        flip(&path, 2 * BLOCK as u64 + HEADER as u64 + 5);
        flip(&path, BLOCK as u64 + HEADER as u64 + 5);
        assert!(Journal::open(&OsFiles, &path, 1).is_err());
    }

    #[test]
    fn of_records_under_one_sync_any_may_be_missing() {
        let (_dir, path) = new();
        let (mut journal, _) = Journal::open(&OsFiles, &path, 1).unwrap();
        journal.append(b"acknowledged").unwrap();
        journal.sync().unwrap();
        journal.append(b"torn").unwrap();
        journal.append(b"whole").unwrap();
        flip(&path, BLOCK as u64 + HEADER as u64 + 2);
        let (_, records) = Journal::open(&OsFiles, &path, 1).unwrap();
        assert_eq!(records, [b"acknowledged".to_vec()]);
        flip(&path, HEADER as u64 + 2);
        assert!(Journal::open(&OsFiles, &path, 1).is_err());
    }

    #[test]
    fn a_full_journal_takes_nothing_more() {
        let (_dir, path) = new();
        // As large as an earlier version made it: it is used as it is.
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(8 << 20).unwrap();
        let (mut journal, _) = Journal::open(&OsFiles, &path, 1).unwrap();
        let payload = vec![1; RECORD_BYTES_MAX];
        let mut written = 0;
        while journal.fits(payload.len()) {
            journal.append(&payload).unwrap();
            written += 1;
        }
        assert_eq!(written, 7);
        assert!(journal.append(&payload).is_err());
        assert!(journal.append(&vec![1; RECORD_BYTES_MAX + 1]).is_err());
        assert_eq!(Journal::open(&OsFiles, &path, 1).unwrap().1.len(), 7);
    }
}
