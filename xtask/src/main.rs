//! Baton's own chores. `cargo xtask demo` and `cargo xtask test` are the two that everybody needs.

mod bench;
mod build;
mod edges;
mod git;
mod guest;
mod layers;
mod long;
mod retries;
mod test;
mod times;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Baton's chores", disable_help_subcommand = true)]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Build the programs and run the demo: three nodes, real machines, a migration, a drain, a failover.
    Demo {
        /// With a release build, instead of the programs that the tests use (assertions on, less optimised).
        #[arg(long)]
        release: bool,
        /// Given to `clusterctl demo`, for example `--json`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run the tests. With --all also those that need root and packages; there a SKIPPED is a failure.
    Test(test::TestArgs),
    /// Build all programs and tests, as `test` does before it runs them.
    Build,
    /// Check what is depended on: bans, licences, sources, lock files (needs cargo-deny).
    Dependencies,
    /// Build a guest image: `linux`.
    Guest(guest::GuestArgs),
    /// Check what ARCHITECTURE.md says of the sources: which crate depends on which, where prost types are named and
    /// where connections are made, how tests say that they were skipped, and which suites may be tried again.
    Layers,
    /// Measure: `migrate`, `raft`, `failover`, `network`, `flood`, `tls`, `nfs-tls`.
    Bench(bench::BenchArgs),
    /// Simulate clusters from seeds: `--seeds 10000`, `--seed 7` replays one, `--mutants` breaks things on purpose;
    /// `--first commit` begins at a seed that is this commit's own.
    Sim {
        /// Given to the simulation.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Check the protocol of ownership and cutover in every order of its steps: `--mutants`, `--deep`, `--json`.
    Model {
        /// Given to the model checker.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Put faults into a real cluster in network namespaces (needs root): `--minutes 30`, `--nodes 5`, `--server ganesha`.
    Chaos {
        /// With the programs that the tests use (assertions on, less optimised) instead of a release build.
        #[arg(long)]
        dev: bool,
        /// Given to the chaos program.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Feed what takes bytes from outside with libFuzzer: `--seconds 30` for each target, `--target nfs_reply`;
    /// `--blind` without libFuzzer and its build.
    Fuzz {
        /// Given to the runner.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Lose power at every operation of a simulated disk under the Raft log: `--points 12000`, `--seed 1`.
    Crash(bench::CrashArgs),
    /// Try what somebody outside, a stranger's cluster, a learner taken over and people with small tokens would try;
    /// as root it listens on the wire too.
    Attack,
    /// Migrate and fail over again and again, and let the guests check themselves.
    Soak {
        /// Given to the soak program, for example `--migrations 200 --failovers 20`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run one suite of the long tier in full and record it in docs/long-runs.md; without a name list them.
    Long(long::LongArgs),
    /// Run a step of `.ci/run` and keep what it took.
    Step(times::StepArgs),
    /// Begin or end the measuring of `.ci/run`: a table of its steps beside their budgets.
    Times {
        /// Which.
        #[command(subcommand)]
        what: times::TimesArgs,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    match Args::parse().chore {
        Chore::Step(args) => return times::step(&args),
        Chore::Times { what } => return times::run(what),
        Chore::Demo { release, args } => build::demo(release, &args),
        Chore::Build => build::programs_and_tests().map(drop),
        Chore::Dependencies => build::dependencies(),
        Chore::Test(args) => test::run(&args),
        Chore::Guest(args) => guest::run(&args),
        Chore::Layers => layers::run()
            .and_then(|()| edges::run())
            .and_then(|()| retries::allowed().map(drop)),
        Chore::Bench(args) => bench::run(&args),
        Chore::Sim { args } => bench::sim(&args),
        Chore::Model { args } => bench::pure_program("protocol-model", &args),
        Chore::Chaos { dev, args } => bench::chaos(dev, &args),
        Chore::Fuzz { args } => bench::pure_program("fuzz", &args),
        Chore::Crash(args) => bench::crash(&args),
        Chore::Attack => test::attack(),
        Chore::Soak { args } => bench::soak(&args),
        Chore::Long(args) => long::run(&args),
    }?;
    Ok(ExitCode::SUCCESS)
}
