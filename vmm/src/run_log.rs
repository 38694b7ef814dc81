//! When a guest executed, for tests that look for a second copy of it and for freezes that come late.
//!
//! With [`VARIABLE`] set a monitor keeps one file beside its control socket. It is mapped: an entry into the guest or an
//! exit from it costs a reading of the clock and a few stores, and what kills the monitor takes nothing of it away.
//!
//! ```text
//!  header   magic · version · machine · vCPUs
//!  vCPU 0   spells begun · a ring of spells: began · entered · left · deadline · flags
//!  vCPU 1   …
//! ```
//!
//! A *spell* is execution without a gap above [`MERGED`]. Merging hides nothing: a copy that executed between two
//! entries of one monitor ran beside it all the same. Times are CLOCK_MONOTONIC, which all hosts on one machine share;
//! the deadline alone is CLOCK_BOOTTIME as the monitor reads it.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cluster_model::ids::VmId;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// The variable that asks for it; any value will do.
pub const VARIABLE: &str = "BATON_RUN_LOG";

/// The extension of a monitor's file; the rest of the name is its control socket's.
pub const EXTENSION: &str = "runs";

/// A gap that ends no spell.
pub const MERGED: Duration = Duration::from_millis(10);

/// Spells of a vCPU that are kept: with gaps of more than [`MERGED`] between them, those of 160 s at least.
pub const SPELLS: u64 = 16_384;

const MAGIC: u64 = u64::from_le_bytes(*b"batonrun");
const VERSION: u64 = 1;
const HEADER_WORDS: u64 = 4;
/// One count, and the ring.
const VCPU_WORDS: u64 = 1 + SPELLS * SPELL_WORDS;

/// The words of a spell, in the order in which a reader has to meet them: who sees when the guest was left also
/// sees the deadline of that moment, or a later one.
const BEGAN: u64 = 0;
const ENTERED: u64 = 1;
const LEFT: u64 = 2;
const DEADLINE: u64 = 3;
const FLAGS: u64 = 4;
const SPELL_WORDS: u64 = 5;

/// The last exit was for a signal: so it is after a SIGSTOP, which ends execution when it comes and is told of only
/// after the SIGCONT.
const INTERRUPTED: u64 = 1;
/// The vCPU stood outside because its deadline had passed.
const AT_DEADLINE: u64 = 2;

/// The file of one monitor.
#[derive(Debug)]
pub struct RunLog {
    words: MmapRegion<()>,
}

/// What one vCPU's thread writes.
#[derive(Debug)]
pub struct VcpuRunLog {
    log: Arc<RunLog>,
    /// Where this vCPU's words begin.
    base: u64,
    begun: Cell<u64>,
    left_ns: Cell<u64>,
    flags: Cell<u64>,
    anew: Cell<bool>,
}

/// The file cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("cannot keep the log of runs {}: {source}", path.display())]
pub struct RunLogError {
    path: PathBuf,
    source: io::Error,
}

impl RunLog {
    /// Makes the file for a monitor that listens on `control`, if a test asks for it.
    ///
    /// # Errors
    /// See [`RunLogError`].
    pub fn asked(control: &Path, vm: VmId, vcpus: u32) -> Result<Option<Arc<RunLog>>, RunLogError> {
        if std::env::var_os(VARIABLE).is_none() {
            return Ok(None);
        }
        let path = control.with_extension(EXTENSION);
        match RunLog::create(&path, vm, vcpus) {
            Ok(log) => Ok(Some(log)),
            Err(source) => Err(RunLogError { path, source }),
        }
    }

