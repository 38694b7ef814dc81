//! The task that owns a disk's I/O: it alone sends, counts answers, reconnects, commits and replays.
//!
//! Its loop is: send whatever may be sent, publish the state, wait for one event. All rules on
//! *what may be sent* are in [`Engine::pump`] and what it calls, and in [`super::writes`].

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use cluster_model::ids::Token;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::fenced::Shared;
use super::open::{Opened, open_file};
use super::writes::{Sequence, WriteLog};
use super::{
    DiskSpec, DiskState, DiskStatus, DrainError, Drained, OpenError, RekeyError, RekeyReason,
    UNCOMMITTED_BYTES_MAX,
};
use crate::dialer::Dialer;
use crate::nfs::client::{Limits, ReadReply};
use crate::nfs::{
    CallError, CommitReply, Credential, FileHandle, NfsClient, NfsError, Stable, Status, WriteReply,
};
use crate::volume::NfsUrl;

mod pump;
mod reads;
mod replies;

use reads::{Piece, Reads};

/// From this many uncommitted bytes on the engine commits without being asked by the guest.
const COMMIT_FROM_BYTES: usize = UNCOMMITTED_BYTES_MAX / 2;

/// Pieces of reads waiting to be sent, at most, before further requests are left in their queue.
const READS_MAX: usize = 1024;

/// Pauses between attempts to connect: from, to (doubling).
const RECONNECT_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// A server that is full or has an I/O error is asked again so often.
const STALL_PAUSE: Duration = Duration::from_secs(1);

/// A server that says "later" (JUKEBOX) is asked again so often.
const LATER_PAUSE: Duration = Duration::from_millis(100);

/// What the guest asks.
#[derive(Debug)]
pub(crate) enum Request {
    Read {
        offset: u64,
        length: u32,
        reply: oneshot::Sender<Bytes>,
    },
    Write {
        offset: u64,
        data: Bytes,
        reply: oneshot::Sender<()>,
    },
    Flush {
        reply: oneshot::Sender<()>,
    },
    Drain {
        reply: oneshot::Sender<Result<Drained, DrainError>>,
    },
}

/// A fresh token, claimed and confirmed.
#[derive(Debug)]
pub(crate) struct Rekey {
    pub(crate) token: Token,
    pub(crate) reply: oneshot::Sender<Result<(), RekeyError>>,
}

/// A guest's WRITE, cut into pieces that the server takes.
#[derive(Debug)]
struct WriteRequest {
    pieces_left: usize,
    reply: oneshot::Sender<()>,
}

#[derive(Debug)]
struct Flush {
    /// Everything before it is to be on stable storage.
    end: Sequence,
    reply: oneshot::Sender<()>,
}

/// The path to the server.
enum Link {
    Up {
        client: NfsClient,
    },
    Dialing(BoxFuture<'static, Result<Opened, OpenError>>),
    Pausing {
        until: Instant,
        error: String,
    },
    /// Given up until a re-key.
    Down,
}

/// Why, and until when, nothing is sent.
#[derive(Debug)]
struct Stall {
    until: Instant,
    /// Told to watchers; a server that only says "later" is not.
    reason: Option<String>,
    of: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Commit,
}

/// A replay after a re-key: until it is done the guest's reads and newer writes wait.
#[derive(Debug)]
struct Replay {
    end: Sequence,
    replies: Vec<oneshot::Sender<Result<(), RekeyError>>>,
}

/// A call that has ended.
enum Done {
    Read {
        piece: Piece,
        result: Result<ReadReply, NfsError>,
    },
    Write {
        sequence: Sequence,
        sent: Instant,
        result: Result<WriteReply, NfsError>,
    },
    Commit {
        stamp: u64,
        result: Result<CommitReply, NfsError>,
    },
}

pub(crate) struct Engine {
    url: NfsUrl,
    spec: DiskSpec,
    dialer: Dialer,
    status: watch::Sender<DiskStatus>,
    shared: Arc<Shared>,

    link: Link,
    pause: Duration,
    file: FileHandle,
    limits: Limits,
    token: Token,
    calls: FuturesUnordered<BoxFuture<'static, Done>>,

    writes: WriteLog,
    write_requests: HashMap<Sequence, Arc<std::sync::Mutex<Option<WriteRequest>>>>,
    reads: Reads,
    flushes: VecDeque<Flush>,
    drains: Vec<oneshot::Sender<Result<Drained, DrainError>>>,
    commit_sent: bool,

