//! What this host says of itself. Reads, and changes nothing.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use cluster_model::NodeRole;

use super::confinement::{self, Possible};
use super::{Finding, kvm};
use crate::cgroups::Groups;
use crate::config::Config;
use crate::confine;

/// A processor, as /proc/cpuinfo has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// CPUID vendor.
    pub vendor: String,
    /// Model name.
    pub model: String,
}

/// The interface of an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// The largest packet it carries, bytes.
    pub mtu: u32,
}

/// What a directory lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// The kind of file system, in words.
    pub file_system: String,
    /// It is gone when the host restarts.
    pub in_memory: bool,
    /// It is another host's.
    pub remote: bool,
    /// Room left for us.
    pub free_bytes: u64,
}

/// What a host says of itself.
#[derive(Clone, Debug)]
pub struct HostFacts {
    /// The KVM API's version, or why there is none.
    pub kvm: Result<i32, String>,
    /// Its processor.
    pub cpu: Cpu,
    /// Memory in all.
    pub memory_mib: Option<u64>,
    /// Where the data directory lies.
    pub room: Result<Room, String>,
    /// The interface of the node's address.
    pub link: Result<Link, String>,
    /// How far monitors can be confined.
    pub confinement: Possible,
}

impl HostFacts {
    /// Looks at this host, as the host of a node that is configured so.
    pub async fn read(config: &Config) -> HostFacts {
        let facts = config.facts();
        HostFacts {
            kvm: kvm::api_version(),
            cpu: Cpu {
                vendor: facts.cpu_vendor,
                model: facts.cpu_model,
            },
            memory_mib: crate::config::host_memory_mib(),
            room: room(&config.data_dir),
            link: link(config).await,
            confinement: Possible {
                is_root: nix::unistd::geteuid().is_root(),
                uids: config.monitor_uids,
                namespace: confine::can_separate(),
                limits: Groups::of_host(&config.data_dir).in_words(),
            },
        }
    }

    /// What can be judged of this host alone: in the order it is shown, `role` is what it is to be, `None`
    /// where that is not known yet.
    pub fn judged_alone(
        &self,
        config: &Config,
        role: Option<NodeRole>,
        committed_mib: Option<u64>,
    ) -> Vec<Finding> {
        let needs_kvm = role != Some(NodeRole::Witness);
        let mut findings = vec![
            super::kvm(&self.kvm, needs_kvm),
            super::memory(self.memory_mib, config.memory_mib, committed_mib),
            super::data_dir(&config.data_dir, &self.room),
        ];
        findings.extend(confinement::possible(&self.confinement));
        findings
    }
}

/// The interface that holds the node's address.
///
/// # Errors
/// In words, when there is none or the address is not known.
pub async fn link(config: &Config) -> Result<Link, String> {
    let listen = config.source_address();
    let address = if listen.is_unspecified() {
        // Every address is listened on; others are told this one.
        let resolved = tokio::net::lookup_host(&config.advertise).await;
        let mut resolved =
            resolved.map_err(|error| format!("{} does not resolve: {error}", config.advertise))?;
        let first = resolved.next();
        first
            .map(|address| address.ip())
            .ok_or_else(|| format!("{} has no address", config.advertise))?
    } else {
        listen
    };
    let known = nix::ifaddrs::getifaddrs()
        .map_err(|error| format!("the host's interfaces cannot be listed: {error}"))?;
    let known: Vec<Held> = known
        .filter_map(|interface| {
            let ip = |address: nix::sys::socket::SockaddrStorage| {
                let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))
            };
            Some(Held {
                address: ip(interface.address?)?,
                mask: interface.netmask.and_then(ip),
                name: interface.interface_name,
            })
        })
        .collect();
    let name = interface_of(address, &known)
        .ok_or_else(|| format!("no interface of this host has the address {address}"))?;
    let mtu = std::fs::read_to_string(format!("/sys/class/net/{name}/mtu"))
        .map_err(|error| format!("the MTU of {name} cannot be read: {error}"))?;
    Ok(Link {
        mtu: mtu.trim().parse().unwrap_or(0),
        name: name.to_owned(),
    })
}

