//! What is said at the end: a line for each target, one that sums up, and how each find is run again.

use serde_json::{Value, json};

use crate::run::Outcome;

/// As a table.
pub fn text(outcomes: &[Outcome]) -> String {
    let heads = [
        "executions",
        "exec/s",
        "edges",
        "features",
        "corpus",
        "crashes",
    ];
    let mut out = line("target", &heads.map(str::to_owned));
    for outcome in outcomes {
        let figures = [
            outcome.executions,
            outcome.executions_per_s,
            outcome.edges,
            outcome.features,
            outcome.corpus,
            outcome.crashes.len() as u64,
        ];
        out.push_str(&line(
            &outcome.target,
            &figures.map(|figure| figure.to_string()),
        ));
    }
    for outcome in outcomes {
        for crash in &outcome.crashes {
            out.push_str(&format!("replay: {}\n", replay(&outcome.target, crash)));
        }
    }
    out + &sum(outcomes) + "\n"
}

fn line(target: &str, figures: &[String]) -> String {
    let columns: String = figures
        .iter()
        .map(|figure| format!("{figure:>12}"))
        .collect();
    format!("{target:<18}{columns}\n")
}

/// As one object.
pub fn json(outcomes: &[Outcome]) -> Value {
    let replays: Vec<String> = outcomes
        .iter()
        .flat_map(|outcome| {
            outcome
                .crashes
                .iter()
                .map(|crash| replay(&outcome.target, crash))
        })
        .collect();
    json!({ "targets": outcomes, "replay": replays, "summary": sum(outcomes) })
}

fn replay(target: &str, crash: &std::path::Path) -> String {
    let crash = crash.canonicalize().unwrap_or_else(|_| crash.to_owned());
    format!(
        "cargo xtask fuzz --target {target} --replay {}",
        crash.display()
    )
}

fn sum(outcomes: &[Outcome]) -> String {
    let executions: u64 = outcomes.iter().map(|outcome| outcome.executions).sum();
    let crashes: usize = outcomes.iter().map(|outcome| outcome.crashes.len()).sum();
    format!(
        "{} targets, {executions} executions, {crashes} crashes",
        outcomes.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_find_is_counted_and_comes_with_the_line_that_replays_it() {
        let outcome = Outcome {
            target: "rpc".into(),
            executions: 7,
            crashes: vec!["/nowhere/crash-1".into()],
            ..Outcome::default()
        };
        let text = text(&[outcome]);
        assert!(text.contains("cargo xtask fuzz --target rpc --replay /nowhere/crash-1\n"));
        assert!(
            text.ends_with("1 targets, 7 executions, 1 crashes\n"),
            "{text}"
        );
    }
}
