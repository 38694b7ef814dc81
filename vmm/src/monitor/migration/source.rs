//! The sending side: memory and its dirty log, the stop for the cutover, the promise, the saved state.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use migration_core::{HostError, MachineSource, MemorySource, PAGE_SIZE, Region};
use proto::failpoint;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::super::{Monitor, blocking, wants_rekey};
use crate::kvm::dirty::DirtyLog;
use crate::phase::{Event, NotNow, Phase};

/// How long the disks may take to complete and commit: beyond it the blackout is worth less than the migration.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(8);

/// One attempt's view of the machine.
#[derive(Debug)]
pub(super) struct Source {
    monitor: Arc<Monitor>,
    log: Mutex<Option<DirtyLog>>,
}

impl Source {
    pub(super) fn new(monitor: Arc<Monitor>) -> Source {
        Source {
            monitor,
            log: Mutex::default(),
        }
    }

    fn log(&self) -> MutexGuard<'_, Option<DirtyLog>> {
        self.log
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn with_log<T>(
        &self,
        work: impl FnOnce(&DirtyLog) -> Result<T, HostError>,
    ) -> Result<T, HostError> {
        work(self.log().as_ref().ok_or("dirty logging is off")?)
    }

    /// Waits until something else than the attempt has moved the machine on since it was stopped.
    async fn left_stopping(&self) -> NotNow {
        let mut changes = self.monitor.watch();
        loop {
            let phase = self.monitor.lock().phase;
            if phase != Phase::Stopping {
                let event = Event::SaidQuiet;
                return NotNow { phase, event };
            }
            // The monitor, and with it the sender, outlives this attempt.
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// The guest's address of a page; the engine names no page outside the regions.
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

/// The guest's memory as the engine counts it.
pub(super) fn regions(monitor: &Monitor) -> Vec<Region> {
    let regions = monitor.platform.machine.memory().iter();
    regions
        .map(|region| Region {
            guest_address: region.start_addr().raw_value(),
            pages: region.len() / PAGE_SIZE as u64,
        })
        .collect()
}

impl MemorySource for Source {
    fn regions(&self) -> Vec<Region> {
        regions(&self.monitor)
    }

    fn start_dirty_log(&self) -> Result<(), HostError> {
        *self.log() = Some(DirtyLog::begin(self.monitor.platform.machine.vm().clone())?);
        Ok(())
    }

    fn harvest_dirty(&self, region: usize) -> Result<Vec<u64>, HostError> {
        if region == 0 {
            // A blocking thread of the engine's: waiting on the runtime is allowed here.
            tokio::runtime::Handle::current().block_on(failpoint::reach("source.round"))?;
        }
        self.with_log(|log| Ok(log.fetch(region as u32)?))
    }

    fn clear_dirty(&self, region: usize, first_page: u64, bits: &[u64]) -> Result<(), HostError> {
        self.with_log(|log| Ok(log.clear(region as u32, first_page, bits)?))
    }

    fn read_pages(
        &self,
        region: usize,
        first_page: u64,
        buffer: &mut [u8],
    ) -> Result<(), HostError> {
        let address = self.address(region, first_page)?;
        Ok(self
            .monitor
            .platform
            .machine
            .memory()
            .read_slice(buffer, address)?)
    }

    fn stop_dirty_log(&self) -> Result<(), HostError> {
        *self.log() = None;
        Ok(())
    }
}

#[async_trait]
impl MachineSource for Source {
    async fn pause(&self) -> Result<u64, HostError> {
        let monitor = &self.monitor;
        let _operation = monitor.operation.lock().await;
        monitor.step(Event::StopForCutover)?;
        let gate = monitor.platform.machine.gate().clone();
        match blocking(move || gate.stop_vcpus()).await {
            Ok((Some(permit), stopped_ns)) => {
                monitor.lock().cutover_permit = Some(permit);
                Ok(stopped_ns)
            }
            // The caller gives the cutover up, and that leaves the machine frozen, as it should be.
            Ok((None, _)) => Err("the lease ran out as the machine was to stop".into()),
            Err(error) => Err(error.into()),
        }
    }

    async fn drain_disks(&self) -> Result<(), HostError> {
        let machine = &self.monitor.platform.machine;
        tokio::select! {
            biased;
            // A re-key lets the machine go on while its disks drain: they are the guest's again.
            left = self.left_stopping() => return Err(left.into()),
            drained = machine.drain(DRAIN_TIMEOUT) => drained?,
        }
        if !machine.gate().hold() {
            return Err("the machine goes on".into());
        }
        if machine
            .disks()
            .iter()
            .any(|disk| wants_rekey(&disk.watch().borrow().state))
        {
            return Err("a disk wants a re-key".into());
        }
        failpoint::reach("source.before_quiet").await?;
        Ok(())
    }

    fn mark_quiet(&self) -> Result<(), HostError> {
        let mut state = self.monitor.lock();
        state.phase = state.phase.after(Event::SaidQuiet)?;
        state.said_quiet = true;
        state.cutover_permit = None;
        drop(state);
        self.monitor.tell();
        tracing::info!("quiet: runs again only on the log's word");
        Ok(())
    }

    async fn save_device_state(&self) -> Result<Vec<u8>, HostError> {
        failpoint::reach("source.after_quiet").await?;
        let monitor = self.monitor.clone();
        let state = blocking(move || monitor.platform.machine.save()).await?;
        Ok(state.to_bytes())
    }
}
