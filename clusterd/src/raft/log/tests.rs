//! The log against openraft's own suite, a disk that loses what was not synced, and one that fails.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use cluster_model::NodeId;
use openraft::EntryPayload;
use openraft::StorageError;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::TypeConfigExt;
use openraft::vote::RaftLeaderId;
use serde::{Deserialize, Serialize};

use super::super::disk::{Change, Contents, Key, LogDisk, SledDisk, StoreError};
use super::super::files::OsFiles;
use super::super::machine::Machine;
use super::super::snapshot::SnapshotDir;
use super::super::state::StateMachine;
use super::super::types::{CommandBytes, Entry, LeaderId, LogId, TypeConfig, Vote};
use super::{LogStore, LogThread};

/// Applies anything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Nothing;

impl Machine for Nothing {
    type Command = serde_json::Value;
    type Reply = ();
    fn apply(&mut self, _index: u64, _command: &serde_json::Value) {}
}

struct Sled;

impl StoreBuilder<TypeConfig, LogStore, StateMachine<Nothing>, (tempfile::TempDir, LogThread)>
    for Sled
{
    async fn build(
        &self,
    ) -> Result<
        (
            (tempfile::TempDir, LogThread),
            LogStore,
            StateMachine<Nothing>,
        ),
        StorageError<TypeConfig>,
    > {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (snapshots, snapshot) =
            SnapshotDir::open::<Nothing>(OsFiles, &dir.path().join("snapshots"))
                .expect("snapshots");
        let disk = SledDisk::open(dir.path(), true).expect("sled opens");
        let (log, thread) =
            LogStore::open(dir.path(), NodeId(1), None, disk).expect("the log opens");
        let (machine, _published) = StateMachine::new(snapshots, snapshot);
        Ok(((dir, thread), log, machine))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_passes_openrafts_suite() {
    Suite::test_all(Sled)
        .await
        .expect("every case of the suite");
}

/// A disk in memory that knows what would survive a loss of power.
#[derive(Clone, Default)]
struct Volatile {
    state: Arc<Mutex<(Content, Content)>>,
    fails: Arc<AtomicBool>,
}

#[derive(Clone, Default)]
struct Content {
    entries: BTreeMap<u64, Vec<u8>>,
    meta: BTreeMap<Key, Vec<u8>>,
}

impl Volatile {
    /// The disk after a loss of power.
    fn after_power_loss(&self) -> Volatile {
        let durable = self.state.lock().unwrap().1.clone();
        Volatile {
            state: Arc::new(Mutex::new((durable.clone(), durable))),
            fails: Arc::default(),
        }
    }
}

impl LogDisk for Volatile {
    fn load(&mut self) -> io::Result<Contents> {
        let state = self.state.lock().unwrap();
        Ok(Contents {
            entries: state.0.entries.clone().into_iter().collect(),
            meta: state.0.meta.clone().into_iter().collect(),
        })
    }

    fn write(&mut self, changes: Vec<Change>) -> io::Result<()> {
        let content = &mut self.state.lock().unwrap().0;
        for change in changes {
            match change {
                Change::Put { index, value } => drop(content.entries.insert(index, value)),
                Change::RemoveFrom(index) => drop(content.entries.split_off(&index)),
                Change::RemoveThrough(index) => {
                    content.entries = content.entries.split_off(&(index + 1))
                }
                Change::Meta { key, value } => drop(content.meta.insert(key, value)),
            }
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.fails.load(Ordering::Relaxed) {
            return Err(io::Error::other("the disk is broken"));
        }
        let mut state = self.state.lock().unwrap();
        state.1 = state.0.clone();
        Ok(())
    }

    fn settle(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    fn read(&mut self, range: Range<u64>) -> io::Result<Vec<(u64, Vec<u8>)>> {
        let state = self.state.lock().unwrap();
        Ok(state
            .0
            .entries
            .range(range)
            .map(|(index, value)| (*index, value.clone()))
            .collect())
    }
}

fn open(disk: &Volatile) -> Result<(LogStore, LogThread), StoreError> {
    LogStore::open(Path::new("/nowhere"), NodeId(1), None, disk.clone())
}

fn log_id(term: u64, index: u64) -> LogId {
    LogId {
        leader_id: LeaderId::new(term, 1),
        index,
    }
}

fn entry(term: u64, index: u64, bytes: usize) -> Entry {
    let command = CommandBytes(Bytes::from(vec![b'x'; bytes]));
    Entry {
        log_id: log_id(term, index),
        payload: EntryPayload::Normal(command),
    }
}

async fn append(log: &mut LogStore, entries: Vec<Entry>) -> io::Result<()> {
    let (done, durable) = TypeConfig::oneshot();
    log.append(entries, IOFlushed::signal(done)).await?;
    durable
        .await
        .unwrap_or_else(|_| Err(io::Error::other("the callback was dropped")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_a_loss_of_power() {
    let disk = Volatile::default();
    let (mut log, _thread) = open(&disk).unwrap();
    for index in 0..50 {
        append(&mut log, vec![entry(1, index, 10)]).await.unwrap();
        let (mut survivor, _thread) = open(&disk.after_power_loss()).unwrap();
        let last = survivor.get_log_state().await.unwrap().last_log_id.unwrap();
        assert_eq!(last, log_id(1, index));
        let vote = Vote::new(index + 2, 1);
        log.save_vote(&vote).await.unwrap();
        let (mut survivor, _thread) = open(&disk.after_power_loss()).unwrap();
        assert_eq!(survivor.read_vote().await.unwrap(), Some(vote));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_sync_is_reported_and_nothing_is_acknowledged_after_it() {
    let disk = Volatile::default();
    let (mut log, _thread) = open(&disk).unwrap();
    append(&mut log, vec![entry(1, 0, 10)]).await.unwrap();
    disk.fails.store(true, Ordering::Relaxed);
    assert!(append(&mut log, vec![entry(1, 1, 10)]).await.is_err());
    // A disk that "recovers" may have dropped what it could not write.
    disk.fails.store(false, Ordering::Relaxed);
    assert!(append(&mut log, vec![entry(1, 2, 10)]).await.is_err());
    assert!(log.save_vote(&Vote::new(9, 1)).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_that_left_the_memory_are_read_from_the_disk() {
    let disk = Volatile::default();
    let (mut log, _thread) = open(&disk).unwrap();
    // 40 MiB: more than the tail holds.
    for start in (0..800).step_by(50) {
        append(
            &mut log,
            (start..start + 50)
                .map(|index| entry(1, index, 52_000))
                .collect(),
        )
        .await
        .unwrap();
    }
    let held = super::lock(&log.memory).tail_bytes;
    assert!(held <= super::memory::TAIL_BYTES_MAX, "{held}");
    let all = log.try_get_log_entries(0..800).await.unwrap();
    assert_eq!(
        all.iter()
            .map(|entry| entry.log_id.index)
            .collect::<Vec<_>>(),
        (0..800).collect::<Vec<_>>()
    );
    // Bounded reads stop early but go on from there.
    let mut next = 0;
    while next < 800 {
        let some = log.limited_get_log_entries(next, 800).await.unwrap();
        assert_eq!(some[0].log_id.index, next);
        let bytes: usize = some.iter().map(super::weight).sum();
        assert!(
            bytes <= super::BATCH_BYTES_MAX || some.len() == 1,
            "{bytes}"
        );
        next += some.len() as u64;
    }
    assert!(log.try_get_log_entries(900..950).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn truncated_and_purged_entries_are_gone_after_a_restart() {
    let disk = Volatile::default();
    let (mut log, thread) = open(&disk).unwrap();
    append(&mut log, (0..20).map(|index| entry(1, index, 10)).collect())
        .await
        .unwrap();
    log.truncate_after(Some(log_id(1, 14))).await.unwrap();
    append(&mut log, vec![entry(2, 15, 10)]).await.unwrap();
    log.purge(log_id(1, 4)).await.unwrap();
    thread.close().await;

    let snapshot = Some(log_id(1, 4));
    let (mut log, _thread) =
        LogStore::open(Path::new("/nowhere"), NodeId(1), snapshot, disk.clone()).unwrap();
    let entries = log.try_get_log_entries(..).await.unwrap();
    assert_eq!(entries.first().unwrap().log_id, log_id(1, 5));
    assert_eq!(entries.last().unwrap().log_id, log_id(2, 15));
    assert_eq!(entries.len(), 11);
    // Without the snapshot that took their place the log has a hole at its beginning.
    assert!(matches!(open(&disk), Err(StoreError::Damaged { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_misplaced_or_missing_entry_keeps_the_log_shut() {
    let disk = Volatile::default();
    let (mut log, thread) = open(&disk).unwrap();
    append(&mut log, (0..5).map(|index| entry(1, index, 10)).collect())
        .await
        .unwrap();
    log.save_committed(Some(log_id(1, 4))).await.unwrap();
    thread.close().await;
    let damage = |name: &str, edit: &dyn Fn(&mut Content)| {
        let copy = disk.after_power_loss();
        edit(&mut copy.state.lock().unwrap().0);
        assert!(
            matches!(open(&copy), Err(StoreError::Damaged { .. })),
            "{name}"
        );
    };
    damage("a flipped bit", &|content| {
        content.entries.get_mut(&2).unwrap()[30] ^= 4
    });
    damage("a hole", &|content| drop(content.entries.remove(&2)));
    damage("an entry in another's place", &|content| {
        let value = content.entries[&1].clone();
        content.entries.insert(2, value);
    });
    damage("a committed entry gone from the end", &|content| {
        drop(content.entries.remove(&4))
    });
    damage("a damaged commit point", &|content| {
        content.meta.get_mut(&Key::Committed).unwrap()[0] ^= 1
    });
    damage("no owner", &|content| drop(content.meta.remove(&Key::Node)));
    open(&disk.after_power_loss()).expect("the undamaged one opens");
}

/// Copies a directory as a crash would leave it: the store is open meanwhile.
fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let path = file.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_dir(&path, &target);
        } else {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}

fn last_of(dir: &Path) -> Option<LogId> {
    let disk = SledDisk::open(dir, false).unwrap();
    let runtime = tokio::runtime::Handle::current();
    let (log, thread) = LogStore::open(dir, NodeId(1), None, disk).unwrap();
    let last = log.bounds().0;
    tokio::task::block_in_place(|| runtime.block_on(thread.close()));
    last
}

/// The directory that a child of the next test writes to until it is killed.
const CHILD_DIR: &str = "BATON_TEST_LOG_DIR";

/// Appends for ever, and says each index once it is acknowledged.
async fn append_until_killed(dir: &Path) {
    let disk = SledDisk::open(dir, true).unwrap();
    let (mut log, _thread) = LogStore::open(dir, NodeId(1), None, disk).unwrap();
    let mut index = log.bounds().0.map_or(0, |last| last.index + 1);
    loop {
        append(&mut log, vec![entry(1, index, 30_000)])
            .await
            .unwrap();
        println!("\nacknowledged {index}");
        index += 1;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_store_opens_again_with_everything_that_was_acknowledged() {
    if let Some(dir) = std::env::var_os(CHILD_DIR) {
        append_until_killed(Path::new(&dir)).await;
    }
    let base = tempfile::tempdir().unwrap();
    let dir = base.path().join("store");
    let name = "raft::log::tests::a_killed_store_opens_again_with_everything_that_was_acknowledged";
    let mut acknowledged = 0;
    // 30 KB each: the journal begins anew every 250 or so, sometimes just before the kill.
    for stop_after in [3, 300, 251, 1, 400] {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(CHILD_DIR, &dir)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
        let mut seen = 0;
        for line in lines.map_while(Result::ok) {
            let Some(index) = line.strip_prefix("acknowledged ") else {
                continue;
            };
            acknowledged = index.parse().unwrap();
            seen += 1;
            if seen == stop_after {
                break;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(seen, stop_after, "the child ended by itself");
        let last = last_of(&dir).unwrap().index;
        assert!(
            last >= acknowledged,
            "{acknowledged} was acknowledged, {last} is the last"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_journal_alone_brings_back_what_sled_had_not_made_durable() {
    let base = tempfile::tempdir().unwrap();
    let (dir, survivor) = (base.path().join("store"), base.path().join("survivor"));
    let disk = SledDisk::open(&dir, true).unwrap();
    let (mut log, _thread) = LogStore::open(&dir, NodeId(1), None, disk).unwrap();
    // What sled has on the disk at its last checkpoint...
    copy_dir(&dir, &survivor);
    for index in 0..100 {
        append(&mut log, vec![entry(1, index, 200)]).await.unwrap();
    }
    log.truncate_after(Some(log_id(1, 89))).await.unwrap();
    append(&mut log, vec![entry(2, 90, 200)]).await.unwrap();
    // ...and the journal that was synced since.
    std::fs::copy(dir.join("journal"), survivor.join("journal")).unwrap();
    assert_eq!(last_of(&survivor), Some(log_id(2, 90)));
    // Once more, after the replay.
    assert_eq!(last_of(&survivor), Some(log_id(2, 90)));

    // A record in the middle that can no longer be read was acknowledged once.
    let damaged = base.path().join("damaged");
    copy_dir(&dir, &damaged);
    let mut content = std::fs::read(damaged.join("journal")).unwrap();
    content[10 * 4096 + 100] ^= 1;
    std::fs::write(damaged.join("journal"), content).unwrap();
    assert!(matches!(
        SledDisk::open(&damaged, false),
        Err(StoreError::Damaged { .. })
    ));
    std::fs::remove_file(damaged.join("journal")).unwrap();
    assert!(matches!(
        SledDisk::open(&damaged, true),
        Err(StoreError::Lost { .. })
    ));
}
