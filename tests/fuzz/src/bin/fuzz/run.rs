//! One target for a while: libFuzzer's program started, its figures read off what it says.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;
use fuzz::target::Target;
use serde::Serialize;

use crate::build::{Programs, made_folder};
use crate::corpus;

/// An input may take so long, seconds: all of them together take microseconds.
pub const INPUT_SECONDS_MAX: u32 = 20;

/// The process may hold so much, MiB; each target's own bound is lower and counted exactly.
const PROCESS_MIB_MAX: u32 = 2048;

/// What became of a target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// Its name.
    pub target: String,
    /// Inputs run.
    pub executions: u64,
    /// In a second.
    pub executions_per_s: u64,
    /// Edges reached.
    pub edges: u64,
    /// Edges with how often, and comparisons with how close.
    pub features: u64,
    /// Inputs that each reach something of their own.
    pub corpus: u64,
    /// Inputs that are finds.
    pub crashes: Vec<PathBuf>,
}

/// Fuzzes a target for so many seconds.
pub fn fuzz(target: &Target, programs: &Programs, seconds: u64) -> anyhow::Result<Outcome> {
    corpus::begin(target)?;
    let crashes = made_folder().join("crashes").join(target.name);
    corpus::clear(&crashes)?;
    let kept = corpus::kept(target);
    fs::create_dir_all(&kept)?;
    let output = Command::new(programs.of(target))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={}", target.input_bytes_max))
        .arg(format!("-timeout={INPUT_SECONDS_MAX}"))
        .arg(format!("-rss_limit_mb={PROCESS_MIB_MAX}"))
        .arg(format!("-artifact_prefix={}/", crashes.display()))
        .args(corpus::dictionary(target)?.map(|words| format!("-dict={}", words.display())))
        .arg("-print_final_stats=1")
        .arg(corpus::fresh(target))
        .arg(&kept)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output()
        .with_context(|| format!("starting the program of {}", target.name))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let mut outcome = read(&said);
    outcome.target = target.name.into();
    outcome.crashes = files(&crashes)?;
    if !output.status.success() && outcome.crashes.is_empty() {
        // It could not even begin; what it said is all there is.
        anyhow::bail!("{}: {}\n{said}", target.name, output.status);
    }
    if !outcome.crashes.is_empty() {
        let log = crashes.with_extension("log");
        fs::write(&log, said.as_bytes())?;
        eprintln!("{}: what it said is in {}", target.name, log.display());
    }
    Ok(outcome)
}

fn files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        files.push(entry?.path());
    }
    files.sort();
    Ok(files)
}

/// Reads libFuzzer's status lines (`#82602 DONE cov: 957 ft: 1785 corp: 187/3033b lim: …`) and its last figures.
fn read(said: &str) -> Outcome {
    let status = said
        .lines()
        .rev()
        .find(|line| line.starts_with('#') && line.contains(" cov: "));
    let after = |label: &str| {
        let text = status?.split(label).nth(1)?.trim_start();
        number(text)
    };
    let last = |label: &str| {
        let line = said.lines().find(|line| line.starts_with(label))?;
        number(line.split(':').nth(3)?.trim_start())
    };
    Outcome {
        executions: last("stat::number_of_executed_units")
            .or_else(|| number(status?.trim_start_matches('#')))
            .unwrap_or(0),
        executions_per_s: last("stat::average_exec_per_sec").unwrap_or(0),
        edges: after("cov:").unwrap_or(0),
        features: after("ft:").unwrap_or(0),
        corpus: after("corp:").unwrap_or(0),
        ..Outcome::default()
    }
}

/// The number that a text begins with.
fn number(text: &str) -> Option<u64> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    text[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_those_that_libfuzzer_said_last() {
        let said = "#2\tINITED cov: 10 ft: 11 corp: 1/1b exec/s: 0 rss: 30Mb\n\
            #82222\tREDUCE cov: 957 ft: 1785 corp: 187/3033b lim: 277 exec/s: 8222 rss: 32Mb L: 56/197\n\
            #82602\tDONE   cov: 958 ft: 1786 corp: 188/3033b lim: 277 exec/s: 7509 rss: 32Mb\n\
            Done 82602 runs in 11 second(s)\n\
            stat::number_of_executed_units: 82602\n\
            stat::average_exec_per_sec:     7509\n";
        let outcome = read(said);
        assert_eq!(
            (outcome.executions, outcome.executions_per_s),
            (82_602, 7_509)
        );
        assert_eq!(
            (outcome.edges, outcome.features, outcome.corpus),
            (958, 1_786, 188)
        );
    }

    #[test]
    fn a_program_that_died_has_the_figures_of_its_last_line() {
        let outcome =
            read("#512\tNEW    cov: 12 ft: 13 corp: 4/9b lim: 4 exec/s: 0 rss: 30Mb\npanicked\n");
        assert_eq!(
            (outcome.executions, outcome.edges, outcome.corpus),
            (512, 12, 4)
        );
    }
}
