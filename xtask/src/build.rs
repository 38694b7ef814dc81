//! Building Baton's programs and running one of them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};

/// The programs that make up an installed Baton.
const PROGRAMS: [&str; 4] = ["clusterd", "vmm", "storage-broker", "clusterctl"];

/// The root of the workspace.
pub fn root() -> &'static Path {
    // xtask lies directly below it.
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

/// Where cargo puts what it builds: absolute, since neither cargo nor what it runs is started where this program was.
pub fn target_dir() -> PathBuf {
    let here = std::env::current_dir().unwrap_or_else(|_| root().into());
    target_below(std::env::var_os(TARGET_DIR), &here)
}

const TARGET_DIR: &str = "CARGO_TARGET_DIR";

/// As cargo reads it: a relative folder is below the one in which cargo was started.
fn target_below(named: Option<OsString>, here: &Path) -> PathBuf {
    match named.filter(|named| !named.is_empty()) {
        Some(named) => here.join(named),
        None => root().join("target"),
    }
}

/// The cargo that runs this program. What the outer cargo said of this package is kept from the inner one: build scripts
/// of dependencies (ring's) look at it, and everything above them would be built again at each change of hands.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // The root is not where the outer cargo was started, and it must not build into another folder than that one.
    command.current_dir(root()).env(TARGET_DIR, target_dir());
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

/// What all builds have in common. Whatever is built, the features of what it depends on are those of the whole
/// workspace *with its tests*, so that nothing is built a second time with fewer of them: cargo takes the tests' own
/// dependencies into account as soon as an example, of which there are none, is among what is asked for.
const SAME_FEATURES: [&str; 2] = ["--workspace", "--examples"];

/// How a program is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// As for the tests: with its assertions, a little optimised.
    Dev,
    /// As it is installed.
    Release,
}

impl Profile {
    fn folder(self) -> PathBuf {
        target_dir().join(match self {
            Profile::Dev => "debug",
            Profile::Release => "release",
        })
    }
}

/// Builds some programs, and what they need alone; says where they lie.
pub fn programs(profile: Profile, names: &[&str]) -> anyhow::Result<PathBuf> {
    let mut command = cargo();
    command.arg("build").args(SAME_FEATURES);
    if profile == Profile::Release {
        command.arg("--release");
    }
    for name in names {
        command.args(["--bin", name]);
    }
    if names.iter().any(|name| is_long(name)) {
        command.args(["--features", LONG]);
    }
    run(&mut command)?;
    Ok(profile.folder())
}

/// Programs that only the long tier runs are built when they are asked for by name, with this feature.
pub const LONG: &str = "tests/long";

fn is_long(program: &str) -> bool {
    program == "soak" || program.starts_with("bench-")
}

/// The programs of an installed Baton and one that starts them, built.
pub fn installed_and(profile: Profile, starter: &str) -> anyhow::Result<PathBuf> {
    let names: Vec<&str> = PROGRAMS.into_iter().chain([starter]).collect();
    programs(profile, &names)
}

/// Builds the programs for the tests, and the tests with them.
pub fn programs_and_tests() -> anyhow::Result<PathBuf> {
    // Not `--all-targets`, with which cargo makes tests of programs that have none.
    run(cargo().args(["build", "--workspace", "--lib", "--bins", "--tests"]))?;
    Ok(Profile::Dev.folder())
}

/// Checks what is depended on, its licences, where it comes from, and both lock files.
pub fn dependencies() -> anyhow::Result<()> {
    run(cargo()
        .args(["deny", "--log-level", "error", "check"])
        .args(["bans", "licenses", "sources"]))?;
    // The fuzz programs are a workspace of their own; its lock file follows the other by hand.
    let bins = root().join("tests/fuzz/bins/Cargo.toml");
    run(cargo()
        .args([
            "metadata",
            "--locked",
            "--format-version",
            "1",
            "--manifest-path",
        ])
        .arg(bins)
        .stdout(Stdio::null()))
}

/// Builds what the demo runs and nothing else, then runs `clusterctl demo` from there.
pub fn demo(release: bool, args: &[String]) -> anyhow::Result<()> {
    require_kvm()?;
    let profile = if release {
        Profile::Release
    } else {
        Profile::Dev
    };
    let programs = programs(profile, &PROGRAMS)?;
    run(Command::new(programs.join("clusterctl"))
        .arg("demo")
        .args(args))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_target_folder_is_below_the_one_where_cargo_was_started() {
        let here = Path::new("/home/somebody");
        let of = |named: &str| target_below(Some(named.into()), here);
        assert_eq!(of("made"), Path::new("/home/somebody/made"));
        assert_eq!(of("/made"), Path::new("/made"));
        // As if it were not set.
        assert_eq!(of(""), root().join("target"));
        assert_eq!(target_below(None, here), root().join("target"));
    }

    #[test]
    fn the_inner_cargo_builds_into_the_folder_that_is_looked_into() {
        let told = cargo();
        let told = told.get_envs().find(|(name, _)| *name == TARGET_DIR);
        let told = told.and_then(|(_, value)| value).expect("it is told");
        assert!(Path::new(told).is_absolute());
        assert_eq!(told, target_dir());
    }
}
