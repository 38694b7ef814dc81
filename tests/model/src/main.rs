//! `protocol-model`: counts out every history within bounds, or shows what each rule is for.

use std::process::ExitCode;

use clap::Parser;
use protocol_model::{Bounds, Counterexample, DEEP, Mutant, Outcome, USUAL, exhaust, hunt};
use serde_json::{Value, json};

/// Checks the cutover and the storage fence in every order of their steps.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Larger bounds, for minutes instead of seconds.
    #[arg(long, conflicts_with = "mutants")]
    deep: bool,
    /// Leave out one rule after the other and find the shortest history that breaks; or one, with its history.
    #[arg(long, value_name = "MUTANT", num_args = 0..=1, ignore_case = true)]
    mutants: Option<Option<Mutant>>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let holds = match args.mutants {
        Some(Some(mutant)) => history(mutant, args.json),
        Some(None) => mutants(args.json),
        None => bounds(if args.deep { &DEEP } else { &USUAL }, args.json),
    };
    if holds {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn bounds(all: &[Bounds], json: bool) -> bool {
    if !json {
        println!(
            "{:<32} {:>4} {:>6} {:>6} {:>6} {:>6} {:>11} {:>11} {:>5} {:>7}  result",
            "bounds",
            "migr",
            "re-key",
            "renew",
            "faults",
            "writes",
            "states",
            "steps",
            "depth",
            "seconds"
        );
    }
    let mut outcomes = Vec::new();
    for &bounds in all {
        let outcome = exhaust(bounds, threads());
        if !json {
            row(&outcome);
        }
        outcomes.push(outcome);
    }
    let held = outcomes.iter().filter(|outcome| outcome.holds()).count();
    let states: usize = outcomes.iter().map(|outcome| outcome.states).sum();
    let seconds: f64 = outcomes.iter().map(|outcome| outcome.seconds).sum();
    if json {
        let of = format!("{} processors", threads());
        let checks: Vec<Value> = outcomes.iter().map(object).collect();
        let figures = json!([
            { "name": "states", "value": states, "unit": "1" },
            { "name": "seconds", "value": seconds, "unit": "s" },
            { "name": "bounds", "value": outcomes.len(), "unit": "1" },
            { "name": "violations", "value": outcomes.len() - held, "unit": "1" },
        ]);
        let all = json!({ "bench": "protocol-model", "machine": of, "figures": figures, "checks": checks });
        println!("{all}");
    } else {
        println!(
            "{held} of {} bounds hold: {states} states in {seconds:.1} s",
            outcomes.len()
        );
    }
    held == outcomes.len()
}

fn row(outcome: &Outcome) {
    let bounds = outcome.bounds;
    let result = if outcome.holds() {
        format!("holds, reached {}", outcome.reached)
    } else {
        "BROKEN".to_owned()
    };
    println!(
        "{:<32} {:>4} {:>6} {:>6} {:>6} {:>6} {:>11} {:>11} {:>5} {:>7.1}  {result}",
        bounds.name,
        bounds.migrations,
        bounds.rekeys,
        bounds.renewals,
        bounds.faults,
        bounds.writes,
        outcome.states,
        outcome.steps,
        outcome.depth,
        outcome.seconds,
    );
    for broken in &outcome.broken {
        println!("{broken}");
    }
    for name in &outcome.unreached {
        println!("     never reached: {name}");
    }
}

fn object(outcome: &Outcome) -> Value {
    let bounds = outcome.bounds;
    let broken: Vec<Value> = outcome.broken.iter().map(counterexample).collect();
    json!({
        "bounds": bounds.name,
        "migrations": bounds.migrations,
        "rekeys": bounds.rekeys,
        "renewals": bounds.renewals,
        "faults": bounds.faults,
        "writes": bounds.writes,
        "leases_hold": bounds.leases_hold,
        "states": outcome.states,
        "steps": outcome.steps,
        "depth": outcome.depth,
        "seconds": outcome.seconds,
        "holds": outcome.holds(),
        "broken": broken,
        "reached": outcome.reached,
        "unreached": outcome.unreached,
    })
}

fn counterexample(found: &Counterexample) -> Value {
    let steps: Vec<String> = found.steps.iter().map(ToString::to_string).collect();
    json!({ "property": found.property, "length": steps.len(), "steps": steps })
}

fn mutants(json: bool) -> bool {
    let hunted: Vec<(Mutant, Option<Counterexample>)> = Mutant::ALL
        .into_iter()
        .map(|mutant| (mutant, hunt(mutant)))
        .collect();
    let caught = hunted.iter().filter(|(_, found)| found.is_some()).count();
    if json {
        let mutants: Vec<Value> = hunted.iter().map(|(mutant, found)| {
            json!({ "mutant": format!("{mutant:?}"), "counterexample": found.as_ref().map(counterexample) })
        }).collect();
        let of = format!("{} processors", threads());
        let figures = json!([
            { "name": "mutants", "value": hunted.len(), "unit": "1" },
            { "name": "mutants_caught", "value": caught, "unit": "1" },
        ]);
        let all = json!({ "bench": "protocol-model mutants", "machine": of, "figures": figures, "mutants": mutants });
        println!("{all}");
        eprint!("{}", table(&hunted));
    } else {
        print!("{}", table(&hunted));
    }
    caught == hunted.len()
}

/// A line for each mutant, and one that sums up.
fn table(hunted: &[(Mutant, Option<Counterexample>)]) -> String {
    let mut out = format!("{:<30} {:>5}  what breaks\n", "mutant", "steps");
    for (mutant, found) in hunted {
        let name = format!("{mutant:?}");
        out += &match found {
            Some(found) => format!("{name:<30} {:>5}  {}\n", found.steps.len(), found.property),
            None => format!("{name}: MISSED\n"),
        };
    }
    let caught = hunted.iter().filter(|(_, found)| found.is_some()).count();
    out + &format!("{caught} of {} mutants caught\n", hunted.len())
}

fn history(mutant: Mutant, json: bool) -> bool {
    let found = hunt(mutant);
    match &found {
        Some(found) if json => {
            let name = format!("{mutant:?}");
            println!(
                "{}",
                json!({ "mutant": name, "counterexample": counterexample(found) })
            );
        }
        Some(found) => println!(
            "{found}\n{mutant:?} is caught in {} steps",
            found.steps.len()
        ),
        None if Mutant::SPARE.contains(&mutant) => {
            println!("{mutant:?} breaks nothing: the other rules make up for it");
            return true;
        }
        None => eprintln!("{mutant:?}: MISSED"),
    }
    found.is_some()
}
