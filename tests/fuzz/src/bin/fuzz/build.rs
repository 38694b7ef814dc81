//! Building the programs with coverage counters, on a stable compiler.
//!
//! These are the flags by which LLVM counts edges and shows libFuzzer what is compared with what. The address
//! sanitizer would need a nightly compiler; what it would find here can be in the modules with `unsafe` only.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use fuzz::target::Target;

/// Counters on every edge of every crate, and a table of where they are.
const RUSTFLAGS: [&str; 7] = [
    "--cfg",
    "fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Named, so that build scripts and macros, which run on this host, are built without counters.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// The programs, built.
#[derive(Debug)]
pub struct Programs {
    folder: PathBuf,
}

impl Programs {
    /// A target's.
    pub fn of(&self, target: &Target) -> PathBuf {
        self.folder.join(target.name)
    }
}

/// The folder of this crate.
pub fn crate_folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where everything that is made goes: `target/fuzz` of the repository.
pub fn made_folder() -> PathBuf {
    crate_folder().join("../../target/fuzz")
}

/// Builds the targets' programs.
pub fn programs(targets: &[&Target]) -> anyhow::Result<Programs> {
    let made = made_folder();
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(crate_folder().join("bins"))
        .args(["build", "--release", "--locked", "--target", TRIPLE])
        .arg("--target-dir")
        .arg(&made)
        .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"))
        .stdout(Stdio::from(std::io::stderr()));
    for target in targets {
        cargo.args(["--bin", target.name]);
    }
    let status = cargo.status().context("starting cargo")?;
    ensure!(
        status.success(),
        "the fuzz programs do not build; libFuzzer needs a C++ compiler (Debian: g++)"
    );
    Ok(Programs {
        folder: made.join(TRIPLE).join("release"),
    })
}
