//! What goes wrong, when, and how it is mended.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::World;
use super::copies::run_log_of;

/// Which processes of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The node daemon.
    Daemon,
    /// One monitor.
    Monitor,
    /// The storage daemon.
    Broker,
    /// All of them.
    All,
}

/// A fault, by node number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL; what the node does not start again by itself is started when the fault is healed.
    Kill(usize, Part),
    /// SIGSTOP, and SIGCONT when it is healed.
    Stop(usize, Part),
    /// The first loses what the second sends; with `true` both lose everything.
    Cut(usize, usize, bool),
    /// A node loses every other node.
    Isolate(usize),
    /// A node and the storage server lose each other.
    CutStorage(usize),
    /// A node's link takes so many Mbit/s.
    Slow(usize, u32),
    /// The storage server dies.
    KillServer,
    /// The storage server stands still.
    StopServer,
    /// A node's clocks step: boot time by ms, wall time by s.
    Clock(usize, i64, i64),
}

/// How far a boot clock may step: less than the margin between freezing and being declared lost.
const BOOT_STEP_MS: std::ops::RangeInclusive<i64> = 50..=400;
/// How far a wall clock may step, seconds.
const WALL_STEP_S: std::ops::RangeInclusive<i64> = -86_400..=86_400;

/// A fault that has been put in and not been healed.
pub struct Active {
    /// Which.
    pub fault: Fault,
    /// The name of its firewall table.
    table: String,
    /// What was stopped.
    stopped: Vec<Pid>,
    /// When it is healed.
    pub until: tokio::time::Instant,
}

impl Fault {
    /// Draws one, and how long it lasts.
    pub fn draw(rng: &mut StdRng, nodes: usize) -> (Fault, Duration) {
        let node = rng.random_range(0..nodes);
        let other = (node + rng.random_range(1..nodes)) % nodes;
        let parts = [Part::Daemon, Part::Monitor, Part::Broker, Part::All];
        let part = *parts.choose(rng).unwrap_or(&Part::All);
        let short = Duration::from_millis(rng.random_range(100..4_000));
        let long = Duration::from_millis(rng.random_range(300..6_000));
        match rng.random_range(0..100) {
            0..22 => (Fault::Kill(node, part), long),
            22..42 => (Fault::Stop(node, part), long),
            42..54 => (Fault::Cut(node, other, rng.random_bool(0.5)), long),
            54..62 => (Fault::Isolate(node), long),
            62..72 => (Fault::CutStorage(node), long),
            72..80 => (Fault::Slow(node, rng.random_range(5..200)), long),
            80..86 => (Fault::KillServer, short),
            86..91 => (Fault::StopServer, short),
            _ => {
                let (boot_ms, wall_s) = match rng.random_bool(0.5) {
                    true => (rng.random_range(BOOT_STEP_MS), 0),
                    false => (0, rng.random_range(WALL_STEP_S)),
                };
                (Fault::Clock(node, boot_ms, wall_s), Duration::ZERO)
            }
        }
    }

    /// The kind, for counting.
    pub fn kind(&self) -> String {
        let part = |part: &Part| format!("{part:?}").to_lowercase();
        match self {
            Fault::Kill(_, which) => format!("kill {}", part(which)),
            Fault::Stop(_, which) => format!("stop {}", part(which)),
            Fault::Cut(_, _, false) => "cut one way".into(),
            Fault::Cut(_, _, true) => "cut both ways".into(),
            Fault::Isolate(_) => "isolate".into(),
            Fault::CutStorage(_) => "cut storage".into(),
            Fault::Slow(..) => "slow link".into(),
            Fault::KillServer => "kill server".into(),
            Fault::StopServer => "stop server".into(),
            Fault::Clock(_, 0, _) => "step wall clock".into(),
            Fault::Clock(..) => "step boot clock".into(),
        }
    }

    /// Whether this one cannot be put in while that one is.
    fn collides(&self, other: &Fault) -> bool {
        let node = |fault: &Fault| match fault {
            Fault::Kill(node, _) | Fault::Stop(node, _) => Some(*node),
            _ => None,
        };
        let server = |fault: &Fault| matches!(fault, Fault::KillServer | Fault::StopServer);
        let slow = |fault: &Fault| match fault {
            Fault::Slow(node, _) => Some(*node),
            _ => None,
        };
        (node(self).is_some() && node(self) == node(other))
            || (slow(self).is_some() && slow(self) == slow(other))
            || (server(self) && server(other))
    }
}

/// The faults that are in.
#[derive(Default)]
pub struct Faults {
    active: Vec<Active>,
    count: u64,
    /// Each node's clock shifts, ns.
    shifts: BTreeMap<usize, (i64, i64)>,
}

impl Faults {
    /// When the next one is to be healed.
    pub fn next_end(&self) -> Option<tokio::time::Instant> {
        self.active.iter().map(|active| active.until).min()
    }

