//! What can go wrong on a volume, each with what to try.

use std::io;

use cluster_model::ids::Token;

use super::ImageError;
use crate::fence::{ClaimError, VerifyError};
use crate::nfs::{MountError, NfsError, Status};
use crate::tls::ClientTlsError;
use crate::volume::{DiskPath, DiskPathError, VolumeUrlError};

/// Why the metadata work on a volume was not done.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The address is malformed.
    #[error(transparent)]
    Url(VolumeUrlError),
    /// The path is malformed.
    #[error(transparent)]
    Path(DiskPathError),
    /// Its TLS is not as its address says, or its authority is none.
    #[error(transparent)]
    Tls(#[from] ClientTlsError),
    /// The request names no cluster.
    #[error("the request does not say whose volume it must be (cluster id)")]
    NoClusterId,
    /// A uid that servers treat specially.
    #[error("uid {uid} cannot own disks: servers map it to somebody else; use an ordinary uid")]
    BrokerUid {
        /// As asked for.
        uid: u32,
    },
    /// A token that cannot be.
    #[error("token {token} is out of range (1 to {})", Token::LIMIT - 1)]
    Token {
        /// As asked for.
        token: u32,
    },
    /// The volume cannot be reached or mounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// It carries no identity.
    #[error(
        "volume {volume} carries no identity: add it to the cluster first (`clusterctl volume add`)"
    )]
    NotAdopted {
        /// The volume.
        volume: String,
    },
    /// It is another cluster's.
    #[error(
        "volume {volume} belongs to cluster {owner}, not to this one: use another export; if that cluster is gone for good, delete `{}` on it",
        crate::volume::IDENTITY_FILE
    )]
    OtherCluster {
        /// The volume.
        volume: String,
        /// Whose it is.
        owner: String,
    },
    /// Its identity file cannot be read.
    #[error(
        "the identity file `{}` of volume {volume} cannot be used: {problem}",
        crate::volume::IDENTITY_FILE
    )]
    BadIdentity {
        /// The volume.
        volume: String,
        /// What is wrong.
        problem: String,
    },
    /// It is read-only.
    #[error("volume {volume} is read-only ({what}): export or mount it read-write")]
    ReadOnly {
        /// The volume.
        volume: String,
        /// What was tried.
        what: String,
    },
    /// It is full.
    #[error(
        "volume {volume} is full ({what}): free space on it or raise the quota, then try again"
    )]
    Full {
        /// The volume.
        volume: String,
        /// What was tried.
        what: String,
    },
    /// The broker may not do that there.
    #[error(
        "the server of volume {volume} does not let uid {uid} {what} ({status}): make the exported directory writable for that uid (chown {uid} on the server), and export it without all_squash"
    )]
    Permission {
        /// The volume.
        volume: String,
        /// The broker.
        uid: u32,
        /// What was tried.
        what: String,
        /// The server's answer.
        status: Status,
    },
    /// There is no such file.
    #[error("volume {volume} has no disk `{path}`")]
    NotFound {
        /// The volume.
        volume: String,
        /// The disk.
        path: DiskPath,
    },
    /// There is another file of that name.
    #[error(
        "volume {volume} already has a file `{path}`, and {why}: choose another name, or delete it first"
    )]
    Exists {
        /// The volume.
        volume: String,
        /// The disk.
        path: DiskPath,
        /// Why it is not the one asked for.
        why: &'static str,
    },
    /// The disk is being created by a request that has not ended.
    #[error("disk `{path}` is being created already: wait for that request, or ask again later")]
    Busy {
        /// The disk.
        path: DiskPath,
    },
    /// Tokens only grow.
    #[error(
        "`{path}` is under {present}, newer than {offered}: whoever asks is not its owner any more"
    )]
    NewerToken {
        /// The disk.
        path: DiskPath,
        /// Under which it is.
        present: Token,
        /// Which was presented.
        offered: Token,
    },
    /// A disk of that size cannot be.
    #[error(
        "disk `{path}` cannot have {size_bytes} bytes: from 1 byte to {} TiB",
        super::DISK_BYTES_MAX >> 40
    )]
    Size {
        /// The disk.
        path: DiskPath,
        /// As asked for.
        size_bytes: u64,
    },
    /// The image cannot be copied in.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The server restarted while data was being written.
    #[error("the server of volume {volume} restarted while {what}: ask again")]
    Restarted {
        /// The volume.
        volume: String,
        /// What was going on.
        what: String,
    },
    /// The claim is not acknowledged, and its token burnt.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// A file is not what the takeover needs.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// The server answered otherwise.
    #[error("volume {volume}: {what} failed: {source}")]
    Nfs {
        /// The volume.
        volume: String,
        /// What was tried.
        what: String,
        /// What the server said.
        source: NfsError,
    },
    /// This host's file system answered otherwise.
    #[error(
        "volume {volume}: {what} failed: {source}; does the directory exist on this host, and may this user use it?"
    )]
    Io {
        /// The volume.
        volume: String,
        /// What was tried.
        what: String,
        /// What it said.
        source: io::Error,
    },
}

impl VolumeError {
    /// Whether a claim that failed so would fail under any other token too, until a person acts.
    pub fn is_for_good(&self) -> bool {
        match self {
            VolumeError::ReadOnly { .. }
            | VolumeError::Full { .. }
            | VolumeError::Permission { .. }
            | VolumeError::NotFound { .. }
            | VolumeError::BadIdentity { .. } => true,
            VolumeError::Claim(ClaimError::Refused { for_good, .. }) => *for_good,
            // Ours by its group, and yet no disk: its mode or its owner was changed.
            VolumeError::Verify(VerifyError::NotOurs { token, gid, .. }) => token.gid() == *gid,
            _ => false,
        }
    }

    /// The error for what an NFS server said to the broker `uid` about `what`.
    pub(super) fn from_nfs(volume: &str, uid: u32, what: &str, source: NfsError) -> VolumeError {
        let (volume, what) = (volume.to_owned(), what.to_owned());
        match source.status() {
            Some(Status::NFS3ERR_ROFS) => VolumeError::ReadOnly { volume, what },
            Some(Status::NFS3ERR_NOSPC | Status::NFS3ERR_DQUOT) => {
                VolumeError::Full { volume, what }
            }
            Some(status @ (Status::NFS3ERR_ACCES | Status::NFS3ERR_PERM)) => {
                VolumeError::Permission {
                    volume,
                    uid,
                    what,
                    status,
                }
            }
            _ => VolumeError::Nfs {
                volume,
                what,
                source,
            },
        }
    }

    /// The error for what this host's file system said about `what`.
    pub(super) fn from_io(volume: &str, what: &str, source: io::Error) -> VolumeError {
        let (volume, what) = (volume.to_owned(), what.to_owned());
        match source.kind() {
            io::ErrorKind::ReadOnlyFilesystem => VolumeError::ReadOnly { volume, what },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                VolumeError::Full { volume, what }
            }
            _ => VolumeError::Io {
                volume,
                what,
                source,
            },
        }
    }
}
