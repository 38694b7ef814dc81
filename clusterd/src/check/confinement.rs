//! How far monitors can be confined on this host, and how far those that run are: what they say of themselves,
//! against what the kernel says of them.

use proto::monitor as wire;

use super::Finding;
use crate::cgroups::{Controller, Groups};
use crate::confine::{Measure, UidRange};

/// What this host lets clusterd do to its monitors.
#[derive(Clone, Debug)]
pub struct Possible {
    /// Whether clusterd is root.
    pub is_root: bool,
    /// The users that monitors become.
    pub uids: UidRange,
    /// Whether they can have a PID namespace.
    pub namespace: Result<(), String>,
    /// Where each controller would be used, or why not.
    pub limits: Vec<(Controller, Result<String, String>)>,
}

/// Judges it: what is not possible is a warning, machines run without it.
pub(super) fn possible(possible: &Possible) -> Vec<Finding> {
    let named = |measure: &str| format!("confine: {measure}");
    let as_root = "run clusterd as root; monitors give up what they do not need by themselves";
    let uid = if possible.is_root {
        Finding::ok(named("uid"), format!("one of {} a machine", possible.uids))
    } else {
        Finding::warning(
            named("uid"),
            "clusterd does not run as root: its monitors run as the same user, and one that is taken over could stop the others",
            as_root,
        )
    };
    let namespace = match &possible.namespace {
        Ok(()) => Finding::ok(named("processes"), "a PID namespace each"),
        Err(why) => Finding::warning(named("processes"), why.as_str(), as_root),
    };
    let limits = possible.limits.iter().map(|(controller, place)| {
        let name = named(controller.measure());
        match place {
            Ok(place) => Finding::ok(name, place.as_str()),
            Err(why) => Finding::warning(
                name,
                why.as_str(),
                format!(
                    "run clusterd as root, under the unit of its package (Delegate=yes), on a host with the cgroup controller `{}`",
                    controller.as_str()
                ),
            ),
        }
    });
    [uid, namespace].into_iter().chain(limits).collect()
}

/// What the kernel says of a monitor's process.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// `/proc/<pid>/status`.
    pub status: String,
    /// `/proc/<pid>/task/*/status`.
    pub threads: Vec<String>,
    /// `/proc/<pid>/cgroup`.
    pub groups: String,
}

impl Seen {
    /// Looks at a process.
    pub fn of(pid: u32) -> Seen {
        let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        let folder = std::path::PathBuf::from(format!("/proc/{pid}"));
        let threads = std::fs::read_dir(folder.join("task"));
        Seen {
            status: read(folder.join("status")),
            threads: threads
                .into_iter()
                .flatten()
                .flatten()
                .map(|thread| read(thread.path().join("status")))
                .filter(|status| !status.is_empty())
                .collect(),
            groups: read(folder.join("cgroup")),
        }
    }
}

fn field<'s>(status: &'s str, name: &str) -> Option<&'s str> {
    status.lines().find_map(|line| {
        let (field, value) = line.split_once(':')?;
        (field == name).then_some(value.trim())
    })
}

/// Why a measure that is said to hold does not, as far as the kernel tells.
fn contradiction(measure: &str, folder: &str, groups: &Groups, seen: &Seen) -> Option<String> {
    let status = |name: &str| field(&seen.status, name);
    match measure {
        // Real, effective, saved, for files.
        "uid" => status("Uid")?
            .split_whitespace()
            .any(|uid| uid == "0")
            .then(|| "its process is still root".to_owned()),
        "capabilities" => ["CapPrm", "CapEff", "CapAmb"]
            .into_iter()
            .filter_map(|set| Some((set, status(set)?)))
            .find(|(_, held)| held.bytes().any(|digit| digit != b'0'))
            .map(|(set, held)| format!("its process has {set} {held}")),
        "no-new-privileges" => {
            (status("NoNewPrivs")? != "1").then(|| "its process may gain privileges".to_owned())
        }
        "processes" => (status("NSpid")?.split_whitespace().count() < 2)
            .then(|| "its process is in this host's PID namespace".to_owned()),
        "seccomp" => {
            let bare: Vec<&str> = seen
                .threads
                .iter()
                .filter(|thread| field(thread, "Seccomp").is_some_and(|mode| mode != "2"))
                .filter_map(|thread| field(thread, "Name"))
                .collect();
            (!bare.is_empty()).then(|| format!("without a filter: the threads {}", bare.join(", ")))
        }
        _ if seen.groups.is_empty() => None,
        _ => {
            let controller = Controller::of_measure(measure)?;
            (groups.holds(folder, controller, &seen.groups) == Some(false))
                .then(|| "its process is not in its control group".to_owned())
        }
    }
}

