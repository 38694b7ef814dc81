//! Fuzzing: what comes from outside is decoded without a panic and within a bound on memory, whatever it is.
//!
//! ```text
//!  targets/…     what takes an input, one module for each thing that is decoded, with seeds and a bound
//!  bins/…        a libFuzzer program for each, in a workspace of its own; built with coverage counters
//!  corpus/…      the inputs that reach something no other does, and every one that found something
//!  bin/fuzz      builds the programs, runs them for a while, says what they reached
//! ```
//! `cargo test -p fuzz` runs every input of the corpus through its target, without counters and without libFuzzer.

#![deny(unsafe_code)]

pub mod alone;
pub mod bench;
pub mod cluster;
pub mod file;
pub mod guest;
pub mod input;
pub mod json;
pub mod memory;
pub mod runtime;
pub mod socket;
mod source;
pub mod target;
pub mod targets;
