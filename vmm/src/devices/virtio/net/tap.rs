//! A tap: the host's end of the guest's network cable. `unsafe` for its ioctls.
//!
//! Its link is down until the guest runs, and down again once the guest is quiet: a bridge then neither
//! sends frames to it nor remembers the guest's address there, so that of a migration's two taps it
//! sees one at a time (but for up to a second after a link went down: the kernel looks at carriers that are gone once
//! a second, and meanwhile the other side's announcement decides).
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::confine::TUNSETCARRIER;
use crate::devices::virtio::ready::watch_file;

/// The longest name of an interface.
const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

/// Adds a port to a bridge (linux/sockios.h).
const SIOCBRADDIF: libc::c_ulong = 0x89a2;

/// A tap that is plugged in, its link down.
#[derive(Debug)]
pub struct PluggedTap {
    name: String,
    file: File,
}

/// An open tap, for whole Ethernet frames.
#[derive(Debug)]
pub struct Tap {
    file: AsyncFd<File>,
    /// Whether it is an interface, with a link to set.
    has_link: bool,
}

/// Why a tap cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Not a name.
    #[error(
        "{0:?} is no name for a network interface: 1 to {NAME_BYTES_MAX} letters, digits, dots, dashes"
    )]
    Name(String),
    /// The bridge does not take it.
    #[error(
        "cannot plug {name} into the bridge {bridge}: {source}; it needs CAP_NET_ADMIN and a bridge of that \
         name on this host (`ip link add {bridge} type bridge`), or clusterd's `--bridge` says what it is called here"
    )]
    Bridge {
        /// The tap.
        name: String,
        /// The bridge.
        bridge: String,
        /// Why not.
        source: io::Error,
    },
    /// The host refused.
    #[error("cannot {doing} {name}: {source}; it needs CAP_NET_ADMIN, and the tun module")]
    Refused {
        /// What was tried.
        doing: &'static str,
        /// On which interface.
        name: String,
        /// Why not.
        source: io::Error,
    },
}

impl PluggedTap {
    /// Opens the tap `name`, makes it where it is missing and plugs it into `bridge`, its link down. A tap made here
    /// is gone when it is closed. Takes CAP_NET_ADMIN; what is done with the tap later does not.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn open(name: &str, bridge: &str) -> Result<Self, TapError> {
        let refused = |doing, source| TapError::Refused {
            doing,
            name: name.into(),
            source,
        };
        let mut interface = request(name)?;
        let file = make(&mut interface).map_err(|source| refused("make the tap", source))?;
        let control = socket().map_err(|source| refused("open a control socket for", source))?;
        plug(&control, interface, bridge).map_err(|source| TapError::Bridge {
            name: name.into(),
            bridge: bridge.into(),
            source,
        })?;
        // The interface is up for good, its carrier comes and goes: a bridge looks at both, and only the first
        // takes a privilege.
        set_carrier(&file, false)
            .and_then(|()| take_up(&control, name))
            .map_err(|source| refused("take up", source))?;
        Ok(PluggedTap {
            name: name.into(),
            file,
        })
    }
}

impl Tap {
    /// Puts a tap to use. Called on a tokio runtime.
    ///
    /// # Errors
    /// [`TapError::Refused`] when it cannot be waited for.
    pub fn new(plugged: PluggedTap) -> Result<Self, TapError> {
        let tap = Self::from_file(plugged.file).map_err(|source| TapError::Refused {
            doing: "wait for",
            name: plugged.name,
            source,
        })?;
        Ok(Self {
            has_link: true,
            ..tap
        })
    }

    /// Sets the link up or down.
    ///
    /// # Errors
    /// What the host says.
    pub fn set_link(&self, up: bool) -> io::Result<()> {
        if self.has_link {
            set_carrier(self.file.get_ref(), up)
        } else {
            Ok(())
        }
    }

