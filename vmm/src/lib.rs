//! The monitor: one virtual machine on KVM, in one process.
//!
//! `unsafe` stands in the modules that say `#![allow(unsafe_code)]` (KVM's ioctls, guest memory); nowhere else.

#![deny(unsafe_code)]

pub mod console;
pub mod devices;
pub mod kvm;
pub mod layout;
pub mod memory;
pub mod state;
