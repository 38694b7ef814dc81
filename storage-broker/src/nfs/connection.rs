//! One TCP connection to an RPC server with many calls in flight; a call once begun is never cancelled.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use nfs3_types::rpc;
use nfs3_types::xdr_codec::{Opaque, Pack};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::record::RecordReader;
use super::reply::{Malformed, reply_header};
use super::xdr::{Decoder, XdrError, encode};
use crate::tls::{ReadHalf, Stream, WriteHalf};

/// Calls in flight on one connection at most: what a server's threads can use, and a bound on
/// memory (64 WRITEs of 1 MiB).
pub const IN_FLIGHT_MAX: usize = 64;

/// A writer gathers small calls into one system call up to this size.
const GATHER_BYTES: usize = 128 << 10;

/// Who a call says it is from (AUTH_SYS, RFC 5531 appendix A), chosen anew for each call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credential {
    /// The user id.
    pub uid: u32,
    /// The primary group id: where a fencing token travels. There are no further groups.
    pub gid: u32,
}

/// How a call ended without a result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// Not one byte of it was sent: the server has not executed it and never will.
    #[error("the call was not sent: {why}")]
    NotSent {
        /// What prevented it.
        why: Arc<str>,
    },
    /// No answer came: the server may have executed it, may yet do so, or never will.
    #[error("no answer came, so it is unknown whether the server acted: {why}")]
    Unknown {
        /// What happened to the connection.
        why: Arc<str>,
    },
    /// The RPC layer refused it; the server did not execute it.
    #[error("the server refused the call itself: {why}")]
    Denied {
        /// The server's reason.
        why: Arc<str>,
    },
}

/// A handle on a connection; it closes when the last handle is dropped.
#[derive(Clone, Debug)]
pub struct Connection {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    queue: mpsc::Sender<Outgoing>,
    slots: Arc<Semaphore>,
    next_xid: AtomicU32,
    call_timeout: Duration,
    end: Arc<End>,
    _close_on_drop: DropGuard,
}

/// How and whether a connection has ended.
#[derive(Debug, Default)]
struct End {
    closed: CancellationToken,
    why: OnceLock<Arc<str>>,
}

impl End {
    fn close(&self, why: impl Into<Arc<str>>) {
        // The first reason is the cause, later ones are its effects.
        let _ = self.why.set(why.into());
        self.closed.cancel();
    }

    fn why(&self) -> Arc<str> {
        self.why
            .get()
            .cloned()
            .unwrap_or_else(|| "the connection was closed".into())
    }
}

/// The right to have one call in flight.
#[derive(Debug)]
pub struct Slot(
    #[allow(dead_code, reason = "it is the permit's life that counts")] OwnedSemaphorePermit,
);

#[derive(Debug)]
struct Outgoing {
    xid: u32,
    message: Vec<u8>,
    pending: Pending,
}

#[derive(Debug)]
struct Pending {
    reply: oneshot::Sender<Result<Bytes, CallError>>,
    deadline: Instant,
    // Given back when the call has ended, not when its caller has lost interest.
    _slot: Slot,
}

type PendingCalls = Arc<Mutex<HashMap<u32, Pending>>>;

fn lock(calls: &PendingCalls) -> MutexGuard<'_, HashMap<u32, Pending>> {
    calls
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A call that is under way. Dropping it does not cancel the call.
#[derive(Debug)]
pub struct Started {
    reply: oneshot::Receiver<Result<Bytes, CallError>>,
}

impl Future for Started {
    type Output = Result<Bytes, CallError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.reply).poll(cx).map(|result| {
            result.unwrap_or_else(|_| {
                Err(CallError::Unknown {
                    why: "the connection's tasks have ended".into(),
                })
            })
        })
    }
}

/// Which procedure of which program a call is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Procedure {
    /// The RPC program.
    pub program: u32,
    /// The version of the program.
    pub version: u32,
    /// The procedure's number.
    pub number: u32,
}

