//! The first registers, for each way a guest begins.

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, GDT_ADDRESS, PAGE_TABLES_ADDRESS, PAGE_TABLES_END};
use crate::devices::GuestMemory;
use crate::kvm::vm::asked;

/// How the guest begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit, CPL3 with IOPL 3, paging by [`write_identity_map`] with user pages.
    User64,
    /// 64-bit, CPL0, paging by [`write_identity_map`]: Linux's 64-bit boot protocol.
    Kernel64,
    /// 32-bit protected mode, no paging: PVH.
    Protected32,
}

/// Where the guest begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// How.
    pub mode: Mode,
    /// The first instruction.
    pub rip: u64,
    /// The first argument of the self-checking guest.
    pub rdi: u64,
    /// Linux's `boot_params`.
    pub rsi: u64,
    /// PVH's `hvm_start_info`.
    pub rbx: u64,
    /// Every vCPU begins there, its number in RSI. Else only the first does, and the others wait until it wakes them,
    /// as an operating system expects.
    pub on_every_vcpu: bool,
}

const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;
const TASK_SELECTOR: u16 = 0x18;

/// The task state segment: its I/O permission bitmap lets CPL3 use every port. IOPL 3 says the same, but
/// KVM's software emulation of it (PVM) forgets IOPL and asks the bitmap.
const TASK_ADDRESS: u64 = 0x1000;
const TASK_BITMAP_POINTER: u64 = 0x66;
const TASK_BITMAP: u16 = 0x68;
/// A bit a port, and a byte of ones behind them (Intel SDM, volume 1, "I/O Permission Bit Map").
const TASK_LIMIT: u32 = TASK_BITMAP as u32 + 0x1_0000 / 8;

/// CR0: PE, MP, ET, NE, WP, AM, PG.
const CR0_PAGING: u64 = 0x8005_0033;
/// CR0: PE, ET.
const CR0_PROTECTED: u64 = 0x11;
/// CR4: PAE, PGE, OSFXSR, OSXMMEXCPT.
const CR4_LONG: u64 = 0x6a0;
/// EFER: LME, LMA, NXE.
const EFER_LONG: u64 = 0xd00;
/// RFLAGS: its fixed bit; and with IOPL 3.
const FLAGS: u64 = 0x2;
const FLAGS_IOPL3: u64 = 0x3002;

fn segment(selector: u16, type_: u8, dpl: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: selector | u16::from(dpl),
        type_,
        present: 1,
        dpl,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// The 8 bytes of a descriptor.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    limit & 0xffff
        | (segment.base & 0xff_ffff) << 16
        | flags << 40
        | (limit >> 16 & 0xf) << 48
        | (segment.base >> 24 & 0xff) << 56
}

/// Puts the vCPUs at their start: all, or the first. `memory` gets the descriptor table.
///
/// # Errors
/// When KVM refuses.
pub fn apply(vcpus: &[VcpuFd], memory: &GuestMemory, start: &Start) -> Result<(), BootError> {
    let (dpl, long) = match start.mode {
        Mode::User64 => (3, true),
        Mode::Kernel64 => (0, true),
        Mode::Protected32 => (0, false),
    };
    let segments = Segments::new(dpl, long);
    segments.write(memory)?;
    for (index, vcpu) in (0..).zip(vcpus) {
        if index > 0 && !start.on_every_vcpu {
            break;
        }
        let mut sregs = vcpu.get_sregs().map_err(asked("segment registers"))?;
        segments.load(&mut sregs);
        match start.mode {
            Mode::User64 | Mode::Kernel64 => {
                sregs.cr0 = CR0_PAGING;
                sregs.cr3 = PAGE_TABLES_ADDRESS;
                sregs.cr4 = CR4_LONG;
                sregs.efer = EFER_LONG;
            }
            Mode::Protected32 => {
                sregs.cr0 = CR0_PROTECTED;
                sregs.cr4 = 0;
                sregs.efer = 0;
            }
        }
        vcpu.set_sregs(&sregs).map_err(asked("segment registers"))?;
        let regs = kvm_regs {
            rip: start.rip,
            rdi: start.rdi,
            rsi: if start.on_every_vcpu {
                index
            } else {
                start.rsi
            },
            rbx: start.rbx,
            rflags: if start.mode == Mode::User64 {
                FLAGS_IOPL3
            } else {
                FLAGS
            },
            ..Default::default()
        };
        vcpu.set_regs(&regs).map_err(asked("registers"))?;
        // With an irqchip all but the first wait for INIT and SIPI, of which this guest knows nothing.
        let runnable = kvm_mp_state {
            mp_state: KVM_MP_STATE_RUNNABLE,
        };
        vcpu.set_mp_state(runnable).map_err(asked("mp_state"))?;
    }
    Ok(())
}

/// What the first segment registers hold.
struct Segments {
    code: kvm_segment,
    data: kvm_segment,
    task: kvm_segment,
}

