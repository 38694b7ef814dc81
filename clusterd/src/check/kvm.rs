//! The version of the KVM API, by the one ioctl that it takes.

#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;

/// `KVM_GET_API_VERSION`, `_IO(0xAE, 0x00)` in linux/kvm.h.
const GET_API_VERSION: nix::libc::Ioctl = 0xAE00;

/// Opens /dev/kvm and asks for its version.
///
/// # Errors
/// In words, with the device's name.
pub(super) fn api_version() -> Result<i32, String> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|error| format!("/dev/kvm cannot be opened: {error}"))?;
    // SAFETY: the descriptor is open for the length of the call, and this request takes no argument and neither
    // reads nor writes memory of ours; another device behind that name would answer an unknown request with ENOTTY.
    let version = unsafe { nix::libc::ioctl(device.as_raw_fd(), GET_API_VERSION, 0) };
    nix::errno::Errno::result(version)
        .map_err(|error| format!("/dev/kvm does not say its version: {error}"))
}
