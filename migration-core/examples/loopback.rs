//! How fast the engine is on this host: memory of a machine that does not run, over loopback TCP.
//!
//! `loopback [MIB] [CHANNELS] [RUNS]` prints one line a run: a plain copy through the same sockets
//! first, as the measure, then the engine into fresh and into populated memory.

use async_trait::async_trait;
use migration_core::{
    Credentials, HostError, MachineSink, MachineSource, MemorySink, MemorySource, PAGE_SIZE,
    ReceiveOptions, ReceiveStatus, Region, SendOptions, SendStatus, TcpAcceptor, TcpConnector,
    Ticket, monotonic_ns, receive, send,
};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// A chunk's bytes: the engine writes within one, so one lock a chunk is enough.
const CHUNK: usize = 2 << 20;

struct Memory(Vec<Mutex<Vec<u8>>>);

impl Memory {
    fn new(mib: usize, fill: Option<u8>) -> Arc<Memory> {
        let chunk = |index: usize| match fill {
            // Zeroed by the kernel at the first touch, as a destination's memory is.
            None => vec![0; CHUNK],
            Some(seed) => (0..CHUNK)
                .map(|at| (at / 64 * 31 + index) as u8 | seed)
                .collect(),
        };
        Arc::new(Memory((0..mib / 2).map(chunk).map(Mutex::new).collect()))
    }

    fn with(&self, page: u64, length: usize, work: impl FnOnce(&mut [u8])) {
        let at = page as usize * PAGE_SIZE;
        let mut chunk = self.0[at / CHUNK].lock().unwrap();
        work(&mut chunk[at % CHUNK..at % CHUNK + length]);
    }

    fn layout(&self) -> Vec<Region> {
        let pages = (self.0.len() * CHUNK / PAGE_SIZE) as u64;
        vec![Region {
            guest_address: 0,
            pages,
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
        self.with(page, buffer.len(), |bytes| buffer.copy_from_slice(bytes));
        Ok(())
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
    fn mark_quiet(&self) {}
    async fn save_device_state(&self) -> Result<Vec<u8>, HostError> {
        Ok(vec![7; 11_000])
    }
}

impl MemorySink for Memory {
    fn regions(&self) -> Vec<Region> {
        self.layout()
    }
    fn write_pages(&self, _: usize, page: u64, data: &[u8]) -> Result<(), HostError> {
        self.with(page, data.len(), |bytes| bytes.copy_from_slice(data));
        Ok(())
    }
    fn zero_pages(&self, _: usize, page: u64, count: u64) -> Result<(), HostError> {
        self.with(page, count as usize * PAGE_SIZE, |bytes| bytes.fill(0));
        Ok(())
    }
}

#[async_trait]
impl MachineSink for Memory {
    async fn load_device_state(&self, _: Vec<u8>) -> Result<(), HostError> {
        Ok(())
    }
}

fn report(name: &str, mib: usize, took: Duration, blackout_us: u64) {
    let gib_s = mib as f64 / 1024.0 / took.as_secs_f64();
    println!("{name:<24} {gib_s:.2} GiB/s, {took:.0?}, stopped to complete {blackout_us} us");
}

/// What the sockets alone can do, from one buffer to another.
async fn plain(mib: usize, channels: u16) -> std::io::Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let each = mib / usize::from(channels) * 2;
    let began = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
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

async fn migrate(
    source: &Arc<Memory>,
    sink: &Arc<Memory>,
    channels: u16,
) -> Result<(Duration, u64), HostError> {
    let credentials = Credentials {
        migration_id: 1,
        ticket: Ticket([1; 32]),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let connector = Arc::new(TcpConnector {
        addresses: vec![listener.local_addr()?],
    });
    let began = Instant::now();
    let receiving = tokio::spawn(receive(
        Arc::new(TcpAcceptor { listener }),
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
    send(
        connector,
        credentials,
        Arc::clone(source),
        options,
        status,
        Default::default(),
    )
    .await?;
    let took = began.elapsed();
    let received = receiving.await??;
    let stopped_ns = received.status.source_timings.vcpus_stopped_ns;
    Ok((took, (received.status.complete_ns - stopped_ns) / 1000))
}

#[tokio::main]
async fn main() -> Result<(), HostError> {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<usize>());
    let mib = args.next().transpose()?.unwrap_or(1024).max(64);
    let channels = args.next().transpose()?.unwrap_or(1).clamp(1, 16) as u16;
    let runs = args.next().transpose()?.unwrap_or(3);
    let source = Memory::new(mib, Some(1));
    for _ in 0..runs {
        report("plain sockets", mib, plain(mib, channels).await?, 0);
        let sink = Memory::new(mib, None);
        let (took, blackout_us) = migrate(&source, &sink, channels).await?;
        report("into fresh memory", mib, took, blackout_us);
        let (took, blackout_us) = migrate(&source, &sink, channels).await?;
        report("into populated memory", mib, took, blackout_us);
        let equal = source
            .0
            .iter()
            .zip(&sink.0)
            .all(|(a, b)| *a.lock().unwrap() == *b.lock().unwrap());
        assert!(equal, "the copy differs");
        let zero = Memory::new(mib, None);
        let (took, blackout_us) = migrate(&zero, &Memory::new(mib, None), channels).await?;
        report("zero pages", mib, took, blackout_us);
    }
    Ok(())
}
