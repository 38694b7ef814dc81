//! What `protocol-model` prints.

use std::process::{Command, Output};

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

#[test]
fn the_last_line_of_a_table_sums_it_up() {
    let output = protocol_model(&["--mutants"]);
    assert!(output.status.success());
    let said = text(&output.stdout);
    assert_eq!(said.lines().last(), Some("24 of 24 mutants caught"));
}

#[test]
fn json_is_one_object_with_figures() {
    let output = protocol_model(&["--mutants", "--json"]);
    assert!(output.status.success());
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
    let figures = said["figures"].as_array().expect("figures");
    let caught = figures
        .iter()
        .find(|figure| figure["name"] == "mutants_caught");
    assert_eq!(caught.map(|figure| &figure["value"]), Some(&24.into()));
    assert_eq!(said["mutants"].as_array().map(Vec::len), Some(24));
}

#[test]
fn deep_bounds_are_not_for_mutants() {
    let output = protocol_model(&["--deep", "--mutants"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("cannot be used with"));
}