    /// A WRITE under the present token was lost with its connection.
    in_doubt: bool,
    /// After a reconnect: is the server still in the life in which it took uncommitted data?
    verify: bool,
    rekey_wanted: Option<RekeyReason>,
    stall: Option<Stall>,
    /// The last pump sent nothing because of the stall: its end is waited for.
    waits_for_stall: bool,
    replay: Option<Replay>,
}

impl Engine {
    pub(crate) fn new(
        url: NfsUrl,
        spec: DiskSpec,
        dialer: Dialer,
        opened: Opened,
        status: watch::Sender<DiskStatus>,
        shared: Arc<Shared>,
    ) -> Engine {
        Engine {
            token: spec.token,
            url,
            spec,
            dialer,
            status,
            shared,
            link: Link::Up {
                client: opened.client,
            },
            pause: RECONNECT_PAUSE.0,
            file: opened.file,
            limits: opened.limits,
            calls: FuturesUnordered::new(),
            writes: WriteLog::default(),
            write_requests: HashMap::new(),
            reads: Reads::default(),
            flushes: VecDeque::new(),
            drains: Vec::new(),
            commit_sent: false,
            in_doubt: false,
            verify: false,
            rekey_wanted: None,
            stall: None,
            waits_for_stall: false,
            replay: None,
        }
    }

    /// Runs until the disk's handle is dropped.
    pub(crate) async fn run(
        mut self,
        mut requests: mpsc::Receiver<Request>,
        mut rekeys: mpsc::Receiver<Rekey>,
    ) {
        loop {
            self.pump();
            self.publish();
            let room =
                self.writes.bytes() < UNCOMMITTED_BYTES_MAX && self.reads.waiting() < READS_MAX;
            let alarm = self.alarm();
            tokio::select! {
                Some(rekey) = rekeys.recv() => self.rekey(rekey),
                request = requests.recv(), if room => match request {
                    Some(request) => self.admit(request),
                    None => return,
                },
                Some(done) = self.calls.next(), if !self.calls.is_empty() => self.finished(done),
                change = link_change(&mut self.link), if self.calls.is_empty() => match change {
                    LinkChange::Lost(why) => self.link_lost(&why),
                    LinkChange::Dialed(opened) => self.dialed(*opened),
                },
                () = tokio::time::sleep_until(alarm.unwrap_or_else(Instant::now)),
                    if alarm.is_some() => self.alarmed(),
                () = self.shared.released.notified() => {}
            }
        }
    }

    fn credential(&self) -> Credential {
        Credential {
            uid: self.spec.uid,
            gid: self.token.gid(),
        }
    }

    /// Cuts a request into pieces that the server takes.
    fn admit(&mut self, request: Request) {
        match request {
            Request::Read {
                offset,
                length,
                reply,
            } => {
                self.reads
                    .push(offset, length, self.limits.read_bytes_max, reply);
            }
            Request::Write {
                offset,
                data,
                reply,
            } => {
                let piece = self.limits.write_bytes_max as usize;
                let pieces_left = data.len().div_ceil(piece);
                let shared = Arc::new(std::sync::Mutex::new(Some(WriteRequest {
                    pieces_left,
                    reply,
                })));
                for start in (0..data.len()).step_by(piece) {
                    let end = data.len().min(start + piece);
                    let sequence = self
                        .writes
                        .push(offset + start as u64, data.slice(start..end));
                    self.write_requests.insert(sequence, shared.clone());
                }
            }
            Request::Flush { reply } => {
                self.flushes.push_back(Flush {
                    end: self.writes.end(),
                    reply,
                });
            }
            Request::Drain { reply } => self.drains.push(reply),
        }
    }

    /// A fresh token: everything not known to be on stable storage is sent again under it, on a
    /// new connection, so that whatever is stuck in the old path carries a dead token.
    fn rekey(&mut self, rekey: Rekey) {
        let Rekey { token, reply } = rekey;
        if token == self.token && self.rekey_wanted.is_none() {
            // Asked again, the first answer having been lost.
            match &mut self.replay {
                Some(replay) => replay.replies.push(reply),
                None => drop(reply.send(Ok(()))),
            }
            return;
        }
        if token <= self.token {
            let _ = reply.send(Err(RekeyError::NotFresh {
                present: self.token,
                offered: token,
            }));
            return;
        }
        tracing::info!(disk = %self.spec.path, from = %self.token, to = %token, "re-key");
        if let Link::Up { client } = &self.link {
            client.connection().close("re-keyed");
        }
        self.token = token;
        self.calls = FuturesUnordered::new();
        self.commit_sent = false;
        self.in_doubt = false;
        self.verify = false;
        self.rekey_wanted = None;
        self.stall = None;
        self.writes.replay();
        self.reads.resend();
        let mut replies = self
            .replay
            .take()
            .map(|replay| replay.replies)
            .unwrap_or_default();
        replies.push(reply);
        self.replay = Some(Replay {
            end: self.writes.end(),
            replies,
        });
        self.pause = RECONNECT_PAUSE.0;
        self.dial();
    }

