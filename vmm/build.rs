//! Builds the self-checking guest with the compiler that builds the monitor: a static program for the host's target,
//! without a standard library, linked by `guest/link.ld` where the monitor loads it.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// Needed on every host: an optimised program, since it checks memory at memory speed, and one without unwinding
/// tables, since nothing in the guest could use them.
const CODEGEN: [&str; 9] = [
    "panic=abort",
    "opt-level=3",
    "codegen-units=1",
    "lto=fat",
    "relocation-model=static",
    "code-model=small",
    "force-unwind-tables=no",
    "strip=symbols",
    "default-linker-libraries=no",
];

const LINKER: [&str; 6] = [
    "-nostartfiles",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,-z,max-page-size=4096",
];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=guest");
    let variable = |name: &str| PathBuf::from(env::var_os(name).unwrap_or_default());
    let source = variable("CARGO_MANIFEST_DIR").join("guest");
    let output = variable("OUT_DIR").join("selfcheck-guest.elf");
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc
        .args([
            "--edition",
            "2024",
            "--crate-name",
            "selfcheck_guest",
            "--crate-type",
            "bin",
        ])
        .args(["--target", "x86_64-unknown-linux-gnu", "-D", "warnings"])
        .args(CODEGEN.iter().flat_map(|option| ["-C", option]))
        .args(
            LINKER
                .iter()
                .flat_map(|option| ["-C".to_owned(), format!("link-arg={option}")]),
        )
        .arg("-C")
        .arg(format!(
            "link-arg=-Wl,-T,{}",
            source.join("link.ld").display()
        ))
        .arg("-o")
        .arg(&output)
        .arg(source.join("main.rs"));
    match rustc.status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(status) => {
            println!("cargo::error=the self-checking guest does not build ({status})");
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("cargo::error=cannot run the compiler for the self-checking guest: {error}");
            ExitCode::FAILURE
        }
    }
}
