//! A network for a test, in a namespace of its own: a switch, a bridge for each node, and a peer of the guest's.
//!
//! ```text
//!   peer 10.77.0.1 ── lan ──┬── to-n1 ═ lan-n1 ── tap of a machine on n1
//!                           ├── to-n2 ═ lan-n2
//!                           └── to-n3 ═ lan-n3          (═ a veth pair)
//! ```
//!
//! The kernel takes bridges, taps and addresses away with the last process of the namespace, however a test ends.

use std::collections::VecDeque;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use crate::cluster::{Setup, TestCluster};
use crate::linux::{LinuxGuest, Nic, PROMPT, Status, Terminal};

/// The switch, and the bridge that machines name.
pub const SWITCH: &str = "lan";
/// The guest's interface.
pub const GUEST: Nic<'static> = Nic {
    bridge: SWITCH,
    mac: "52:54:00:77:00:02",
    ip: "10.77.0.2",
};
/// The guest's echo service.
const ECHO: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2)), 7);
/// How many nodes are attached.
const NODES: u8 = 3;
/// How often the peer sends.
const BEAT: Duration = Duration::from_millis(5);
/// What the peer sends each time: a number, so many bytes wide.
const RECORD_BYTES: usize = 16;
/// Records on their way at most: what a guest that stands still leaves in the peer's socket.
const UNANSWERED_MAX: u64 = 256;
/// Shorter times without an answer are not noted.
const PAUSE_MIN: Duration = Duration::from_millis(5);
/// Notes of pauses that are kept; a migration takes a few seconds.
const PAUSES_KEPT: usize = 4096;
/// How long the guest may leave a peer without an answer before the connection counts as lost.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);
/// Linux's ETH_P_RARP.
const ETHERTYPE_RARP: u16 = 0x8035;

/// Moves this thread, and what it starts from now on, into a network of its own.
///
/// # Errors
/// Without root, or where the kernel lacks bridges or veth.
pub fn enter() -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("no network namespace; this needs root")?;
    ip("link set lo up")?;
    ip(&format!("link add {SWITCH} type bridge"))?;
    ip(&format!("addr add 10.77.0.1/24 dev {SWITCH}"))?;
    ip(&format!("link set {SWITCH} up"))?;
    for number in 1..=NODES {
        let (bridge, port, far) = (
            format!("{SWITCH}-n{number}"),
            format!("to-n{number}"),
            format!("up-n{number}"),
        );
        ip(&format!("link add {bridge} type bridge"))?;
        ip(&format!("link add {port} type veth peer name {far}"))?;
        ip(&format!("link set {port} master {SWITCH} up"))?;
        ip(&format!("link set {far} master {bridge} up"))?;
        ip(&format!("link set {bridge} up"))?;
    }
    Ok(())
}

fn ip(arguments: &str) -> anyhow::Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.context("cannot run ip; install iproute2")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {arguments}: {said}");
    Ok(())
}