impl Connection {
    /// Takes a connection over; an unanswered call closes it after `call_timeout`.
    pub fn new(stream: impl Into<Stream>, call_timeout: Duration) -> Connection {
        let (queue, outgoing) = mpsc::channel(IN_FLIGHT_MAX);
        let end = Arc::new(End::default());
        let calls = PendingCalls::default();
        let (read_half, write_half) = stream.into().into_split();
        let writer = tokio::spawn(write_calls(
            write_half,
            outgoing,
            calls.clone(),
            end.clone(),
        ));
        let reader = tokio::spawn(read_replies(
            read_half,
            calls.clone(),
            end.clone(),
            call_timeout,
        ));
        let ended = end.clone();
        tokio::spawn(async move {
            // Only when neither task runs can no further call be added and none be answered.
            let _ = tokio::join!(writer, reader);
            let why = ended.why();
            for (_, call) in lock(&calls).drain() {
                let _ = call
                    .reply
                    .send(Err(CallError::Unknown { why: why.clone() }));
            }
        });
        Connection {
            shared: Arc::new(Shared {
                queue,
                slots: Arc::new(Semaphore::new(IN_FLIGHT_MAX)),
                next_xid: AtomicU32::new(rand::random()),
                call_timeout,
                _close_on_drop: end.closed.clone().drop_guard(),
                end,
            }),
        }
    }

    /// The right to one more call, if fewer than [`IN_FLIGHT_MAX`] are in flight.
    pub fn try_slot(&self) -> Option<Slot> {
        self.shared.slots.clone().try_acquire_owned().ok().map(Slot)
    }

    /// Waits for the right to one more call; bounded by the timeout of the calls in flight.
    pub async fn slot(&self) -> Result<Slot, CallError> {
        match self.shared.slots.clone().acquire_owned().await {
            Ok(permit) => Ok(Slot(permit)),
            Err(_) => Err(CallError::NotSent {
                why: self.shared.end.why(),
            }),
        }
    }

    /// Hands a call to the writer task at once; the result arrives through [`Started`].
    ///
    /// # Errors
    /// [`CallError::NotSent`] when the connection has ended.
    pub fn start(
        &self,
        slot: Slot,
        procedure: Procedure,
        credential: Credential,
        arguments: &impl Pack,
    ) -> Result<Started, CallError> {
        let xid = self.shared.next_xid.fetch_add(1, Ordering::Relaxed);
        let message = encode_call(xid, procedure, credential, arguments).map_err(|error| {
            CallError::NotSent {
                why: error.to_string().into(),
            }
        })?;
        let (reply, receiver) = oneshot::channel();
        let deadline = Instant::now() + self.shared.call_timeout;
        let outgoing = Outgoing {
            xid,
            message,
            pending: Pending {
                reply,
                deadline,
                _slot: slot,
            },
        };
        // A slot is held until its call is answered, so the queue has room for every holder of one.
        match self.shared.queue.try_send(outgoing) {
            Ok(()) => Ok(Started { reply: receiver }),
            Err(_) => Err(CallError::NotSent {
                why: self.shared.end.why(),
            }),
        }
    }

    /// Waits for a slot, starts a call and waits for its reply. Dropping the future before it is
    /// started sends nothing; afterwards the call runs to its end without its caller.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn call(
        &self,
        procedure: Procedure,
        credential: Credential,
        arguments: &impl Pack,
    ) -> Result<Bytes, CallError> {
        let slot = self.slot().await?;
        self.start(slot, procedure, credential, arguments)?.await
    }

    /// Closes the connection: unanswered calls become unknown.
    pub fn close(&self, why: &str) {
        self.shared.end.close(why);
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.shared.end.closed.is_cancelled()
    }

    /// Resolves when the connection has ended, with the reason.
    pub async fn closed(&self) -> Arc<str> {
        self.shared.end.closed.cancelled().await;
        self.shared.end.why()
    }
}

fn encode_call(
    xid: u32,
    procedure: Procedure,
    credential: Credential,
    arguments: &impl Pack,
) -> Result<Vec<u8>, XdrError> {
    let credential = rpc::auth_unix {
        stamp: 0,
        machinename: Opaque::borrowed(b"baton"),
        uid: credential.uid,
        gid: credential.gid,
        gids: Vec::new(),
    };
    let header = rpc::rpc_msg {
        xid,
        body: rpc::msg_body::CALL(rpc::call_body {
            rpcvers: rpc::RPC_VERSION_2,
            prog: procedure.program,
            vers: procedure.version,
            proc: procedure.number,
            cred: rpc::opaque_auth::auth_unix(&credential),
            verf: rpc::opaque_auth::default(),
        }),
    };
    let mut message = Vec::with_capacity(4 + header.packed_size() + arguments.packed_size());
    message.extend_from_slice(&[0; 4]);
    encode(&mut message, &header)?;
    encode(&mut message, arguments)?;
    let length = u32::try_from(message.len() - 4).map_err(|_| XdrError::BadValue)?;
    message[..4].copy_from_slice(&(length | (1 << 31)).to_be_bytes());
    Ok(message)
}

