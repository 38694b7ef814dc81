//! The long tier: what takes too long for every landing, each suite alone, and the record of when each last passed.
//!
//! A landing runs a sample of most of these; here they run in full. The record is a table in docs/long-runs.md, one
//! line for each suite, written when it has passed. A landing prints how many commits old each line is.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail, ensure};
use clap::Args;

use crate::{build, git};

/// The record, in the repository.
const RECORD: &str = "docs/long-runs.md";
/// The table in it stands between these.
const MARKS: [&str; 2] = ["<!-- runs -->", "<!-- /runs -->"];
/// A suite that takes longer is parted: who waits for one does not wait longer.
const PATIENCE: Duration = Duration::from_secs(3_600);
/// A table's cell holds so much, characters.
const FIGURES_MAX: usize = 400;

/// Flags of `cargo xtask long`.
#[derive(Args)]
pub struct LongArgs {
    /// Which suite; without a name all are listed with the age of their last run.
    name: Option<String>,
}

/// Something that takes long.
struct Suite {
    name: &'static str,
    /// What it tries.
    tries: &'static str,
    /// Chores of this program, one after the other, as they are typed.
    chores: &'static [&'static str],
    /// Its figures are the last line with this in it, of each chore.
    figures: &'static str,
}

/// All of them. The numbers are such that each takes less than an hour on two cores that do nothing else.
const SUITES: &[Suite] = &[
    Suite {
        name: "tests",
        tries: "every suite in full: 2,000 histories beside openraft, 20 migrations of one TCP connection",
        chores: &["test --all"],
        figures: " tests run: ",
    },
    Suite {
        name: "seeds-1",
        tries: "the simulation, the first quarter of 100,000 seeds",
        chores: &["sim --first 1 --seeds 25000"],
        figures: " seeds in ",
    },
    Suite {
        name: "seeds-2",
        tries: "the second quarter",
        chores: &["sim --first 25001 --seeds 25000"],
        figures: " seeds in ",
    },
    Suite {
        name: "seeds-3",
        tries: "the third quarter",
        chores: &["sim --first 50001 --seeds 25000"],
        figures: " seeds in ",
    },
    Suite {
        name: "seeds-4",
        tries: "the last quarter",
        chores: &["sim --first 75001 --seeds 25000"],
        figures: " seeds in ",
    },
    Suite {
        name: "mutants",
        tries: "every fault put in on purpose, in the simulation and in the model, is caught",
        chores: &["sim --mutants", "model --mutants"],
        figures: " mutants caught",
    },
    Suite {
        name: "model",
        tries: "the protocol within larger bounds",
        chores: &["model --deep"],
        figures: " bounds hold: ",
    },
    Suite {
        name: "crash",
        tries: "power lost at 100,000 operations of the disk under the Raft log",
        chores: &["crash --points 100000"],
        figures: " crash points in ",
    },
    Suite {
        name: "fuzzing",
        tries: "libFuzzer with coverage, a minute for each target",
        chores: &["fuzz --seconds 60"],
        figures: " executions, ",
    },
    Suite {
        name: "chaos",
        tries: "faults on five real nodes on nfs-ganesha",
        chores: &["chaos --minutes 30 --nodes 5 --server ganesha"],
        figures: " s of chaos, ",
    },
    Suite {
        name: "chaos-embedded",
        tries: "faults on three real nodes on the embedded server",
        chores: &["chaos --minutes 30"],
        figures: " s of chaos, ",
    },
    Suite {
        name: "soak",
        tries: "migrations and failovers again and again",
        chores: &["soak --migrations 200 --failovers 20"],
        figures: "migrations",
    },
    Suite {
        name: "guest",
        tries: "the Linux guest's kernel is built from its recipe",
        chores: &["guest linux --again"],
        figures: "vmlinux",
    },
    Suite {
        name: "bench-migrate",
        tries: "throughput and blackout of live migrations",
        chores: &["bench migrate"],
        figures: "blackout",
    },
    Suite {
        name: "bench-raft",
        tries: "what a commit costs over both ways to sync a file",
        chores: &["bench raft"],
        figures: "16 clients",
    },
    Suite {
        name: "bench-failover",
        tries: "from the kill of a node to its machines running elsewhere",
        chores: &["bench failover"],
        figures: "_p50_ms",
    },
    Suite {
        name: "bench-network",
        tries: "what a TCP peer of a Linux guest sees of a migration",
        chores: &["bench network"],
        figures: "_ms ",
    },
    Suite {
        name: "bench-flood",
        tries: "what strangers' connections cost commits and heartbeats",
        chores: &["bench flood"],
        figures: " × ",
    },
    Suite {
        name: "bench-tls",
        tries: "what TLS costs the memory stream",
        chores: &["bench tls"],
        figures: " × ",
    },
    Suite {
        name: "bench-nfs-tls",
        tries: "what TLS costs the NFS data path",
        chores: &["bench nfs-tls"],
        figures: " × ",
    },
];

