//! Loading Linux: an ELF kernel by its PVH entry, or by the 64-bit boot protocol, as a bzImage is.
//!
//! The protocols: Documentation/arch/x86/boot.rst of Linux ("64-bit boot protocol", "zero page"),
//! and Xen's docs/misc/pvh.pandoc.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult, load_cmdline};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::start::{Mode, Start, write_identity_map};
use super::{BootError, mptable};
use crate::devices::GuestMemory;
use crate::layout::{VIRTIO_MMIO_SLOT_BYTES, VIRTIO_SLOTS_MAX, virtio_irq, virtio_mmio_address};

/// The longest command line that Linux takes.
const CMDLINE_BYTES_MAX: usize = 2048;
/// What a device adds to it at most: ` virtio_mmio.device=4K@0xd0008000:15`.
const CMDLINE_DEVICE_BYTES: usize = 37;
/// What is left of it for the machine's own, with every slot occupied and a closing zero.
pub(crate) const CMDLINE_ROOM_BYTES: usize =
    CMDLINE_BYTES_MAX - VIRTIO_SLOTS_MAX * CMDLINE_DEVICE_BYTES - 1;
const CMDLINE_ADDRESS: u64 = 0x9_1000;
const ZERO_PAGE_ADDRESS: u64 = 0x9_2000;
const START_INFO_ADDRESS: u64 = 0x9_4000;
const MODULES_ADDRESS: u64 = 0x9_4100;
const MEMORY_MAP_ADDRESS: u64 = 0x9_4200;
/// Where kernels lie at the lowest.
const HIGH_MEMORY: u64 = 0x10_0000;
/// Where a bzImage is put, unless it prefers another place.
const KERNEL_ADDRESS: u64 = 0x100_0000;
/// From the 64-bit kernel's start to its 64-bit entry.
const ENTRY_64: u64 = 0x200;
/// The largest initramfs: what Linux addresses with the fields used.
const INITRD_BYTES_MAX: u64 = 1 << 30;
const E820_RAM: u32 = 1;
const PVH_MAGIC: u32 = 0x336e_c578;
const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = 0x5372_6448;
/// "A loader without a number of its own".
const LOADER_UNKNOWN: u8 = 0xff;

/// A file to load from, open.
#[derive(Debug)]
pub struct ImageFile {
    path: PathBuf,
    file: File,
}

impl ImageFile {
    /// Opens the `what` at `path`.
    ///
    /// # Errors
    /// [`BootError::File`].
    pub fn open(what: &'static str, path: &Path) -> Result<ImageFile, BootError> {
        let path = path.to_owned();
        match File::open(&path) {
            Ok(file) => Ok(ImageFile { path, file }),
            Err(source) => Err(BootError::File { what, path, source }),
        }
    }
}

/// What to load.
#[derive(Clone, Debug)]
pub struct LinuxImage<'a> {
    /// An ELF vmlinux or a bzImage.
    pub kernel: &'a ImageFile,
    /// An initramfs.
    pub initrd: Option<&'a ImageFile>,
    /// The command line; the devices are appended.
    pub cmdline: &'a str,
    /// How many vCPUs the machine has.
    pub vcpus: u32,
    /// How many virtio-mmio slots are occupied.
    pub virtio_slots: usize,
}

