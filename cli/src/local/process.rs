//! The processes of a local cluster: found, started, known by their folder, gone.

use std::fs::{self, File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use crate::client::CliError;

/// How long a stopping program may take before it is killed.
pub(super) const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Finds one of Baton's programs.
///
/// # Errors
/// When it is neither beside this program nor in `PATH`.
pub fn program(name: &str) -> Result<PathBuf, CliError> {
    let beside = std::env::var_os("BATON_PROGRAMS")
        .map(PathBuf::from)
        .or_else(|| {
            std::env::current_exe()
                .ok()
                .and_then(|exe| exe.parent().map(Path::to_path_buf))
        })
        .map(|folder| folder.join(name));
    if let Some(path) = beside.filter(|path| path.is_file()) {
        return Ok(path);
    }
    std::env::var_os("PATH")
        .and_then(|paths| std::env::split_paths(&paths).map(|folder| folder.join(name)).find(|path| path.is_file()))
        .ok_or_else(|| {
            CliError::Local(format!(
                "{name} is neither beside clusterctl nor in PATH; in the source tree: cargo build --workspace"
            ))
        })
}

/// Starts a program that outlives this one, its output in `log`.
pub(super) fn spawn(command: &mut Command, log: &Path) -> Result<i32, CliError> {
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder)?;
    }
    let log: File = OpenOptions::new().create(true).append(true).open(log)?;
    let child: Child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // A group of its own: Ctrl-C on the demo must not reach it before the demo's own clean-up.
        .process_group(0)
        .spawn()
        .map_err(|error| {
            CliError::Local(format!(
                "cannot start {}: {error}",
                command.get_program().display()
            ))
        })?;
    i32::try_from(child.id()).map_err(CliError::local)
}

/// Waits, bounded, until a killed child is gone.
pub(super) fn reap(pid: i32) {
    if pid == 0 {
        return;
    }
    let deadline = Instant::now() + STOP_TIMEOUT;
    let pid = Pid::from_raw(pid);
    while Instant::now() < deadline {
        match nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::WNOHANG)) {
            Ok(nix::sys::wait::WaitStatus::StillAlive) => {
                std::thread::sleep(Duration::from_millis(5))
            }
            // Gone, or not a child of ours (a later command than the one that started it).
            _ => return,
        }
    }
}

/// Every process whose command line names something inside `folder`.
pub fn processes_of(folder: &Path) -> Vec<i32> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let needle = folder.as_os_str().as_encoded_bytes();
    let inside = |argument: &[u8]| {
        argument == needle
            || (argument.starts_with(needle) && argument.get(needle.len()) == Some(&b'/'))
    };
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|&pid| pid != own)
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.split(|&byte| byte == 0).any(inside))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_belongs_to_a_folder_that_its_command_line_names() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("log");
        std::fs::write(&log, "x").expect("a file");
        let mut child = Command::new("tail")
            .arg("-f")
            .arg(&log)
            .stdout(Stdio::piped())
            .spawn()
            .expect("tail");
        // Its command line is there some time after its process: what it prints shows that it runs.
        let mut printed = [0];
        let mut output = child.stdout.take().expect("a pipe");
        std::io::Read::read_exact(&mut output, &mut printed).expect("its output");
        let pid = i32::try_from(child.id()).expect("a pid");
        assert!(processes_of(folder.path()).contains(&pid));
        assert!(!processes_of(&folder.path().join("other")).contains(&pid));
        child.kill().expect("kill");
        child.wait().expect("wait");
    }
}
