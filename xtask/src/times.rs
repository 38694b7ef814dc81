//! What each step of a landing costs: measured here, added up here, and compared with what it may cost.
//!
//! ```text
//!  .ci/run ──► xtask times begin                    what the script's own commands took so far
//!          ──► xtask step NAME -- command …         target/ci-times/N-NAME.json
//!          ──► xtask times end                      a table, target/ci-times.json; red over 1.25 × the budget
//! ```
//! Processor seconds are those of the processes that a step waited for, and of theirs, as the kernel adds them up
//! (proc(5), cutime and cstime). They hardly depend on who else uses the machine; seconds on the wall do. A
//! process that nobody waited for, as a monitor that outlived its daemon, is in no sum.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};

use crate::{build, git, long};

/// What steps may cost, in the repository.
const BUDGETS: &str = ".ci/budgets";
/// Over so much of its budget the total is red, and a step is named.
const OVER: f64 = 1.25;
/// The kernel's unit for times of processes, on every machine that we run on (`getconf CLK_TCK`).
const TICKS_PER_S: f64 = 100.0;
/// Lines of a failed step's log that are shown.
const SHOWN_LINES: usize = 200;

/// Flags of `cargo xtask step`.
#[derive(Args)]
pub struct StepArgs {
    /// Its name, as in `.ci/budgets`.
    name: String,
    /// Run it with the least priority, and show its output only when it fails.
    #[arg(long)]
    aside: bool,
    /// The command.
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

/// What `cargo xtask times` does.
#[derive(Clone, Copy, Subcommand)]
pub enum TimesArgs {
    /// Forget the steps of the run before; what the calling script did already is the first step.
    Begin,
    /// Print what each step took and compare it with its budget.
    End {
        /// The run failed: only print.
        #[arg(long)]
        failed: bool,
    },
}

/// One step, as it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Step {
    name: String,
    wall_s: f64,
    processor_s: f64,
    /// Beside others: its time on the wall is not part of the whole.
    aside: bool,
    passed: bool,
}

/// Runs a command and keeps what it took.
pub fn step(args: &StepArgs) -> anyhow::Result<ExitCode> {
    let script = Process::of(std::os::unix::process::parent_id())?;
    let beside = if args.aside { ", aside" } else { "" };
    let title = format!("\n== {} ({:.0} s{beside})\n", args.name, script.age_s()?);
    // In one piece: others begin at the same time.
    std::io::stderr().write_all(title.as_bytes())?;
    let folder = folder();
    fs::create_dir_all(&folder)?;
    let log = folder.join(format!("{}.log", args.name));
    let mut command = command(args, &log)?;
    let begun = Instant::now();
    let status = command
        .status()
        .with_context(|| format!("cannot start `{}`", args.command.join(" ")))?;
    let step = Step {
        name: args.name.clone(),
        wall_s: begun.elapsed().as_secs_f64(),
        processor_s: Process::of(std::process::id())?.children_s,
        aside: args.aside,
        passed: status.success(),
    };
    step.keep(&folder)?;
    if step.passed {
        return Ok(ExitCode::SUCCESS);
    }
    if args.aside {
        eprintln!("\n== {} failed; the end of {}:", args.name, log.display());
        let said = fs::read(&log)?;
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> = said.lines().collect();
        for line in &lines[lines.len().saturating_sub(SHOWN_LINES)..] {
            eprintln!("{line}");
        }
    }
    eprintln!("\n== {}: {status}: {}", args.name, args.command.join(" "));
    Ok(ExitCode::FAILURE)
}

fn command(args: &StepArgs, log: &Path) -> anyhow::Result<Command> {
    let (program, rest) = args.command.split_first().context("no command")?;
    let mut command;
    if args.aside {
        command = Command::new("nice");
        command.args(["-n", "19"]).args(&args.command);
        let log = fs::File::create(log).with_context(|| format!("cannot write {log:?}"))?;
        command.stdout(log.try_clone()?).stderr(log);
    } else {
        command = Command::new(program);
        command.args(rest);
    }
    command.stdin(Stdio::null());
    Ok(command)
}

