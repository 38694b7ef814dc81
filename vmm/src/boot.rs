//! Loading what a machine boots, and where its vCPUs begin.
//!
//! ```text
//!  selfcheck  the embedded guest: 64-bit user mode with I/O privilege, identity-mapped
//!  linux      vmlinux by its PVH entry, or vmlinux and bzImage by the 64-bit boot protocol
//!  mptable    what tells Linux of its processors and interrupts, there being no ACPI
//!  start      first registers
//! ```

pub mod linux;
pub mod mptable;
pub mod selfcheck;
pub mod start;

use std::path::PathBuf;

use crate::kvm::vm::KvmError;

/// The descriptor table that the first registers refer to.
pub(crate) const GDT_ADDRESS: u64 = 0x500;
/// Page tables: one PML4, one PDPT, then a directory for each GiB.
pub(crate) const PAGE_TABLES_ADDRESS: u64 = 0x1_0000;
/// Page tables end here at the latest.
pub(crate) const PAGE_TABLES_END: u64 = 0x9_0000;

/// Why a machine cannot boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file is not there or cannot be read.
    #[error("cannot read {what} {}: {source}", path.display())]
    File {
        /// Which file.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The files were to be opened before the monitor gave up its rights.
    #[error("the kernel was not opened in time")]
    NotOpened,
    /// The kernel is not one.
    #[error("cannot load {}: {reason}; give an ELF vmlinux or a bzImage for x86-64", path.display())]
    Kernel {
        /// Where.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The guest does not fit.
    #[error("{what} does not fit into {memory_mib} MiB of guest memory: give the machine more")]
    NoRoom {
        /// What.
        what: &'static str,
        /// The machine's memory.
        memory_mib: u64,
    },
    /// The command line is too long or holds what it must not.
    #[error("the kernel command line cannot be used: {0}")]
    Cmdline(String),
    /// The self-checking guest cannot be started so.
    #[error(transparent)]
    Guest(#[from] crate::guest::GuestParamsError),
    /// Guest memory refused a write, which the layout rules out.
    #[error("cannot write the guest's boot data: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}
