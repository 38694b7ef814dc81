//! Runs the tests and accounts for those that were skipped.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use anyhow::{Context, bail};
use clap::Args;

use crate::{build, edges, layers, retries};

/// What a test prints when it needs something that is not there (`proto::skip!`), with whatever behind it.
const SKIPPED: &str = "SKIPPED";
/// Suites whose time is shown at the end.
const SLOWEST_SHOWN: usize = 12;

/// Flags of `cargo xtask test`.
#[derive(Args)]
pub struct TestArgs {
    /// Also run what needs root and installed packages; then a SKIPPED is a failure.
    #[arg(long)]
    all: bool,
    /// Given to the test runner, for example a filter.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// The suites that attack: named so.
const ATTACKS: &str = "binary(attack) | test(trust::) | test(/tls/) | test(/confine/)";

/// Runs the suites that attack; as root nothing of them may be skipped.
pub fn attack() -> anyhow::Result<()> {
    let root = std::fs::metadata("/proc/self").is_ok_and(|own| {
        use std::os::unix::fs::MetadataExt;
        own.uid() == 0
    });
    run(&TestArgs {
        all: root,
        args: vec!["-E".into(), ATTACKS.into()],
    })
}

/// Builds the programs and runs every test.
pub fn run(args: &TestArgs) -> anyhow::Result<()> {
    build::require_kvm()?;
    layers::run()?;
    edges::run()?;
    let retried = retries::allowed()?;
    let programs = build::programs_and_tests()?;
    let nextest = build::cargo()
        .args(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    let mut command = build::cargo();
    if nextest {
        command.args(["nextest", "run", "--workspace", "--no-fail-fast"]);
        command.args([
            "--success-output",
            "immediate",
            "--failure-output",
            "immediate-final",
            "--color",
            "never",
        ]);
        if args.all {
            command.args(["--profile", "ci"]);
        }
        command.args(&args.args);
    } else {
        // One test at a time: the suites run whole clusters.
        command.args(["test", "--workspace", "--no-fail-fast"]);
        command
            .args(&args.args)
            .args(["--", "--nocapture", "--test-threads", "1"]);
    }
    command.env("BATON_PROGRAMS", &programs);
    if args.all {
        command.env("BATON_TEST_ALL", "1");
    }

    // Both streams into one pipe, so that a test's words stay under its name.
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    command
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .stdin(Stdio::null());
    let mut child = command.spawn().context("cannot start the test runner")?;
    drop(command);
    let log_path = build::target_dir().join("test.log");
    let mut log =
        File::create(&log_path).with_context(|| format!("cannot write {}", log_path.display()))?;
    let mut told = Told::default();
    let mut passing = false;
    for line in BufReader::new(reader).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        writeln!(log, "{line}")?;
        told.hear(&line);
        // A passed test's own output stays in the log; nextest's lines and failures are shown.
        if nextest {
            let word = line.split_whitespace().next().unwrap_or("");
            match word {
                "PASS" | "LEAK" => {
                    passing = true;
                    println!("{line}");
                    continue;
                }
                "FAIL" | "TRY" | "FLAKY" | "TIMEOUT" | "SIGABRT" | "SIGSEGV" | "SIGKILL"
                | "TERMINATING" | "ABORT" | "SLOW" => {
                    passing = false;
                }
                _ if word.starts_with("────") && !line.contains("STD") => passing = false,
                _ => {}
            }
        }
        match line.find(SKIPPED) {
            Some(at) => println!("    {}", &line[at..]),
            None if !passing => println!("{line}"),
            None => {}
        }
    }
    let status = child.wait()?;
    println!("all output: {}", log_path.display());
    told.print();
    if !status.success() {
        bail!("tests failed");
    }
    told.judge(args.all, &retried)
}

/// What is kept of the runner's output.
#[derive(Debug, Default)]
struct Told {
    /// What could not run.
    skipped: Vec<String>,
    /// What passed at another try: the suite and the test.
    flaky: BTreeSet<(String, String)>,
    /// Seconds of each suite's tests together.
    seconds: BTreeMap<String, f64>,
}

impl Told {
    fn hear(&mut self, line: &str) {
        if let Some(at) = line.find(SKIPPED) {
            self.skipped.push(line[at..].to_owned());
        }
        self.flaky.extend(retries::flaky(line));
        if let Some((suite, _, seconds)) = retries::ended(line) {
            *self.seconds.entry(suite).or_default() += seconds;
        }
    }

    fn print(&self) {
        let mut slowest: Vec<(&String, f64)> =
            self.seconds.iter().map(|(suite, s)| (suite, *s)).collect();
        slowest.sort_by(|a, b| b.1.total_cmp(&a.1));
        for (suite, seconds) in slowest.iter().take(SLOWEST_SHOWN) {
            println!("{seconds:8.0} s  {suite}");
        }
        for (suite, test) in &self.flaky {
            println!("  FLAKY {suite} {test}");
        }
        if !self.skipped.is_empty() {
            println!("{} skipped:", self.skipped.len());
            for line in &self.skipped {
                println!("  {line}");
            }
        }
    }

    /// Fails where nothing may be skipped and something was, and where a test passed at another try that has none.
    fn judge(&self, all: bool, retried: &BTreeMap<String, String>) -> anyhow::Result<()> {
        if all && !self.skipped.is_empty() {
            bail!("with --all nothing may be skipped: install what the lines above name");
        }
        let wrong = self
            .flaky
            .iter()
            .find(|(suite, _)| !retried.contains_key(suite));
        if let Some((suite, test)) = wrong {
            bail!("{suite} {test} passed at another try only, and {suite} has none: it failed");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(lines: &[&str]) -> Told {
        let mut told = Told::default();
        lines.iter().for_each(|line| told.hear(line));
        told
    }

    #[test]
    fn whatever_says_that_it_was_skipped_is_accounted_for() {
        for line in ["SKIPPED one: no disk", "    SKIPPED: no disk", "x SKIPPED"] {
            let told = told(&[line]);
            assert_eq!(told.skipped.len(), 1, "{line}");
            assert!(told.judge(true, &BTreeMap::new()).is_err(), "{line}");
            assert!(told.judge(false, &BTreeMap::new()).is_ok(), "{line}");
        }
        let none = told(&["     Summary [  1.0s] 9 tests run: 9 passed, 3 skipped"]);
        assert!(none.judge(true, &BTreeMap::new()).is_ok());
    }

    #[test]
    fn a_flaky_test_fails_unless_its_suite_is_named() {
        let told = told(&[
            "  TRY 1 FAIL [   3.000s] (─────) tests::balance it_moves",
            "  TRY 2 PASS [   2.000s] (7/9) tests::balance it_moves",
            "   FLAKY 2/2 [   2.000s] (7/9) tests::balance it_moves",
        ]);
        assert_eq!(told.seconds["tests::balance"], 5.0);
        assert!(told.judge(true, &BTreeMap::new()).is_err());
        let named = BTreeMap::from([("tests::balance".to_owned(), "why".to_owned())]);
        assert!(told.judge(true, &named).is_ok());
    }
}
