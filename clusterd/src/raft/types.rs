//! The types that fill openraft's blanks: what an entry carries, what a member is called.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

openraft::declare_raft_types!(
    /// Entries and answers are bytes here: a command is encoded once where it is proposed, and the
    /// same bytes go to the disk, over the wire and to the state machine.
    pub TypeConfig:
        D = CommandBytes,
        R = AnswerBytes,
        NodeId = u64,
        Node = Member,
);

pub(super) type LogId = openraft::alias::LogIdOf<TypeConfig>;
pub(super) type Vote = openraft::alias::VoteOf<TypeConfig>;
pub(super) type Entry = openraft::alias::EntryOf<TypeConfig>;
pub(super) type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
pub(super) type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
pub(super) type LeaderId = openraft::alias::LeaderIdOf<TypeConfig>;

/// Where a member of the Raft group is reached, kept in the log with the membership itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// What people call it.
    pub name: String,
    /// `host:port` of its peer service.
    pub address: String,
}

/// An encoded command; cloning it is cheap.
#[derive(Clone, PartialEq, Eq)]
pub struct CommandBytes(pub Bytes);

/// An encoded reply, empty for entries that carry no command.
#[derive(Clone, PartialEq, Eq)]
pub struct AnswerBytes(pub Bytes);

macro_rules! byte_string {
    ($name:ident) => {
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{} bytes", self.0.len())
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{} bytes", self.0.len())
            }
        }
        // openraft's `serde` feature asks for these; the log and the wire use `codec` instead.
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_bytes(&self.0)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Vec::<u8>::deserialize(deserializer).map(|bytes| Self(Bytes::from(bytes)))
            }
        }
    };
}
byte_string!(CommandBytes);
byte_string!(AnswerBytes);
