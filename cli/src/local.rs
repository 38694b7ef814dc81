//! A whole cluster on this machine: three (or more) `clusterd`, an embedded NFS server, loopback addresses.
//!
//! What is running is written to `cluster.json` in the cluster's folder, so that a later command finds
//! it. Programs are looked for beside this one, then in `PATH`.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::client::{CliError, Connection};

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
/// How long a stopping program may take before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
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
}

/// Finds one of Baton's programs.
///
/// # Errors
/// When it is neither beside this program nor in `PATH`.
pub fn program(name: &str) -> Result<PathBuf, CliError> {
    let beside = std::env::var_os("BATON_PROGRAMS")
        .map(PathBuf::from)
        .or_else(|| {
            std::env::current_exe()
                .ok()
                .and_then(|exe| exe.parent().map(Path::to_path_buf))
        })
        .map(|folder| folder.join(name));
    if let Some(path) = beside.filter(|path| path.is_file()) {
        return Ok(path);
    }
    std::env::var_os("PATH")
        .and_then(|paths| std::env::split_paths(&paths).map(|folder| folder.join(name)).find(|path| path.is_file()))
        .ok_or_else(|| {
            CliError::Local(format!(
                "{name} is neither beside clusterctl nor in PATH; in the source tree: cargo build --workspace"
            ))
        })
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
    /// Starts the NFS server and the nodes, makes the cluster, lets every node in and adds the volume
    /// `vol-a`. `tell` is told each step.
    ///
    /// # Errors
    /// When a program is missing, an address is taken, or a step is refused; what was started is stopped.
    pub async fn up(
        plan: Plan,
        nodes: u8,
        mut tell: impl FnMut(&str),
    ) -> Result<LocalCluster, CliError> {
        if !(1..=NODES_MAX).contains(&nodes) {
            return Err(CliError::Local(format!(
                "{nodes} nodes: use 1 to {NODES_MAX}"
            )));
        }
        if plan.folder.join("cluster.json").exists() {
            return Err(CliError::Local(format!(
                "there is a local cluster in {} already; stop it first: clusterctl dev down",
                plan.folder.display()
            )));
        }
        fs::create_dir_all(&plan.folder)?;
        let member = |name: String, number: u8, port: u16| Member {
            folder: plan.folder.join(&name),
            name,
            address: SocketAddr::new(IpAddr::V4(plan.ip(number)), port),
            pid: 0,
        };
        let mut cluster = LocalCluster {
            nodes: (1..=nodes)
                .map(|number| member(format!("n{number}"), number, API_PORT))
                .collect(),
            nfs: member("nfs".into(), 0, NFS_PORT),
            plan,
        };
        let here = |member: &&Member| !cluster.plan.enter.contains_key(&member.name);
        for member in cluster.nodes.iter().chain([&cluster.nfs]).filter(here) {
            if let Err(error) = TcpListener::bind(member.address) {
                return Err(CliError::Local(format!(
                    "{} cannot be used: {error}; is another local cluster running? see: clusterctl dev --help",
                    member.address
                )));
            }
        }
        match cluster.assemble(&mut tell).await {
            Ok(()) => Ok(cluster),
            Err(error) => {
                let logs = cluster.plan.folder.clone();
                cluster.kill_everything();
                Err(CliError::Local(format!(
                    "{error}\n  logs: {}",
                    logs.display()
                )))
            }
        }
    }

    async fn assemble(&mut self, tell: &mut impl FnMut(&str)) -> Result<(), CliError> {
        if self.plan.volume.is_none() {
            tell(&format!(
                "NFS server on {} (embedded; keeps owner, group and mode itself)",
                self.nfs.address
            ));
            self.start_nfs()?;
        }
        for at in 0..self.nodes.len() {
            self.start_node(at)?;
        }
        self.save()?;
        let mut connection = self.connect(0).await?;
        let change = || Some(crate::client::change(None, "local cluster"));
        connection
            .api
            .cluster_init(proto::admin::ClusterInitRequest {
                change: change(),
                name: "local".into(),
                fast: self.plan.fast,
            })
            .await?;
        tell(&format!(
            "cluster `local` made on n1 ({})",
            self.nodes[0].address
        ));
        for at in 1..self.nodes.len() {
            let member = format!("{}:{API_PORT}", self.plan.told_ip(1));
            let request = proto::admin::NodeJoinRequest {
                change: change(),
                member,
                role: "voter".into(),
                token: String::new(),
            };
            self.connect(at).await?.api.node_join(request).await?;
            tell(&format!(
                "{} joined ({})",
                self.nodes[at].name, self.nodes[at].address
            ));
        }
        self.wait_until_up(&mut connection).await?;
        wait_tcp(self.nfs.address).await?;
        let url = self.volume_url();
        let request = proto::admin::VolumeAddRequest {
            change: change(),
            name: "vol-a".into(),
            url: url.clone(),
            nodes: Vec::new(),
            dry_run: false,
        };
        let volume = connection.api.volume_add(request).await?.into_inner();
        tell(&format!(
            "volume vol-a at {url}, fence class {}",
            volume.fence_class
        ));
        Ok(())
    }

    /// Waits until every node is up and up to five have a vote.
    async fn wait_until_up(&self, connection: &mut Connection) -> Result<(), CliError> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let status = connection
                .api
                .cluster_status(proto::admin::ClusterStatusRequest {})
                .await?
                .into_inner();
            let voters = self.nodes.len().min(5);
            if status.nodes_up as usize == self.nodes.len() && status.voters.len() >= voters {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(CliError::Local(format!(
                    "after {} s only {} of {} nodes are up ({} voters)",
                    START_TIMEOUT.as_secs(),
                    status.nodes_up,
                    self.nodes.len(),
                    status.voters.len()
                )));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

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

    /// Connects to node `at`, waiting until it answers.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub async fn connect(&self, at: usize) -> Result<Connection, CliError> {
        let address = self.nodes[at].address.to_string();
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            match Connection::open(&address).await {
                Ok(connection) => return Ok(connection),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
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
            command.env(
                proto::failpoint::VARIABLE,
                format!("@{}", node.folder.join("failpoints").display()),
            );
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
        let node = &mut self.nodes[at];
        for pid in processes_of(&node.folder) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        reap(node.pid);
        node.pid = 0;
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
        fs::write(&path, serde_json::to_vec_pretty(self)?)?;
        Ok(())
    }

    /// Reads what runs.
    ///
    /// # Errors
    /// When nothing runs there.
    pub fn load(folder: &Path) -> Result<LocalCluster, CliError> {
        let path = folder.join("cluster.json");
        let text = fs::read(&path).map_err(|error| {
            CliError::Local(format!(
                "there is no local cluster in {} ({error}); start one: clusterctl dev up",
                folder.display()
            ))
        })?;
        Ok(serde_json::from_slice(&text)?)
    }
}

/// Starts a program that outlives this one, its output in `log`.
fn spawn(command: &mut Command, log: &Path) -> Result<i32, CliError> {
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder)?;
    }
    let log: File = OpenOptions::new().create(true).append(true).open(log)?;
    let child: Child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // A group of its own: Ctrl-C on the demo must not reach it before the demo's own clean-up.
        .process_group(0)
        .spawn()
        .map_err(|error| {
            CliError::Local(format!(
                "cannot start {}: {error}",
                command.get_program().display()
            ))
        })?;
    i32::try_from(child.id()).map_err(CliError::local)
}

