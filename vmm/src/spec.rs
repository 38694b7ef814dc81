//! The machine file: what `clusterd` tells a monitor to be, read and checked once at the door.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use cluster_model::ids::{MigrationId, NodeId, Token, VmId};
use cluster_model::limits::{self, Measures};
use cluster_model::state::{Boot, OnIsolation};
use serde::{Deserialize, Serialize};
use storage_broker::disk::DiskSpec;
use storage_broker::tls::ClientTls;
use storage_broker::volume::{DiskPath, VolumeUrl};

use crate::boot;
use crate::guest;
use crate::layout::VIRTIO_SLOTS_MAX;

/// The largest machine file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The bytes of a migration's ticket.
pub const TICKET_BYTES: usize = 32;

/// The most addresses that a memory stream is accepted on.
const LISTEN_MAX: usize = 8;

// What the log lets in this monitor can be: each line holds a limit of the table against what it rests on here.
const _: () = {
    assert!(*limits::VCPUS.end() <= boot::mptable::MPTABLE_CPUS_MAX);
    assert!(*limits::VCPUS.end() as u64 <= guest::abi::VCPUS_MAX);
    assert!(limits::SLOTS_MAX <= VIRTIO_SLOTS_MAX);
    assert!(limits::CMDLINE_BYTES_MAX <= boot::linux::CMDLINE_ROOM_BYTES);
    assert!(limits::SELF_CHECK_OWN_MIB << 20 >= guest::abi::WORKING_SET_START);
    assert!(limits::SELF_CHECK_DISK_BYTES_MIN >= guest::DISK_BYTES_MIN);
    assert!(
        guest::working_set_end(limits::SELF_CHECK_WORKING_SET_MIB_MAX)
            <= boot::start::IDENTITY_MAP_BYTES_MAX
    );
};

/// The file's contents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineFile {
    /// The machine.
    pub vm_id: VmId,
    /// Its name.
    pub vm_name: String,
    /// The node it runs on.
    pub node_id: NodeId,
    /// The node's uid on storage servers.
    pub node_uid: u32,
    /// The address that connections to storage servers come from.
    #[serde(default)]
    pub node_address: Option<IpAddr>,
    /// The token it is to run under.
    pub token: Token,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Virtual processors.
    pub vcpus: u32,
    /// What it boots.
    pub boot: Boot,
    /// Its disks, in the guest's order.
    #[serde(default)]
    pub disks: Vec<MachineDisk>,
    /// Its network interfaces, in the guest's order, behind the disks.
    #[serde(default)]
    pub nics: Vec<MachineNic>,
    /// The file that the self-checking guest's flushed numbers are appended to.
    #[serde(default)]
    pub witness: Option<PathBuf>,
    /// What follows when the lease runs out.
    #[serde(default)]
    pub on_isolation: OnIsolation,
    /// Set on a migration's destination.
    #[serde(default)]
    pub incoming: Option<Incoming>,
    /// What to log, as in `RUST_LOG`; the environment's variable goes first.
    #[serde(default)]
    pub log: Option<String>,
    /// How it is confined.
    #[serde(default)]
    pub confinement: Confinement,
}

/// What a monitor gives up before its guest's first instruction. What takes no privilege it gives up in any case.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confinement {
    /// The user and group (one number) that it becomes; takes root. Without it the monitor stays who it is.
    #[serde(default)]
    pub uid: Option<u32>,
    /// What whoever started it has done to it already, or could not: told on in its status.
    #[serde(default)]
    pub measures: Vec<Measure>,
}

/// One measure of confinement, as it came out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measure {
    /// Its name: `uid`, `seccomp`, `memory-limit`, …
    pub name: String,
    /// Whether it holds.
    pub applied: bool,
    /// What was done, or why it could not be.
    pub detail: String,
}

impl Measure {
    /// As the control service shows it.
    pub fn into_wire(self) -> proto::monitor::Measure {
        proto::monitor::Measure {
            name: self.name,
            applied: self.applied,
            detail: self.detail,
        }
    }
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineDisk {
    /// The volume's address: `nfs://…` or `dir:/…`.
    pub volume: String,
    /// The file on the volume.
    pub path: String,
    /// The cluster that the volume belongs to.
    pub cluster_id: String,
    /// The uid that owns disk files.
    pub broker_uid: u32,
    /// How far the volume's server enforces tokens.
    pub fence_class: String,
    /// Bytes, as the log has it; the file must have as many.
    pub size_bytes: u64,
    /// The certificates (PEM) that vouch for the volume's server; with them the disk is reached under TLS only.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tls_ca: String,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineNic {
    /// The tap device on this host.
    pub tap: String,
    /// The bridge that the tap is plugged into.
    pub bridge: String,
    /// `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
}

/// What a destination waits for.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Incoming {
    /// The migration.
    pub migration_id: MigrationId,
    /// Its ticket: 64 hexadecimal digits.
    pub ticket: String,
    /// Where the memory stream is accepted; port 0 takes a free one.
    pub listen: Vec<SocketAddr>,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming")
            .field("migration_id", &self.migration_id)
            .field("ticket", &"(secret)")
            .field("listen", &self.listen)
            .finish()
    }
}