/// Loads kernel, initramfs, command line and tables; answers where the first vCPU begins.
///
/// # Errors
/// See [`BootError`].
pub fn load(memory: &GuestMemory, image: &LinuxImage<'_>) -> Result<Start, BootError> {
    let memory_mib = memory.iter().map(|region| region.len()).sum::<u64>() >> 20;
    let path = &image.kernel.path;
    let mut file = image
        .kernel
        .file
        .try_clone()
        .map_err(|source| BootError::File {
            what: "kernel",
            path: path.clone(),
            source,
        })?;
    let bad = |reason: String| BootError::Kernel {
        path: path.clone(),
        reason,
    };
    let magic = read_start(image.kernel, 4)?;
    let (kernel, end) = if magic == b"\x7fELF" {
        let kernel = Elf::load(
            memory.as_ref(),
            None,
            &mut file,
            Some(GuestAddress(HIGH_MEMORY)),
        )
        .map_err(|error| bad(error.to_string()))?;
        (
            kernel,
            elf_end(image.kernel)
                .ok_or_else(|| bad("its program headers are not readable".into()))?,
        )
    } else {
        let kernel = BzImage::load(
            memory.as_ref(),
            Some(GuestAddress(KERNEL_ADDRESS)),
            &mut file,
            Some(GuestAddress(HIGH_MEMORY)),
        )
        .map_err(|error| bad(error.to_string()))?;
        let header = kernel
            .setup_header
            .ok_or_else(|| bad("it has no setup header".into()))?;
        let (preferred, init_size) = (header.pref_address, u64::from(header.init_size));
        let unpacked = preferred.checked_add(init_size).ok_or_else(|| {
            bad(format!(
                "it prefers the address {preferred:#x}, which no machine has"
            ))
        })?;
        let end = kernel
            .kernel_end
            .max(unpacked)
            .max(KERNEL_ADDRESS + init_size);
        (kernel, end)
    };
    let initrd = match image.initrd {
        Some(initrd) => Some(load_initrd(memory, initrd, end, memory_mib)?),
        None => None,
    };
    write_cmdline(memory, image)?;
    mptable::write(memory, image.vcpus)?;
    match kernel.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => {
            write_pvh(memory, initrd)?;
            let rip = entry.raw_value();
            Ok(Start {
                mode: Mode::Protected32,
                rip,
                rdi: 0,
                rsi: 0,
                rbx: START_INFO_ADDRESS,
                on_every_vcpu: false,
            })
        }
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
            write_identity_map(memory, 4 << 30, false)?;
            write_zero_page(memory, &kernel, initrd)?;
            let offset = if kernel.setup_header.is_some() {
                ENTRY_64
            } else {
                0
            };
            let rip = kernel.kernel_load.raw_value() + offset;
            Ok(Start {
                mode: Mode::Kernel64,
                rip,
                rdi: 0,
                rsi: ZERO_PAGE_ADDRESS,
                rbx: 0,
                on_every_vcpu: false,
            })
        }
    }
}

/// A kernel's first `bytes`, or as many as it has.
fn read_start(kernel: &ImageFile, bytes: u64) -> Result<Vec<u8>, BootError> {
    let read = || -> std::io::Result<Vec<u8>> {
        let bytes = bytes.min(kernel.file.metadata()?.len());
        let mut start = vec![0; bytes as usize];
        kernel.file.read_exact_at(&mut start, 0)?;
        Ok(start)
    };
    read().map_err(|source| BootError::File {
        what: "kernel",
        path: kernel.path.clone(),
        source,
    })
}

/// The end of an ELF's memory, its unwritten part (bss, brk) included, which the loader leaves out.
fn elf_end(kernel: &ImageFile) -> Option<u64> {
    let header = read_start(kernel, 64).ok()?;
    let at = |bytes: &[u8], offset: usize| -> Option<u64> {
        Some(u64::from_le_bytes(
            bytes.get(offset..offset + 8)?.try_into().ok()?,
        ))
    };
    let (table, entries) = (
        at(&header, 32)?,
        u16::from_le_bytes([*header.get(56)?, *header.get(57)?]),
    );
    let bytes = read_start(kernel, table.checked_add(u64::from(entries) * 56)?).ok()?;
    let mut end = 0;
    for index in 0..usize::from(entries) {
        let entry = bytes.get(table as usize + index * 56..)?;
        let load = entry.get(..4)? == [1, 0, 0, 0];
        if load {
            end = end.max(at(entry, 24)?.checked_add(at(entry, 40)?)?);
        }
    }
    Some(end)
}

/// Puts the initramfs behind the kernel, so that a `mem=` on the command line leaves it inside.
fn load_initrd(
    memory: &GuestMemory,
    initrd: &ImageFile,
    kernel_end: u64,
    memory_mib: u64,
) -> Result<(u64, u64), BootError> {
    let error = |source| BootError::File {
        what: "initrd",
        path: initrd.path.clone(),
        source,
    };
    let mut file = initrd.file.try_clone().map_err(error)?;
    let length = file.metadata().map_err(error)?.len();
    let fits = |address: &u64| {
        length <= INITRD_BYTES_MAX
            && memory.check_range(GuestAddress(*address), length as usize)
            && *address + length < 1 << 32
    };
    let address = kernel_end
        .checked_next_multiple_of(2 << 20)
        .filter(fits)
        .ok_or(BootError::NoRoom {
            what: "the initrd",
            memory_mib,
        })?;
    memory.read_exact_volatile_from(GuestAddress(address), &mut file, length as usize)?;
    Ok((address, length))
}

