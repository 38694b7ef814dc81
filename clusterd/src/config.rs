//! What a node is started with: flags, a TOML file under the same names, and what follows from the host.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use cluster_model::{Name, NodeFacts};
use serde::Deserialize;

use crate::confine::{MONITOR_UIDS, UidRange};

/// The usual port of a node.
const PORT: u16 = 7440;
/// The usual ports of memory streams.
const MIGRATION_PORTS: PortRange = PortRange {
    first: 7450,
    last: 7481,
};
/// The longest data directory, bytes: Unix socket addresses end at 108, and ours add some forty.
const DATA_DIR_BYTES_MAX: usize = 60;
/// The oldest and newest migration stream that this version speaks.
const STREAM_VERSIONS: (u16, u16) = (1, 1);

/// Flags of `clusterd`.
#[derive(Clone, Debug, Default, clap::Parser)]
#[command(name = "clusterd", version, about = "Baton's node daemon")]
pub struct Cli {
    /// A TOML file with the long flags' names as keys; flags win over it.
    #[arg(long, value_name = "FILE", env = "BATON_CONFIG")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    given: Given,
    /// What to do instead of running the daemon.
    #[command(subcommand)]
    pub action: Option<Action>,
}

/// What `clusterd` does besides running.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Action {
    /// Let the clusterd that runs on this host join a cluster; the token comes on standard input, as the line that
    /// `clusterctl node add` prints has it.
    ///
    /// First this host is checked: /dev/kvm, processor, memory, disk, MTU, clock, and whether it reaches the
    /// cluster's volumes. When something fails, nothing is changed.
    Join {
        /// A file with the token [standard input].
        #[arg(long, value_name = "FILE")]
        token_file: Option<PathBuf>,
        /// Only check this host, and change nothing. With a token it is compared with the cluster, and the token
        /// stays good; without (an empty standard input, or a terminal), only the host itself is looked at.
        #[arg(long)]
        check: bool,
        /// Join although the check fails.
        #[arg(long, conflicts_with = "check")]
        skip_check: bool,
    },
}

/// What may be given by flag or in the file.
#[derive(Clone, Debug, Default, clap::Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Given {
    /// Where this node keeps its log, its machines' configuration and its sockets [/var/lib/baton].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// This node's name [the host's].
    #[arg(long)]
    name: Option<String>,
    /// Where peers and clusterctl reach this node [127.0.0.1:7440].
    #[arg(long, value_name = "IP:PORT")]
    listen: Option<SocketAddr>,
    /// The address that others are told [--listen].
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Where Prometheus metrics are served [nowhere].
    #[arg(long, value_name = "IP:PORT")]
    metrics_listen: Option<SocketAddr>,
    /// Memory offered to machines, MiB [the host's].
    #[arg(long, value_name = "MIB")]
    memory_mib: Option<u64>,
    /// Logical processors offered to machines [the host's].
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Where memory streams are accepted [the address of --listen].
    #[arg(long, value_name = "IP")]
    migration_listen: Option<IpAddr>,
    /// Ports for memory streams [7450-7481].
    #[arg(long, value_name = "A-B")]
    migration_ports: Option<PortRange>,
    /// The host that sources are told to send memory to [--migration-listen].
    #[arg(long, value_name = "HOST")]
    migration_advertise: Option<String>,
    /// The monitor's program [beside this one, or in PATH].
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// The storage broker's program [beside this one, or in PATH].
    #[arg(long, value_name = "PATH")]
    broker: Option<PathBuf>,
    /// A bridge that machines name, and what it is called on this host, as `lan=br0`; may be repeated [the same].
    #[arg(long, value_name = "NAME=BRIDGE")]
    #[serde(default)]
    bridge: Vec<Bridge>,
    /// The users that monitors become, one a machine; only where clusterd runs as root [805306368-1073741823].
    #[arg(long, value_name = "FIRST-LAST")]
    monitor_uids: Option<UidRange>,
}

/// A bridge as machines name it, and as this host does.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
struct Bridge {
    name: String,
    here: String,
}

impl FromStr for Bridge {
    type Err = String;
    fn from_str(text: &str) -> Result<Bridge, String> {
        match text.split_once('=') {
            Some((name, here)) if !name.is_empty() && !here.is_empty() => Ok(Bridge {
                name: name.into(),
                here: here.into(),
            }),
            _ => Err(format!(
                "`{text}` names no two bridges: use NAME=BRIDGE, as lan=br0"
            )),
        }
    }
}

