//! What a monitor does its disk I/O through: one trait, over NFS under the machine's token or in a directory.
//!
//! ```text
//!                    hold                     refused · writes in doubt · verifier changed
//!   ┌── release ──┐ ┌────► held (pends)     ┌──────────────────────────────► needs-rekey
//!   ▼             └─┤                       │                                     │
//!  ready ───────────┴───────────────────────┤                              rekey(token)
//!   ▲                                       │                                     ▼
//!   ├── connected ◄── reconnecting ◄── link lost, nothing in doubt          dial, replay in order
//!   └── room again ◄── stalled ◄── volume full, server's I/O error                │
//!   └─────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! The guest sees latency, never an error: whatever goes wrong below pends its requests and is
//! told on [`Disk::watch`], and the monitor and `clusterd` decide what to do.

mod dir;
mod engine;
mod fenced;
mod open;
mod writes;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use cluster_model::ids::Token;
use tokio::sync::watch;

use crate::dialer::Dialer;
use crate::nfs::Status;
use crate::tls::ClientTls;
use crate::volume::{DiskPath, VolumeUrl};

pub use dir::DirDisk;
pub use fenced::FencedDisk;
pub use open::OpenError;
pub(crate) use open::{find, open_beneath};

/// How long the server may take to answer a READ, WRITE or COMMIT before the connection is given
/// up: long enough for a disk stall of the server, since giving up costs a re-key.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// Data accepted from the guest and not known to be on stable storage, in bytes at most.
pub const UNCOMMITTED_BYTES_MAX: usize = 64 << 20;

/// Which disk, and in whose name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// The volume it is on.
    pub volume: VolumeUrl,
    /// What the volume's server must prove; `None` is plain TCP.
    pub tls: Option<ClientTls>,
    /// Where on the volume.
    pub path: DiskPath,
    /// The node's uid, for AUTH_SYS; never the broker's, which the server's owner override favours.
    pub uid: u32,
    /// The machine's token.
    pub token: Token,
    /// The bound on one call to the server; [`CALL_TIMEOUT`] unless a test knows better.
    pub call_timeout: Duration,
}

impl DiskSpec {
    /// A specification with the usual bound on calls, over plain TCP.
    pub fn new(volume: VolumeUrl, path: DiskPath, uid: u32, token: Token) -> DiskSpec {
        DiskSpec {
            volume,
            tls: None,
            path,
            uid,
            token,
            call_timeout: CALL_TIMEOUT,
        }
    }
}

/// How a disk stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskState {
    /// I/O goes through (unless it is held).
    Ready,
    /// The connection was lost with nothing in doubt; it is being made again.
    Reconnecting {
        /// What went wrong last.
        error: String,
    },
    /// The server cannot do what is asked (it is full, or has an I/O error); tried again until it can.
    Stalled {
        /// The server's answer, and what to try.
        reason: String,
    },
    /// I/O goes on only under a fresh token.
    NeedsRekey {
        /// Why.
        reason: RekeyReason,
        /// Whether a WRITE under the present token has no answer: then the re-key needs a settle.
        writes_unanswered: bool,
    },
    /// The disk has lost data that it had accepted; nothing it says can be relied on (`dir:` only).
    Failed {
        /// What happened.
        reason: String,
    },
}

/// Why a disk wants a fresh token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RekeyReason {
    /// The server refuses the token (or the file handle).
    #[error("the server refused the token: {status}")]
    Refused {
        /// Its answer.
        status: Status,
    },
    /// The connection was lost while WRITEs were unanswered.
    #[error("the connection was lost while WRITEs were unanswered: {why}")]
    ConnectionLost {
        /// How it was lost.
        why: String,
    },
    /// The server has restarted since it took data that it had not committed.
    #[error("the server's write verifier changed: it may have lost uncommitted data")]
    VerifierChanged,
}

/// How a disk stands, under which token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskStatus {
    /// The state.
    pub state: DiskState,
    /// The token that requests carry.
    pub token: Token,
}

/// Figures of one disk since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskStatistics {
    /// Bytes that the guest has read.
    pub read_bytes: u64,
    /// Bytes that the guest has written.
    pub written_bytes: u64,
    /// 99.9 % of the WRITEs of the last minutes took no longer.
    pub write_latency_p999: Duration,
}

/// Why a request failed for good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// The guest asked for bytes that the disk does not have.
    #[error(
        "the request for {length} bytes at {offset} reaches beyond the disk's end ({size_bytes})"
    )]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// How many.
        length: u64,
        /// The disk's size.
        size_bytes: u64,
    },
    /// The disk has been closed.
    #[error("the disk was closed")]
    Closed,
    /// The disk lost data that it had accepted (`dir:` only).
    #[error("the disk has failed: {reason}")]
    Failed {
        /// What happened.
        reason: String,
    },
}

