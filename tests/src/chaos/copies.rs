//! Whether one copy of each machine executes at a time, and how late freezes come: from what every monitor wrote
//! down of its guest (see [`vmm::run_log`]) and what the harness did to it meanwhile.
//!
//! ```text
//!   spell       ├───────────────────────┤      as the monitor wrote it down
//!   stopped              ├────────────┤        SIGSTOP to SIGCONT, as the harness wrote it down
//!   executed    ├────────┤                     KVM_RUN answers a stop with EINTR: it was the last entry
//!   deadline          ↑
//!   late              ├──┤
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clusterctl::local::{Member, processes_of};
use nix::unistd::Pid;
use vmm::clock;
use vmm::run_log::{self, Spell};

/// What the harness did, by the run log of the monitor that it was done to; times are CLOCK_MONOTONIC.
#[derive(Debug, Default)]
pub struct Ledger {
    kills: BTreeMap<PathBuf, u64>,
    stops: BTreeMap<PathBuf, Vec<(u64, u64)>>,
    /// For each node when its boot clock stepped, and how far it is ahead from then on.
    steps: BTreeMap<String, Vec<(u64, i64)>>,
}

/// The run log of the monitor that this process is, if it is one.
pub fn run_log_of(pid: Pid) -> Option<PathBuf> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut arguments = line.split(|byte| *byte == 0);
    arguments.find(|argument| *argument == b"--control")?;
    let control = std::str::from_utf8(arguments.next()?).ok()?;
    Some(Path::new(control).with_extension(run_log::EXTENSION))
}

impl Ledger {
    /// These monitors have just been killed.
    pub fn killed(&mut self, monitors: impl IntoIterator<Item = PathBuf>) {
        let now_ns = clock::monotonic_ns();
        for monitor in monitors {
            self.kills.entry(monitor).or_insert(now_ns);
        }
    }

    /// That monitor has just been stopped.
    pub fn stopped(&mut self, monitor: PathBuf) {
        let stops = self.stops.entry(monitor).or_default();
        stops.push((clock::monotonic_ns(), u64::MAX));
    }

    /// That monitor is about to go on.
    pub fn goes_on(&mut self, monitor: &Path) {
        if let Some((_, until_ns)) = self
            .stops
            .get_mut(monitor)
            .and_then(|stops| stops.last_mut())
        {
            *until_ns = clock::monotonic_ns();
        }
    }

    /// A node's boot clock has just been put that far ahead.
    pub fn stepped(&mut self, node: &str, ahead_ns: i64) {
        let steps = self.steps.entry(node.to_owned()).or_default();
        steps.push((clock::monotonic_ns(), ahead_ns));
    }
}

/// What is known of one monitor.
#[derive(Clone, Debug, Default)]
struct Monitor {
    /// Its node and folder, for people.
    who: String,
    vm: u64,
    /// When its process ended: known where the harness killed it.
    killed_ns: Option<u64>,
    /// Whether its process is there no more.
    gone: bool,
    stops: Vec<(u64, u64)>,
    /// How its clock went: see [`Ledger`].
    steps: Vec<(u64, i64)>,
}

/// A stretch of execution.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stretch {
    vm: u64,
    from_ns: u64,
    to_ns: u64,
    who: String,
}

/// Two copies of one machine executed at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// Which machine.
    pub vm: u64,
    /// For how long.
    pub length_ns: u64,
    /// The copy that was there first.
    pub first: String,
    /// The other.
    pub second: String,
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (vm, us) = (self.vm, self.length_ns / 1_000);
        write!(
            f,
            "vm-{vm} executed twice for {us} us: {}, {}",
            self.first, self.second
        )
    }
}

impl Monitor {
    /// The stretches in which a spell's guest executed, as seen at `now_ns`.
    fn executed(&self, spell: &Spell, now_ns: u64) -> Vec<(u64, u64)> {
        let end_ns = if !spell.is_inside() {
            let stopped = |(from_ns, _): &&(u64, u64)| {
                spell.interrupted && *from_ns >= spell.entered_ns && *from_ns < spell.left_ns
            };
            let stop = self.stops.iter().find(stopped);
            stop.map_or(spell.left_ns, |(from_ns, _)| *from_ns)
        } else {
            match self.killed_ns {
                Some(killed_ns) => killed_ns.max(spell.entered_ns),
                // It ended by itself, or its own node killed it: it executed this long at least.
                None if self.gone => spell.entered_ns,
                None => now_ns,
            }
        };
        let mut pieces = Vec::new();
        let mut from_ns = spell.began_ns;
        for (stopped_ns, until_ns) in &self.stops {
            if *until_ns <= from_ns || *stopped_ns >= end_ns {
                continue;
            }
            if *stopped_ns > from_ns {
                pieces.push((from_ns, *stopped_ns));
            }
            from_ns = *until_ns;
        }
        if from_ns < end_ns {
            pieces.push((from_ns, end_ns));
        }
        pieces
    }

