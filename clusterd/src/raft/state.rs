//! The state machine as openraft sees it: applies entries, publishes the state, answers proposers.
//!
//! Readers get `Arc`s of whole states. Two copies take turns: while one is published, the other first
//! repeats the commands it missed and then applies the new ones, so that a commit costs two applications
//! and no copy of the state (a copy is made only while a reader still holds the older one).

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use openraft::EntryPayload;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use tokio::sync::watch;

use super::codec::DecodeError;
use super::machine::Machine;
use super::snapshot::{self, SnapshotData, SnapshotDir};
use super::types::{AnswerBytes, LogId, SnapshotMeta, StoredMembership, TypeConfig};

/// Entries applied before the state is published: answers wait for that.
const APPLY_BATCH: usize = 256;
/// The digest of the state is taken at every multiple of this index, on every node.
pub const DIGEST_EVERY: u64 = 1_024;

/// The state's digest at one position of the log: nodes with different digests at the same index have
/// diverged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DigestAt {
    /// A multiple of [`DIGEST_EVERY`]; 0 before the first.
    pub index: u64,
    /// [`Machine::digest`] after that entry.
    pub digest: u64,
}

/// Two copies of a state that take turns in being published.
struct Twin<M: Machine> {
    front: Arc<M>,
    back: Arc<M>,
    /// What `front` has applied and `back` has not.
    missed: Vec<(u64, M::Command)>,
}

impl<M: Machine> Twin<M> {
    fn new(state: M) -> Twin<M> {
        let front = Arc::new(state);
        Twin {
            back: front.clone(),
            front,
            missed: Vec::new(),
        }
    }

    /// The copy to apply to, up to date with the published one.
    fn next(&mut self) -> &mut M {
        if Arc::get_mut(&mut self.back).is_none() {
            self.back = Arc::new((*self.front).clone());
            self.missed.clear();
        }
        // Unique now: a clone is made above otherwise, and nobody else can get at `back`.
        let state = Arc::make_mut(&mut self.back);
        for (index, command) in self.missed.drain(..) {
            state.apply(index, &command);
        }
        state
    }

    /// Makes the copy that was applied to the front.
    fn swap(&mut self, applied: Vec<(u64, M::Command)>) -> Arc<M> {
        std::mem::swap(&mut self.front, &mut self.back);
        self.missed = applied;
        self.front.clone()
    }
}

/// What the state machine tells the rest of the node.
pub(super) struct Published<M: Machine> {
    pub state: watch::Receiver<Arc<M>>,
    /// The index up to which `state` has applied the log, plus one; 0 for nothing.
    pub applied: watch::Receiver<u64>,
    pub digest: watch::Receiver<DigestAt>,
}

/// The state machine.
pub(super) struct StateMachine<M: Machine> {
    twin: Twin<M>,
    applied: Option<LogId>,
    membership: StoredMembership,
    snapshots: SnapshotDir,
    state_tx: watch::Sender<Arc<M>>,
    applied_tx: watch::Sender<u64>,
    digest_tx: watch::Sender<DigestAt>,
}

impl<M: Machine> StateMachine<M> {
    /// Begins with `snapshot` (or with nothing).
    pub(super) fn new(
        snapshots: SnapshotDir,
        snapshot: Option<(SnapshotMeta, M)>,
    ) -> (StateMachine<M>, Published<M>) {
        let (meta, state) = snapshot.unwrap_or_default();
        let twin = Twin::new(state);
        let (state_tx, state) = watch::channel(twin.front.clone());
        let (applied_tx, applied) = watch::channel(next_index(meta.last_log_id.as_ref()));
        let (digest_tx, digest) = watch::channel(DigestAt::default());
        let machine = StateMachine {
            twin,
            applied: meta.last_log_id,
            membership: meta.last_membership,
            snapshots,
            state_tx,
            applied_tx,
            digest_tx,
        };
        (
            machine,
            Published {
                state,
                applied,
                digest,
            },
        )
    }

    fn publish(&mut self, commands: Vec<(u64, M::Command)>) {
        if !commands.is_empty() {
            let front = self.twin.swap(commands);
            self.state_tx.send_replace(front);
        }
        self.applied_tx
            .send_replace(next_index(self.applied.as_ref()));
    }

    /// Takes the digest of the published state beside the applying of further entries.
    fn take_digest(&self, index: u64) {
        let (state, digest_tx) = (self.twin.front.clone(), self.digest_tx.clone());
        tokio::task::spawn_blocking(move || {
            let digest = state.digest();
            digest_tx.send_if_modified(|last| {
                let newer = index > last.index;
                if newer {
                    *last = DigestAt { index, digest };
                }
                newer
            });
        });
    }
}

