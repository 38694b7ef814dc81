//! openraft's storage in memory: what is written is durable at once, and outlives the node.

use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::{Stream, StreamExt};
use openraft::EntryPayload;
use openraft::alias::{EntryOf, LogIdOf, SnapshotMetaOf, SnapshotOf, StoredMembershipOf, VoteOf};
use openraft::storage::{
    EntryResponder, IOFlushed, LogState, RaftLogReader, RaftLogStorage, RaftSnapshotBuilder,
    RaftStateMachine,
};

openraft::declare_raft_types!(
    /// Commands are numbers; the rest is as in `clusterd`.
    pub Types:
        D = u64,
        R = u64,
        NodeId = u64,
        Node = openraft::EmptyNode,
);

pub type Entry = EntryOf<Types>;
pub type LogId = LogIdOf<Types>;
pub type Vote = VoteOf<Types>;

/// A node's disk.
#[derive(Debug, Default)]
pub struct Contents {
    pub vote: Option<Vote>,
    /// `log[i]` has index `i`.
    pub log: Vec<Entry>,
}

/// Shared by the node's lives and whoever looks at it.
#[derive(Clone, Default)]
pub struct Disk(Arc<Mutex<Contents>>);

impl Disk {
    pub fn open(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RaftLogReader<Types> for Disk {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let contents = self.open();
        let within = contents
            .log
            .iter()
            .filter(|entry| range.contains(&entry.log_id.index));
        Ok(within.cloned().collect())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.open().vote)
    }
}

impl RaftLogStorage<Types> for Disk {
    type LogReader = Disk;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, io::Error> {
        Ok(LogState {
            last_purged_log_id: None,
            last_log_id: self.open().log.last().map(|entry| entry.log_id),
        })
    }

    async fn get_log_reader(&mut self) -> Disk {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.open().vote = Some(*vote);
        Ok(())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        {
            let mut contents = self.open();
            for entry in entries {
                assert_eq!(entry.log_id.index as usize, contents.log.len(), "no holes");
                contents.log.push(entry);
            }
        }
        callback.io_completed(Ok(()));
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let keep = last.map_or(0, |last| last.index as usize + 1);
        self.open().log.truncate(keep);
        Ok(())
    }

    async fn purge(&mut self, _: LogId) -> Result<(), io::Error> {
        unreachable!("snapshots are off")
    }
}

/// Applies nothing but notes it.
#[derive(Clone, Default)]
pub struct Machine {
    last: Option<LogId>,
    membership: StoredMembershipOf<Types>,
    applied: Arc<Mutex<Vec<u64>>>,
}

impl Machine {
    /// Every command that was applied in this life, in order.
    pub fn applied(&self) -> Vec<u64> {
        let applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        applied.clone()
    }
}

impl RaftSnapshotBuilder<Types> for Machine {
    type SnapshotData = ();

    async fn build_snapshot(&mut self) -> Result<SnapshotOf<Types, ()>, io::Error> {
        Err(io::Error::other("snapshots are off"))
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotData = ();
    type SnapshotBuilder = Machine;

    async fn applied_state(
        &mut self,
    ) -> Result<(Option<LogId>, StoredMembershipOf<Types>), io::Error> {
        Ok((self.last, self.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + Send,
    {
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            self.last = Some(entry.log_id);
            match entry.payload {
                EntryPayload::Blank => {}
                EntryPayload::Normal(command) => self
                    .applied
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(command),
                EntryPayload::Membership(membership) => {
                    self.membership =
                        StoredMembershipOf::<Types>::new(Some(entry.log_id), membership);
                }
            }
            if let Some(responder) = responder {
                responder.send(0);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Machine {
        self.clone()
    }

    async fn install_snapshot(
        &mut self,
        _: &SnapshotMetaOf<Types>,
        (): (),
    ) -> Result<(), io::Error> {
        Err(io::Error::other("snapshots are off"))
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<SnapshotOf<Types, ()>>, io::Error> {
        Ok(None)
    }
}
