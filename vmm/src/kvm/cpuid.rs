//! What the guest is told about its processor: what KVM supports, less what a saved state cannot carry.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;

/// Leaf 1, ECX.
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;

/// KVM's leaves for vCPU `index` of `count`.
///
/// Left out, so that the state of the vCPU is the same on every host: performance counters (0xa),
/// SGX (7 and 0x12), processor trace (7 and 0x14), AMX (7 and 0x1d, 0x1e), whose state is larger
/// than KVM_GET_XSAVE's page.
///
/// # Errors
/// When KVM does not say.
pub fn for_vcpu(kvm: &Kvm, index: u32, count: u32) -> Result<CpuId, kvm_ioctls::Error> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let tsc_deadline = kvm.check_extension(kvm_ioctls::Cap::TscDeadlineTimer);
    let mut entries = Vec::with_capacity(supported.as_slice().len());
    for mut entry in supported.as_slice().iter().copied() {
        match (entry.function, entry.index) {
            (0x1, _) => {
                entry.ebx = entry.ebx & 0xffff | count.min(255) << 16 | index << 24;
                entry.ecx |= ECX_HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= ECX_TSC_DEADLINE;
                }
            }
            (0x7, 0) => {
                entry.ebx &= !(1 << 2 | 1 << 25);
                entry.ecx &= !(1 << 30);
                entry.edx &= !(1 << 22 | 1 << 24 | 1 << 25);
            }
            // XCR0 and the supervisor states without AMX's tiles.
            (0xd, 0) => entry.eax &= !(0b11 << 17),
            (0xd, 17 | 18) => continue,
            (0xa, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            (0x12 | 0x14 | 0x1d | 0x1e, _) => continue,
            // Topology: one thread a core, all cores in one package.
            (0xb | 0x1f, level) => {
                entry.edx = index;
                match level {
                    0 => (entry.eax, entry.ebx, entry.ecx) = (0, 1, 1 << 8),
                    1 => {
                        let shift = u32::BITS - (count.max(1) - 1).leading_zeros();
                        (entry.eax, entry.ebx, entry.ecx) = (shift, count, 2 << 8 | 1);
                    }
                    _ => (entry.eax, entry.ebx, entry.ecx) = (0, 0, level),
                }
            }
            _ => {}
        }
        entries.push(entry);
    }
    // The table came from KVM and only shrank.
    CpuId::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}