impl TryFrom<String> for Bridge {
    type Error = String;
    fn try_from(text: String) -> Result<Bridge, String> {
        text.parse()
    }
}

/// Ports from `first` to `last`, both used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PortRange {
    /// The first port.
    pub first: u16,
    /// The last port.
    pub last: u16,
}

impl PortRange {
    /// Every port of the range.
    pub fn ports(self) -> RangeInclusive<u16> {
        self.first..=self.last
    }
}

impl FromStr for PortRange {
    type Err = String;
    fn from_str(text: &str) -> Result<PortRange, String> {
        let bad = || format!("`{text}` is not a range of ports: use A-B, as 7450-7481");
        let (first, last) = text.split_once('-').ok_or_else(bad)?;
        let first: u16 = first.trim().parse().map_err(|_| bad())?;
        let last: u16 = last.trim().parse().map_err(|_| bad())?;
        if first == 0 || first > last {
            return Err(bad());
        }
        Ok(PortRange { first, last })
    }
}

impl TryFrom<String> for PortRange {
    type Error = String;
    fn try_from(text: String) -> Result<PortRange, String> {
        text.parse()
    }
}

/// A node's configuration, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Log, machines, sockets.
    pub data_dir: PathBuf,
    /// The node's name.
    pub name: Name,
    /// Where peers and `clusterctl` are served.
    pub listen: SocketAddr,
    /// What others are told, `host:port`.
    pub advertise: String,
    /// Where metrics are served.
    pub metrics_listen: Option<SocketAddr>,
    /// Memory offered, MiB.
    pub memory_mib: u64,
    /// Logical processors offered.
    pub cpus: u32,
    /// Where incoming monitors listen.
    pub migration_listen: IpAddr,
    /// On which ports.
    pub migration_ports: PortRange,
    /// The host that sources are told, if it is not the address listened on.
    pub migration_advertise: Option<String>,
    /// The monitor's program.
    pub vmm: PathBuf,
    /// The broker's program.
    pub broker: PathBuf,
    /// Bridges that machines name otherwise than this host does: their name to this host's.
    pub bridges: BTreeMap<String, String>,
    /// The users that monitors become.
    pub monitor_uids: UidRange,
}

/// Why a node cannot be configured so.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("the configuration file {} is not right: {why}", path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Line, key and what would be right.
        why: String,
    },
    /// A value cannot be.
    #[error("--{flag}: {problem}")]
    Value {
        /// Which flag or key.
        flag: &'static str,
        /// What is wrong and what to try.
        problem: String,
    },
}

fn value(flag: &'static str, problem: impl Into<String>) -> ConfigError {
    ConfigError::Value {
        flag,
        problem: problem.into(),
    }
}

impl Cli {
    /// Reads the file, lets the flags win, fills in what follows from the host, and checks everything.
    ///
    /// # Errors
    /// Says which flag or key cannot be, and what to try.
    pub fn load(&self) -> Result<Config, ConfigError> {
        let file = match &self.config {
            Some(path) => read_file(path)?,
            None => Given::default(),
        };
        self.given.clone().over(file).check()
    }
}

fn read_file(path: &Path) -> Result<Given, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    toml::from_str(&text).map_err(|error| ConfigError::Parse {
        path: path.to_owned(),
        why: error.to_string().trim_end().to_owned(),
    })
}

impl Given {
    fn over(self, file: Given) -> Given {
        Given {
            data_dir: self.data_dir.or(file.data_dir),
            name: self.name.or(file.name),
            listen: self.listen.or(file.listen),
            advertise: self.advertise.or(file.advertise),
            metrics_listen: self.metrics_listen.or(file.metrics_listen),
            memory_mib: self.memory_mib.or(file.memory_mib),
            cpus: self.cpus.or(file.cpus),
            migration_listen: self.migration_listen.or(file.migration_listen),
            migration_ports: self.migration_ports.or(file.migration_ports),
            migration_advertise: self.migration_advertise.or(file.migration_advertise),
            vmm: self.vmm.or(file.vmm),
            broker: self.broker.or(file.broker),
            monitor_uids: self.monitor_uids.or(file.monitor_uids),
            bridge: if self.bridge.is_empty() {
                file.bridge
            } else {
                self.bridge
            },
        }
    }

