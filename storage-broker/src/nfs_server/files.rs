//! A file's data and attributes: the gate that orders WRITE and SETATTR, and the syncs.
//!
//! ```text
//!  WRITE    gate shared    [ check the caller's right ── write to the file ]  sync, if asked ── reply
//!  SETATTR  gate exclusive [ check ── make it durable ── let it be seen    ]  reply
//! ```
//!
//! A WRITE is checked and written inside the gate, and a SETATTR takes effect inside it alone. So
//! when the reply to a SETATTR has been sent, no WRITE that was allowed before it is still to land:
//! this server needs no settle time. The gate is fair: a SETATTR waits only for the WRITEs before it.

use std::collections::VecDeque;
use std::fs::{File, FileTimes, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nfs3_types::nfs3::{nfsstat3, nfstime3, stable_how};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use super::convert::{nanoseconds, now_ns, status_of, wire_time};
use super::export::Export;
use super::journal::{Identity, Record};
use super::permission::{Attributes, Caller, Change, READ, TimeChange, WRITE, change};

/// Files kept open at most. With the bound on connections it stays under the usual limit of 1,024
/// descriptors a process.
const OPEN_FILES_MAX: usize = 256;

/// A file or directory that clients may have a handle to.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) identity: Identity,
    pub(super) generation: u64,
    pub(super) is_directory: bool,
    pub(super) create_verifier: u64,
    gate: Arc<RwLock<()>>,
    attributes: Mutex<Attributes>,
    file: Mutex<Option<Arc<File>>>,
    sync: Sync,
}

/// The right to write to a file, shared with other writers. What must happen inside the gate needs
/// a reference to it, so that it cannot come after the gate has been left.
#[derive(Debug)]
pub(super) struct WriteGate {
    node: Arc<Node>,
    _inside: OwnedRwLockReadGuard<()>,
}

/// The right to change a file's attributes, with no writer inside.
#[derive(Debug)]
pub(super) struct ChangeGate {
    node: Arc<Node>,
    _inside: OwnedRwLockWriteGuard<()>,
}

impl WriteGate {
    fn demand(&self, caller: &Caller) -> Result<(), nfsstat3> {
        self.node.attributes().demand(caller, WRITE)
    }

    fn write(&self, file: &File, data: &[u8], offset: u64) -> Result<(), nfsstat3> {
        file.write_all_at(data, offset)
            .map_err(|error| status_of(&error))
    }
}

impl ChangeGate {
    fn publish(&self, attributes: Attributes) {
        *lock(&self.node.attributes) = attributes;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Node {
    pub(super) fn new(record: Record, is_directory: bool) -> Node {
        Node {
            identity: record.identity,
            generation: record.generation,
            is_directory,
            create_verifier: record.create_verifier,
            gate: Arc::default(),
            attributes: Mutex::new(record.attributes),
            file: Mutex::default(),
            sync: Sync::default(),
        }
    }

    /// What the journal should hold of it.
    pub(super) fn record(&self) -> Record {
        Record {
            identity: self.identity,
            generation: self.generation,
            attributes: self.attributes(),
            create_verifier: self.create_verifier,
        }
    }

    /// Owner, group and mode at this moment.
    pub(super) fn attributes(&self) -> Attributes {
        *lock(&self.attributes)
    }

    /// Enters the gate beside other writers.
    pub(super) async fn write_gate(self: &Arc<Self>) -> WriteGate {
        let _inside = self.gate.clone().read_owned().await;
        WriteGate {
            node: self.clone(),
            _inside,
        }
    }

    /// Enters the gate alone.
    pub(super) async fn change_gate(self: &Arc<Self>) -> ChangeGate {
        let _inside = self.gate.clone().write_owned().await;
        ChangeGate {
            node: self.clone(),
            _inside,
        }
    }

    /// The open file, if it is open.
    pub(super) fn opened(&self) -> Option<Arc<File>> {
        lock(&self.file).clone()
    }

    /// Closes the file once nobody uses it.
    pub(super) fn close(&self) {
        lock(&self.file).take();
    }
}

/// Which files are open, oldest first.
#[derive(Debug, Default)]
pub(super) struct OpenFiles(Mutex<VecDeque<Weak<Node>>>);

impl OpenFiles {
    fn add(&self, node: &Arc<Node>) {
        let mut open = lock(&self.0);
        open.push_back(Arc::downgrade(node));
        while open.len() > OPEN_FILES_MAX {
            if let Some(oldest) = open.pop_front().and_then(|node| node.upgrade()) {
                oldest.close();
            }
        }
    }
}

/// What READ found.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) data: Vec<u8>,
    pub(super) eof: bool,
    pub(super) metadata: Metadata,
}

impl Export {
    fn open_file(&self, node: &Arc<Node>) -> Result<Arc<File>, nfsstat3> {
        if node.is_directory {
            return Err(nfsstat3::NFS3ERR_ISDIR);
        }
        if let Some(file) = node.opened() {
            return Ok(file);
        }
        let nofollow = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
        let file = self.at_path(node, |path| {
            let open = |write| {
                OpenOptions::new()
                    .read(true)
                    .write(write)
                    .custom_flags(nofollow)
                    .open(path)
            };
            // A file that came there behind our back may be only readable to us.
            open(true).or_else(|_| open(false))
        })?;
        // Another call may have opened it too; no lock is held while the tree's is taken.
        let file = lock(&node.file).insert(Arc::new(file)).clone();
        self.open_files.add(node);
        Ok(file)
    }

