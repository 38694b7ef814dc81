//! A block device on a disk of the storage broker (virtio 1.x, section 5.2).
//!
//! ```text
//!  queue ── take ──► Command ──► disk (pends as long as it must) ──► complete ──► used ring
//! ```
//!
//! One task serves the queue and keeps at most [`IN_FLIGHT_MAX`] requests on the disk. Requests run side by side and
//! complete in any order, as the specification allows; a flush covers the writes that were completed before it.
//! A disk that is held or has lost its server just does not answer: its requests stay in flight.

mod command;
mod state;

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use storage_broker::disk::{Disk, DiskError};

use super::mmio::{Description, Request, Transport};
use super::{FEATURE_EVENT_INDEX, FEATURE_INDIRECT, FEATURE_VERSION_1, Tasks};
use crate::devices::{BusDevice, DeviceContext, ExitContext, Migratable, StateError};
use command::Command;

/// Requests on the disk at a time: enough to hide a server's latency, few enough to drain fast.
pub const IN_FLIGHT_MAX: usize = 64;

/// Requests that a driver can queue.
pub const QUEUE_SIZE_MAX: u16 = 256;

/// The unit of the device's addresses.
pub const SECTOR_BYTES: u64 = 512;

/// The block size that disk images are made for: partition tables count in it.
const BLOCK_BYTES: u32 = 512;
/// Blocks of the size that storage likes, as a power of two of [`BLOCK_BYTES`]: 4 KiB.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;
/// Bytes in one piece of a request; with [`SEGMENTS_MAX`] it keeps a request within what the monitor accepts.
const SEGMENT_BYTES_MAX: u32 = 64 << 10;
/// Pieces of a request.
const SEGMENTS_MAX: u32 = 62;

const DEVICE_ID: u32 = 2;
const FEATURE_SIZE_MAX: u64 = 1 << 1;
const FEATURE_SEGMENTS_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_BLOCK_SIZE: u64 = 1 << 6;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_TOPOLOGY: u64 = 1 << 10;

/// What the disk is called and whether it may be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockConfig {
    /// Its place among the machine's disks.
    pub index: usize,
    /// Guest-physical address of its registers.
    pub address: u64,
    /// Its interrupt.
    pub irq: u32,
    /// What the guest sees as the disk's serial number; the first 20 bytes count.
    pub serial: String,
    /// Held under a shared lease.
    pub read_only: bool,
}

/// The device.
#[derive(Debug)]
pub struct Block {
    transport: Arc<Transport>,
    _tasks: Tasks,
}

impl Block {
    /// The device on `disk`, quiesced.
    ///
    /// # Errors
    /// When the queue cannot be made.
    pub fn new(
        context: &DeviceContext,
        config: &BlockConfig,
        disk: Arc<dyn Disk>,
    ) -> Result<Arc<Self>, virtio_queue::Error> {
        let mut features = FEATURE_VERSION_1
            | FEATURE_INDIRECT
            | FEATURE_EVENT_INDEX
            | FEATURE_SIZE_MAX
            | FEATURE_SEGMENTS_MAX
            | FEATURE_BLOCK_SIZE
            | FEATURE_FLUSH
            | FEATURE_TOPOLOGY;
        if config.read_only {
            features |= FEATURE_READ_ONLY;
        }
        let sectors = disk.size_bytes() / SECTOR_BYTES;
        let description = Description {
            name: format!("virtio-blk:{}", config.index),
            device_id: DEVICE_ID,
            features,
            queue_sizes: vec![QUEUE_SIZE_MAX],
            config: config_space(sectors),
        };
        let mut tasks = Tasks::default();
        let transport =
            Transport::new(context, config.address, config.irq, description, &mut tasks)?;
        let server = Server {
            transport: transport.clone(),
            disk,
            sectors,
            serial: config.serial.clone(),
            read_only: config.read_only,
        };
        tasks.spawn(&context.runtime, server.serve());
        Ok(Arc::new(Self {
            transport,
            _tasks: tasks,
        }))
    }

    /// The registers and queues.
    pub fn transport(&self) -> &Arc<Transport> {
        &self.transport
    }
}

