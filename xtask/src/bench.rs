//! Builds a program that measures or tries, and runs it.

use std::path::Path;
use std::process::Command;

use clap::{Args, ValueEnum};

use crate::build::{self, Profile};
use crate::git;

/// Flags of `cargo xtask bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// What to measure.
    name: Bench,
    /// Given to the program; `--json` prints one JSON object on stdout.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// What can be measured.
#[derive(Clone, Copy, ValueEnum)]
enum Bench {
    /// Live migration of a 1 GiB machine between two nodes: throughput and blackout.
    Migrate,
    /// Commit latency of three durable nodes beside one fdatasync.
    Raft,
    /// From the kill of a node to its machines running elsewhere.
    Failover,
    /// What a TCP peer of a Linux guest sees of a migration (needs root).
    Network,
    /// What a flood of strangers' connections costs commits and heartbeats.
    Flood,
    /// What TLS costs the memory stream, over loopback; needs no KVM.
    Tls,
    /// What TLS costs the NFS data path: writes a second and MB/s beside plain TCP.
    NfsTls,
}

/// Runs one.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let program = match args.name {
        Bench::Migrate => "bench-migrate",
        Bench::Raft => "bench-raft",
        Bench::Failover => "bench-failover",
        Bench::Network => "bench-network",
        Bench::Flood => "bench-flood",
        Bench::Tls => {
            // No machine runs: nothing else to build, nothing to require of the host.
            let programs = build::programs(Profile::Release, &["bench-tls"])?;
            return run_beside(&programs, "bench-tls", &args.args);
        }
        Bench::NfsTls => "bench-nfs-tls",
    };
    with_machines(Profile::Release, program, &args.args)
}

/// Runs the soak program.
pub fn soak(args: &[String]) -> anyhow::Result<()> {
    with_machines(Profile::Release, "soak", args)
}

/// Runs the chaos program.
pub fn chaos(dev: bool, args: &[String]) -> anyhow::Result<()> {
    let profile = if dev { Profile::Dev } else { Profile::Release };
    with_machines(profile, "chaos", args)
}

/// Runs a program that needs no machine: with its assertions, and optimised where its package says so.
pub fn pure_program(program: &str, args: &[String]) -> anyhow::Result<()> {
    let programs = build::programs(Profile::Dev, &[program])?;
    run_beside(&programs, program, args)
}

/// Seeds that a landing tries: other ones for each commit, since the same ones find what they find once.
pub fn sim(args: &[String]) -> anyhow::Result<()> {
    let mut args = args.to_vec();
    for at in 1..args.len() {
        if args[at - 1] == "--first" && args[at] == "commit" {
            args[at] = first_seed(git::head().as_deref()).to_string();
            eprintln!("the first seed is this commit's: {}", args[at]);
        }
    }
    pure_program("sim", &args)
}

/// The first six digits of a commit's name, far apart for any two commits; 1 where there is none.
fn first_seed(commit: Option<&str>) -> u64 {
    commit
        .and_then(|commit| u64::from_str_radix(commit.get(..6)?, 16).ok())
        .map_or(1, |digits| digits * 10_000 + 1)
}

/// What the crashes of the Raft store take.
#[derive(clap::Args)]
pub struct CrashArgs {
    /// Operations of the disk at which power fails or an error comes.
    #[arg(long, default_value_t = 12_000, value_parser = clap::value_parser!(u64).range(1..))]
    points: u64,
    /// The first history's seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Runs the crashes of the Raft store, the faults put in on purpose, and the damage at rest.
pub fn crash(args: &CrashArgs) -> anyhow::Result<()> {
    build::run(
        build::cargo()
            .args(["test", "--quiet", "--workspace", "--lib"])
            .args(["raft::crash", "--", "--nocapture"])
            .env("BATON_CRASH_POINTS", args.points.to_string())
            .env("BATON_CRASH_SEED", args.seed.to_string()),
    )
}

/// Builds one of the programs that start all others, and those, and runs it.
fn with_machines(profile: Profile, program: &str, args: &[String]) -> anyhow::Result<()> {
    build::require_kvm()?;
    let programs = build::installed_and(profile, program)?;
    run_beside(&programs, program, args)
}

/// Runs one of `programs`, which starts the others.
fn run_beside(programs: &Path, program: &str, args: &[String]) -> anyhow::Result<()> {
    build::run(
        Command::new(programs.join(program))
            .args(args)
            .env("BATON_PROGRAMS", programs),
    )
}

#[cfg(test)]
mod tests {
    use super::first_seed;

    #[test]
    fn each_commit_has_seeds_of_its_own() {
        assert_eq!(first_seed(Some("00000a89ab")), 100_001);
        assert_eq!(first_seed(Some("00000b89ab")), 110_001);
        assert_eq!(first_seed(Some("not")), 1);
        assert_eq!(first_seed(None), 1);
    }
}
