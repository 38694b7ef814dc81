//! A disk in memory that loses what a real one may lose.
//!
//! ```text
//!              write            sync                    power fails
//!  process ──────────► cached ────────► durable    cached: any of it stays, by sectors
//!              rename           sync_dir                names: any of the changes stays
//! ```
//! Every write, sync and change of a name is an operation with a number; a [`Plan`] says at which one power
//! fails or the disk answers with an error. A sync that fails drops what it could not write and the cache
//! still shows it, as Linux does.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::Mutant;
use super::table::TableState;

/// Small random numbers from a seed.
#[derive(Clone, Debug)]
pub(super) struct Seeded(pub u64);

impl Seeded {
    pub(super) fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number under `end`, which is not 0.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// True once in `n`.
    pub(super) fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Which of the changes that were not synced are there after a loss of power.
pub(super) enum Survivors {
    All,
    None,
    /// The first so many; of the last of these, the first part.
    Prefix(usize),
    /// Each sector by itself.
    Any,
}

impl Survivors {
    pub(super) fn draw(rng: &mut Seeded, changes: usize) -> Survivors {
        match rng.below(5) {
            0 => Survivors::All,
            1 => Survivors::None,
            2 | 3 => Survivors::Prefix(rng.below(changes as u64 + 1) as usize),
            _ => Survivors::Any,
        }
    }

    /// Whether a change that cannot be torn is there.
    pub(super) fn keeps(&self, nth: usize, rng: &mut Seeded) -> bool {
        match self {
            Survivors::All => true,
            Survivors::None => false,
            Survivors::Prefix(count) => nth < *count,
            Survivors::Any => rng.once_in(2),
        }
    }
}

/// When something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    Nothing,
    /// The process or the machine stops in this operation.
    Crash(u64),
    /// This operation fails, and those after it do not.
    Fail(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Dir,
    File(usize),
}

#[derive(Clone)]
enum NameChange {
    Link { path: PathBuf, node: Node },
    Unlink { path: PathBuf },
    Rename { from: PathBuf, to: PathBuf },
}

impl NameChange {
    fn dir(&self) -> &Path {
        let (NameChange::Link { path, .. }
        | NameChange::Unlink { path }
        | NameChange::Rename { to: path, .. }) = self;
        path.parent().unwrap_or(path)
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, Node>) {
        match self {
            NameChange::Link { path, node } => drop(names.insert(path.clone(), *node)),
            NameChange::Unlink { path } => drop(names.remove(path)),
            NameChange::Rename { from, to } => {
                if let Some(node) = names.remove(from) {
                    names.insert(to.clone(), node);
                }
            }
        }
    }
}

#[derive(Clone)]
enum Write {
    At { offset: usize, content: Vec<u8> },
    Empty,
}

impl Write {
    /// Writes those sectors that `keeps` says.
    fn apply(&self, target: &mut Vec<u8>, sector: usize, mut keeps: impl FnMut(usize) -> bool) {
        match self {
            Write::Empty => {
                if keeps(0) {
                    target.clear();
                }
            }
            Write::At { offset, content } => {
                for (nth, part) in content.chunks(sector).enumerate() {
                    if keeps(nth) {
                        let (start, end) =
                            (offset + nth * sector, offset + nth * sector + part.len());
                        if target.len() < end {
                            target.resize(end, 0);
                        }
                        target[start..end].copy_from_slice(part);
                    }
                }
            }
        }
    }
}

/// A file: what the process sees, what the disk has, and what is on its way.
#[derive(Clone, Default)]
struct Content {
    cached: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Write>,
}

impl Content {
    fn write(&mut self, write: Write, sector: usize) {
        write.apply(&mut self.cached, sector, |_| true);
        self.pending.push(write);
    }

    fn sync(&mut self, sector: usize) {
        for write in self.pending.drain(..) {
            write.apply(&mut self.durable, sector, |_| true);
        }
    }

