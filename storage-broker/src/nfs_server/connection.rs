//! One client's connection: many calls at once, replies in the order in which they are ready.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use nfs3_types::{mount as mount3, nfs3};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::greeting::{self, Greeted};
use super::procedures::{TRANSFER_BYTES_MAX, execute, reply_bytes_max};
use super::rpc::{self, Call, Claim, Message, Refusal};
use super::{Shared, mount};
use crate::nfs::record::RecordReader;
use crate::nfs::xdr::XdrError;

/// Calls of one connection that are executed at once: clients of ours send up to 64.
const IN_FLIGHT_MAX: usize = 128;

/// What the calls in flight on one connection and their replies may hold in memory; with the
/// bound on connections it bounds the server. It must take the largest call.
const IN_FLIGHT_BYTES_MAX: u32 = 16 << 20;

/// How long the rest of a call may take once it has begun to arrive, and a client to take a reply.
pub(super) const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// How much is read at once, and how much of small replies is gathered into one system call.
pub(super) const GATHER_BYTES: usize = 256 << 10;

/// A reply, and the room it and its call take.
type Outgoing = (Vec<u8>, OwnedSemaphorePermit);

/// Serves a connection until its client closes it, breaks the protocol or stalls, or `stop`.
pub(super) async fn serve(
    stream: TcpStream,
    shared: Arc<Shared>,
    calls: TaskTracker,
    stop: CancellationToken,
) {
    let peer = stream.peer_addr().ok();
    tokio::select! {
        () = stop.cancelled() => {}
        () = async {
            match greeting::greet(stream, &shared).await {
                Ok(Some(greeted)) => talk(greeted, peer, &shared, &calls).await,
                Ok(None) => {}
                Err(End::Io(error)) => tracing::debug!(?peer, %error, "a connection broke"),
                Err(end) => tracing::warn!(?peer, %end, "closing a connection"),
            }
        } => {}
    }
}

async fn talk(
    greeted: Greeted,
    peer: Option<std::net::SocketAddr>,
    shared: &Arc<Shared>,
    calls: &TaskTracker,
) {
    let Greeted { stream, received } = greeted;
    let secure = stream.is_tls();
    let (reader, writer) = stream.into_split();
    let (replies, outgoing) = mpsc::channel(IN_FLIGHT_MAX);
    let write = async {
        if let Err(error) = write_replies(writer, outgoing).await {
            tracing::debug!(?peer, %error, "a client takes no replies");
        }
    };
    let read = async {
        // Owns the sender: when reading ends, writing ends after the calls under way.
        let replies = replies;
        match read_calls(reader, received, secure, shared, calls, &replies).await {
            Ok(()) => {}
            Err(End::Io(error)) => tracing::debug!(?peer, %error, "a connection broke"),
            Err(end) => tracing::warn!(?peer, %end, "closing a connection"),
        }
    };
    tokio::select! {
        // A client that takes no replies is not listened to either.
        () = write => {}
        () = async { read.await; std::future::pending::<()>().await } => {}
    }
}

/// Why a connection is not listened to any longer.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("what arrives are no calls: {0}")]
    NoCall(#[from] XdrError),
    #[error("what arrives are no records: it is too long or in too many pieces")]
    NoRecord,
    #[error("a call has not arrived whole within {STALL_TIMEOUT:?}")]
    Stalled,
    #[error("its client asked for TLS and went on in clear")]
    InClear,
    #[error("the TLS handshake failed: {0}")]
    Handshake(std::io::Error),
}

async fn read_calls(
    mut reader: impl AsyncRead + Unpin,
    mut received: BytesMut,
    secure: bool,
    shared: &Arc<Shared>,
    calls: &TaskTracker,
    replies: &mpsc::Sender<Outgoing>,
) -> Result<(), End> {
    let slots = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
    let memory = Arc::new(Semaphore::new(IN_FLIGHT_BYTES_MAX as usize));
    let mut records = RecordReader::default();
    loop {
        while let Some(record) = records.next(&mut received).map_err(|_| End::NoRecord)? {
            // Both are closed never, so an error is no case of its own.
            let Ok(slot) = slots.clone().acquire_owned().await else {
                return Ok(());
            };
            let record_bytes = record.len();
            let message = rpc::decode(record)?;
            let weight = weight(record_bytes, &message);
            let Ok(room) = memory.clone().acquire_many_owned(weight).await else {
                return Ok(());
            };
            let (shared, replies) = (shared.clone(), replies.clone());
            calls.spawn(async move {
                let reply = rpc::finish(answer(&shared, secure, message).await);
                // Nobody to answer any more: the call is executed all the same.
                let _ = replies.send((reply, room)).await;
                drop(slot);
            });
        }
        received.reserve(GATHER_BYTES);
        let read = if received.is_empty() {
            reader.read_buf(&mut received).await
        } else {
            timeout(STALL_TIMEOUT, reader.read_buf(&mut received))
                .await
                .map_err(|_| End::Stalled)?
        };
        if read? == 0 {
            return Ok(());
        }
    }
}

