//! One vCPU's complete state, put back in the order KVM wants it: CPUID, mp_state, registers,
//! segments, XSAVE, XCRs, debug registers, LAPIC, MSRs, pending events.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::vm::{KvmError, asked};
use crate::state::{Hex, StateFormatError};

/// The time stamp counter's MSR.
const MSR_IA32_TSC: u32 = 0x10;

/// The deadline timer's MSR: set after the counter that it is compared with.
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;

/// MSRs of one vCPU, at most; KVM's list has some 40 to 100.
const MSRS_MAX: usize = 1024;

/// MSRs that go with one KVM_GET_MSRS or KVM_SET_MSRS.
const MSRS_PER_CALL: usize = 128;

/// One leaf of CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Leaf {
    function: u32,
    index: u32,
    flags: u32,
    registers: [u32; 4],
}

/// A vCPU's part of a saved machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuState {
    cpuid: Vec<Leaf>,
    mp_state: Hex,
    regs: Hex,
    sregs: Hex,
    xsave: Hex,
    xcrs: Hex,
    debugregs: Hex,
    lapic: Option<Hex>,
    /// Index and value.
    msrs: Vec<(u32, u64)>,
    events: Hex,
    tsc_khz: u32,
}

/// Why a vCPU's state could not be put back.
#[derive(Debug, thiserror::Error)]
pub enum RestoreCpuError {
    /// It does not read as one.
    #[error(transparent)]
    Format(#[from] StateFormatError),
    /// KVM refused it.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// KVM refused the value of an MSR.
    #[error(
        "this host's KVM refuses the saved value {value:#x} of MSR {index:#x}: the processors differ"
    )]
    Msr {
        /// Which.
        index: u32,
        /// The value.
        value: u64,
    },
}

/// What [`save`] and [`restore`] need to know of the host.
#[derive(Clone, Debug)]
pub struct HostCpu {
    msrs: Vec<u32>,
    irqchip: bool,
}

impl HostCpu {
    /// Asks KVM once, for all vCPUs.
    ///
    /// # Errors
    /// When KVM does not say.
    pub fn new(kvm: &Kvm, irqchip: bool) -> Result<HostCpu, KvmError> {
        let list = kvm
            .get_msr_index_list()
            .map_err(asked("the list of MSRs"))?;
        Ok(HostCpu {
            msrs: list.as_slice().to_vec(),
            irqchip,
        })
    }
}

/// Reads a stopped vCPU, whose last exit is complete.
///
/// # Errors
/// When KVM does not say.
pub fn save(vcpu: &VcpuFd, host: &HostCpu) -> Result<CpuState, KvmError> {
    // KVM_GET_MP_STATE first: it takes up INIT and SIPI that are pending in the LAPIC.
    let mp_state = vcpu.get_mp_state().map_err(asked("mp_state"))?;
    let cpuid = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(asked("CPUID"))?;
    let lapic = if host.irqchip {
        Some(Hex::of(
            &vcpu.get_lapic().map_err(asked("the LAPIC's state"))?,
        ))
    } else {
        None
    };
    Ok(CpuState {
        cpuid: cpuid.as_slice().iter().map(Leaf::from).collect(),
        mp_state: Hex::of(&mp_state),
        regs: Hex::of(&vcpu.get_regs().map_err(asked("registers"))?),
        sregs: Hex::of(&vcpu.get_sregs().map_err(asked("segment registers"))?),
        xsave: Hex::of(&vcpu.get_xsave().map_err(asked("XSAVE"))?),
        xcrs: Hex::of(&vcpu.get_xcrs().map_err(asked("XCRs"))?),
        debugregs: Hex::of(&vcpu.get_debug_regs().map_err(asked("debug registers"))?),
        lapic,
        msrs: read_msrs(vcpu, &host.msrs)?,
        events: Hex::of(&vcpu.get_vcpu_events().map_err(asked("pending events"))?),
        tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
    })
}

fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MSRS_PER_CALL)];
        let entries: Vec<_> = batch
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&entries)
            .map_err(|_| asked("MSRs")(kvm_ioctls::Error::new(libc::E2BIG)))?;
        let read = vcpu.get_msrs(&mut msrs).map_err(asked("MSRs"))?;
        values.extend(
            msrs.as_slice()[..read]
                .iter()
                .map(|entry| (entry.index, entry.data)),
        );
        // KVM stops at one it lists and yet cannot read on this processor: that one has no state.
        rest = &rest[(read + usize::from(read < batch.len()))..];
    }
    Ok(values)
}

