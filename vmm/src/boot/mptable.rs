//! The MP table (Intel MultiProcessor Specification 1.4): processors, the ISA bus, the IOAPIC and its lines.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::devices::GuestMemory;

/// Where the floating pointer stands: the last KiB of base memory, where systems look for it.
pub const MPTABLE_ADDRESS: u64 = 0x9_fc00;

/// The most vCPUs whose entries fit into that KiB with everything else.
pub const MPTABLE_CPUS_MAX: u32 = 32;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
/// The ISA bus's lines, which are the IOAPIC's first.
const ISA_LINES: u8 = 16;

/// Writes the table for `cpus` processors; local APIC ids are their numbers, the IOAPIC's the next.
///
/// # Errors
/// When there is no memory at [`MPTABLE_ADDRESS`].
pub fn write(memory: &GuestMemory, cpus: u32) -> Result<(), GuestMemoryError> {
    let table = table(cpus.min(MPTABLE_CPUS_MAX) as u8);
    let mut pointer = Vec::with_capacity(16);
    pointer.extend(b"_MP_");
    pointer.extend(((MPTABLE_ADDRESS + 16) as u32).to_le_bytes());
    // Length in 16-byte units, version 1.4, checksum, five feature bytes.
    pointer.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    memory.write_slice(&pointer, GuestAddress(MPTABLE_ADDRESS))?;
    memory.write_slice(&table, GuestAddress(MPTABLE_ADDRESS + 16))
}

fn table(cpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count = 0u16;
    for cpu in 0..cpus {
        // Enabled, and the first one boots; signature and features as any processor since the Pentium.
        let flags = 1 | u8::from(cpu == 0) << 1;
        entries.extend([0, cpu, APIC_VERSION, flags]);
        entries.extend(0x600u32.to_le_bytes());
        entries.extend(0x201u32.to_le_bytes());
        entries.extend([0; 8]);
        count += 1;
    }
    entries.extend([1, 0]);
    entries.extend(b"ISA   ");
    entries.extend([2, cpus, APIC_VERSION, 1]);
    entries.extend(IO_APIC.to_le_bytes());
    count += 2;
    for line in 0..ISA_LINES {
        // Type INT, conforming polarity and trigger; line 0 is the timer, on the IOAPIC's pin 0.
        entries.extend([3, 0, 0, 0, 0, line, cpus, line]);
        count += 1;
    }
    // Local interrupts: ExtINT on LINT0 of the first, NMI on LINT1 of all.
    entries.extend([4, 3, 0, 0, 0, 0, 0, 0]);
    entries.extend([4, 1, 0, 0, 0, 0, 0xff, 1]);
    count += 2;
    let mut table = Vec::with_capacity(44 + entries.len());
    table.extend(b"PCMP");
    table.extend((44 + entries.len() as u16).to_le_bytes());
    table.extend([4, 0]);
    table.extend(b"BATON   ");
    table.extend(b"VMM         ");
    table.extend([0; 4]);
    table.extend([0; 2]);
    table.extend(count.to_le_bytes());
    table.extend(LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(&entries);
    table[7] = checksum(&table);
    table
}

/// What makes the bytes' sum zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_sums_to_zero_says_its_length_and_fits_below_base_memorys_end() {
        for cpus in [1, 2, MPTABLE_CPUS_MAX as u8] {
            let table = table(cpus);
            assert_eq!(
                table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
                0
            );
            assert_eq!(
                u16::from_le_bytes([table[4], table[5]]) as usize,
                table.len()
            );
            assert!(
                MPTABLE_ADDRESS as usize + 16 + table.len() <= 0xa_0000,
                "{cpus}"
            );
        }
    }
}