/// Why a disk is not drained.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DrainError {
    /// It is held while requests or uncommitted data are left.
    #[error("the disk is held while requests or uncommitted data are left: release it first")]
    Held,
    /// It needs a re-key first.
    #[error("the disk needs a re-key first: {0}")]
    NeedsRekey(RekeyReason),
    /// It took too long.
    #[error("the server did not complete all I/O within {0:?}")]
    TimedOut(Duration),
    /// The disk cannot drain any more.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// Why a re-key did not complete. The disk stays under the new token and keeps its data.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RekeyError {
    /// Tokens only grow.
    #[error("the disk is under {present} and was offered {offered}: ask for a fresh token")]
    NotFresh {
        /// Under which it is.
        present: Token,
        /// Which it was offered.
        offered: Token,
    },
    /// The server refuses the new token too, or the path broke again: the next re-key decides.
    #[error("the re-key to {token} failed: {reason}; ask for another token")]
    Again {
        /// The token tried.
        token: Token,
        /// Why.
        reason: RekeyReason,
    },
    /// The replay did not end in time; it goes on.
    #[error("the replay was not done within {0:?}; it goes on")]
    TimedOut(Duration),
    /// The disk has been closed.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// A disk is quiet: every reply is in, and everything written is on stable storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained;

/// A guest's disk. All methods take `&self`; requests may be made from many tasks at once, and
/// dropping one's future abandons the reply, not the request.
#[async_trait]
pub trait Disk: Send + Sync + fmt::Debug {
    /// The size in bytes.
    fn size_bytes(&self) -> u64;

    /// Reads exactly `length` bytes.
    ///
    /// # Errors
    /// See [`DiskError`].
    async fn read(&self, offset: u64, length: u32) -> Result<Bytes, DiskError>;

    /// Writes; on stable storage only after a later [`Disk::flush`].
    ///
    /// # Errors
    /// See [`DiskError`].
    async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError>;

    /// Puts every write begun before it on stable storage.
    ///
    /// # Errors
    /// See [`DiskError`].
    async fn flush(&self) -> Result<(), DiskError>;

    /// From its return on no further request of the guest is handed to the server; requests
    /// pend. What has been sent is not called back.
    fn hold(&self);

    /// Lets pending requests go on.
    fn release(&self);

    /// Whether it is held.
    fn is_held(&self) -> bool;

    /// The state now and at each change.
    fn watch(&self) -> watch::Receiver<DiskStatus>;

    /// Whether a WRITE under the present token has no answer (a re-key then needs a settle).
    fn writes_unanswered(&self) -> bool;

    /// Takes up `token`, which must be claimed and confirmed already: connects anew and sends
    /// again, in order, what was not acknowledged or not committed, even while it is held; the
    /// rest follows once it is released. Returns when everything has been sent again.
    ///
    /// # Errors
    /// See [`RekeyError`].
    async fn rekey(&self, token: Token, timeout: Duration) -> Result<(), RekeyError>;

    /// Waits until every reply is in, and commits. Called with the guest stopped, before
    /// *quiet* is said; the caller then holds the disk.
    ///
    /// # Errors
    /// See [`DrainError`].
    async fn drain(&self, timeout: Duration) -> Result<Drained, DrainError>;

    /// Figures since it was opened.
    fn statistics(&self) -> DiskStatistics;
}

/// Opens a disk, whatever its volume is. It is not held at first. Nothing is changed on the volume:
/// a migration's destination opens its disks before they are its own.
///
/// # Errors
/// See [`OpenError`].
pub async fn open_disk(spec: &DiskSpec, dialer: &Dialer) -> Result<Arc<dyn Disk>, OpenError> {
    match &spec.volume {
        VolumeUrl::Nfs(url) => {
            let dialer = dialer.with_tls(spec.tls.clone());
            Ok(Arc::new(FencedDisk::open(url, spec, &dialer).await?))
        }
        VolumeUrl::Dir(directory) => Ok(Arc::new(DirDisk::open(directory, spec).await?)),
    }
}

/// Whether a request lies within a disk.
fn check_range(offset: u64, length: u64, size_bytes: u64) -> Result<(), DiskError> {
    match offset.checked_add(length) {
        Some(end) if end <= size_bytes => Ok(()),
        _ => Err(DiskError::OutOfRange {
            offset,
            length,
            size_bytes,
        }),
    }
}

#[cfg(test)]
mod tests;
