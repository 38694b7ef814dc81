//! KVM: the machine's VM, its vCPUs' states, the dirty log. The only module tree, with guest memory, that holds `unsafe`.
//!
//! ```text
//!  vm      the VM: irqchip, PIT, memory slots, interrupt lines, ioeventfds, clock
//!  dirty   which pages the guest wrote (KVM's log) and which devices wrote (vm-memory's bitmap)
//!  cpu     one vCPU's complete state, in the order KVM wants it back
//!  cpuid   what the guest is told about its processor
//!  kick    the signal that gets a thread out of KVM_RUN
//!  pod     KVM's structures as bytes
//! ```
#![allow(unsafe_code)]

pub mod cpu;
pub mod cpuid;
pub mod dirty;
pub mod exits;
pub mod kick;
pub mod pod;
pub mod vm;
