//! Who the process is: user, groups, capabilities, descriptors. `unsafe` for system calls that have no safe wrapper.
#![allow(unsafe_code)]

use std::io;

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

/// `_LINUX_CAPABILITY_VERSION_3` (linux/capability.h).
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// Bits of capabilities that the kernel's interface has room for.
const CAPABILITIES_MAX: libc::c_ulong = 63;

/// `struct __user_cap_header_struct` (linux/capability.h).
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: libc::c_int,
}

/// `struct __user_cap_data_struct`; version 3 takes two of them.
#[repr(C)]
#[derive(Clone, Copy)]
struct CapabilityData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Closes every descriptor from `first` on. Only for the beginning of a process, before anything owns one.
pub(super) fn close_from(first: libc::c_uint) {
    // SAFETY: nothing in this process owns a descriptor yet, so none is closed under its owner. A kernel before 5.9
    // does not know the call, and then nothing happens: whoever starts monitors marks its own close-on-exec.
    let _ = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
}

/// Becomes `uid`, with the group of the same number and no other, for good.
pub(super) fn become_user(uid: u32) -> io::Result<()> {
    // While it may: with another user it has no right to.
    drop_bounding_set();
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setgroups(&[])?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    if nix::unistd::setuid(Uid::from_raw(0)).is_ok() && uid != 0 {
        return Err(io::Error::other("it could become root again"));
    }
    Ok(())
}

/// Gives up every capability, and the right to gain one by executing a file.
pub(super) fn drop_all() -> io::Result<()> {
    drop_bounding_set();
    let header = CapabilityHeader {
        version: CAPABILITY_VERSION,
        pid: 0,
    };
    let none = [CapabilityData {
        effective: 0,
        permitted: 0,
        inheritable: 0,
    }; 2];
    // SAFETY: both structures are those of version 3 of the call, which reads them and writes neither.
    let answer =
        unsafe { libc::syscall(libc::SYS_capset, std::ptr::from_ref(&header), none.as_ptr()) };
    if answer != 0 {
        return Err(io::Error::last_os_error());
    }
    nix::sys::prctl::set_no_new_privs()?;
    Ok(())
}

/// What could be gained by executing a file: refused where it needs a privilege, and then there is none to lose.
fn drop_bounding_set() {
    for capability in 0..=CAPABILITIES_MAX {
        // SAFETY: the call takes numbers alone and changes nothing but this process's bounding set.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            return;
        }
    }
}