    /// READ.
    pub(super) fn read(
        &self,
        node: &Arc<Node>,
        caller: &Caller,
        offset: u64,
        count: u32,
    ) -> Result<Piece, nfsstat3> {
        node.attributes().demand(caller, READ)?;
        let file = self.open_file(node)?;
        let metadata = file.metadata().map_err(|error| status_of(&error))?;
        let left = metadata.size().saturating_sub(offset).min(u64::from(count));
        let mut data = vec![0; left as usize];
        let mut filled = 0;
        while let Some(rest) = data.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match file.read_at(rest, offset + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(status_of(&error)),
            }
        }
        data.truncate(filled);
        let eof = offset.saturating_add(filled as u64) >= metadata.size();
        Ok(Piece {
            data,
            eof,
            metadata,
        })
    }

    /// WRITE, inside the gate; the sync, if one is asked for, comes after it.
    pub(super) fn write(
        &self,
        gate: WriteGate,
        caller: &Caller,
        offset: u64,
        data: &[u8],
        stable: stable_how,
    ) -> Result<Metadata, nfsstat3> {
        self.demand_writable()?;
        gate.demand(caller)?;
        let end = offset.checked_add(data.len() as u64);
        if end.is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(nfsstat3::NFS3ERR_FBIG);
        }
        let file = self.open_file(&gate.node)?;
        gate.write(&file, data, offset)?;
        let node = gate.node.clone();
        drop(gate);
        if stable != stable_how::UNSTABLE {
            self.sync(&node, &file)?;
        }
        file.metadata().map_err(|error| status_of(&error))
    }

    /// COMMIT, of the whole file whatever part is asked for. Like the Linux server's it needs the
    /// right to write: a former holder has nothing left to commit.
    pub(super) fn commit(&self, node: &Arc<Node>, caller: &Caller) -> Result<Metadata, nfsstat3> {
        node.attributes().demand(caller, WRITE)?;
        let file = self.open_file(node)?;
        self.sync(node, &file)?;
        file.metadata().map_err(|error| status_of(&error))
    }

    fn sync(&self, node: &Node, file: &File) -> Result<(), nfsstat3> {
        let sync = || {
            file.sync_data().inspect_err(|error| {
                // The kernel has dropped the data it could not write, acknowledged or not, and the
                // next sync will succeed: its COMMIT must already find the new verifier.
                tracing::error!(%error, inode = node.identity.inode, "data could not be synced; clients will send again what they have not committed");
                self.renew_verifier();
            })
        };
        node.sync.run(sync).map_err(|_| nfsstat3::NFS3ERR_IO)
    }

    /// SETATTR, alone inside the gate: checked, made durable, and only then seen.
    pub(super) fn set_attributes(
        &self,
        gate: &ChangeGate,
        caller: &Caller,
        wanted: &Change,
        guard: Option<nfstime3>,
    ) -> Result<(), nfsstat3> {
        self.demand_writable()?;
        let node = &gate.node;
        let before = node.attributes();
        if let Some(guard) = guard {
            let metadata = self.metadata(node)?;
            let changed =
                nanoseconds(metadata.ctime(), metadata.ctime_nsec()).max(before.changed_ns);
            if wire_time(changed) != guard {
                return Err(nfsstat3::NFS3ERR_NOT_SYNC);
            }
        }
        let after = change(&before, caller, wanted, now_ns())?;
        if let Some(size) = wanted.size {
            if i64::try_from(size).is_err() {
                return Err(nfsstat3::NFS3ERR_FBIG);
            }
            let file = self.open_file(node)?;
            file.set_len(size).map_err(|error| status_of(&error))?;
            self.sync(node, &file)?;
        }
        self.set_times(node, wanted)?;
        // While the tree is held, so that the record of a file removed meanwhile does not come
        // after that of another one with its inode.
        let record = Record {
            attributes: after,
            ..node.record()
        };
        self.at_path(node, |_| self.journal.put(record))?;
        gate.publish(after);
        Ok(())
    }

    fn set_times(&self, node: &Arc<Node>, wanted: &Change) -> Result<(), nfsstat3> {
        let time = |change| match change {
            TimeChange::Keep => None,
            TimeChange::Now => Some(SystemTime::now()),
            TimeChange::To(ns) => Some(UNIX_EPOCH + Duration::from_nanos(ns)),
        };
        let mut times = FileTimes::new();
        let (accessed, modified) = (time(wanted.accessed), time(wanted.modified));
        if let Some(accessed) = accessed {
            times = times.set_accessed(accessed);
        }
        if let Some(modified) = modified {
            times = times.set_modified(modified);
        }
        if accessed.is_none() && modified.is_none() {
            return Ok(());
        }
        if node.is_directory {
            self.at_path(node, |path| File::open(path)?.set_times(times))
        } else {
            let file = self.open_file(node)?;
            file.set_times(times).map_err(|error| status_of(&error))
        }
    }
}

