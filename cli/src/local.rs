//! A whole cluster on this machine: three (or more) `clusterd`, an embedded NFS server, loopback addresses.
//!
//! What is running is written to `cluster.json` in the cluster's folder, so that a later command finds
//! it. Programs are looked for beside this one, then in `PATH`.

mod assemble;
mod process;

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::token::{AccessToken, Secret};
use serde::{Deserialize, Serialize};

use crate::client::{self, CliError, Connection, Endpoint};
use crate::private_file;
use process::{STOP_TIMEOUT, reap, spawn};

pub use process::{processes_of, program};

/// The port of every node's API.
pub const API_PORT: u16 = 7440;
/// The port of every node's metrics.
pub const METRICS_PORT: u16 = 7441;
/// Ports for memory streams.
pub const MIGRATION_PORTS: (u16, u16) = (7450, 7481);
/// The embedded NFS server's port.
pub const NFS_PORT: u16 = 2049;
/// How long a started program may take to answer.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// The largest `cluster.json` read, bytes: the nodes and what tests say about them.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// Nodes of a local cluster at most.
pub const NODES_MAX: u8 = 9;

/// What a local cluster is made of.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Plan {
    /// Its folder.
    pub folder: PathBuf,
    /// The first three parts of its loopback addresses, `127.42.7`.
    pub subnet: [u8; 3],
    /// Memory that each node offers, MiB.
    pub memory_mib: u64,
    /// CPUs that each node offers.
    pub cpus: u32,
    /// The fast lease profile.
    pub fast: bool,
    /// Where a relay stands between the parties: the first three parts of the addresses under which
    /// they are told to others. `None`: they meet directly.
    #[serde(default)]
    pub relay: Option<[u8; 3]>,
    /// Whether every node's processes look for armed failpoints in the file `failpoints` of its folder (tests).
    #[serde(default)]
    pub failpoints: bool,
    /// Whether every node's processes shift their clocks by the file `clock` of its folder (tests).
    #[serde(default)]
    pub clocks: bool,
    /// A bridge that machines may name; on node `n1` it is the host's bridge of that name and `-n1` (tests).
    #[serde(default)]
    pub bridge: Option<String>,
    /// Variables that every node is started with, besides those of whoever starts it (tests).
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// What stands before the program of a member, by the member's name: how it gets into a namespace of its
    /// own (tests).
    #[serde(default)]
    pub enter: BTreeMap<String, Vec<String>>,
    /// Whether the NFS server is reached under TLS only.
    #[serde(default)]
    pub nfs_tls: bool,
    /// The volume of a storage server that someone else runs; then none is started (tests).
    #[serde(default)]
    pub volume: Option<String>,
}

/// A process of the cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Member {
    /// `n1`, or `nfs`.
    pub name: String,
    /// Where it answers.
    pub address: SocketAddr,
    /// Its folder.
    pub folder: PathBuf,
    /// Its process, 0 when it is down.
    pub pid: i32,
}

/// A running local cluster.
#[derive(Debug, Serialize, Deserialize)]
pub struct LocalCluster {
    /// What it is made of.
    pub plan: Plan,
    /// Its nodes.
    pub nodes: Vec<Member>,
    /// Its NFS server.
    pub nfs: Member,
    /// Its first administrator's token, once the cluster is made.
    #[serde(default)]
    pub access_token: Option<Secret>,
    /// What opens its root's key.
    #[serde(default)]
    pub recovery_key: Option<Secret>,
}

impl Plan {
    /// The address of node `number` (from 1) or, for 0, of the NFS server.
    pub fn ip(&self, number: u8) -> Ipv4Addr {
        let [a, b, c] = self.subnet;
        Ipv4Addr::new(a, b, c, if number == 0 { 100 } else { 10 + number })
    }

    /// The address under which others know it.
    pub fn told_ip(&self, number: u8) -> Ipv4Addr {
        let [a, b, c] = self.relay.unwrap_or(self.subnet);
        Ipv4Addr::new(a, b, c, self.ip(number).octets()[3])
    }

    /// One of Baton's programs as that member starts it.
    fn command_of(&self, member: &str, name: &str) -> Result<Command, CliError> {
        let path = program(name)?;
        let Some((first, rest)) = self.enter.get(member).and_then(|enter| enter.split_first())
        else {
            return Ok(Command::new(path));
        };
        let mut command = Command::new(first);
        command.args(rest).arg(path);
        Ok(command)
    }

    /// What a relay has to carry: each told address to the real one, every port.
    pub fn relay_pairs(&self, nodes: u8) -> Vec<(SocketAddr, SocketAddr)> {
        let pair = |number: u8, port: u16| {
            (
                SocketAddr::from((self.told_ip(number), port)),
                SocketAddr::from((self.ip(number), port)),
            )
        };
        let mut pairs = vec![pair(0, NFS_PORT)];
        for number in 1..=nodes {
            pairs.push(pair(number, API_PORT));
            pairs.extend((MIGRATION_PORTS.0..=MIGRATION_PORTS.1).map(|port| pair(number, port)));
        }
        pairs
    }
}