    /// When its clock read `deadline_ns`, on CLOCK_MONOTONIC, which is `apart_ns` behind the kernel's CLOCK_BOOTTIME.
    fn passed_at(&self, deadline_ns: u64, apart_ns: u64) -> u64 {
        let mut begins_ns = 0;
        let mut ahead_ns = 0_i64;
        for (at_ns, ahead_later_ns) in &self.steps {
            let passed_ns = unshifted(deadline_ns, ahead_ns, apart_ns);
            if passed_ns < *at_ns {
                return passed_ns.max(begins_ns);
            }
            (begins_ns, ahead_ns) = (*at_ns, *ahead_later_ns);
        }
        unshifted(deadline_ns, ahead_ns, apart_ns).max(begins_ns)
    }

    /// How long a spell went on after its deadline; `None` if it did not end for it.
    fn late_ns(&self, spell: &Spell, now_ns: u64, apart_ns: u64) -> Option<u64> {
        if spell.deadline_ns == u64::MAX {
            return None;
        }
        let passed_ns = self.passed_at(spell.deadline_ns, apart_ns);
        let after = |(from_ns, to_ns): (u64, u64)| to_ns.saturating_sub(from_ns.max(passed_ns));
        let late_ns = self.executed(spell, now_ns).into_iter().map(after).sum();
        (late_ns > 0 || spell.at_deadline).then_some(late_ns)
    }
}

fn unshifted(deadline_ns: u64, ahead_ns: i64, apart_ns: u64) -> u64 {
    deadline_ns
        .saturating_add_signed(ahead_ns.saturating_neg())
        .saturating_sub(apart_ns)
}

/// Every overlap of two copies, the longest first. Stretches that touch do not overlap.
fn overlaps(mut stretches: Vec<Stretch>) -> Vec<Overlap> {
    stretches.sort_by_key(|stretch| (stretch.vm, stretch.from_ns));
    let mut found = Vec::new();
    let mut open: Vec<&Stretch> = Vec::new();
    for next in &stretches {
        open.retain(|open| open.vm == next.vm && open.to_ns > next.from_ns);
        for first in open.iter().filter(|open| open.who != next.who) {
            let length_ns = first.to_ns.min(next.to_ns).saturating_sub(next.from_ns);
            if length_ns > 0 {
                found.push(Overlap {
                    vm: next.vm,
                    length_ns,
                    first: first.who.clone(),
                    second: next.who.clone(),
                });
            }
        }
        open.push(next);
    }
    found.sort_by_key(|overlap| std::cmp::Reverse(overlap.length_ns));
    found
}

/// What has been read so far.
#[derive(Debug, Default)]
pub struct Copies {
    /// For each vCPU of each run log the first spell that was not complete.
    next: BTreeMap<(PathBuf, usize), u64>,
    /// For each vCPU of each run log the first spell of whose lateness nothing is known.
    uncounted: BTreeMap<(PathBuf, usize), u64>,
    /// The stretches of the last look: what is read then may overlap what is read now.
    before: Vec<Stretch>,
    late_ns: Vec<u64>,
    monitors: BTreeSet<PathBuf>,
}

impl Copies {
    /// Reads what every monitor of these nodes has written since the last look.
    ///
    /// # Errors
    /// With the longest overlap, or a freeze that came later than `margin_ms`; or when a run log cannot be read or has
    /// lost what was not read.
    pub fn look(
        &mut self,
        nodes: &[Member],
        ledger: &Ledger,
        margin_ms: u32,
    ) -> anyhow::Result<()> {
        let apart_ns = clock::boottime_ns().saturating_sub(clock::monotonic_ns());
        let mut stretches = Vec::new();
        for node in nodes {
            let alive: BTreeSet<PathBuf> = processes_of(&node.folder)
                .into_iter()
                .filter_map(|pid| run_log_of(Pid::from_raw(pid)))
                .collect();
            for path in run_logs(&node.folder)? {
                let gone = !alive.contains(&path);
                let folder = path.parent().and_then(Path::file_name).unwrap_or_default();
                let runs =
                    run_log::read(&path).with_context(|| format!("reading {}", path.display()))?;
                let monitor = Monitor {
                    who: format!("{} {}", node.name, folder.display()),
                    vm: runs.vm,
                    killed_ns: ledger.kills.get(&path).copied(),
                    gone,
                    stops: ledger.stops.get(&path).cloned().unwrap_or_default(),
                    steps: ledger.steps.get(&node.name).cloned().unwrap_or_default(),
                };
                for (vcpu, spells) in runs.vcpus.iter().enumerate() {
                    let key = (path.clone(), vcpu);
                    self.take(&key, &monitor, spells, apart_ns, &mut stretches)?;
                }
                self.monitors.insert(path);
            }
        }
        let mut both = std::mem::take(&mut self.before);
        both.extend(stretches.iter().cloned());
        self.before = stretches;
        let found = overlaps(both);
        if let Some(longest) = found.first() {
            bail!("{longest}; overlaps in all: {}", found.len());
        }
        let (_, _, max_ms) = self.lateness_ms();
        ensure!(
            max_ms < f64::from(margin_ms),
            "a guest executed {max_ms:.3} ms past its deadline: the lease's margin is {margin_ms} ms"
        );
        Ok(())
    }

