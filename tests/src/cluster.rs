//! A cluster of real processes for a test: every link goes through a relay, every node can be killed,
//! every guest leaves a witness, and nothing is left behind.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clusterctl::client::{Connection, change};
use clusterctl::local::{LocalCluster, Plan};
use proto::admin::{
    EventView, EventsRequest, GuestView, MigrationListRequest, MigrationView, NodeListRequest,
    NodeView, VmCreateRequest, VmListRequest, VmMigrateRequest, VmStartRequest, VmStopRequest,
    VmView,
};
use serde_json::json;
use vmm::devices::selfcheck::witness;

use crate::relay::Relay;

/// How long anything may take before a test says that it does not happen.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(25);

/// Set to anything, it leaves every test cluster's folder behind: its logs say why a test failed.
const KEEP_LOGS: &str = "BATON_TEST_KEEP";

/// What a test's cluster is like.
#[derive(Clone, Debug)]
pub struct Setup {
    /// How many nodes.
    pub nodes: u8,
    /// The fast lease profile.
    pub fast: bool,
    /// Memory that each node offers, MiB.
    pub memory_mib: u64,
    /// Whether every link goes through a relay and can be cut.
    pub relay: bool,
    /// A bridge that machines may name; `lan` is the bridge `lan-n1` on n1.
    pub bridge: Option<String>,
    /// Variables that every node is started with, besides the test's own.
    pub environment: BTreeMap<String, String>,
    /// Whether the NFS server is reached under TLS only.
    pub nfs_tls: bool,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            nodes: 3,
            fast: true,
            memory_mib: 2048,
            relay: true,
            bridge: None,
            environment: BTreeMap::new(),
            nfs_tls: false,
        }
    }
}

/// A machine for a test.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// What the guest dirties and checks, MiB.
    pub working_set_mib: u32,
    /// How fast it dirties it, MiB/s.
    pub dirty_mib_s: u32,
    /// Its disk; 0: none.
    pub disk_bytes: u64,
    /// Higher first.
    pub priority: u16,
}

impl Machine {
    /// A small machine with a disk.
    pub fn small(name: &str) -> Machine {
        Machine {
            name: name.into(),
            memory_mib: 128,
            working_set_mib: 32,
            dirty_mib_s: 10,
            disk_bytes: 16 << 20,
            priority: 500,
        }
    }
}

/// A running cluster; dropping it kills every process and removes its folder.
pub struct TestCluster {
    /// The processes.
    pub local: LocalCluster,
    /// Every link.
    pub relay: Relay,
    witnesses: PathBuf,
    folder: Option<tempfile::TempDir>,
}

/// Each cluster of one test process gets addresses of its own.
static NEXT: AtomicU8 = AtomicU8::new(0);

/// On this port of `127.99.x.1` a process holds its x.
const CLAIM_PORT: u16 = 7439;

/// The third number of this process's addresses, which no other process of this host has while this one lives: whole
/// clusters run beside each other.
fn own_third() -> anyhow::Result<u8> {
    static OWN: Mutex<Option<(u8, TcpListener)>> = Mutex::new(None);
    let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((third, _)) = &*own {
        return Ok(*third);
    }
    let begin = (std::process::id() % 250) as u8;
    for third in (begin..250).chain(0..begin) {
        let address = SocketAddr::from(([127, 99, third, 1], CLAIM_PORT));
        if let Ok(listener) = TcpListener::bind(address) {
            *own = Some((third, listener));
            return Ok(third);
        }
    }
    anyhow::bail!("250 processes of this host run test clusters")
}

impl TestCluster {
    /// Starts one.
    ///
    /// # Errors
    /// When a process does not start; the logs' place is in the message.
    pub async fn start(setup: Setup) -> anyhow::Result<TestCluster> {
        let folder = tempfile::Builder::new().prefix("baton-test-").tempdir()?;
        let third = own_third()?;
        let second = 100 + NEXT.fetch_add(1, Ordering::Relaxed) * 2;
        let plan = Plan {
            folder: folder.path().join("cluster"),
            subnet: [127, second, third],
            memory_mib: setup.memory_mib,
            cpus: 4,
            fast: setup.fast,
            relay: setup.relay.then_some([127, second + 1, third]),
            failpoints: true,
            bridge: setup.bridge.clone(),
            environment: setup.environment.clone(),
            nfs_tls: setup.nfs_tls,
            ..Plan::default()
        };
        let pairs = if setup.relay {
            plan.relay_pairs(setup.nodes)
        } else {
            Vec::new()
        };
        let relay = Relay::start(&pairs)
            .await
            .context("cannot start the relay")?;
        let witnesses = folder.path().join("witnesses");
        std::fs::create_dir_all(&witnesses)?;
        match LocalCluster::up(plan, setup.nodes, |_| {}).await {
            Ok(local) => Ok(TestCluster {
                local,
                relay,
                witnesses,
                folder: Some(folder),
            }),
            Err(error) => {
                let kept = folder.keep();
                bail!("{error} (kept: {})", kept.display())
            }
        }
    }