    fn check(self) -> Result<Config, ConfigError> {
        let data_dir = self
            .data_dir
            .unwrap_or_else(|| PathBuf::from("/var/lib/baton"));
        let data_dir = std::path::absolute(&data_dir)
            .map_err(|error| value("data-dir", format!("{}: {error}", data_dir.display())))?;
        if data_dir.as_os_str().len() > DATA_DIR_BYTES_MAX {
            return Err(value(
                "data-dir",
                format!(
                    "{} is over {DATA_DIR_BYTES_MAX} bytes, and Unix sockets inside it could not be addressed; choose a shorter path",
                    data_dir.display()
                ),
            ));
        }
        let name = match self.name {
            Some(name) => Name::new(name).map_err(|error| value("name", error.to_string()))?,
            None => host_name()
                .and_then(|name| Name::new(name).ok())
                .ok_or_else(|| {
                    value(
                        "name",
                        "the host's own name cannot be used; choose one of a-z, 0-9 and '-'",
                    )
                })?,
        };
        let listen = self
            .listen
            .unwrap_or_else(|| SocketAddr::from((Ipv4Addr::LOCALHOST, PORT)));
        let advertise = match self.advertise {
            Some(address) => host_port(&address)
                .ok_or_else(|| value("advertise", format!("`{address}`; use HOST:PORT")))?,
            None if listen.ip().is_unspecified() => {
                return Err(value(
                    "advertise",
                    format!(
                        "--listen {listen} is every address of this host: say which one others use"
                    ),
                ));
            }
            None => listen.to_string(),
        };
        let migration_listen = self.migration_listen.unwrap_or(listen.ip());
        if migration_listen.is_unspecified() && self.migration_advertise.is_none() {
            return Err(value(
                "migration-advertise",
                "memory streams are accepted on every address of this host: say which one sources use",
            ));
        }
        let memory_mib = match self.memory_mib {
            Some(0) => return Err(value("memory-mib", "0; offer at least 1 MiB")),
            Some(memory) => memory,
            None => host_memory_mib()
                .ok_or_else(|| value("memory-mib", "cannot be read from /proc/meminfo; give it"))?,
        };
        let cpus = match self.cpus {
            Some(0) => return Err(value("cpus", "0; offer at least 1")),
            Some(cpus) => cpus,
            None => host_cpus(),
        };
        Ok(Config {
            data_dir,
            name,
            listen,
            advertise,
            metrics_listen: self.metrics_listen,
            memory_mib,
            cpus,
            migration_listen,
            migration_ports: self.migration_ports.unwrap_or(MIGRATION_PORTS),
            migration_advertise: self.migration_advertise,
            vmm: program("vmm", self.vmm)?,
            broker: program("broker", self.broker)?,
            monitor_uids: self.monitor_uids.unwrap_or(MONITOR_UIDS),
            bridges: self
                .bridge
                .into_iter()
                .map(|bridge| (bridge.name, bridge.here))
                .collect(),
        })
    }
}

fn host_port(address: &str) -> Option<String> {
    let (host, port) = address.rsplit_once(':')?;
    let port: u16 = port.parse().ok()?;
    (!host.is_empty() && port != 0).then(|| address.to_owned())
}

fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().split('.').next()?.to_ascii_lowercase())
}

/// Memory of this host in all, MiB.
pub(crate) fn host_memory_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024)
}

fn host_cpus() -> u32 {
    std::thread::available_parallelism()
        .ok()
        .and_then(|cpus| u32::try_from(cpus.get()).ok())
        .unwrap_or(1)
}

/// The program as given, or beside this one, or in PATH.
fn program(flag: &'static str, given: Option<PathBuf>) -> Result<PathBuf, ConfigError> {
    if let Some(path) = given {
        let absolute = std::path::absolute(&path).unwrap_or(path);
        return if absolute.is_file() {
            Ok(absolute)
        } else {
            Err(value(
                flag,
                format!("there is no program {}", absolute.display()),
            ))
        };
    }
    let name = if flag == "vmm" {
        "vmm"
    } else {
        "storage-broker"
    };
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(|folder| folder.join(name)));
    let in_path = std::env::var_os("PATH").into_iter().flat_map(|paths| {
        std::env::split_paths(&paths)
            .map(|folder| folder.join(name))
            .collect::<Vec<_>>()
    });
    beside
        .into_iter()
        .chain(in_path)
        .find(|path| path.is_file())
        .ok_or_else(|| {
            value(
                flag,
                format!("{name} is neither beside clusterd nor in PATH; say where it is"),
            )
        })
}

