//! Where things lie in the guest's physical address space and among its ports and interrupts.

/// The page size that dirty logging and migration count in.
pub const PAGE_BYTES: u64 = 4096;

/// RAM below this address is one region from zero; what does not fit lies from [`HIGH_RAM_START`].
pub const LOW_RAM_END: u64 = 0xd000_0000;

/// Where RAM goes on above the devices.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// The first virtio-mmio slot.
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;

/// The bytes of one virtio-mmio slot.
pub const VIRTIO_MMIO_SLOT_BYTES: u64 = 0x1000;

/// How many virtio-mmio slots there are.
pub const VIRTIO_SLOTS_MAX: usize = VIRTIO_IRQS.len();

/// The interrupt of each slot: those that no device of the PC platform has.
const VIRTIO_IRQS: [u32; 9] = [5, 6, 7, 9, 10, 11, 12, 14, 15];

/// The address of a virtio-mmio slot.
pub const fn virtio_mmio_address(slot: usize) -> u64 {
    VIRTIO_MMIO_BASE + slot as u64 * VIRTIO_MMIO_SLOT_BYTES
}

/// The interrupt of a virtio-mmio slot below [`VIRTIO_SLOTS_MAX`].
pub const fn virtio_irq(slot: usize) -> u32 {
    VIRTIO_IRQS[slot]
}

/// COM1's first port.
pub const SERIAL_PORT: u64 = 0x3f8;

/// COM1's ports.
pub const SERIAL_PORTS: u64 = 8;

/// COM1's interrupt.
pub const SERIAL_IRQ: u32 = 4;

/// The self-checking guest's report device: its first port.
pub const REPORT_PORT: u64 = 0x510;

/// The report device's ports.
pub const REPORT_PORTS: u64 = 16;

/// The keyboard controller, of which only the reset line is there: port 0x64, value 0xfe.
pub const I8042_PORT: u64 = 0x60;

/// The keyboard controller's ports.
pub const I8042_PORTS: u64 = 5;