/// Puts back what [`save`] said, on a vCPU that never ran. The counter goes on `elapsed_ns` later.
///
/// # Errors
/// When the state is not one of a vCPU, or KVM refuses it.
pub fn restore(
    vcpu: &VcpuFd,
    state: &CpuState,
    elapsed_ns: u64,
    host: &HostCpu,
) -> Result<(), RestoreCpuError> {
    let leaves: Vec<kvm_cpuid_entry2> = state.cpuid.iter().map(Leaf::entry).collect();
    let cpuid = CpuId::from_entries(&leaves).map_err(|_| StateFormatError { part: "cpuid" })?;
    vcpu.set_cpuid2(&cpuid).map_err(asked("CPUID"))?;
    let here_khz = vcpu.get_tsc_khz().unwrap_or(0);
    if state.tsc_khz != 0 && here_khz != 0 && here_khz != state.tsc_khz {
        // Refused where the processor cannot scale; the guest then takes its time from kvmclock.
        if let Err(error) = vcpu.set_tsc_khz(state.tsc_khz) {
            tracing::warn!(%error, from = state.tsc_khz, to = here_khz, "the guest's TSC changes its rate");
        }
    }
    vcpu.set_mp_state(state.mp_state.pod::<kvm_mp_state>("mp_state")?)
        .map_err(asked("mp_state"))?;
    vcpu.set_regs(&state.regs.pod::<kvm_regs>("regs")?)
        .map_err(asked("registers"))?;
    vcpu.set_sregs(&state.sregs.pod::<kvm_sregs>("sregs")?)
        .map_err(asked("segment registers"))?;
    let xsave = state.xsave.pod::<kvm_xsave>("xsave")?;
    // SAFETY: the kernel reads as much as the guest's XSAVE area needs. That is one page, the
    // structure's size, unless AMX was enabled by `arch_prctl`, which this process never does.
    unsafe { vcpu.set_xsave(&xsave) }.map_err(asked("XSAVE"))?;
    vcpu.set_xcrs(&state.xcrs.pod::<kvm_xcrs>("xcrs")?)
        .map_err(asked("XCRs"))?;
    vcpu.set_debug_regs(&state.debugregs.pod::<kvm_debugregs>("debugregs")?)
        .map_err(asked("debug registers"))?;
    match (&state.lapic, host.irqchip) {
        (Some(lapic), true) => {
            vcpu.set_lapic(&lapic.pod::<kvm_lapic_state>("lapic")?)
                .map_err(asked("the LAPIC's state"))?;
        }
        (None, false) => {}
        _ => return Err(StateFormatError { part: "lapic" }.into()),
    }
    write_msrs(vcpu, state, elapsed_ns)?;
    vcpu.set_vcpu_events(&state.events.pod::<kvm_vcpu_events>("events")?)
        .map_err(asked("pending events"))?;
    Ok(())
}

fn write_msrs(vcpu: &VcpuFd, state: &CpuState, elapsed_ns: u64) -> Result<(), RestoreCpuError> {
    if state.msrs.len() > MSRS_MAX {
        return Err(StateFormatError { part: "msrs" }.into());
    }
    let mut entries: Vec<kvm_msr_entry> = state
        .msrs
        .iter()
        .map(|&(index, data)| {
            let data = if index == MSR_IA32_TSC {
                data.wrapping_add(ticks(elapsed_ns, state.tsc_khz))
            } else {
                data
            };
            kvm_msr_entry {
                index,
                data,
                ..Default::default()
            }
        })
        .collect();
    entries.sort_by_key(|entry| entry.index == MSR_IA32_TSC_DEADLINE);
    let mut rest = &entries[..];
    while let Some(first) = rest.first() {
        let batch = &rest[..rest.len().min(MSRS_PER_CALL)];
        let msrs = Msrs::from_entries(batch).map_err(|_| StateFormatError { part: "msrs" })?;
        let written = vcpu.set_msrs(&msrs).map_err(asked("MSRs"))?;
        rest = &rest[written..];
        if written == batch.len() {
            continue;
        }
        // A zero that cannot be written is one that cannot be anything else.
        let refused = rest.first().unwrap_or(first);
        if refused.data != 0 {
            return Err(RestoreCpuError::Msr {
                index: refused.index,
                value: refused.data,
            });
        }
        rest = &rest[1..];
    }
    Ok(())
}

fn ticks(elapsed_ns: u64, khz: u32) -> u64 {
    (u128::from(elapsed_ns) * u128::from(khz) / 1_000_000) as u64
}

impl From<&kvm_cpuid_entry2> for Leaf {
    fn from(entry: &kvm_cpuid_entry2) -> Leaf {
        Leaf {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
        }
    }
}

impl Leaf {
    fn entry(&self) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = self.registers;
        kvm_cpuid_entry2 {
            function: self.function,
            index: self.index,
            flags: self.flags,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_advances_by_the_elapsed_time() {
        assert_eq!(ticks(1_000_000, 2_500_000), 2_500_000);
        assert_eq!(ticks(3_600_000_000_000, 3_000_000), 10_800_000_000_000);
    }
}
