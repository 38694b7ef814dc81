//! The protocol that passes a machine and its disk from node to node, checked in every order of its steps.
//!
//! ```text
//!             log.rs            one record: owner, token, migration; entries that commit late or never
//!            ╱   │   ╲
//!     Source  Destination  Third     host.rs   lease, monitor, and the flow claim ► settle ► confirm ► run
//!            ╲   │   ╱
//!           storage.rs          the file's group; SETATTRs and WRITEs under way
//! ```
//!
//! [`protocol`] says what may happen next, [`properties`] what must hold whatever happens, [`bounds`] how much
//! happens, and [`mutants`] what breaks when a rule is left out. The checker is breadth first and exhaustive:
//! a result is a fact about all histories within its bounds, and about no longer ones.
//!
//! **What is modelled.** One machine with one file. Migrations from the source to the destination, with re-keys
//! and renewed tokens at any moment, abort or cutover. Loss of a node, and takeover by any node that is up, the
//! old owner included. At every step a host, a monitor or a `clusterd` may die, a lease may run out. SETATTRs may
//! be executed late, more than once, or never; their answers may be lost. WRITEs may be checked and may land at
//! any later time. Messages between the two sides need no channel of their own: all that they carry (*quiet*)
//! is true for ever once it is said, and whoever hears it late is whoever acts late.
//!
//! **What time is.** Only its consequences: a lease is valid or not, and the leader proposes a loss only when it is
//! not; a settle step comes after the landing of what the server had let in. [`Bounds::leases_hold`] takes the
//! first away: then two copies may execute, and the disk must still be safe.
//!
//! **What is not.** The contents of memory, several files of one machine, COMMIT and write verifiers, restarts of the
//! storage server, planned stops, import and export, queued migrations, and whether anything ever
//! happens: nothing here says that a protocol makes progress, except that what should be reached is.

#![forbid(unsafe_code)]

pub mod bounds;
pub mod check;
pub mod host;
pub mod log;
pub mod mutants;
pub mod properties;
pub mod protocol;
pub mod state;
pub mod step;
pub mod storage;

pub use bounds::{Bounds, DEEP, SMALL, USUAL};
pub use check::{Counterexample, Outcome, count_out, exhaust, hunt};
pub use mutants::Mutant;
pub use protocol::Protocol;
