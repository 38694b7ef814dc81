//! Every public function of the model has a production caller: a rule that only tests call has a twin that runs
//! instead of it.

use std::fs;
use std::path::{Path, PathBuf};

/// What production runs: not tests, not the simulation, not fuzzing.
const PRODUCTION: &[&str] = &[
    "cluster-model/src",
    "clusterd/src",
    "storage-broker/src",
    "vmm/src",
    "cli/src",
    "proto/src",
];

/// Decisions without a caller in production, and why each may stay.
const EXCEPTIONS: &[(&str, &str)] = &[
    (
        "changes",
        "a column of the table of calls, for whoever reads it; a test holds it against the methods",
    ),
    (
        "decide",
        "all safeguards, for tests and fuzzing; `Memory::look` decides under those of its life, in daemon and simulation",
    ),
    (
        "margin_ms",
        "what chaos holds late freezes against; the monitor compares its own bound with the smallest one as it is compiled",
    ),
    (
        "without",
        "leaves a safeguard out: for tests and the simulation's mutants; tests/safeguards.rs holds that no product does",
    ),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder of sources") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str());
        if path.is_dir() {
            if name != Some("tests") {
                sources(&path, found);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs")
            && !matches!(name, Some("tests.rs" | "testing.rs"))
        {
            found.push(path);
        }
    }
}

/// A source without its tests at the end, its comments and its attributes.
fn code(text: &str) -> String {
    let tests = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    text[..tests]
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .filter(|line| !line.trim_start().starts_with('#'))
        .collect::<Vec<_>>()
        .join("\n")
}

/// The public functions that a source defines.
fn public_functions(code: &str) -> Vec<String> {
    code.lines()
        .filter_map(|line| {
            let line = line.trim_start();
            let rest = line
                .strip_prefix("pub fn ")
                .or_else(|| line.strip_prefix("pub const fn "))?;
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_')?;
            Some(rest[..end].to_owned())
        })
        .collect()
}

/// Whether a source names that function otherwise than where it is defined.
fn calls(code: &str, function: &str) -> bool {
    code.match_indices(function).any(|(at, _)| {
        let part = |c: char| c.is_alphanumeric() || c == '_';
        let before = &code[..at];
        let after = &code[at + function.len()..];
        let whole = !before.ends_with(part) && !after.starts_with(part);
        // A call, a path handed on as a value, or the end of one; `use` alone is none.
        let used = after.trim_start().starts_with(['(', ')', ','])
            && (before.ends_with('.')
                || before.ends_with("::")
                || after.trim_start().starts_with('('));
        whole && used && !before.trim_end().ends_with("fn")
    })
}

#[test]
fn every_pure_decision_has_a_production_caller() {
    let mut found = Vec::new();
    for folder in PRODUCTION {
        sources(&root().join(folder), &mut found);
    }
    let production: Vec<String> = found
        .iter()
        .map(|path| code(&fs::read_to_string(path).expect("a source")))
        .collect();
    let mut model = Vec::new();
    sources(&root().join("cluster-model/src"), &mut model);
    let mut excepted = EXCEPTIONS.to_vec();
    let (mut decisions, mut complaints) = (0, Vec::new());
    for path in model {
        let text = fs::read_to_string(&path).expect("a source");
        for function in public_functions(&code(&text)) {
            decisions += 1;
            let place = excepted.iter().position(|(name, _)| *name == function);
            let called = production.iter().any(|code| calls(code, &function));
            match (called, place.map(|place| excepted.remove(place))) {
                (true, None) | (false, Some(_)) => {}
                (true, Some(_)) => complaints.push(format!(
                    "{function} has a caller: take it off the list of exceptions"
                )),
                (false, None) => complaints.push(format!(
                    "{}: {function} has no caller in production: delete it, or have it called where its twin runs",
                    path.display()
                )),
            }
        }
    }
    for (gone, _) in excepted {
        complaints.push(format!(
            "{gone} is gone: take it off the list of exceptions"
        ));
    }
    assert!(decisions > 100, "only {decisions} functions were found");
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn the_check_sees_what_it_is_for() {
    let source = "/// decide(x)\npub fn decide(x: u8) {}\nuse other::{decide};\n#[doc = \"decide(1)\"]\n#[cfg(test)]\nmod tests {\n    decide(2);\n}\n";
    let text = code(source);
    assert_eq!(public_functions(&text), ["decide"]);
    assert!(!calls(&text, "decide"), "{text}");
    for caller in [
        "let y = decide(3);",
        "model::decide(3)",
        "state.decide(3)",
        "map(Model::decide)",
    ] {
        assert!(calls(caller, "decide"), "{caller}");
    }
    for other in ["decided(3)", "undecide(3)", "fn decide(3)", "decide: 3"] {
        assert!(!calls(other, "decide"), "{other}");
    }
}
