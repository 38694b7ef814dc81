//! The replicated log: one Raft group of all nodes, on sled, over tonic.
//!
//! ```text
//!  propose ─► RaftHandle ─► openraft ─► LogStore ─► log thread ─► sled + fdatasync
//!                             │  ▲
//!                    Network ◄┘  └─ RaftService          (peers, through `net`)
//!                             │
//!                             └► StateMachine ─► watch::Receiver<Arc<state>> ─► everyone who reads
//! ```
//! openraft's types stay inside this module. What the rest of the node uses is [`RaftHandle`]. A node whose
//! log is lost or damaged gets a [`StartError::Store`] and takes no part: it never votes with a log that is
//! not the one it once acknowledged, and nothing here ever wipes a log.

pub mod bench;
mod carry;
mod codec;
#[cfg(test)]
mod crash;
mod disk;
mod files;
mod forward;
mod handle;
mod journal;
mod latency;
mod log;
mod machine;
mod members;
mod network;
mod proposer;
mod reads;
mod service;
mod snapshot;
mod state;
mod status;
mod types;
mod wire;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cluster_model::NodeId;
use openraft::{Config, SnapshotPolicy};

pub use disk::StoreError;
pub use handle::{Applied, ProposeError, RaftHandle, WaitError};
pub use latency::LatencySummary;
pub use machine::{Machine, digest_json};
pub use members::MembershipError;
pub use reads::{Confirmed, ReadError};
pub use service::RaftService;
pub use state::{DIGEST_EVERY, DigestAt};
pub use status::{Leadership, MemberStatus, RaftStatus};

use crate::net::Dialer;
use disk::{SledDisk, VALUE_BYTES_MAX};
use files::OsFiles;
use log::LogStore;
use network::Network;
use snapshot::SnapshotDir;
use state::StateMachine;

/// The largest command, bytes of its JSON: with the entry's frame it stays under what the store takes.
pub const COMMAND_BYTES_MAX: usize = VALUE_BYTES_MAX - 1024;
/// Replication sends at most this many entries at once.
const ENTRIES_PER_APPEND: u64 = 512;
/// How long a follower may take over a snapshot before the leader begins again.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(120);
/// Bytes of a snapshot in one message.
const SNAPSHOT_CHUNK_BYTES: u64 = 1 << 20;

/// How fast a lost leader is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// The leader is heard at least this often.
    pub heartbeat: Duration,
    /// A follower that has not heard the leader for this long begins an election: drawn anew each time
    /// between the two.
    pub election: (Duration, Duration),
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            heartbeat: Duration::from_millis(250),
            election: (Duration::from_millis(1_050), Duration::from_millis(1_500)),
        }
    }
}

impl Timing {
    /// For networks and disks without stalls, and for tests.
    pub fn fast() -> Timing {
        Timing {
            heartbeat: Duration::from_millis(80),
            election: (Duration::from_millis(400), Duration::from_millis(600)),
        }
    }

    /// What openraft calls its minimum and maximum. Its followers wait for the leader's lease (the
    /// maximum) and then for a draw between the two, so `max + min = first` and `max + max = last`.
    fn openraft(&self) -> (u64, u64) {
        let (first, last) = (
            self.election.0.as_millis() as u64,
            self.election.1.as_millis() as u64,
        );
        let max = last / 2;
        (first.saturating_sub(max), max)
    }
}

/// What a node's Raft needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// This node's number; it holds one log for ever.
    pub node: NodeId,
    /// Where log and snapshots are; nothing else may be in it.
    pub dir: PathBuf,
    /// Whether the log may be made if there never was one: `true` only to make a cluster or to join one.
    pub create: bool,
    /// How fast a lost leader is replaced.
    pub timing: Timing,
    /// A snapshot is written every so many entries...
    pub snapshot_every: u64,
    /// ...and this many entries before it are kept for followers that are a little behind.
    pub keep: u64,
    /// How long a proposal or read waits before its outcome is called unknown.
    pub patience: Duration,
}

