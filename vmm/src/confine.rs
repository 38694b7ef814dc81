//! Confinement: what a monitor gives up before its guest's first instruction, so that a guest that breaks out of
//! it finds nothing.
//!
//! ```text
//!  handles opened (KVM, taps, files) ─► no core dumps ─► empty root ─► own uid, no capabilities ─► Landlock ─► seccomp
//!                                                                                                      │
//!                                       runtime, disks, devices, guest: every thread begins here ◄─────┘
//! ```
//!
//! All of it happens on the only thread there is, so that every later thread inherits it; threads that run vCPUs
//! or watch the lease take a narrower seccomp filter on top. What takes no privilege is done in any case; what
//! the host refuses is told as a [`Measure`] that does not hold.

mod files;
mod privileges;
mod root;
mod syscalls;

use std::path::Path;
use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::spec::{Measure, ValidatedSpec};

pub(crate) use syscalls::TUNSETCARRIER;
pub use syscalls::ThreadKind;

/// The measure that filters system calls.
const SECCOMP: &str = "seccomp";

/// The most descriptors that a monitor may have: disks, channels and queues come to some hundred.
const DESCRIPTORS_MAX: u64 = 4096;

/// Why the monitor may not go on.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// It was to become a user of its own, and is not.
    #[error(
        "cannot become the user {uid}: {source}; clusterd's --monitor-uids says which users machines get"
    )]
    User {
        /// Which.
        uid: u32,
        /// Why not.
        source: std::io::Error,
    },
    /// It still has what it gave up.
    #[error("cannot give up its capabilities: {0}")]
    Capabilities(std::io::Error),
}

/// Closes what was inherited by mistake: a monitor begins with its three standard descriptors. Called first.
pub fn close_inherited() {
    privileges::close_from(3);
}

/// Gives up everything that is not needed from here on. `folder` is the monitor's own; called while there is one thread.
/// Answers the measures, those that were taken before it included.
///
/// # Errors
/// See [`ConfineError`]; what the host only cannot do is a measure that does not hold.
pub fn enter(spec: &ValidatedSpec, folder: &Path) -> Result<Vec<Measure>, ConfineError> {
    let asked = &spec.file().confinement;
    let mut measures = asked.measures.clone();
    let privileged = nix::unistd::geteuid().is_root();
    bound_resources();
    measures.push(if privileged {
        measure("mounts", root::empty(folder), |()| {
            "an empty root of its own; IPC and host name of its own".into()
        })
    } else {
        not_root("mounts")
    });
    match asked.uid {
        Some(uid) => {
            privileges::become_user(uid).map_err(|source| ConfineError::User { uid, source })?;
            measures.push(holds("uid", format!("runs as {uid}, alone")));
        }
        None if privileged => measures.push(Measure {
            name: "uid".into(),
            applied: false,
            detail: "no user of its own was given to it".into(),
        }),
        None => measures.push(not_root("uid")),
    }
    privileges::drop_all().map_err(ConfineError::Capabilities)?;
    measures.push(holds("capabilities", "none, and none to be had"));
    measures.push(measure(
        "landlock",
        files::restrict(privileged),
        std::convert::identity,
    ));
    let names = needs_names(spec);
    let filtered = syscalls::enter_process(names);
    measures.push(match &filtered {
        Ok(()) => holds(
            "network",
            "the host's, for storage and memory channels: TCP alone, no local sockets",
        ),
        Err(_) => Measure {
            name: "network".into(),
            applied: false,
            detail: "the host's, as any process has it".into(),
        },
    });
    measures.push(measure(SECCOMP, filtered, |()| {
        "a filter for each kind of thread".into()
    }));
    Ok(measures)
}

/// The first thread that kept the rights of its process, and why.
static WIDE_THREAD: OnceLock<String> = OnceLock::new();

/// Narrows what the calling thread may ask of the kernel, where its process is confined; only its end undoes it.
/// Where that fails, [`as_they_hold`] tells.
pub fn narrow(kind: ThreadKind) {
    if let Err(error) = syscalls::enter_thread(kind) {
        tracing::warn!(?kind, %error, "a thread keeps the rights of its process");
        WIDE_THREAD
            .get_or_init(|| format!("a {kind:?} thread has no filter but the process's: {error}"));
    }
}

/// The measures that [`enter`] answered, as its threads have kept them since.
pub fn as_they_hold(measures: &[proto::monitor::Measure]) -> Vec<proto::monitor::Measure> {
    with_threads(measures, WIDE_THREAD.get().map(String::as_str))
}

fn with_threads(
    measures: &[proto::monitor::Measure],
    wide_thread: Option<&str>,
) -> Vec<proto::monitor::Measure> {
    let mut measures = measures.to_vec();
    if let Some(why) = wide_thread
        && let Some(seccomp) = measures
            .iter_mut()
            .find(|measure| measure.name == SECCOMP && measure.applied)
    {
        seccomp.applied = false;
        seccomp.detail = why.into();
    }
    measures
}

/// Whether addresses are given by name, so that name servers are asked.
fn needs_names(spec: &ValidatedSpec) -> bool {
    use storage_broker::volume::VolumeUrl;
    let named = |host: &str| {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        bare.parse::<std::net::IpAddr>().is_err()
    };
    let volumes = spec.disks().iter().any(|disk| match &disk.volume {
        VolumeUrl::Nfs(url) => named(&url.host),
        VolumeUrl::Dir(_) => false,
    });
    volumes || crate::telemetry::exports()
}

/// A core dump holds the guest's memory and the keys of its channels.
fn bound_resources() {
    proto::core_dump::rule_out();
    let bounded = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| {
        let most = hard.min(DESCRIPTORS_MAX);
        setrlimit(Resource::RLIMIT_NOFILE, most, most)
    });
    if let Err(error) = bounded {
        tracing::debug!(%error, "the number of descriptors is not bounded");
    }
}

fn holds(name: &str, detail: impl Into<String>) -> Measure {
    Measure {
        name: name.into(),
        applied: true,
        detail: detail.into(),
    }
}

fn not_root(name: &str) -> Measure {
    Measure {
        name: name.into(),
        applied: false,
        detail: "clusterd does not run as root".into(),
    }
}

fn measure<T, E: std::fmt::Display>(
    name: &str,
    taken: Result<T, E>,
    detail: impl FnOnce(T) -> String,
) -> Measure {
    match taken {
        Ok(taken) => holds(name, detail(taken)),
        Err(error) => Measure {
            name: name.into(),
            applied: false,
            detail: error.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_keeps_its_process_rights_is_told_as_a_filter_that_does_not_hold() {
        let measures = [
            holds("landlock", "nothing but its folder").into_wire(),
            holds(SECCOMP, "a filter for each kind of thread").into_wire(),
        ];
        assert_eq!(with_threads(&measures, None), measures);
        let told = with_threads(&measures, Some("a Vcpu thread has no filter"));
        assert_eq!(told[0], measures[0]);
        assert!(!told[1].applied);
        assert_eq!(told[1].detail, "a Vcpu thread has no filter");
    }

    #[test]
    fn a_process_without_a_filter_keeps_its_own_reason() {
        let missing = measure::<(), _>(SECCOMP, Err("no seccomp here"), |()| String::new());
        let measures = [missing.into_wire()];
        assert_eq!(with_threads(&measures, Some("a thread")), measures);
    }
}
