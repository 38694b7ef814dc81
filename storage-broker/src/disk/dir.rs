//! A disk in a directory of this host: `pread`, `pwrite` and `fdatasync` on blocking threads.
//!
//! There is no server to ask, so there is no storage fence here: what keeps two nodes from one
//! disk is the log, the lease's deadline and, for class `time`, the watchdog.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use cluster_model::ids::Token;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use tokio::sync::{Semaphore, watch};

use super::{
    Disk, DiskError, DiskSpec, DiskState, DiskStatistics, DiskStatus, DrainError, Drained,
    OpenError, RekeyError, check_range, open_beneath,
};
use crate::latency::LatencyHistogram;
use crate::nfs::IN_FLIGHT_MAX;

/// A full file system is tried again so often.
const STALL_PAUSE: Duration = Duration::from_secs(1);

/// A disk in a directory.
#[derive(Debug)]
pub struct DirDisk {
    file: Arc<File>,
    size_bytes: u64,
    held: watch::Sender<bool>,
    status: watch::Sender<DiskStatus>,
    /// Blocking threads in use at once.
    threads: Semaphore,
    counters: Arc<Counters>,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    latency: LatencyHistogram,
}

/// Requests that have begun and not ended, their blocking threads included.
#[derive(Debug, Default)]
struct Counters {
    open: watch::Sender<usize>,
    writes: AtomicU32,
}

/// Counts a request; held by its caller and by its thread, whichever lives longer.
struct Counted {
    counters: Arc<Counters>,
    is_write: bool,
}

impl Counted {
    fn new(counters: &Arc<Counters>, is_write: bool) -> Arc<Self> {
        counters.open.send_modify(|count| *count += 1);
        counters.writes.fetch_add(is_write.into(), Ordering::SeqCst);
        Arc::new(Counted {
            counters: counters.clone(),
            is_write,
        })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.counters
            .writes
            .fetch_sub(self.is_write.into(), Ordering::SeqCst);
        self.counters.open.send_modify(|count| *count -= 1);
    }
}

impl DirDisk {
    /// Opens the file beneath `directory`; no link may lead out of it.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(directory: &Path, spec: &DiskSpec) -> Result<DirDisk, OpenError> {
        let (directory, asked) = (directory.to_owned(), spec.clone());
        let opened =
            tokio::task::spawn_blocking(move || DirDisk::open_file(&directory, &asked)).await;
        let file = opened.unwrap_or_else(|error| {
            Err(OpenError::Io {
                directory: Default::default(),
                path: spec.path.clone(),
                source: io::Error::other(error),
            })
        })?;
        DirDisk::from_file(file, spec)
    }

    /// Opens the file alone, for a process that may not later on. Blocks.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_file(directory: &Path, spec: &DiskSpec) -> Result<File, OpenError> {
        let (volume, path) = (spec.volume.to_string(), spec.path.clone());
        let file = open_beneath(directory, path.as_str(), OFlag::O_RDWR, Mode::empty());
        match file.and_then(|file| file.metadata().map(|metadata| (file, metadata))) {
            Ok((_, metadata)) if !metadata.is_file() => Err(OpenError::NotAFile { volume, path }),
            Ok((file, _)) => Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(OpenError::NotFound { volume, path })
            }
            Err(source) => Err(OpenError::Io {
                directory: directory.to_owned(),
                path,
                source,
            }),
        }
    }

    /// A disk in a file that [`DirDisk::open_file`] opened.
    ///
    /// # Errors
    /// [`OpenError::Io`] when its size cannot be read.
    pub fn from_file(file: File, spec: &DiskSpec) -> Result<DirDisk, OpenError> {
        let metadata = file.metadata().map_err(|source| OpenError::Io {
            directory: Default::default(),
            path: spec.path.clone(),
            source,
        })?;
        Ok(DirDisk {
            file: Arc::new(file),
            size_bytes: metadata.len(),
            held: watch::Sender::new(false),
            status: watch::Sender::new(DiskStatus {
                state: DiskState::Ready,
                token: spec.token,
            }),
            threads: Semaphore::new(IN_FLIGHT_MAX),
            counters: Arc::default(),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            latency: LatencyHistogram::new(Instant::now()),
        })
    }

    fn set_state(&self, state: DiskState) {
        self.status.send_if_modified(|status| {
            // What has failed stays so.
            if status.state == state || matches!(status.state, DiskState::Failed { .. }) {
                return false;
            }
            status.state = state;
            true
        });
    }

    /// Runs one operation when the disk is not held, again and again while the file system is
    /// full or has an error that may pass.
    async fn run<T: Send + 'static>(
        &self,
        counted: Arc<Counted>,
        operation: impl Fn(&File) -> io::Result<T> + Clone + Send + 'static,
    ) -> Result<T, DiskError> {
        loop {
            let _ = self.held.subscribe().wait_for(|held| !held).await;
            let result = self.once(counted.clone(), operation.clone()).await?;
            match result {
                Ok(value) => {
                    self.set_state(DiskState::Ready);
                    return Ok(value);
                }
                Err(error) => {
                    let reason = match error.kind() {
                        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                            "the file system is full: free space, I/O goes on by itself".to_owned()
                        }
                        _ => format!("{error}; I/O goes on when it can"),
                    };
                    self.set_state(DiskState::Stalled { reason });
                    tokio::time::sleep(STALL_PAUSE).await;
                }
            }
        }
    }

    async fn once<T: Send + 'static>(
        &self,
        counted: Arc<Counted>,
        operation: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
    ) -> Result<io::Result<T>, DiskError> {
        let _thread = self
            .threads
            .acquire()
            .await
            .map_err(|_| DiskError::Closed)?;
        let file = self.file.clone();
        tokio::task::spawn_blocking(move || {
            let _counted = counted;
            operation(&file)
        })
        .await
        .map_err(|_| DiskError::Closed)
    }

    async fn sync(&self, counted: Arc<Counted>) -> Result<(), DiskError> {
        if let DiskState::Failed { reason } = &self.status.borrow().state {
            return Err(DiskError::Failed {
                reason: reason.clone(),
            });
        }
        match self.once(counted, File::sync_data).await? {
            Ok(()) => Ok(()),
            // The kernel has forgotten which pages it could not write: asking again would be told
            // that all is well.
            Err(error) => {
                let reason = format!("fdatasync: {error}");
                self.set_state(DiskState::Failed {
                    reason: reason.clone(),
                });
                Err(DiskError::Failed { reason })
            }
        }
    }
}

