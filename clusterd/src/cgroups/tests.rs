//! What is found of hosts of every kind, and what is written.

use super::*;

const HYBRID_MOUNTS: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";

const HYBRID_GROUPS: &str = "\
9:name=systemd:/system.slice/clusterd.service
8:pids:/
4:memory:/system.slice/clusterd.service
1:cpu,cpuacct:/system.slice
0::/system.slice/clusterd.service";

fn none(_: &Path) -> String {
    String::new()
}

fn found(mounts: &str, groups: &str, offered: &str) -> Vec<(Version, Vec<&'static str>, String)> {
    hierarchies(mounts, groups, |_| offered.to_owned())
        .into_iter()
        .map(|hierarchy| {
            let controllers = hierarchy.controllers.iter();
            (
                hierarchy.version,
                controllers.map(|controller| controller.as_str()).collect(),
                hierarchy.base.display().to_string(),
            )
        })
        .collect()
}

#[test]
fn on_a_hybrid_host_the_controllers_of_v1_are_used_below_our_own_group() {
    let expected = vec![
        (
            Version::V1,
            vec!["cpu"],
            "/sys/fs/cgroup/cpu,cpuacct/system.slice".to_owned(),
        ),
        (
            Version::V1,
            vec!["memory"],
            "/sys/fs/cgroup/memory/system.slice/clusterd.service".to_owned(),
        ),
        (Version::V1, vec!["pids"], "/sys/fs/cgroup/pids".to_owned()),
    ];
    assert_eq!(found(HYBRID_MOUNTS, HYBRID_GROUPS, ""), expected);
}

#[test]
fn with_v2_the_groups_stand_beside_our_own() {
    let mounts = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate";
    for (own, base) in [
        (
            "0::/system.slice/clusterd.service/daemon",
            "/sys/fs/cgroup/system.slice/clusterd.service",
        ),
        (
            "0::/system.slice/clusterd.service",
            "/sys/fs/cgroup/system.slice",
        ),
        // A container that sees its own group as the root.
        ("0::/", "/sys/fs/cgroup"),
    ] {
        assert_eq!(
            found(mounts, own, "cpuset cpu io memory pids\n"),
            [(Version::V2, vec!["memory", "cpu", "pids"], base.to_owned())],
            "{own}"
        );
    }
    assert!(found(mounts, "0::/", "io").is_empty());
}

#[test]
fn a_controller_that_v1_has_not_is_taken_from_v2() {
    let mounts = "35 31 0:32 / /c/memory rw - cgroup cgroup rw,memory\n41 31 0:38 / /c/unified rw - cgroup2 cgroup2 rw";
    let groups = "4:memory:/a\n0::/b";
    let expected = vec![
        (Version::V1, vec!["memory"], "/c/memory/a".to_owned()),
        (Version::V2, vec!["cpu"], "/c/unified".to_owned()),
    ];
    assert_eq!(found(mounts, groups, "cpu memory"), expected);
}

#[test]
fn a_mount_that_shows_only_a_part_is_not_left() {
    let mounts = "35 31 0:32 /docker/x /c/memory ro - cgroup cgroup rw,memory";
    for (own, base) in [
        ("4:memory:/docker/x/inner", "/c/memory/inner"),
        ("4:memory:/docker/x", "/c/memory"),
        ("4:memory:/elsewhere", "/c/memory"),
        ("4:memory:/docker/x/../y", "/c/memory"),
    ] {
        assert_eq!(
            found(mounts, own, ""),
            [(Version::V1, vec!["memory"], base.to_owned())],
            "{own}"
        );
    }
    assert!(hierarchies("", "", none).is_empty());
    assert!(hierarchies("no - line", "no line", none).is_empty());
}

#[test]
fn a_monitor_may_use_more_than_its_guest_has() {
    let small = limits(64, 1);
    assert_eq!(small.memory_bytes, (64 + 512) << 20);
    assert_eq!(small.cpu_us, 300_000);
    assert_eq!(small.tasks, 2_048);
    assert_eq!(limits(16 << 10, 8).memory_bytes, (16 + 2) << 30);
    assert_eq!(limits(u64::MAX, u32::MAX).memory_bytes, u64::MAX);
}

fn in_folder(version: Version, base: &Path) -> Groups {
    let hierarchy = Hierarchy {
        version,
        controllers: BTreeSet::from([Controller::Memory, Controller::Cpu]),
        base: base.to_owned(),
    };
    Groups::new(vec![hierarchy], Path::new("/var/lib/baton"))
}

#[test]
fn limits_are_written_as_each_version_has_them() {
    for (version, expected) in [
        (
            Version::V1,
            vec![
                ("memory.limit_in_bytes", "603979776"),
                ("cpu.cfs_period_us", "100000"),
                ("cpu.cfs_quota_us", "400000"),
                ("cgroup.procs", "77"),
            ],
        ),
        (
            Version::V2,
            vec![
                ("memory.max", "603979776"),
                ("cpu.max", "400000 100000"),
                ("cgroup.procs", "77"),
                ("../cgroup.subtree_control", "+memory +cpu"),
                ("../../cgroup.subtree_control", "+memory +cpu"),
                ("../../../cgroup.subtree_control", "+memory +cpu"),
            ],
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let groups = in_folder(version, folder.path());
        let measures = groups.make("vm-1-t-2", &limits(64, 2));
        let applied: Vec<(&str, bool)> = measures
            .iter()
            .map(|measure| (measure.name.as_str(), measure.applied))
            .collect();
        assert_eq!(
            applied,
            [
                ("memory-limit", true),
                ("cpu-limit", true),
                ("tasks-limit", false)
            ],
            "{measures:?}"
        );
        groups.join("vm-1-t-2", 77).unwrap();
        let group = groups.group(&groups.hierarchies[0], "vm-1-t-2");
        for (file, value) in expected {
            let written = std::fs::read_to_string(group.join(file)).unwrap();
            assert_eq!(written, value, "{file}");
        }
    }
}

#[test]
fn a_group_that_cannot_be_made_is_a_measure_not_taken_and_no_failure() {
    let groups = in_folder(Version::V1, Path::new("/nowhere/at/all"));
    let measures = groups.make("vm-1-t-2", &limits(64, 2));
    assert!(measures.iter().all(|measure| !measure.applied));
    assert!(measures[0].detail.contains("/nowhere"), "{measures:?}");
    groups.join("vm-1-t-2", 77).unwrap();
    assert!(groups.remove("vm-1-t-2"));
}

#[test]
fn groups_are_removed_with_their_folders() {
    let folder = tempfile::tempdir().unwrap();
    let groups = in_folder(Version::V1, folder.path());
    for name in ["a", "b"] {
        let group = groups.group(&groups.hierarchies[0], name);
        std::fs::create_dir_all(group).unwrap();
    }
    assert!(groups.remove("a"));
    groups.sweep();
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none());
}

#[test]
fn whether_a_process_is_in_its_group_is_told_from_its_own_list() {
    let groups = in_folder(Version::V1, Path::new("/c/memory"));
    let line = format!("4:memory:/own/baton/{}/vm-a\n1:cpu:/", groups.key);
    assert_eq!(groups.holds("a", Controller::Memory, &line), Some(true));
    assert_eq!(groups.holds("b", Controller::Memory, &line), Some(false));
    assert_eq!(groups.holds("a", Controller::Cpu, &line), Some(false));
    assert_eq!(groups.holds("a", Controller::Pids, &line), None);
}
