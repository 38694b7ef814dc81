//! The receiving side: where the stream is accepted, memory as it arrives, the state loaded at the end.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;
use futures::future::{BoxFuture, select_all};
use migration_core::{Acceptor, BoxStream, HostError, MachineSink, MemorySink, PAGE_SIZE, Region};
use proto::failpoint;
use tokio::net::TcpListener;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::super::{Monitor, blocking};
use super::{IncomingError, source};
use crate::phase::Event;
use crate::state::MachineState;

/// The machine that is to arrive.
#[derive(Debug)]
pub(super) struct Sink {
    monitor: Arc<Monitor>,
}

impl Sink {
    pub(super) fn new(monitor: Arc<Monitor>) -> Sink {
        Sink { monitor }
    }

    fn address(&self, region: usize, page: u64) -> Result<GuestAddress, HostError> {
        let region = self
            .monitor
            .platform
            .machine
            .memory()
            .iter()
            .nth(region)
            .ok_or("there is no such region")?;
        let offset = page
            .checked_mul(PAGE_SIZE as u64)
            .filter(|offset| *offset <= region.len());
        Ok(region
            .start_addr()
            .unchecked_add(offset.ok_or("there is no such page")?))
    }
}

impl Sink {
    /// Whether something was received for a page before.
    fn was_written(&self, region: usize, page: u64) -> bool {
        let region = self.monitor.platform.machine.memory().iter().nth(region);
        let offset = page.saturating_mul(PAGE_SIZE as u64) as usize;
        region.is_none_or(|region| region.bitmap().dirty_at(offset))
    }
}

impl MemorySink for Sink {
    fn regions(&self) -> Vec<Region> {
        source::regions(&self.monitor)
    }

    fn write_pages(&self, region: usize, first_page: u64, data: &[u8]) -> Result<(), HostError> {
        let address = self.address(region, first_page)?;
        Ok(self
            .monitor
            .platform
            .machine
            .memory()
            .write_slice(data, address)?)
    }

    fn zero_pages(&self, region: usize, first_page: u64, count: u64) -> Result<(), HostError> {
        const ZEROES: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        for page in first_page..first_page.saturating_add(count) {
            // A page of a new machine that nobody wrote is zero, and takes no memory of the host.
            if self.was_written(region, page) {
                self.write_pages(region, page, &ZEROES)?;
            }
        }
        Ok(())
    }

    fn round_arrived(&self, _: u32) -> Result<(), HostError> {
        // A blocking thread of the engine's: waiting on the runtime is allowed here.
        Ok(tokio::runtime::Handle::current().block_on(failpoint::reach("sink.round"))?)
    }
}

#[async_trait]
impl MachineSink for Sink {
    async fn load_device_state(&self, state: Vec<u8>) -> Result<(), HostError> {
        failpoint::reach("sink.before_complete").await?;
        let monitor = self.monitor.clone();
        blocking(move || -> Result<(), HostError> {
            let state = MachineState::from_bytes(&state)?;
            Ok(monitor.platform.machine.restore(&state)?)
        })
        .await?;
        // Memory has verified before this is called: now the cutover may be proposed.
        let _operation = self.monitor.operation.lock().await;
        self.monitor.step(Event::Arrived)?;
        Ok(())
    }
}

/// Accepts on several addresses at once.
#[derive(Debug)]
pub(super) struct Listeners(Vec<(SocketAddr, TcpListener)>);

impl Listeners {
    /// Listens on all of `addresses`.
    pub(super) async fn bind(addresses: &[SocketAddr]) -> Result<Listeners, IncomingError> {
        let mut listeners = Vec::with_capacity(addresses.len());
        for &address in addresses {
            let failed = |source| IncomingError::Listen { address, source };
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            listeners.push((listener.local_addr().map_err(failed)?, listener));
        }
        Ok(Listeners(listeners))
    }

    /// Where, with the ports that the host chose.
    pub(super) fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.0.iter().map(|(address, _)| *address)
    }
}

#[async_trait]
impl Acceptor for Listeners {
    async fn accept(&self) -> io::Result<BoxFuture<'static, io::Result<BoxStream>>> {
        // `accept` of a TcpListener loses no connection when its future is dropped.
        let accepts = self
            .0
            .iter()
            .map(|(_, listener)| Box::pin(listener.accept()));
        let (stream, _) = select_all(accepts).await.0?;
        Ok(Box::pin(async move {
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as BoxStream)
        }))
    }
}
