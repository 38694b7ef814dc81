//! Which tests may be tried again, as `.config/nextest.toml` says, and why.
//!
//! A test that fails once in three runs is a failure that shows once in three runs. Only what waits for real leases on a
//! machine that others use may be tried again, suite by suite, and each says why. A suite whose failure is never the
//! machine's has none, and a FLAKY of another suite fails the run.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, ensure};

use crate::build;

const CONFIG: &str = ".config/nextest.toml";
/// What stands above an override.
const OVERRIDE: &str = "[[profile.ci.overrides]]";
/// These are about safety, or run without a clock: what fails in them once has failed.
const NEVER: [&str; 7] = [
    "sim",
    "protocol-model",
    "cluster-model",
    "clusterd",
    "tests::cutover_failures",
    "storage-broker::fence_embedded",
    "storage-broker::fence_embedded_tls",
];

/// The suites that may be tried again, each with its reason.
pub fn allowed() -> anyhow::Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(build::root().join(CONFIG))
        .with_context(|| format!("cannot read {CONFIG}"))?;
    read(&text).with_context(|| format!("in {CONFIG}"))
}

/// Reads the overrides of the profile `ci`: a comment above, `binary_id(…)` in the filter, `retries`.
fn read(text: &str) -> anyhow::Result<BTreeMap<String, String>> {
    let mut suites = BTreeMap::new();
    let parts: Vec<&str> = text.split(OVERRIDE).collect();
    for (before, part) in parts.iter().zip(&parts[1..]) {
        let lines = part
            .lines()
            .take_while(|line| !line.starts_with("[profile"));
        let body: Vec<&str> = lines.collect();
        if !body.iter().any(|line| line.starts_with("retries")) {
            continue;
        }
        let above = before.lines().rev().skip_while(|line| line.is_empty());
        let mut reason: Vec<&str> = above.map_while(|line| line.strip_prefix("# ")).collect();
        reason.reverse();
        ensure!(!reason.is_empty(), "a retry has no reason above it:{part}");
        let filter = body
            .iter()
            .find(|line| line.starts_with("filter"))
            .context("a retry without a filter is one for everything")?;
        let ids = filter.split("binary_id(").skip(1);
        let ids: Vec<&str> = ids
            .filter_map(|rest| Some(rest.split_once(')')?.0))
            .collect();
        let others = [
            "package(", "test(", "all()", "kind(", "not ", "binary(", "!",
        ];
        ensure!(
            !ids.is_empty() && !others.iter().any(|other| filter.contains(other)),
            "a retry names its suites by `binary_id(…)` alone: {filter}"
        );
        for id in ids {
            ensure!(
                !NEVER.contains(&id),
                "{id} is never tried again: what fails there has failed"
            );
            suites.insert(id.to_owned(), reason.join(" "));
        }
    }
    let outside = text.split(OVERRIDE).next().unwrap_or_default();
    let anywhere = outside
        .lines()
        .any(|line| line.starts_with("retries") && line.trim() != "retries = 0");
    ensure!(!anywhere, "retries are for named suites alone");
    Ok(suites)
}

/// The suite and test of nextest's line `FLAKY 2/3 [ 1.2s] (3/9) tests::lifecycle a_test`.
pub fn flaky(line: &str) -> Option<(String, String)> {
    let rest = line.trim_start().strip_prefix("FLAKY")?;
    let (_, _, suite, test) = status(rest)?;
    Some((suite, test))
}

/// The suite, the test and the seconds of nextest's line for a test that ended.
pub fn ended(line: &str) -> Option<(String, String, f64)> {
    let line = line.trim_start();
    let word = line.split_whitespace().next()?;
    let ends = [
        "PASS", "FAIL", "LEAK", "TRY", "TIMEOUT", "SIGABRT", "SIGSEGV", "SIGKILL",
    ];
    if !ends.contains(&word) {
        return None;
    }
    let (_, seconds, suite, test) = status(line)?;
    Some((suite, test, seconds))
}

/// What stands before, in and after the brackets of a status line.
fn status(line: &str) -> Option<(String, f64, String, String)> {
    let (before, rest) = line.split_once('[')?;
    let (time, rest) = rest.split_once(']')?;
    let seconds = time
        .trim()
        .trim_start_matches('>')
        .trim_end_matches('s')
        .trim()
        .parse()
        .ok()?;
    let mut rest = rest.trim_start();
    // Which of how many.
    if let Some(counted) = rest.strip_prefix('(') {
        rest = counted.split_once(')')?.1.trim_start();
    }
    let (suite, test) = rest.split_once(' ')?;
    Some((before.into(), seconds, suite.into(), test.trim().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "[profile.ci]\nretries = 0\n\n# A machine that others use.\n[[profile.ci.overrides]]\n\
        filter = 'binary_id(tests::lifecycle) | binary_id(clusterd::node)'\nretries = 1\n";

    #[test]
    fn the_repositorys_retries_are_named_and_have_reasons() {
        let suites = allowed().expect("a config");
        assert!(suites.len() <= 8, "{suites:?}");
        assert!(
            suites.values().all(|reason| reason.len() > 20),
            "{suites:?}"
        );
    }

    #[test]
    fn a_retry_names_its_suites_and_says_why() {
        let suites = read(ONE).expect("a config");
        let names: Vec<&String> = suites.keys().collect();
        assert_eq!(names, ["clusterd::node", "tests::lifecycle"]);
        assert_eq!(suites["clusterd::node"], "A machine that others use.");
        for (from, to) in [
            ("# A machine that others use.\n", ""),
            ("retries = 0", "retries = 2"),
            ("binary_id(tests::lifecycle)", "package(tests)"),
            ("binary_id(clusterd::node)", "not binary_id(clusterd::node)"),
            ("tests::lifecycle", "tests::cutover_failures"),
            ("clusterd::node", "sim"),
        ] {
            assert!(read(&ONE.replace(from, to)).is_err(), "{from} → {to}");
        }
    }

    #[test]
    fn nextests_lines_are_read() {
        let line = "   FLAKY 2/3 [   4.072s] (31/90) tests::lifecycle a_drain_empties_a_node";
        let (suite, test) = flaky(line).expect("a flaky test");
        assert_eq!(
            (suite.as_str(), test.as_str()),
            ("tests::lifecycle", "a_drain_empties_a_node")
        );
        assert_eq!(flaky("        PASS [   4.072s] sim a_seed"), None);
        assert_eq!(flaky("the word FLAKY [1s] in a test's words"), None);
        let line = "        PASS [   0.013s] (12/50) clusterd raft::log::tests::it_is_there";
        let (suite, test, seconds) = ended(line).expect("a test");
        assert_eq!(
            (suite.as_str(), test.as_str()),
            ("clusterd", "raft::log::tests::it_is_there")
        );
        assert_eq!(seconds, 0.013);
        let line = "  TRY 1 FAIL [  13.500s] (─────) tests::balance it_moves";
        assert_eq!(ended(line).map(|ended| ended.2), Some(13.5));
        assert_eq!(ended("        SLOW [> 60.000s] (─────) sim a_seed"), None);
    }
}
