//! The node daemon: the replicated log, and what a node does with it.

#![forbid(unsafe_code)]

pub mod net;
pub mod raft;
