//! The monitor: one virtual machine on KVM, in one process.
//!
//! `unsafe` stands in the modules that say `#![allow(unsafe_code)]` (KVM's ioctls, guest memory); nowhere else.

#![deny(unsafe_code)]

pub use cluster_model::phase;

pub mod boot;
pub mod clock;
pub mod confine;
pub mod console;
pub mod control;
pub mod devices;
pub mod gate;
pub mod guest;
pub mod handles;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod monitor;
pub mod permit;
pub mod platform;
pub mod run_log;
pub mod spec;
pub mod state;
pub mod telemetry;
pub mod vcpu;
