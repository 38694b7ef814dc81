//! The repository's corpus: what a run begins with, and what of its finds is kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use fuzz::target::Target;

use crate::build::{Programs, crate_folder, made_folder};

/// Files of this beginning found something once; they are kept whatever they reach.
const FOUND: &str = "found-";

/// The inputs that are kept.
pub fn kept(target: &Target) -> PathBuf {
    crate_folder().join("corpus").join(target.name)
}

/// Where a run puts what it finds.
pub fn fresh(target: &Target) -> PathBuf {
    made_folder().join("corpus").join(target.name)
}

/// Makes an empty folder.
pub fn clear(folder: &Path) -> anyhow::Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("clearing {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))
}

/// Begins a run: an empty folder with the target's seeds.
pub fn begin(target: &Target) -> anyhow::Result<()> {
    let folder = fresh(target);
    clear(&folder)?;
    for (number, seed) in (target.seeds)().iter().enumerate() {
        fs::write(folder.join(format!("seed-{number:02}")), seed)?;
    }
    Ok(())
}

/// Puts the smallest set that reaches all that was reached in the place of the kept one.
pub fn merge(target: &Target, programs: &Programs) -> anyhow::Result<()> {
    let (kept, fresh) = (kept(target), fresh(target));
    let merged = made_folder().join("merged").join(target.name);
    clear(&merged)?;
    fs::create_dir_all(&kept)?;
    let status = Command::new(programs.of(target))
        // Edges only, and few files: how often an edge was taken is found again within seconds.
        .args(["-set_cover_merge=1", "-use_counters=0"])
        .arg(format!("-max_len={}", target.input_bytes_max))
        .args([&merged, &kept, &fresh])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .context("starting the merge")?;
    ensure!(status.success(), "{}: the merge failed", target.name);
    for entry in fs::read_dir(&kept)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(FOUND) {
            fs::remove_file(entry.path())?;
        }
    }
    for entry in fs::read_dir(&merged)? {
        let entry = entry?;
        fs::copy(entry.path(), kept.join(entry.file_name()))?;
    }
    Ok(())
}
