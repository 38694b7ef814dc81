//! The migration engine alone, over loopback TCP: memory of a machine that does not run, with and without TLS.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use migration_core::tls::{ExpectedSource, Identity, TlsAcceptor, TlsConnector};
use migration_core::{
    Acceptor, Connector, Credentials, HostError, MachineSink, MachineSource, MemorySink,
    MemorySource, PAGE_SIZE, ReceiveOptions, ReceiveStatus, Region, SendOptions, SendStatus,
    TcpAcceptor, TcpConnector, Ticket, monotonic_ns, receive, send,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// A chunk's bytes: the engine writes within one, so one lock a chunk is enough.
const CHUNK: usize = 2 << 20;

/// Memory of a machine that does not run.
#[derive(Debug)]
pub struct Memory(Vec<Mutex<Vec<u8>>>);

impl Memory {
    /// So many MiB (an even number), none of them zero pages.
    pub fn filled(mib: usize) -> Arc<Memory> {
        Memory::new(mib, |index| {
            (0..CHUNK)
                .map(|at| (at / 64 * 31 + index) as u8 | 1)
                .collect()
        })
    }

    /// So many MiB, zeroed by the kernel at the first touch, as a destination's are.
    pub fn fresh(mib: usize) -> Arc<Memory> {
        Memory::new(mib, |_| vec![0; CHUNK])
    }

    fn new(mib: usize, chunk: impl Fn(usize) -> Vec<u8>) -> Arc<Memory> {
        Arc::new(Memory((0..mib / 2).map(chunk).map(Mutex::new).collect()))
    }

    /// Whether both hold the same.
    pub fn equals(&self, other: &Memory) -> bool {
        self.0.len() == other.0.len()
            && self.0.iter().zip(&other.0).all(|(ours, theirs)| {
                match (ours.lock(), theirs.lock()) {
                    (Ok(ours), Ok(theirs)) => *ours == *theirs,
                    _ => false,
                }
            })
    }

    fn with(
        &self,
        page: u64,
        length: usize,
        work: impl FnOnce(&mut [u8]),
    ) -> Result<(), HostError> {
        let at = page as usize * PAGE_SIZE;
        let chunk = self.0.get(at / CHUNK).ok_or("there is no such page")?;
        let mut chunk = chunk.lock().map_err(|_| "another thread panicked")?;
        work(&mut chunk[at % CHUNK..at % CHUNK + length]);
        Ok(())
    }

    fn layout(&self) -> Vec<Region> {
        vec![Region {
            guest_address: 0,
            pages: (self.0.len() * CHUNK / PAGE_SIZE) as u64,
        }]
    }
}

impl MemorySource for Memory {
    fn regions(&self) -> Vec<Region> {
        self.layout()
    }
    fn start_dirty_log(&self) -> Result<(), HostError> {
        Ok(())
    }
    fn harvest_dirty(&self, _: usize) -> Result<Vec<u64>, HostError> {
        Ok(vec![0; self.0.len() * CHUNK / PAGE_SIZE / 64])
    }
    fn clear_dirty(&self, _: usize, _: u64, _: &[u64]) -> Result<(), HostError> {
        Ok(())
    }
    fn read_pages(&self, _: usize, page: u64, buffer: &mut [u8]) -> Result<(), HostError> {
        self.with(page, buffer.len(), |bytes| buffer.copy_from_slice(bytes))
    }
    fn stop_dirty_log(&self) -> Result<(), HostError> {
        Ok(())
    }
}

#[async_trait]
impl MachineSource for Memory {
    async fn pause(&self) -> Result<u64, HostError> {
        Ok(monotonic_ns())
    }
    async fn drain_disks(&self) -> Result<(), HostError> {
        Ok(())
    }
    fn mark_quiet(&self) -> Result<(), HostError> {
        Ok(())
    }
    async fn save_device_state(&self) -> Result<Vec<u8>, HostError> {
        Ok(vec![7; 11_000])
    }
}

impl MemorySink for Memory {
    fn regions(&self) -> Vec<Region> {
        self.layout()
    }
    fn write_pages(&self, _: usize, page: u64, data: &[u8]) -> Result<(), HostError> {
        self.with(page, data.len(), |bytes| bytes.copy_from_slice(data))
    }
    fn zero_pages(&self, _: usize, page: u64, count: u64) -> Result<(), HostError> {
        self.with(page, count as usize * PAGE_SIZE, |bytes| bytes.fill(0))
    }
}

#[async_trait]
impl MachineSink for Memory {
    async fn load_device_state(&self, _: Vec<u8>) -> Result<(), HostError> {
        Ok(())
    }
}

/// What one run took.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// From the first connection to *Complete*.
    pub whole: Duration,
    /// From the machine's stop to *Complete*.
    pub stopped: Duration,
}

/// What the sockets alone can do, from one buffer to another.
///
/// # Errors
/// When the host has no loopback.
pub async fn sockets(mib: usize, channels: u16) -> std::io::Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let each = mib / usize::from(channels) * 2;
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..channels {
        let mut to = TcpStream::connect(address).await?;
        let (mut from, _) = listener.accept().await?;
        tasks.spawn(async move {
            let buffer = vec![1; 512 << 10];
            for _ in 0..each {
                to.write_all(&buffer).await?;
            }
            Ok::<_, std::io::Error>(())
        });
        tasks.spawn(async move {
            let mut buffer = vec![0; 512 << 10];
            for _ in 0..each {
                from.read_exact(&mut buffer).await?;
            }
            Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.map_err(std::io::Error::other)??;
    }
    Ok(began.elapsed())
}

/// Moves `source`'s memory to `sink`; over the plain sockets, which no monitor does, when it is not `sealed`.
///
/// # Errors
/// As either side failed.
pub async fn migrate(
    source: &Arc<Memory>,
    sink: &Arc<Memory>,
    channels: u16,
    sealed: bool,
) -> Result<Took, HostError> {
    let credentials = Credentials {
        migration_id: 1,
        ticket: Ticket([1; 32]),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let connector = TcpConnector {
        addresses: vec![listener.local_addr()?],
    };
    let acceptor = TcpAcceptor { listener };
    let ends: (Arc<dyn Connector>, Arc<dyn Acceptor>) = if sealed {
        let (here, there) = (Identity::draw()?, Identity::draw()?);
        let expected = ExpectedSource::default();
        expected.announce(here.fingerprint())?;
        let connector = TlsConnector::new(connector, &here, there.fingerprint())?;
        (
            Arc::new(connector),
            Arc::new(TlsAcceptor::new(acceptor, &there, expected)?),
        )
    } else {
        (Arc::new(connector), Arc::new(acceptor))
    };
    let began = Instant::now();
    let receiving = tokio::spawn(receive(
        ends.1,
        credentials,
        Arc::clone(sink),
        ReceiveOptions::default(),
        watch::channel(ReceiveStatus::default()).0,
        Default::default(),
    ));
    let options = SendOptions {
        channels,
        ..SendOptions::default()
    };
    let status = watch::channel(SendStatus::default()).0;
    let source = Arc::clone(source);
    send(
        ends.0,
        credentials,
        source,
        options,
        status,
        Default::default(),
    )
    .await?;
    let whole = began.elapsed();
    let received = receiving.await??;
    let stopped_ns = received.status.source_timings.vcpus_stopped_ns;
    Ok(Took {
        whole,
        stopped: Duration::from_nanos(received.status.complete_ns.saturating_sub(stopped_ns)),
    })
}
