//! `clusterctl`, the command line of Baton.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    clusterctl::main()
}