    /// A cluster that somebody else started, without relays, in a folder of its own.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub async fn around(
        local: LocalCluster,
        folder: tempfile::TempDir,
    ) -> anyhow::Result<TestCluster> {
        let witnesses = folder.path().join("witnesses");
        std::fs::create_dir_all(&witnesses)?;
        Ok(TestCluster {
            local,
            relay: Relay::start(&[]).await?,
            witnesses,
            folder: Some(folder),
        })
    }

    /// The address of a node, or of the NFS server (`nfs`), as the relay knows it.
    pub fn ip(&self, name: &str) -> IpAddr {
        if name == "nfs" {
            return self.local.nfs.address.ip();
        }
        self.local
            .nodes
            .iter()
            .find(|node| node.name == name)
            .map_or(IpAddr::from([127, 0, 0, 1]), |node| node.address.ip())
    }

    /// Cuts both ways between two parties.
    pub fn cut(&self, a: &str, b: &str) {
        self.relay.cut(self.ip(a), self.ip(b));
    }

    /// Cuts a node off from every other node, and from storage if asked.
    pub fn isolate(&self, name: &str, storage_too: bool) {
        for node in &self.local.nodes {
            if node.name != name {
                self.cut(name, &node.name);
            }
        }
        if storage_too {
            self.cut(name, "nfs");
        }
    }

    /// A connection to a node that lives.
    ///
    /// # Errors
    /// When none answers.
    pub async fn api(&self) -> anyhow::Result<Connection> {
        self.local.connect_any().await.map_err(anyhow::Error::from)
    }

    /// A connection to that node.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn api_of(&self, name: &str) -> anyhow::Result<Connection> {
        self.local
            .connect(self.local.index_of(name)?)
            .await
            .map_err(anyhow::Error::from)
    }

    /// A node's direct address, for connections that do not go through the relay.
    pub fn address_of(&self, name: &str) -> Option<SocketAddr> {
        self.local
            .nodes
            .iter()
            .find(|node| node.name == name)
            .map(|node| node.address)
    }

    /// Arms failpoints in every process of a node, `name=action,…`; an empty text disarms them.
    ///
    /// # Errors
    /// When the node's folder cannot be written.
    pub fn arm(&self, node: &str, failpoints: &str) -> anyhow::Result<()> {
        let at = self.local.index_of(node)?;
        Ok(std::fs::write(
            self.local.nodes[at].folder.join("failpoints"),
            failpoints,
        )?)
    }

    /// Where a machine's monitors write down what its guest was promised.
    pub fn witness_path(&self, vm: &str) -> PathBuf {
        self.witnesses.join(vm)
    }

    /// The highest number that a guest has flushed, as its monitors wrote it down.
    ///
    /// # Errors
    /// When the witness cannot be read.
    pub fn witness(&self, vm: &str) -> anyhow::Result<u64> {
        let path = self.witness_path(vm);
        if !path.exists() {
            return Ok(0);
        }
        let text = std::fs::read_to_string(path)?;
        Ok(text
            .lines()
            .filter_map(|line| {
                line.strip_prefix("flushed ")?
                    .split(' ')
                    .next()?
                    .parse()
                    .ok()
            })
            .max()
            .unwrap_or(0))
    }

    /// What a machine's witness tells of losses: every boot must have found all that was flushed before it.
    ///
    /// # Errors
    /// When a boot found less, or the witness cannot be read.
    pub fn no_loss(&self, vm: &str) -> anyhow::Result<()> {
        let events = witness::read(&self.witness_path(vm))?;
        let losses = witness::losses(&events);
        ensure!(losses.is_empty(), "{vm}: {losses:?}");
        Ok(())
    }

    /// Creates a machine and waits until its guest has worked for a moment.
    ///
    /// # Errors
    /// When it does not come to run.
    pub async fn create(&self, machine: &Machine) -> anyhow::Result<VmView> {
        self.create_on(machine, None).await
    }

    /// The same, on that node.
    ///
    /// # Errors
    /// When it does not come to run there.
    pub async fn create_on(&self, machine: &Machine, node: Option<&str>) -> anyhow::Result<VmView> {
        let mut api = self.api().await?;
        let disks = if machine.disk_bytes == 0 {
            json!([])
        } else {
            json!([{ "volume": "vol-a", "path": format!("{}.raw", machine.name), "size_bytes": machine.disk_bytes }])
        };
        let spec = json!({
            "vcpus": 1,
            "memory_mib": machine.memory_mib,
            "boot": { "self-check": { "working_set_mib": machine.working_set_mib, "dirty_mib_s": machine.dirty_mib_s } },
            "disks": disks,
            "priority": machine.priority,
            "witness": self.witnesses.join(&machine.name),
        });
        let request = VmCreateRequest {
            change: Some(change(None, "test")),
            name: machine.name.clone(),
            spec_json: spec.to_string(),
            images: Default::default(),
            start: true,
        };
        api.api.vm_create(request).await?;
        self.wait_running(&machine.name).await?;
        self.wait_progress(&machine.name).await?;
        if let Some(node) = node
            && self.vm(&machine.name).await?.node != node
        {
            let end = self.migrate(&machine.name, node).await?;
            ensure!(
                end.state == "cut-over",
                "placing {} on {node}: {}",
                machine.name,
                end.reason
            );
            self.wait_progress(&machine.name).await?;
        }
        self.vm(&machine.name).await
    }

    /// A machine now.
    ///
    /// # Errors
    /// When nobody knows it.
    pub async fn vm(&self, name: &str) -> anyhow::Result<VmView> {
        let mut api = self.api().await?;
        let list = api
            .api
            .vm_list(VmListRequest { name: name.into() })
            .await?
            .into_inner()
            .vms;
        list.into_iter()
            .next()
            .with_context(|| format!("no machine {name}"))
    }

    /// The nodes now.
    ///
    /// # Errors
    /// When nobody answers.
    pub async fn nodes(&self) -> anyhow::Result<Vec<NodeView>> {
        Ok(self
            .api()
            .await?
            .api
            .node_list(NodeListRequest {})
            .await?
            .into_inner()
            .nodes)
    }

    /// The leader's name.
    ///
    /// # Errors
    /// When there is none for a long time.
    pub async fn leader(&self) -> anyhow::Result<String> {
        self.wait("a leader", async || {
            Ok(self
                .nodes()
                .await?
                .into_iter()
                .find(|node| node.leader)
                .map(|node| node.name))
        })
        .await
    }

    /// Asks for a migration and waits for its end and its summary.
    ///
    /// # Errors
    /// When it is refused, or does not end.
    pub async fn migrate(&self, vm: &str, to: &str) -> anyhow::Result<MigrationView> {
        let id = self.begin_migration(vm, to).await?;
        self.wait_migration(&id).await
    }

    /// Asks for a migration; gives its id.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn begin_migration(&self, vm: &str, to: &str) -> anyhow::Result<String> {
        let request = VmMigrateRequest {
            change: Some(change(None, "test")),
            name: vm.into(),
            to: to.into(),
            ..VmMigrateRequest::default()
        };
        let reply = self
            .api()
            .await?
            .api
            .vm_migrate(request)
            .await?
            .into_inner();
        Ok(reply.migration.context("the migration has no id")?.id)
    }

    /// Waits until a migration ended, and for what was measured if it was cut over.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn wait_migration(&self, id: &str) -> anyhow::Result<MigrationView> {
        self.wait(&format!("the end of {id}"), async || {
            let list = self
                .api()
                .await?
                .api
                .migration_list(MigrationListRequest {
                    all: true,
                    vm: String::new(),
                })
                .await?
                .into_inner()
                .migrations;
            let view = list
                .into_iter()
                .find(|view| view.id == id)
                .context("it is gone")?;
            let ended =
                view.state == "aborted" || (view.state == "cut-over" && view.blackout_us > 0);
            Ok(ended.then_some(view))
        })
        .await
    }

    /// Waits until a machine runs.
    ///
    /// # Errors
    /// When it does not.
    pub async fn wait_running(&self, name: &str) -> anyhow::Result<VmView> {
        self.wait(&format!("{name} running"), async || {
            let vm = self.vm(name).await?;
            Ok((vm.state == "running").then_some(vm))
        })
        .await
    }

    /// A machine as that node sees it, asked on the node's own socket: cut links are not in the way.
    ///
    /// # Errors
    /// When the node does not answer or does not know it.
    pub async fn seen_by(&self, vm: &str, node: &str) -> anyhow::Result<VmView> {
        let mut api = self
            .local
            .connect_socket(self.local.index_of(node)?)
            .await?;
        let list = api
            .api
            .vm_list(VmListRequest { name: vm.into() })
            .await?
            .into_inner()
            .vms;
        list.into_iter()
            .next()
            .with_context(|| format!("{node} knows no machine {vm}"))
    }

    /// Waits until a machine's monitor on that node has frozen, as the node itself says.
    ///
    /// # Errors
    /// When it does not freeze.
    pub async fn wait_frozen(&self, vm: &str, node: &str) -> anyhow::Result<VmView> {
        self.wait(&format!("{vm} frozen on {node}"), async || {
            let seen = self.seen_by(vm, node).await?;
            Ok((seen.state == "frozen").then_some(seen))
        })
        .await
    }

    /// Waits until a guest has checked and flushed more than it had, and reports no error.
    ///
    /// # Errors
    /// When the guest reports an error, or makes no progress.
    pub async fn wait_progress(&self, name: &str) -> anyhow::Result<GuestView> {
        let mut first: Option<GuestView> = None;
        let guest = self
            .wait(&format!("progress of {name}'s guest"), async || {
                let vm = self.vm(name).await?;
                let Some(guest) = vm.guest else {
                    return Ok(None);
                };
                if guest.errors > 0 {
                    return Ok(Some(guest));
                }
                let base = first.get_or_insert_with(|| guest.clone());
                // A restarted guest counts from the beginning again.
                if guest.steps < base.steps {
                    *base = guest.clone();
                }
                let flushed = vm.disks.is_empty() || guest.flushed > base.flushed;
                let went_on =
                    guest.steps > base.steps && guest.memory_checks > base.memory_checks && flushed;
                Ok(went_on.then_some(guest))
            })
            .await?;
        ensure!(guest.errors == 0, "{name}'s guest reports: {}", guest.error);
        Ok(guest)
    }

    /// Stops a machine and waits until it is.
    ///
    /// # Errors
    /// When it does not stop.
    pub async fn stop(&self, name: &str) -> anyhow::Result<()> {
        let request = VmStopRequest {
            change: Some(change(None, "test")),
            name: name.into(),
            force: false,
        };
        self.api().await?.api.vm_stop(request).await?;
        self.wait(&format!("{name} stopped"), async || {
            Ok((self.vm(name).await?.state == "stopped").then_some(()))
        })
        .await
    }

    /// Starts a machine and waits until it runs.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn start_vm(&self, name: &str) -> anyhow::Result<VmView> {
        let request = VmStartRequest {
            change: Some(change(None, "test")),
            name: name.into(),
        };
        self.api().await?.api.vm_start(request).await?;
        self.wait_running(name).await
    }

    /// Everything that happened.
    ///
    /// # Errors
    /// When nobody answers.
    pub async fn events(&self) -> anyhow::Result<Vec<EventView>> {
        let mut stream = self
            .api()
            .await?
            .api
            .events(EventsRequest::default())
            .await?
            .into_inner();
        let mut events = Vec::new();
        while let Some(event) = stream.message().await? {
            events.push(event);
        }
        Ok(events)
    }

    /// Waits until a look finds something. A look that fails is tried again: nodes die in these tests.
    ///
    /// # Errors
    /// After [`PATIENCE`], with the last look's error.
    pub async fn wait<T>(
        &self,
        what: &str,
        mut look: impl AsyncFnMut() -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = look().await;
            match found {
                Ok(Some(value)) => return Ok(value),
                Ok(None) if Instant::now() > deadline => {
                    bail!("{what}: not within {} s", PATIENCE.as_secs())
                }
                Err(error) if Instant::now() > deadline => {
                    return Err(
                        error.context(format!("{what}: not within {} s", PATIENCE.as_secs()))
                    );
                }
                _ => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// Leaves the folder behind for a look at the logs; says where.
    pub fn keep_logs(&mut self) -> Option<PathBuf> {
        self.folder.take().map(tempfile::TempDir::keep)
    }
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        if (std::thread::panicking() || std::env::var_os(KEEP_LOGS).is_some())
            && let Some(kept) = self.keep_logs()
        {
            eprintln!("the cluster's logs: {}", kept.display());
        }
        for at in 0..self.local.nodes.len() {
            self.local.kill_node(at);
        }
        for pid in clusterctl::local::processes_of(&self.local.nfs.folder) {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
    }
}
