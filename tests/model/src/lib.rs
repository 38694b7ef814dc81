//! A model of the cutover and of *claim, confirm, run*, checked in every order of its steps within bounds.
//!
//! ```text
//!  nodes S, D, T ── proposals ──► log (compare and set; early, late, never, in any order)
//!        │ SETATTR (executed late, answered or not)     │ owner, token, migration, reserved token
//!        └─ WRITE  sent ─► checked ─► landed ─► storage server (group = token)
//! ```
//! S runs one machine with one disk and migrates it to D; any node may crash, be cut off, come back, be
//! declared lost; either side may abort at any moment; S may re-key at any moment. The storage server checks a
//! WRITE when it processes it and may let it land later, after the group has changed.
//!
//! Two worlds are checked. With [`Bounds::clocks`] a node's lease runs out before it is declared lost: at most
//! one copy runs. Without, nodes may be declared lost while they run, as with clocks that are wrong by any
//! amount: the disk must hold all the same.
//!
//! What is not modelled: several disks, COMMIT and write verifiers, the content of memory, the Raft protocol
//! below the log (it is openraft's), and the settle time's length: *settle* here ends when nothing of older
//! tokens is between check and landing.

#![forbid(unsafe_code)]

mod catch;
mod log;
mod protocol;
mod state;
mod step;

pub use catch::{catch, places};
pub use log::{Command, Log, Migration};
pub use protocol::{Bounds, Mutant, Protocol, SMALL, Verdict, worlds};
pub use state::{NodeId, Phase, State};
pub use step::Step;
