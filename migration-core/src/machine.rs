//! What a monitor gives the engine: memory to read or write, and a machine to stop, save and load.
//!
//! The methods that are not `async` may block (ioctls, page faults): the engine calls them on
//! blocking threads, several at once. The `async` ones run in tasks of their own and are never
//! dropped half done; when one takes longer than its bound the engine gives up waiting, not the task.

use crate::error::HostError;
use crate::pages::Region;
use async_trait::async_trait;

/// The memory of a machine that is to be sent.
///
/// Pages are named by (index into [`regions`](MemorySource::regions), page number within the region).
pub trait MemorySource: Send + Sync + 'static {
    /// The guest's memory, in the order that both sides use. It must not change during a migration.
    fn regions(&self) -> Vec<Region>;

    /// Turns dirty logging on, the hypervisor's and the monitor's own (device writes).
    ///
    /// When this returns, every later write to guest memory is logged. The engine's first round
    /// sends every page, so bits from before are of no use and an attempt that failed leaves nothing behind
    /// that a second one could miss.
    fn start_dirty_log(&self) -> Result<(), HostError>;

    /// The pages of `region` dirtied and not cleared yet: bit `p % 64` of word `p / 64` is page `p`.
    ///
    /// Must include what the monitor's devices wrote. For the hypervisor's log this only reads
    /// (KVM_GET_DIRTY_LOG under manual protect): bits go away in [`clear_dirty`](Self::clear_dirty).
    /// A bitmap of the monitor's own writes may be fetched-and-cleared here, since the engine sends
    /// every page reported or fails the attempt.
    fn harvest_dirty(&self, region: usize) -> Result<Vec<u64>, HostError>;

    /// Clears (re-protects) the set pages of `bits`, just before the engine reads them.
    ///
    /// `bits[0]` bit 0 is page `first_page`, a multiple of 64; `bits` covers whole words, or runs to
    /// the region's end (KVM_CLEAR_DIRTY_LOG's own alignment rule). Pages outside stay as they are.
    fn clear_dirty(&self, region: usize, first_page: u64, bits: &[u64]) -> Result<(), HostError>;

    /// Copies pages from `first_page` on into `buffer`, a whole number of pages long.
    ///
    /// The guest may be writing them at this moment: use volatile reads. A torn page is logged
    /// dirty and sent again.
    fn read_pages(
        &self,
        region: usize,
        first_page: u64,
        buffer: &mut [u8],
    ) -> Result<(), HostError>;

    /// Turns dirty logging off. Called once at the end of every attempt that turned it on, whatever came of it.
    fn stop_dirty_log(&self) -> Result<(), HostError>;
}

/// The machine that is to be sent.
#[async_trait]
pub trait MachineSource: Send + Sync + 'static {
    /// Stops every vCPU. Returns CLOCK_MONOTONIC, nanoseconds, of when the last one had stopped.
    async fn pause(&self) -> Result<u64, HostError>;

    /// Completes all disk I/O: every reply in, COMMIT done, nothing of it in flight afterwards.
    /// Called after [`pause`](Self::pause); may still write guest memory (and log it).
    async fn drain_disks(&self) -> Result<(), HostError>;

    /// Called right before the first byte of *Quiet* is handed to the network: from here on the
    /// machine may run only on the log's word. Must not block.
    ///
    /// It is the monitor's own record of the promise, so that not even a dropped future of
    /// [`send`](crate::send) loses it; and the monitor's last word on whether it can be given: the
    /// machine may have been taken out of the attempt's hands since it was stopped (its storage
    /// wanted a re-key, and it runs again). With an error nothing is promised and nothing said.
    fn mark_quiet(&self) -> Result<(), HostError>;

    /// The state of vCPUs, interrupt controllers and devices, in the monitor's own versioned form.
    /// Called after [`drain_disks`](Self::drain_disks). After it nothing may write guest memory.
    async fn save_device_state(&self) -> Result<Vec<u8>, HostError>;
}

/// The memory that a machine arrives in. It must be fresh: zero pages of the first round are not written.
pub trait MemorySink: Send + Sync + 'static {
    /// The guest's memory; must equal the source's regions, in order, start and length.
    fn regions(&self) -> Vec<Region>;

    /// Writes whole pages from `first_page` on. The engine has checked the range against the regions.
    fn write_pages(&self, region: usize, first_page: u64, data: &[u8]) -> Result<(), HostError>;

    /// Makes `count` pages zero. Only called for pages that were written before in this migration.
    fn zero_pages(&self, region: usize, first_page: u64, count: u64) -> Result<(), HostError>;

    /// A round is in memory, as far as one channel goes, and more will follow: what comes after *Quiet* is told
    /// of by [`load_device_state`](MachineSink::load_device_state) alone. The source waits for the answer.
    fn round_arrived(&self, round: u32) -> Result<(), HostError> {
        let _ = round;
        Ok(())
    }
}

/// The machine that is to arrive.
#[async_trait]
pub trait MachineSink: Send + Sync + 'static {
    /// Loads the device state, after all memory has arrived and verified. It must check everything
    /// it can and must not let the machine run: *Complete* is said only when this returns `Ok`.
    async fn load_device_state(&self, state: Vec<u8>) -> Result<(), HostError>;
}

/// Everything [`send`](crate::send) needs.
pub trait MigrationSource: MemorySource + MachineSource {}
impl<T: MemorySource + MachineSource> MigrationSource for T {}

/// Everything [`receive`](crate::receive) needs.
pub trait MigrationSink: MemorySink + MachineSink {}
impl<T: MemorySink + MachineSink> MigrationSink for T {}
