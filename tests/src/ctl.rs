//! `clusterctl` as a person uses it: a process, its exit code, what it printed.

use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use clusterctl::local::program;

use crate::cluster::TestCluster;

/// The longest that a command of a test may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a command answered.
#[derive(Clone, Debug)]
pub struct Said {
    /// Its exit code; -1 after a signal.
    pub code: i32,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

impl Said {
    /// Whether it failed as refusals do, and its message has every one of these words.
    pub fn refuses_with(&self, words: &[&str]) -> bool {
        self.code != 0 && words.iter().all(|word| self.err.contains(word))
    }
}

/// Runs one of Baton's programs to its end.
///
/// # Errors
/// When it cannot be started or does not end.
pub async fn run(name: &str, arguments: &[&str]) -> anyhow::Result<Said> {
    run_with(name, arguments, &[]).await
}

/// The same, with variables: secrets go there, arguments are everybody's to read. What the test's own user keeps
/// of contexts and tokens is out of sight.
///
/// # Errors
/// When it cannot be started or does not end.
pub async fn run_with(
    name: &str,
    arguments: &[&str],
    variables: &[(&str, &str)],
) -> anyhow::Result<Said> {
    let mut command = tokio::process::Command::new(program(name)?);
    for kept in [
        "CLUSTERCTL_SERVER",
        "CLUSTERCTL_TOKEN",
        "CLUSTERCTL_CONTEXT",
    ] {
        command.env_remove(kept);
    }
    command
        .env("XDG_CONFIG_HOME", "/nonexistent")
        .args(arguments)
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output())
        .await
        .with_context(|| format!("{name} {arguments:?} does not end"))??;
    Ok(Said {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

impl TestCluster {
    /// `clusterctl` with these arguments, asking the first node that lives.
    ///
    /// # Errors
    /// When it cannot be started or does not end.
    pub async fn ctl(&self, arguments: &[&str]) -> anyhow::Result<Said> {
        let living = self.local.nodes.iter().find(|node| node.pid != 0);
        let server = living.context("no node lives")?.address.to_string();
        let token = self.local.token()?.line();
        run_with(
            "clusterctl",
            arguments,
            &[("CLUSTERCTL_SERVER", &server), ("CLUSTERCTL_TOKEN", &token)],
        )
        .await
    }
}
