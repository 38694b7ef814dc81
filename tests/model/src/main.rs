//! Checks the model and prints what was explored; with `--mutants` what is broken on purpose and must be found.

use clap::Parser;
use protocol_model::{Bounds, Mutant, Protocol, SMALL, Verdict, worlds};
use serde_json::json;

/// Checks the protocol of ownership, leases and cutover in every order of its steps, within bounds.
#[derive(Parser)]
struct Args {
    /// Break the protocol on purpose, in each way there is, and show the shortest history that proves it.
    #[arg(long)]
    mutants: bool,
    /// Larger bounds; takes tens of minutes and several GiB.
    #[arg(long)]
    deep: bool,
    /// States to look at in each world at most.
    #[arg(long, default_value_t = 60_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    states: u64,
    /// Print one JSON object on stdout.
    #[arg(long)]
    json: bool,
}

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    let most = usize::try_from(args.states).unwrap_or(usize::MAX);
    let good = match args.mutants {
        true => mutants(&args, most),
        false => check(&args, most),
    };
    match good {
        true => std::process::ExitCode::SUCCESS,
        false => std::process::ExitCode::FAILURE,
    }
}

fn words(bounds: &Bounds) -> String {
    format!(
        "{} clocks, {} writes, {} re-keys, {} losses, {} crashes, {} aborts, {} lapses",
        if bounds.clocks { "right" } else { "wrong" },
        bounds.writes,
        bounds.rekeys,
        bounds.losses,
        bounds.crashes,
        bounds.aborts,
        bounds.lapses
    )
}

fn tell(violation: &(&'static str, Vec<protocol_model::Step>)) {
    eprintln!("  violated: {}", violation.0);
    for (nth, step) in violation.1.iter().enumerate() {
        eprintln!("  {:3}  {step:?}", nth + 1);
    }
}

fn check(args: &Args, most: usize) -> bool {
    let (mut states, mut seconds, mut violations, mut all) = (0, 0.0, 0, Vec::new());
    let mut exhaustive = true;
    for bounds in worlds(args.deep) {
        let verdict = Protocol {
            bounds,
            mutant: None,
        }
        .check(most);
        states += verdict.states;
        seconds += verdict.took.as_secs_f64();
        exhaustive &= verdict.exhaustive;
        eprintln!(
            "{:>10} states, {} steps deep, {:6.1} s{}  {}",
            verdict.states,
            verdict.depth,
            verdict.took.as_secs_f64(),
            if verdict.exhaustive {
                ""
            } else {
                " (cut short)"
            },
            words(&bounds)
        );
        if let Some(violation) = &verdict.violation {
            violations += 1;
            tell(violation);
        } else if !verdict.never.is_empty() {
            violations += 1;
            eprintln!("  never reached: {}", verdict.never.join("; "));
        }
        all.push(world(&bounds, &verdict));
    }
    if args.json {
        let object = json!({ "worlds": all, "states": states, "seconds": seconds, "violations": violations, "exhaustive": exhaustive });
        println!("{object}");
    } else {
        println!(
            "{states} states in {seconds:.1} s, {}: {violations} violations",
            if exhaustive {
                "every one within the bounds"
            } else {
                "cut short"
            }
        );
    }
    violations == 0
}

fn world(bounds: &Bounds, verdict: &Verdict) -> serde_json::Value {
    json!({
        "bounds": words(bounds),
        "states": verdict.states,
        "depth": verdict.depth,
        "seconds": verdict.took.as_secs_f64(),
        "exhaustive": verdict.exhaustive,
        "violated": verdict.violation.as_ref().map(|violation| violation.0),
        "never": verdict.never,
    })
}

fn mutants(args: &Args, most: usize) -> bool {
    let mut found = Vec::new();
    for mutant in Mutant::ALL {
        let caught = protocol_model::catch(mutant, most);
        match &caught {
            Some((bounds, verdict, violation)) => eprintln!(
                "{mutant:?}: {} after {} steps ({} states; {})",
                violation.0,
                violation.1.len(),
                verdict.states,
                words(bounds)
            ),
            None => eprintln!("{mutant:?}: NOT FOUND"),
        }
        found.push((mutant, caught));
    }
    let caught = found.iter().filter(|(_, caught)| caught.is_some()).count();
    if args.json {
        let mutants: Vec<_> = found
            .iter()
            .map(|(mutant, caught)| {
                json!({
                    "mutant": format!("{mutant:?}"),
                    "violated": caught.as_ref().map(|(.., violation)| violation.0),
                    "steps": caught.as_ref().map(|(.., violation)| violation.1.len()),
                })
            })
            .collect();
        println!("{}", json!({ "mutants": mutants, "caught": caught }));
    } else {
        println!("{caught} of {} mutants found", found.len());
    }
    // The protocol itself stands in the same bounds.
    let stands = [SMALL, wrong(SMALL)].into_iter().all(|bounds| {
        let whole = Protocol {
            bounds,
            mutant: None,
        };
        whole.check(most).violation.is_none()
    });
    stands && caught == found.len()
}

fn wrong(bounds: Bounds) -> Bounds {
    Bounds {
        clocks: false,
        ..bounds
    }
}