/// One line of the record.
#[derive(Clone, Debug, PartialEq)]
struct Passed {
    commit: String,
    date: String,
    command: String,
    took: String,
    figures: String,
}

/// Runs a suite and records it, or lists all.
pub fn run(args: &LongArgs) -> anyhow::Result<()> {
    let Some(name) = &args.name else {
        for suite in SUITES {
            println!("{:<16} {}", suite.name, suite.tries);
        }
        println!("{}", ages()?);
        return Ok(());
    };
    let Some(suite) = SUITES.iter().find(|suite| suite.name == name) else {
        let all: Vec<&str> = SUITES.iter().map(|suite| suite.name).collect();
        bail!("there is no suite {name}; there are {}", all.join(", "));
    };
    // What is tried is what was checked out at the beginning.
    let commit = git::head_in_records().context("git does not say which commit this is")?;
    let begun = Instant::now();
    let mut figures = Vec::new();
    for chore in suite.chores {
        figures.extend(suite.run(chore, PATIENCE.saturating_sub(begun.elapsed()))?);
    }
    ensure!(
        !figures.is_empty(),
        "{name} passed and said nothing of `{}`: what is to be recorded?",
        suite.figures
    );
    let passed = Passed {
        commit,
        date: date(SystemTime::now()),
        command: suite.command(),
        took: format!("{} min", begun.elapsed().as_secs().div_ceil(60)),
        figures: cell(&figures.join("; ")),
    };
    let path = build::root().join(RECORD);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {RECORD}"))?;
    fs::write(&path, with(&text, suite.name, &passed)?)?;
    println!("recorded in {RECORD}: {}", passed.figures);
    Ok(())
}

/// How many commits ago each suite last passed, as the record says.
pub fn ages() -> anyhow::Result<String> {
    let text = fs::read_to_string(build::root().join(RECORD))
        .with_context(|| format!("cannot read {RECORD}"))?;
    let record = read(&text)?;
    let mut out = format!("\nlong runs ({RECORD}), commits since:\n");
    for suite in SUITES {
        let age = match record.get(suite.name) {
            None => "never".into(),
            Some(passed) => match git::commits_since(&passed.commit) {
                Some(count) => format!("{count:<6} {}", passed.date),
                None => format!("? ({} is not in this history)", passed.commit),
            },
        };
        out += &format!("  {:<16} {age}\n", suite.name);
    }
    Ok(out.trim_end().to_owned())
}

impl Suite {
    fn command(&self) -> String {
        format!(".ci/long {}", self.name)
    }

    /// Runs one of its chores, shows and keeps what it says; gives its figures.
    fn run(&self, chore: &str, patience: Duration) -> anyhow::Result<Vec<String>> {
        eprintln!("== {}: cargo xtask {chore}", self.name);
        // Both streams into one pipe: some say their figures here, some there.
        let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
        let mut command = Command::new("timeout");
        command
            .arg(patience.as_secs().max(1).to_string())
            .arg(std::env::current_exe()?)
            .args(chore.split(' '))
            .current_dir(build::root())
            .env("BATON_TIER", "long")
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer);
        let mut child = command.spawn().context("cannot run timeout(1)")?;
        drop(command);
        let mut figures = Vec::new();
        let mut out = std::io::stdout().lock();
        for line in BufReader::new(reader).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            writeln!(out, "{line}")?;
            if line.contains(self.figures) {
                figures.push(line.split_whitespace().collect::<Vec<_>>().join(" "));
            }
        }
        let status = child.wait()?;
        match status.code() {
            Some(0) => {}
            Some(124) => bail!(
                "{} takes more than an hour: part it, as `SUITES` in xtask/src/long.rs says",
                self.name
            ),
            _ => bail!("{} failed: {status}", self.name),
        }
        // A bench's figures are all its lines; of others the last one sums up.
        if !self.name.starts_with("bench-") {
            figures.drain(..figures.len().saturating_sub(1));
        }
        Ok(figures)
    }
}

/// Fit for a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "/").chars().take(FIGURES_MAX).collect()
}

/// The record's table: what stands before it, its lines, and what stands after it.
fn parts(text: &str) -> anyhow::Result<[&str; 3]> {
    let [begin, end] = MARKS;
    let parts = text.split_once(begin).and_then(|(before, rest)| {
        let (table, after) = rest.split_once(end)?;
        Some([before, table, after])
    });
    parts.with_context(|| format!("{RECORD} has no table between {begin} and {end}"))
}

