//! A monitor process and the guest in it: numbered writes, flushes, and a check of what is read.

use std::collections::BTreeMap;

use cluster_model::phase::{self, Phase};
use cluster_model::{MigrationId, MonitorMigration, MonitorView, Side, Token, VmId};

use crate::storage::{BLOCKS, Block};

/// The guest's memory: what moves with a migration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Guest {
    /// Whether it has read its disk since it booted.
    pub booted: bool,
    /// The last number it wrote.
    pub written: u64,
    /// What it expects in each block.
    pub expects: [u64; BLOCKS],
    /// Numbers that are answered and not committed, with the verifier they were answered under.
    pub uncommitted: BTreeMap<u64, u64>,
    /// How often it has run a step: a copy that fell back in time shows.
    pub steps: u64,
}

/// A call of the monitor that is not answered.
#[derive(Clone, Debug, PartialEq)]
pub enum Pending {
    /// A write of that number.
    Write(u64),
    /// The check of the disk, and what was flushed when it was asked for.
    Read(u64),
    /// A commit up to that number.
    Commit(u64),
}

/// Its part in a migration.
#[derive(Clone, Debug)]
pub struct Part {
    /// Which.
    pub id: MigrationId,
    /// On which side.
    pub side: Side,
    /// The node of the other side.
    pub peer: usize,
    /// The other side's monitor, once known.
    pub peer_nonce: Option<u64>,
    /// Destination: *quiet* arrived.
    pub quiet_received: bool,
    /// It failed, and why.
    pub failed: Option<String>,
}

/// What a daemon asks of a monitor. It waits in the monitor's socket: a stopped process carries it out when it goes
/// on, whoever has given up waiting meanwhile.
#[derive(Clone, Debug)]
pub enum MonitorCall {
    /// A permit: under that token, until then on the host's clock, µs.
    Run {
        /// The token.
        token: Token,
        /// The deadline.
        deadline: u64,
    },
    /// Take up that token.
    Rekey(Token),
    /// Stop the guest.
    Stop {
        /// Its token.
        token: Token,
        /// Leave behind what is not on the disk.
        forced: bool,
    },
    /// Send the machine to that monitor of that node.
    Send {
        /// Which migration.
        migration: MigrationId,
        /// Which node.
        peer: usize,
        /// Which monitor there.
        peer_nonce: u64,
    },
    /// End the sending.
    CancelSend(MigrationId),
    /// Say how it stands.
    Describe,
}

/// A monitor. Its phases are the product's.
#[derive(Clone, Debug)]
pub struct Monitor {
    /// Its machine.
    pub vm: VmId,
    /// Drawn when it started.
    pub nonce: u64,
    /// The token that its disk is under.
    pub token: Token,
    /// The highest token it was told.
    pub highest: Token,
    /// How it stands.
    pub phase: Phase,
    /// A vCPU is in the guest: it was let in while the deadline was ahead, and nothing has got it out since.
    pub in_guest: bool,
    /// On the host's clock that never stops, µs.
    pub deadline: u64,
    /// Source: it said *quiet* and was not let run since.
    pub said_quiet: bool,
    /// Its part in a migration.
    pub part: Option<Part>,
    /// Its guest.
    pub guest: Guest,
    /// Calls under way: number, when sent (real time), which, under which token.
    pub calls: BTreeMap<u64, (u64, Pending, Token)>,
    /// Writes to send again after a re-key, in order.
    pub again: Vec<u64>,
    /// A re-key sends them under its new token; this call waits for it.
    pub rekeying: Option<u64>,
    /// A write of its present token has no answer and no hope of one.
    pub in_doubt: bool,
    /// It was asked to stop its guest.
    pub stop_asked: bool,
    /// It was stopped with writes under way.
    pub undrained: bool,
    /// Until when the process is stopped (SIGSTOP), real time.
    pub paused_until: u64,
    /// A timer chain is running for its guest.
    pub ticking: bool,
    /// How often it has described itself.
    pub said: u64,
    /// The mutant's: it was stopping for a cutover when it was let run again.
    pub goes_on_to_quiet: bool,
}

impl Monitor {
    /// A new one that waits for its permit.
    pub fn new(vm: VmId, nonce: u64, token: Token, phase: Phase) -> Monitor {
        Monitor {
            vm,
            nonce,
            token,
            highest: token,
            phase,
            in_guest: false,
            deadline: 0,
            said_quiet: false,
            part: None,
            guest: Guest::default(),
            calls: BTreeMap::new(),
            again: Vec::new(),
            rekeying: None,
            in_doubt: false,
            stop_asked: false,
            undrained: false,
            paused_until: 0,
            ticking: false,
            said: 0,
            goes_on_to_quiet: false,
        }
    }

