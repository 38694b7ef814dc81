//! Whole nodes in one process, with real monitors and brokers where a test runs machines.

mod check;
mod formation;
mod machines;
mod rig;
mod trust;