fn read(text: &str) -> anyhow::Result<BTreeMap<String, Passed>> {
    let [_, table, _] = parts(text)?;
    let mut record = BTreeMap::new();
    for line in table.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [suite, commit, date, command, took, figures] = cells[..] else {
            bail!("{RECORD}: `{line}` does not have six cells");
        };
        let plain = |cell: &str| cell.trim_matches('`').to_owned();
        let passed = Passed {
            commit: plain(commit),
            date: plain(date),
            command: plain(command),
            took: plain(took),
            figures: figures.to_owned(),
        };
        record.insert(plain(suite), passed);
    }
    Ok(record)
}

/// The text with a suite's line put in or replaced; lines are in the order of the suites.
fn with(text: &str, suite: &str, passed: &Passed) -> anyhow::Result<String> {
    let [before, _, after] = parts(text)?;
    let mut record = read(text)?;
    record.insert(suite.into(), passed.clone());
    let [begin, end] = MARKS;
    let mut table = format!(
        "{begin}\n| suite | commit | date | command | took | figures |\n|---|---|---|---|---|---|\n"
    );
    let place = |name: &str| SUITES.iter().position(|suite| suite.name == name);
    let mut lines: Vec<(&String, &Passed)> = record.iter().collect();
    lines.sort_by_key(|(name, _)| place(name).unwrap_or(SUITES.len()));
    for (name, passed) in lines {
        let Passed {
            commit,
            date,
            command,
            took,
            figures,
        } = passed;
        table +=
            &format!("| `{name}` | `{commit}` | {date} | `{command}` | {took} | {figures} |\n");
    }
    Ok(format!("{before}{table}{end}{after}"))
}

/// A day as `2026-11-30`, in UTC.
fn date(now: SystemTime) -> String {
    let since = now.duration_since(SystemTime::UNIX_EPOCH);
    let days = since.map_or(0, |since| since.as_secs() / 86_400);
    // From days to a date of the Gregorian calendar whose years begin in March, so that a leap day is a year's last.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(commit: &str) -> Passed {
        Passed {
            commit: commit.into(),
            date: "2026-11-30".into(),
            command: ".ci/long seeds-1".into(),
            took: "9 min".into(),
            figures: "25000 seeds in 540 s; no violation".into(),
        }
    }

    const EMPTY: &str = "# Long runs\n\n<!-- runs -->\n<!-- /runs -->\n\nmore\n";

    #[test]
    fn a_suite_has_one_line_which_its_next_run_replaces() {
        let once = with(EMPTY, "seeds-2", &passed("abc")).expect("a table");
        let both = with(&once, "seeds-1", &passed("def")).expect("a table");
        let again = with(&both, "seeds-2", &passed("123+")).expect("a table");
        assert!(again.starts_with("# Long runs\n\n") && again.ends_with("\n\nmore\n"));
        let record = read(&again).expect("a table");
        assert_eq!(record.len(), 2);
        assert_eq!(record["seeds-1"], passed("def"));
        assert_eq!(record["seeds-2"], passed("123+"));
        let at = |name: &str| again.find(name).expect(name);
        assert!(at("`seeds-1`") < at("`seeds-2`"));
    }

    #[test]
    fn a_text_without_a_table_is_left_alone() {
        assert!(with("nothing", "seeds-1", &passed("abc")).is_err());
    }

    #[test]
    fn the_repositorys_record_can_be_read_and_names_every_suite() {
        let text = fs::read_to_string(build::root().join(RECORD)).expect(RECORD);
        let record = read(&text).expect("a table");
        for name in record.keys() {
            assert!(SUITES.iter().any(|suite| suite.name == name), "{name}");
        }
        for suite in SUITES {
            assert!(
                text.contains(suite.name),
                "{} is not in {RECORD}",
                suite.name
            );
        }
    }

    #[test]
    fn suites_have_names_of_their_own_and_chores_that_exist() {
        use clap::CommandFactory;
        let chores = crate::Args::command();
        for (at, suite) in SUITES.iter().enumerate() {
            assert!(SUITES[..at].iter().all(|other| other.name != suite.name));
            for chore in suite.chores {
                let words = std::iter::once("xtask").chain(chore.split(' '));
                let parsed = chores.clone().try_get_matches_from(words);
                assert!(parsed.is_ok(), "{chore}: {parsed:?}");
            }
        }
    }

    #[test]
    fn a_day_has_its_date() {
        let at = |seconds| date(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01");
        assert_eq!(at(951_782_400), "2000-02-29");
        assert_eq!(at(951_868_800), "2000-03-01");
        assert_eq!(at(1_796_083_199), "2026-11-30");
        assert_eq!(at(1_796_083_200), "2026-12-01");
    }
}
