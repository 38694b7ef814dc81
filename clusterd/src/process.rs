//! Processes that belong to a folder: those whose command line names something inside it.
//!
//! A process number alone proves nothing (numbers are used again), so every look and every signal goes
//! through the command line.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// How often a wait looks.
const LOOK: Duration = Duration::from_millis(2);

/// Whether `pid` surely lives and its command line names something inside `folder`.
pub fn belongs(pid: u32, folder: &Path) -> bool {
    command_line(pid).is_ok_and(|line| names(&line, folder))
}

/// Whether `pid` surely no longer belongs to `folder`: what cannot be looked at counts as living.
/// A zombie has no command line; it is gone.
pub fn is_gone(pid: u32, folder: &Path) -> bool {
    match command_line(pid) {
        Ok(line) => !names(&line, folder),
        Err(error) => {
            // ESRCH: it ended while it was looked at.
            error.kind() == std::io::ErrorKind::NotFound
                || error.raw_os_error() == Some(nix::libc::ESRCH)
        }
    }
}

fn command_line(pid: u32) -> std::io::Result<Vec<u8>> {
    std::fs::read(format!("/proc/{pid}/cmdline"))
}

fn names(command_line: &[u8], folder: &Path) -> bool {
    let folder = folder.as_os_str().as_bytes();
    command_line
        .split(|&byte| byte == 0)
        .any(|argument| argument.starts_with(folder) && argument.get(folder.len()) == Some(&b'/'))
}

/// Every process that belongs to `folder`.
pub fn of_folder(folder: &Path) -> Vec<u32> {
    let own = std::process::id();
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&pid| pid != own && belongs(pid, folder))
        .collect()
}

/// Kills `pid` if it belongs to `folder`.
pub fn kill(pid: u32, folder: &Path) {
    let Ok(number) = i32::try_from(pid) else {
        return;
    };
    if belongs(pid, folder)
        && let Err(error) = nix::sys::signal::kill(Pid::from_raw(number), Signal::SIGKILL)
    {
        tracing::warn!(pid, %error, "a process could not be killed");
    }
}

/// Waits until `pid` no longer belongs to `folder`; `false` when it still does after `within`.
pub async fn wait_gone(pid: u32, folder: &Path, within: Duration) -> bool {
    let deadline = tokio::time::Instant::now() + within;
    while !is_gone(pid, folder) {
        if tokio::time::Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(LOOK).await;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_process_that_names_the_folder_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("log");
        std::fs::write(&file, "").unwrap();
        let mut child = tokio::process::Command::new("tail")
            .arg("-f")
            .arg(&file)
            .stdout(std::process::Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let pid = child.id().unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while !belongs(pid, folder.path()) && std::time::Instant::now() < deadline {
            tokio::task::yield_now().await;
        }
        let other = folder.path().join("log2");
        kill(pid, &other);
        assert!(belongs(pid, folder.path()));
        assert_eq!(of_folder(folder.path()), [pid]);
        kill(pid, folder.path());
        assert!(wait_gone(pid, folder.path(), Duration::from_secs(5)).await);
        child.wait().await.unwrap();
    }
}