/// A monitor's measures: as it tells them, and not applied where the kernel says otherwise. `folder` is the name of
/// its folder.
pub fn measures(
    told: &[wire::Measure],
    folder: &str,
    groups: &Groups,
    seen: &Seen,
) -> Vec<Measure> {
    if told.is_empty() {
        return vec![Measure::missing(
            "confinement",
            "this monitor is of a version that confines nothing; move its machine away and back, or restart it",
        )];
    }
    let mut measures: Vec<Measure> = Vec::new();
    for told in told {
        // Whoever started it and itself may both speak of one.
        if let Some(known) = measures.iter_mut().find(|known| known.name == told.name) {
            if known.applied && !told.applied {
                known.applied = false;
                known.detail = told.detail.clone();
            }
            continue;
        }
        let against = told
            .applied
            .then(|| contradiction(&told.name, folder, groups, seen))
            .flatten();
        measures.push(match against {
            None => Measure {
                name: told.name.clone(),
                applied: told.applied,
                detail: told.detail.clone(),
            },
            Some(why) => Measure::missing(
                &told.name,
                format!("{why}, though it should be: {}", told.detail),
            ),
        });
    }
    measures
}

/// What is to be said of all monitors of a node together.
pub(super) fn monitors<'m>(of_each: impl Iterator<Item = &'m [Measure]>) -> Finding {
    let name = "monitors";
    let (mut all, mut lacking) = (0, 0);
    let mut missing: Vec<&str> = Vec::new();
    for measures in of_each {
        all += 1;
        let lacks = measures.iter().filter(|measure| !measure.applied);
        lacking += u32::from(lacks.clone().next().is_some());
        missing.extend(lacks.map(|measure| measure.name.as_str()));
    }
    missing.sort_unstable();
    missing.dedup();
    match (all, lacking) {
        (0, _) => Finding::ok(name, "none runs"),
        (all, 0) => Finding::ok(name, format!("{all} run, each confined in every way")),
        (all, lacking) => Finding::warning(
            name,
            format!(
                "{lacking} of {all} are not confined in every way: {}",
                missing.join(", ")
            ),
            "what is said of each monitor says why; a monitor takes up what the host allows by now when its machine is started again or moved here",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use std::path::Path;

    const CONFINED: &str = "Name:\tvmm\nUid:\t805306369\t805306369\t805306369\t805306369\nNSpid:\t4711\t1\nCapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n";
    const ROOT: &str = "Name:\tvmm\nUid:\t0\t0\t0\t0\nNSpid:\t4711\nCapPrm:\t000001ffffffffff\nCapEff:\t000001ffffffffff\nNoNewPrivs:\t0\nSeccomp:\t0\n";

    fn told(name: &str, applied: bool) -> wire::Measure {
        wire::Measure {
            name: name.into(),
            applied,
            detail: "as told".into(),
        }
    }

    fn seen(status: &str) -> Seen {
        Seen {
            status: status.into(),
            threads: vec![status.into(), CONFINED.into()],
            groups: "4:memory:/elsewhere".into(),
        }
    }

    #[test]
    fn the_kernels_word_counts_more_than_the_monitors() {
        let groups = Groups::new(Vec::new(), Path::new("/d"));
        let names = [
            "uid",
            "capabilities",
            "no-new-privileges",
            "processes",
            "seccomp",
        ];
        let all: Vec<wire::Measure> = names.iter().map(|name| told(name, true)).collect();
        for (status, applied) in [(CONFINED, true), (ROOT, false), ("", true)] {
            let measures = measures(&all, "vm-1", &groups, &seen(status));
            for measure in &measures[..4] {
                assert_eq!(measure.applied, applied, "{measure:?}");
            }
            assert_eq!(measures.len(), names.len());
        }
        let bare = measures(&all, "vm-1", &groups, &seen(ROOT));
        assert!(bare[4].detail.contains("the threads vmm"), "{bare:?}");
    }

    #[test]
    fn what_both_speak_of_holds_when_both_say_so_and_silence_is_no_confinement() {
        let groups = Groups::new(Vec::new(), Path::new("/d"));
        let twice = [told("uid", true), told("uid", false), told("mounts", true)];
        let measures_of = |told: &[wire::Measure]| measures(told, "vm-1", &groups, &seen(CONFINED));
        let found = measures_of(&twice);
        assert_eq!(found.len(), 2);
        assert!(!found[0].applied && found[1].applied);
        let silent = measures_of(&[]);
        assert!(!silent[0].applied, "{silent:?}");
        let all = [found, silent];
        let summary = monitors(all.iter().map(Vec::as_slice));
        assert_eq!(summary.state, State::Warning);
        assert!(summary.detail.contains("2 of 2"), "{summary:?}");
        assert_eq!(monitors(std::iter::empty()).state, State::Ok);
    }

    #[test]
    fn what_a_host_does_not_allow_is_told_and_stops_nothing() {
        let nothing = Possible {
            is_root: false,
            uids: crate::confine::MONITOR_UIDS,
            namespace: Err("EPERM".into()),
            limits: vec![(Controller::Memory, Err("read-only".into()))],
        };
        let findings = possible(&nothing);
        assert_eq!(findings.len(), 3);
        for finding in findings {
            assert_eq!(finding.state, State::Warning, "{finding:?}");
            assert!(!finding.advice.is_empty());
        }
    }
}
