//! Kernels whose headers ask for what no machine has: refused with words, whatever is added up.

use super::*;

const MEMORY_MIB: u64 = 24;

/// Tries to load these bytes as a kernel, with a small initramfs.
fn refused(kernel: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let (path, initrd) = (folder.path().join("kernel"), folder.path().join("initrd"));
    std::fs::write(&path, kernel).unwrap();
    std::fs::write(&initrd, b"initrd").unwrap();
    let memory = crate::memory::allocate(MEMORY_MIB).unwrap();
    let (kernel, initrd) = (
        ImageFile::open("kernel", &path).unwrap(),
        ImageFile::open("initrd", &initrd).unwrap(),
    );
    let image = LinuxImage {
        kernel: &kernel,
        initrd: Some(&initrd),
        cmdline: "",
        vcpus: 1,
        virtio_slots: 0,
    };
    load(&memory, &image).unwrap_err().to_string()
}

/// A bzImage without code that wants to be unpacked there.
fn bzimage(preferred: u64) -> Vec<u8> {
    let mut image = vec![0; 3 * 512];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000_u32.to_le_bytes());
    put(0x258, &preferred.to_le_bytes());
    put(0x260, &0x10_0000_u32.to_le_bytes());
    image
}

/// An ELF of one segment, whose unwritten part reaches there.
fn elf(end: u64) -> Vec<u8> {
    const ADDRESS: u64 = 0x10_0000;
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [ADDRESS, 64, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    image.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    for word in [0, ADDRESS, ADDRESS, 64, end - ADDRESS, 4] {
        image.extend(word.to_le_bytes());
    }
    image
}

#[test]
fn a_kernel_that_prefers_an_address_at_the_end_of_all_is_refused() {
    let problem = refused(&bzimage(u64::MAX - 0x1000));
    assert!(problem.contains("prefers the address"), "{problem}");
}

#[test]
fn an_initrd_has_no_room_behind_a_kernel_that_ends_beyond_memory() {
    for kernel in [
        bzimage(1 << 40),
        bzimage(u64::MAX - 0x10_0000),
        elf(1 << 40),
        elf(u64::MAX - 1),
    ] {
        let problem = refused(&kernel);
        assert!(problem.contains("initrd"), "{problem}");
    }
}

#[test]
fn the_longest_command_line_has_room_beside_every_device() {
    use cluster_model::limits::{CMDLINE_BYTES_MAX, SLOTS_MAX};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kernel");
    std::fs::write(&path, b"").unwrap();
    let image = LinuxImage {
        kernel: &ImageFile::open("kernel", &path).unwrap(),
        initrd: None,
        cmdline: &"x".repeat(CMDLINE_BYTES_MAX),
        vcpus: 1,
        virtio_slots: SLOTS_MAX,
    };
    let memory = crate::memory::allocate(MEMORY_MIB).unwrap();
    write_cmdline(&memory, &image).unwrap();
}
