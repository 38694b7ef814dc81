//! The whole receiving side of a migration, its door and its driver too, with connections that were written down.
//!
//! The first byte says how many connections and how they introduce themselves; the rest is what they send. Each ends
//! with the source's word that it gives up, so that nothing waits for more; only who shows no ticket waits.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use migration_core::fuzzing::seal;
use migration_core::{
    Acceptor, BoxStream, Credentials, ReceiveOptions, ReceiveStage, Ticket, receive,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::input::Input;
use crate::runtime::block_on_alone;
use crate::source::{CHANNELS, FRAMES_MAX, Memory, Source, whole_machine};
use crate::target::{MemoryBound, Target};

/// The target.
pub const TARGET: Target = Target {
    name: "migration_receive",
    run,
    seeds,
    input_bytes_max: 1024,
    // All that both connections will send is made before they begin, 1 MiB a frame at most, and copied once as
    // it grows; the receiver itself holds a few frames of each.
    memory: MemoryBound {
        base: 16 << 20,
        each: 1 << 20,
    },
};

const HELLO: u8 = 1;
const ERROR: u8 = 20;
const CREDENTIALS: Credentials = Credentials {
    migration_id: 7,
    ticket: Ticket([5; 32]),
};

/// How long the engine waits for what never comes: short, since nothing here takes time.
const NEVER: Duration = Duration::from_millis(50);

/// Gives its bytes, then ends; takes whatever is written.
struct Written {
    bytes: io::Cursor<Vec<u8>>,
}

impl AsyncRead for Written {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.bytes).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Written {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Takes these connections, the last first, and no more.
struct Connections(Mutex<Vec<Vec<u8>>>);

#[async_trait]
impl Acceptor for Connections {
    async fn accept(
        &self,
    ) -> io::Result<std::pin::Pin<Box<dyn Future<Output = io::Result<BoxStream>> + Send>>> {
        let next = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let Some(bytes) = next else {
            return std::future::pending().await;
        };
        let stream = Written {
            bytes: io::Cursor::new(bytes),
        };
        Ok(Box::pin(async move { Ok(Box::new(stream) as BoxStream) }))
    }
}

fn run(data: &[u8]) {
    let mut input = Input(data);
    let connections = connections(&mut input);
    let options = ReceiveOptions {
        source_timeout: NEVER,
        setup_timeout: NEVER,
        handshake_timeout: NEVER,
        heartbeat: NEVER,
        ..ReceiveOptions::default()
    };
    block_on_alone(async {
        let (status, seen) = watch::channel(Default::default());
        let received = receive(
            Arc::new(Connections(Mutex::new(connections))),
            CREDENTIALS,
            Arc::new(Memory::default()),
            options,
            status,
            CancellationToken::new(),
        )
        .await;
        let stage = seen.borrow().stage;
        let whole = received.is_ok();
        assert_eq!(whole, stage == ReceiveStage::Complete, "{stage:?}");
    });
}

/// What each connection sends, the last connection first.
fn connections(input: &mut Input<'_>) -> Vec<Vec<u8>> {
    let manner = input.u8();
    let channels = if manner & 1 == 0 { 1 } else { CHANNELS };
    let mut streams: Vec<(u32, Vec<u8>)> = (0..channels)
        .map(|channel| (1, hello(channel, channels, manner)))
        .collect();
    let mut source = Source::default();
    for _ in 0..FRAMES_MAX {
        if input.is_empty() {
            break;
        }
        let choice = input.u8();
        let channel = usize::from(choice >> 7) % streams.len();
        let (kind, payload) = source.frame(channel, choice & 0x7f, input);
        let (sequence, stream) = &mut streams[channel];
        stream.extend(seal(kind, *sequence, &payload));
        *sequence += 1;
    }
    for (sequence, stream) in &mut streams {
        stream.extend(seal(ERROR, *sequence, b"the source gives up"));
    }
    streams
        .into_iter()
        .rev()
        .map(|(_, stream)| stream)
        .collect()
}

/// A connection's first frame; of some manners wrong in one number.
fn hello(channel: u16, channels: u16, manner: u8) -> Vec<u8> {
    let wrong = |at: u8| u16::from(manner == at);
    let mut payload = vec![if channel == 0 { 1 } else { 2 }, 0];
    let versions = [1 + wrong(0xf2), 1 + wrong(0xf2)];
    for number in [versions[0], versions[1], channel, channels + wrong(0xf4)] {
        payload.extend(number.to_le_bytes());
    }
    payload.extend(CREDENTIALS.migration_id.to_le_bytes());
    payload.extend(
        CREDENTIALS
            .ticket
            .0
            .map(|byte| byte ^ u8::from(manner == 0xf6)),
    );
    seal(HELLO, 0, &payload)
}

fn seeds() -> Vec<Vec<u8>> {
    let machine = |manner: u8| [&[manner], &whole_machine()[..]].concat();
    let without_its_end = machine(0)[..40].to_vec();
    vec![machine(0), machine(1), machine(0xf4), without_its_end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_seed_is_a_whole_machine() {
        let connections = connections(&mut Input(&seeds()[0]));
        let received = block_on_alone(receive(
            Arc::new(Connections(Mutex::new(connections))),
            CREDENTIALS,
            Arc::new(Memory::default()),
            ReceiveOptions::default(),
            watch::channel(Default::default()).0,
            CancellationToken::new(),
        ));
        assert_eq!(received.unwrap().device_state_bytes, 5);
    }
}
