//! `fuzz`: builds the libFuzzer programs, runs each for a while, and says what they reached and found.

#![forbid(unsafe_code)]

mod blind;
mod build;
mod corpus;
mod run;
mod select;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::{Context, bail};
use clap::Parser;
use fuzz::target::Target;
use fuzz::targets::TARGETS;
use run::Outcome;

/// Coverage-guided fuzzing of everything that is decoded.
#[derive(Debug, Parser)]
#[command(name = "fuzz", version)]
struct Args {
    /// How long each target is fuzzed, seconds
    #[arg(long, value_name = "N", default_value_t = 30)]
    seconds: u64,
    /// Without coverage and without a build of its own: the kept inputs, changed at random
    #[arg(long, conflicts_with_all = ["merge", "replay"])]
    blind: bool,
    /// What draws the changes of `--blind`; another one each time if none is given
    #[arg(long, value_name = "N", requires = "blind")]
    seed: Option<u64>,
    /// Only this target; may be repeated
    #[arg(long, value_name = "NAME")]
    target: Vec<String>,
    /// One JSON object instead of the table
    #[arg(long)]
    json: bool,
    /// Afterwards keep, in the repository's corpus, what reaches something new, and only that
    #[arg(long)]
    merge: bool,
    /// Run this one input and stop
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let targets = chosen(&args.target)?;
    if let Some(input) = &args.replay {
        let [target] = targets.as_slice() else {
            bail!("say whose input it is: --target NAME");
        };
        let input = std::fs::read(input).with_context(|| format!("reading {}", input.display()))?;
        target.check(&input);
        return Ok(ExitCode::SUCCESS);
    }
    let results = if args.blind {
        blindly(&targets, &args)?
    } else {
        guided(&targets, &args)?
    };
    if args.json {
        println!("{}", serde_json::to_string(&table::json(&results))?);
    } else {
        print!("{}", table::text(&results));
    }
    let found = results.iter().any(|result| !result.crashes.is_empty());
    Ok(if found {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// With libFuzzer's programs.
fn guided(targets: &[&Target], args: &Args) -> anyhow::Result<Vec<Outcome>> {
    let programs = build::programs(targets)?;
    let mut results = Vec::new();
    for target in targets {
        eprintln!("fuzzing {} for {} s", target.name, args.seconds);
        let result = run::fuzz(target, &programs, args.seconds)?;
        if args.merge && result.crashes.is_empty() {
            corpus::merge(target, &programs)?;
        }
        results.push(result);
    }
    Ok(results)
}

/// With nothing but this program.
fn blindly(targets: &[&Target], args: &Args) -> anyhow::Result<Vec<Outcome>> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let seed = args.seed.unwrap_or(since.as_nanos() as u64);
    eprintln!("fuzzing each target for {} s, --seed {seed}", args.seconds);
    blind::count_panics();
    let all = targets.iter();
    all.map(|target| blind::fuzz(target, args.seconds, seed))
        .collect()
}

/// The targets of these names; all of them when there are none.
fn chosen(names: &[String]) -> anyhow::Result<Vec<&'static Target>> {
    if names.is_empty() {
        return Ok(TARGETS.iter().collect());
    }
    let named = |name: &String| {
        let found = TARGETS.iter().find(|target| target.name == name);
        found.with_context(|| {
            let all: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            format!("there is no target `{name}`; there are {}", all.join(", "))
        })
    };
    names.iter().map(named).collect()
}
