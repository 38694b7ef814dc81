//! A table on the simulated disk, which loses all that [`super::super::disk::table`] says one may lose.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::super::disk::KEY_GENERATION;
use super::super::disk::table::{DATA, Table};
use super::super::files::Files;
use super::Mutant;
use super::disk::{Seeded, Survivors, Turn};
use super::files::SimFiles;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Entry(u64),
    Small(String),
}

pub(super) type Rows = BTreeMap<Key, Arc<[u8]>>;

/// What the table holds, durable and not.
#[derive(Clone, Default)]
pub(super) struct TableState {
    cached: Rows,
    durable: Rows,
    pending: Vec<(Key, Option<Arc<[u8]>>)>,
    /// What was durable after each flush, if somebody wants to go back.
    pub history: Option<Vec<Rows>>,
}

fn set(rows: &mut Rows, key: &Key, value: &Option<Arc<[u8]>>) {
    match value {
        Some(value) => drop(rows.insert(key.clone(), value.clone())),
        None => drop(rows.remove(key)),
    }
}

impl TableState {
    fn change(&mut self, key: Key, value: Option<Arc<[u8]>>) {
        set(&mut self.cached, &key, &value);
        self.pending.push((key, value));
    }

    fn flush(&mut self) {
        for (key, value) in self.pending.drain(..) {
            set(&mut self.durable, &key, &value);
        }
        if let Some(history) = &mut self.history
            && history.last() != Some(&self.durable)
        {
            history.push(self.durable.clone());
        }
    }

    fn tear(&mut self, rng: &mut Seeded) {
        let survivors = Survivors::draw(rng, self.pending.len());
        for (nth, (key, value)) in self.pending.drain(..).enumerate() {
            if survivors.keeps(nth, rng) {
                set(&mut self.durable, &key, &value);
            }
        }
    }

    pub(super) fn lose_power(&mut self, rng: &mut Seeded) {
        self.tear(rng);
        self.cached = self.durable.clone();
    }

    pub(super) fn forget_cached(&mut self) {
        self.cached = self.durable.clone();
        for (key, value) in &self.pending {
            set(&mut self.cached, key, value);
        }
    }

    /// Goes back to what was durable after an earlier flush.
    pub(super) fn go_back(&mut self, flush: usize) {
        if let Some(rows) = self.history.as_ref().and_then(|history| history.get(flush)) {
            (self.cached, self.durable) = (rows.clone(), rows.clone());
        }
    }
}

/// The table of a store on [`SimFiles`].
pub(super) struct SimTable {
    files: SimFiles,
}

impl SimTable {
    pub(super) fn open(files: SimFiles, dir: &Path) -> io::Result<SimTable> {
        if !files.exists(dir)? {
            files.make_dir(dir)?;
        }
        let data = dir.join(DATA);
        if !files.exists(&data)? {
            let mut disk = files.lock();
            let history = disk.table.history.take();
            disk.table = TableState {
                history,
                ..TableState::default()
            };
            drop(disk);
            files.create(&data)?;
        }
        Ok(SimTable { files })
    }

    /// Makes changes as one operation; one that stops half way has made some of them.
    fn change(&self, changes: Vec<(Key, Option<Arc<[u8]>>)>) -> io::Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let mut disk = self.files.lock();
        let turn = disk.turn()?;
        let (count, result) = match turn {
            Turn::Go => (changes.len(), Ok(())),
            Turn::Stop(error) => {
                let count = disk.rng.below(changes.len() as u64 + 1) as usize;
                (count, Err(error))
            }
        };
        for (key, value) in changes.into_iter().take(count) {
            disk.table.change(key, value);
        }
        result
    }
}

impl Table for SimTable {
    fn small(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let disk = self.files.lock();
        let value = disk.table.cached.get(&Key::Small(name.to_owned()));
        Ok(value.map(|value| value.to_vec()))
    }

    fn smalls(&self) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let disk = self.files.lock();
        let small = disk
            .table
            .cached
            .iter()
            .filter_map(|(key, value)| match key {
                Key::Small(name) => Some((name.clone().into_bytes(), value.to_vec())),
                Key::Entry(_) => None,
            });
        Ok(small.collect())
    }

    fn set_small(&mut self, name: &str, value: Vec<u8>) -> io::Result<()> {
        self.change(vec![(Key::Small(name.to_owned()), Some(value.into()))])
    }

    fn entries(&self, range: Range<u64>) -> io::Result<Vec<(u64, Vec<u8>)>> {
        let disk = self.files.lock();
        let rows = disk.table.cached.range(Key::Entry(range.start)..);
        let entries = rows.map_while(|(key, value)| match key {
            Key::Entry(index) if *index < range.end => Some((*index, value.to_vec())),
            _ => None,
        });
        Ok(entries.collect())
    }

    fn put(&mut self, entries: BTreeMap<u64, Vec<u8>>) -> io::Result<()> {
        let changes = entries
            .into_iter()
            .map(|(index, value)| (Key::Entry(index), Some(value.into())));
        self.change(changes.collect())
    }

    fn remove(&mut self, range: Range<u64>) -> io::Result<()> {
        let entries = self.entries(range)?;
        let changes = entries
            .into_iter()
            .map(|(index, _)| (Key::Entry(index), None));
        self.change(changes.collect())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut disk = self.files.lock();
        let disk = &mut *disk;
        let speaks = Key::Small(KEY_GENERATION.to_owned());
        match disk.turn()? {
            Turn::Go if disk.is(Mutant::NoTableSync) => {}
            Turn::Go
                if disk.is(Mutant::OneFlush)
                    && disk.table.pending.iter().all(|(key, _)| *key != speaks) => {}
            Turn::Go => disk.table.flush(),
            Turn::Stop(error) if disk.failed => {
                disk.table.tear(&mut disk.rng);
                if !disk.is(Mutant::SyncErrorsIgnored) {
                    return Err(error);
                }
            }
            Turn::Stop(error) => return Err(error),
        }
        Ok(())
    }
}
