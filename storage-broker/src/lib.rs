//! Shared storage for virtual machines: volumes, disks, and the fence that the storage server enforces.
//!
//! ```text
//!  volume   what `nfs://…` and `dir:…` mean; the identity file; paths of disks
//!  dialer   the one place where connections to storage servers are made
//!  tls      RPC-with-TLS: the question, the handshake, who is trusted
//!  nfs      a pipelined NFSv3 client: record marking, calls, MOUNT
//!  fence    claim and verify: moving files from token to token
//!  certify  trying what a server really enforces
//!  disk     what a monitor does I/O through: hold, drain, re-key, replay
//!  store    the metadata work on a volume: probe, adopt, create, delete
//!  nfs_server  the embedded NFS server
//!  daemon   the gRPC service that `clusterd` talks to
//! ```

#![forbid(unsafe_code)]

pub mod certify;
pub mod daemon;
pub mod dialer;
pub mod disk;
pub mod fence;
#[doc(hidden)]
pub mod fuzzing;
pub mod latency;
pub mod nfs;
pub mod nfs_server;
pub mod store;
pub mod tls;
pub mod volume;