/// The descriptor table: nothing, code, data, and two words for the task, since in 64-bit mode a system descriptor has
/// 16 bytes.
const TABLE_WORDS: usize = 5;

impl Segments {
    fn new(dpl: u8, long: bool) -> Segments {
        Segments {
            code: segment(CODE_SELECTOR, 0xb, dpl, long),
            data: kvm_segment {
                db: 1,
                l: 0,
                ..segment(DATA_SELECTOR, 0x3, dpl, false)
            },
            task: kvm_segment {
                base: TASK_ADDRESS,
                limit: TASK_LIMIT,
                s: 0,
                g: 0,
                db: 0,
                ..segment(TASK_SELECTOR, 0xb, 0, false)
            },
        }
    }

    /// Writes the descriptor table and the task state segment, which all vCPUs share: nobody switches tasks.
    fn write(&self, memory: &GuestMemory) -> Result<(), BootError> {
        memory.write_obj(
            TASK_BITMAP,
            GuestAddress(TASK_ADDRESS + TASK_BITMAP_POINTER),
        )?;
        memory.write_obj(0xffu8, GuestAddress(TASK_ADDRESS + u64::from(TASK_LIMIT)))?;
        let table: [u64; TABLE_WORDS] = [
            0,
            descriptor(&self.code),
            descriptor(&self.data),
            descriptor(&self.task),
            0,
        ];
        for (index, entry) in table.iter().enumerate() {
            memory.write_obj(*entry, GuestAddress(GDT_ADDRESS + index as u64 * 8))?;
        }
        Ok(())
    }

    fn load(&self, sregs: &mut kvm_sregs) {
        let data = self.data;
        sregs.cs = self.code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = self.task;
        sregs.gdt.base = GDT_ADDRESS;
        sregs.gdt.limit = (TABLE_WORDS * 8 - 1) as u16;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
    }
}

/// LINT0 takes the PIC's interrupts and LINT1 the NMI, as firmware leaves them.
///
/// # Errors
/// When KVM refuses.
pub fn wire_local_interrupts(vcpu: &VcpuFd) -> Result<(), BootError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_NMI: u32 = 4;
    const MODE_EXTINT: u32 = 7;
    let mut lapic = vcpu.get_lapic().map_err(asked("the LAPIC's state"))?;
    for (register, mode) in [(LVT_LINT0, MODE_EXTINT), (LVT_LINT1, MODE_NMI)] {
        set_delivery_mode(&mut lapic, register, mode);
    }
    vcpu.set_lapic(&lapic).map_err(asked("the LAPIC's state"))?;
    Ok(())
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let mut bytes = [0; 4];
    for (byte, value) in bytes.iter_mut().zip(&lapic.regs[register..]) {
        *byte = *value as u8;
    }
    let value = u32::from_le_bytes(bytes) & !0x700 | mode << 8;
    for (place, byte) in lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
        *place = byte as _;
    }
}

/// Behind the PML4 and the PDPT: a directory for each GiB.
const DIRECTORIES_ADDRESS: u64 = PAGE_TABLES_ADDRESS + 0x2000;

/// The most that [`write_identity_map`] can map; one PDPT would do for 512 GiB.
pub(crate) const IDENTITY_MAP_BYTES_MAX: u64 =
    ((PAGE_TABLES_END - DIRECTORIES_ADDRESS) / 0x1000) << 30;

/// Maps each of the first `bytes` to itself, in 2 MiB pages that the kernel, and with `user` also
/// CPL3, may read, write and execute.
///
/// # Errors
/// When the tables do not fit below [`PAGE_TABLES_END`] or not into the guest's memory.
pub fn write_identity_map(memory: &GuestMemory, bytes: u64, user: bool) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0x3;
    const USER: u64 = 0x4;
    const LARGE: u64 = 0x80;
    let flags = PRESENT_WRITABLE | if user { USER } else { 0 };
    let gigabytes = bytes.div_ceil(1 << 30).max(4);
    let pdpt = PAGE_TABLES_ADDRESS + 0x1000;
    let directories = DIRECTORIES_ADDRESS;
    if gigabytes << 30 > IDENTITY_MAP_BYTES_MAX {
        return Err(BootError::NoRoom {
            what: "the table of all memory",
            memory_mib: bytes >> 20,
        });
    }
    memory.write_obj(pdpt | flags, GuestAddress(PAGE_TABLES_ADDRESS))?;
    for gigabyte in 0..gigabytes {
        let directory = directories + gigabyte * 0x1000;
        memory.write_obj(directory | flags, GuestAddress(pdpt + gigabyte * 8))?;
        let mut entries = Vec::with_capacity(4096);
        for page in 0..512 {
            let address = (gigabyte << 30) + (page << 21);
            entries.extend((address | flags | LARGE).to_le_bytes());
        }
        memory.write_slice(&entries, GuestAddress(directory))?;
    }
    Ok(())
}