/// Begins or ends the measuring of a script's run.
pub fn run(args: TimesArgs) -> anyhow::Result<ExitCode> {
    let script = Process::of(std::os::unix::process::parent_id())?;
    let folder = folder();
    match args {
        TimesArgs::Begin => {
            if folder.exists() {
                fs::remove_dir_all(&folder)?;
            }
            fs::create_dir_all(&folder)?;
            let before = Step {
                name: "packages".into(),
                wall_s: script.age_s()?,
                processor_s: script.children_s,
                aside: false,
                passed: true,
            };
            before.keep(&folder)?;
            Ok(ExitCode::SUCCESS)
        }
        TimesArgs::End { failed } => {
            let run = Run {
                commit: git::head_in_records(),
                wall_s: script.age_s()?,
                steps: kept(&folder)?,
            };
            let file = build::target_dir().join("ci-times.json");
            fs::write(&file, serde_json::to_string_pretty(&run)?)
                .with_context(|| format!("cannot write {}", file.display()))?;
            let budgets = fs::read_to_string(build::root().join(BUDGETS))?;
            let budgets = read_budgets(&budgets).with_context(|| format!("in {BUDGETS}"))?;
            println!("{}", run.table(&budgets));
            println!("{}", long::ages()?);
            println!("all of it: {}", file.display());
            if failed {
                return Ok(ExitCode::FAILURE);
            }
            run.judge(&budgets)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Where steps are kept until the end.
fn folder() -> PathBuf {
    build::target_dir().join("ci-times")
}

fn kept(folder: &Path) -> anyhow::Result<Vec<Step>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).context("no run has begun")? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            files.push((fs::metadata(&path)?.modified()?, path));
        }
    }
    // In the order in which they ended.
    files.sort();
    let read = |(_, path): (_, PathBuf)| Ok(serde_json::from_slice(&fs::read(path)?)?);
    files.into_iter().map(read).collect()
}

impl Step {
    fn keep(&self, folder: &Path) -> anyhow::Result<()> {
        let path = folder.join(format!("{}.json", self.name));
        fs::write(path, serde_json::to_string(self)?)?;
        Ok(())
    }
}

/// What a step may cost.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Budget {
    processor_s: f64,
    /// What a machine does the first time only is not part of the total.
    once: bool,
}

/// Reads lines `step seconds` and `step seconds once`; what follows a `#` is for people.
fn read_budgets(text: &str) -> anyhow::Result<BTreeMap<String, Budget>> {
    let mut budgets = BTreeMap::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let words: Vec<&str> = line.split_whitespace().collect();
        let (name, seconds, once) = match words[..] {
            [] => continue,
            [name, seconds] => (name, seconds, false),
            [name, seconds, "once"] => (name, seconds, true),
            _ => bail!("`{line}` is not `step seconds` or `step seconds once`"),
        };
        let processor_s = seconds
            .parse()
            .with_context(|| format!("`{line}`: how many seconds?"))?;
        let budget = Budget { processor_s, once };
        let other = budgets.insert(name.to_owned(), budget);
        ensure!(other.is_none(), "{name} has two budgets");
    }
    Ok(budgets)
}

/// A whole run.
#[derive(Debug, Serialize)]
struct Run {
    commit: Option<String>,
    wall_s: f64,
    steps: Vec<Step>,
}

impl Run {
    /// What counts of the steps, and what they may cost together.
    fn totals(&self, budgets: &BTreeMap<String, Budget>) -> (f64, f64) {
        let counted = |name: &String| budgets.get(name).is_none_or(|budget| !budget.once);
        let steps = self.steps.iter().filter(|step| counted(&step.name));
        let may = budgets.values().filter(|budget| !budget.once);
        (
            steps.map(|step| step.processor_s).sum(),
            may.map(|budget| budget.processor_s).sum(),
        )
    }

    fn table(&self, budgets: &BTreeMap<String, Budget>) -> String {
        let mut out = format!(
            "\n{:<16} {:>8} {:>10} {:>8}\n",
            "step", "wall s", "processor", "budget"
        );
        for step in &self.steps {
            let budget = budgets.get(&step.name);
            let may = budget.map_or("none".into(), |may| format!("{:.0}", may.processor_s));
            let mut notes = String::new();
            if step.aside {
                notes += "  aside";
            }
            if budget.is_some_and(|budget| budget.once) {
                notes += "  once";
            }
            if budget.is_none_or(|budget| step.processor_s > OVER * budget.processor_s) {
                notes += "  WARNING: over its budget";
            }
            if !step.passed {
                notes += "  FAILED";
            }
            out += &format!(
                "{:<16} {:>8.0} {:>10.0} {may:>8}{notes}\n",
                step.name, step.wall_s, step.processor_s
            );
        }
        let (took, may) = self.totals(budgets);
        out + &format!(
            "{:<16} {:>8.0} {took:>10.0} {may:>8.0}\n",
            "all", self.wall_s
        )
    }