/// Lets all who wait for the same file to be synced share one sync that began after they asked.
#[derive(Debug, Default)]
struct Sync {
    state: Mutex<SyncState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct SyncState {
    running: bool,
    /// How many syncs have begun and how many have ended; they never overlap.
    begun: u64,
    ended: u64,
    /// The number and the error of the last that failed.
    failed: Option<(u64, String)>,
}

impl Sync {
    /// Returns once a sync that began after this call has ended.
    fn run(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut state = lock(&self.state);
        // One that is under way may have begun before our data was written: the next one counts.
        let needed = state.begun + 1;
        while state.running && state.ended < needed {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.ended >= needed {
            return match &state.failed {
                Some((number, error)) if *number >= needed => Err(io::Error::other(error.clone())),
                _ => Ok(()),
            };
        }
        state.running = true;
        state.begun += 1;
        let number = state.begun;
        drop(state);
        let result = sync();
        let mut state = lock(&self.state);
        state.running = false;
        state.ended = number;
        if let Err(error) = &result {
            state.failed = Some((number, error.to_string()));
        }
        drop(state);
        self.changed.notify_all();
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_change_waits_for_the_writers_inside_and_holds_up_those_after_it() {
        let record = Record {
            identity: Identity {
                inode: 1,
                born_ns: 1,
            },
            generation: 1,
            attributes: Attributes {
                uid: 1,
                gid: 1,
                mode: 0o060,
                changed_ns: 1,
            },
            create_verifier: 0,
        };
        let node = Arc::new(Node::new(record, false));
        let (first, second) = (node.write_gate().await, node.write_gate().await);
        let mut change = std::pin::pin!(node.change_gate());
        assert!(change.as_mut().now_or_never().is_none());
        let mut later = std::pin::pin!(node.write_gate());
        assert!(later.as_mut().now_or_never().is_none(), "it waits its turn");
        drop(first);
        assert!(change.as_mut().now_or_never().is_none());
        drop(second);
        let change = change.now_or_never().expect("nobody is inside");
        assert!(later.as_mut().now_or_never().is_none());
        drop(change);
        assert!(later.now_or_never().is_some());
    }

    #[test]
    fn those_who_wait_share_a_sync_that_began_after_they_asked() {
        let sync = Sync::default();
        let written = AtomicUsize::new(0);
        let durable = AtomicUsize::new(0);
        let syncs = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let mine = written.fetch_add(1, Ordering::SeqCst) + 1;
                        sync.run(|| {
                            let seen = written.load(Ordering::SeqCst);
                            std::thread::sleep(Duration::from_micros(200));
                            durable.fetch_max(seen, Ordering::SeqCst);
                            syncs.fetch_add(1, Ordering::SeqCst);
                            Ok(())
                        })
                        .unwrap();
                        assert!(durable.load(Ordering::SeqCst) >= mine);
                    }
                });
            }
        });
        assert!(syncs.load(Ordering::SeqCst) < 400, "some were shared");
    }

    #[test]
    fn all_who_share_a_failed_sync_are_told() {
        let sync = Sync::default();
        let failing = || Err(io::Error::other("no"));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| assert!(sync.run(failing).is_err()));
            }
        });
        assert!(sync.run(|| Ok(())).is_ok());
    }
}
