//! A network interface on a tap (virtio 1.x, section 5.1): whole frames, no offloads.
//!
//! ```text
//!  tap ── frame ──► receive task ──► queue 0 ──► guest
//!  tap ◄── frame ── send task ◄───── queue 1 ◄── guest
//! ```
//!
//! A frame that finds no buffer waits in the tap's own queue, and is lost when that is full, as on any network.
//! The tap's link is up exactly while the device is not quiesced.
//! After a migration the device announces itself from the tap: see [`announce`].

pub mod announce;
mod state;
pub mod tap;

use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use super::mmio::{Description, Request, Transport};
use super::{FEATURE_EVENT_INDEX, FEATURE_INDIRECT, FEATURE_VERSION_1, Tasks};
use crate::devices::{BusDevice, DeviceContext, ExitContext, Migratable, StateError};
pub use announce::MacAddress;
use tap::Tap;

/// Frames that a driver can queue in each direction.
pub const QUEUE_SIZE_MAX: u16 = 256;

/// The largest frame: an Ethernet header and 65,535 bytes.
pub const FRAME_BYTES_MAX: usize = 14 + 65_535;

const RECEIVE: usize = 0;
const SEND: usize = 1;
const DEVICE_ID: u32 = 1;
const FEATURE_MAC: u64 = 1 << 5;
const FEATURE_STATUS: u64 = 1 << 16;
const STATUS_LINK_UP: u16 = 1;
/// `struct virtio_net_hdr` with `num_buffers`, which is all zeroes but that count.
const HEADER_BYTES: usize = 12;
const HEADER: [u8; HEADER_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// Where the interface lies and what it is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Its place among the machine's interfaces.
    pub index: usize,
    /// Guest-physical address of its registers.
    pub address: u64,
    /// Its interrupt.
    pub irq: u32,
    /// Its address on the network.
    pub mac: MacAddress,
}

/// The device.
#[derive(Debug)]
pub struct Net {
    transport: Arc<Transport>,
    port: Arc<Port>,
    _tasks: Tasks,
}

/// What the device's tasks share.
#[derive(Debug)]
struct Port {
    tap: Tap,
    mac: MacAddress,
    /// The address that the guest last claimed as its own, for the announcement.
    ipv4: Mutex<Option<Ipv4Addr>>,
}

/// Why the interface cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The queues.
    #[error("a queue cannot be made: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// The tap cannot be waited for.
    #[error("the tap cannot be used: {0}")]
    Tap(#[from] io::Error),
}

impl Net {
    /// The interface on `tap`, quiesced.
    ///
    /// # Errors
    /// See [`NetError`].
    pub fn new(
        context: &DeviceContext,
        config: &NetConfig,
        tap: Tap,
    ) -> Result<Arc<Self>, NetError> {
        let mut space = config.mac.0.to_vec();
        space.extend(STATUS_LINK_UP.to_le_bytes());
        let description = Description {
            name: format!("virtio-net:{}", config.index),
            device_id: DEVICE_ID,
            features: FEATURE_VERSION_1
                | FEATURE_INDIRECT
                | FEATURE_EVENT_INDEX
                | FEATURE_MAC
                | FEATURE_STATUS,
            queue_sizes: vec![QUEUE_SIZE_MAX; 2],
            config: space,
        };
        let mut tasks = Tasks::default();
        let transport =
            Transport::new(context, config.address, config.irq, description, &mut tasks)?;
        let port = Arc::new(Port {
            tap,
            mac: config.mac,
            ipv4: Mutex::default(),
        });
        tasks.spawn(&context.runtime, receive(transport.clone(), port.clone()));
        tasks.spawn(&context.runtime, send(transport.clone(), port.clone()));
        Ok(Arc::new(Self {
            transport,
            port,
            _tasks: tasks,
        }))
    }

    /// The registers and queues.
    pub fn transport(&self) -> &Arc<Transport> {
        &self.transport
    }

    fn set_link(&self, up: bool) {
        if let Err(error) = self.port.tap.set_link(up) {
            tracing::error!(device = self.transport.name(), up, %error, "the tap's link cannot be set");
        }
    }

    /// Tells the network where the machine is now: a RARP, and a gratuitous ARP where its address is known.
    ///
    /// # Errors
    /// When the tap does not take the frames.
    pub async fn announce(&self) -> io::Result<()> {
        self.port.tap.write(&announce::rarp(self.port.mac)).await?;
        if let Some(address) = self.port.ipv4() {
            self.port
                .tap
                .write(&announce::gratuitous_arp(self.port.mac, address))
                .await?;
        }
        Ok(())
    }
}

impl Port {
    fn ipv4(&self) -> Option<Ipv4Addr> {
        *self.ipv4.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_ipv4(&self, address: Option<Ipv4Addr>) {
        *self.ipv4.lock().unwrap_or_else(PoisonError::into_inner) = address;
    }
}

/// Brings frames to the guest.
async fn receive(transport: Arc<Transport>, port: Arc<Port>) {
    let mut frame = vec![0; FRAME_BYTES_MAX];
    loop {
        // A buffer is taken only when there is a frame for it: a quiesced device holds no request.
        if let Err(error) = port.tap.readable().await {
            tracing::error!(device = transport.name(), %error, "the tap is gone; nothing is received any more");
            return;
        }
        let Some(request) = transport.take(RECEIVE) else {
            transport.kicked(RECEIVE).await;
            continue;
        };
        // Exactly one read for the buffer taken; when it fails the buffer goes back empty.
        let length = port.tap.try_read(&mut frame).unwrap_or(0);
        transport.complete(&request, |memory| {
            let room = request.writable.len().saturating_sub(HEADER_BYTES);
            if length == 0 || length > room {
                return 0;
            }
            let header = request.writable.write(memory, 0, &HEADER);
            let payload = request
                .writable
                .write(memory, HEADER_BYTES, &frame[..length]);
            if header.is_ok() && payload.is_ok() {
                HEADER_BYTES + length
            } else {
                0
            }
        });
    }
}

/// Brings frames to the network.
async fn send(transport: Arc<Transport>, port: Arc<Port>) {
    let mut frame = vec![0; HEADER_BYTES + FRAME_BYTES_MAX];
    loop {
        let Some(request) = transport.take(SEND) else {
            transport.kicked(SEND).await;
            continue;
        };
        if let Some(frame) = outgoing(&request, &transport, &mut frame) {
            if let Some(address) = announce::claimed_address(frame, port.mac) {
                port.set_ipv4(Some(address));
            }
            if let Err(error) = port.tap.write(frame).await {
                tracing::debug!(device = transport.name(), %error, "a frame is lost");
            }
        }
        transport.complete(&request, |_| 0);
    }
}

/// The frame of a request, without its virtio header; `None` where it is no frame.
fn outgoing<'a>(request: &Request, transport: &Transport, frame: &'a mut [u8]) -> Option<&'a [u8]> {
    if request.readable.len() > frame.len() {
        return None;
    }
    let length = request.readable.read(transport.memory(), 0, frame).ok()?;
    frame
        .get(HEADER_BYTES..length)
        .filter(|frame| frame.len() >= announce::ETHERNET_HEADER_BYTES)
}

impl BusDevice for Net {
    fn read(&self, offset: u64, data: &mut [u8], _: &ExitContext<'_>) {
        self.transport.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8], _: &ExitContext<'_>) {
        self.transport.write(offset, data);
    }
}

#[async_trait]
impl Migratable for Net {
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
        self.set_link(false);
    }

    fn resume(&self) {
        self.set_link(true);
        self.transport.resume();
    }
}

#[cfg(test)]
mod tests;
