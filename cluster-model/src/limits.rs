//! What a machine may be, at least and at most: one table for the door, for placement and for the monitor.
//!
//! The log refuses a machine outside of it when it is created ([`ClusterState::apply`](crate::ClusterState::apply)),
//! and a monitor refuses a machine file outside of it before it opens anything. Both call [`check`], so
//! that a machine which was let in is one that a monitor can be: else it would be placed, fail on one node
//! after the other and be held. What a monitor could do beyond it is nobody's promise; that it can do as much is
//! checked where it is compiled (`vmm/src/spec.rs`).

#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::RangeInclusive;

use crate::rejection::Rejection;
use crate::state::{Boot, VmSpec};

/// Memory of a machine, MiB: from what a loader needs to 1 TiB, where the monitor's tables of pages end.
pub const MEMORY_MIB: RangeInclusive<u64> = 16..=1 << 20;

/// Virtual processors of a machine. As many fit into the table that tells Linux of them (the MP table has one KiB).
pub const VCPUS: RangeInclusive<u32> = 1..=32;

/// Disks of a machine.
pub const DISKS_MAX: usize = 8;

/// Network interfaces of a machine.
pub const NICS_MAX: usize = 8;

/// Disks and network interfaces together: each has an interrupt line of its own, and no more are free.
pub const SLOTS_MAX: usize = 9;

/// Bytes of a disk: from 64 KiB to 64 TiB.
pub const DISK_BYTES: RangeInclusive<u64> = 64 * 1024..=64 << 40;

/// A disk's size is a multiple of this many bytes.
pub const SECTOR_BYTES: u64 = 512;

/// The longest path in a spec, bytes.
pub const PATH_BYTES_MAX: usize = 2_048;

/// The longest command line for Linux, bytes: it takes 2,048, and the monitor appends the devices.
pub const CMDLINE_BYTES_MAX: usize = 1_536;

/// MiB that the self-checking guest needs beside its working set.
pub const SELF_CHECK_OWN_MIB: u64 = 4;

/// The largest working set of the self-checking guest, MiB: its page tables have to fit below its program.
pub const SELF_CHECK_WORKING_SET_MIB_MAX: u64 = 64 * 1024;

/// The smallest first disk of the self-checking guest, bytes: its ring of blocks must be longer than what may
/// be on the way to the disk.
pub const SELF_CHECK_DISK_BYTES_MIN: u64 = 65 * 4096;

/// A machine's measures, wherever they were read from.
#[derive(Clone, Debug)]
pub struct Measures<'a, D> {
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Virtual processors.
    pub vcpus: u32,
    /// What it boots.
    pub boot: &'a Boot,
    /// The bytes of each disk.
    pub disk_bytes: D,
    /// Network interfaces.
    pub nics: usize,
}

/// A measure is out of its limits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct OutOfLimits {
    /// Which, as the spec calls it.
    pub field: String,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl From<OutOfLimits> for Rejection {
    fn from(OutOfLimits { field, problem }: OutOfLimits) -> Rejection {
        Rejection::BadSpec { field, problem }
    }
}

/// Holds a machine of the log against the table.
///
/// # Errors
/// As [`check`].
pub fn check_spec(spec: &VmSpec) -> Result<(), OutOfLimits> {
    check(&Measures {
        memory_mib: spec.memory_mib,
        vcpus: spec.vcpus,
        boot: &spec.boot,
        disk_bytes: spec.disks.iter().map(|disk| disk.size_bytes),
        nics: spec.nics.len(),
    })
}

/// Holds a machine against the table.
///
/// # Errors
/// The first measure that is out of its limits.
pub fn check<D>(machine: &Measures<'_, D>) -> Result<(), OutOfLimits>
where
    D: ExactSizeIterator<Item = u64> + Clone,
{
    within("memory_mib", machine.memory_mib, &MEMORY_MIB, "MiB")?;
    within("vcpus", machine.vcpus, &VCPUS, "virtual processors")?;
    let (disks, nics) = (machine.disk_bytes.len(), machine.nics);
    if disks > DISKS_MAX || nics > NICS_MAX || disks + nics > SLOTS_MAX {
        return out(
            "disks",
            format!(
                "{disks} disks and {nics} network interfaces; use at most {DISKS_MAX} and {NICS_MAX}, and {SLOTS_MAX} together"
            ),
        );
    }
    for (number, bytes) in machine.disk_bytes.clone().enumerate() {
        if !DISK_BYTES.contains(&bytes) || bytes % SECTOR_BYTES != 0 {
            return out(
                format!("disks[{number}]"),
                format!("{bytes} bytes; use 64 KiB to 64 TiB, a multiple of {SECTOR_BYTES}"),
            );
        }
    }
    match machine.boot {
        Boot::SelfCheck {
            working_set_mib, ..
        } => {
            let first_disk = machine.disk_bytes.clone().next();
            check_self_check(machine.memory_mib, (*working_set_mib).into(), first_disk)
        }
        Boot::Linux {
            kernel,
            initrd,
            cmdline,
        } => check_linux(kernel, initrd.as_deref(), cmdline),
    }
}

fn check_self_check(
    memory_mib: u64,
    working_set_mib: u64,
    first_disk_bytes: Option<u64>,
) -> Result<(), OutOfLimits> {
    let most = memory_mib
        .saturating_sub(SELF_CHECK_OWN_MIB)
        .min(SELF_CHECK_WORKING_SET_MIB_MAX);
    if !(1..=most).contains(&working_set_mib) {
        return out(
            "boot.working_set_mib",
            format!("{working_set_mib} MiB; use 1 to {most} with {memory_mib} MiB of memory"),
        );
    }
    match first_disk_bytes {
        Some(bytes) if bytes < SELF_CHECK_DISK_BYTES_MIN => out(
            "disks[0]",
            format!(
                "{bytes} bytes; the self-checking guest needs {SELF_CHECK_DISK_BYTES_MIN} at least"
            ),
        ),
        _ => Ok(()),
    }
}

fn check_linux(kernel: &str, initrd: Option<&str>, cmdline: &str) -> Result<(), OutOfLimits> {
    let path_fits = |path: &str| path.starts_with('/') && path.len() <= PATH_BYTES_MAX;
    if !path_fits(kernel) || !initrd.is_none_or(path_fits) {
        return out(
            "boot",
            format!(
                "kernel and initrd: absolute paths that every node has, at most {PATH_BYTES_MAX} bytes each"
            ),
        );
    }
    if cmdline.len() > CMDLINE_BYTES_MAX || !cmdline.bytes().all(|byte| matches!(byte, b' '..=b'~'))
    {
        return out(
            "boot.cmdline",
            format!("use at most {CMDLINE_BYTES_MAX} printable ASCII characters"),
        );
    }
    Ok(())
}

fn within<T: PartialOrd + fmt::Display>(
    field: &str,
    value: T,
    limits: &RangeInclusive<T>,
    unit: &str,
) -> Result<(), OutOfLimits> {
    if limits.contains(&value) {
        return Ok(());
    }
    let (least, most) = (limits.start(), limits.end());
    out(
        field,
        format!("{value} {unit}; use {least} to {most} {unit}"),
    )
}

fn out(field: impl Into<String>, problem: impl Into<String>) -> Result<(), OutOfLimits> {
    Err(OutOfLimits {
        field: field.into(),
        problem: problem.into(),
    })
}

/// The six bytes of one interface's MAC address, written with colons; nothing for a group's address.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next()?;
        if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0).then_some(mac)
}
