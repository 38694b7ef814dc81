//! The control groups of monitors: each has one of its own, with limits, in every hierarchy that has a
//! controller we want.
//!
//! ```text
//!  v1  <mount>/<clusterd's group>/baton/<data directory>/vm-<folder>
//!  v2  <mount>/<parent of clusterd's group>/baton/<data directory>/vm-<folder>
//! ```
//! In v2 a group that hands controllers down may hold no process, so ours stand beside clusterd's own (the unit has
//! `DelegateSubgroup=`, which makes that a place of our own). In v1 there is no such rule, and below our own the
//! limits that were set for clusterd hold for its monitors too. What the host has is read anew at each start of
//! this daemon; a host with v2 mounted beside v1 has each controller in one of the two.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use crate::confine::Measure;

#[cfg(test)]
mod tests;

/// What a monitor needs beside its guest's memory at least, bytes: its code, buffers, the page tables that KVM
/// keeps, what is under way to disks and to a destination.
const MEMORY_BESIDE_MIN: u64 = 512 << 20;
/// For large guests: this share of their memory.
const MEMORY_BESIDE_SHARE: u64 = 8;
/// Processors beside the guest's own: one for devices, one for a migration.
const CPUS_BESIDE: u64 = 2;
/// The period that processor time is counted in, microseconds.
const PERIOD_US: u64 = 100_000;
/// Threads of a monitor at most: one for each virtual processor, and up to 512 of its runtime for files; the rest is room.
const TASKS_MAX: u32 = 2_048;
/// The folder of all our groups.
const FOLDER: &str = "baton";

/// What can be limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Controller {
    /// Memory.
    Memory,
    /// Processor time.
    Cpu,
    /// Processes and threads.
    Pids,
}

impl Controller {
    const ALL: [Controller; 3] = [Controller::Memory, Controller::Cpu, Controller::Pids];

    /// As the kernel calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Controller::Memory => "memory",
            Controller::Cpu => "cpu",
            Controller::Pids => "pids",
        }
    }

    /// The measure that it takes.
    pub fn measure(self) -> &'static str {
        match self {
            Controller::Memory => "memory-limit",
            Controller::Cpu => "cpu-limit",
            Controller::Pids => "tasks-limit",
        }
    }

    /// The controller of that measure.
    pub fn of_measure(measure: &str) -> Option<Controller> {
        Controller::ALL
            .into_iter()
            .find(|controller| controller.measure() == measure)
    }
}

/// The two interfaces of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// One hierarchy a controller.
    V1,
    /// One for all.
    V2,
}

/// A mounted hierarchy with controllers that we want.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Which interface.
    pub version: Version,
    /// Those of its controllers that we use here.
    pub controllers: BTreeSet<Controller>,
    /// Where our groups begin: `…/baton` is made in it.
    pub base: PathBuf,
}

/// What a monitor may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes, its guest's memory included.
    pub memory_bytes: u64,
    /// Microseconds of processor time in each period.
    pub cpu_us: u64,
    /// Processes and threads.
    pub tasks: u32,
}

/// The limits of a monitor whose guest has so much.
pub fn limits(memory_mib: u64, vcpus: u32) -> Limits {
    let guest = memory_mib.saturating_mul(1 << 20);
    let beside = MEMORY_BESIDE_MIN.max(guest / MEMORY_BESIDE_SHARE);
    Limits {
        memory_bytes: guest.saturating_add(beside),
        cpu_us: (u64::from(vcpus) + CPUS_BESIDE) * PERIOD_US,
        tasks: TASKS_MAX,
    }
}

/// The files to write in a group, and what is in them.
fn settings(
    version: Version,
    controller: Controller,
    limits: &Limits,
) -> Vec<(&'static str, String)> {
    match (version, controller) {
        (Version::V1, Controller::Memory) => {
            vec![("memory.limit_in_bytes", limits.memory_bytes.to_string())]
        }
        (Version::V2, Controller::Memory) => {
            vec![("memory.max", limits.memory_bytes.to_string())]
        }
        (Version::V1, Controller::Cpu) => vec![
            ("cpu.cfs_period_us", PERIOD_US.to_string()),
            ("cpu.cfs_quota_us", limits.cpu_us.to_string()),
        ],
        (Version::V2, Controller::Cpu) => {
            vec![("cpu.max", format!("{} {PERIOD_US}", limits.cpu_us))]
        }
        (_, Controller::Pids) => vec![("pids.max", limits.tasks.to_string())],
    }
}

