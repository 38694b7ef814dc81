//! A driver for tests: sets a device up through its registers and puts chains of any shape into a queue.

use vm_memory::{Bytes, GuestAddress};

use super::FEATURE_VERSION_1;
use super::mmio::{Transport, register, status};
use crate::devices::GuestMemory;

/// Where the rings of queue `n` lie: `RINGS + n × RINGS_BYTES`.
pub(crate) const RINGS: u64 = 0x10_0000;
const RINGS_BYTES: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;

/// Free memory for buffers.
pub(crate) const BUFFERS: u64 = 0x20_0000;

/// The size of the driver's queues.
pub(crate) const QUEUE_SIZE: u16 = 16;

/// The next descriptor follows.
pub(crate) const NEXT: u16 = 1;
/// The device writes.
pub(crate) const WRITE: u16 = 2;

/// One descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// The driver's side of one queue.
pub(crate) struct Driver<'a> {
    transport: &'a Transport,
    memory: GuestMemory,
    queue: u64,
    available: u16,
    used: u16,
}

impl<'a> Driver<'a> {
    /// Brings the device up with these features besides version 1, and takes its first queue.
    pub(crate) fn start(transport: &'a Transport, features: u64) -> Self {
        reset(transport);
        set(
            transport,
            register::STATUS,
            status::ACKNOWLEDGE | status::DRIVER,
        );
        accept(transport, features | FEATURE_VERSION_1);
        set(transport, register::STATUS, status::FEATURES_OK);
        assert_ne!(get(transport, register::STATUS) & status::FEATURES_OK, 0);
        let driver = Self::queue(transport, 0);
        set(transport, register::STATUS, status::DRIVER_OK);
        driver
    }

    /// Sets a queue up.
    pub(crate) fn queue(transport: &'a Transport, queue: u64) -> Self {
        let rings = RINGS + queue * RINGS_BYTES;
        let memory = transport.memory().clone();
        memory
            .write_slice(&[0; RINGS_BYTES as usize], GuestAddress(rings))
            .unwrap();
        set(transport, register::QUEUE_SELECT, queue as u32);
        set(transport, register::QUEUE_SIZE, u32::from(QUEUE_SIZE));
        set(transport, register::QUEUE_DESCRIPTORS_LOW, rings as u32);
        set(
            transport,
            register::QUEUE_DRIVER_LOW,
            (rings + AVAILABLE) as u32,
        );
        set(transport, register::QUEUE_DEVICE_LOW, (rings + USED) as u32);
        set(transport, register::QUEUE_READY, 1);
        Self {
            transport,
            memory,
            queue,
            available: 0,
            used: 0,
        }
    }

    /// Takes over a queue on another device after a migration of its memory and state.
    pub(crate) fn moved_to<'b>(&self, transport: &'b Transport) -> Driver<'b> {
        Driver {
            transport,
            memory: transport.memory().clone(),
            queue: self.queue,
            available: self.available,
            used: self.used,
        }
    }

    fn rings(&self) -> u64 {
        RINGS + self.queue * RINGS_BYTES
    }

    /// Writes descriptor `index`.
    pub(crate) fn describe(&self, index: u16, piece: Piece) {
        let place = self.rings() + 16 * u64::from(index);
        let words = [
            piece.address,
            u64::from(piece.length) | u64::from(piece.flags) << 32 | u64::from(piece.next) << 48,
        ];
        for (word, place) in words.iter().zip([place, place + 8]) {
            self.memory.write_obj(*word, GuestAddress(place)).unwrap();
        }
    }

    /// Writes a well-formed chain from descriptor `head` on: address, length, whether the device writes.
    pub(crate) fn chain(&self, head: u16, pieces: &[(u64, u32, bool)]) {
        for (index, &(address, length, write)) in pieces.iter().enumerate() {
            let last = index + 1 == pieces.len();
            let flags = if write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let index = head + index as u16;
            self.describe(
                index,
                Piece {
                    address,
                    length,
                    flags,
                    next: index + 1,
                },
            );
        }
    }

    /// Makes the chain at `head` available, without telling.
    pub(crate) fn offer(&mut self, head: u16) {
        let ring = self.rings() + AVAILABLE;
        let place = ring + 4 + 2 * u64::from(self.available % QUEUE_SIZE);
        self.memory.write_obj(head, GuestAddress(place)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available(self.available);
    }

    /// Says that so many chains were made available.
    pub(crate) fn set_available(&self, index: u16) {
        self.memory
            .write_obj(index, GuestAddress(self.rings() + AVAILABLE + 2))
            .unwrap();
    }

    /// Asks for no interrupts.
    pub(crate) fn poll_only(&self) {
        self.memory
            .write_obj(1u16, GuestAddress(self.rings() + AVAILABLE))
            .unwrap();
    }

    /// Tells the device.
    pub(crate) fn notify(&self) {
        set(self.transport, register::QUEUE_NOTIFY, self.queue as u32);
    }

    /// The next completed chain and how many bytes the device says it wrote.
    pub(crate) fn used(&mut self) -> Option<(u32, u32)> {
        let ring = self.rings() + USED;
        if self.memory.read_obj::<u16>(GuestAddress(ring + 2)).unwrap() == self.used {
            return None;
        }
        let place = ring + 4 + 8 * u64::from(self.used % QUEUE_SIZE);
        self.used = self.used.wrapping_add(1);
        Some((
            self.memory.read_obj(GuestAddress(place)).unwrap(),
            self.memory.read_obj(GuestAddress(place + 4)).unwrap(),
        ))
    }

    /// Waits for the next completed chain.
    pub(crate) async fn wait_used(&mut self) -> (u32, u32) {
        let mut used = None;
        crate::devices::testing::until("a request was completed", || {
            used = self.used();
            used.is_some()
        })
        .await;
        used.unwrap()
    }
}

/// Writes the features that the driver wants.
pub(crate) fn accept(transport: &Transport, features: u64) {
    for (select, half) in [features as u32, (features >> 32) as u32]
        .into_iter()
        .enumerate()
    {
        set(transport, register::DRIVER_FEATURES_SELECT, select as u32);
        set(transport, register::DRIVER_FEATURES, half);
    }
}

/// Resets the device.
pub(crate) fn reset(transport: &Transport) {
    set(transport, register::STATUS, 0);
}

/// Writes a register.
pub(crate) fn set(transport: &Transport, register: u64, value: u32) {
    transport.write(register, &value.to_le_bytes());
}

/// Reads a register.
pub(crate) fn get(transport: &Transport, register: u64) -> u32 {
    let mut data = [0; 4];
    transport.read(register, &mut data);
    u32::from_le_bytes(data)
}
