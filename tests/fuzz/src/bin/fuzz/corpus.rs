//! The repository's corpus: what a run begins with, and what of its finds is kept.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use fuzz::target::Target;

use xxhash_rust::xxh3::xxh3_64;

use crate::build::{Programs, crate_folder, made_folder};
use crate::select;

/// Files of this beginning found something once; they are kept whatever they reach.
const FOUND: &str = "found-";

/// The longest word of a dictionary; libFuzzer takes 64 bytes.
const WORD_BYTES_MAX: usize = 32;

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

/// Writes the words of the target's seeds as a dictionary, if there are any; JSON's keys are not found byte by byte.
pub fn dictionary(target: &Target) -> anyhow::Result<Option<PathBuf>> {
    let mut words = BTreeSet::new();
    for seed in (target.seeds)() {
        let text = String::from_utf8_lossy(&seed);
        let quoted = text.split('"').skip(1).step_by(2);
        words.extend(quoted.filter(|word| is_plain(word)).map(str::to_owned));
    }
    let lines: String = words
        .iter()
        .map(|word| format!("\"\\x22{word}\\x22\"\n"))
        .collect();
    if words.is_empty() {
        return Ok(None);
    }
    let folder = made_folder().join("words");
    fs::create_dir_all(&folder)?;
    let path = folder.join(target.name);
    fs::write(&path, lines)?;
    Ok(Some(path))
}

fn is_plain(word: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=WORD_BYTES_MAX).contains(&word.len()) && word.bytes().all(plain)
}

/// Puts a small set that reaches nearly all that was reached in the place of the kept one.
pub fn merge(target: &Target, programs: &Programs) -> anyhow::Result<()> {
    let (kept, fresh) = (kept(target), fresh(target));
    let merged = made_folder().join("merged").join(target.name);
    clear(&merged)?;
    let control = merged.with_extension("control");
    if control.exists() {
        fs::remove_file(&control)?;
    }
    let status = Command::new(programs.of(target))
        // With "set cover" all that an input reaches is written down; edges only, since how often one was
        // taken is found again within seconds.
        .args(["-set_cover_merge=1", "-use_counters=0"])
        .arg(format!("-merge_control_file={}", control.display()))
        .arg(format!("-max_len={}", target.input_bytes_max))
        .args([&merged, &kept, &fresh])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .context("starting the merge")?;
    ensure!(status.success(), "{}: the merge failed", target.name);
    let chosen = select::choose(&fs::read_to_string(&control)?);
    let chosen = chosen
        .iter()
        .map(fs::read)
        .collect::<Result<Vec<_>, _>>()
        .context("reading what is kept")?;
    for entry in fs::read_dir(&kept)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(FOUND) {
            fs::remove_file(entry.path())?;
        }
    }
    for content in chosen {
        fs::write(kept.join(format!("{:016x}", xxh3_64(&content))), content)?;
    }
    Ok(())
}