impl Options {
    /// The usual settings.
    pub fn new(node: NodeId, dir: impl Into<PathBuf>) -> Options {
        Options {
            node,
            dir: dir.into(),
            create: false,
            timing: Timing::default(),
            snapshot_every: 5_000,
            keep: 1_000,
            patience: Duration::from_secs(5),
        }
    }

    fn config(&self) -> Result<Config, StartError> {
        let (election_timeout_min, election_timeout_max) = self.timing.openraft();
        let config = Config {
            cluster_name: "baton".into(),
            heartbeat_interval: self.timing.heartbeat.as_millis() as u64,
            election_timeout_min,
            election_timeout_max,
            enable_pre_vote: Some(true),
            // A restarted leader asks again: its state may be older than what it once answered from.
            enable_leader_restore: Some(false),
            max_payload_entries: ENTRIES_PER_APPEND,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(self.snapshot_every),
            max_in_snapshot_log_to_keep: self.keep,
            // Must be over `snapshot_every`, or a snapshot does not end the lag.
            replication_lag_threshold: self.snapshot_every.saturating_add(self.keep),
            purge_batch_size: (self.keep / 4).clamp(1, 256),
            snapshot_max_chunk_size: SNAPSHOT_CHUNK_BYTES,
            install_snapshot_timeout: SNAPSHOT_TIMEOUT.as_millis() as u64,
            backoff: "50ms 100ms 200ms ...1000ms".into(),
            ..Config::default()
        };
        config.validate().map_err(|error| StartError::Settings {
            why: error.to_string(),
        })
    }
}

/// Why a node cannot take part in the log.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its log is lost, damaged or another node's: it may not vote. It can be removed from the cluster and
    /// join again under a new number.
    #[error("this node takes no part in the cluster's log")]
    Store(#[from] StoreError),
    /// The settings contradict each other.
    #[error("the Raft settings make no sense: {why}")]
    Settings {
        /// Which and how.
        why: String,
    },
    /// openraft did not start.
    #[error("the replicated log does not start: {why}")]
    Stopped {
        /// What it says.
        why: String,
    },
}

/// Opens this node's log and takes part in the Raft group that it says it belongs to. A new log belongs to
/// none: [`RaftHandle::bootstrap`] makes one of it, or a leader's [`RaftHandle::add_learner`] takes it in.
///
/// # Errors
/// See [`StartError`].
pub async fn start<M: Machine>(
    options: Options,
    dialer: Dialer,
) -> Result<RaftHandle<M>, StartError> {
    let config = Arc::new(options.config()?);
    let (dir, node, create) = (options.dir.clone(), options.node, options.create);
    let opened = tokio::task::spawn_blocking(move || {
        let (snapshots, snapshot) = SnapshotDir::open::<M>(OsFiles, &dir.join("snapshots"))?;
        let last = snapshot.as_ref().and_then(|(meta, _)| meta.last_log_id);
        let disk = SledDisk::open(&dir, create)?;
        let (log, thread) = LogStore::open(&dir, node, last, disk)?;
        Ok::<_, StoreError>((snapshots, snapshot, log, thread))
    });
    let (snapshots, snapshot, log, thread) = match opened.await {
        Ok(opened) => opened?,
        // The store panics on some kinds of damage.
        Err(error) => {
            let what = error.to_string();
            return Err(StoreError::Damaged {
                dir: options.dir,
                what,
            }
            .into());
        }
    };
    let (machine, published) = StateMachine::<M>::new(snapshots, snapshot);
    let network = Network {
        dialer: dialer.clone(),
        log_end: log.end(),
    };
    let raft = openraft::Raft::new(options.node.0, config, network, log, machine).await;
    match raft {
        Ok(raft) => Ok(RaftHandle::new(options, dialer, raft, published, thread)),
        Err(error) => {
            thread.close().await;
            Err(StartError::Stopped {
                why: error.to_string(),
            })
        }
    }
}