    /// Fails when it cost too much.
    fn judge(&self, budgets: &BTreeMap<String, Budget>) -> anyhow::Result<()> {
        let (took, may) = self.totals(budgets);
        ensure!(
            took <= OVER * may,
            "this landing took {took:.0} processor seconds, more than {OVER} × the {may:.0} that {BUDGETS} allows: \
             take the time out again where the table says, or say in {BUDGETS} why it is worth it"
        );
        Ok(())
    }
}

/// What the kernel says of a process (proc(5), `/proc/PID/stat`).
#[derive(Clone, Copy, Debug, PartialEq)]
struct Process {
    /// Processor seconds of the children that it waited for, and of theirs.
    children_s: f64,
    /// When it started, seconds after the machine's start.
    started_s: f64,
}

impl Process {
    fn of(pid: u32) -> anyhow::Result<Process> {
        let path = format!("/proc/{pid}/stat");
        let stat = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        Process::read(&stat).with_context(|| format!("{path} says `{stat}`"))
    }

    fn read(stat: &str) -> Option<Process> {
        // The name, in parentheses, may have anything in it.
        let (_, fields) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        // The first of them is the third field of the line.
        let ticks = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
        Some(Process {
            children_s: (ticks(16)? + ticks(17)?) / TICKS_PER_S,
            started_s: ticks(22)? / TICKS_PER_S,
        })
    }

    fn age_s(self) -> anyhow::Result<f64> {
        let uptime = fs::read_to_string("/proc/uptime")?;
        let now: f64 = uptime
            .split_whitespace()
            .next()
            .context("/proc/uptime is empty")?
            .parse()?;
        Ok((now - self.started_s).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(name: &str, processor_s: f64) -> Step {
        Step {
            name: name.into(),
            wall_s: 1.0,
            processor_s,
            aside: false,
            passed: true,
        }
    }

    fn run(steps: &[(&str, f64)]) -> Run {
        Run {
            commit: None,
            wall_s: 100.0,
            steps: steps.iter().map(|&(name, s)| step(name, s)).collect(),
        }
    }

    #[test]
    fn the_total_is_red_and_a_step_alone_is_only_named() {
        let budgets = read_budgets("a 100 # why\n\nb 100\nguest 10 once\n").expect("budgets");
        let uneven = run(&[("a", 199.0), ("b", 50.0)]);
        assert!(uneven.judge(&budgets).is_ok());
        let table = uneven.table(&budgets);
        assert!(table.contains("199      100  WARNING"), "{table}");
        assert!(!table.contains("50      100  WARNING"), "{table}");
        assert!(run(&[("a", 199.0), ("b", 52.0)]).judge(&budgets).is_err());
        // Whoever adds a step says what it may cost.
        let more = run(&[("a", 100.0), ("b", 100.0), ("c", 51.0)]);
        assert!(more.judge(&budgets).is_err());
        assert!(more.table(&budgets).contains("none  WARNING"));
        // A machine's first time does not count.
        let first = run(&[("a", 100.0), ("b", 100.0), ("guest", 1_000.0)]);
        assert!(first.judge(&budgets).is_ok());
    }

    #[test]
    fn a_budget_that_cannot_be_read_is_an_error() {
        for wrong in ["a", "a b", "a 1 twice", "a 1\na 2"] {
            assert!(read_budgets(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_repositorys_budgets_can_be_read_and_name_what_the_script_does() {
        let text = fs::read_to_string(build::root().join(BUDGETS)).expect(BUDGETS);
        let budgets = read_budgets(&text).expect(BUDGETS);
        let script = fs::read_to_string(build::root().join(".ci/run")).expect(".ci/run");
        let named = script.lines().filter_map(|line| {
            let line = line.trim();
            let rest = line
                .strip_prefix("step ")
                .or_else(|| line.strip_prefix("aside "))?;
            rest.split_whitespace().next()
        });
        let mut steps: Vec<&str> = named.chain(["packages"]).collect();
        steps.sort_unstable();
        assert_eq!(steps, budgets.keys().collect::<Vec<_>>());
    }

    #[test]
    fn a_process_has_the_times_of_its_children() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 1 2 3 4 5 6 150 50 20 0 1 0 12345 1 1";
        let process = Process::read(stat).expect("a line");
        assert_eq!((process.children_s, process.started_s), (2.0, 123.45));

        let before = Process::of(std::process::id()).expect("this process");
        let mut busy = Command::new("sh");
        busy.args(["-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done"]);
        assert!(busy.status().expect("sh").success());
        let after = Process::of(std::process::id()).expect("this process");
        assert!(after.children_s > before.children_s);
    }
}