/// Waits, bounded, until a killed child is gone.
fn reap(pid: i32) {
    if pid == 0 {
        return;
    }
    let deadline = Instant::now() + STOP_TIMEOUT;
    let pid = Pid::from_raw(pid);
    while Instant::now() < deadline {
        match nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::WNOHANG)) {
            Ok(nix::sys::wait::WaitStatus::StillAlive) => {
                std::thread::sleep(Duration::from_millis(5))
            }
            // Gone, or not a child of ours (a later command than the one that started it).
            _ => return,
        }
    }
}

/// Every process whose command line names something inside `folder`.
pub fn processes_of(folder: &Path) -> Vec<i32> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let needle = folder.as_os_str().as_encoded_bytes();
    let inside = |argument: &[u8]| {
        argument == needle
            || (argument.starts_with(needle) && argument.get(needle.len()) == Some(&b'/'))
    };
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|&pid| pid != own)
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.split(|&byte| byte == 0).any(inside))
        })
        .collect()
}

/// Waits until somebody listens at an address.
async fn wait_tcp(address: SocketAddr) -> Result<(), CliError> {
    let deadline = Instant::now() + START_TIMEOUT;
    while tokio::net::TcpStream::connect(address).await.is_err() {
        if Instant::now() > deadline {
            return Err(CliError::Local(format!(
                "nothing listens at {address} after {} s",
                START_TIMEOUT.as_secs()
            )));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_belongs_to_a_folder_that_its_command_line_names() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("log");
        std::fs::write(&log, "x").expect("a file");
        let mut child = Command::new("tail")
            .arg("-f")
            .arg(&log)
            .stdout(Stdio::piped())
            .spawn()
            .expect("tail");
        // Its command line is there some time after its process: what it prints shows that it runs.
        let mut printed = [0];
        let mut output = child.stdout.take().expect("a pipe");
        std::io::Read::read_exact(&mut output, &mut printed).expect("its output");
        let pid = i32::try_from(child.id()).expect("a pid");
        assert!(processes_of(folder.path()).contains(&pid));
        assert!(!processes_of(&folder.path().join("other")).contains(&pid));
        child.kill().expect("kill");
        child.wait().expect("wait");
    }
}