    /// How many are in.
    pub fn active(&self) -> usize {
        self.active.len()
    }

    /// Puts one in, unless it collides with one that is in.
    ///
    /// # Errors
    /// When a tool refuses.
    pub fn put_in(
        &mut self,
        world: &mut World,
        fault: Fault,
        lasts: Duration,
        rng: &mut StdRng,
    ) -> anyhow::Result<()> {
        if self
            .active
            .iter()
            .any(|active| fault.collides(&active.fault))
        {
            return Ok(());
        }
        self.count += 1;
        let table = format!("fault{}", self.count);
        let mut stopped = Vec::new();
        world.timeline.note(
            "fault",
            format!("{table} {fault:?} for {} ms", lasts.as_millis()),
        );
        world.count_fault(&fault.kind());
        match &fault {
            Fault::Kill(node, Part::All) => {
                let monitors: Vec<_> = world
                    .processes(*node, Part::All, rng)
                    .into_iter()
                    .filter_map(run_log_of)
                    .collect();
                world.cluster.local.kill_node(*node);
                world.ledger.killed(monitors);
            }
            Fault::Kill(node, Part::Daemon) => world.cluster.local.kill_clusterd(*node),
            Fault::Kill(node, part) => {
                for pid in world.processes(*node, *part, rng) {
                    let monitor = run_log_of(pid);
                    // It may have ended already.
                    let _ = kill(pid, Signal::SIGKILL);
                    world.ledger.killed(monitor);
                }
            }
            Fault::Stop(node, part) => stopped = world.processes(*node, *part, rng),
            Fault::Cut(node, other, both) => {
                world.networks[*node].cut(&table, &world.networks[*other], *both)?;
            }
            Fault::Isolate(node) => {
                for (at, other) in world.networks.iter().enumerate() {
                    if at != *node {
                        world.networks[*node].cut(&format!("{table}x{at}"), other, true)?;
                    }
                }
            }
            Fault::CutStorage(node) => {
                world.networks[*node].cut(&table, &world.storage_network, true)?;
            }
            Fault::Slow(node, mbit) => world.networks[*node].slow(*mbit)?,
            Fault::KillServer => world.server.kill(&world.cluster.local),
            Fault::StopServer => stopped = world.server.processes(&world.cluster.local),
            Fault::Clock(node, boot_ms, wall_s) => {
                let shift = self.shifts.entry(*node).or_default();
                shift.0 += boot_ms * 1_000_000;
                shift.1 = wall_s * 1_000_000_000;
                let path = world.cluster.local.nodes[*node].folder.join("clock");
                proto::clock::write_shifts(&path, shift.0, shift.1)?;
                let name = &world.cluster.local.nodes[*node].name;
                world.ledger.stepped(name, shift.0);
                return Ok(());
            }
        }
        for pid in &stopped {
            // It may have ended already.
            let _ = kill(*pid, Signal::SIGSTOP);
            if let Some(monitor) = run_log_of(*pid) {
                world.ledger.stopped(monitor);
            }
        }
        self.active.push(Active {
            fault,
            table,
            stopped,
            until: tokio::time::Instant::now() + lasts,
        });
        Ok(())
    }

    /// Heals those whose time is over, or all.
    ///
    /// # Errors
    /// When a tool refuses, or a process does not start again.
    pub fn heal(&mut self, world: &mut World, all: bool) -> anyhow::Result<()> {
        let now = tokio::time::Instant::now();
        let due = self
            .active
            .extract_if(.., |active| all || active.until <= now)
            .collect::<Vec<_>>();
        for active in due {
            world
                .timeline
                .note("healed", format!("{} {:?}", active.table, active.fault));
            match &active.fault {
                Fault::Kill(node, Part::Daemon | Part::All) => world
                    .cluster
                    .local
                    .start_node(*node)
                    .context("a killed node does not start again")?,
                Fault::Kill(..) | Fault::Clock(..) => {}
                Fault::Stop(..) | Fault::StopServer => {
                    for pid in &active.stopped {
                        if let Some(monitor) = run_log_of(*pid) {
                            world.ledger.goes_on(&monitor);
                        }
                        // It may have been killed meanwhile.
                        let _ = kill(*pid, Signal::SIGCONT);
                    }
                }
                Fault::Cut(node, ..) | Fault::CutStorage(node) => {
                    world.networks[*node].heal(&active.table)?;
                }
                Fault::Isolate(node) => {
                    for at in 0..world.networks.len() {
                        if at != *node {
                            world.networks[*node].heal(&format!("{}x{at}", active.table))?;
                        }
                    }
                }
                Fault::Slow(node, _) => world.networks[*node].fast()?,
                Fault::KillServer => world.server.start(&mut world.cluster.local)?,
            }
        }
        Ok(())
    }
}
