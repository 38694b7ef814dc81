//! Places where a test may kill, hang or fail a process; without the variable they do nothing.
//!
//! `BATON_FAILPOINTS="source.after_quiet=kill,run.before=hang"`; actions are `kill` (SIGKILL to the process
//! itself), `hang` (for ever), `hold` (until it is no longer armed so) and `error`. `BATON_FAILPOINTS=@/path/file` reads the same from a file each
//! time a failpoint is reached, so that a test arms and disarms them while the process runs (in place: the file stays open). A node's
//! daemon and its monitors inherit one value; each looks for its own names.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// The variable that arms them.
pub const VARIABLE: &str = "BATON_FAILPOINTS";

/// How often a process that is held looks whether it still is.
const HOLD_LOOK: Duration = Duration::from_millis(5);

/// What an armed failpoint does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Kill,
    Hang,
    Hold,
    Error,
}

/// A failpoint armed with `error` was reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("failpoint {0}")]
pub struct Tripped(pub &'static str);

fn action(name: &str) -> Option<Action> {
    static VALUE: OnceLock<Option<String>> = OnceLock::new();
    let value = VALUE
        .get_or_init(|| std::env::var(VARIABLE).ok())
        .as_ref()?;
    match value.strip_prefix('@') {
        None => parse(value).get(name).copied(),
        Some(path) => parse(read(path).ok()?.trim()).get(name).copied(),
    }
}

/// Opens the file that arms them now, for a process that may not later on. It has to be there, and to be written in place.
pub fn prepare() {
    action("");
}

fn read(path: &str) -> std::io::Result<String> {
    static FILE: Mutex<Option<File>> = Mutex::new(None);
    let mut file = FILE.lock().unwrap_or_else(PoisonError::into_inner);
    let file = match &mut *file {
        Some(file) => file,
        none => none.insert(File::open(path)?),
    };
    file.rewind()?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

fn parse(text: &str) -> HashMap<String, Action> {
    let mut armed = HashMap::new();
    for entry in text.split([',', '\n']).filter(|entry| !entry.is_empty()) {
        let (name, action) = entry.split_once('=').unwrap_or((entry, ""));
        let action = match action {
            "kill" => Action::Kill,
            "hang" => Action::Hang,
            "hold" => Action::Hold,
            "error" => Action::Error,
            other => {
                tracing::error!(
                    name,
                    action = other,
                    "unknown failpoint action: use kill, hang, hold or error"
                );
                continue;
            }
        };
        armed.insert(name.to_owned(), action);
    }
    armed
}

/// Passes the failpoint `name`.
///
/// # Errors
/// When it is armed with `error`.
pub async fn reach(name: &'static str) -> Result<(), Tripped> {
    match action(name) {
        None => Ok(()),
        Some(Action::Error) => Err(Tripped(name)),
        Some(Action::Hang) => {
            tracing::warn!(name, "failpoint hangs");
            std::future::pending().await
        }
        Some(Action::Hold) => {
            tracing::warn!(name, "failpoint holds");
            while action(name) == Some(Action::Hold) {
                tokio::time::sleep(HOLD_LOOK).await;
            }
            tracing::warn!(name, "failpoint lets go");
            Ok(())
        }
        Some(Action::Kill) => {
            tracing::warn!(name, "failpoint kills this process");
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
            // The first process of a PID namespace does not hear its own SIGKILL.
            std::process::abort()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_and_nonsense_is_left_out() {
        let armed = parse("a=kill,b=hang,,c=error,d=explode,e\nf=kill,g=hold");
        assert_eq!(armed.len(), 5);
        assert_eq!(armed["a"], Action::Kill);
        assert_eq!(armed["b"], Action::Hang);
        assert_eq!(armed["c"], Action::Error);
        assert_eq!(armed["f"], Action::Kill);
        assert_eq!(armed["g"], Action::Hold);
    }
}
