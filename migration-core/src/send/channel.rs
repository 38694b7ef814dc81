//! One connection of the source: a task that writes, a task that listens.

use crate::clock::monotonic_ns;
use crate::error::{FrameError, SendError};
use crate::frame::{ChannelTotals, Frame, Hello, Kind, RoundMark, decode_accepted, decode_error};
use crate::net::Connector;
use crate::options::{Credentials, SendOptions};
use crate::pace::Pace;
use crate::wire::{FrameReader, FrameWriter, split};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

/// Batches that wait for the network at most: one is being written, one is ready.
const QUEUE_FRAMES: usize = 2;

/// Buffers of a channel: those in the queue, the one being filled, the one being written.
const BUFFERS: usize = QUEUE_FRAMES + 2;

/// How long a writer that waits for its turn does not look up.
const NAP_MAX: Duration = Duration::from_millis(20);

/// What may wait for the driver at most; it listens always, so this is never reached but by a mad peer, who then waits.
pub const EVENTS_MAX: usize = 64;

/// What the writer is asked to do, in order.
pub enum Outgoing {
    /// Send this; it tells of so many pages with contents, and so many zero ones.
    Frame {
        frame: Frame,
        pages: u64,
        zero_pages: u64,
    },
    /// Say what was sent, once everything before was handed to the network.
    Flush(oneshot::Sender<ChannelTotals>),
}

impl From<Frame> for Outgoing {
    fn from(frame: Frame) -> Outgoing {
        Outgoing::Frame {
            frame,
            pages: 0,
            zero_pages: 0,
        }
    }
}

/// What the destination said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The regions fit.
    Ready,
    /// A round is in memory, as far as this channel goes.
    RoundAck(u16, RoundMark),
    /// Verified and loaded.
    Complete,
}

/// Figures of all channels, for the status.
#[derive(Debug, Default)]
pub struct Counters {
    /// On the wire.
    pub bytes: AtomicU64,
    /// Pages done, zero ones included.
    pub pages: AtomicU64,
    /// Of them zero.
    pub zero_pages: AtomicU64,
}

/// What all channels of one migration share.
#[derive(Clone)]
pub struct Common {
    pub pace: Arc<Mutex<Pace>>,
    pub counters: Arc<Counters>,
    pub heard: mpsc::Sender<Result<Heard, SendError>>,
    pub heartbeat: Duration,
    /// Set when the attempt is over: memory that still waits is not worth sending.
    pub stop: Arc<AtomicBool>,
}

/// The driver's end of a channel.
pub struct Channel {
    /// To the writer.
    pub outgoing: mpsc::Sender<Outgoing>,
    /// Buffers that came back from the writer; taken by the thread that fills them.
    pub buffers: Option<mpsc::Receiver<Vec<u8>>>,
}

/// Connects a channel and introduces it; the caller bounds the wait.
pub async fn open(
    connector: &dyn Connector,
    channel: u16,
    credentials: Credentials,
    options: &SendOptions,
) -> Result<(FrameReader, FrameWriter), SendError> {
    let stream = connector
        .connect(channel)
        .await
        .map_err(|source| SendError::Connect { channel, source })?;
    let (mut reader, mut writer) = split(stream, options.setup_timeout);
    let mut hello = Hello::new(channel, options.channels.max(1), credentials).encode();
    let connection = |source| SendError::Connection { channel, source };
    writer.write(&mut hello).await.map_err(connection)?;
    let answer = reader
        .expect(Kind::Accepted)
        .await
        .map_err(|error| match error {
            Ok(reason) => SendError::Destination(reason),
            Err(error) => error.at_source(channel),
        })?;
    let protocol = |source| SendError::Protocol { channel, source };
    // One version so far; payloads will be written in the one picked here.
    decode_accepted(&answer).map_err(protocol)?;
    reader.set_dead_after(options.dead_after);
    Ok((reader, writer))
}

/// Starts the tasks of a connected channel.
pub fn start(
    channel: u16,
    halves: (FrameReader, FrameWriter),
    common: &Common,
    tasks: &mut JoinSet<()>,
) -> Channel {
    let (outgoing, orders) = mpsc::channel(QUEUE_FRAMES);
    let (give_back, buffers) = mpsc::channel(BUFFERS);
    let (reader, writer) = halves;
    let writing = Writing {
        channel,
        writer,
        common: common.clone(),
        give_back,
        totals: ChannelTotals::default(),
    };
    tasks.spawn(writing.run(orders));
    tasks.spawn(listen(channel, reader, common.heard.clone()));
    Channel {
        outgoing,
        buffers: Some(buffers),
    }
}

