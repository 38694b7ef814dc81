//! Checks what ARCHITECTURE.md says of the sources themselves: which files name generated types, which make connections,
//! and that a test which cannot run says so in the one way that is counted.
//!
//! What breaks a rule today is named here, file by file. Such a list can only shrink: a file that breaks the rule and is not
//! in it is an error, and so is one that is in it and no longer does.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, bail, ensure};

use crate::build;

/// Where the product's own sources lie; `cli` is an edge as a whole.
const DAEMONS: [&str; 5] = [
    "cluster-model/src",
    "migration-core/src",
    "storage-broker/src",
    "vmm/src",
    "clusterd/src",
];

/// Modules of `proto` that are generated.
const GENERATED: [&str; 4] = ["admin", "broker", "monitor", "peer"];

/// The edges: here messages become the model's types and the other way round.
const EDGES: &[&str] = &[
    "clusterd/src/admin/",
    "clusterd/src/broker.rs",
    "clusterd/src/heartbeat.rs",
    "clusterd/src/join.rs",
    "clusterd/src/monitors.rs",
    "clusterd/src/net.rs",
    "clusterd/src/peer_service.rs",
    "clusterd/src/raft/",
    "clusterd/src/trust/exchange.rs",
    "storage-broker/src/daemon.rs",
    "storage-broker/src/fuzzing.rs",
    "vmm/src/control.rs",
    "vmm/src/monitor/status.rs",
];

/// Files within that name generated types all the same.
const GENERATED_INSIDE: &[&str] = &[
    "clusterd/src/agent/handover.rs",
    "clusterd/src/agent/summary.rs",
    "clusterd/src/agent/view.rs",
    "clusterd/src/check.rs",
    "clusterd/src/check/confinement.rs",
    "clusterd/src/check/join.rs",
    "clusterd/src/check/node.rs",
    "clusterd/src/leader.rs",
    "clusterd/src/member.rs",
    "clusterd/src/node.rs",
    "clusterd/src/permit.rs",
    "clusterd/src/report.rs",
    "clusterd/src/trust/renewal.rs",
    "clusterd/src/volumes.rs",
    "vmm/src/confine.rs",
    "vmm/src/monitor.rs",
    "vmm/src/monitor/migration/channels.rs",
    "vmm/src/permit.rs",
    "vmm/src/spec.rs",
];

/// What makes a connection.
const CONNECTS: [&str; 5] = [
    "TcpStream::connect",
    "TcpSocket::new",
    "UdpSocket::bind",
    "Endpoint::from",
    "connect_timeout(",
];

/// Where connections are made: between nodes, to storage, of one memory channel to another, to a socket of the same host.
const CONNECTING: &[&str] = &[
    "clusterd/src/net.rs",
    "migration-core/src/net.rs",
    "proto/src/unix.rs",
    "storage-broker/src/dialer.rs",
];

/// Checks all of it.
pub fn run() -> anyhow::Result<()> {
    let mut sources = Vec::new();
    for folder in DAEMONS.into_iter().chain(["proto/src"]) {
        read(Path::new(folder), &mut sources)?;
    }
    ensure!(
        sources.len() > 150,
        "only {} sources were found",
        sources.len()
    );
    let mut wrong = Vec::new();
    let daemons = sources
        .iter()
        .filter(|(path, _)| !path.starts_with("proto/"));
    let naming = daemons
        .filter(|(path, text)| {
            !EDGES.iter().any(|edge| path.starts_with(edge)) && names_generated(text)
        })
        .map(|(path, _)| path.as_str());
    wrong.extend(compare(
        naming.collect(),
        GENERATED_INSIDE,
        "names generated types, which only edges do (EDGES in xtask/src/edges.rs)",
    ));
    let connecting = sources
        .iter()
        .filter(|(_, text)| CONNECTS.iter().any(|connects| text.contains(connects)))
        .map(|(path, _)| path.as_str());
    wrong.extend(compare(
        connecting.collect(),
        CONNECTING,
        "makes connections, which only the files in CONNECTING of xtask/src/edges.rs do",
    ));
    wrong.extend(skips()?);
    if wrong.is_empty() {
        println!(
            "edges: generated types inside in {} files (edges apart), connections made in {}",
            GENERATED_INSIDE.len(),
            CONNECTING.len()
        );
        return Ok(());
    }
    bail!("{}", wrong.join("\n"))
}

