//! Whether a host is fit to be a node: before it joins (`clusterd join --check`), and while it is one
//! (`clusterctl node check`).
//!
//! ```text
//!  host      what this host says of itself ─┐
//!  join      what the cluster tells a newcomer ├─► the judgements here ─► findings
//!  node      what the other nodes say ───────┘
//! ```
//! The judgements take values and give a [`Finding`] each; nothing is changed by looking. `failed` is what
//! keeps machines from running here, or what loses data; a warning is what an operator should know.

pub mod confinement;
pub mod host;
pub mod join;
mod kvm;
pub mod node;

use std::path::Path;

use proto::broker::VolumeProbe;

use host::{Cpu, Link, Room};

/// The only version of the KVM API that there has been since Linux 2.6.22.
const KVM_API: i32 = 12;
/// What the host's own programs need at least, MiB: offered to machines, it ends in the OOM killer.
const HOST_MEMORY_MIN_MIB: u64 = 1_024;
/// The data directory holds the log; with less room, bytes, it is full soon...
const ROOM_WARN_BYTES: u64 = 1 << 30;
/// ...and with less than this at once.
const ROOM_MIN_BYTES: u64 = 128 << 20;
/// The least MTU that IPv6 works with; Ethernet's is 1,500.
const MTU_MIN: u32 = 1_280;
/// What every Ethernet carries.
const MTU_USUAL: u32 = 1_500;
/// Clocks that differ by more, ms, make times in events and audit hard to compare...
const CLOCK_WARN_MS: u64 = 1_000;
/// ...and by more than this certificates are not valid yet, or no more.
const CLOCK_MAX_MS: u64 = 3_600_000;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// As it should be.
    Ok,
    /// It works, and an operator should know.
    Warning,
    /// It does not work, or would not.
    Failed,
}

impl State {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Warning => "warning",
            State::Failed => "failed",
        }
    }
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub name: String,
    /// How it came out.
    pub state: State,
    /// What was found.
    pub detail: String,
    /// What to do about it; empty where nothing is to be done.
    pub advice: String,
}

impl Finding {
    fn ok(name: impl Into<String>, detail: impl Into<String>) -> Finding {
        Finding {
            name: name.into(),
            state: State::Ok,
            detail: detail.into(),
            advice: String::new(),
        }
    }

    fn warning(
        name: impl Into<String>,
        detail: impl Into<String>,
        advice: impl Into<String>,
    ) -> Finding {
        Finding {
            state: State::Warning,
            advice: advice.into(),
            ..Finding::ok(name, detail)
        }
    }

    fn failed(
        name: impl Into<String>,
        detail: impl Into<String>,
        advice: impl Into<String>,
    ) -> Finding {
        Finding {
            state: State::Failed,
            ..Finding::warning(name, detail, advice)
        }
    }
}

/// Whether anything failed.
pub fn any_failed(findings: &[Finding]) -> bool {
    findings
        .iter()
        .any(|finding| finding.state == State::Failed)
}

/// Findings as a table for people, with what to do under each that is not as it should be.
pub fn table(findings: &[Finding]) -> String {
    let width = findings
        .iter()
        .map(|finding| finding.name.chars().count())
        .max()
        .unwrap_or(0);
    let mut lines = Vec::new();
    for finding in findings {
        let (state, name) = (finding.state.as_str(), &finding.name);
        lines.push(format!("{state:<7}  {name:<width$}  {}", finding.detail));
        if !finding.advice.is_empty() {
            lines.push(format!(
                "{:<7}  {:<width$}  try: {}",
                "", "", finding.advice
            ));
        }
    }
    lines.join("\n")
}

/// Whether machines can run here; `needed` is false for a node that only votes.
fn kvm(version: &Result<i32, String>, needed: bool) -> Finding {
    let (name, advice) = (
        "kvm",
        "enable virtualisation in the firmware, and: modprobe kvm_intel (or kvm_amd); in a virtual machine, allow nesting on its host",
    );
    match version {
        Ok(KVM_API) => Finding::ok(name, format!("/dev/kvm opens, API version {KVM_API}")),
        Ok(other) => Finding::failed(
            name,
            format!("/dev/kvm has API version {other}, not {KVM_API}"),
            "run a kernel of Linux's own",
        ),
        Err(why) if needed => Finding::failed(name, why, advice),
        Err(why) => Finding::warning(
            name,
            format!("{why}; this node only votes, so no machine will run here"),
            "",
        ),
    }
}

