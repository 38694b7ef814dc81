//! What a guest does to its devices: registers, rings and ports with any values at any time.

use crate::bench::Bench;
use crate::guest::{act, driver, port, request};
use crate::input::Input;
use crate::runtime::block_on_alone;
use crate::target::{MemoryBound, Target};

/// The target.
pub const TARGET: Target = Target {
    name: "guest_io",
    run,
    seeds,
    input_bytes_max: 4096,
    // 64 requests on the disk at a time, each within what a queue's buffers may have; and the disk itself.
    memory: MemoryBound {
        base: 300 << 20,
        each: 64,
    },
};

fn run(data: &[u8]) {
    block_on_alone(async {
        if let Some(bench) = Bench::new() {
            bench.devices.iter().for_each(|device| device.resume());
            act(&bench, Input(data)).await;
        }
    });
}

fn seeds() -> Vec<Vec<u8>> {
    let (read, write, flush, id, odd) = (0, 1, 4, 8, 11);
    let with = |steps: Vec<u8>| [driver(), steps].concat();
    vec![
        with([request(write, 1, 512), request(read, 1, 1024)].concat()),
        with(request(flush, 0, 0)),
        with(request(id, 0, 20)),
        with(request(odd, 0, 512)),
        with(request(read, 511, 1024)),
        [
            port(0x3f8, b"a"),
            port(0x3f9, &[1]),
            port(0x3fb, &[0x80]),
            port(0x510, &[1, 0, 0, 0]),
        ]
        .concat(),
        [port(0x64, &[0xfe]), port(0x518, &[0, 0, 0, 0])].concat(),
    ]
}