/// The ports of `bridge` behind which it believes the guest: on the switch `to-n2`, on a node's bridge its tap.
///
/// # Errors
/// When it cannot be asked.
pub fn forwarding_entries(bridge: &str) -> anyhow::Result<Vec<String>> {
    let output = Command::new("bridge")
        .args(["-j", "fdb", "show", "br", bridge])
        .output()
        .context("cannot run bridge; install iproute2")?;
    ensure!(
        output.status.success(),
        "bridge fdb: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let entries: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let guest = entries.iter().filter(|entry| entry["mac"] == GUEST.mac);
    Ok(guest
        .filter_map(|entry| entry["ifname"].as_str().map(str::to_owned))
        .collect())
}

/// The taps that are there, each with whether its link is up.
///
/// # Errors
/// When they cannot be listed.
pub fn taps() -> anyhow::Result<Vec<(String, bool)>> {
    // `ip tuntap list` asks /sys, which shows the network of who mounted it.
    let output = Command::new("ip")
        .args(["-j", "link", "show", "type", "tun"])
        .output()
        .context("cannot run ip; install iproute2")?;
    ensure!(
        output.status.success(),
        "ip link show: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let links: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let name_and_link = |link: &Value| {
        let flags = link["flags"].as_array()?;
        let up = flags.iter().any(|flag| flag == "UP");
        Some((link["ifname"].as_str()?.to_owned(), up))
    };
    Ok(links.iter().filter_map(name_and_link).collect())
}

/// Hears the RARP frames that reach the switch.
pub struct RarpEar {
    socket: Socket,
}

impl RarpEar {
    /// Begins to listen.
    ///
    /// # Errors
    /// Without root.
    pub fn open() -> anyhow::Result<RarpEar> {
        let protocol = Protocol::from(i32::from(ETHERTYPE_RARP.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))?;
        socket.set_nonblocking(true)?;
        Ok(RarpEar { socket })
    }

    /// Whether the guest's address was announced since the last look.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn heard_guest(&mut self) -> anyhow::Result<bool> {
        let mac = GUEST
            .mac
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16));
        let mac = mac.collect::<Result<Vec<_>, _>>()?;
        let mut heard = false;
        let mut frame = [0; 64];
        loop {
            match self.socket.read(&mut frame) {
                // Broadcast, from the guest's address, operation 3.
                Ok(count) => {
                    heard |= count >= 42
                        && frame[..6] == [0xff; 6]
                        && frame[6..12] == mac[..]
                        && frame[20..22] == [0, 3];
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(heard),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A cluster of three nodes on this network, with a Linux guest that has booted and works.
///
/// # Errors
/// When any of it does not come up.
pub async fn cluster_with_guest(guest: &LinuxGuest, name: &str) -> anyhow::Result<TestCluster> {
    let cluster = TestCluster::start(Setup {
        fast: false,
        relay: false,
        bridge: Some(SWITCH.into()),
        ..Setup::default()
    })
    .await?;
    guest.create(&cluster, name, Some(GUEST)).await?;
    let mut terminal = Terminal::open(&cluster, name).await?;
    terminal.wait_for("baton guest ready").await?;
    terminal.wait_for(PROMPT).await?;
    terminal.wait_progress(Status::default()).await?;
    Ok(cluster)
}

/// A node other than the one that the machine runs on, a different one each round.
///
/// # Errors
/// When nobody knows the machine.
pub async fn next_node(cluster: &TestCluster, vm: &str, round: usize) -> anyhow::Result<String> {
    let here = cluster.vm(vm).await?.node;
    let names = cluster.local.nodes.iter().map(|node| node.name.clone());
    let others: Vec<String> = names.filter(|node| *node != here).collect();
    others
        .get(round % others.len().max(1))
        .cloned()
        .context("there is no other node")
}

/// A TCP connection to the guest's echo service on which a number goes out every few milliseconds, and
/// must come back, each in its turn.
pub struct EchoPeer {
    answers: watch::Receiver<Answers>,
    task: JoinHandle<anyhow::Result<()>>,
}

/// When answers came.
#[derive(Clone, Debug)]
struct Answers {
    count: u64,
    last: Instant,
    /// The ends of pauses longer than [`PAUSE_MIN`], and how long each was; the oldest are forgotten.
    pauses: VecDeque<(Instant, Duration)>,
}

impl EchoPeer {
    /// Connects, and waits for the first answers.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub async fn connect() -> anyhow::Result<EchoPeer> {
        let deadline = Instant::now() + ANSWER_PATIENCE;
        let stream = loop {
            match tokio::time::timeout(ANSWER_PATIENCE / 10, TcpStream::connect(ECHO)).await {
                Ok(Ok(stream)) => break stream,
                other => ensure!(
                    Instant::now() < deadline,
                    "the guest's echo service does not answer: {other:?}"
                ),
            }
            tokio::time::sleep(BEAT).await;
        };
        stream.set_nodelay(true)?;
        let (tell, answers) = watch::channel(Answers {
            count: 0,
            last: Instant::now(),
            pauses: VecDeque::new(),
        });
        let task = tokio::spawn(echo(stream, tell));
        let mut peer = EchoPeer { answers, task };
        peer.wait_answers(10).await?;
        Ok(peer)
    }

    /// The longest time without an answer, of all that ended after `since`.
    pub fn longest_pause(&self, since: Instant) -> Duration {
        let answers = self.answers.borrow();
        let ended = answers.pauses.iter().filter(|(end, _)| *end > since);
        ended.map(|(_, pause)| *pause).max().unwrap_or(PAUSE_MIN)
    }

    /// Waits for that many further answers.
    ///
    /// # Errors
    /// When they do not come within a minute, the connection has ended, or an answer was wrong.
    pub async fn wait_answers(&mut self, more: u64) -> anyhow::Result<()> {
        let wanted = self.answers.borrow().count + more;
        let answered = self.answers.wait_for(|answers| answers.count >= wanted);
        match tokio::time::timeout(ANSWER_PATIENCE, answered).await {
            Ok(Ok(_)) => Ok(()),
            Err(_) => bail!("the guest has not answered for {ANSWER_PATIENCE:?}"),
            Ok(Err(_)) => {
                (&mut self.task).await??;
                bail!("the connection has ended")
            }
        }
    }
}

impl Drop for EchoPeer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Sends numbers and compares what comes back, until something is wrong.
async fn echo(stream: TcpStream, tell: watch::Sender<Answers>) -> anyhow::Result<()> {
    let (mut reader, mut writer) = stream.into_split();
    let answered = tell.subscribe();
    let send = async {
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for number in 0u64.. {
            beat.tick().await;
            let mut heard = answered.clone();
            heard
                .wait_for(|answers| number < answers.count + UNANSWERED_MAX)
                .await?;
            writer.write_all(record(number).as_bytes()).await?;
        }
        anyhow::Ok(())
    };
    let receive = async {
        let mut bytes = [0; RECORD_BYTES];
        for number in 0u64.. {
            reader.read_exact(&mut bytes).await?;
            ensure!(
                bytes == record(number).as_bytes(),
                "number {number} came back as {:?}",
                String::from_utf8_lossy(&bytes)
            );
            tell.send_modify(|answers| {
                let now = Instant::now();
                let pause = now - answers.last;
                if pause > PAUSE_MIN {
                    answers.pauses.push_back((now, pause));
                    let excess = answers.pauses.len().saturating_sub(PAUSES_KEPT);
                    answers.pauses.drain(..excess);
                }
                answers.count += 1;
                answers.last = now;
            });
        }
        anyhow::Ok(())
    };
    tokio::try_join!(send, receive)?;
    Ok(())
}

fn record(number: u64) -> String {
    format!("{number:0width$}\n", width = RECORD_BYTES - 1)
}
