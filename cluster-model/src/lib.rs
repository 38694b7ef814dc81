//! The pure half of Baton: what the cluster knows, and every decision it takes.
//!
//! Nothing here reads a clock, a socket, a file, the environment or a random number.

#![forbid(unsafe_code)]

pub mod ids;

pub use ids::{
    Incarnation, LogIndex, MigrationId, Name, NameError, NodeId, RequestId, Token, VmId, VolumeId,
};