fn write_cmdline(memory: &GuestMemory, image: &LinuxImage<'_>) -> Result<(), BootError> {
    let bad = |error: linux_loader::cmdline::Error| BootError::Cmdline(error.to_string());
    let mut line = Cmdline::new(CMDLINE_BYTES_MAX).map_err(bad)?;
    line.insert_str(image.cmdline).map_err(bad)?;
    for slot in 0..image.virtio_slots {
        let address = GuestAddress(virtio_mmio_address(slot));
        line.add_virtio_mmio_device(VIRTIO_MMIO_SLOT_BYTES, address, virtio_irq(slot), None)
            .map_err(bad)?;
    }
    load_cmdline(memory.as_ref(), GuestAddress(CMDLINE_ADDRESS), &line)
        .map_err(|error| BootError::Cmdline(error.to_string()))
}

/// RAM as the guest may use it: without the MP table's KiB and the hole below 1 MiB.
fn usable(memory: &GuestMemory) -> Vec<(u64, u64)> {
    let mut ranges = vec![(0, mptable::MPTABLE_ADDRESS)];
    for region in memory.iter() {
        let (start, length) = (region.start_addr().raw_value(), region.len());
        match start {
            0 => ranges.push((HIGH_MEMORY, length.saturating_sub(HIGH_MEMORY))),
            _ => ranges.push((start, length)),
        }
    }
    ranges
}

fn write_pvh(memory: &GuestMemory, initrd: Option<(u64, u64)>) -> Result<(), BootError> {
    let map: Vec<_> = usable(memory)
        .into_iter()
        .map(|(addr, size)| hvm_memmap_table_entry {
            addr,
            size,
            type_: E820_RAM,
            reserved: 0,
        })
        .collect();
    let info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        cmdline_paddr: CMDLINE_ADDRESS,
        memmap_paddr: MEMORY_MAP_ADDRESS,
        memmap_entries: map.len() as u32,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { MODULES_ADDRESS } else { 0 },
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO_ADDRESS));
    params.set_sections(&map, GuestAddress(MEMORY_MAP_ADDRESS));
    if let Some((paddr, size)) = initrd {
        let module = hvm_modlist_entry {
            paddr,
            size,
            ..Default::default()
        };
        params.set_modules(&[module], GuestAddress(MODULES_ADDRESS));
    }
    PvhBootConfigurator::write_bootparams(&params, memory.as_ref())
        .map_err(|error| BootError::Cmdline(error.to_string()))
}

fn write_zero_page(
    memory: &GuestMemory,
    kernel: &KernelLoaderResult,
    initrd: Option<(u64, u64)>,
) -> Result<(), BootError> {
    let mut page = boot_params::default();
    if let Some(header) = kernel.setup_header {
        page.hdr = header;
    }
    page.hdr.boot_flag = BOOT_FLAG;
    page.hdr.header = HDRS;
    page.hdr.type_of_loader = LOADER_UNKNOWN;
    page.hdr.cmd_line_ptr = CMDLINE_ADDRESS as u32;
    page.hdr.cmdline_size = CMDLINE_BYTES_MAX as u32;
    if let Some((address, length)) = initrd {
        page.hdr.ramdisk_image = address as u32;
        page.hdr.ramdisk_size = length as u32;
    }
    for (index, (addr, size)) in usable(memory).into_iter().enumerate() {
        page.e820_table[index] = boot_e820_entry {
            addr,
            size,
            r#type: E820_RAM,
        };
        page.e820_entries = index as u8 + 1;
    }
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&page, GuestAddress(ZERO_PAGE_ADDRESS)),
        memory.as_ref(),
    )
    .map_err(|error| BootError::Cmdline(error.to_string()))
}

#[cfg(test)]
mod tests;
