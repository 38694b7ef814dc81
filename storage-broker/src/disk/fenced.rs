//! A disk on an NFS volume, as its monitor holds it: a handle on the task that owns the I/O.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use cluster_model::ids::Token;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::engine::{Engine, Rekey, Request};
use super::open::open_file;
use super::{
    Disk, DiskError, DiskSpec, DiskState, DiskStatistics, DiskStatus, DrainError, Drained,
    OpenError, RekeyError, check_range,
};
use crate::dialer::Dialer;
use crate::latency::LatencyHistogram;
use crate::nfs::Credential;
use crate::volume::NfsUrl;

/// Requests taken in and not yet looked at; more wait at the sender.
const QUEUE_MAX: usize = 256;

/// A disk whose I/O carries the machine's token, so that the storage server itself refuses a
/// former owner.
#[derive(Debug)]
pub struct FencedDisk {
    size_bytes: u64,
    requests: mpsc::Sender<Request>,
    rekeys: mpsc::Sender<Rekey>,
    status: watch::Receiver<DiskStatus>,
    shared: Arc<Shared>,
}

/// What the handle and the engine both see.
#[derive(Debug)]
pub(crate) struct Shared {
    held: Mutex<bool>,
    pub(crate) released: Notify,
    pub(crate) writes_unanswered: AtomicBool,
    pub(crate) read_bytes: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
    pub(crate) latency: LatencyHistogram,
}

impl Shared {
    /// The gate, locked: while it is, nobody can hold or release.
    pub(crate) fn gate(&self) -> MutexGuard<'_, bool> {
        self.held
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl FencedDisk {
    /// Finds the file (LOOKUP and GETATTR only) and starts the task that does its I/O.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(url: &NfsUrl, spec: &DiskSpec, dialer: &Dialer) -> Result<Self, OpenError> {
        let credential = Credential {
            uid: spec.uid,
            gid: spec.token.gid(),
        };
        let opened = open_file(url, &spec.path, credential, dialer, spec.call_timeout).await?;
        let size_bytes = opened.attributes.size_bytes;
        let (requests, request_queue) = mpsc::channel(QUEUE_MAX);
        let (rekeys, rekey_queue) = mpsc::channel(4);
        let (status_sender, status) = watch::channel(DiskStatus {
            state: DiskState::Ready,
            token: spec.token,
        });
        let shared = Arc::new(Shared {
            held: Mutex::new(false),
            released: Notify::new(),
            writes_unanswered: AtomicBool::new(false),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            latency: LatencyHistogram::new(Instant::now()),
        });
        let engine = Engine::new(
            url.clone(),
            spec.clone(),
            dialer.clone(),
            opened,
            status_sender,
            shared.clone(),
        );
        tokio::spawn(engine.run(request_queue, rekey_queue));
        Ok(FencedDisk {
            size_bytes,
            requests,
            rekeys,
            status,
            shared,
        })
    }

    async fn request<T>(
        &self,
        make: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, DiskError> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(make(reply))
            .await
            .map_err(|_| DiskError::Closed)?;
        answer.await.map_err(|_| DiskError::Closed)
    }
}

#[async_trait]
impl Disk for FencedDisk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Bytes, DiskError> {
        check_range(offset, length.into(), self.size_bytes)?;
        if length == 0 {
            return Ok(Bytes::new());
        }
        let data = self
            .request(|reply| Request::Read {
                offset,
                length,
                reply,
            })
            .await?;
        self.shared
            .read_bytes
            .fetch_add(length.into(), Ordering::Relaxed);
        Ok(data)
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
        let length = data.len() as u64;
        check_range(offset, length, self.size_bytes)?;
        if data.is_empty() {
            return Ok(());
        }
        self.request(|reply| Request::Write {
            offset,
            data,
            reply,
        })
        .await?;
        self.shared
            .written_bytes
            .fetch_add(length, Ordering::Relaxed);
        Ok(())
    }

    async fn flush(&self) -> Result<(), DiskError> {
        self.request(|reply| Request::Flush { reply }).await
    }

    fn hold(&self) {
        *self.shared.gate() = true;
    }

    fn release(&self) {
        *self.shared.gate() = false;
        self.shared.released.notify_one();
    }

    fn is_held(&self) -> bool {
        *self.shared.gate()
    }

    fn watch(&self) -> watch::Receiver<DiskStatus> {
        self.status.clone()
    }

    fn writes_unanswered(&self) -> bool {
        self.shared.writes_unanswered.load(Ordering::SeqCst)
    }

    async fn rekey(&self, token: Token, timeout: Duration) -> Result<(), RekeyError> {
        let rekeyed = async {
            let (reply, answer) = oneshot::channel();
            let command = Rekey { token, reply };
            self.rekeys
                .send(command)
                .await
                .map_err(|_| DiskError::Closed)?;
            answer.await.map_err(|_| DiskError::Closed)?
        };
        match tokio::time::timeout(timeout, rekeyed).await {
            Ok(result) => result,
            Err(_) => Err(RekeyError::TimedOut(timeout)),
        }
    }

    async fn drain(&self, timeout: Duration) -> Result<Drained, DrainError> {
        let mut status = self.watch();
        // In the queue of requests, so that it comes after every request begun before it.
        let drained = self.request(|reply| Request::Drain { reply });
        let needs_rekey = async {
            let wants = |status: &DiskStatus| matches!(status.state, DiskState::NeedsRekey { .. });
            match status
                .wait_for(wants)
                .await
                .map(|status| status.state.clone())
            {
                Ok(DiskState::NeedsRekey { reason, .. }) => DrainError::NeedsRekey(reason),
                _ => DrainError::Disk(DiskError::Closed),
            }
        };
        tokio::select! {
            biased;
            result = drained => result?,
            error = needs_rekey => Err(error),
            () = tokio::time::sleep(timeout) => Err(DrainError::TimedOut(timeout)),
        }
    }

    fn statistics(&self) -> DiskStatistics {
        DiskStatistics {
            read_bytes: self.shared.read_bytes.load(Ordering::Relaxed),
            written_bytes: self.shared.written_bytes.load(Ordering::Relaxed),
            write_latency_p999: self.shared.latency.p999(Instant::now()),
        }
    }
}