    /// Makes the file at `path`, anew where there is one.
    ///
    /// # Errors
    /// When it cannot be made or mapped.
    pub fn create(path: &Path, vm: VmId, vcpus: u32) -> io::Result<Arc<RunLog>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        let file = options.mode(0o600).open(path)?;
        let bytes = (HEADER_WORDS + u64::from(vcpus) * VCPU_WORDS) * 8;
        file.set_len(bytes)?;
        let words = MmapRegion::from_file(FileOffset::new(file, 0), bytes as usize)
            .map_err(io::Error::other)?;
        let log = RunLog { words };
        for (word, value) in [VERSION, vm.0, u64::from(vcpus)].into_iter().enumerate() {
            log.set(1 + word as u64, value);
        }
        log.set(0, MAGIC);
        Ok(Arc::new(log))
    }

    /// The part of vCPU `index`, for its thread.
    pub fn of_vcpu(self: &Arc<Self>, index: u32) -> VcpuRunLog {
        VcpuRunLog {
            log: self.clone(),
            base: base(index),
            begun: Cell::new(0),
            left_ns: Cell::new(0),
            flags: Cell::new(0),
            anew: Cell::new(true),
        }
    }

    fn set(&self, word: u64, value: u64) {
        // Every word lies in the file: it was made for as many vCPUs.
        if let Ok(place) = self.words.get_atomic_ref::<AtomicU64>(word as usize * 8) {
            place.store(value, Ordering::Release);
        }
    }
}

fn base(vcpu: u32) -> u64 {
    HEADER_WORDS + u64::from(vcpu) * VCPU_WORDS
}

impl VcpuRunLog {
    fn set(&self, word: u64, value: u64) {
        let spell = self.begun.get().wrapping_sub(1) % SPELLS;
        self.log
            .set(self.base + 1 + spell * SPELL_WORDS + word, value);
    }

    /// What follows is a spell of its own, however small the gap.
    pub fn begin_anew(&self) {
        self.anew.set(true);
    }

    /// The guest is entered.
    pub fn enter(&self, now_ns: u64, deadline_ns: u64) {
        let gap_ns = now_ns.saturating_sub(self.left_ns.get());
        if self.anew.replace(false) || u128::from(gap_ns) > MERGED.as_nanos() {
            self.begun.set(self.begun.get() + 1);
            self.set(LEFT, 0);
            self.set(FLAGS, 0);
            self.set(BEGAN, now_ns);
            self.set(DEADLINE, deadline_ns);
            self.set(ENTERED, now_ns);
            self.log.set(self.base, self.begun.get());
        } else {
            self.set(DEADLINE, deadline_ns);
            self.set(ENTERED, now_ns);
        }
    }

    /// The guest was left, for a signal or for something that it did itself.
    pub fn leave(&self, now_ns: u64, deadline_ns: u64, interrupted: bool) {
        self.flags.set(if interrupted { INTERRUPTED } else { 0 });
        self.set(DEADLINE, deadline_ns);
        self.set(FLAGS, self.flags.get());
        self.set(LEFT, now_ns);
        self.left_ns.set(now_ns);
    }

    /// The guest is not entered again: its deadline has passed.
    pub fn stand(&self, deadline_ns: u64) {
        if self.begun.get() > 0 && !self.anew.replace(true) {
            self.set(DEADLINE, deadline_ns);
            self.set(FLAGS, self.flags.get() | AT_DEADLINE);
        }
    }
}

/// Execution without a longer gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spell {
    /// Counts the spells of its vCPU, from 0.
    pub number: u64,
    /// When it began.
    pub began_ns: u64,
    /// When the guest was entered last.
    pub entered_ns: u64,
    /// When the guest was left last; before `entered_ns` while it executes.
    pub left_ns: u64,
    /// The deadline when it was left, or entered if it has not been left since, CLOCK_BOOTTIME; `u64::MAX` for a machine that needs no lease.
    pub deadline_ns: u64,
    /// Whether it was left for a signal.
    pub interrupted: bool,
    /// Whether it ended because the deadline had passed.
    pub at_deadline: bool,
}

impl Spell {
    /// Whether the guest was being executed when the file was read, or the monitor killed.
    pub fn is_inside(&self) -> bool {
        self.entered_ns > self.left_ns
    }
}

/// What a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    /// Which machine's.
    pub vm: u64,
    /// For each vCPU the spells that are still there, in their order.
    pub vcpus: Vec<Vec<Spell>>,
}