/// The bytes that a message and its reply may take: a READ is short and its reply long.
fn weight(record_bytes: usize, message: &Message) -> u32 {
    let reply_bytes = match message {
        Message::Call(call) if call.program == nfs3::PROGRAM => {
            reply_bytes_max(call.procedure, &call.arguments)
        }
        _ => 0,
    };
    let own = u32::try_from(record_bytes).unwrap_or(u32::MAX);
    own.saturating_add(reply_bytes)
        .clamp(1, IN_FLIGHT_BYTES_MAX)
}

async fn answer(shared: &Shared, secure: bool, message: Message) -> Vec<u8> {
    let call = match message {
        Message::Call(call) => call,
        Message::OtherVersion { xid } => return rpc::other_version(xid),
    };
    let xid = call.xid;
    dispatch(shared, secure, call)
        .await
        .unwrap_or_else(|refusal| rpc::refused(xid, refusal))
}

async fn dispatch(shared: &Shared, secure: bool, call: Call) -> Result<Vec<u8>, Refusal> {
    let (only, is_nfs) = match call.program {
        nfs3::PROGRAM => (nfs3::VERSION, true),
        mount3::PROGRAM => (mount3::VERSION, false),
        _ => return Err(Refusal::ProgramUnavailable),
    };
    if call.version != only {
        return Err(Refusal::VersionMismatch { only });
    }
    let is_null = call.procedure == nfs3::NFS_PROGRAM::NFSPROC3_NULL as u32;
    match call.from {
        Claim::Malformed => return Err(Refusal::BadCredential),
        Claim::BadVerifier => return Err(Refusal::BadVerifier),
        // RFC 9289, section 4.1: the question is good for NULL, and never inside TLS. In the
        // middle of calls in clear it has no good answer either: some might be under way.
        Claim::Tls if secure || !is_null || shared.tls.is_some() => {
            return Err(Refusal::BadCredential);
        }
        Claim::Tls | Claim::Nobody | Claim::System(_) | Claim::Other => {}
    }
    if shared.needs_tls() && !secure && !is_null {
        return Err(Refusal::TooWeak);
    }
    let export = shared.export.clone();
    if !is_nfs {
        return mount::execute(
            &export,
            &shared.name,
            call.xid,
            call.procedure,
            call.arguments,
        );
    }
    let caller = match call.from {
        Claim::System(caller) if shared.root_squash => caller.squash_root(),
        Claim::System(caller) => caller,
        _ if is_null => super::permission::Caller::nobody(),
        _ => return Err(Refusal::TooWeak),
    };
    execute(export, caller, call.xid, call.procedure, call.arguments).await
}

async fn write_replies(
    mut writer: impl AsyncWrite + Unpin,
    mut outgoing: mpsc::Receiver<Outgoing>,
) -> std::io::Result<()> {
    let mut gathered = Vec::new();
    let mut rooms = Vec::new();
    while let Some((reply, room)) = outgoing.recv().await {
        gathered.clear();
        rooms.clear();
        gathered.extend(reply);
        rooms.push(room);
        while gathered.len() < GATHER_BYTES {
            let Ok((reply, room)) = outgoing.try_recv() else {
                break;
            };
            gathered.extend(reply);
            rooms.push(room);
        }
        let sent = async {
            writer.write_all(&gathered).await?;
            // Under TLS the last record may still be in the session.
            writer.flush().await
        };
        timeout(STALL_TIMEOUT, sent)
            .await
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??;
    }
    writer.shutdown().await
}

// A call waits for room for itself and its reply; one that could never have it would wait for ever.
const _: () = assert!(IN_FLIGHT_BYTES_MAX >= 2 * TRANSFER_BYTES_MAX);