/// What breaks a rule without being known to, and what is known to and does not.
fn compare(found: BTreeSet<&str>, known: &[&str], what: &str) -> Vec<String> {
    let known: BTreeSet<&str> = known.iter().copied().collect();
    let new = found
        .difference(&known)
        .map(|path| format!("{path} {what}"));
    let gone = known
        .difference(&found)
        .map(|path| format!("{path} is listed in xtask/src/edges.rs as a file that {what}, and is none: strike it off"));
    new.chain(gone).collect()
}

/// Says which tests print that they were skipped without the macro, which alone is sure to be counted.
fn skips() -> anyhow::Result<Vec<String>> {
    // In two parts, so that this file does not say it.
    let printed = concat!("\"SKIP", "PED");
    let mut sources = Vec::new();
    for folder in DAEMONS.into_iter().chain([
        "cli/src",
        "tests",
        "vmm/tests",
        "clusterd/tests",
        "storage-broker/tests",
        "migration-core/tests",
        "cluster-model/tests",
    ]) {
        read_all(Path::new(folder), &mut sources)?;
    }
    let by_hand = sources
        .into_iter()
        .filter(|(_, text)| text.contains(printed));
    Ok(by_hand
        .map(|(path, _)| {
            format!("{path} says by itself that a test is skipped: use `proto::skip!`")
        })
        .collect())
}

/// The sources below a folder of the repository without their tests and comments, by their paths.
fn read(folder: &Path, sources: &mut Vec<(String, String)>) -> anyhow::Result<()> {
    let mut all = Vec::new();
    read_all(folder, &mut all)?;
    sources.extend(
        all.into_iter()
            .filter(|(path, _)| !path.ends_with("/tests.rs") && !path.contains("/tests/"))
            .map(|(path, text)| (path, product(&text))),
    );
    Ok(())
}

fn read_all(folder: &Path, sources: &mut Vec<(String, String)>) -> anyhow::Result<()> {
    let absolute = build::root().join(folder);
    let entries =
        fs::read_dir(&absolute).with_context(|| format!("cannot read {}", absolute.display()))?;
    for entry in entries {
        let entry = entry?;
        let path = folder.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            read_all(&path, sources)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(entry.path())?;
            sources.push((path.display().to_string(), text));
        }
    }
    Ok(())
}

/// A source without its comments, and without the module of tests at its end.
fn product(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    let lines = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Whether `proto::admin` or another generated module stands in it, also as one of several in braces.
fn names_generated(text: &str) -> bool {
    let is_generated = |path: &str| {
        let first = path.trim().split("::").next().unwrap_or_default();
        GENERATED.contains(
            &first
                .split(|c: char| !c.is_alphanumeric() && c != '_')
                .next()
                .unwrap_or_default(),
        )
    };
    text.match_indices("proto::").any(|(at, found)| {
        let whole = text[..at]
            .chars()
            .next_back()
            .is_none_or(|before| !before.is_alphanumeric() && before != '_');
        let rest = &text[at + found.len()..];
        whole
            && match rest.strip_prefix('{') {
                Some(group) => in_braces(group).into_iter().any(is_generated),
                None => is_generated(rest),
            }
    })
}

/// The parts of a group of imports, what is in their own braces left with them.
fn in_braces(group: &str) -> Vec<&str> {
    let (mut depth, mut from, mut parts) = (0, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                parts.push(&group[from..at]);
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&group[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generated_module_is_seen_however_it_is_named() {
        assert!(names_generated("use proto::admin::VmView;"));
        assert!(names_generated("use proto::{clock, peer::{A, B}, tls};"));
        assert!(names_generated("let x: proto::monitor::Phase;"));
        assert!(names_generated("use proto::broker as b;"));
        assert!(!names_generated(
            "use proto::clock; use proto::{tls::{self}, token};"
        ));
        assert!(!names_generated("use cluster_proto::admin;"));
        assert!(!names_generated("use proto::monitored;"));
        assert!(!names_generated("use proto::tls::{peer, admin};"));
    }

    #[test]
    fn what_tests_and_comments_say_does_not_count() {
        let text = "//! proto::admin\nfn a() {}\n    // proto::peer\n#[cfg(test)]\nmod tests {\n use proto::admin;\n}\n";
        assert_eq!(product(text), "fn a() {}");
    }

    #[test]
    fn a_list_can_only_shrink() {
        assert!(compare(BTreeSet::from(["a", "b"]), &["a", "b"], "breaks it").is_empty());
        assert_eq!(
            compare(BTreeSet::from(["a", "b"]), &["a"], "breaks it"),
            ["b breaks it"]
        );
        let gone = compare(BTreeSet::from(["a"]), &["a", "b"], "breaks it");
        assert!(gone[0].starts_with("b is listed"), "{gone:?}");
    }
}