/// Reads a file, which its monitor may be writing.
///
/// # Errors
/// When it cannot be read or is none.
pub fn read(path: &Path) -> io::Result<Runs> {
    let file = File::open(path)?;
    let header = words(&file, 0, HEADER_WORDS)?;
    let [magic, version, vm, vcpus] = header[..] else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    if (magic, version) != (MAGIC, VERSION) {
        let why = format!("{} is not a log of runs", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    let vcpus = (0..vcpus as u32).map(|vcpu| spells(&file, vcpu));
    Ok(Runs {
        vm,
        vcpus: vcpus.collect::<io::Result<_>>()?,
    })
}

fn spells(file: &File, vcpu: u32) -> io::Result<Vec<Spell>> {
    let base = base(vcpu);
    let count = |file| Ok::<u64, io::Error>(words(file, base, 1)?[0]);
    let begun = count(file)?;
    let ring = words(file, base + 1, begun.min(SPELLS) * SPELL_WORDS)?;
    // What was begun meanwhile lies where the oldest did.
    let first = (count(file)? + 1).saturating_sub(SPELLS).min(begun);
    let spell = |number: u64| {
        let at = (number % SPELLS * SPELL_WORDS) as usize;
        let word = |word: u64| ring[at + word as usize];
        Spell {
            number,
            began_ns: word(BEGAN),
            entered_ns: word(ENTERED),
            left_ns: word(LEFT),
            deadline_ns: word(DEADLINE),
            interrupted: word(FLAGS) & INTERRUPTED != 0,
            at_deadline: word(FLAGS) & AT_DEADLINE != 0,
        }
    };
    let first = if begun > SPELLS { first } else { 0 };
    Ok((first..begun).map(spell).collect())
}

fn words(file: &File, first: u64, count: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; count as usize * 8];
    file.read_exact_at(&mut bytes, first * 8)?;
    Ok(bytes
        .as_chunks()
        .0
        .iter()
        .map(|bytes| u64::from_le_bytes(*bytes))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn what_is_read_is_what_was_written_with_small_gaps_merged() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ctl.runs");
        let log = RunLog::create(&path, VmId(7), 2).unwrap();
        let vcpu = log.of_vcpu(1);
        vcpu.enter(100 * MS, 900);
        let inside = read(&path).unwrap().vcpus[1][0];
        assert!(inside.is_inside());
        vcpu.leave(101 * MS, 900, false);
        vcpu.enter(105 * MS, 900);
        vcpu.leave(106 * MS, 950, true);
        vcpu.enter(117 * MS, 950);
        vcpu.leave(118 * MS, 950, true);
        vcpu.stand(950);
        vcpu.stand(970);
        vcpu.enter(119 * MS, 990);
        let runs = read(&path).unwrap();
        assert_eq!((runs.vm, runs.vcpus.len()), (7, 2));
        assert!(runs.vcpus[0].is_empty());
        let spell = |number, began: u64, entered: u64, left: u64| Spell {
            number,
            began_ns: began * MS,
            entered_ns: entered * MS,
            left_ns: left * MS,
            deadline_ns: if left == 0 { 990 } else { 950 },
            interrupted: number < 2,
            at_deadline: number == 1,
        };
        assert_eq!(
            runs.vcpus[1],
            [
                spell(0, 100, 105, 106),
                spell(1, 117, 117, 118),
                spell(2, 119, 119, 0)
            ]
        );
    }

    #[test]
    fn a_ring_that_is_full_keeps_the_newest() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ctl.runs");
        let log = RunLog::create(&path, VmId(7), 1).unwrap();
        let vcpu = log.of_vcpu(0);
        for number in 0..SPELLS + 5 {
            vcpu.enter((1 + number) * 20 * MS, 0);
            vcpu.leave((1 + number) * 20 * MS + 1, 0, false);
        }
        let runs = read(&path).unwrap();
        let spells = &runs.vcpus[0];
        assert_eq!(spells.last().unwrap().number, SPELLS + 4);
        assert_eq!(spells[0].number, 6);
        assert!(
            spells
                .iter()
                .all(|spell| spell.began_ns == (1 + spell.number) * 20 * MS)
        );
    }

    #[test]
    fn another_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ctl.runs");
        std::fs::write(&path, [0; 64]).unwrap();
        assert!(read(&path).is_err());
    }
}