impl LocalCluster {
    /// The URL of the shared volume.
    pub fn volume_url(&self) -> String {
        if let Some(volume) = &self.plan.volume {
            return volume.clone();
        }
        format!(
            "nfs://{}:{}/baton",
            self.plan.told_ip(0),
            self.nfs.address.port()
        )
    }

    /// The folder that the NFS server serves.
    pub fn nfs_root(&self) -> PathBuf {
        self.nfs.folder.join("export")
    }

    /// Where the NFS server keeps the certificates that it made for itself.
    fn nfs_tls_folder(&self) -> PathBuf {
        self.nfs.folder.join("tls")
    }

    /// The administrator's token.
    ///
    /// # Errors
    /// When the cluster is not made yet.
    pub fn token(&self) -> Result<AccessToken, CliError> {
        let line = self.access_token.as_ref().ok_or_else(|| {
            CliError::Local(
                "this local cluster has no token; start another: clusterctl dev up".into(),
            )
        })?;
        client::token(line.expose())
    }

    /// How to reach node `at` over the network.
    ///
    /// # Errors
    /// When the cluster is not made yet.
    pub fn endpoint(&self, at: usize) -> Result<Endpoint, CliError> {
        Ok(Endpoint {
            servers: self.nodes[at].address.to_string(),
            token: Some(self.token()?),
        })
    }

    /// How to reach whichever node lives.
    ///
    /// # Errors
    /// When the cluster is not made yet.
    pub fn endpoint_of_all(&self) -> Result<Endpoint, CliError> {
        let addresses: Vec<String> = self
            .nodes
            .iter()
            .map(|node| node.address.to_string())
            .collect();
        Ok(Endpoint {
            servers: addresses.join(","),
            token: Some(self.token()?),
        })
    }