    fn take(
        &mut self,
        key: &(PathBuf, usize),
        monitor: &Monitor,
        spells: &[Spell],
        apart_ns: u64,
        stretches: &mut Vec<Stretch>,
    ) -> anyhow::Result<()> {
        let now_ns = clock::monotonic_ns();
        let next = self.next.entry(key.clone()).or_default();
        if let Some(first) = spells.first() {
            ensure!(
                first.number <= *next,
                "{}: spells {next} to {} were overwritten before anybody looked",
                key.0.display(),
                first.number
            );
        }
        let uncounted = self.uncounted.entry(key.clone()).or_default();
        for spell in spells.iter().filter(|spell| spell.number >= *next) {
            for (from_ns, to_ns) in monitor.executed(spell, now_ns) {
                stretches.push(Stretch {
                    vm: monitor.vm,
                    from_ns,
                    to_ns,
                    who: monitor.who.clone(),
                });
            }
            if spell.number >= *uncounted
                && let Some(late_ns) = monitor.late_ns(spell, now_ns, apart_ns)
            {
                self.late_ns.push(late_ns);
                *uncounted = spell.number + 1;
            }
        }
        // The last one may go on.
        *next = spells.last().map_or(0, |spell| spell.number);
        Ok(())
    }

    /// Monitors whose guests' execution was read.
    pub fn monitors(&self) -> u64 {
        self.monitors.len() as u64
    }

    /// Freezes by a deadline, and how late they came, ms: the 99th of a hundred, and the latest.
    pub fn lateness_ms(&self) -> (u64, f64, f64) {
        let mut late_ns = self.late_ns.clone();
        late_ns.sort_unstable();
        let ms = |ns: Option<&u64>| ns.map_or(0.0, |ns| *ns as f64 / 1e6);
        let p99 = (late_ns.len() * 99).div_ceil(100).saturating_sub(1);
        (
            late_ns.len() as u64,
            ms(late_ns.get(p99)),
            ms(late_ns.last()),
        )
    }
}

