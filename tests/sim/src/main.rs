//! `sim`: thousands of histories from seeds, or one of them with its timeline.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use sim::{Mutant, World};

/// Simulates clusters from seeds and checks what must hold.
#[derive(Parser)]
struct Args {
    /// How many seeds.
    #[arg(long, default_value_t = 1_000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Replay this one seed and print its timeline.
    #[arg(long)]
    seed: Option<u64>,
    /// Break something on purpose (with --seed), or everything in turn.
    #[arg(long, num_args = 0..=1, default_missing_value = "all")]
    mutants: Option<String>,
    /// Seeds within which each mutant must be caught.
    #[arg(long, default_value_t = 10_000)]
    within: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn mutant(name: &str) -> Option<Mutant> {
    Mutant::ALL
        .into_iter()
        .find(|mutant| format!("{mutant:?}").eq_ignore_ascii_case(name))
}

fn main() -> ExitCode {
    let args = Args::parse();
    // An assertion of the code under test is a violation like any other, and is reported as one.
    std::panic::set_hook(Box::new(|_| {}));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    if let Some(seed) = args.seed {
        return replay(seed, args.mutants.as_deref().and_then(mutant));
    }
    match args.mutants.as_deref() {
        Some("all") => mutants(&Mutant::ALL, args.within, threads),
        Some(name) => match mutant(name) {
            Some(one) => mutants(&[one], args.within, threads),
            None => {
                eprintln!("there is no mutant {name}; there are {:?}", Mutant::ALL);
                ExitCode::FAILURE
            }
        },
        None => seeds(&args, threads),
    }
}

fn replay(seed: u64, mutant: Option<Mutant>) -> ExitCode {
    let mut world = World::new(seed, mutant, true);
    world.run_caught();
    let mut out = std::io::stdout().lock();
    for (at, line) in &world.timeline {
        // A reader that has seen enough closes the pipe.
        if writeln!(out, "{:>10.3} s  {line}", *at as f64 / 1e6).is_err() {
            break;
        }
    }
    drop(out);
    match world.violation {
        Some(violation) => {
            println!("seed {seed}: {violation}");
            ExitCode::FAILURE
        }
        None => {
            println!("seed {seed}: nothing violated; {:?}", world.counts);
            ExitCode::SUCCESS
        }
    }
}

/// Runs seeds on all threads until one violates something, a mutant's what it is there to break; gives the first such
/// seed.
fn search(
    first: u64,
    count: u64,
    mutant: Option<Mutant>,
    threads: usize,
    each: &(dyn Fn(&World) + Sync),
) -> Option<(u64, String)> {
    let next = AtomicU64::new(first);
    let found: Mutex<Option<(u64, String)>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    let mut world = World::new(seed, mutant, false);
                    world.run_caught();
                    each(&world);
                    if let Some(violation) = world.violation
                        && mutant.is_none_or(|mutant| mutant.is_caught_by(&violation))
                        && let Ok(mut found) = found.lock()
                    {
                        if found.as_ref().is_none_or(|(known, _)| seed < *known) {
                            *found = Some((seed, violation));
                        }
                        next.store(first + count, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    found.into_inner().ok().flatten()
}

#[derive(Default)]
struct Sums {
    seeds: AtomicU64,
    events: AtomicU64,
    faults: AtomicU64,
    cutovers: AtomicU64,
    aborts: AtomicU64,
    losses: AtomicU64,
    flushes: AtomicU64,
    simulated_us: AtomicU64,
}

fn seeds(args: &Args, threads: usize) -> ExitCode {
    let begun = Instant::now();
    let sums = Sums::default();
    let tick = |world: &World| {
        let add = |sum: &AtomicU64, n: u64| sum.fetch_add(n, Ordering::Relaxed);
        add(&sums.events, world.counts.events);
        add(&sums.faults, world.counts.faults);
        add(&sums.cutovers, world.counts.cutovers);
        add(&sums.aborts, world.counts.aborts);
        add(&sums.losses, world.counts.losses);
        add(&sums.flushes, world.counts.flushes);
        add(&sums.simulated_us, world.now);
        let done = add(&sums.seeds, 1) + 1;
        if done % 1_000 == 0 {
            eprintln!("{done} seeds");
        }
    };
    let found = search(args.first, args.seeds, None, threads, &tick);
    let get = |sum: &AtomicU64| sum.load(Ordering::Relaxed);
    let took = begun.elapsed().as_secs_f64();
    let (seeds, hours) = (get(&sums.seeds), get(&sums.simulated_us) as f64 / 3.6e9);
    let line = format!(
        "{seeds} seeds in {took:.1} s ({:.0} a second, {:.2} simulated hours a second): {} events, {} faults, {} cutovers, {} aborts, {} nodes lost, {} flushes",
        seeds as f64 / took,
        hours / took,
        get(&sums.events),
        get(&sums.faults),
        get(&sums.cutovers),
        get(&sums.aborts),
        get(&sums.losses),
        get(&sums.flushes),
    );
    if args.json {
        let figure = |name: &str, value: f64, unit: &str| serde_json::json!({ "name": name, "value": value, "unit": unit });
        println!(
            "{}",
            serde_json::json!({ "bench": "sim", "machine": format!("{threads} processors"), "figures": [
                figure("seeds", seeds as f64, "1"),
                figure("seeds_per_second", seeds as f64 / took, "1/s"),
                figure("simulated_hours_per_second", hours / took, "h/s"),
                figure("faults", get(&sums.faults) as f64, "1"),
                figure("cutovers", get(&sums.cutovers) as f64, "1"),
                figure("violations", f64::from(u8::from(found.is_some())), "1"),
            ]})
        );
    }
    match found {
        Some((seed, violation)) => {
            eprintln!("{line}");
            eprintln!("seed {seed}: {violation}");
            eprintln!("replay it: cargo xtask sim --seed {seed}");
            ExitCode::FAILURE
        }
        None => {
            eprintln!("{line}; no violation");
            ExitCode::SUCCESS
        }
    }
}

fn mutants(which: &[Mutant], within: u64, threads: usize) -> ExitCode {
    let mut missed = 0;
    for &mutant in which {
        let begun = Instant::now();
        match search(1, within, Some(mutant), threads, &|_| {}) {
            Some((seed, violation)) => println!(
                "caught  {mutant:?} at seed {seed} in {:.1} s: {violation}",
                begun.elapsed().as_secs_f64()
            ),
            None => {
                missed += 1;
                println!(
                    "MISSED  {mutant:?} within {within} seeds: nothing broke \"{}\"",
                    mutant.harm().join("\" or \"")
                );
            }
        }
    }
    println!(
        "{} of {} mutants caught within {within} seeds each",
        which.len() - missed,
        which.len()
    );
    match missed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