struct Writing {
    channel: u16,
    writer: FrameWriter,
    common: Common,
    give_back: mpsc::Sender<Vec<u8>>,
    totals: ChannelTotals,
}

impl Writing {
    async fn run(mut self, mut orders: mpsc::Receiver<Outgoing>) {
        loop {
            let order = tokio::time::timeout(self.common.heartbeat, orders.recv()).await;
            let done = match order {
                Err(_) => self.beat().await,
                Ok(None) => break,
                Ok(Some(Outgoing::Flush(done))) => {
                    let _ = done.send(self.totals);
                    Ok(())
                }
                Ok(Some(Outgoing::Frame {
                    frame,
                    pages,
                    zero_pages,
                })) => self.send(frame, pages, zero_pages).await,
            };
            if let Err(source) = done {
                let error = SendError::Connection {
                    channel: self.channel,
                    source,
                };
                let _ = self.common.heard.send(Err(error)).await;
                return;
            }
        }
        self.writer.close().await;
    }

    async fn beat(&mut self) -> std::io::Result<()> {
        self.writer
            .write(&mut Frame::new(Kind::Heartbeat, &[]))
            .await?;
        Ok(())
    }

    async fn send(&mut self, mut frame: Frame, pages: u64, zero_pages: u64) -> std::io::Result<()> {
        let memory = matches!(frame.kind(), Kind::Pages | Kind::Zero);
        if memory {
            self.wait_turn(frame.wire_bytes()).await?;
            if self.common.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            self.totals.add(pages, zero_pages, frame.payload_sum());
        }
        let written = self.writer.write(&mut frame).await?;
        let counters = &self.common.counters;
        counters.bytes.fetch_add(written, Ordering::Relaxed);
        counters
            .pages
            .fetch_add(pages + zero_pages, Ordering::Relaxed);
        counters.zero_pages.fetch_add(zero_pages, Ordering::Relaxed);
        if frame.kind() == Kind::Pages {
            // The thread that fills them may be gone; then the buffer goes too.
            let _ = self.give_back.try_send(frame.into_bytes());
        }
        Ok(())
    }

    /// Waits until the cap allows `bytes`, and stays audible meanwhile.
    async fn wait_turn(&mut self, bytes: u64) -> std::io::Result<()> {
        let wait_ns = {
            let mut pace = self
                .common
                .pace
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            pace.take(bytes, monotonic_ns())
        };
        let mut rest = Duration::from_nanos(wait_ns);
        let mut silent = Duration::ZERO;
        while !rest.is_zero() && !self.common.stop.load(Ordering::Relaxed) {
            let nap = rest.min(NAP_MAX);
            tokio::time::sleep(nap).await;
            rest -= nap;
            silent += nap;
            if silent >= self.common.heartbeat {
                silent = Duration::ZERO;
                self.beat().await?;
            }
        }
        Ok(())
    }
}

async fn listen(
    channel: u16,
    mut reader: FrameReader,
    heard: mpsc::Sender<Result<Heard, SendError>>,
) {
    let mut buffer = Vec::new();
    loop {
        let said = match reader.next(&mut buffer).await {
            Ok(header) => {
                let payload = &buffer[..header.length as usize];
                header
                    .verify(payload)
                    .and_then(|()| understand(channel, header.kind, payload))
                    .unwrap_or_else(|source| Some(Err(SendError::Protocol { channel, source })))
            }
            Err(error) => Some(Err(error.at_source(channel))),
        };
        if let Some(said) = said {
            let over = said.is_err();
            if heard.send(said).await.is_err() || over {
                return;
            }
        }
    }
}

fn understand(
    channel: u16,
    kind: Kind,
    payload: &[u8],
) -> Result<Option<Result<Heard, SendError>>, FrameError> {
    let said = match kind {
        Kind::Heartbeat => return Ok(None),
        Kind::Ready if channel == 0 => Ok(Heard::Ready),
        Kind::Complete if channel == 0 => Ok(Heard::Complete),
        Kind::RoundAck => Ok(Heard::RoundAck(channel, RoundMark::decode(kind, payload)?)),
        Kind::Error => Err(SendError::Destination(decode_error(payload))),
        other => {
            let what = "a destination does not say that on this channel";
            return Err(FrameError::Unexpected {
                kind: other.label(),
                what,
            });
        }
    };
    Ok(Some(said))
}
