//! The transport's state as it travels with the machine.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};

use super::{Transport, status};
use crate::devices::StateError;

/// Everything that the driver has set up and what is not acknowledged yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// The status register.
    pub status: u32,
    /// Which half of the offered features is shown.
    pub device_features_select: u32,
    /// Which half of the accepted features is written.
    pub driver_features_select: u32,
    /// The accepted features.
    pub driver_features: u64,
    /// The queue that the queue registers mean.
    pub queue_select: u32,
    /// Interrupts that the driver has not acknowledged.
    pub interrupt_status: u32,
    /// Counts changes of the configuration space.
    pub config_generation: u32,
    /// The queues.
    pub queues: Vec<QueueState>,
}

/// One queue: where its rings lie and how far each side of it was worked through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// The largest size offered.
    pub max_size: u16,
    /// The size chosen.
    pub size: u16,
    /// Whether the driver has set it up.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// The next request to take.
    pub next_available: u16,
    /// The next place in the used ring.
    pub next_used: u16,
    /// Whether interrupts and notifications go by index.
    pub event_index: bool,
}

impl Transport {
    /// The state, with nothing half done: every request is either in a used ring or still available.
    ///
    /// # Errors
    /// When it still works.
    pub fn save(&self) -> Result<TransportState, StateError> {
        let state = self.lock();
        if state.running || state.in_flight > 0 {
            return Err(StateError::NotQuiesced {
                kind: self.name().into(),
            });
        }
        Ok(TransportState {
            status: state.status,
            device_features_select: state.device_features_select,
            driver_features_select: state.driver_features_select,
            driver_features: state.driver_features,
            queue_select: state.queue_select,
            interrupt_status: state.interrupt_status,
            config_generation: state.config_generation,
            queues: state.queues.iter().map(save_queue).collect(),
        })
    }

    /// Takes up a saved state.
    ///
    /// # Errors
    /// When it is not one that a device like this can have saved; nothing has changed then.
    pub fn restore(&self, saved: &TransportState) -> Result<(), StateError> {
        let invalid = |reason: String| StateError::Invalid {
            kind: self.name().into(),
            reason,
        };
        let mut state = self.lock();
        if state.running || state.in_flight > 0 {
            return Err(StateError::NotQuiesced {
                kind: self.name().into(),
            });
        }
        if saved.status & !status::ALL != 0 {
            return Err(invalid(format!("status {:#x}", saved.status)));
        }
        let unknown = saved.driver_features & !self.description.features;
        if saved.status & status::FEATURES_OK != 0 && unknown != 0 {
            return Err(invalid(format!(
                "the guest uses features {unknown:#x}, which this monitor does not offer"
            )));
        }
        if saved.queues.len() != state.queues.len() {
            return Err(invalid(format!(
                "{} queues, not {}",
                saved.queues.len(),
                state.queues.len()
            )));
        }
        let mut queues = Vec::with_capacity(saved.queues.len());
        for (queue, own) in saved.queues.iter().zip(&state.queues) {
            if queue.max_size != own.max_size() {
                return Err(invalid(format!(
                    "a queue of at most {}, not {}",
                    queue.max_size,
                    own.max_size()
                )));
            }
            let queue = load_queue(queue).map_err(|error| invalid(error.to_string()))?;
            if queue.ready() && !queue.is_valid(self.memory.as_ref()) {
                return Err(invalid("a queue that is not in guest memory".into()));
            }
            queues.push(queue);
        }
        state.status = saved.status;
        state.device_features_select = saved.device_features_select;
        state.driver_features_select = saved.driver_features_select;
        state.driver_features = saved.driver_features;
        state.queue_select = saved.queue_select;
        state.interrupt_status = saved.interrupt_status;
        state.config_generation = saved.config_generation;
        state.queues = queues;
        Ok(())
    }
}

fn save_queue(queue: &Queue) -> QueueState {
    QueueState {
        max_size: queue.max_size(),
        size: queue.size(),
        ready: queue.ready(),
        descriptors: queue.desc_table(),
        available: queue.avail_ring(),
        used: queue.used_ring(),
        next_available: queue.next_avail(),
        next_used: queue.next_used(),
        event_index: queue.event_idx_enabled(),
    }
}

fn load_queue(saved: &QueueState) -> Result<Queue, virtio_queue::Error> {
    Queue::try_from(virtio_queue::QueueState {
        max_size: saved.max_size,
        next_avail: saved.next_available,
        next_used: saved.next_used,
        event_idx_enabled: saved.event_index,
        size: saved.size,
        ready: saved.ready,
        desc_table: saved.descriptors,
        avail_ring: saved.available,
        used_ring: saved.used,
    })
}
