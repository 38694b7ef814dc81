//! The pure sources read no clock, file, socket, environment or random number, and start no task; and what is replicated
//! is computed without floating point, whose results are the compiler's and the processor's own.

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

/// The lines of a source that compute with floating point.
fn floating_lines(text: &str) -> Vec<String> {
    let is_float = |word: &str| {
        let ends = ["f32", "f64"].iter().any(|float| word.ends_with(float));
        let number = word.trim_end_matches("f32").trim_end_matches("f64");
        ends && number.chars().all(|c| c.is_ascii_digit() || c == '_')
    };
    let words = |line: &str| {
        line.split(|c: char| !c.is_alphanumeric() && c != '_')
            .any(is_float)
    };
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim_start().starts_with("//") && words(line))
        .map(|(number, line)| format!("{}: {}", number + 1, line.trim()))
        .collect()
}

/// What `complain` says of the sources.
fn complaints(sources: Vec<PathBuf>, complain: fn(&str) -> Vec<String>) -> Vec<String> {
    let mut complaints = Vec::new();
    for path in sources {
        let text = fs::read_to_string(&path).unwrap_or_else(|error| {
            panic!("{}: {error}", path.display());
        });
        let lines = complain(&text).into_iter();
        complaints.extend(lines.map(|line| format!("{}:{line}", path.display())));
    }
    complaints
}

fn sources_of_the_model() -> Vec<PathBuf> {
    let mut found = Vec::new();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut found,
    );
    assert!(found.len() > 15, "only {} sources were found", found.len());
    found
}

/// The half of `migration-core` that decides, below its `src`: what it is told, and what it makes of it.
const POLICY: [&str; 4] = ["policy.rs", "pace.rs", "pages.rs", "stats.rs"];

fn sources_of_the_policy() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../migration-core/src");
    let mut found: Vec<PathBuf> = POLICY.iter().map(|name| folder.join(name)).collect();
    let inside = folder.join("policy");
    if inside.is_dir() {
        sources(&inside, &mut found);
    }
    found
}

#[test]
fn no_source_of_the_model_is_impure() {
    let complaints = complaints(sources_of_the_model(), impure_lines);
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn no_source_of_the_migrations_policy_is_impure() {
    let complaints = complaints(sources_of_the_policy(), impure_lines);
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn no_source_of_the_model_computes_with_floating_point() {
    let complaints = complaints(sources_of_the_model(), floating_lines);
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
    for float in ["load: f64,", "x as f32", "let x = 1_f64;", "let x = 2f32;"] {
        assert_eq!(floating_lines(float).len(), 1, "{float}");
    }
    assert!(floating_lines("let half64 = crc_f64x(0x1f64);").is_empty());
}
