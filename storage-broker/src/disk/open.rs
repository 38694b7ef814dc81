//! Finding a disk's file: by LOOKUP on an NFS volume, or beneath a directory without following a way out.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

use crate::dialer::Dialer;
use crate::nfs::client::Limits;
use crate::nfs::{
    Attributes, Credential, FileHandle, MountError, NfsClient, NfsError, Status, mount,
};
use crate::volume::{DiskPath, NfsUrl};

/// Why a disk could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The volume cannot be reached.
    #[error("cannot open disk `{path}`: {source}")]
    Mount {
        /// The disk.
        path: DiskPath,
        /// Why.
        source: Box<MountError>,
    },
    /// The volume has no such file.
    #[error("volume {volume} has no disk `{path}`: create it first, or check its path")]
    NotFound {
        /// The volume.
        volume: String,
        /// The disk.
        path: DiskPath,
    },
    /// There is something else of that name.
    #[error("`{path}` on volume {volume} is not a regular file")]
    NotAFile {
        /// The volume.
        volume: String,
        /// The disk.
        path: DiskPath,
    },
    /// The server refused to look.
    #[error(
        "cannot look at disk `{path}` on {volume}: {source}; the export's directories must be searchable (mode o+x)"
    )]
    Nfs {
        /// The volume.
        volume: String,
        /// The disk.
        path: DiskPath,
        /// What it said.
        source: NfsError,
    },
    /// The host's file system refused.
    #[error("cannot open disk `{path}` in {}: {source}", directory.display())]
    Io {
        /// The volume's directory.
        directory: PathBuf,
        /// The disk.
        path: DiskPath,
        /// What it said.
        source: io::Error,
    },
}

/// A disk's file on an NFS volume, found.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) client: NfsClient,
    pub(crate) file: FileHandle,
    pub(crate) attributes: Attributes,
    pub(crate) limits: Limits,
}

/// Mounts the export and finds the file; changes nothing.
pub(crate) async fn open_file(
    url: &NfsUrl,
    path: &DiskPath,
    credential: Credential,
    dialer: &Dialer,
    call_timeout: Duration,
) -> Result<Opened, OpenError> {
    let client = mount(url, dialer, call_timeout)
        .await
        .map_err(|source| OpenError::Mount {
            path: path.clone(),
            source: Box::new(source),
        })?;
    let refused = |source: NfsError| match source.status() {
        Some(Status::NFS3ERR_NOENT | Status::NFS3ERR_NOTDIR) => OpenError::NotFound {
            volume: url.to_string(),
            path: path.clone(),
        },
        _ => OpenError::Nfs {
            volume: url.to_string(),
            path: path.clone(),
            source,
        },
    };
    let file = find(&client, credential, path).await.map_err(refused)?;
    let attributes = client.getattr(credential, &file).await.map_err(refused)?;
    if !attributes.is_file {
        return Err(OpenError::NotAFile {
            volume: url.to_string(),
            path: path.clone(),
        });
    }
    let limits = client.fsinfo(credential).await.map_err(refused)?;
    Ok(Opened {
        client,
        file,
        attributes,
        limits,
    })
}

/// LOOKUP of each part of a path.
pub(crate) async fn find(
    client: &NfsClient,
    credential: Credential,
    path: &DiskPath,
) -> Result<FileHandle, NfsError> {
    let (directories, name) = path.parts();
    let mut place = client.root().clone();
    for directory in directories {
        place = client.lookup(credential, &place, directory).await?;
    }
    client.lookup(credential, &place, name).await
}

/// Opens a file beneath `directory`; a symbolic link that leads out of it is an error.
pub(crate) fn open_beneath(
    directory: &Path,
    path: &str,
    flags: OFlag,
    mode: Mode,
) -> io::Result<File> {
    let directory = File::open(directory)?;
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .mode(mode)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let descriptor: OwnedFd = openat2(&directory, path, how)?;
    Ok(File::from(descriptor))
}
