//! What no process of the cluster may say in its log: that it panicked, or that a guest found something wrong. A guest's
//! own count of errors begins anew with each boot; its monitor's log stays.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// What is looked for, and who says it.
const FORBIDDEN: [&str; 4] = [
    // Every Rust program here.
    "panicked at",
    // A monitor, of its guest's first failed check in this boot.
    "a check of the guest failed",
    "the guest's report record does not match its checksum",
    "the witness cannot be kept",
];

/// Logs lie at most so deep in the cluster's folder: `n1/vms/vm-1-t5/log`.
const DEPTH_MAX: usize = 4;

/// How far each log has been read.
#[derive(Debug, Default)]
pub struct Logs {
    read: BTreeMap<PathBuf, u64>,
}

impl Logs {
    /// Reads on in every log below `folder`.
    ///
    /// # Errors
    /// With the first line that says what none may say.
    pub fn look(&mut self, folder: &Path) -> anyhow::Result<()> {
        let mut logs = Vec::new();
        find(folder, DEPTH_MAX, &mut logs)?;
        for path in logs {
            let known = self.read.entry(path.clone()).or_default();
            read_on(&path, known).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}

fn find(folder: &Path, depth: usize, logs: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        // The folder of an ended monitor, removed meanwhile.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| folder.display().to_string()),
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        if kind.is_dir() && depth > 1 {
            find(&path, depth - 1, logs)?;
        }
        let name = path.file_name().unwrap_or_default();
        if kind.is_file() && (name == "log" || path.extension().is_some_and(|end| end == "log")) {
            logs.push(path);
        }
    }
    Ok(())
}

/// Reads whole lines from `known` on, and moves it.
fn read_on(path: &Path, known: &mut u64) -> anyhow::Result<()> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let length = file.metadata()?.len();
    let mut bytes = vec![0; length.saturating_sub(*known) as usize];
    file.read_exact_at(&mut bytes, *known)?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n');
    let whole = &bytes[..whole.map_or(0, |at| at + 1)];
    *known += whole.len() as u64;
    let text = String::from_utf8_lossy(whole);
    let said = |line: &&str| FORBIDDEN.iter().any(|forbidden| line.contains(forbidden));
    match text.lines().find(said) {
        Some(line) => bail!("a process says: {line}"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn an_error_of_a_guest_is_found_though_it_was_rebooted_since_and_a_panic_wherever_it_was() {
        for said in FORBIDDEN {
            let folder = tempfile::tempdir().unwrap();
            let monitor = folder.path().join("n1/vms/vm-1-t5");
            std::fs::create_dir_all(&monitor).unwrap();
            let mut log = File::create(monitor.join("log")).unwrap();
            writeln!(log, "INFO ready").unwrap();
            let mut logs = Logs::default();
            logs.look(folder.path()).unwrap();
            // A line that is being written is read when it is whole.
            write!(log, "ERROR {said}").unwrap();
            logs.look(folder.path()).unwrap();
            writeln!(log, ": page 7\nINFO booted again").unwrap();
            let found = logs.look(folder.path()).unwrap_err();
            assert!(format!("{found:#}").contains(said), "{found:#}");
        }
    }

    #[test]
    fn brokers_daemons_and_storage_servers_are_looked_at_and_disks_are_not() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["n1/broker.log", "n2/clusterd.log", "nfs/nfs.log"] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "thread 'main' panicked at src/main.rs:1:1:\n").unwrap();
            assert!(Logs::default().look(folder.path()).is_err(), "{name}");
            std::fs::remove_file(&path).unwrap();
        }
        std::fs::write(folder.path().join("nfs/vm-a.raw"), "panicked at\n").unwrap();
        Logs::default().look(folder.path()).unwrap();
    }
}
