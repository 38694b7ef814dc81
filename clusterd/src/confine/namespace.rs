//! A PID namespace of its own for each monitor.
//!
//! `unshare(CLONE_NEWPID)` is about the children of the thread that calls it: the next process that this thread
//! starts is the first of a new namespace. So a thread is made for one start and ends with it, and no other child of
//! this daemon is in there. The monitor is process 1 of its namespace and alone in it; this daemon, outside,
//! sees it in `/proc` under the number that it was started with, and kills it by that number.

use std::io;

use nix::sched::{CloneFlags, unshare};
use tokio::sync::oneshot;

use super::Measure;

/// The measure's name.
const MEASURE: &str = "processes";

/// Runs `start` on a thread whose children begin a PID namespace, or, where the kernel does not allow it, do not;
/// which of both it was is told to `start`.
///
/// # Errors
/// What `start` gives, or that no thread could be made.
pub async fn in_own_pid_namespace<T: Send + 'static>(
    start: impl FnOnce(Measure) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    // What is started is reaped by this runtime.
    let runtime = tokio::runtime::Handle::current();
    let (sender, started) = oneshot::channel();
    std::thread::Builder::new()
        .name("start-monitor".into())
        .spawn(move || {
            let _entered = runtime.enter();
            let measure = match separate() {
                Ok(()) => Measure::applied(
                    MEASURE,
                    "a PID namespace of its own: it sees no process but itself",
                ),
                Err(why) => Measure::missing(MEASURE, why),
            };
            // Whoever asked may have gone.
            let _ = sender.send(start(measure));
        })?;
    started
        .await
        .map_err(|_| io::Error::other("the thread that starts a monitor ended without a word"))?
}

fn separate() -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWPID).map_err(|error| {
        format!("no PID namespace: {error}; run clusterd as root, with CAP_SYS_ADMIN where it is in a container")
    })
}

/// Whether monitors can have a PID namespace of their own; tried on a thread that starts nothing.
///
/// # Errors
/// Why not.
pub fn can_separate() -> Result<(), String> {
    std::thread::spawn(separate)
        .join()
        .unwrap_or_else(|_| Err("it could not be tried".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_started_may_be_the_first_of_its_namespace_and_nothing_else_is() {
        let namespace = |what: &str| std::fs::read_link(format!("/proc/self/ns/{what}")).unwrap();
        let before = namespace("pid_for_children");
        let (mut child, measure) = in_own_pid_namespace(|measure| {
            let child = tokio::process::Command::new("sleep").arg("60").spawn()?;
            Ok((child, measure))
        })
        .await
        .unwrap();
        let pid = child.id().unwrap();
        let own = std::fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap();
        assert_eq!(own != namespace("pid"), measure.applied, "{measure:?}");
        assert_eq!(can_separate().is_ok(), measure.applied);
        assert_eq!(namespace("pid_for_children"), before);
        child.start_kill().unwrap();
        child.wait().await.unwrap();
    }
}
