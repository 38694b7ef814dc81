//! The guest's driver for a virtio block device behind memory-mapped registers (virtio 1.x, sections 4.2 and 5.2).
//!
//! One queue, polled: a request is three descriptors (header, data, status) with a buffer of its own, so request `n`
//! always uses descriptors `3n` to `3n + 2`. The device is told not to interrupt: the guest has no interrupts.

use crate::abi::{BLOCKS_PER_FLUSH_MAX, PAGE_BYTES};
use crate::cpu;

/// Requests in flight at most, each with its buffer.
pub const REQUESTS: usize = BLOCKS_PER_FLUSH_MAX as usize;
/// Pages in the buffer of one request.
pub const BUFFER_PAGES: u64 = 16;

const QUEUE_SIZE: u16 = 64;
const SECTOR_BYTES: u64 = 512;

// Registers (virtio 1.x, table 4.1).
const MAGIC: u64 = 0x00;
const VERSION: u64 = 0x04;
const DEVICE_ID: u64 = 0x08;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_SIZE_SET: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const STATUS: u64 = 0x70;
const QUEUE_DESCRIPTORS: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;
const CONFIG_CAPACITY: u64 = 0x100;

const MAGIC_VALUE: u32 = 0x7472_6976;
const DEVICE_BLOCK: u32 = 2;
const FEATURE_FLUSH: u32 = 1 << 9;
const FEATURE_VERSION_1: u32 = 1; // Bit 32: the first of the second word.
const STATUS_ACKNOWLEDGE: u32 = 1;
const STATUS_DRIVER: u32 = 2;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;

const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;
const AVAILABLE_NO_INTERRUPT: u16 = 1;

/// What a request asks for (the type field of its header).
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Read blocks into the buffer.
    Read = 0,
    /// Write the buffer.
    Write = 1,
    /// Make everything written durable.
    Flush = 4,
}

/// Status byte before the device has answered.
const STATUS_PENDING: u8 = 0xff;

/// Everything that the device reads and writes, each part aligned as the specification demands.
#[repr(C, align(4096))]
struct Shared {
    descriptors: [[u64; 2]; QUEUE_SIZE as usize],
    available: [u16; 4 + QUEUE_SIZE as usize],
    used: Used,
    headers: [[u64; 2]; REQUESTS],
    statuses: [u8; REQUESTS],
}

#[repr(C, align(16))]
struct Used([u32; 2 + 2 * QUEUE_SIZE as usize]);

#[repr(align(4096))]
#[allow(dead_code)] // Used by address.
struct Buffers([[u8; (PAGE_BYTES * BUFFER_PAGES) as usize]; REQUESTS]);

static mut SHARED: Shared = Shared {
    descriptors: [[0; 2]; QUEUE_SIZE as usize],
    available: [0; 4 + QUEUE_SIZE as usize],
    used: Used([0; 2 + 2 * QUEUE_SIZE as usize]),
    headers: [[0; 2]; REQUESTS],
    statuses: [0; REQUESTS],
};
static mut BUFFERS: Buffers = Buffers([[0; (PAGE_BYTES * BUFFER_PAGES) as usize]; REQUESTS]);

/// A device ready for requests.
pub struct BlockDevice {
    registers: u64,
    shared: u64,
    submitted: u16,
    completed: u16,
}