    /// Connects to node `at` over the network, waiting until it answers.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub async fn connect(&self, at: usize) -> Result<Connection, CliError> {
        open_within(START_TIMEOUT, &self.endpoint(at)?).await
    }

    /// Connects to node `at` on its own socket, waiting until it answers.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub async fn connect_socket(&self, at: usize) -> Result<Connection, CliError> {
        let path = self.nodes[at].folder.join("clusterd.sock");
        open_within(START_TIMEOUT, &Endpoint::socket(path.display().to_string())).await
    }

    /// Connects to any node that is not down.
    ///
    /// # Errors
    /// When none answers.
    pub async fn connect_any(&self) -> Result<Connection, CliError> {
        let living = self.nodes.iter().position(|node| node.pid != 0);
        self.connect(living.unwrap_or(0)).await
    }

    /// Starts the NFS server.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_nfs(&mut self) -> Result<(), CliError> {
        let root = self.nfs_root();
        fs::create_dir_all(&root)?;
        let mut command = self.plan.command_of(&self.nfs.name, "storage-broker")?;
        command
            .arg("serve-nfs")
            .args(["--listen", &self.nfs.address.to_string()])
            .arg("--root")
            .arg(&root)
            .args(["--export", "/baton"]);
        if self.plan.nfs_tls {
            command.arg("--tls-self-signed").arg(self.nfs_tls_folder());
        }
        self.nfs.pid = spawn(&mut command, &self.nfs.folder.join("log"))?;
        Ok(())
    }

    /// Starts the clusterd of node `at`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_node(&mut self, at: usize) -> Result<(), CliError> {
        let plan = &self.plan;
        let node = &mut self.nodes[at];
        fs::create_dir_all(&node.folder)?;
        let ip = node.address.ip().to_string();
        let told = plan
            .told_ip(u8::try_from(at + 1).map_err(CliError::local)?)
            .to_string();
        let mut command = plan.command_of(&node.name, "clusterd")?;
        command
            .arg("--data-dir")
            .arg(&node.folder)
            .args(["--name", &node.name])
            .args(["--listen", &node.address.to_string()])
            .args(["--advertise", &format!("{told}:{API_PORT}")])
            .args(["--migration-advertise", &told])
            .args(["--metrics-listen", &format!("{ip}:{METRICS_PORT}")])
            .args(["--migration-listen", &ip])
            .args([
                "--migration-ports",
                &format!("{}-{}", MIGRATION_PORTS.0, MIGRATION_PORTS.1),
            ])
            .args(["--memory-mib", &plan.memory_mib.to_string()])
            .args(["--cpus", &plan.cpus.to_string()])
            .arg("--vmm")
            .arg(program("vmm")?)
            .arg("--broker")
            .arg(program("storage-broker")?);
        if let Some(bridge) = &plan.bridge {
            command.args(["--bridge", &format!("{bridge}={bridge}-{}", node.name)]);
        }
        command.envs(&plan.environment);
        if plan.clocks {
            let path = node.folder.join("clock");
            if !path.exists() {
                proto::clock::write_shifts(&path, 0, 0)?;
            }
            command.env(proto::clock::VARIABLE, path);
        }
        if plan.failpoints {
            let path = node.folder.join("failpoints");
            // There before it is armed: monitors open it once.
            if !path.exists() {
                std::fs::write(&path, "")?;
            }
            command.env(proto::failpoint::VARIABLE, format!("@{}", path.display()));
        }
        node.pid = spawn(&mut command, &node.folder.join("clusterd.log"))?;
        Ok(())
    }

    /// The number of the node of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn index_of(&self, name: &str) -> Result<usize, CliError> {
        self.nodes
            .iter()
            .position(|node| node.name == name)
            .ok_or_else(|| {
                let names: Vec<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
                CliError::Local(format!(
                    "there is no node {name}; there are: {}",
                    names.join(", ")
                ))
            })
    }

    /// Kills everything that a host has, as a power cut does: clusterd, its broker, its monitors.
    pub fn kill_node(&mut self, at: usize) {
        // Whoever starts others comes first, and by its number: a process that is just becoming another
        // program has no command line to be found by.
        self.kill_clusterd(at);
        let deadline = Instant::now() + STOP_TIMEOUT;
        loop {
            let left = processes_of(&self.nodes[at].folder);
            if left.is_empty() || Instant::now() > deadline {
                return;
            }
            for pid in left {
                // It may have ended already.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills only the clusterd of a node.
    pub fn kill_clusterd(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        if node.pid != 0 {
            let _ = kill(Pid::from_raw(node.pid), Signal::SIGKILL);
            reap(node.pid);
            node.pid = 0;
        }
    }

    /// Kills every process of the cluster and removes its folder.
    ///
    /// # Errors
    /// When the folder cannot be removed.
    pub fn down(mut self) -> Result<(), CliError> {
        self.kill_everything();
        fs::remove_dir_all(&self.plan.folder)?;
        Ok(())
    }

    fn kill_everything(&mut self) {
        for at in 0..self.nodes.len() {
            self.kill_node(at);
        }
        for pid in processes_of(&self.nfs.folder) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        reap(self.nfs.pid);
        let _ = fs::remove_file(self.plan.folder.join("cluster.json"));
    }

    /// Writes what runs, for later commands.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn save(&self) -> Result<(), CliError> {
        let path = self.plan.folder.join("cluster.json");
        private_file::write(&path, &serde_json::to_vec_pretty(self)?)?;
        Ok(())
    }

    /// Reads what runs.
    ///
    /// # Errors
    /// When nothing runs there.
    pub fn load(folder: &Path) -> Result<LocalCluster, CliError> {
        let path = folder.join("cluster.json");
        let text = private_file::read(&path, FILE_BYTES_MAX)
            .map_err(CliError::local)?
            .ok_or_else(|| {
                CliError::Local(format!(
                    "there is no local cluster in {}; start one: clusterctl dev up",
                    folder.display()
                ))
            })?;
        // What the parser has to say may quote the token.
        serde_json::from_str(&text).map_err(|_| {
            CliError::Local(format!(
                "{} is not as this clusterctl writes it",
                path.display()
            ))
        })
    }
}

/// Connects once somebody answers.
async fn open_within(patience: Duration, endpoint: &Endpoint) -> Result<Connection, CliError> {
    let deadline = Instant::now() + patience;
    loop {
        match Connection::open(endpoint).await {
            Ok(connection) => return Ok(connection),
            Err(error) if Instant::now() > deadline || !error.is_about_the_connection() => {
                return Err(error);
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_cluster_keeps_its_secrets_for_its_owner_and_shows_them_to_nobody() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let member = |name: &str| Member {
            name: name.into(),
            address: SocketAddr::from(([127, 0, 0, 1], API_PORT)),
            folder: folder.path().join(name),
            pid: 0,
        };
        let token = AccessToken {
            ca_sha256: "ab".repeat(32),
            id: "t1".into(),
            secret: Secret::new(&[7; 32]),
        };
        let cluster = LocalCluster {
            plan: Plan {
                folder: folder.path().to_owned(),
                ..Plan::default()
            },
            nodes: vec![member("n1"), member("n2")],
            nfs: member("nfs"),
            access_token: Some(Secret::from_text(&token.line())),
            recovery_key: Some(Secret::from_text("RECOVER-ME")),
        };
        cluster.save().expect("written");
        let path = folder.path().join("cluster.json");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        let read = LocalCluster::load(folder.path()).expect("read");
        assert_eq!(read.token().expect("a token"), token);
        assert_eq!(
            read.endpoint_of_all().expect("an endpoint").servers,
            "127.0.0.1:7440,127.0.0.1:7440"
        );
        let shown = format!("{read:?}");
        assert!(
            !shown.contains("RECOVER-ME") && !shown.contains("BT1."),
            "{shown}"
        );
    }
}
