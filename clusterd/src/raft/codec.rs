//! How entries, votes and log positions are written as bytes, on the disk and on the wire alike.
//!
//! ```text
//! entry    version u8 | kind u8 | term u64 | leader u64 | index u64 | length u32 | payload | xxh3 u64
//! log id   0                                (none)
//!          1 | term u64 | node u64 | index u64
//! vote     term u64 | node u64 | committed u8
//! ```
//! All numbers are little-endian. An entry carries its own position and checksum, so that one which was
//! damaged, or which stands where another belongs, is never taken for a good one.

use bytes::Bytes;
use openraft::EntryPayload;
use openraft::vote::RaftLeaderId;
use xxhash_rust::xxh3::xxh3_64;

use super::types::{CommandBytes, Entry, LeaderId, LogId, Vote};

/// Version of the entry layout.
const ENTRY_VERSION: u8 = 1;
const KIND_BLANK: u8 = 0;
const KIND_COMMAND: u8 = 1;
const KIND_MEMBERSHIP: u8 = 2;
/// Bytes of an entry besides its payload.
pub(super) const ENTRY_OVERHEAD: usize = 1 + 1 + 8 * 3 + 4 + 8;

/// Bytes that are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot decode {what}: {why}")]
pub struct DecodeError {
    what: &'static str,
    why: String,
}

impl DecodeError {
    pub(super) fn new(what: &'static str, why: impl Into<String>) -> DecodeError {
        DecodeError {
            what,
            why: why.into(),
        }
    }
}

/// Reads numbers off the front of a slice; every read is checked.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    pub(super) fn new(what: &'static str, bytes: &'a [u8]) -> Reader<'a> {
        Reader { rest: bytes, what }
    }

    pub(super) fn bytes(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        match self.rest.split_at_checked(count) {
            Some((head, tail)) => {
                self.rest = tail;
                Ok(head)
            }
            None => Err(DecodeError::new(
                self.what,
                format!("{count} bytes wanted, {} left", self.rest.len()),
            )),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    pub(super) fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Ends the reading: nothing may be left over.
    pub(super) fn end(self) -> Result<(), DecodeError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(DecodeError::new(
                self.what,
                format!("{} bytes too many", self.rest.len()),
            ))
        }
    }
}

pub(super) fn put_vote(out: &mut Vec<u8>, vote: &Vote) {
    out.extend_from_slice(&vote.leader_id.term.to_le_bytes());
    out.extend_from_slice(&vote.leader_id.node_id.to_le_bytes());
    out.push(u8::from(vote.committed));
}

pub(super) fn take_vote(reader: &mut Reader<'_>) -> Result<Vote, DecodeError> {
    let (term, node) = (reader.u64()?, reader.u64()?);
    Ok(match reader.u8()? {
        0 => Vote::new(term, node),
        _ => Vote::new_committed(term, node),
    })
}

pub(super) fn put_log_id(out: &mut Vec<u8>, log_id: Option<&LogId>) {
    match log_id {
        None => out.push(0),
        Some(log_id) => {
            out.push(1);
            out.extend_from_slice(&log_id.leader_id.term.to_le_bytes());
            out.extend_from_slice(&log_id.leader_id.node_id.to_le_bytes());
            out.extend_from_slice(&log_id.index.to_le_bytes());
        }
    }
}

pub(super) fn take_log_id(reader: &mut Reader<'_>) -> Result<Option<LogId>, DecodeError> {
    match reader.u8()? {
        0 => Ok(None),
        _ => {
            let (term, node, index) = (reader.u64()?, reader.u64()?, reader.u64()?);
            Ok(Some(LogId {
                leader_id: LeaderId::new(term, node),
                index,
            }))
        }
    }
}

/// Appends `entry` to `out`.
///
/// # Errors
/// When a membership cannot be written as JSON or the payload's length does not fit 32 bits.
pub(super) fn put_entry(out: &mut Vec<u8>, entry: &Entry) -> Result<(), DecodeError> {
    let start = out.len();
    let membership_json;
    let (kind, payload): (u8, &[u8]) = match &entry.payload {
        EntryPayload::Blank => (KIND_BLANK, &[]),
        EntryPayload::Normal(command) => (KIND_COMMAND, &command.0),
        EntryPayload::Membership(membership) => {
            membership_json = serde_json::to_vec(membership)
                .map_err(|error| DecodeError::new("membership", error.to_string()))?;
            (KIND_MEMBERSHIP, &membership_json)
        }
    };
    let length = u32::try_from(payload.len())
        .map_err(|_| DecodeError::new("entry", "payload over 4 GiB"))?;
    out.reserve(ENTRY_OVERHEAD + payload.len());
    out.push(ENTRY_VERSION);
    out.push(kind);
    out.extend_from_slice(&entry.log_id.leader_id.term.to_le_bytes());
    out.extend_from_slice(&entry.log_id.leader_id.node_id.to_le_bytes());
    out.extend_from_slice(&entry.log_id.index.to_le_bytes());
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(payload);
    let checksum = xxh3_64(&out[start..]);
    out.extend_from_slice(&checksum.to_le_bytes());
    Ok(())
}

