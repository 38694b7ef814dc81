//! Virtio devices behind memory-mapped registers (virtio 1.x, no legacy).
//!
//! ```text
//!  guest ── registers ──► mmio::Transport ── take ──► the device's task ──► disk, tap
//!        ◄─ used ring, interrupt ──┘  ▲                      │
//!                                     └────── complete ──────┘
//! ```
//!
//! The transport owns everything that the specification calls device state: status, features, queues. It is one
//! `Arc` that the bus and the device's task share, so a request is taken, completed, saved and reset under one lock.
//! A device adds what is its own: what a request means.

pub mod block;
pub mod buffers;
#[cfg(test)]
pub(crate) mod driver;
pub mod mmio;
pub mod net;
mod ready;

use std::future::Future;

use tokio::task::AbortHandle;

/// `VIRTIO_F_VERSION_1`: not legacy. Always offered, and demanded.
pub const FEATURE_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_INDIRECT_DESC`.
pub const FEATURE_INDIRECT: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub const FEATURE_EVENT_INDEX: u64 = 1 << 29;

/// Tasks that end with their owner.
#[derive(Debug, Default)]
pub(crate) struct Tasks(Vec<AbortHandle>);

impl Tasks {
    /// Starts a task.
    pub(crate) fn spawn(
        &mut self,
        runtime: &tokio::runtime::Handle,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        self.0.push(runtime.spawn(task).abort_handle());
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}
