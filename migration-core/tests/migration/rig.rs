//! A network in one process whose connections can be cut at an exact byte, and a run of both sides on it.

use crate::fake::Fake;
use async_trait::async_trait;
use futures::future::BoxFuture;
use migration_core::{
    Acceptor, BoxStream, Connector, Credentials, ReceiveError, ReceiveOptions, ReceiveStatus,
    Received, SendFailed, SendOptions, SendStatus, Sent, Ticket, receive, send,
};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

pub fn credentials() -> Credentials {
    Credentials {
        migration_id: 77,
        ticket: Ticket([0xab; 32]),
    }
}

/// Where the source's connection of one channel breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    Never,
    /// After so many bytes from the source; these arrive, and the attempt to write more fails.
    Sent(u64),
    /// After so many bytes from the destination; these arrive.
    Heard(u64),
}

/// The source's end of a connection.
struct Wire {
    inner: Option<DuplexStream>,
    cut: Cut,
    sent: u64,
    heard: u64,
    record: Arc<Mutex<Record>>,
}

/// All that passed, each way, on the channel watched.
#[derive(Default)]
pub struct Record {
    pub sent: Vec<u8>,
    pub heard: Vec<u8>,
}

fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "cut by the test")
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let left = match self.cut {
            Cut::Heard(limit) => limit - self.heard,
            _ => u64::MAX,
        };
        if left == 0 {
            self.inner = None;
        }
        let Some(inner) = &mut self.inner else {
            return Poll::Ready(Err(broken()));
        };
        let mut part = buf.take(left.min(usize::MAX as u64) as usize);
        ready!(Pin::new(inner).poll_read(cx, &mut part))?;
        let read = part.filled().to_vec();
        // `take` shares the memory; these bytes are initialised, so this only moves the mark.
        buf.put_slice(&read);
        self.heard += read.len() as u64;
        self.record.lock().unwrap().heard.extend_from_slice(&read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let left = match self.cut {
            Cut::Sent(limit) => limit - self.sent,
            _ => u64::MAX,
        };
        let Some(inner) = &mut self.inner else {
            return Poll::Ready(Err(broken()));
        };
        if left == 0 {
            self.inner = None;
            return Poll::Ready(Err(broken()));
        }
        let part = &buf[..(buf.len() as u64).min(left) as usize];
        let written = ready!(Pin::new(inner).poll_write(cx, part))?;
        self.sent += written as u64;
        self.record
            .lock()
            .unwrap()
            .sent
            .extend_from_slice(&part[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.inner {
            Some(inner) => Pin::new(inner).poll_shutdown(cx),
            None => Poll::Ready(Ok(())),
        }
    }
}

pub struct Caller {
    to: mpsc::Sender<DuplexStream>,
    cut_channel: u16,
    cut: Cut,
    record: Arc<Mutex<Record>>,
}

#[async_trait]
impl Connector for Caller {
    async fn connect(&self, channel: u16) -> io::Result<BoxStream> {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        self.to.send(theirs).await.map_err(|_| broken())?;
        let watched = channel == self.cut_channel;
        Ok(Box::new(Wire {
            inner: Some(ours),
            cut: if watched { self.cut } else { Cut::Never },
            sent: 0,
            heard: 0,
            record: if watched {
                Arc::clone(&self.record)
            } else {
                Arc::default()
            },
        }))
    }
}

pub struct Port {
    from: tokio::sync::Mutex<mpsc::Receiver<DuplexStream>>,
}

#[async_trait]
impl Acceptor for Port {
    async fn accept(&self) -> io::Result<BoxFuture<'static, io::Result<BoxStream>>> {
        match self.from.lock().await.recv().await {
            Some(stream) => Ok(Box::pin(async move { Ok(Box::new(stream) as BoxStream) })),
            // Nobody will come any more; a port that is open waits.
            None => std::future::pending().await,
        }
    }
}

/// A network with a port, and one who calls it.
pub fn network(cut_channel: u16, cut: Cut) -> (Arc<Caller>, Arc<Port>, Arc<Mutex<Record>>) {
    let (to, from) = mpsc::channel(16);
    let record = Arc::default();
    let caller = Caller {
        to,
        cut_channel,
        cut,
        record: Arc::clone(&record),
    };
    (
        Arc::new(caller),
        Arc::new(Port {
            from: tokio::sync::Mutex::new(from),
        }),
        record,
    )
}

/// One attempt, and what each side came to.
pub struct Outcome {
    pub source: Result<Sent, SendFailed>,
    pub destination: Result<Received, ReceiveError>,
    pub source_status: SendStatus,
    pub destination_status: ReceiveStatus,
}

pub struct Attempt {
    pub caller: Arc<dyn Connector>,
    pub port: Arc<dyn Acceptor>,
    pub send_options: SendOptions,
    pub receive_options: ReceiveOptions,
    pub cancel: CancellationToken,
    pub cancel_receive: CancellationToken,
    pub source_status: watch::Sender<SendStatus>,
    pub destination_status: watch::Sender<ReceiveStatus>,
}

impl Attempt {
    pub fn new(caller: Arc<dyn Connector>, port: Arc<dyn Acceptor>, channels: u16) -> Attempt {
        Attempt {
            caller,
            port,
            send_options: SendOptions {
                channels,
                ..SendOptions::default()
            },
            receive_options: ReceiveOptions::default(),
            cancel: CancellationToken::new(),
            cancel_receive: CancellationToken::new(),
            source_status: watch::channel(SendStatus::default()).0,
            destination_status: watch::channel(ReceiveStatus::default()).0,
        }
    }

    pub async fn run(self, source: &Arc<Fake>, sink: &Arc<Fake>) -> Outcome {
        let sending = send(
            self.caller,
            credentials(),
            Arc::clone(source),
            self.send_options,
            self.source_status.clone(),
            self.cancel,
        );
        let receiving = receive(
            self.port,
            credentials(),
            Arc::clone(sink),
            self.receive_options,
            self.destination_status.clone(),
            self.cancel_receive,
        );
        let both = async { tokio::join!(tokio::spawn(sending), tokio::spawn(receiving)) };
        let bound = Duration::from_secs(60);
        let (source, destination) = tokio::time::timeout(bound, both)
            .await
            .expect("an attempt that never ends");
        Outcome {
            source: source.expect("the source panicked"),
            destination: destination.expect("the destination panicked"),
            source_status: self.source_status.borrow().clone(),
            destination_status: self.destination_status.borrow().clone(),
        }
    }
}

/// Ends of the whole frames in a recorded direction, with their kinds.
pub fn frame_ends(bytes: &[u8]) -> Vec<(u8, u64)> {
    let mut ends = Vec::new();
    let mut at = 0;
    while at + 32 <= bytes.len() {
        let length = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
        let kind = bytes[at + 4];
        at += 32 + length;
        if at <= bytes.len() {
            ends.push((kind, at as u64));
        }
    }
    ends
}