/// A limit in words.
fn in_words(controller: Controller, limits: &Limits) -> String {
    match controller {
        Controller::Memory => format!("{} MiB", limits.memory_bytes >> 20),
        Controller::Cpu => format!("{} processors", limits.cpu_us / PERIOD_US),
        Controller::Pids => format!("{} threads", limits.tasks),
    }
}

/// A cgroup mount, as `/proc/self/mountinfo` has it.
struct Mount<'t> {
    version: Version,
    /// The part of the hierarchy that is mounted.
    root: &'t str,
    point: PathBuf,
    /// v1: its controllers among others.
    options: Vec<&'t str>,
}

fn mount(line: &str) -> Option<Mount<'_>> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (root, point) = (before.next()?, before.next()?);
    let mut after = after.split(' ');
    let version = match after.next()? {
        "cgroup" => Version::V1,
        "cgroup2" => Version::V2,
        _ => return None,
    };
    Some(Mount {
        version,
        root,
        // As the kernel writes a space.
        point: PathBuf::from(point.replace("\\040", " ")),
        options: after.nth(1).unwrap_or_default().split(',').collect(),
    })
}

/// Our own group in a hierarchy, from `/proc/self/cgroup`: `number:controllers:path`, with 0 and none for v2.
fn own_group(groups: &str, of: impl Fn(&str, &str) -> bool) -> Option<&str> {
    groups.lines().find_map(|line| {
        let (number, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        of(number, controllers).then_some(path)
    })
}

/// A group's directory under a mount that shows only what is below `root`.
fn directory(mount: &Mount<'_>, group: &str) -> PathBuf {
    let below = group
        .strip_prefix(mount.root.trim_end_matches('/'))
        .unwrap_or_default();
    match below.trim_start_matches('/') {
        // What lies outside of the mount cannot be reached by `..`.
        "" => mount.point.clone(),
        below if below.split('/').any(|part| part == "..") => mount.point.clone(),
        below => mount.point.join(below),
    }
}

/// Finds the hierarchies with the controllers that we want. `mounts` is `/proc/self/mountinfo`, `groups`
/// `/proc/self/cgroup`; `offered` reads a v2 group's `cgroup.controllers`.
pub fn hierarchies(
    mounts: &str,
    groups: &str,
    offered: impl Fn(&Path) -> String,
) -> Vec<Hierarchy> {
    let mounts: Vec<Mount<'_>> = mounts.lines().filter_map(mount).collect();
    let mut found: Vec<Hierarchy> = Vec::new();
    let mut wanted = BTreeSet::from(Controller::ALL);
    for mount in mounts.iter().filter(|mount| mount.version == Version::V1) {
        let here: BTreeSet<Controller> = wanted
            .iter()
            .copied()
            .filter(|controller| mount.options.contains(&controller.as_str()))
            .collect();
        let Some(first) = here.first() else { continue };
        let own = own_group(groups, |_, controllers| {
            controllers.split(',').any(|name| name == first.as_str())
        });
        let Some(own) = own else { continue };
        wanted.retain(|controller| !here.contains(controller));
        found.push(Hierarchy {
            version: Version::V1,
            base: directory(mount, own),
            controllers: here,
        });
    }
    let unified = mounts.iter().find(|mount| mount.version == Version::V2);
    if let Some(mount) = unified
        && let Some(own) = own_group(groups, |number, controllers| {
            number == "0" && controllers.is_empty()
        })
    {
        let own = directory(mount, own);
        let base = match own.parent() {
            Some(parent) if own != mount.point => parent.to_owned(),
            _ => own,
        };
        let offered = offered(&base);
        let here: BTreeSet<Controller> = wanted
            .into_iter()
            .filter(|controller| {
                offered
                    .split_whitespace()
                    .any(|name| name == controller.as_str())
            })
            .collect();
        if !here.is_empty() {
            found.push(Hierarchy {
                version: Version::V2,
                controllers: here,
                base,
            });
        }
    }
    found
}

/// The groups of one node's monitors.
#[derive(Clone, Debug)]
pub struct Groups {
    hierarchies: Vec<Hierarchy>,
    /// Of the node, below [`FOLDER`].
    key: String,
}

impl Groups {
    /// Those of the node with that data directory, as this host has them.
    pub fn of_host(data_dir: &Path) -> Groups {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let found = hierarchies(
            &read("/proc/self/mountinfo"),
            &read("/proc/self/cgroup"),
            |group| std::fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default(),
        );
        Groups::new(found, data_dir)
    }

    /// Groups in these hierarchies.
    pub fn new(hierarchies: Vec<Hierarchy>, data_dir: &Path) -> Groups {
        use std::os::unix::ffi::OsStrExt;
        // Several nodes may run on one host: a test, a cluster to try things.
        let key = xxhash_rust::xxh3::xxh3_64(data_dir.as_os_str().as_bytes());
        Groups {
            hierarchies,
            key: format!("{key:016x}"),
        }
    }

    fn folder(&self, hierarchy: &Hierarchy) -> PathBuf {
        hierarchy.base.join(FOLDER).join(&self.key)
    }

    fn group(&self, hierarchy: &Hierarchy, name: &str) -> PathBuf {
        self.folder(hierarchy).join(group_name(name))
    }

    /// Makes the group of the monitor in the folder `name` and sets its limits: one measure a controller, those
    /// that are nowhere too.
    pub fn make(&self, name: &str, limits: &Limits) -> Vec<Measure> {
        let mut measures = Vec::new();
        for controller in Controller::ALL {
            let holder = self
                .hierarchies
                .iter()
                .find(|hierarchy| hierarchy.controllers.contains(&controller));
            let set = match holder {
                None => Err(format!(
                    "this host has no cgroup controller `{}`; boot with it enabled (cgroup_enable={0}), or delegate it to clusterd's unit (Delegate=yes)",
                    controller.as_str()
                )),
                Some(hierarchy) => self.limit(hierarchy, name, controller, limits),
            };
            measures.push(match set {
                Ok(detail) => Measure::applied(controller.measure(), detail),
                Err(why) => Measure::missing(controller.measure(), why),
            });
        }
        measures
    }

    fn limit(
        &self,
        hierarchy: &Hierarchy,
        name: &str,
        controller: Controller,
        limits: &Limits,
    ) -> Result<String, String> {
        let group = self.group(hierarchy, name);
        let failed = |path: &Path, error: &io::Error| {
            let advice = match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    "; run clusterd as root, or delegate its cgroup to it (Delegate=yes)"
                }
                io::ErrorKind::ReadOnlyFilesystem => "; mount the cgroup file systems writable",
                io::ErrorKind::ResourceBusy => {
                    "; give clusterd a group of its own to run in (DelegateSubgroup=daemon)"
                }
                _ => "",
            };
            format!("{}: {error}{advice}", path.display())
        };
        let folder = self.folder(hierarchy);
        let above = [hierarchy.base.clone(), hierarchy.base.join(FOLDER), folder];
        for (level, path) in above.iter().enumerate() {
            if level > 0 {
                make_directory(path).map_err(|error| failed(path, &error))?;
            }
            if hierarchy.version == Version::V2 {
                hand_down(path, &hierarchy.controllers).map_err(|error| failed(path, &error))?;
            }
        }
        make_directory(&group).map_err(|error| failed(&group, &error))?;
        for (file, value) in settings(hierarchy.version, controller, limits) {
            let file = group.join(file);
            std::fs::write(&file, value).map_err(|error| failed(&file, &error))?;
        }
        Ok(format!(
            "{}, by {}",
            in_words(controller, limits),
            group.display()
        ))
    }

    /// Puts a process into every group of the monitor in the folder `name`.
    ///
    /// # Errors
    /// The group that did not take it; the others have.
    pub fn join(&self, name: &str, pid: u32) -> Result<(), JoinError> {
        let mut failed = None;
        for hierarchy in &self.hierarchies {
            let group = self.group(hierarchy, name);
            if !group.is_dir() {
                // It could not be made, which its measure says.
                continue;
            }
            if let Err(source) = std::fs::write(group.join("cgroup.procs"), pid.to_string()) {
                failed = Some(JoinError { pid, group, source });
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Whether a process with that `/proc/<pid>/cgroup` is in the group of the monitor in `name` that limits this;
    /// `None` where no hierarchy does.
    pub fn holds(&self, name: &str, controller: Controller, groups: &str) -> Option<bool> {
        let hierarchy = self
            .hierarchies
            .iter()
            .find(|hierarchy| hierarchy.controllers.contains(&controller))?;
        let of = |number: &str, controllers: &str| match hierarchy.version {
            Version::V1 => controllers
                .split(',')
                .any(|name| name == controller.as_str()),
            Version::V2 => number == "0" && controllers.is_empty(),
        };
        let end = format!("/{FOLDER}/{}/{}", self.key, group_name(name));
        Some(own_group(groups, of).is_some_and(|path| path.ends_with(&end)))
    }

    /// Removes the groups of the monitor in the folder `name`; `false` while something is still in one.
    pub fn remove(&self, name: &str) -> bool {
        let mut gone = true;
        for hierarchy in &self.hierarchies {
            gone &= remove_directory(&self.group(hierarchy, name));
        }
        gone
    }

    /// Removes every group of this node that no process is in, and the folders of groups when none is left.
    pub fn sweep(&self) {
        for hierarchy in &self.hierarchies {
            let folder = self.folder(hierarchy);
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    remove_directory(&entry.path());
                }
            }
            remove_directory(&folder);
            // Other nodes of this host may have theirs in it.
            remove_directory(&hierarchy.base.join(FOLDER));
        }
    }

    /// Where each controller would be used, or why not: for people.
    pub fn in_words(&self) -> Vec<(Controller, Result<String, String>)> {
        Controller::ALL
            .into_iter()
            .map(|controller| {
                let holder = self
                    .hierarchies
                    .iter()
                    .find(|hierarchy| hierarchy.controllers.contains(&controller));
                let told = match holder {
                    None => Err("no cgroup hierarchy of this host has it".to_owned()),
                    Some(hierarchy) => may_write(&hierarchy.base).map(|()| {
                        let version = match hierarchy.version {
                            Version::V1 => "v1",
                            Version::V2 => "v2",
                        };
                        format!("cgroup {version}, below {}", hierarchy.base.display())
                    }),
                };
                (controller, told)
            })
            .collect()
    }
}