/// An address that an interface holds.
struct Held {
    name: String,
    address: IpAddr,
    mask: Option<IpAddr>,
}

fn interface_of(address: IpAddr, known: &[Held]) -> Option<&str> {
    let exactly = known.iter().find(|held| held.address == address);
    // Of a loopback network every address is the host's own.
    let around = || {
        known
            .iter()
            .find(|held| address.is_loopback() && same_network(address, held.address, held.mask))
    };
    exactly.or_else(around).map(|held| held.name.as_str())
}

fn same_network(one: IpAddr, other: IpAddr, mask: Option<IpAddr>) -> bool {
    match (one, other, mask) {
        (IpAddr::V4(one), IpAddr::V4(other), Some(IpAddr::V4(mask))) => one & mask == other & mask,
        _ => false,
    }
}

/// What the directory lies on, or would, were it made.
fn room(data_dir: &Path) -> Result<Room, String> {
    use nix::unistd::{AccessFlags, access};
    let there: PathBuf = data_dir
        .ancestors()
        .find(|path| path.exists())
        .map_or_else(|| PathBuf::from("/"), Path::to_owned);
    access(&there, AccessFlags::W_OK | AccessFlags::X_OK)
        .map_err(|error| format!("{} cannot be written: {error}", there.display()))?;
    let stat = nix::sys::statfs::statfs(&there).map_err(|error| {
        format!(
            "the file system of {} says nothing: {error}",
            there.display()
        )
    })?;
    let block_bytes = u64::try_from(stat.block_size()).unwrap_or(0);
    // The magic numbers of linux/magic.h have 32 bits.
    let (file_system, in_memory, remote) = file_system(stat.filesystem_type().0 as u32);
    Ok(Room {
        file_system,
        in_memory,
        remote,
        free_bytes: stat.blocks_available().saturating_mul(block_bytes),
    })
}

/// The name of a file system, whether it lies in memory, whether elsewhere (linux/magic.h).
fn file_system(magic: u32) -> (String, bool, bool) {
    let (name, in_memory, remote) = match magic {
        0xEF53 => ("ext4", false, false),
        0x5846_5342 => ("xfs", false, false),
        0x9123_683E => ("btrfs", false, false),
        0x2FC1_2FC1 => ("zfs", false, false),
        0x0102_1994 => ("tmpfs", true, false),
        0x8584_58F6 => ("ramfs", true, false),
        0x794C_7630 => ("overlayfs", false, false),
        0x6969 => ("nfs", false, true),
        0xFF53_4D42 | 0xFE53_4D42 => ("smb", false, true),
        0x00C3_6400 => ("ceph", false, true),
        0x6573_5546 => ("fuse", false, true),
        other => return (format!("a file system of kind {other:#x}"), false, false),
    };
    (name.to_owned(), in_memory, remote)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_belongs_to_the_interface_that_holds_it() {
        let held = |name: &str, address: [u8; 4], mask: [u8; 4]| Held {
            name: name.into(),
            address: address.into(),
            mask: Some(mask.into()),
        };
        let known = [
            held("lo", [127, 0, 0, 1], [255, 0, 0, 0]),
            held("eth0", [10, 0, 0, 5], [255, 255, 255, 0]),
            held("br0", [10, 0, 0, 7], [255, 255, 255, 0]),
        ];
        for (address, name) in [
            ([127, 0, 0, 1], Some("lo")),
            ([127, 200, 3, 4], Some("lo")),
            ([10, 0, 0, 7], Some("br0")),
            // A neighbour's.
            ([10, 0, 0, 8], None),
        ] {
            assert_eq!(interface_of(address.into(), &known), name, "{address:?}");
        }
        assert_eq!(interface_of("::1".parse().unwrap(), &known), None);
    }

    #[test]
    fn a_directory_that_is_not_there_yet_is_judged_by_what_it_would_lie_on() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a/b/c");
        let (now, then) = (room(folder.path()).unwrap(), room(&deep).unwrap());
        assert_eq!(now.file_system, then.file_system);
        assert!(!deep.exists(), "nothing is made by looking");
    }
}