    /// What is pending gets to the disk in part.
    fn tear(&mut self, sector: usize, rng: &mut Seeded) {
        let survivors = Survivors::draw(rng, self.pending.len());
        let pending = std::mem::take(&mut self.pending);
        for (nth, write) in pending.iter().enumerate() {
            match survivors {
                Survivors::All => write.apply(&mut self.durable, sector, |_| true),
                Survivors::None => {}
                Survivors::Prefix(count) if nth + 1 < count => {
                    write.apply(&mut self.durable, sector, |_| true);
                }
                Survivors::Prefix(count) => {
                    let cut = rng.below(12) as usize;
                    write.apply(&mut self.durable, sector, |at| nth < count && at < cut);
                }
                Survivors::Any => write.apply(&mut self.durable, sector, |_| rng.once_in(2)),
            }
        }
    }
}

/// The disk; a clone is another disk in the same condition.
#[derive(Clone)]
pub(super) struct Disk {
    contents: Vec<Content>,
    names: BTreeMap<PathBuf, Node>,
    names_durable: BTreeMap<PathBuf, Node>,
    names_pending: Vec<NameChange>,
    pub table: TableState,
    sector: usize,
    pub rng: Seeded,
    /// Operations since the last start.
    pub operations: u64,
    pub plan: Plan,
    /// Nothing works until the next start.
    pub down: bool,
    /// An operation has failed since the last start.
    pub failed: bool,
    pub mutant: Option<Mutant>,
}

pub(super) enum Turn {
    Go,
    /// Stop half way.
    Stop(io::Error),
}

impl Disk {
    /// An empty disk with one directory.
    pub(super) fn new(base: &Path, seed: u64, mutant: Option<Mutant>) -> Disk {
        let names = BTreeMap::from([(base.to_owned(), Node::Dir)]);
        Disk {
            contents: Vec::new(),
            names_durable: names.clone(),
            names,
            names_pending: Vec::new(),
            table: TableState::default(),
            sector: if seed.is_multiple_of(2) { 512 } else { 4096 },
            rng: Seeded(seed),
            operations: 0,
            plan: Plan::Nothing,
            down: false,
            failed: false,
            mutant,
        }
    }

    pub(super) fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    fn started(mut self, seed: u64) -> Disk {
        self.rng = Seeded(seed);
        self.operations = 0;
        self.plan = Plan::Nothing;
        self.down = false;
        self.failed = false;
        self
    }

    /// The disk after the process alone was killed: the cache is as it was.
    pub(super) fn after_kill(&self, seed: u64) -> Disk {
        self.clone().started(seed)
    }

    /// The disk after power failed.
    pub(super) fn after_power_loss(&self, seed: u64) -> Disk {
        let mut disk = self.clone().started(seed);
        let rng = &mut disk.rng;
        let survivors = Survivors::draw(rng, disk.names_pending.len());
        for (nth, change) in disk.names_pending.drain(..).enumerate() {
            if survivors.keeps(nth, rng) {
                change.apply(&mut disk.names_durable);
            }
        }
        // What is in a directory that is not there is not there.
        let durable = disk.names_durable.clone();
        disk.names_durable.retain(|path, _| {
            path.ancestors()
                .nth(1)
                .is_none_or(|dir| durable.contains_key(dir) || dir == Path::new("/"))
        });
        disk.names = disk.names_durable.clone();
        for content in &mut disk.contents {
            content.tear(disk.sector, rng);
            content.cached.clone_from(&content.durable);
        }
        disk.table.lose_power(rng);
        disk
    }

    /// Counts an operation; the plan's happens here.
    pub(super) fn turn(&mut self) -> io::Result<Turn> {
        if self.down {
            return Err(io::Error::other("the power is off"));
        }
        let now = self.operations;
        self.operations += 1;
        if self.plan == Plan::Crash(now) {
            self.down = true;
            return Ok(Turn::Stop(io::Error::other("the power fails")));
        }
        if self.plan == Plan::Fail(now) {
            self.failed = true;
            let errno = match self.rng.below(2) {
                0 => libc::EIO,
                _ => libc::ENOSPC,
            };
            return Ok(Turn::Stop(io::Error::from_raw_os_error(errno)));
        }
        Ok(Turn::Go)
    }

    fn change_name(&mut self, change: NameChange) -> io::Result<()> {
        match self.turn()? {
            Turn::Go => {}
            Turn::Stop(error) => {
                if self.down && self.rng.once_in(2) {
                    change.apply(&mut self.names);
                    self.names_pending.push(change);
                }
                return Err(error);
            }
        }
        change.apply(&mut self.names);
        self.names_pending.push(change);
        Ok(())
    }

