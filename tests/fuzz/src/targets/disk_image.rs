//! Raw images that disks are made of: size and kind are looked at, then every block.

use storage_broker::fuzzing::read_image;

use crate::file;
use crate::input::Input;
use crate::runtime::block_on;
use crate::target::{MemoryBound, Target};

/// The target.
pub const TARGET: Target = Target {
    name: "disk_image",
    run,
    seeds,
    input_bytes_max: 4096,
    // A block of 256 KiB at a time, read by a thread.
    memory: MemoryBound {
        base: 1 << 20,
        each: 16,
    },
};

/// The largest file made, bytes: three blocks and a half.
const FILE_BYTES_MAX: u64 = 7 << 17;

fn run(data: &[u8]) {
    let mut input = Input(data);
    let (disk_bytes, file_bytes) = (input.u64(), u64::from(input.u32()) % FILE_BYTES_MAX);
    let content = input.0;
    let Ok(image) = file::holding(content) else {
        return;
    };
    // The rest is a hole.
    let length = file_bytes.max(content.len() as u64);
    if image.set_len(length).is_err() {
        return;
    }
    match block_on(read_image(&file::path(&image), disk_bytes)) {
        Ok(blocks) => {
            assert!(
                length <= disk_bytes,
                "an image larger than its disk was taken"
            );
            let found = content.iter().any(|byte| *byte != 0);
            assert_eq!(blocks > 0, found, "contents were lost or made up");
        }
        Err(error) => drop(error.to_string()),
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let seed = |disk_bytes: u64, file_bytes: u32, content: &[u8]| {
        [
            &disk_bytes.to_le_bytes(),
            &file_bytes.to_le_bytes()[..],
            content,
        ]
        .concat()
    };
    vec![
        seed(1 << 20, 0, b"\x33\xc0\x8e\xd0boot sector"),
        seed(1 << 20, 700_000, &[0; 16]),
        seed(512, 1_024, b"too large"),
        seed(1 << 20, 0, b"QFI\xfb\0\0\0\x03"),
        seed(1 << 20, 0, b"vhdxfile"),
        seed(1 << 20, 0, b"KDMV"),
    ]
}