/// The configuration space (virtio 1.x, section 5.2.4): capacity, segment limits, no geometry, block sizes.
fn config_space(sectors: u64) -> Vec<u8> {
    let mut config = Vec::with_capacity(32);
    config.extend(sectors.to_le_bytes());
    config.extend(SEGMENT_BYTES_MAX.to_le_bytes());
    config.extend(SEGMENTS_MAX.to_le_bytes());
    config.extend([0; 4]);
    config.extend(BLOCK_BYTES.to_le_bytes());
    // Exponent, alignment offset, smallest and best size of I/O.
    config.extend([PHYSICAL_BLOCK_EXPONENT, 0, 8, 0, 0, 0, 0, 0]);
    config
}

impl BusDevice for Block {
    fn read(&self, offset: u64, data: &mut [u8], _: &ExitContext<'_>) {
        self.transport.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8], _: &ExitContext<'_>) {
        self.transport.write(offset, data);
    }
}

#[async_trait]
impl Migratable for Block {
    fn kind(&self) -> String {
        self.transport.name().into()
    }

    fn version(&self) -> u32 {
        state::VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::save(self)
    }

    fn restore(&self, version: u32, state: &[u8]) -> Result<(), StateError> {
        state::restore(self, version, state)
    }

    async fn quiesce(&self) {
        self.transport.quiesce().await;
    }

    fn resume(&self) {
        self.transport.resume();
    }
}

/// How a request ended.
enum Answer {
    Done(Bytes),
    Failed,
    Unsupported,
}

const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

/// The task that serves the queue.
struct Server {
    transport: Arc<Transport>,
    disk: Arc<dyn Disk>,
    sectors: u64,
    serial: String,
    read_only: bool,
}

impl Server {
    async fn serve(self) {
        let mut in_flight = FuturesUnordered::new();
        loop {
            while in_flight.len() < IN_FLIGHT_MAX
                && let Some(request) = self.transport.take(0)
            {
                in_flight.push(self.run(request));
            }
            tokio::select! {
                Some((request, answer)) = in_flight.next() => self.complete(&request, &answer),
                () = self.transport.kicked(0), if in_flight.len() < IN_FLIGHT_MAX => {}
            }
        }
    }

    async fn run(&self, request: Request) -> (Request, Answer) {
        let command = Command::parse(
            &request,
            self.transport.memory(),
            self.sectors,
            self.read_only,
        );
        let result: Result<Bytes, DiskError> = match command {
            // Nothing is always there.
            Ok(Command::Read { bytes: 0, .. }) => Ok(Bytes::new()),
            Ok(Command::Write { data, .. }) if data.is_empty() => Ok(Bytes::new()),
            Ok(Command::Read { offset, bytes }) => self.disk.read(offset, bytes).await,
            Ok(Command::Write { offset, data }) => {
                self.disk.write(offset, data).await.map(|()| Bytes::new())
            }
            Ok(Command::Flush) => self.disk.flush().await.map(|()| Bytes::new()),
            Ok(Command::GetId) => Ok(self.id()),
            Ok(Command::Unknown(kind)) => {
                tracing::debug!(
                    device = self.transport.name(),
                    kind,
                    "a request that this device does not know"
                );
                return (request, Answer::Unsupported);
            }
            Err(error) => {
                tracing::warn!(device = self.transport.name(), %error, "the guest's request cannot be served");
                return (request, Answer::Failed);
            }
        };
        let answer = result.map_or_else(
            |error| {
                tracing::warn!(device = self.transport.name(), %error, "the disk refused a request");
                Answer::Failed
            },
            Answer::Done,
        );
        (request, answer)
    }

    fn complete(&self, request: &Request, answer: &Answer) {
        self.transport.complete(request, |memory| {
            // The last byte that the device may write is the status; the data lies before it.
            let Some(status_at) = request.writable.len().checked_sub(1) else {
                return 0;
            };
            let (mut status, mut written) = match answer {
                Answer::Done(data) => (
                    STATUS_OK,
                    request
                        .writable
                        .write(memory, 0, &data[..data.len().min(status_at)]),
                ),
                Answer::Failed => (STATUS_IO_ERROR, Ok(0)),
                Answer::Unsupported => (STATUS_UNSUPPORTED, Ok(0)),
            };
            if written.is_err() {
                (status, written) = (STATUS_IO_ERROR, Ok(0));
            }
            match (
                request.writable.write(memory, status_at, &[status]),
                written,
            ) {
                (Ok(1), Ok(bytes)) if bytes == status_at => bytes + 1,
                _ => 0,
            }
        });
    }

    fn id(&self) -> Bytes {
        let mut id = self.serial.as_bytes().to_vec();
        id.resize(command::ID_BYTES, 0);
        id.into()
    }
}

#[cfg(test)]
mod tests;