/// Reads one entry off the front of `reader`.
pub(super) fn take_entry(reader: &mut Reader<'_>) -> Result<Entry, DecodeError> {
    let whole = reader.rest;
    let (version, kind) = (reader.u8()?, reader.u8()?);
    if version != ENTRY_VERSION {
        return Err(DecodeError::new(
            "entry",
            format!("unknown version {version}"),
        ));
    }
    let (term, node, index) = (reader.u64()?, reader.u64()?, reader.u64()?);
    let length = reader.u32()? as usize;
    let payload = reader.bytes(length)?;
    let covered = &whole[..ENTRY_OVERHEAD - 8 + length];
    if reader.u64()? != xxh3_64(covered) {
        return Err(DecodeError::new(
            "entry",
            format!("checksum of entry {index} is wrong"),
        ));
    }
    let payload = match kind {
        KIND_BLANK => EntryPayload::Blank,
        KIND_COMMAND => EntryPayload::Normal(CommandBytes(Bytes::copy_from_slice(payload))),
        KIND_MEMBERSHIP => EntryPayload::Membership(
            serde_json::from_slice(payload)
                .map_err(|error| DecodeError::new("membership", error.to_string()))?,
        ),
        other => return Err(DecodeError::new("entry", format!("unknown kind {other}"))),
    };
    let log_id = LogId {
        leader_id: LeaderId::new(term, node),
        index,
    };
    Ok(Entry { log_id, payload })
}

/// A checksummed small value (vote, committed, purged) as the store keeps it.
pub(super) fn seal(value: &[u8]) -> Vec<u8> {
    let mut sealed = value.to_vec();
    sealed.extend_from_slice(&xxh3_64(value).to_le_bytes());
    sealed
}

/// What [`seal`] sealed, or nothing if it was damaged.
pub(super) fn unseal<'a>(what: &'static str, sealed: &'a [u8]) -> Result<&'a [u8], DecodeError> {
    let Some((value, checksum)) = sealed.split_last_chunk::<8>() else {
        return Err(DecodeError::new(what, "too short"));
    };
    if u64::from_le_bytes(*checksum) == xxh3_64(value) {
        Ok(value)
    } else {
        Err(DecodeError::new(what, "its checksum is wrong"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, payload: &[u8]) -> Entry {
        let log_id = LogId {
            leader_id: LeaderId::new(7, 3),
            index,
        };
        Entry {
            log_id,
            payload: EntryPayload::Normal(CommandBytes(Bytes::copy_from_slice(payload))),
        }
    }

    #[test]
    fn an_entry_reads_back_as_it_was_written() {
        let mut out = Vec::new();
        put_entry(&mut out, &entry(41, b"first")).unwrap();
        put_entry(&mut out, &entry(42, b"")).unwrap();
        assert_eq!(out.len(), 2 * ENTRY_OVERHEAD + 5);
        let mut reader = Reader::new("entries", &out);
        assert_eq!(take_entry(&mut reader).unwrap(), entry(41, b"first"));
        assert_eq!(take_entry(&mut reader).unwrap(), entry(42, b""));
        reader.end().unwrap();
    }

    #[test]
    fn a_flipped_bit_anywhere_in_an_entry_is_noticed() {
        let mut out = Vec::new();
        put_entry(&mut out, &entry(41, b"payload")).unwrap();
        for bit in 0..out.len() * 8 {
            let mut damaged = out.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(
                take_entry(&mut Reader::new("entry", &damaged)).is_err(),
                "bit {bit}"
            );
        }
        for cut in 0..out.len() {
            assert!(
                take_entry(&mut Reader::new("entry", &out[..cut])).is_err(),
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn votes_and_positions_read_back() {
        let mut out = Vec::new();
        put_vote(&mut out, &Vote::new_committed(9, 2));
        put_log_id(&mut out, None);
        put_log_id(
            &mut out,
            Some(&LogId {
                leader_id: LeaderId::new(1, 2),
                index: 3,
            }),
        );
        let mut reader = Reader::new("mix", &out);
        assert_eq!(take_vote(&mut reader).unwrap(), Vote::new_committed(9, 2));
        assert_eq!(take_log_id(&mut reader).unwrap(), None);
        assert_eq!(take_log_id(&mut reader).unwrap().unwrap().index, 3);
        assert!(reader.u8().is_err());
    }

    #[test]
    fn a_damaged_sealed_value_is_refused() {
        let mut sealed = seal(b"vote");
        assert_eq!(unseal("vote", &sealed).unwrap(), b"vote");
        sealed[0] ^= 1;
        assert!(unseal("vote", &sealed).is_err());
        assert!(unseal("vote", &[1, 2]).is_err());
    }
}