    pub(super) fn file(&self, path: &Path) -> io::Result<usize> {
        match self.names.get(path) {
            _ if self.down => Err(io::Error::other("the power is off")),
            Some(Node::File(file)) => Ok(*file),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    pub(super) fn exists(&self, path: &Path) -> bool {
        self.names.contains_key(path)
    }

    pub(super) fn list(&self, dir: &Path) -> Vec<PathBuf> {
        let inside = self.names.keys().filter(|path| path.parent() == Some(dir));
        inside.cloned().collect()
    }

    pub(super) fn create(&mut self, path: &Path) -> io::Result<usize> {
        if let Ok(file) = self.file(path) {
            return match self.turn()? {
                Turn::Go => {
                    self.contents[file].write(Write::Empty, self.sector);
                    Ok(file)
                }
                Turn::Stop(error) => Err(error),
            };
        }
        let file = self.contents.len();
        self.contents.push(Content::default());
        self.change_name(NameChange::Link {
            path: path.to_owned(),
            node: Node::File(file),
        })?;
        Ok(file)
    }

    pub(super) fn make_dir(&mut self, path: &Path) -> io::Result<()> {
        self.change_name(NameChange::Link {
            path: path.to_owned(),
            node: Node::Dir,
        })
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        self.change_name(NameChange::Rename {
            from: from.to_owned(),
            to: to.to_owned(),
        })
    }

    pub(super) fn remove(&mut self, path: &Path) -> io::Result<()> {
        self.change_name(NameChange::Unlink {
            path: path.to_owned(),
        })
    }

    pub(super) fn sync_dir(&mut self, dir: &Path) -> io::Result<()> {
        match self.turn()? {
            Turn::Go if self.is(Mutant::NoDirectorySync) => {}
            Turn::Go => {
                for change in self
                    .names_pending
                    .extract_if(.., |change| change.dir() == dir)
                {
                    change.apply(&mut self.names_durable);
                }
            }
            Turn::Stop(error) => return Err(error),
        }
        Ok(())
    }

    pub(super) fn cached(&self, file: usize) -> &[u8] {
        &self.contents[file].cached
    }

    pub(super) fn write(&mut self, file: usize, offset: usize, bytes: &[u8]) -> io::Result<()> {
        let turn = self.turn()?;
        let (kept, result) = match turn {
            Turn::Go => (bytes.len(), Ok(())),
            Turn::Stop(error) => {
                let sectors = bytes.len().div_ceil(self.sector) as u64;
                let cut = self.rng.below(sectors + 1) as usize * self.sector;
                (cut.min(bytes.len()), Err(error))
            }
        };
        if kept > 0 {
            let content = bytes[..kept].to_vec();
            self.contents[file].write(Write::At { offset, content }, self.sector);
        }
        result
    }

    pub(super) fn sync(&mut self, file: usize) -> io::Result<()> {
        let sector = self.sector;
        match self.turn()? {
            Turn::Go => self.contents[file].sync(sector),
            Turn::Stop(error) if self.failed => {
                self.contents[file].tear(sector, &mut self.rng);
                if !self.is(Mutant::SyncErrorsIgnored) {
                    return Err(error);
                }
            }
            Turn::Stop(error) => return Err(error),
        }
        Ok(())
    }

    pub(super) fn forget_cached(&mut self, file: usize) {
        if self.is(Mutant::CacheTrusted) {
            return;
        }
        let content = &mut self.contents[file];
        content.cached.clone_from(&content.durable);
        for write in &content.pending {
            write.apply(&mut content.cached, self.sector, |_| true);
        }
    }

    /// Damages a file's durable content, as a disk that rots does.
    pub(super) fn rot(&mut self, path: &Path, damage: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        let file = self.file(path)?;
        let content = &mut self.contents[file];
        damage(&mut content.cached);
        content.durable.clone_from(&content.cached);
        Ok(())
    }

    /// Takes a name away, as somebody with a shell does.
    pub(super) fn lose(&mut self, path: &Path) {
        self.names.remove(path);
        self.names_durable.remove(path);
    }
}