/// Whether machines can come from and go to the other nodes.
fn cpu(own: &Cpu, others: &[(String, Cpu)]) -> Finding {
    let name = "cpu";
    let names = |differs: &dyn Fn(&Cpu) -> bool| -> Vec<String> {
        others
            .iter()
            .filter(|(_, other)| differs(other))
            .map(|(node, other)| format!("{node} ({})", other.model))
            .collect()
    };
    let told = format!("{} ({})", own.model, own.vendor);
    let vendors = names(&|other| other.vendor != own.vendor);
    if !vendors.is_empty() {
        return Finding::failed(
            name,
            format!("{told}; of another vendor: {}", vendors.join(", ")),
            "make a cluster of its own for hosts of each vendor: no machine moves live between them",
        );
    }
    let models = names(&|other| other.model != own.model);
    if !models.is_empty() {
        return Finding::warning(
            name,
            format!("{told}; another model: {}", models.join(", ")),
            "machines may need to be started on the older model first to move both ways; same models move freely",
        );
    }
    let as_all = match others.len() {
        0 => "no other node to compare with".to_owned(),
        count => format!("the same as on {count} other node(s)"),
    };
    Finding::ok(name, format!("{told}, {as_all}"))
}

/// Whether what is offered to machines leaves the host enough.
fn memory(total_mib: Option<u64>, offered_mib: u64, committed_mib: Option<u64>) -> Finding {
    let name = "memory";
    let advice = |mib: u64| format!("offer less: memory-mib = {mib} in clusterd.toml");
    let Some(total_mib) = total_mib else {
        return Finding::warning(name, "/proc/meminfo does not say what there is", "");
    };
    let taken =
        committed_mib.map_or_else(String::new, |mib| format!(", {mib} MiB taken by machines"));
    let told = format!("{offered_mib} MiB of {total_mib} MiB are offered{taken}");
    let fits = total_mib.saturating_sub(HOST_MEMORY_MIN_MIB.max(total_mib / 16));
    if offered_mib > total_mib {
        Finding::failed(name, format!("{told}: more than there is"), advice(fits))
    } else if offered_mib > fits {
        Finding::warning(
            name,
            format!("{told}: little is left for the host itself"),
            advice(fits),
        )
    } else if committed_mib.is_some_and(|committed| committed > offered_mib) {
        Finding::warning(
            name,
            format!("{told}: more than is offered"),
            "move machines away, or offer more: memory-mib in clusterd.toml",
        )
    } else {
        Finding::ok(name, told)
    }
}

/// Whether the log survives a crash of the host, and has room.
fn data_dir(path: &Path, room: &Result<Room, String>) -> Finding {
    let name = "data directory";
    let room = match room {
        Ok(room) => room,
        Err(why) => {
            return Finding::failed(
                name,
                format!("{}: {why}", path.display()),
                "make it, or choose another: data-dir in clusterd.toml",
            );
        }
    };
    let told = format!(
        "{} on {}, {} MiB free",
        path.display(),
        room.file_system,
        room.free_bytes >> 20
    );
    if room.in_memory {
        Finding::failed(
            name,
            format!("{told}: gone after a restart of the host, and with it votes that were given"),
            "put it on a disk: data-dir in clusterd.toml",
        )
    } else if room.free_bytes < ROOM_MIN_BYTES {
        Finding::failed(name, told, "make room: a node whose log is full stops")
    } else if room.remote {
        Finding::warning(
            name,
            format!("{told}: this node waits whenever that server does"),
            "put it on a disk of this host: data-dir in clusterd.toml",
        )
    } else if room.free_bytes < ROOM_WARN_BYTES {
        Finding::warning(
            name,
            told,
            "make room: 1 GiB for the log and machines' logs",
        )
    } else {
        Finding::ok(name, told)
    }
}

/// Whether the interface carries what the others' do; `others` are nodes and their MTUs.
fn mtu(link: &Result<Link, String>, others: &[(String, u32)]) -> Finding {
    let name = "mtu";
    let link = match link {
        Ok(link) => link,
        Err(why) => {
            return Finding::warning(
                name,
                why.as_str(),
                "listen on an address of one interface: listen in clusterd.toml",
            );
        }
    };
    let told = format!("{} on {}", link.mtu, link.name);
    let differing: Vec<String> = others
        .iter()
        .filter(|(_, mtu)| *mtu != 0 && *mtu != link.mtu)
        .map(|(node, mtu)| format!("{node} has {mtu}"))
        .collect();
    let set = |mtu: u32| {
        format!(
            "ip link set dev {} mtu {mtu}, and where the host's network is configured",
            link.name
        )
    };
    if link.mtu < MTU_MIN {
        Finding::failed(name, format!("{told}, below {MTU_MIN}"), set(MTU_USUAL))
    } else if !differing.is_empty() {
        Finding::warning(
            name,
            format!(
                "{told}, and {}: large packets may be lost without a word",
                differing.join(", ")
            ),
            "give every node's interface the same MTU, and the switches between them at least that",
        )
    } else if link.mtu < MTU_USUAL {
        Finding::warning(
            name,
            format!("{told}, below Ethernet's {MTU_USUAL}"),
            set(MTU_USUAL),
        )
    } else {
        Finding::ok(name, told)
    }
}

