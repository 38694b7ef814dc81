//! A file without a disk, for code that wants a path: an anonymous one, named through `/proc/self/fd`.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use nix::sys::memfd::{MFdFlags, memfd_create};

/// A file that holds these bytes.
///
/// # Errors
/// When the host gives none.
pub fn holding(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(content)?;
    Ok(file)
}

/// Its path, as long as it is open.
pub fn path(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}
