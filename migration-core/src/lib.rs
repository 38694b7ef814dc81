//! The live-migration engine: it moves a running machine's memory and device state to a peer.
//!
//! It knows no hypervisor. A monitor implements [`MemorySource`] and [`MachineSource`] on the side
//! that has the machine, [`MemorySink`] and [`MachineSink`] on the side that gets it, and calls
//! [`send`] and [`receive`]. What to do next is decided in [`policy`], which is pure; the drivers
//! measure, ask it, and move bytes.
//!
//! ```text
//!  source                                                    destination
//!  Hello(role, migration, ticket)  ───────────────────────►  the door checks the ticket
//!                                  ◄───────────────────────  Accepted(version)
//!  Setup(regions)                  ───────────────────────►  regions are those of the sink
//!                                  ◄───────────────────────  Ready
//!  Pages, Zero ... RoundEnd        ───────────────────────►  written as they arrive
//!                                  ◄───────────────────────  RoundAck
//!    (rounds, until the policy says stop)
//!  vCPUs stopped, disks drained
//!  Quiet   (a promise: see below)  ───────────────────────►  status says QuietReceived
//!  Pages, Zero, RoundEnd(last), DeviceState, Final ───────►  counts and checksums compared,
//!                                                            device state loaded
//!                                  ◄───────────────────────  Complete
//! ```
//!
//! *Quiet* is a promise of the source: it will not run the machine again unless the log says so, and
//! an attempted send of it counts as sent. This crate therefore never resumes a machine, on no path;
//! it reports what was said ([`SendFailed::said_quiet`]) and leaves the rest to its caller.
//!
//! The engine knows no keys either: connections come from a [`Connector`] and an [`Acceptor`], and those of
//! [`tls`] seal them.

#![forbid(unsafe_code)]

mod clock;
mod error;
mod frame;
#[doc(hidden)]
pub mod fuzzing;
mod machine;
mod net;
mod options;
mod pace;
mod pages;
pub mod policy;
mod receive;
mod send;
mod stats;
pub mod tls;
mod wire;

pub use clock::monotonic_ns;
pub use error::{FrameError, HostError, ReceiveError, SendError, SendFailed};
pub use machine::{
    MachineSink, MachineSource, MemorySink, MemorySource, MigrationSink, MigrationSource,
};
pub use net::{Acceptor, BoxStream, Connector, Stream, TcpAcceptor, TcpConnector};
pub use options::{Credentials, ReceiveOptions, SendOptions, Ticket};
pub use pages::{CHUNK_PAGES, PAGE_SIZE, Region};
pub use policy::{FixedCosts, Policy};
pub use receive::receive;
pub use send::send;
pub use stats::{
    ReceiveStage, ReceiveStatus, Received, RoundStats, SendStage, SendStatus, SendTimings, Sent,
};
