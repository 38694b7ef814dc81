//! What a guest does to its devices, read off an input: registers, ports and memory, in any order.

use crate::bench::Bench;
use crate::input::{Input, field};

/// Steps of one input at most.
const STEPS_MAX: usize = 256;

/// Lets the guest do what the input says.
pub async fn act(bench: &Bench, mut input: Input<'_>) {
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        match input.u8() % 6 {
            0 => bench.write_register(u64::from(input.u16()), &input.u32().to_le_bytes()),
            1 => bench.read_register(u64::from(input.u16()), &mut [0xff; 4]),
            2 => {
                let address = u64::from(input.u32());
                bench.write_memory(address, input.field());
            }
            3 => {
                let (port, bytes) = (input.u16(), usize::from(input.u8() % 9));
                bench.write_port(port, input.bytes(bytes));
            }
            4 => {
                let (port, bytes) = (input.u16(), usize::from(input.u8() % 9));
                bench.read_port(port, &mut [0xff; 8][..bytes.min(8)]);
            }
            _ => bench.turn().await,
        }
    }
    bench.turn().await;
}

/// A step that writes a register of the disk.
pub fn register(offset: u64, value: u32) -> Vec<u8> {
    [
        &[0],
        &(offset as u16).to_le_bytes()[..],
        &value.to_le_bytes(),
    ]
    .concat()
}

/// A step that writes memory.
pub fn memory(address: u32, data: &[u8]) -> Vec<u8> {
    [&[2], &address.to_le_bytes()[..], &field(data)].concat()
}

/// A step that writes a port.
pub fn port(port: u16, data: &[u8]) -> Vec<u8> {
    [&[3], &port.to_le_bytes()[..], &[data.len() as u8], data].concat()
}

/// The steps by which a driver brings the disk up with one queue of 16 at 1 MiB.
pub fn driver() -> Vec<u8> {
    use vmm::devices::virtio::mmio::register as r;
    let steps = [
        (r::STATUS, 0),
        (r::STATUS, 1),
        (r::STATUS, 3),
        (r::DRIVER_FEATURES_SELECT, 1),
        (r::DRIVER_FEATURES, 1),
        (r::STATUS, 11),
        (r::QUEUE_SELECT, 0),
        (r::QUEUE_SIZE, 16),
        (r::QUEUE_DESCRIPTORS_LOW, 0x10_0000),
        (r::QUEUE_DRIVER_LOW, 0x10_4000),
        (r::QUEUE_DEVICE_LOW, 0x10_8000),
        (r::QUEUE_READY, 1),
        (r::STATUS, 15),
    ];
    steps
        .iter()
        .flat_map(|&(offset, value)| register(offset, value))
        .collect()
}

/// The steps of one request: its head, its piece of data, its status, the ring, the notification.
pub fn request(kind: u32, sector: u64, bytes: u32) -> Vec<u8> {
    use vmm::devices::virtio::mmio::register as r;
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    let descriptor = |address: u64, length: u32, flags: u16, next: u16| {
        [
            &address.to_le_bytes(),
            &length.to_le_bytes()[..],
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ]
        .concat()
    };
    let to_guest = if kind == 1 { 0 } else { WRITE };
    let chain = [
        descriptor(0x20_0000, 16, NEXT, 1),
        descriptor(0x20_1000, bytes, NEXT | to_guest, 2),
        descriptor(0x28_0000, 1, WRITE, 0),
    ]
    .concat();
    let head = [&kind.to_le_bytes(), &[0; 4][..], &sector.to_le_bytes()].concat();
    [
        memory(0x20_0000, &head),
        memory(0x10_0000, &chain),
        memory(0x10_4000, &[0, 0, 1, 0, 0, 0]),
        register(r::QUEUE_NOTIFY, 0),
        vec![5],
    ]
    .concat()
}