#[async_trait]
impl Disk for DirDisk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Bytes, DiskError> {
        check_range(offset, length.into(), self.size_bytes)?;
        let counted = Counted::new(&self.counters, false);
        let read = move |file: &File| {
            let mut data = vec![0; length as usize];
            file.read_exact_at(&mut data, offset)?;
            Ok(Bytes::from(data))
        };
        let data = self.run(counted, read).await?;
        self.read_bytes.fetch_add(length.into(), Ordering::Relaxed);
        Ok(data)
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
        let length = data.len() as u64;
        check_range(offset, length, self.size_bytes)?;
        let counted = Counted::new(&self.counters, true);
        let began = Instant::now();
        self.run(counted, move |file: &File| file.write_all_at(&data, offset))
            .await?;
        self.latency.record(Instant::now(), began.elapsed());
        self.written_bytes.fetch_add(length, Ordering::Relaxed);
        Ok(())
    }

    async fn flush(&self) -> Result<(), DiskError> {
        let counted = Counted::new(&self.counters, false);
        let _ = self.held.subscribe().wait_for(|held| !held).await;
        self.sync(counted).await
    }

    fn hold(&self) {
        self.held.send_replace(true);
    }

    fn release(&self) {
        self.held.send_replace(false);
    }

    fn is_held(&self) -> bool {
        *self.held.borrow()
    }

    fn watch(&self) -> watch::Receiver<DiskStatus> {
        self.status.subscribe()
    }

    fn writes_unanswered(&self) -> bool {
        self.counters.writes.load(Ordering::SeqCst) > 0
    }

    async fn rekey(&self, token: Token, _timeout: Duration) -> Result<(), RekeyError> {
        let mut result = Ok(());
        self.status.send_if_modified(|status| {
            if token < status.token {
                result = Err(RekeyError::NotFresh {
                    present: status.token,
                    offered: token,
                });
                return false;
            }
            status.token = token;
            true
        });
        result
    }

    async fn drain(&self, timeout: Duration) -> Result<Drained, DrainError> {
        if self.is_held() && *self.counters.open.borrow() > 0 {
            return Err(DrainError::Held);
        }
        let quiet = async {
            let _ = self
                .counters
                .open
                .subscribe()
                .wait_for(|count| *count == 0)
                .await;
            self.sync(Counted::new(&self.counters, false)).await
        };
        match tokio::time::timeout(timeout, quiet).await {
            Ok(Ok(())) => Ok(Drained),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(DrainError::TimedOut(timeout)),
        }
    }

    fn statistics(&self) -> DiskStatistics {
        DiskStatistics {
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
            write_latency_p999: self.latency.p999(Instant::now()),
        }
    }
}
