//! What `protocol-model` prints.

use std::process::{Command, Output};

use protocol_model::Mutant;

fn protocol_model(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_protocol-model"))
        .args(args)
        .output()
        .expect("protocol-model starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_mutant_that_does_not_exist_is_answered_with_those_that_do() {
    let output = protocol_model(&["--mutants", "NoSuch"]);
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output.stderr);
    assert!(
        said.contains("NoSuch") && said.contains("NoSettle"),
        "{said}"
    );
}

#[test]
fn a_mutants_history_ends_with_what_it_breaks() {
    let output = protocol_model(&["--mutants", "nosettle"]);
    assert!(output.status.success());
    let said = text(&output.stdout);
    let last: Vec<&str> = said.lines().rev().take(2).collect();
    assert_eq!(last[0], "NoSettle is caught in 12 steps");
    assert!(last[1].contains("broken: no write lands after"), "{said}");
}

/// No rule needs a longer history than this to be missed.
const STEPS_MAX: u64 = 30;

/// One hunt for all of them, which takes a while: every rule of the protocol is needed, without it a history breaks
/// what it is there for.
#[test]
fn every_rule_is_missed_when_it_is_left_out_and_table_and_figures_say_so() {
    let output = protocol_model(&["--mutants", "--json"]);
    assert!(output.status.success());
    let table = text(&output.stderr);
    assert_eq!(table.lines().last(), Some("24 of 24 mutants caught"));
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
    let figures = said["figures"].as_array().expect("figures");
    let caught = figures
        .iter()
        .find(|figure| figure["name"] == "mutants_caught");
    assert_eq!(caught.map(|figure| &figure["value"]), Some(&24.into()));
    let mutants = said["mutants"].as_array().expect("mutants");
    assert_eq!(mutants.len(), Mutant::ALL.len());
    for (rule, said) in Mutant::ALL.into_iter().zip(mutants) {
        assert_eq!(said["mutant"], format!("{rule:?}"));
        let found = &said["counterexample"];
        assert_eq!(found["property"], rule.harm(), "{rule:?}");
        let length = found["length"].as_u64().expect("a length");
        assert!((1..=STEPS_MAX).contains(&length), "{rule:?}: {length}");
    }
}

#[test]
fn deep_bounds_are_not_for_mutants() {
    let output = protocol_model(&["--deep", "--mutants"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("cannot be used with"));
}
