//! What git says of this checkout; nothing where there is no git, or none that it wants to look into.

use std::process::{Command, Stdio};

use crate::build;

/// The commit that is checked out.
pub fn head() -> Option<String> {
    ask(&["rev-parse", "HEAD"])
}

/// The same, short, as it stands in records; with a plus where files differ from it.
pub fn head_in_records() -> Option<String> {
    let short = ask(&["rev-parse", "--short=9", "HEAD"])?;
    // Not the record itself: a suite's line is written before the next suite runs.
    let all = [".", ":(exclude)docs/long-runs.md"];
    let changed = ask(&[
        &["status", "--porcelain", "--untracked-files=no", "--"][..],
        &all,
    ]
    .concat())?;
    Some(if changed.is_empty() {
        short
    } else {
        format!("{short}+")
    })
}

/// How many commits there are since that one; none where it is not among this one's ancestors.
pub fn commits_since(commit: &str) -> Option<u64> {
    let commit = commit.trim_end_matches('+');
    ask(&["merge-base", "--is-ancestor", commit, "HEAD"])?;
    ask(&["rev-list", "--count", &format!("{commit}..HEAD")])?
        .parse()
        .ok()
}

fn ask(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git")
        .args(arguments)
        .current_dir(build::root())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let said = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| said.trim().to_owned())
}
