//! The simulated disk's files, as the store sees them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::super::files::{FileAt, Files};
use super::super::journal;
use super::Mutant;
use super::disk::Disk;

/// What direct writes must be multiples of.
const BLOCK: usize = 4096;

/// The files of a [`Disk`]; clones share it.
#[derive(Clone)]
pub(super) struct SimFiles(Arc<Mutex<Disk>>);

impl SimFiles {
    pub(super) fn new(disk: Disk) -> SimFiles {
        SimFiles(Arc::new(Mutex::new(disk)))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap()
    }

    fn handle(&self, file: usize, path: &Path, direct: bool) -> SimFile {
        SimFile {
            disk: self.clone(),
            file,
            direct,
            journal: path.ends_with("journal"),
        }
    }
}

/// An open file of a [`Disk`].
pub(super) struct SimFile {
    disk: SimFiles,
    file: usize,
    direct: bool,
    journal: bool,
}

impl Files for SimFiles {
    type File = SimFile;

    fn open(&self, path: &Path) -> io::Result<SimFile> {
        let file = self.lock().file(path)?;
        Ok(self.handle(file, path, false))
    }

    fn open_direct(&self, path: &Path) -> io::Result<SimFile> {
        let file = self.lock().file(path)?;
        Ok(self.handle(file, path, true))
    }

    fn create(&self, path: &Path) -> io::Result<SimFile> {
        let file = self.lock().create(path)?;
        Ok(self.handle(file, path, false))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.lock().exists(path))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(self.lock().list(dir))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.lock().rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.lock().remove(path)
    }

    fn make_dir(&self, path: &Path) -> io::Result<()> {
        self.lock().make_dir(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.lock().sync_dir(dir)
    }

    fn forget_cached(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.lock();
        let file = disk.file(path)?;
        disk.forget_cached(file);
        if path.ends_with("log/db") && !disk.is(Mutant::CacheTrusted) {
            disk.table.forget_cached();
        }
        Ok(())
    }
}

impl SimFile {
    fn check_alignment(&self, buffer: &[u8], offset: u64) {
        if self.direct {
            let numbers = [buffer.as_ptr().addr(), buffer.len(), offset as usize];
            let aligned = numbers.iter().all(|number| number.is_multiple_of(BLOCK));
            assert!(aligned, "{numbers:?} for a direct access");
        }
    }
}

impl FileAt for SimFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.disk.lock().cached(self.file).len() as u64)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.check_alignment(buffer, offset);
        let disk = self.disk.lock();
        let content = disk.cached(self.file);
        let start = offset as usize;
        let part = content
            .get(start..start + buffer.len())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(part);
        if self.journal && disk.is(Mutant::ChecksumIgnored) {
            journal::make_checksums_right(buffer);
        }
        Ok(())
    }

    fn write_all_at(&self, content: &[u8], offset: u64) -> io::Result<()> {
        self.check_alignment(content, offset);
        self.disk.lock().write(self.file, offset as usize, content)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.disk.lock();
        match disk.is(Mutant::NoDataSync) {
            true => Ok(()),
            false => disk.sync(self.file),
        }
    }

    fn sync_all(&self) -> io::Result<()> {
        let mut disk = self.disk.lock();
        match disk.is(Mutant::NoFileSync) {
            true => Ok(()),
            false => disk.sync(self.file),
        }
    }
}
