//! An NFSv3 client (RFC 1813 over RFC 5531) in user space: many calls in flight on one connection.
//!
//! ```text
//!  caller ──start──► queue ──► writer task ──► socket ──► reader task ──► oneshot ──► caller
//!                                  └── pending: xid → oneshot, deadline, slot ──┘
//! ```
//!
//! The socket belongs to its two tasks. A caller that goes away leaves its call to run to its end,
//! so a half-sent record never stands in the stream. A call that is not answered in time closes
//! the connection, and every unanswered call becomes *unknown*: it may or may not have been
//! executed, now or later. Nothing here sends a call twice.

pub mod client;
pub mod connection;
pub mod mount;
pub(crate) mod record;
mod reply;
mod types;
pub(crate) mod xdr;

#[cfg(test)]
pub(crate) mod scripted_server;

pub use client::{Attributes, CommitReply, FileHandle, NfsClient, NfsError, WriteReply};
pub use connection::{CallError, Connection, Credential, IN_FLIGHT_MAX};
pub use mount::{MountError, mount};
pub use nfs3_types::nfs3::{nfsstat3 as Status, stable_how as Stable};