impl Config {
    /// What this node says of itself to the cluster.
    pub fn facts(&self) -> NodeFacts {
        let (cpu_vendor, cpu_model) = host_cpu();
        NodeFacts {
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            cpu_vendor,
            cpu_model,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            stream_versions: STREAM_VERSIONS,
            watchdog: false,
            kvm: std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .is_ok(),
        }
    }

    /// Where this node serves `clusterctl` on this host.
    pub fn admin_socket(&self) -> PathBuf {
        self.data_dir.join("clusterd.sock")
    }

    /// The address this node's connections come from: it is known by one.
    pub fn source_address(&self) -> IpAddr {
        self.listen.ip()
    }
}

fn host_cpu() -> (String, String) {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        text.lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim().to_owned())
            .unwrap_or_else(|| "unknown".to_owned())
    };
    (field("vendor_id"), field("model name"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn load(folder: &Path, file: &str, flags: &[&str]) -> Result<Config, ConfigError> {
        let path = folder.join("clusterd.toml");
        std::fs::write(&path, file).unwrap();
        let program = folder.join("program");
        std::fs::write(&program, "").unwrap();
        let program = program.to_str().unwrap();
        let mut all = vec!["clusterd", "--config", path.to_str().unwrap()];
        all.extend(["--vmm", program, "--broker", program]);
        all.extend(flags);
        Cli::try_parse_from(all).unwrap().load()
    }

    #[test]
    fn flags_win_over_the_file_and_the_rest_follows_from_the_host() {
        let folder = tempfile::tempdir().unwrap();
        let file = "name = 'n7'\nlisten = '127.0.0.9:7000'\nmemory-mib = 512\nmigration-ports = '1000-1003'\n";
        let config = load(
            folder.path(),
            file,
            &["--memory-mib", "256", "--data-dir", "/tmp/x"],
        )
        .unwrap();
        assert_eq!(config.name.as_str(), "n7");
        assert_eq!(config.advertise, "127.0.0.9:7000");
        assert_eq!(config.memory_mib, 256);
        assert_eq!(config.migration_ports.ports(), 1000..=1003);
        assert_eq!(config.migration_listen, IpAddr::from([127, 0, 0, 9]));
        assert!(config.cpus >= 1);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let cases: [(&str, &[&str], &str); 8] = [
            ("nmae = 'n1'", &[], "nmae"),
            ("memory-mib = 'much'", &[], "memory-mib"),
            ("name = 'N 1'", &[], "--name"),
            ("", &["--name", "a", "--listen", "0.0.0.0:1"], "--advertise"),
            ("", &["--name", "a", "--memory-mib", "0"], "--memory-mib"),
            ("", &["--name", "a", "--vmm", "/nowhere/vmm"], "--vmm"),
            (
                "migration-ports = '9-1'",
                &["--name", "a"],
                "migration-ports",
            ),
            ("monitor-uids = '0-100'", &["--name", "a"], "monitor-uids"),
        ];
        for (file, flags, word) in cases {
            let flags: Vec<&str> = flags.to_vec();
            let error = if flags.contains(&"--vmm") {
                Cli::try_parse_from(["clusterd"].iter().chain(flags.iter()))
                    .unwrap()
                    .load()
                    .unwrap_err()
            } else {
                load(folder.path(), file, &flags).unwrap_err()
            };
            assert!(
                error.to_string().contains(word),
                "{word} is not in: {error}"
            );
        }
    }

    #[test]
    fn a_data_directory_too_long_for_its_sockets_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let long = format!("/tmp/{}", "x".repeat(DATA_DIR_BYTES_MAX));
        let error = load(folder.path(), "", &["--name", "a", "--data-dir", &long]).unwrap_err();
        assert!(error.to_string().contains("--data-dir"), "{error}");
    }
}
