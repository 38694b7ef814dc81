//! The chaos cluster's network: a namespace for each member, all on one bridge, and the harness beside them.
//!
//! ```text
//!   harness 10.78.0.254 ── chaos ──┬── eth0 of n1 10.78.0.11
//!                                  ├── eth0 of n2 10.78.0.12
//!                                  └── eth0 of nfs 10.78.0.100
//! ```
//! Cuts are nftables rules inside the member that loses something, so that a link can be cut one way; a slow
//! link is a token bucket at the member's end. Everything goes with the last process of its namespace.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sched::{CloneFlags, unshare};

/// The first three parts of every address.
pub const SUBNET: [u8; 3] = [10, 78, 0];
const BRIDGE: &str = "chaos";
/// How long a namespace may take to come.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(5);

/// Moves this thread, and what it starts from now on, into a network of its own with the bridge.
///
/// # Errors
/// Without root.
pub fn enter() -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)
        .context("no network namespace; run this as root: sudo cargo xtask chaos")?;
    run("ip", "link set lo up")?;
    run("ip", &format!("link add {BRIDGE} type bridge"))?;
    let [a, b, c] = SUBNET;
    run("ip", &format!("addr add {a}.{b}.{c}.254/24 dev {BRIDGE}"))?;
    run("ip", &format!("link set {BRIDGE} up"))
}

/// One member's namespace, held by a process that ends with the harness.
pub struct Namespace {
    address: Ipv4Addr,
    path: PathBuf,
    holder: Child,
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

impl Namespace {
    /// Makes one, attached to the bridge under that address.
    ///
    /// # Errors
    /// When the kernel or iproute2 refuses.
    pub fn make(name: &str, address: Ipv4Addr) -> anyhow::Result<Namespace> {
        let holder = Command::new("unshare")
            .args(["--net", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot run unshare; install util-linux")?;
        let pid = holder.id();
        let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
        let own = std::fs::read_link("/proc/self/ns/net")?;
        let deadline = Instant::now() + PATIENCE;
        while std::fs::read_link(&path)? == own {
            ensure!(Instant::now() < deadline, "{name} got no namespace");
            std::thread::sleep(LOOK);
        }
        let this = Namespace {
            address,
            path,
            holder,
        };
        let add = format!("link add to-{name} type veth peer name eth0 netns {pid}");
        run("ip", &add)?;
        run("ip", &format!("link set to-{name} master {BRIDGE} up"))?;
        this.run("ip", "link set lo up")?;
        this.run("ip", &format!("addr add {address}/24 dev eth0"))?;
        this.run("ip", "link set eth0 up")?;
        Ok(this)
    }

    /// What stands before a program that runs inside.
    pub fn prefix(&self) -> Vec<String> {
        vec![
            "nsenter".into(),
            format!("--net={}", self.path.display()),
            "--".into(),
        ]
    }

    /// Takes away what comes from `other`, and with `both` also what goes there, under a name to heal it by.
    ///
    /// # Errors
    /// When nft refuses.
    pub fn cut(&self, fault: &str, other: &Namespace, both: bool) -> anyhow::Result<()> {
        let peer = other.address;
        let mut rules = format!(
            "table inet {fault} {{ chain in {{ type filter hook input priority 0; ip saddr {peer} drop; }};"
        );
        if both {
            rules += &format!(
                " chain out {{ type filter hook output priority 0; ip daddr {peer} drop; }};"
            );
        }
        rules += " }";
        self.nft(&rules)
    }

    /// Heals that cut.
    ///
    /// # Errors
    /// When nft refuses.
    pub fn heal(&self, fault: &str) -> anyhow::Result<()> {
        self.nft(&format!("delete table inet {fault}"))
    }

    fn nft(&self, rules: &str) -> anyhow::Result<()> {
        let mut command = self.command("nft");
        finish(command.arg(rules), rules)
    }

    /// Lets no more than that out.
    ///
    /// # Errors
    /// When tc refuses.
    pub fn slow(&self, mbit: u32) -> anyhow::Result<()> {
        self.run(
            "tc",
            &format!("qdisc replace dev eth0 root tbf rate {mbit}mbit burst 128kb latency 300ms"),
        )
    }

    /// Lets everything out again.
    ///
    /// # Errors
    /// When tc refuses.
    pub fn fast(&self) -> anyhow::Result<()> {
        self.run("tc", "qdisc del dev eth0 root")
    }

    fn run(&self, program: &str, arguments: &str) -> anyhow::Result<()> {
        let mut command = self.command(program);
        finish(command.args(arguments.split(' ')), arguments)
    }

    fn command(&self, program: &str) -> Command {
        let prefix = self.prefix();
        let mut command = Command::new(&prefix[0]);
        command.args(&prefix[1..]).arg(program);
        command
    }
}

fn run(program: &str, arguments: &str) -> anyhow::Result<()> {
    finish(
        Command::new(program).args(arguments.split(' ')),
        &format!("{program} {arguments}"),
    )
}

fn finish(command: &mut Command, what: &str) -> anyhow::Result<()> {
    let output = command.output();
    let output = output
        .with_context(|| format!("cannot run {what}; install iproute2, nftables and util-linux"))?;
    if !output.status.success() {
        bail!("{what}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// What this machine lacks for it.
pub fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("it needs root, for network namespaces: sudo cargo xtask chaos".into());
    }
    let places = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
    let absent = ["ip", "nft", "tc", "nsenter", "unshare"]
        .into_iter()
        .find(|program| {
            !places
                .iter()
                .any(|place| Path::new(place).join(program).exists())
        })?;
    Some(format!(
        "`{absent}` is not installed: apt-get install iproute2 nftables util-linux"
    ))
}
