//! The one thread that writes the log: it takes all that waits, writes it, and syncs once for all.

use std::io;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use openraft::storage::IOFlushed;
use tokio::sync::{mpsc, oneshot};

use super::super::disk::{Change, LogDisk};
use super::super::types::TypeConfig;
use super::lock;
use super::memory::Memory;

/// Jobs written under one sync: enough for every client that can wait, little enough to answer soon.
const GROUP_MAX: usize = 1_024;

/// Put-off work begins when nothing was asked for this long: sled's share of a commit costs more than the
/// commit, and on a busy log it waits until the journal is full.
const IDLE: Duration = Duration::from_millis(20);

type Entries = Vec<(u64, Vec<u8>)>;

/// What the log thread is asked to do, in order.
pub(in super::super) enum Job {
    /// Writes entries and tells openraft when they are durable; the log then ends at `end`.
    Append {
        changes: Vec<Change>,
        end: u64,
        callback: IOFlushed<TypeConfig>,
    },
    /// Writes and answers when it is durable.
    Durable {
        changes: Vec<Change>,
        reply: oneshot::Sender<io::Result<()>>,
    },
    /// Writes; durable with whatever is synced next.
    Lazy { changes: Vec<Change> },
    /// Reads entries.
    Read {
        range: Range<u64>,
        reply: oneshot::Sender<io::Result<Entries>>,
    },
    /// Does all that was put off.
    Settle { reply: oneshot::Sender<()> },
    /// Syncs, closes the store and ends.
    Close,
}

/// Ends the log thread; the store can be opened again afterwards.
pub(in super::super) struct LogThread {
    jobs: mpsc::Sender<Job>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// The answer of a thread that has ended.
pub(super) fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the log is closed")
}

impl LogThread {
    pub(super) fn start(
        writer: Writer<impl LogDisk>,
        waiting: mpsc::Receiver<Job>,
        jobs: mpsc::Sender<Job>,
    ) -> io::Result<LogThread> {
        // Only for a wait with a bound on this thread.
        let timer = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()?;
        let thread = std::thread::Builder::new()
            .name("raft-log".into())
            .spawn(move || run(writer, Jobs { waiting, timer }))?;
        Ok(LogThread {
            jobs,
            thread: Arc::new(Mutex::new(Some(thread))),
        })
    }

    /// Returns when nothing is left of the work that the log thread puts off.
    pub(in super::super) async fn settle(&self) {
        let (reply, settled) = oneshot::channel();
        // Either error means that the thread has ended.
        let _ = self.jobs.send(Job::Settle { reply }).await;
        let _ = settled.await;
    }

    /// Closes the store: returns when its files are closed and unlocked.
    pub(in super::super) async fn close(&self) {
        // An error means that the thread has ended already.
        let _ = self.jobs.send(Job::Close).await;
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && tokio::task::spawn_blocking(move || thread.join().is_err())
                .await
                .unwrap_or(true)
        {
            tracing::error!("the log thread panicked");
        }
    }
}

/// What waits for the sync of a group.
enum Waiting {
    Append {
        end: u64,
        callback: IOFlushed<TypeConfig>,
    },
    Durable {
        reply: oneshot::Sender<io::Result<()>>,
    },
}

/// The log thread's end of the queue.
struct Jobs {
    waiting: mpsc::Receiver<Job>,
    timer: tokio::runtime::Runtime,
}

impl Jobs {
    /// The next job; with `patience`, [`Next::Nothing`] when none came within it.
    fn next(&mut self, patience: Option<Duration>) -> Next {
        let job = match patience {
            None => Ok(self.waiting.blocking_recv()),
            Some(patience) => self
                .timer
                .block_on(async { tokio::time::timeout(patience, self.waiting.recv()).await }),
        };
        match job {
            Ok(Some(job)) => Next::Job(job),
            Ok(None) => Next::End,
            Err(_) => Next::Nothing,
        }
    }
}

enum Next {
    Job(Job),
    Nothing,
    End,
}

fn run(mut writer: Writer<impl LogDisk>, mut jobs: Jobs) {
    let mut unsettled = true;
    loop {
        match jobs.next(unsettled.then_some(IDLE)) {
            Next::Job(first) => {
                if writer.round(first, || jobs.waiting.try_recv().ok()) {
                    return;
                }
                unsettled = true;
            }
            Next::End => return,
            Next::Nothing => {
                while unsettled && jobs.waiting.is_empty() {
                    unsettled = writer.settle();
                }
            }
        }
    }
}