/// Why a machine file is not one.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It cannot be read.
    #[error("cannot read the machine file {}: {source}", path.display())]
    Read {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no JSON of this kind.
    #[error("the machine file {} is malformed: {problem}", path.display())]
    Malformed {
        /// Where.
        path: PathBuf,
        /// What is wrong, and where in it.
        problem: String,
    },
    /// A value is out of its range.
    #[error("the machine file's `{field}` is not usable: {problem}")]
    Field {
        /// Which.
        field: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

fn field(field: impl Into<String>, problem: impl Into<String>) -> SpecError {
    SpecError::Field {
        field: field.into(),
        problem: problem.into(),
    }
}

/// A machine file whose every value is known to be usable.
#[derive(Clone, Debug)]
pub struct ValidatedSpec {
    file: MachineFile,
    disks: Vec<DiskSpec>,
    macs: Vec<[u8; 6]>,
    ticket: Option<[u8; TICKET_BYTES]>,
}

impl ValidatedSpec {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// See [`SpecError`].
    pub fn read(path: &Path) -> Result<ValidatedSpec, SpecError> {
        use std::io::Read;
        let error = |source| SpecError::Read {
            path: path.into(),
            source,
        };
        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(error)?;
        file.take(FILE_BYTES_MAX)
            .read_to_string(&mut text)
            .map_err(error)?;
        let file = serde_json::from_str(&text).map_err(|error| SpecError::Malformed {
            path: path.into(),
            problem: error.to_string(),
        })?;
        ValidatedSpec::new(file)
    }

    /// Checks a file's contents.
    ///
    /// # Errors
    /// See [`SpecError`].
    pub fn new(file: MachineFile) -> Result<ValidatedSpec, SpecError> {
        if file.token == Token::NONE || file.token.0 >= Token::LIMIT {
            return Err(field("token", format!("{} was never granted", file.token)));
        }
        limits::check(&Measures {
            memory_mib: file.memory_mib,
            vcpus: file.vcpus,
            boot: &file.boot,
            disk_bytes: file.disks.iter().map(|disk| disk.size_bytes),
            nics: file.nics.len(),
        })
        .map_err(|error| field(error.field, error.problem))?;
        let disks = file
            .disks
            .iter()
            .enumerate()
            .map(|(index, disk)| check_disk(&file, index, disk))
            .collect::<Result<_, _>>()?;
        let macs = file
            .nics
            .iter()
            .enumerate()
            .map(|(index, nic)| {
                check_tap(index, &nic.tap)?;
                limits::parse_mac(&nic.mac).ok_or_else(|| {
                    field(
                        format!("nics[{index}].mac"),
                        "write six bytes as aa:bb:cc:dd:ee:ff, not a group's address",
                    )
                })
            })
            .collect::<Result<_, _>>()?;
        let ticket = file.incoming.as_ref().map(check_incoming).transpose()?;
        Ok(ValidatedSpec {
            file,
            disks,
            macs,
            ticket,
        })
    }

    /// The file's contents.
    pub fn file(&self) -> &MachineFile {
        &self.file
    }

    /// What to open for each disk.
    pub fn disks(&self) -> &[DiskSpec] {
        &self.disks
    }

    /// The MAC address of each network interface.
    pub fn macs(&self) -> &[[u8; 6]] {
        &self.macs
    }

    /// The incoming migration and its ticket.
    pub fn incoming(&self) -> Option<(&Incoming, [u8; TICKET_BYTES])> {
        self.file.incoming.as_ref().zip(self.ticket)
    }
}

fn check_disk(file: &MachineFile, index: usize, disk: &MachineDisk) -> Result<DiskSpec, SpecError> {
    let name = |part: &str| format!("disks[{index}].{part}");
    let volume: VolumeUrl = disk
        .volume
        .parse()
        .map_err(|error| field(name("volume"), format!("{error}")))?;
    let path: DiskPath = disk
        .path
        .parse()
        .map_err(|error| field(name("path"), format!("{error}")))?;
    let enforced = matches!(disk.fence_class.as_str(), "gid-token" | "uid-token");
    if !enforced && !matches!(disk.fence_class.as_str(), "time" | "none") {
        return Err(field(
            name("fence_class"),
            "use gid-token, uid-token, time or none",
        ));
    }
    if file.on_isolation == OnIsolation::RunUntilFenced && !enforced {
        return Err(field(
            "on_isolation",
            format!(
                "run-until-fenced needs storage that fences; disk {index} has class {}",
                disk.fence_class
            ),
        ));
    }
    if file.node_uid == disk.broker_uid {
        return Err(field(
            "node_uid",
            format!(
                "{} owns the disk files: a server favours the owner over the token",
                file.node_uid
            ),
        ));
    }
    let tls = ClientTls::of_volume(&volume, &disk.tls_ca)
        .map_err(|error| field(name("tls_ca"), error.to_string()))?;
    Ok(DiskSpec {
        tls,
        ..DiskSpec::new(volume, path, file.node_uid, file.token)
    })
}

fn check_tap(index: usize, tap: &str) -> Result<(), SpecError> {
    /// IFNAMSIZ with its closing zero.
    const NAME_BYTES_MAX: usize = 15;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if tap.is_empty() || tap.len() > NAME_BYTES_MAX || !tap.bytes().all(plain) {
        return Err(field(
            format!("nics[{index}].tap"),
            "write the name of a tap device, 15 bytes at most",
        ));
    }
    Ok(())
}

fn check_incoming(incoming: &Incoming) -> Result<[u8; TICKET_BYTES], SpecError> {
    if incoming.listen.is_empty() || incoming.listen.len() > LISTEN_MAX {
        return Err(field(
            "incoming.listen",
            format!("give 1 to {LISTEN_MAX} addresses"),
        ));
    }
    parse_hex(&incoming.ticket)
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| {
            field(
                "incoming.ticket",
                format!("write {TICKET_BYTES} bytes in hexadecimal"),
            )
        })
}

fn parse_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).map(|value| value as u8);
    text.as_bytes()
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => Some(digit(high)? << 4 | digit(low)?),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests;
