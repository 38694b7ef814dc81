//! No core dumps: a daemon's memory holds keys, tickets, a guest's memory.

use nix::sys::resource::{Resource, setrlimit};

/// Rules out that this process, and what it starts, leaves a core dump (setrlimit(2), RLIMIT_CORE). Called first.
pub fn rule_out() {
    if let Err(error) = setrlimit(Resource::RLIMIT_CORE, 0, 0) {
        // The log has not begun; and lowering a limit is never refused.
        eprintln!("core dumps are not ruled out: {error}");
    }
}
