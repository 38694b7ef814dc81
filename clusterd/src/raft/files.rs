//! The file system as the log store uses it: a trait, so that a simulated disk can take its place.
//!
//! The rules that callers keep to: content is durable after [`FileAt::sync_data`] (or `sync_all`, where the
//! length matters), a name after [`Files::sync_dir`] of its directory, and after a sync that failed nothing
//! is known of what was written before it.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// What the store does with files and directories.
pub(super) trait Files: Clone + Send + Sync + 'static {
    /// An open file.
    type File: FileAt;
    /// Opens a file that exists, for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Self::File>;
    /// Opens it past the page cache: memory, offsets and lengths must be multiples of its block.
    fn open_direct(&self, path: &Path) -> io::Result<Self::File>;
    /// Opens a file for writing, empty.
    fn create(&self, path: &Path) -> io::Result<Self::File>;
    /// Whether something has this name.
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// The paths in a directory.
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>>;
    /// Gives a file another name, in place of what had it.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes a directory in one that exists.
    fn make_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes a directory's names durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Lets go of what the page cache has of a file: reads then show what the disk has.
    fn forget_cached(&self, path: &Path) -> io::Result<()>;

    /// Makes a directory and what is missing above it, durably.
    fn make_dirs(&self, dir: &Path) -> io::Result<()> {
        let Some(parent) = dir.parent().filter(|parent| *parent != Path::new("")) else {
            return Ok(());
        };
        if !self.exists(dir)? {
            self.make_dirs(parent)?;
            self.make_dir(dir)?;
        }
        // Also when it was there: who made it may have been killed before this.
        self.sync_dir(parent)
    }

    /// Writes a whole file so that after any crash either the old or the new one is there.
    fn write_durably(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let temporary = path.with_extension(TEMPORARY);
        let file = self.create(&temporary)?;
        file.write_all_at(content, 0)?;
        file.sync_all()?;
        self.rename(&temporary, path)?;
        self.sync_dir(path.parent().unwrap_or(Path::new(".")))
    }
}

/// The extension of a file that is not whole yet.
pub(super) const TEMPORARY: &str = "tmp";

/// An open file.
pub(super) trait FileAt: Send + 'static {
    /// Its length, bytes.
    fn length(&self) -> io::Result<u64>;
    /// Reads so many bytes.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all bytes.
    fn write_all_at(&self, content: &[u8], offset: u64) -> io::Result<()>;
    /// Makes what was written durable.
    fn sync_data(&self) -> io::Result<()>;
    /// The same, with everything that is known about the file.
    fn sync_all(&self) -> io::Result<()>;
}

/// The machine's own files.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OsFiles;

impl Files for OsFiles {
    type File = File;

    fn open(&self, path: &Path) -> io::Result<File> {
        File::options().read(true).write(true).open(path)
    }

    fn open_direct(&self, path: &Path) -> io::Result<File> {
        File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        File::create(path)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        path.try_exists()
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        std::fs::read_dir(dir)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn make_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn forget_cached(&self, path: &Path) -> io::Result<()> {
        let file = File::open(path)?;
        // A length of 0 means all of it; dirty pages are written, not dropped.
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(io::Error::from)
    }
}

impl FileAt for File {
    fn length(&self) -> io::Result<u64> {
        self.metadata().map(|metadata| metadata.len())
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }

    fn write_all_at(&self, content: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, content, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)
    }

    fn sync_all(&self) -> io::Result<()> {
        File::sync_all(self)
    }
}
