//! Kernels and initramfs that a machine boots: ELF with a PVH note or without, bzImage, or neither.

use vmm::boot::BootError;
use vmm::boot::linux::{ImageFile, LinuxImage, load};
use vmm::boot::start::Start;

use crate::file;
use crate::input::{Input, field};
use crate::target::{MemoryBound, Target};

/// The target.
pub const TARGET: Target = Target {
    name: "boot_image",
    run,
    seeds,
    input_bytes_max: 8192,
    // The bitmap of the guest's pages; contents go into the guest's memory, which is not of the heap.
    memory: MemoryBound {
        base: 1 << 20,
        each: 16,
    },
};

/// Memory of the machine, MiB: a bzImage goes to 16 MiB.
const MEMORY_MIB: u64 = 24;

fn run(data: &[u8]) {
    if let Some(Err(error)) = boot(data) {
        drop(error.to_string());
    }
}

/// Loads what the input says; `None` when the host gives no memory.
fn boot(data: &[u8]) -> Option<Result<Start, BootError>> {
    let mut input = Input(data);
    let (flags, initrd_bytes) = (input.u8(), u64::from(input.u16()));
    let cmdline = String::from_utf8_lossy(input.field()).into_owned();
    let files = file::holding(input.0).and_then(|kernel| {
        let initrd = file::holding(b"initrd")?;
        initrd.set_len(initrd_bytes)?;
        Ok((kernel, initrd))
    });
    let (kernel_file, initrd_file) = files.ok()?;
    let memory = vmm::memory::allocate(MEMORY_MIB).ok()?;
    let kernel = ImageFile::open("kernel", &file::path(&kernel_file)).ok()?;
    let initrd = ImageFile::open("initrd", &file::path(&initrd_file)).ok()?;
    let image = LinuxImage {
        kernel: &kernel,
        initrd: (flags & 1 != 0).then_some(&initrd),
        cmdline: &cmdline,
        vcpus: u32::from(flags >> 1 & 7) + 1,
        virtio_slots: usize::from(flags >> 4) % 10,
    };
    Some(load(&memory, &image))
}

/// A program header: what to load, from where, to where, how much.
fn program(kind: u32, offset: u64, address: u64, bytes: u64) -> Vec<u8> {
    let mut header = [kind.to_le_bytes(), 7u32.to_le_bytes()].concat();
    for word in [offset, address, address, bytes, bytes, 4] {
        header.extend(word.to_le_bytes());
    }
    header
}

fn elf(programs: &[Vec<u8>], rest: &[u8]) -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2u16.to_le_bytes(), 62u16.to_le_bytes()].concat());
    elf.extend(1u32.to_le_bytes());
    for word in [0x10_0000u64, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, programs.len() as u16, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(programs.concat());
    elf.extend(rest);
    elf
}

fn bzimage() -> Vec<u8> {
    let mut image = vec![0u8; 2 * 512 + 64];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &4u32.to_le_bytes()); // syssize, in 16 bytes
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]); // loadflags: loaded high
    put(0x214, &0x10_0000u32.to_le_bytes()); // code32_start
    put(0x258, &0x100_0000u64.to_le_bytes()); // pref_address
    put(0x260, &0x10_0000u32.to_le_bytes()); // init_size
    image
}

fn seeds() -> Vec<Vec<u8>> {
    let seed = |flags: u8, cmdline: &[u8], kernel: &[u8]| {
        [vec![flags, 100, 0], field(cmdline), kernel.to_vec()].concat()
    };
    let plain = elf(&[program(1, 0, 0x10_0000, 64)], &[0x90; 64]);
    // The Xen note of type 18 names the 32-bit entry.
    let note = [
        &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0][..],
        b"Xen\0",
        &[0, 0, 16, 0],
    ]
    .concat();
    let at = 64 + 2 * 56;
    let pvh = elf(
        &[
            program(1, 0, 0x10_0000, 64),
            program(4, at, 0, note.len() as u64),
        ],
        &note,
    );
    vec![
        seed(0, b"console=ttyS0", &plain),
        seed(1 | 1 << 4, b"quiet", &pvh),
        seed(1 | 1 << 1, b"console=ttyS0", &bzimage()),
        seed(0, b"", b"neither"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_kernels_of_each_kind_and_one_that_is_none() {
        let loaded: Vec<bool> = seeds()
            .iter()
            .map(|seed| boot(seed).unwrap().is_ok())
            .collect();
        assert_eq!(loaded, [true, true, true, false]);
    }
}
