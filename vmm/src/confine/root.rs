//! A root of its own with nothing in it but what name resolution reads.

use std::io;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, chroot, pivot_root};

/// What the C library reads to find a server by its name, as it is when the monitor starts.
const NAMES: [&str; 5] = [
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
];

/// More of one file is not taken along.
const FILE_BYTES_MAX: u64 = 256 * 1024;

const NONE: Option<&str> = None;

/// Leaves the host's files behind: the process's root becomes an empty file system, mounted over `folder` where
/// nobody else sees it, then made read-only. Takes root.
pub(super) fn empty(folder: &Path) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
    // What happens in here stays here.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    let taken: Vec<(&str, Vec<u8>)> = NAMES
        .into_iter()
        .filter_map(|path| Some((path, read(path).ok()?)))
        .collect();
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("none"),
        folder,
        Some("tmpfs"),
        plain,
        Some("size=2m,mode=755"),
    )?;
    std::fs::create_dir(folder.join("etc"))?;
    for (path, bytes) in taken {
        std::fs::write(folder.join(path.trim_start_matches('/')), bytes)?;
    }
    mount(
        NONE,
        folder,
        NONE,
        plain | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
        NONE,
    )?;
    chdir(folder)?;
    match pivot_root(".", ".") {
        // The old root lies on top of the new one now, and is taken away.
        Ok(()) => umount2(".", MntFlags::MNT_DETACH)?,
        // The host's root is the kernel's first one, which cannot be exchanged: it is covered instead. Without
        // capabilities there is no way back from under it.
        Err(nix::errno::Errno::EINVAL) => {
            mount(Some("."), "/", NONE, MsFlags::MS_MOVE, NONE)?;
            chroot(".")?;
        }
        Err(error) => return Err(error.into()),
    }
    chdir("/")?;
    Ok(())
}

fn read(path: &str) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?
        .take(FILE_BYTES_MAX)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}