/// Whether this host's clock agrees with `whose`; by how much theirs is ahead, ms, `None` where nobody said.
fn clock(ahead_ms: Option<i64>, whose: &str) -> Finding {
    let (name, advice) = ("clock", "keep it by NTP: timedatectl set-ntp true");
    let Some(ahead_ms) = ahead_ms else {
        return Finding::ok(name, format!("{whose} to compare with"));
    };
    let apart = ahead_ms.unsigned_abs();
    let told = match ahead_ms {
        0 => format!("the same as {whose}"),
        1.. => format!("{apart} ms behind {whose}"),
        _ => format!("{apart} ms ahead of {whose}"),
    };
    if apart > CLOCK_MAX_MS {
        Finding::failed(
            name,
            format!("{told}: certificates are not valid at such a time"),
            advice,
        )
    } else if apart > CLOCK_WARN_MS {
        Finding::warning(name, told, advice)
    } else {
        Finding::ok(name, told)
    }
}

/// Whether a volume is reached from here and can be used by this cluster.
fn volume(
    volume: &str,
    url: &str,
    cluster_id: &str,
    probe: &Result<VolumeProbe, String>,
) -> Finding {
    let name = format!("volume {volume}");
    let reach = "look at the way from this host to the server: address, firewall, and that the export lets this host in";
    match probe {
        Err(why) => Finding::failed(name, format!("{url}: {why}"), reach),
        Ok(probe) if !probe.reachable => Finding::failed(
            name,
            format!("{url} is not reached: {}", probe.error),
            reach,
        ),
        Ok(probe) if probe.owner_cluster_id != cluster_id => {
            let whose = match probe.owner_cluster_id.as_str() {
                "" => "nobody's".to_owned(),
                other => format!("the cluster {other}'s"),
            };
            Finding::failed(
                name,
                format!("{url}: what this host finds there is {whose} volume"),
                "export the same directory to every node",
            )
        }
        Ok(probe) if !probe.writable => Finding::failed(
            name,
            format!("{url} cannot be written from here: {}", probe.error),
            "export it read-write to this host, without all_squash",
        ),
        Ok(probe) => Finding::ok(
            name,
            format!(
                "{url} is reached and can be written, {} MiB free",
                probe.free_bytes >> 20
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn intel(model: &str) -> Cpu {
        Cpu {
            vendor: "GenuineIntel".into(),
            model: model.into(),
        }
    }

    fn check(what: &str, finding: &Finding, state: State, word: &str) {
        assert_eq!(finding.state, state, "{what}: {finding:?}");
        assert!(finding.detail.contains(word), "{what}: {finding:?}");
        let helps = state == State::Ok || !finding.advice.is_empty();
        assert!(
            helps || finding.detail.contains("only votes"),
            "{what}: {finding:?}"
        );
    }

    #[test]
    fn kvm_is_needed_where_machines_run() {
        let none = Err("/dev/kvm: no such file".to_owned());
        check("there", &kvm(&Ok(12), true), State::Ok, "12");
        check("old", &kvm(&Ok(10), true), State::Failed, "10");
        check("none", &kvm(&none, true), State::Failed, "no such file");
        check(
            "a witness",
            &kvm(&none, false),
            State::Warning,
            "only votes",
        );
    }

    #[test]
    fn another_vendor_is_refused_and_another_model_told() {
        let own = intel("Xeon 1");
        let amd = Cpu {
            vendor: "AuthenticAMD".into(),
            model: "EPYC".into(),
        };
        let other = |name: &str, cpu: &Cpu| (name.to_owned(), cpu.clone());
        check("alone", &cpu(&own, &[]), State::Ok, "no other node");
        check(
            "same",
            &cpu(&own, &[other("n1", &own)]),
            State::Ok,
            "1 other",
        );
        let models = [other("n1", &own), other("n2", &intel("Xeon 2"))];
        check("model", &cpu(&own, &models), State::Warning, "n2 (Xeon 2)");
        let vendors = [other("n1", &intel("Xeon 2")), other("n3", &amd)];
        check("vendor", &cpu(&own, &vendors), State::Failed, "n3 (EPYC)");
    }

    #[test]
    fn the_host_keeps_some_memory_for_itself() {
        for (offered, committed, state) in [
            (30_000, None, State::Ok),
            (30_000, Some(29_000), State::Ok),
            (30_000, Some(31_000), State::Warning),
            (32_000, None, State::Warning),
            (40_000, None, State::Failed),
        ] {
            let found = memory(Some(32_768), offered, committed);
            check(&offered.to_string(), &found, state, "32768");
        }
        assert_eq!(memory(None, 1, None).state, State::Warning);
    }

    #[test]
    fn the_log_belongs_on_a_disk_with_room() {
        let room = |in_memory, remote, free_bytes| {
            Ok(Room {
                file_system: "some fs".into(),
                in_memory,
                remote,
                free_bytes,
            })
        };
        let found = |room| data_dir(Path::new("/d"), &room);
        check(
            "disk",
            &found(room(false, false, 1 << 40)),
            State::Ok,
            "some fs",
        );
        check(
            "tmpfs",
            &found(room(true, false, 1 << 40)),
            State::Failed,
            "restart",
        );
        check(
            "nfs",
            &found(room(false, true, 1 << 40)),
            State::Warning,
            "server",
        );
        check(
            "little",
            &found(room(false, false, 1 << 29)),
            State::Warning,
            "512",
        );
        check(
            "none",
            &found(room(false, false, 1 << 20)),
            State::Failed,
            "1 MiB",
        );
        check("no", &found(Err("denied".into())), State::Failed, "denied");
    }

    #[test]
    fn one_mtu_is_used_by_all() {
        let link = |mtu| {
            Ok(Link {
                name: "eth0".into(),
                mtu,
            })
        };
        let others = [
            ("n1".to_owned(), 1_500),
            ("n2".to_owned(), 9_000),
            ("n3".to_owned(), 0),
        ];
        check("same", &mtu(&link(1_500), &others[..1]), State::Ok, "eth0");
        check(
            "unknown",
            &mtu(&link(1_500), &others[2..]),
            State::Ok,
            "1500",
        );
        check(
            "other",
            &mtu(&link(1_500), &others),
            State::Warning,
            "n2 has 9000",
        );
        check("tunnel", &mtu(&link(1_420), &[]), State::Warning, "1420");
        check("tiny", &mtu(&link(576), &[]), State::Failed, "576");
        check(
            "none",
            &mtu(&Err("no interface".into()), &[]),
            State::Warning,
            "no interface",
        );
    }

    #[test]
    fn a_clock_may_differ_by_a_second() {
        for (ahead, state, word) in [
            (0, State::Ok, "the same"),
            (900, State::Ok, "900 ms behind n1"),
            (-900, State::Ok, "900 ms ahead of n1"),
            (1_001, State::Warning, "behind"),
            (-3_600_001, State::Failed, "certificates"),
        ] {
            check(&ahead.to_string(), &clock(Some(ahead), "n1"), state, word);
        }
        check(
            "alone",
            &clock(None, "no other node"),
            State::Ok,
            "no other node",
        );
    }

    #[test]
    fn a_volume_must_be_this_clusters_as_seen_from_here() {
        let probe = |change: fn(&mut VolumeProbe)| {
            let mut probe = VolumeProbe {
                reachable: true,
                owner_cluster_id: "c1".into(),
                writable: true,
                ..VolumeProbe::default()
            };
            change(&mut probe);
            volume("vol-a", "nfs://s/e", "c1", &Ok(probe))
        };
        check("good", &probe(|_| {}), State::Ok, "nfs://s/e");
        check(
            "away",
            &probe(|p| p.reachable = false),
            State::Failed,
            "not reached",
        );
        check(
            "other",
            &probe(|p| p.owner_cluster_id = "c2".into()),
            State::Failed,
            "c2",
        );
        check(
            "empty",
            &probe(|p| p.owner_cluster_id.clear()),
            State::Failed,
            "nobody's",
        );
        check(
            "ro",
            &probe(|p| p.writable = false),
            State::Failed,
            "written",
        );
        let silent = volume("vol-a", "nfs://s/e", "c1", &Err("no broker".into()));
        check("silent", &silent, State::Failed, "no broker");
    }

    #[test]
    fn a_table_says_what_to_try_under_what_is_wrong() {
        let findings = [
            Finding::ok("kvm", "opens"),
            Finding::failed("clock", "wrong", "set it"),
        ];
        assert_eq!(
            table(&findings),
            "ok       kvm    opens\nfailed   clock  wrong\n                try: set it"
        );
        assert!(any_failed(&findings) && !any_failed(&findings[..1]));
    }
}
