//! What goes into and comes out of the NFSv3 calls: handles, attributes, replies, errors.

use bytes::Bytes;
use nfs3_types::nfs3::{self, Nfs3Option, nfsstat3, sattr3};
use nfs3_types::xdr_codec::{Opaque, Pack, Unpack};

use super::connection::CallError;
use super::xdr::XdrError;

/// The largest READ asked for and WRITE sent, whatever the server would take.
pub const TRANSFER_BYTES_MAX: u32 = 1 << 20;

/// The name a server has for a file: up to 64 opaque bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileHandle(pub(crate) Bytes);

impl FileHandle {
    pub(super) fn wire(&self) -> nfs3::nfs_fh3 {
        nfs3::nfs_fh3 {
            data: Opaque::owned(self.0.to_vec()),
        }
    }
}

/// What a call to the server led to, if not to its result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NfsError {
    /// The server executed nothing and said why.
    #[error("{procedure}: the server answered {status}")]
    Status {
        /// Which procedure.
        procedure: &'static str,
        /// The server's answer.
        status: nfsstat3,
    },
    /// The call had no result.
    #[error("{procedure}: {source}")]
    Call {
        /// Which procedure.
        procedure: &'static str,
        /// What happened.
        source: CallError,
    },
    /// The server's answer makes no sense; what it did is unknown.
    #[error("{procedure}: the server's answer could not be understood: {source}")]
    BadReply {
        /// Which procedure.
        procedure: &'static str,
        /// What is wrong with it.
        source: XdrError,
    },
}

impl NfsError {
    /// The server's status, where it gave one.
    pub fn status(&self) -> Option<nfsstat3> {
        match self {
            NfsError::Status { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Whether the server may have executed the call, or may yet do so.
    pub fn is_unknown(&self) -> bool {
        match self {
            NfsError::Status { .. } => false,
            NfsError::Call { source, .. } => matches!(source, CallError::Unknown { .. }),
            NfsError::BadReply { .. } => true,
        }
    }
}

/// What the server says a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Whether it is a regular file.
    pub is_file: bool,
    /// Whether it is a directory.
    pub is_directory: bool,
    /// Permission bits.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The size in bytes.
    pub size_bytes: u64,
    /// Bytes that take room on the server.
    pub used_bytes: u64,
}

impl From<nfs3::fattr3> for Attributes {
    fn from(wire: nfs3::fattr3) -> Self {
        Attributes {
            is_file: wire.type_ == nfs3::ftype3::NF3REG,
            is_directory: wire.type_ == nfs3::ftype3::NF3DIR,
            mode: wire.mode & 0o7777,
            uid: wire.uid,
            gid: wire.gid,
            size_bytes: wire.size,
            used_bytes: wire.used,
        }
    }
}

/// Which attributes to set; `None` leaves one alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttributes {
    /// Permission bits.
    pub mode: Option<u32>,
    /// The group.
    pub gid: Option<u32>,
    /// The size in bytes.
    pub size_bytes: Option<u64>,
}

impl SetAttributes {
    pub(super) fn wire(self) -> sattr3 {
        sattr3 {
            mode: option(self.mode),
            gid: option(self.gid),
            size: option(self.size_bytes),
            ..sattr3::default()
        }
    }
}

fn option<T: Pack + Unpack>(value: Option<T>) -> Nfs3Option<T> {
    value.map_or(Nfs3Option::None, Nfs3Option::Some)
}

/// What a server answers to a WRITE that it executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteReply {
    /// How many bytes it took: perhaps fewer than it was sent, never more.
    pub count: u32,
    /// Whether they are already on stable storage.
    pub committed: bool,
    /// Another value at a later COMMIT says that uncommitted data may have been lost.
    pub verifier: [u8; 8],
}

/// What a server answers to a COMMIT that it executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitReply {
    /// To compare with that of the WRITEs.
    pub verifier: [u8; 8],
}

/// Data read, and whether the file ends with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadReply {
    /// Up to as many bytes as asked for.
    pub data: Bytes,
    /// Whether the file has no bytes after them.
    pub eof: bool,
}

/// Room on the file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Of the whole file system.
    pub size_bytes: u64,
    /// Available to this user.
    pub free_bytes: u64,
}

/// The transfer sizes that a server takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The largest READ.
    pub read_bytes_max: u32,
    /// The largest WRITE.
    pub write_bytes_max: u32,
}
