//! Builds a measuring program in release mode and runs it.

use std::path::Path;
use std::process::Command;

use clap::{Args, ValueEnum};

use crate::build;

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
    let (package, program) = match args.name {
        Bench::Migrate => ("tests", "bench-migrate"),
        Bench::Raft => ("clusterd", "raft-bench"),
        Bench::Failover => ("tests", "bench-failover"),
        Bench::Network => ("tests", "bench-network"),
        Bench::Flood => ("tests", "bench-flood"),
        Bench::Tls => {
            // No machine runs: no programs to build, nothing to require of the host.
            let (programs, program) = (build::target_dir().join("release"), "bench-tls");
            build_release("tests", program)?;
            return build::run(Command::new(programs.join(program)).args(&args.args));
        }
        Bench::NfsTls => ("tests", "bench-nfs-tls"),
    };
    release_program(package, program, &args.args)
}

/// Runs the soak program.
pub fn soak(args: &[String]) -> anyhow::Result<()> {
    release_program("tests", "soak", args)
}

/// Runs the chaos program.
pub fn chaos(dev: bool, args: &[String]) -> anyhow::Result<()> {
    if !dev {
        return release_program("tests", "chaos", args);
    }
    build::require_kvm()?;
    let programs = build::programs_and_tests()?;
    run_beside(&programs, "chaos", args)
}

/// Runs a program of that package's name that needs no machine: optimised, with its assertions.
pub fn pure_program(package: &str, args: &[String]) -> anyhow::Result<()> {
    build::run(
        build::cargo()
            .args(["run", "--quiet", "--package", package, "--bin", package])
            .arg("--")
            .args(args),
    )
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
            .args(["test", "--quiet", "--package", "clusterd", "--lib"])
            .args(["raft::crash", "--", "--nocapture"])
            .env("BATON_CRASH_POINTS", args.points.to_string())
            .env("BATON_CRASH_SEED", args.seed.to_string()),
    )
}

fn release_program(package: &str, program: &str, args: &[String]) -> anyhow::Result<()> {
    build::require_kvm()?;
    let programs = build::programs()?;
    build_release(package, program)?;
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

fn build_release(package: &str, program: &str) -> anyhow::Result<()> {
    build::run(build::cargo().args(["build", "--release", "--package", package, "--bin", program]))
}
