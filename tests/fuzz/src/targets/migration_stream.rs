//! What a migration's source sends: the destination may refuse it, and writes nothing outside the guest's memory.
//!
//! ```text
//!  first byte   0       a connection's first frame
//!               1       one channel's stream as it is
//!               else    frames of two channels with right sums: any kind, any order, any size
//! ```

use std::io::Cursor;
use std::sync::Arc;

use migration_core::fuzzing::{Receiver, introduce, seal};

use crate::input::{Input, field};
use crate::runtime::block_on;
use crate::source::{
    CHANNELS, FINAL, FRAMES_MAX, HEARTBEAT, Memory, ROUND_END, SETUP, Source, setup, whole_machine,
};
use crate::target::{MemoryBound, Target};

/// The target.
pub const TARGET: Target = Target {
    name: "migration_stream",
    run,
    seeds,
    input_bytes_max: 4096,
    // One frame of the largest kind, twice: as it is made here, and while its buffer grows. A page is named by
    // a few bytes of the input and made here.
    memory: MemoryBound {
        base: 4 << 20,
        each: 64,
    },
};

fn run(data: &[u8]) {
    let Some((mode, rest)) = data.split_first() else {
        return;
    };
    match mode {
        0 => {
            let _ = block_on(introduce(Box::new(Cursor::new(rest.to_vec()))));
        }
        1 => {
            let mut receiver = Receiver::new(Arc::new(Memory::default()), 1);
            let stream = Box::new(Cursor::new(rest.to_vec()));
            let _ = block_on(receiver.listen(0, stream));
        }
        _ => frames(Input(rest)),
    }
}

fn frames(mut input: Input<'_>) {
    let mut receiver = Receiver::new(Arc::new(Memory::default()), CHANNELS);
    let mut source = Source::default();
    for sequence in 0..FRAMES_MAX {
        if input.is_empty() {
            return;
        }
        let choice = input.u8();
        let channel = u16::from(choice >> 7);
        let (kind, payload) = source.frame(usize::from(channel), choice & 0x7f, &mut input);
        let frame = seal(kind, sequence as u32, &payload);
        if receiver.take(channel, &frame).is_err() {
            return;
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let mut hello = vec![1, 0, 1, 0, 1, 0, 0, 0, 1, 0];
    hello.extend(7u64.to_le_bytes());
    hello.extend([5; 32]);
    let stream = [seal(SETUP, 0, &setup(0)), seal(HEARTBEAT, 1, &[])].concat();
    let of_two = [0x80 | ROUND_END, 0, 1, FINAL, 0, CHANNELS as u8];
    let machine = whole_machine();
    vec![
        [&[2], &machine[..]].concat(),
        [&[2], &machine[..machine.len() - 3], &of_two].concat(),
        [vec![0], seal(1, 0, &hello)].concat(),
        [vec![0], seal(20, 0, b"the source gives up")].concat(),
        [vec![1], stream].concat(),
        [vec![2, 0x10, 20], field(b"the source gives up")].concat(),
    ]
}
