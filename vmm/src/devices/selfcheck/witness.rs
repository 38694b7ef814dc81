//! The witness file: what the guest was promised to be durable, written down where no node's death can take it.
//!
//! One line an event, appended, by whichever monitor runs the guest:
//!
//! ```text
//! found 96 life 3        a guest booted, was told nothing, and found its disk whole up to block 96
//! flushed 100 life 3     a flush completed: block 100 and all before it must be found by every later boot
//! ```
//!
//! A boot that finds less than the last number flushed before it is a loss.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::guest::abi::{FLAG_SCANNED, Report};

/// The file's writer.
#[derive(Debug)]
pub struct Witness {
    path: PathBuf,
    file: File,
}

/// The witness cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot append to the witness file {path}: {source}")]
pub struct WitnessError {
    path: PathBuf,
    source: io::Error,
}

impl Witness {
    /// Opens the file at `path`, makes it where there is none.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: PathBuf) -> Result<Self, WitnessError> {
        match OpenOptions::new().append(true).create(true).open(&path) {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(WitnessError { path, source }),
        }
    }

    /// Appends what `report` says beyond `before`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn note(&mut self, before: Option<&Report>, report: &Report) -> Result<(), WitnessError> {
        let mut lines = String::new();
        let known = before.filter(|before| before.life == report.life);
        let scanned = |report: &Report| report.flags & FLAG_SCANNED != 0;
        if scanned(report) && !known.is_some_and(scanned) {
            lines += &format!("found {} life {}\n", report.found_at_boot, report.life);
        }
        if report.flushed > known.map_or(0, |before| before.flushed) {
            lines += &format!("flushed {} life {}\n", report.flushed, report.life);
        }
        if lines.is_empty() {
            return Ok(());
        }
        // One write a call: lines of two monitors never mix.
        self.file
            .write_all(lines.as_bytes())
            .map_err(|source| WitnessError {
                path: self.path.clone(),
                source,
            })
    }
}

/// One line of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WitnessEvent {
    /// A boot found its disk whole up to `number`.
    Found {
        /// The block's number.
        number: u64,
        /// Counts the boots from this disk.
        life: u64,
    },
    /// A flush that covers `number` completed.
    Flushed {
        /// The block's number.
        number: u64,
        /// Counts the boots from this disk.
        life: u64,
    },
}

/// A boot that found less than had been flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a guest found its disk whole up to block {found}, but block {flushed} had been flushed before"
)]
pub struct Loss {
    /// What it found.
    pub found: u64,
    /// What had been promised.
    pub flushed: u64,
}

/// Reads a witness file.
///
/// # Errors
/// When it cannot be read, or a line is none of a witness's.
pub fn read(path: &Path) -> io::Result<Vec<WitnessEvent>> {
    let text = std::fs::read_to_string(path)?;
    text.lines()
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let event = match words[..] {
                [kind, number, "life", life] => match (kind, number.parse(), life.parse()) {
                    ("found", Ok(number), Ok(life)) => Some(WitnessEvent::Found { number, life }),
                    ("flushed", Ok(number), Ok(life)) => {
                        Some(WitnessEvent::Flushed { number, life })
                    }
                    _ => None,
                },
                _ => None,
            };
            event.ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("not a witness's line: {line:?}"),
                )
            })
        })
        .collect()
}

/// Every loss that the events show.
pub fn losses(events: &[WitnessEvent]) -> Vec<Loss> {
    let mut promised = 0;
    let mut losses = Vec::new();
    for event in events {
        match *event {
            WitnessEvent::Flushed { number, .. } => promised = promised.max(number),
            WitnessEvent::Found { number: found, .. } if found < promised => {
                losses.push(Loss {
                    found,
                    flushed: promised,
                });
                // What is gone is gone: later boots are judged by what came after it.
                promised = found;
            }
            WitnessEvent::Found { .. } => {}
        }
    }
    losses
}
