//! The crate reads no clock, file, socket, environment or random number, and starts no task.

use std::fs;
use std::path::{Path, PathBuf};

/// What a pure source does not say. Split so that this file does not say it either.
const BANNED: &[(&str, &str)] = &[
    ("System", "Time"),
    ("Instant::", "now"),
    ("time::", "Instant"),
    ("std::", "fs"),
    ("std::", "net"),
    ("std::", "env"),
    ("std::", "process"),
    ("std::", "thread"),
    ("thread::", "spawn"),
    ("tok", "io::"),
    ("ra", "nd::"),
    ("get", "random"),
    ("Hash", "Map"),
    ("Hash", "Set"),
    ("println", "!"),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The lines of a source that break the rule.
fn impure_lines(text: &str) -> Vec<String> {
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
        .filter(|(_, line)| {
            BANNED
                .iter()
                .any(|(head, tail)| line.contains(&format!("{head}{tail}")))
        })
        .map(|(number, line)| format!("{}: {}", number + 1, line.trim()))
        .collect()
}

#[test]
fn no_source_of_the_model_is_impure() {
    let mut found = Vec::new();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut found,
    );
    assert!(found.len() > 15, "only {} sources were found", found.len());
    let mut complaints = Vec::new();
    for path in found {
        let text = fs::read_to_string(&path).expect("a source");
        complaints.extend(
            impure_lines(&text)
                .into_iter()
                .map(|line| format!("{}:{line}", path.display())),
        );
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn the_check_sees_what_it_is_for() {
    let clock = format!("let now = std::time::{}::now();", "Instant");
    let random = format!("let x = {}::random();", "rand");
    let comment = format!("// {clock}");
    assert_eq!(impure_lines(&clock).len(), 1);
    assert_eq!(impure_lines(&random).len(), 1);
    assert!(impure_lines(&comment).is_empty());
}