impl BlockDevice {
    /// Brings the device behind `registers` up, with at least `blocks` blocks.
    ///
    /// # Errors
    /// The register value that is not as it must be.
    pub fn start(registers: u64, blocks: u64) -> Result<Self, u64> {
        let get = |register: u64| cpu::read::<u32>(registers + register);
        let set = |register: u64, value: u32| cpu::write::<u32>(registers + register, value);
        let set64 = |register: u64, value: u64| {
            set(register, value as u32);
            set(register + 4, (value >> 32) as u32);
        };
        for (register, right) in [(MAGIC, MAGIC_VALUE), (VERSION, 2), (DEVICE_ID, DEVICE_BLOCK)] {
            if get(register) != right {
                return Err(u64::from(get(register)));
            }
        }
        set(STATUS, 0);
        set(STATUS, STATUS_ACKNOWLEDGE);
        set(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        set(DEVICE_FEATURES_SELECT, 0);
        let low = get(DEVICE_FEATURES);
        set(DEVICE_FEATURES_SELECT, 1);
        let high = get(DEVICE_FEATURES);
        if low & FEATURE_FLUSH == 0 || high & FEATURE_VERSION_1 == 0 {
            return Err(u64::from(low) | u64::from(high) << 32);
        }
        set(DRIVER_FEATURES_SELECT, 0);
        set(DRIVER_FEATURES, FEATURE_FLUSH);
        set(DRIVER_FEATURES_SELECT, 1);
        set(DRIVER_FEATURES, FEATURE_VERSION_1);
        let status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
        set(STATUS, status);
        if get(STATUS) != status {
            return Err(u64::from(get(STATUS)));
        }
        let capacity = u64::from(get(CONFIG_CAPACITY)) | u64::from(get(CONFIG_CAPACITY + 4)) << 32;
        if capacity < blocks * (PAGE_BYTES / SECTOR_BYTES) {
            return Err(capacity);
        }
        set(QUEUE_SELECT, 0);
        if get(QUEUE_SIZE_MAX) < u32::from(QUEUE_SIZE) || get(QUEUE_READY) != 0 {
            return Err(u64::from(get(QUEUE_SIZE_MAX)));
        }
        let shared = &raw const SHARED as u64;
        let device = Self { registers, shared, submitted: 0, completed: 0 };
        cpu::write(device.available(), AVAILABLE_NO_INTERRUPT);
        set(QUEUE_SIZE_SET, u32::from(QUEUE_SIZE));
        set64(QUEUE_DESCRIPTORS, shared);
        set64(QUEUE_DRIVER, device.available());
        set64(QUEUE_DEVICE, device.used());
        set(QUEUE_READY, 1);
        set(STATUS, status | STATUS_DRIVER_OK);
        Ok(device)
    }

    /// The buffer of request `request`.
    pub fn buffer(request: usize) -> u64 {
        &raw const BUFFERS as u64 + request as u64 * PAGE_BYTES * BUFFER_PAGES
    }

    /// Puts request `request`, which is not in flight, into the queue: `blocks` blocks from `block` on.
    pub fn submit(&mut self, request: usize, ask: Ask, block: u64, blocks: u64) {
        let header = self.shared + core::mem::offset_of!(Shared, headers) as u64 + 16 * request as u64;
        let status = self.status(request);
        let sector = if ask == Ask::Flush { 0 } else { block * (PAGE_BYTES / SECTOR_BYTES) };
        cpu::write(header, ask as u64);
        cpu::write(header + 8, sector);
        cpu::write(status, STATUS_PENDING);
        let head = 3 * request as u16;
        self.describe(head, header, 16, DESCRIPTOR_NEXT, if ask == Ask::Flush { head + 2 } else { head + 1 });
        let direction = if ask == Ask::Read { DESCRIPTOR_WRITE } else { 0 };
        self.describe(
            head + 1,
            Self::buffer(request),
            (blocks * PAGE_BYTES) as u32,
            DESCRIPTOR_NEXT | direction,
            head + 2,
        );
        self.describe(head + 2, status, 1, DESCRIPTOR_WRITE, 0);
        cpu::write(self.available() + 4 + 2 * u64::from(self.submitted % QUEUE_SIZE), head);
        cpu::barrier();
        self.submitted = self.submitted.wrapping_add(1);
        cpu::write(self.available() + 2, self.submitted);
    }

    /// Tells the device that requests were submitted.
    pub fn notify(&self) {
        cpu::barrier();
        cpu::write::<u32>(self.registers + QUEUE_NOTIFY, 0);
    }

    /// The next completed request and its status byte.
    pub fn completed(&mut self) -> Option<(usize, u8)> {
        if cpu::read::<u16>(self.used() + 2) == self.completed {
            return None;
        }
        cpu::barrier();
        let entry = self.used() + 4 + 8 * u64::from(self.completed % QUEUE_SIZE);
        let head = cpu::read::<u32>(entry);
        self.completed = self.completed.wrapping_add(1);
        let request = (head / 3) as usize % REQUESTS;
        Some((request, cpu::read(self.status(request))))
    }

    fn available(&self) -> u64 {
        self.shared + core::mem::offset_of!(Shared, available) as u64
    }

    fn used(&self) -> u64 {
        self.shared + core::mem::offset_of!(Shared, used) as u64
    }

    fn status(&self, request: usize) -> u64 {
        self.shared + core::mem::offset_of!(Shared, statuses) as u64 + request as u64
    }

    fn describe(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let place = self.shared + 16 * u64::from(index);
        cpu::write(place, address);
        cpu::write(place + 8, u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48);
    }
}