/// The run logs of a node's monitors, of those that ended too.
fn run_logs(node: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let folder = node.join("vms");
    let mut found = Vec::new();
    if folder.exists() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path().join("ctl").with_extension(run_log::EXTENSION);
            if path.exists() {
                found.push(path);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn spell(began_ms: u64, entered_ms: u64, left_ms: u64, deadline_ms: u64) -> Spell {
        Spell {
            number: 0,
            began_ns: began_ms * MS,
            entered_ns: entered_ms * MS,
            left_ns: left_ms * MS,
            deadline_ns: deadline_ms * MS,
            interrupted: false,
            at_deadline: false,
        }
    }

    fn stretch(who: &str, from_ms: u64, to_ms: u64) -> Stretch {
        Stretch {
            vm: 1,
            from_ns: from_ms * MS,
            to_ns: to_ms * MS,
            who: who.into(),
        }
    }

    fn stopped(stops_ms: &[(u64, u64)]) -> Monitor {
        let ns = |(from, to): &(u64, u64)| (from * MS, to.saturating_mul(MS));
        Monitor {
            stops: stops_ms.iter().map(ns).collect(),
            ..Monitor::default()
        }
    }

    #[test]
    fn two_copies_at_once_are_found_with_who_and_for_how_long() {
        let found = overlaps(vec![
            stretch("n2 b", 15, 40),
            stretch("n1 a", 10, 20),
            stretch("n3 c", 39, 39),
            Stretch {
                vm: 2,
                ..stretch("n1 x", 0, 100)
            },
            stretch("n1 a", 5, 12),
        ]);
        assert_eq!(
            found,
            [Overlap {
                vm: 1,
                length_ns: 5 * MS,
                first: "n1 a".into(),
                second: "n2 b".into(),
            }]
        );
        assert_eq!(
            found[0].to_string(),
            "vm-1 executed twice for 5000 us: n1 a, n2 b"
        );
    }

    #[test]
    fn a_long_stretch_is_held_against_every_later_one() {
        let found = overlaps(vec![
            stretch("n1 a", 0, 100),
            stretch("n2 b", 10, 20),
            stretch("n2 b", 50, 80),
        ]);
        let lengths: Vec<u64> = found.iter().map(|found| found.length_ns / MS).collect();
        assert_eq!(lengths, [30, 10]);
    }

    #[test]
    fn stretches_that_touch_and_one_monitors_own_vcpus_are_no_overlap() {
        let found = overlaps(vec![
            stretch("n1 a", 0, 10),
            stretch("n1 a", 5, 20),
            stretch("n2 b", 20, 30),
        ]);
        assert_eq!(found, []);
    }

    #[test]
    fn what_a_process_stood_stopped_for_it_did_not_execute() {
        // It went on within the same spell.
        let monitor = stopped(&[(20, 60)]);
        let on = spell(10, 80, 90, 100);
        assert_eq!(
            monitor.executed(&on, 0),
            [(10 * MS, 20 * MS), (60 * MS, 90 * MS)]
        );
        // The stop was what ended the last entry, which returned only after it.
        let over = Spell {
            interrupted: true,
            ..spell(10, 15, 65, 30)
        };
        assert_eq!(monitor.executed(&over, 0), [(10 * MS, 20 * MS)]);
        // It has not been let go on.
        let still = stopped(&[(20, u64::MAX)]);
        assert_eq!(
            still.executed(&spell(10, 15, 0, 30), 500 * MS),
            [(10 * MS, 20 * MS)]
        );
    }

    #[test]
    fn a_killed_monitor_executed_until_its_kill_and_another_until_it_was_seen_last() {
        let inside = spell(10, 30, 20, 100);
        let killed = Monitor {
            killed_ns: Some(50 * MS),
            gone: true,
            ..Monitor::default()
        };
        assert_eq!(killed.executed(&inside, 90 * MS), [(10 * MS, 50 * MS)]);
        let gone = Monitor {
            gone: true,
            ..Monitor::default()
        };
        assert_eq!(gone.executed(&inside, 90 * MS), [(10 * MS, 30 * MS)]);
        let alive = Monitor::default();
        assert_eq!(alive.executed(&inside, 90 * MS), [(10 * MS, 90 * MS)]);
    }

    #[test]
    fn a_freeze_is_as_late_as_the_guest_executed_past_its_deadline() {
        let late = |monitor: &Monitor, spell: &Spell| monitor.late_ns(spell, 0, 0);
        let monitor = Monitor::default();
        assert_eq!(late(&monitor, &spell(10, 20, 30, 40)), None);
        assert_eq!(late(&monitor, &spell(10, 20, 47, 40)), Some(7 * MS));
        let stood = Spell {
            at_deadline: true,
            ..spell(10, 20, 30, 40)
        };
        assert_eq!(late(&monitor, &stood), Some(0), "a freeze in time");
        // Stopped across its deadline, it was late by nothing if the stop ended its last entry.
        let interrupted = Spell {
            interrupted: true,
            ..spell(10, 20, 95, 40)
        };
        assert_eq!(late(&stopped(&[(30, 90)]), &interrupted), None);
        // One that entered again after the stop was.
        assert_eq!(
            late(&stopped(&[(30, 90)]), &spell(10, 92, 95, 40)),
            Some(5 * MS)
        );
        // No lease, no deadline.
        let unleased = Spell {
            deadline_ns: u64::MAX,
            ..spell(10, 20, 47, 0)
        };
        assert_eq!(late(&monitor, &unleased), None);
    }

    #[test]
    fn a_deadline_passes_by_the_nodes_own_clock_and_its_steps() {
        let monitor = Monitor {
            steps: vec![(100 * MS, 50 * MS as i64), (300 * MS, 400 * MS as i64)],
            ..Monitor::default()
        };
        // Before the first step, between them, stepped over, after the last; the boot clock is 10 ms ahead.
        for (deadline_ms, passed_ms) in [(90, 80), (200, 140), (130, 100), (500, 300), (900, 490)] {
            let passed_ns = monitor.passed_at(deadline_ms * MS, 10 * MS);
            assert_eq!(passed_ns, passed_ms * MS, "{deadline_ms}");
        }
    }
}
