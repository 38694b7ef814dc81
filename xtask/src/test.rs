//! Runs the tests and accounts for those that were skipped.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use anyhow::{Context, bail};
use clap::Args;

use crate::build;

/// What a test prints when it needs something that is not there.
const SKIPPED: &str = "SKIPPED ";

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
    crate::layers::run()?;
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
    let mut skipped = Vec::new();
    let mut passing = false;
    for line in BufReader::new(reader).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        writeln!(log, "{line}")?;
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
        if let Some(at) = line.find(SKIPPED) {
            println!("    {}", &line[at..]);
            skipped.push(line[at..].to_owned());
        } else if !passing {
            println!("{line}");
        }
    }
    let status = child.wait()?;
    println!("all output: {}", log_path.display());
    if !skipped.is_empty() {
        println!("{} skipped:", skipped.len());
        for line in &skipped {
            println!("  {line}");
        }
    }
    if !status.success() {
        bail!("tests failed");
    }
    if args.all && !skipped.is_empty() {
        bail!("with --all nothing may be skipped: install what the lines above name");
    }
    Ok(())
}
