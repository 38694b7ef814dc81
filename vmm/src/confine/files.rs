//! Landlock: of files, name resolution's alone may be read (Documentation/userspace-api/landlock.rst).

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// Read to find a server by its name; the C library loads modules for it.
const READABLE: [&str; 6] = [
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/run/systemd/resolve",
];
/// Where those modules lie, on a host's own root.
const LIBRARIES: [&str; 4] = ["/lib", "/lib64", "/usr/lib", "/etc/ld.so.cache"];

/// The newest interface that is asked for; an older kernel enforces what it knows of it.
const NEWEST: ABI = ABI::V6;

/// Why nothing is enforced.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilesError {
    #[error("this kernel has no Landlock, or it is not switched on (`lsm=` on its command line)")]
    Absent,
    #[error(transparent)]
    Rules(#[from] RulesetError),
}

/// Shuts the file system, but for what `READABLE` names. With an `empty_root` there are no libraries either.
pub(super) fn restrict(empty_root: bool) -> Result<String, FilesError> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    let libraries: &[&str] = if empty_root { &[] } else { &LIBRARIES };
    for path in READABLE.iter().chain(libraries) {
        // Missing ones need no rule.
        if let Ok(place) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(
                place,
                AccessFs::ReadFile | AccessFs::ReadDir,
            ))?;
        }
    }
    let status = rules.restrict_self()?;
    let abi = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => {
            format!("interface {}", effective_abi as i32)
        }
        _ => String::new(),
    };
    match status.ruleset {
        RulesetStatus::NotEnforced => Err(FilesError::Absent),
        RulesetStatus::PartiallyEnforced => Ok(format!(
            "no file but name resolution's, as far as {abi} of this kernel goes"
        )),
        RulesetStatus::FullyEnforced => {
            Ok("no file but name resolution's; no signal to, no abstract socket of others".into())
        }
    }
}
