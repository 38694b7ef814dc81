//! Deterministic simulation of a cluster: the real decisions of `cluster-model`, carried out in a world of
//! nodes that crash and stand still, links that break one way or both, clocks that drift and jump, and a
//! storage server with the semantics that were measured on real ones.
//!
//! ```text
//!  seed ─► World ─ queue of events in virtual time ─┬─ daemon.rs   log, lease, agent, controllers
//!            │                                      ├─ flows.rs    acts as steps with waits
//!            │                                      ├─ machines.rs monitors, guests, migrations
//!            │                                      ├─ storage.rs  the NFS server
//!            │                                      └─ faults.rs   trouble and operators
//!            └─ invariants/   checked after every event
//! ```
//! The same seed gives the same history. The log is a model of Raft (`raft.rs`), synced before it speaks.

#![forbid(unsafe_code)]

mod daemon;
mod event;
mod faults;
mod flows;
mod invariants;
mod leader;
mod leases;
mod machines;
mod monitor;
mod mutants;
mod queue;
pub mod raft;
mod setup;
mod storage;
mod world;

pub use mutants::Mutant;
pub use world::World;