fn next_index(log_id: Option<&LogId>) -> u64 {
    log_id.map_or(0, |log_id| log_id.index + 1)
}

fn invalid(error: DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl<M: Machine> RaftStateMachine<TypeConfig> for StateMachine<M> {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Builder<M>;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<Strm>(&mut self, entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + Send,
    {
        let mut batches = entries.ready_chunks(APPLY_BATCH);
        while let Some(batch) = batches.next().await {
            let mut commands = Vec::with_capacity(batch.len());
            let mut answers = Vec::new();
            for item in batch {
                let (entry, responder) = item?;
                let index = entry.log_id.index;
                let mut answer = Bytes::new();
                match entry.payload {
                    EntryPayload::Blank => {}
                    EntryPayload::Membership(membership) => {
                        self.membership = StoredMembership::new(Some(entry.log_id), membership);
                    }
                    EntryPayload::Normal(bytes) => {
                        // The leader read it before it proposed it. If we cannot, we are older than the
                        // leader: to stop is right, to skip it would make this state another one.
                        let command: M::Command =
                            serde_json::from_slice(&bytes.0).map_err(|error| {
                                invalid(DecodeError::new(
                                    "command",
                                    format!("{error} (entry {index})"),
                                ))
                            })?;
                        let state = match commands.is_empty() {
                            true => self.twin.next(),
                            false => Arc::make_mut(&mut self.twin.back),
                        };
                        let reply = state.apply(index, &command);
                        commands.push((index, command));
                        if responder.is_some() {
                            answer = serde_json::to_vec(&reply)
                                .map_err(|error| {
                                    invalid(DecodeError::new("reply", error.to_string()))
                                })?
                                .into();
                        }
                    }
                }
                self.applied = Some(entry.log_id);
                if let Some(responder) = responder {
                    answers.push((responder, answer));
                }
                if index > 0 && index.is_multiple_of(DIGEST_EVERY) {
                    self.publish(std::mem::take(&mut commands));
                    self.take_digest(index);
                }
            }
            // First the state, then the answers: who has an answer finds its effect.
            self.publish(commands);
            for (responder, answer) in answers {
                responder.send(AnswerBytes(answer));
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder<M> {
        let meta = SnapshotMeta {
            last_log_id: self.applied,
            last_membership: self.membership.clone(),
        };
        Builder {
            meta,
            state: self.twin.front.clone(),
            snapshots: self.snapshots.clone(),
        }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        data: SnapshotData,
    ) -> Result<(), io::Error> {
        let (snapshots, wanted) = (self.snapshots.clone(), meta.clone());
        let state = blocking(move || {
            let (found, state) = snapshot::decode::<M>(&data).map_err(invalid)?;
            if found != wanted {
                return Err(invalid(DecodeError::new(
                    "snapshot",
                    "it is not the one that was announced",
                )));
            }
            snapshots.write(&found, &data)?;
            Ok(state)
        })
        .await?;
        self.twin = Twin::new(state);
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.state_tx.send_replace(self.twin.front.clone());
        self.applied_tx
            .send_replace(next_index(self.applied.as_ref()));
        tracing::info!(
            through = next_index(self.applied.as_ref()).saturating_sub(1),
            "installed a snapshot"
        );
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let snapshots = self.snapshots.clone();
        let newest = blocking(move || snapshots.newest()).await?;
        Ok(newest.map(|(meta, snapshot)| Snapshot { meta, snapshot }))
    }
}

pub(super) type Snapshot = openraft::alias::SnapshotOf<TypeConfig, SnapshotData>;

/// Writes the state of one moment as a snapshot, beside the applying of further entries.
pub(super) struct Builder<M: Machine> {
    meta: SnapshotMeta,
    state: Arc<M>,
    snapshots: SnapshotDir,
}

impl<M: Machine> RaftSnapshotBuilder<TypeConfig> for Builder<M> {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let (meta, state, snapshots) = (
            self.meta.clone(),
            self.state.clone(),
            self.snapshots.clone(),
        );
        let (meta, snapshot) = blocking(move || {
            let data = snapshot::encode(&meta, &*state).map_err(invalid)?;
            snapshots.write(&meta, &data)?;
            Ok((meta, data))
        })
        .await?;
        tracing::info!(
            through = next_index(meta.last_log_id.as_ref()).saturating_sub(1),
            bytes = snapshot.0.len(),
            "wrote a snapshot"
        );
        Ok(Snapshot { meta, snapshot })
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| io::Error::other(error.to_string()))?
}

#[cfg(test)]
mod tests;