    fn dial(&mut self) {
        let (url, path, dialer) = (
            self.url.clone(),
            self.spec.path.clone(),
            self.dialer.clone(),
        );
        let (credential, timeout) = (self.credential(), self.spec.call_timeout);
        self.link = Link::Dialing(Box::pin(async move {
            open_file(&url, &path, credential, &dialer, timeout).await
        }));
    }

    /// All calls of the lost connection have been accounted for.
    fn link_lost(&mut self, why: &str) {
        tracing::warn!(disk = %self.spec.path, why, in_doubt = self.in_doubt, "connection lost");
        if self.rekey_wanted.is_some() {
            self.link = Link::Down;
        } else if self.in_doubt {
            self.want_rekey(RekeyReason::ConnectionLost {
                why: why.to_owned(),
            });
            self.link = Link::Down;
        } else {
            self.verify = self.writes.unstable_bytes() > 0;
            self.link = Link::Pausing {
                until: Instant::now(),
                error: why.to_owned(),
            };
        }
    }

    fn dialed(&mut self, opened: Result<Opened, OpenError>) {
        match opened {
            Ok(opened) => {
                self.pause = RECONNECT_PAUSE.0;
                self.file = opened.file;
                self.limits = opened.limits;
                self.link = Link::Up {
                    client: opened.client,
                };
            }
            Err(error) => {
                let until = Instant::now() + self.pause;
                self.pause = (self.pause * 2).min(RECONNECT_PAUSE.1);
                self.link = Link::Pausing {
                    until,
                    error: error.to_string(),
                };
            }
        }
    }

    /// The next moment at which something is to be tried again.
    fn alarm(&self) -> Option<Instant> {
        let link = match &self.link {
            Link::Pausing { until, .. } => Some(*until),
            _ => None,
        };
        let stall = self
            .stall
            .as_ref()
            .filter(|_| self.waits_for_stall)
            .map(|stall| stall.until);
        link.into_iter().chain(stall).min()
    }

    fn alarmed(&mut self) {
        if matches!(&self.link, Link::Pausing { until, .. } if *until <= Instant::now()) {
            self.dial();
        }
    }

    fn want_rekey(&mut self, reason: RekeyReason) {
        if self.rekey_wanted.is_some() {
            return;
        }
        tracing::warn!(disk = %self.spec.path, token = %self.token, %reason, "needs a re-key");
        if let Some(replay) = self.replay.take() {
            for reply in replay.replies {
                let error = RekeyError::Again {
                    token: self.token,
                    reason: reason.clone(),
                };
                let _ = reply.send(Err(error));
            }
        }
        for drain in self.drains.drain(..) {
            let _ = drain.send(Err(DrainError::NeedsRekey(reason.clone())));
        }
        self.rekey_wanted = Some(reason);
    }

    fn publish(&self) {
        let writes_unanswered = self.in_doubt || self.writes.any_sent();
        self.shared
            .writes_unanswered
            .store(writes_unanswered, Ordering::SeqCst);
        let state = match (&self.rekey_wanted, &self.link, &self.stall) {
            (Some(reason), _, _) => DiskState::NeedsRekey {
                reason: reason.clone(),
                writes_unanswered,
            },
            (None, Link::Pausing { error, .. }, _) => DiskState::Reconnecting {
                error: error.clone(),
            },
            // While dialling what was said before still holds.
            (None, Link::Dialing(_), _) => match &self.status.borrow().state {
                state @ DiskState::Reconnecting { .. } => state.clone(),
                _ => DiskState::Reconnecting {
                    error: "connecting".into(),
                },
            },
            (
                None,
                _,
                Some(Stall {
                    reason: Some(reason),
                    ..
                }),
            ) => DiskState::Stalled {
                reason: reason.clone(),
            },
            (None, _, _) => DiskState::Ready,
        };
        let now = DiskStatus {
            state,
            token: self.token,
        };
        self.status.send_if_modified(|status| {
            let changed = *status != now;
            *status = now;
            changed
        });
    }
}

/// What has become of the path to the server.
enum LinkChange {
    Lost(Arc<str>),
    Dialed(Box<Result<Opened, OpenError>>),
}

/// Resolves when the connection has ended or dialling has; never where there is neither. Asked
/// only when no call is open, so that all that were have been accounted for.
async fn link_change(link: &mut Link) -> LinkChange {
    match link {
        Link::Up { client } => LinkChange::Lost(client.connection().closed().await),
        Link::Dialing(dialing) => LinkChange::Dialed(Box::new(dialing.await)),
        Link::Pausing { .. } | Link::Down => std::future::pending().await,
    }
}
