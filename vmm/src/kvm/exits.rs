//! Why a vCPU left KVM_RUN, in the monitor's words; string I/O comes as its single accesses.

use kvm_ioctls::{VcpuExit, VcpuFd};

/// One exit.
#[derive(Debug)]
pub enum Exit<'a> {
    /// `in`: `size` bytes for each chunk of `data`.
    PioRead {
        /// The port.
        port: u16,
        /// Bytes of one access.
        size: usize,
        /// To be filled.
        data: &'a mut [u8],
    },
    /// `out`.
    PioWrite {
        /// The port.
        port: u16,
        /// Bytes of one access.
        size: usize,
        /// What was written.
        data: &'a [u8],
    },
    /// A read where no RAM is.
    MmioRead {
        /// Guest-physical.
        address: u64,
        /// To be filled.
        data: &'a mut [u8],
    },
    /// A write where no RAM is.
    MmioWrite {
        /// Guest-physical.
        address: u64,
        /// What was written.
        data: &'a [u8],
    },
    /// Kicked, or an application processor that is not up yet.
    Interrupted,
    /// HLT with no irqchip in the kernel.
    Halted,
    /// A triple fault, or a shutdown or reset event.
    ShutDown,
    /// KVM cannot run the guest, and how it says so.
    Failed(String),
}

/// Enters the guest until the next exit.
pub fn run(vcpu: &mut VcpuFd) -> Exit<'_> {
    // The exit is named first and its data fetched after, since the access size of string I/O
    // stands only in the run page, which `VcpuExit` keeps borrowed.
    let failed = match vcpu.run() {
        Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => return port_io(vcpu),
        Ok(VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..)) => return memory_io(vcpu),
        Ok(VcpuExit::Intr) => return Exit::Interrupted,
        Ok(VcpuExit::Hlt) => return Exit::Halted,
        Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(..)) => return Exit::ShutDown,
        Ok(VcpuExit::InternalError) => None,
        Ok(other) => Some(format!("{other:?}")),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
            return Exit::Interrupted;
        }
        Err(error) => Some(format!("KVM_RUN: {error}")),
    };
    Exit::Failed(failed.unwrap_or_else(|| internal_error(vcpu)))
}

fn port_io(vcpu: &mut VcpuFd) -> Exit<'_> {
    let run = vcpu.get_kvm_run();
    // SAFETY: the exit reason was KVM_EXIT_IO, for which the kernel fills this member.
    let io = unsafe { run.__bindgen_anon_1.io };
    let length = io.count as usize * usize::from(io.size);
    let page = std::ptr::from_mut(run).cast::<u8>();
    // SAFETY: the kernel puts `count` × `size` bytes at `data_offset` within the mapped run area.
    let start = unsafe { page.add(io.data_offset as usize) };
    // SAFETY: as above; the area stays mapped as long as `vcpu`, which the result borrows mutably.
    let data = unsafe { std::slice::from_raw_parts_mut(start, length) };
    let size = usize::from(io.size).max(1);
    if u32::from(io.direction) == kvm_bindings::KVM_EXIT_IO_IN {
        Exit::PioRead {
            port: io.port,
            size,
            data,
        }
    } else {
        Exit::PioWrite {
            port: io.port,
            size,
            data,
        }
    }
}

fn memory_io(vcpu: &mut VcpuFd) -> Exit<'_> {
    let run = vcpu.get_kvm_run();
    // SAFETY: the exit reason was KVM_EXIT_MMIO, for which the kernel fills this member.
    let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
    let length = (mmio.len as usize).min(mmio.data.len());
    let data = &mut mmio.data[..length];
    if mmio.is_write != 0 {
        Exit::MmioWrite {
            address: mmio.phys_addr,
            data,
        }
    } else {
        Exit::MmioRead {
            address: mmio.phys_addr,
            data,
        }
    }
}

fn internal_error(vcpu: &mut VcpuFd) -> String {
    let place = vcpu.get_regs().map(|regs| regs.rip).unwrap_or_default();
    let run = vcpu.get_kvm_run();
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, for which the kernel fills this member.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let data = internal.data.iter().take(internal.ndata as usize);
    let data: Vec<String> = data.map(|word| format!("{word:#x}")).collect();
    format!(
        "KVM internal error {} at rip {place:#x} [{}]",
        internal.suberror,
        data.join(" ")
    )
}
