//! What the log thread asks of a store, and how the journal writes it down.
//!
//! ```text
//! put             1 | index u64 | length u32 | value
//! remove from     2 | index u64
//! remove through  3 | index u64
//! small value     16 + its place in `Key::ALL` | length u32 | value
//! ```

use std::io;

use super::super::codec::{DecodeError, Reader};
use super::damaged;

/// One change of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum Change {
    /// Writes the entry at an index.
    Put { index: u64, value: Vec<u8> },
    /// Removes every entry from an index on.
    RemoveFrom(u64),
    /// Removes every entry up to and including an index.
    RemoveThrough(u64),
    /// Writes one of the small values.
    Meta { key: Key, value: Vec<u8> },
}

/// The small values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in super::super) enum Key {
    /// The vote.
    Vote,
    /// The commit point.
    Committed,
    /// The last entry removed from the front.
    Purged,
    /// Whose log this is.
    Node,
}

impl Key {
    pub(super) const ALL: [Key; 4] = [Key::Vote, Key::Committed, Key::Purged, Key::Node];

    pub(super) fn text(self) -> &'static str {
        match self {
            Key::Vote => "vote",
            Key::Committed => "committed",
            Key::Purged => "purged",
            Key::Node => "node",
        }
    }
}

const TAG_PUT: u8 = 1;
const TAG_REMOVE_FROM: u8 = 2;
const TAG_REMOVE_THROUGH: u8 = 3;
/// The tag of a small value is this and its place in [`Key::ALL`].
const TAG_META: u8 = 16;

pub(super) fn encoded_bytes(change: &Change) -> usize {
    match change {
        Change::Put { value, .. } | Change::Meta { value, .. } => 1 + 8 + 4 + value.len(),
        Change::RemoveFrom(_) | Change::RemoveThrough(_) => 1 + 8,
    }
}

pub(super) fn encode(out: &mut Vec<u8>, change: &Change) -> io::Result<()> {
    let put_value = |out: &mut Vec<u8>, value: &[u8]| {
        let length = u32::try_from(value.len()).map_err(|_| damaged("a value over 4 GiB"))?;
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(value);
        Ok(())
    };
    match change {
        Change::Put { index, value } => {
            out.push(TAG_PUT);
            out.extend_from_slice(&index.to_le_bytes());
            put_value(out, value)
        }
        Change::RemoveFrom(index) => {
            out.push(TAG_REMOVE_FROM);
            out.extend_from_slice(&index.to_le_bytes());
            Ok(())
        }
        Change::RemoveThrough(index) => {
            out.push(TAG_REMOVE_THROUGH);
            out.extend_from_slice(&index.to_le_bytes());
            Ok(())
        }
        Change::Meta { key, value } => {
            out.push(TAG_META + *key as u8);
            put_value(out, value)
        }
    }
}

pub(super) fn decode(record: &[u8]) -> Result<Vec<Change>, DecodeError> {
    let mut reader = Reader::new("journal", record);
    let mut changes = Vec::new();
    while !reader.is_empty() {
        changes.push(match reader.u8()? {
            TAG_PUT => {
                let (index, length) = (reader.u64()?, reader.u32()? as usize);
                Change::Put {
                    index,
                    value: reader.bytes(length)?.to_vec(),
                }
            }
            TAG_REMOVE_FROM => Change::RemoveFrom(reader.u64()?),
            TAG_REMOVE_THROUGH => Change::RemoveThrough(reader.u64()?),
            tag => {
                let key = tag
                    .checked_sub(TAG_META)
                    .and_then(|place| Key::ALL.get(usize::from(place)))
                    .ok_or_else(|| DecodeError::new("journal", format!("unknown change {tag}")))?;
                let length = reader.u32()? as usize;
                Change::Meta {
                    key: *key,
                    value: reader.bytes(length)?.to_vec(),
                }
            }
        });
    }
    Ok(changes)
}
