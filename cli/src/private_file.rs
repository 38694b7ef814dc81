//! Files with secrets: written whole or not at all, for their owner's eyes only, not read when others may.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// The mode that such a file has.
pub const MODE: u32 = 0o600;
/// What group and others may do with a file.
const OF_OTHERS: u32 = 0o077;

/// Why a file with secrets was not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Others may read or write it.
    #[error("others may use {path} (mode {mode:04o}), and it holds secrets; try: chmod 600 {path}")]
    Open {
        /// The file.
        path: String,
        /// Its permissions.
        mode: u32,
    },
    /// Larger than it may be.
    #[error("{path} has more than {max} bytes")]
    Large {
        /// The file.
        path: String,
        /// The limit.
        max: u64,
    },
    /// The system refuses.
    #[error("cannot read {path}: {cause}")]
    Io {
        /// The file.
        path: String,
        /// Its word.
        cause: io::Error,
    },
}

/// Reads such a file; `None` when there is none.
///
/// # Errors
/// See [`ReadError`].
pub fn read(path: &Path, bytes_max: u64) -> Result<Option<String>, ReadError> {
    let name = || path.display().to_string();
    let refused = |cause| ReadError::Io {
        path: name(),
        cause,
    };
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(refused)?,
    };
    // Of the open file, not of whatever stands under its name by then.
    let mode = file.metadata().map_err(refused)?.mode() & 0o7777;
    if mode & OF_OTHERS != 0 {
        return Err(ReadError::Open { path: name(), mode });
    }
    let mut text = String::new();
    let mut bounded = file.take(bytes_max + 1);
    let length = bounded.read_to_string(&mut text).map_err(refused)? as u64;
    if length > bytes_max {
        return Err(ReadError::Large {
            path: name(),
            max: bytes_max,
        });
    }
    Ok(Some(text))
}

/// Writes such a file: readers see what was there before or all of this.
///
/// # Errors
/// When the file system refuses; what was there before is there still.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{:016x}.new", rand::random::<u64>()));
    let new = Path::new(&name);
    let written = fill(new, bytes).and_then(|()| fs::rename(new, path));
    if written.is_err() {
        let _ = fs::remove_file(new);
    }
    written
}

fn fill(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(MODE)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_its_owners_alone_and_its_replacement_leaves_nothing_behind() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("secret");
        assert!(matches!(read(&path, 100), Ok(None)));
        for text in ["one", "two"] {
            write(&path, text.as_bytes()).expect("written");
            let mode = fs::metadata(&path).expect("there").permissions().mode();
            assert_eq!(mode & 0o7777, MODE);
            assert_eq!(read(&path, 100).expect("read").as_deref(), Some(text));
        }
        assert_eq!(fs::read_dir(folder.path()).expect("a list").count(), 1);
    }

    #[test]
    fn a_write_that_fails_leaves_the_old_file_and_no_other() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("taken");
        // A folder of that name cannot be replaced by a file.
        fs::create_dir(&path).expect("a folder");
        assert!(write(&path, b"x").is_err());
        assert!(path.is_dir());
        assert_eq!(fs::read_dir(folder.path()).expect("a list").count(), 1);
    }

    #[test]
    fn a_file_that_others_may_read_or_write_is_refused_with_advice() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("secret");
        write(&path, b"BT1.hidden").expect("written");
        for mode in [0o640, 0o604, 0o620, 0o666] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("a mode");
            let error = read(&path, 100).expect_err("it is open").to_string();
            assert!(error.contains("chmod 600"), "{error}");
            assert!(!error.contains("hidden"), "{error}");
        }
    }

    #[test]
    fn a_file_beyond_its_bound_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("secret");
        write(&path, b"12345").expect("written");
        assert!(read(&path, 5).is_ok());
        assert!(matches!(read(&path, 4), Err(ReadError::Large { .. })));
    }
}