/// A process was not taken into a group.
#[derive(Debug, thiserror::Error)]
#[error("process {pid} was not taken into the control group {}: {source}", group.display())]
pub struct JoinError {
    pid: u32,
    group: PathBuf,
    source: io::Error,
}

fn group_name(folder: &str) -> String {
    format!("vm-{folder}")
}

fn may_write(directory: &Path) -> Result<(), String> {
    nix::unistd::access(directory, nix::unistd::AccessFlags::W_OK)
        .map_err(|error| format!("{} cannot be written: {error}", directory.display()))
}

fn make_directory(path: &Path) -> io::Result<()> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// `true` when it is not there any more.
fn remove_directory(path: &Path) -> bool {
    match std::fs::remove_dir(path) {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Lets the groups below a v2 group have these controllers.
fn hand_down(group: &Path, controllers: &BTreeSet<Controller>) -> io::Result<()> {
    let file = group.join("cgroup.subtree_control");
    let handed = std::fs::read_to_string(&file).unwrap_or_default();
    let missing: Vec<String> = controllers
        .iter()
        .filter(|controller| {
            !handed
                .split_whitespace()
                .any(|name| name == controller.as_str())
        })
        .map(|controller| format!("+{}", controller.as_str()))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    std::fs::write(&file, missing.join(" "))
}