async fn write_calls(
    mut socket: WriteHalf,
    mut outgoing: mpsc::Receiver<Outgoing>,
    calls: PendingCalls,
    end: Arc<End>,
) {
    loop {
        let first = tokio::select! {
            biased;
            () = end.closed.cancelled() => break,
            call = outgoing.recv() => match call {
                Some(call) => call,
                None => break,
            },
        };
        let mut batch = register(first, &calls);
        while batch.len() < GATHER_BYTES {
            let Ok(next) = outgoing.try_recv() else { break };
            batch.extend_from_slice(&register(next, &calls));
        }
        tokio::select! {
            biased;
            () = end.closed.cancelled() => break,
            result = send(&mut socket, &batch) => if let Err(error) = result {
                end.close(format!("sending failed: {error}"));
                break;
            },
        }
    }
    end.close("the connection was given up");
    outgoing.close();
    while let Some(call) = outgoing.recv().await {
        let _ = call
            .pending
            .reply
            .send(Err(CallError::NotSent { why: end.why() }));
    }
}

async fn send(socket: &mut WriteHalf, batch: &[u8]) -> std::io::Result<()> {
    socket.write_all(batch).await?;
    // Under TLS the last record may still be in the session.
    socket.flush().await
}

/// From here on the call counts as sent.
fn register(call: Outgoing, calls: &PendingCalls) -> Vec<u8> {
    lock(calls).insert(call.xid, call.pending);
    call.message
}

async fn read_replies(
    mut socket: ReadHalf,
    calls: PendingCalls,
    end: Arc<End>,
    call_timeout: Duration,
) {
    let mut records = RecordReader::default();
    let mut received = BytesMut::with_capacity(256 << 10);
    let period = (call_timeout / 10).clamp(Duration::from_millis(5), Duration::from_millis(500));
    let mut tick = tokio::time::interval(period);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let why = loop {
        tokio::select! {
            biased;
            () = end.closed.cancelled() => break end.why(),
            result = socket.read_buf(&mut received) => {
                match result {
                    Ok(0) => break "the server closed the connection".into(),
                    Ok(_) => {}
                    Err(error) => break format!("receiving failed: {error}").into(),
                }
                if let Err(why) = deliver(&mut records, &mut received, &calls) {
                    break why;
                }
                if received.capacity() - received.len() < 4096 {
                    received.reserve(64 << 10);
                }
            }
            now = tick.tick() => {
                if lock(&calls).values().any(|call| call.deadline <= now) {
                    break format!("a call was not answered within {call_timeout:?}").into();
                }
            }
        }
    };
    end.close(why);
}

/// Gives every complete reply to its caller.
fn deliver(
    records: &mut RecordReader,
    received: &mut BytesMut,
    calls: &PendingCalls,
) -> Result<(), Arc<str>> {
    while let Some(record) = records.next(received).map_err(|error| error.to_string())? {
        let mut decoder = Decoder(record);
        let xid = decoder
            .u32()
            .map_err(|error| format!("a reply has no xid: {error}"))?;
        let Some(call) = lock(calls).remove(&xid) else {
            return Err(
                format!("the server answered a call (xid {xid:#x}) that is not open").into(),
            );
        };
        let result = match reply_header(&mut decoder) {
            Ok(Ok(())) => Ok(decoder.0),
            Ok(Err(why)) => Err(CallError::Denied { why: why.into() }),
            Err(Malformed(why)) => {
                let _ = call
                    .reply
                    .send(Err(CallError::Unknown { why: why.clone() }));
                return Err(why);
            }
        };
        // The caller may have gone away; the reply is then nobody's.
        let _ = call.reply.send(result);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