/// What the log thread does, without the thread.
pub(in super::super) struct Writer<D> {
    disk: D,
    memory: Arc<Mutex<Memory>>,
    failed: Option<String>,
}

impl<D: LogDisk> Writer<D> {
    pub(super) fn new(disk: D, memory: Arc<Mutex<Memory>>) -> Writer<D> {
        Writer {
            disk,
            memory,
            failed: None,
        }
    }

    /// Does a little of what was put off; whether more is left.
    pub(in super::super) fn settle(&mut self) -> bool {
        // A failure is remembered; the next job reports it.
        guard(&mut self.failed, || self.disk.settle()).unwrap_or(false)
    }

    /// Does `first` and whatever `more` gives under one sync; whether the store is to be closed.
    pub(in super::super) fn round(
        &mut self,
        first: Job,
        mut more: impl FnMut() -> Option<Job>,
    ) -> bool {
        let Writer {
            disk,
            failed,
            memory,
        } = self;
        let mut closing = false;
        let mut changes = Vec::new();
        let mut waiting = Vec::new();
        let mut next = Some(first);
        let mut taken = 0;
        while let Some(job) = next {
            taken += 1;
            match job {
                Job::Append {
                    changes: new,
                    end,
                    callback,
                } => {
                    changes.extend(new);
                    waiting.push(Waiting::Append { end, callback });
                }
                Job::Durable {
                    changes: new,
                    reply,
                } => {
                    changes.extend(new);
                    waiting.push(Waiting::Durable { reply });
                }
                Job::Lazy { changes: new } => changes.extend(new),
                Job::Read { range, reply } => {
                    // The read must see what was asked for before it.
                    let read = guard(failed, || {
                        disk.write(std::mem::take(&mut changes))?;
                        disk.sync()?;
                        disk.read(range)
                    });
                    // The reader may have gone away.
                    let _ = reply.send(read);
                }
                Job::Settle { reply } => {
                    // Not a part of the round: its changes are not in the journal yet.
                    while guard(failed, || disk.settle()).unwrap_or(false) {}
                    // The asker may have gone away.
                    let _ = reply.send(());
                }
                Job::Close => {
                    changes.extend(lock(memory).take_commit());
                    closing = true;
                    break;
                }
            }
            next = if taken < GROUP_MAX { more() } else { None };
        }
        let must_sync = closing || !waiting.is_empty();
        let written = guard(failed, || {
            disk.write(changes)?;
            if must_sync { disk.sync() } else { Ok(()) }
        });
        self.answer(waiting, &written);
        closing
    }

    fn durable(&self, end: u64) {
        let mut memory = lock(&self.memory);
        // A truncation may have passed the write meanwhile.
        memory.durable_end = end.min(memory.range().end);
        memory.trim();
    }

    fn answer(&self, waiting: Vec<Waiting>, written: &io::Result<()>) {
        let copy = || match written {
            Ok(()) => Ok(()),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        // Newest first: openraft keeps the newest only, so the older ones then wake nobody. In the order of
        // the log each would wake it, and a second wake within a microsecond makes it sleep for a timer tick.
        for waiting in waiting.into_iter().rev() {
            match waiting {
                Waiting::Append { end, callback } => {
                    if written.is_ok() {
                        self.durable(end);
                    }
                    callback.io_completed(copy());
                }
                // The caller may have gone away.
                Waiting::Durable { reply } => drop(reply.send(copy())),
            }
        }
    }
}

/// Runs `step` unless the disk failed before; remembers a failure (or a panic of the store) for ever.
fn guard<T>(failed: &mut Option<String>, step: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    if let Some(why) = failed {
        return Err(io::Error::other(format!(
            "the log's disk failed before: {why}"
        )));
    }
    let done = std::panic::catch_unwind(AssertUnwindSafe(step))
        .unwrap_or_else(|_| Err(io::Error::other("the log store panicked")));
    if let Err(error) = &done {
        tracing::error!(%error, "the log's disk failed: this node stops taking part");
        *failed = Some(error.to_string());
    }
    done
}
