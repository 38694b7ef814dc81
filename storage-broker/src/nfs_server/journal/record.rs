//! The journal's records as bytes: 64 each, little-endian, sealed by a checksum.
//!
//! ```text
//!  kind │ mode │ inode │ born_ns │ generation │ uid │ gid │ changed_ns │ create_verifier │ checksum
//!    4  │  4   │   8   │    8    │     8      │  4  │  4  │     8      │       8         │    8
//! ```

use super::super::permission::Attributes;

pub(super) const RECORD_BYTES: usize = 64;
pub(super) const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"BATONNFS";
const PUT: u32 = 1;
const FORGET: u32 = 2;
/// Marks the first record of a batch.
const FIRST: u32 = 0x100;

/// Which of the files that ever had this inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::nfs_server) struct Identity {
    pub(in crate::nfs_server) inode: u64,
    /// When the file system under us says it was made, in nanoseconds since 1970; 0 if it cannot say.
    pub(in crate::nfs_server) born_ns: u64,
}

/// What is kept of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nfs_server) struct Record {
    pub(in crate::nfs_server) identity: Identity,
    /// Drawn when the file is made or first seen; part of its handle.
    pub(in crate::nfs_server) generation: u64,
    pub(in crate::nfs_server) attributes: Attributes,
    /// What an EXCLUSIVE create was asked with; 0 otherwise.
    pub(in crate::nfs_server) create_verifier: u64,
}

/// What is written: the last entry of an inode holds.
#[derive(Debug)]
pub(super) enum Entry {
    Put(Record),
    Forget(Identity),
}

/// The head of a journal: whose export it is.
pub(super) fn encode_header(export_id: u128) -> [u8; RECORD_BYTES] {
    let mut bytes = [0; RECORD_BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..28].copy_from_slice(&export_id.to_le_bytes());
    seal(bytes)
}

pub(super) fn decode_header(bytes: &[u8; RECORD_BYTES]) -> Option<u128> {
    let ours = is_sealed(bytes) && bytes.starts_with(MAGIC) && u32_at(bytes, 8) == VERSION;
    ours.then(|| bytes[12..28].try_into().ok().map(u128::from_le_bytes))
        .flatten()
}

/// An entry as it stands in the journal, marked if a batch begins with it.
pub(super) fn encode(entry: &Entry, first_of_batch: bool) -> [u8; RECORD_BYTES] {
    let mut bytes = [0; RECORD_BYTES];
    let (kind, identity) = match entry {
        Entry::Put(record) => (PUT, record.identity),
        Entry::Forget(identity) => (FORGET, *identity),
    };
    let kind = if first_of_batch { kind | FIRST } else { kind };
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&identity.inode.to_le_bytes());
    bytes[16..24].copy_from_slice(&identity.born_ns.to_le_bytes());
    if let Entry::Put(record) = entry {
        bytes[4..8].copy_from_slice(&record.attributes.mode.to_le_bytes());
        bytes[24..32].copy_from_slice(&record.generation.to_le_bytes());
        bytes[32..36].copy_from_slice(&record.attributes.uid.to_le_bytes());
        bytes[36..40].copy_from_slice(&record.attributes.gid.to_le_bytes());
        bytes[40..48].copy_from_slice(&record.attributes.changed_ns.to_le_bytes());
        bytes[48..56].copy_from_slice(&record.create_verifier.to_le_bytes());
    }
    seal(bytes)
}

/// The entry that stands there, if what stands there is whole.
pub(super) fn decode(bytes: &[u8]) -> Option<Entry> {
    if !is_sealed(bytes) {
        return None;
    }
    let identity = Identity {
        inode: u64_at(bytes, 8),
        born_ns: u64_at(bytes, 16),
    };
    match u32_at(bytes, 0) & !FIRST {
        PUT => Some(Entry::Put(Record {
            identity,
            generation: u64_at(bytes, 24),
            attributes: Attributes {
                uid: u32_at(bytes, 32),
                gid: u32_at(bytes, 36),
                mode: u32_at(bytes, 4),
                changed_ns: u64_at(bytes, 40),
            },
            create_verifier: u64_at(bytes, 48),
        })),
        FORGET => Some(Entry::Forget(identity)),
        _ => None,
    }
}

/// A field of a record; 0 beyond its end.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |field| u32::from_le_bytes(*field))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |field| u64::from_le_bytes(*field))
}

/// Whether a batch begins with the record that stands there.
pub(super) fn begins_batch(bytes: &[u8]) -> bool {
    is_sealed(bytes) && u32_at(bytes, 0) & FIRST != 0
}

fn seal(mut bytes: [u8; RECORD_BYTES]) -> [u8; RECORD_BYTES] {
    let sum = checksum(&bytes[..RECORD_BYTES - 8]);
    bytes[RECORD_BYTES - 8..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn is_sealed(bytes: &[u8]) -> bool {
    match bytes.split_last_chunk::<8>() {
        Some((content, sum)) => checksum(content) == u64::from_le_bytes(*sum),
        None => false,
    }
}

/// FNV-1a, 64 bits: against torn writes, not against anybody's intent.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
