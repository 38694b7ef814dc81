//! Building Baton's programs and running one of them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

/// The packages that make up an installed Baton.
const PROGRAMS: [&str; 4] = ["clusterd", "vmm", "storage-broker", "cli"];

/// The root of the workspace.
pub fn root() -> &'static Path {
    // xtask lies directly below it.
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

/// Where cargo puts what it builds.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// The cargo that runs this program. What the outer cargo said of this package is kept from the inner one: build scripts
/// of dependencies (ring's) look at it, and everything above them would be built again at each change of hands.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs a command to its end and fails when it fails.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {command:?}"))?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}

/// Says what to do where machines cannot run.
pub fn require_kvm() -> anyhow::Result<()> {
    use std::io::ErrorKind;
    match std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => bail!(
            "/dev/kvm is there but not for you: add yourself to its group (sudo usermod -aG kvm $USER, then log in again)"
        ),
        Err(error) => bail!(
            "/dev/kvm cannot be opened ({error}): switch on virtualisation in the firmware and load kvm_intel or kvm_amd; \
             in a virtual machine ask for nested virtualisation"
        ),
    }
}

/// Builds the programs in release mode and says where they lie.
pub fn programs() -> anyhow::Result<PathBuf> {
    let packages = PROGRAMS.iter().flat_map(|program| ["--package", program]);
    run(cargo().args(["build", "--release"]).args(packages))?;
    Ok(target_dir().join("release"))
}

/// Builds the programs for the tests, and the tests with them: together they need each dependency once, apart some twice,
/// since the tests' own ask for more of the features.
pub fn programs_and_tests() -> anyhow::Result<PathBuf> {
    run(cargo().args(["build", "--workspace", "--all-targets"]))?;
    Ok(target_dir().join("debug"))
}

/// Builds, in release mode or as for the tests, then runs `clusterctl demo` from there.
pub fn demo(dev: bool, args: &[String]) -> anyhow::Result<()> {
    require_kvm()?;
    let programs = if dev {
        programs_and_tests()?
    } else {
        programs()?
    };
    run(Command::new(programs.join("clusterctl"))
        .arg("demo")
        .args(args))
}