    /// The process is stopped (SIGSTOP): its vCPUs leave the guest, and find the deadline when they are to go in again.
    pub fn pause(&mut self, until: u64) {
        self.paused_until = self.paused_until.max(until);
        self.in_guest = false;
    }

    /// Whether its guest executes at that moment of real time.
    pub fn executes(&self, now: u64) -> bool {
        self.in_guest && self.paused_until <= now
    }

    /// Takes a step of the table; whether it is one.
    pub fn step(&mut self, event: phase::Event) -> bool {
        match self.phase.after(event) {
            Ok(next) => {
                self.phase = next;
                self.in_guest &= next == Phase::Running;
                true
            }
            Err(_) => false,
        }
    }

    /// Whether a write is unanswered.
    pub fn writes_unanswered(&self) -> bool {
        self.calls
            .values()
            .any(|(_, what, _)| matches!(what, Pending::Write(_)))
    }

    /// As it describes itself.
    pub fn view(&self, host_now: u64) -> MonitorView {
        MonitorView {
            vm: self.vm,
            token: self.token,
            nonce: self.nonce,
            phase: self.phase.seen(),
            said_quiet: self.said_quiet,
            writes_unanswered: self.in_doubt || self.writes_unanswered(),
            write_latency_p999_us: 0,
            stop_asked: self.stop_asked,
            undrained: self.undrained,
            migration: self.part.as_ref().map(|part| MonitorMigration {
                id: part.id,
                side: part.side,
                quiet_received: part.quiet_received,
                failed: part.failed.clone(),
            }),
            failure: None,
            lease_deadline_passed: self.deadline != 0 && self.deadline <= host_now,
        }
    }

    /// What the guest makes of its disk: the first thing that is wrong, if any.
    pub fn check(&mut self, blocks: &[Block; BLOCKS], witness: u64) -> Option<String> {
        let highest = blocks.iter().map(|block| block.0).max().unwrap_or(0);
        if highest < witness {
            return Some(format!(
                "{}: {witness} was flushed and the disk holds {highest} at most",
                self.vm
            ));
        }
        if !self.guest.booted {
            // Everything up to the witness must be there, but for what was overwritten later.
            for (at, block) in blocks.iter().enumerate() {
                let due = (0..=witness).rev().find(|n| *n as usize % BLOCKS == at);
                if due.is_some_and(|due| block.0 < due) {
                    return Some(format!(
                        "{}: block {at} holds {} and {due:?} was flushed",
                        self.vm, block.0
                    ));
                }
            }
            self.guest.booted = true;
            self.guest.written = highest;
            // What was under way when the last guest died may have left holes below the highest number:
            // they are filled before anything new is written, as a journal is replayed.
            let first = (highest + 1).saturating_sub(BLOCKS as u64).max(1);
            for number in first..=highest {
                let at = number as usize % BLOCKS;
                self.guest.expects[at] = number;
                if blocks[at].0 != number {
                    self.again.push(number);
                }
            }
            return None;
        }
        for (at, block) in blocks.iter().enumerate() {
            let unanswered = self.calls.values().any(
                |(_, what, _)| matches!(what, Pending::Write(n) if *n as usize % BLOCKS == at),
            );
            let again = self.again.iter().any(|n| *n as usize % BLOCKS == at);
            let lost_and_known = self
                .guest
                .uncommitted
                .keys()
                .any(|n| *n as usize % BLOCKS == at);
            if block.0 != self.guest.expects[at] && !unanswered && !again && !lost_and_known {
                return Some(format!(
                    "{}: block {at} holds {} (of {}) and {} was written",
                    self.vm, block.0, block.1, self.guest.expects[at]
                ));
            }
        }
        None
    }
}

impl Monitor {
    /// Its disk goes on under a token that is claimed and confirmed: what was not answered or not committed is sent again.
    pub fn take_up(&mut self, token: Token) {
        self.token = token;
        self.in_doubt = false;
        self.again_everything();
    }

    /// Everything that is not known to be on the disk is to be written again, in order.
    pub fn again_everything(&mut self) {
        let mut again: Vec<u64> = self.guest.uncommitted.keys().copied().collect();
        again.append(&mut self.again);
        for (_, what, _) in std::mem::take(&mut self.calls).into_values() {
            if let Pending::Write(number) = what {
                again.push(number);
            }
        }
        again.sort_unstable();
        again.dedup();
        self.guest.uncommitted.clear();
        self.again = again;
    }
}