    /// A tap, or anything else that carries one frame a read and write, already open and not blocking.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn from_file(file: File) -> io::Result<Self> {
        Ok(Self {
            file: watch_file(file)?,
            has_link: false,
        })
    }

    /// Waits until a frame may be there.
    ///
    /// # Errors
    /// When the runtime is gone.
    pub async fn readable(&self) -> io::Result<()> {
        // Left ready: only a read that finds nothing clears it.
        self.file
            .readable()
            .await
            .map(|mut ready| ready.retain_ready())
    }

    /// Reads one frame if there is one.
    ///
    /// # Errors
    /// `WouldBlock` where there is none, and whatever the host says.
    pub fn try_read(&self, frame: &mut [u8]) -> io::Result<usize> {
        self.file
            .try_io(Interest::READABLE, |mut file| file.read(frame))
    }

    /// Writes one frame.
    ///
    /// # Errors
    /// What the host says.
    pub async fn write(&self, frame: &[u8]) -> io::Result<()> {
        // Tried before it is waited for: a tap whose link was down when it was first looked at is writable
        // once the link is up, and need not say so.
        match self.file.get_ref().write(frame) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other.map(|_| ()),
        }
        self.file
            .async_io(Interest::WRITABLE, |mut file| file.write(frame))
            .await
            .map(|_| ())
    }
}

fn request(name: &str) -> Result<libc::ifreq, TapError> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(good) {
        return Err(TapError::Name(name.into()));
    }
    let mut interface = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_ifindex: 0 },
    };
    for (to, from) in interface.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(interface)
}

fn make(interface: &mut libc::ifreq) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(Path::new("/dev/net/tun"))?;
    interface.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the descriptor is open and `interface` is a whole `ifreq`, which TUNSETIFF reads and fills.
    check(unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETIFF,
            std::ptr::from_mut(interface),
        )
    })?;
    Ok(file)
}

fn socket() -> io::Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType};
    // Bound to nothing: only its ioctls are used.
    Ok(nix::sys::socket::socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?)
}

fn plug(control: &OwnedFd, mut port: libc::ifreq, bridge: &str) -> io::Result<()> {
    let mut interface = request(bridge).map_err(io::Error::other)?;
    ioctl(control, libc::SIOCGIFINDEX as libc::c_ulong, &mut port)?;
    // SAFETY: SIOCGIFINDEX has filled this member.
    interface.ifr_ifru.ifru_ifindex = unsafe { port.ifr_ifru.ifru_ifindex };
    match ioctl(control, SIOCBRADDIF, &mut interface) {
        // It is plugged in already.
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
        other => other,
    }
}

fn take_up(control: &OwnedFd, name: &str) -> io::Result<()> {
    let mut interface = request(name).map_err(io::Error::other)?;
    ioctl(control, libc::SIOCGIFFLAGS as libc::c_ulong, &mut interface)?;
    // SAFETY: SIOCGIFFLAGS has filled this member.
    let flags = unsafe { interface.ifr_ifru.ifru_flags };
    interface.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    ioctl(control, libc::SIOCSIFFLAGS as libc::c_ulong, &mut interface)
}

/// Plugs the cable in or out (linux/if_tun.h, since Linux 5.0); asks for nothing but the open tap.
fn set_carrier(tap: &File, on: bool) -> io::Result<()> {
    let on = libc::c_int::from(on);
    // SAFETY: the descriptor is open, and TUNSETCARRIER reads one integer.
    check(unsafe {
        libc::ioctl(
            tap.as_raw_fd(),
            TUNSETCARRIER as libc::c_ulong,
            std::ptr::from_ref(&on),
        )
    })
}

fn ioctl(control: &OwnedFd, number: libc::c_ulong, interface: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the descriptor is open, and every request used here reads or fills one `ifreq`.
    check(unsafe { libc::ioctl(control.as_raw_fd(), number, std::ptr::from_mut(interface)) })
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
