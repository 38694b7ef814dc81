//! The replicated state as JSON, and log entries: what a snapshot, a peer or an older version may have written.
//!
//! ```text
//!  first byte   0       a state as a snapshot holds it: every decision can be made about it, all of it
//!                       can be shown
//!               1       entries, one a line, applied to a small cluster: never a panic, and a snapshot
//!                       of what they led to gives the same state back
//!               2       a small cluster's state with some values changed
//!               else    entries with some values changed, applied to it
//! ```

use std::sync::OnceLock;

use cluster_model::{ClusterState, Envelope, LogIndex};
use serde_json::{Value, json};

use crate::alone::look_at_everything;
use crate::cluster;
use crate::input::Input;
use crate::json::disturb;
use crate::runtime::block_on;
use crate::target::{MemoryBound, Target};

/// The target.
pub const TARGET: Target = Target {
    name: "snapshot",
    run,
    seeds,
    input_bytes_max: 16 << 10,
    // A state, its copy, and their text: a few hundred bytes for each short record.
    memory: MemoryBound {
        base: 4 << 20,
        each: 1024,
    },
};

fn run(data: &[u8]) {
    match data.split_first() {
        None => {}
        Some((0, text)) => {
            if let Ok(state) = serde_json::from_slice::<ClusterState>(text) {
                cluster::decide_everything(&state);
                block_on(look_at_everything(&state));
                same_after_a_snapshot(&state);
            }
        }
        Some((1, text)) => entries(text),
        Some((2, changes)) => {
            let mut state = cached(&STATE, cluster::state);
            disturb(&mut state, &mut Input(changes));
            if let Ok(state) = serde_json::from_value::<ClusterState>(state) {
                cluster::decide_everything(&state);
                block_on(look_at_everything(&state));
                same_after_a_snapshot(&state);
            }
        }
        Some((_, changes)) => commands(Input(changes)),
    }
}

static STATE: OnceLock<Value> = OnceLock::new();
static COMMANDS: OnceLock<Value> = OnceLock::new();

/// A value as JSON, made once.
fn cached<T: serde::Serialize>(place: &OnceLock<Value>, make: impl FnOnce() -> T) -> Value {
    place
        .get_or_init(|| serde_json::to_value(make()).unwrap_or_default())
        .clone()
}

/// Applies commands that the input picks and changes.
fn commands(mut input: Input<'_>) {
    const COMMANDS_MAX: u64 = 24;
    let all = cached(&COMMANDS, || [cluster::history(), more()].concat());
    let Value::Array(all) = all else { return };
    let mut state = cluster::state();
    for number in 100..100 + COMMANDS_MAX {
        if input.is_empty() {
            break;
        }
        let command = &all[usize::from(input.u8()) % all.len()];
        let mut entry = json!({
            "request": format!("r{number}"), "actor": "fuzz", "at_ms": 2_000_000 + number, "command": command,
        });
        disturb(&mut entry, &mut input);
        if let Ok(entry) = serde_json::from_value::<Envelope>(entry) {
            state.apply(LogIndex(state.applied.0.saturating_add(1)), &entry);
            cluster::decide_everything(&state);
        }
    }
    block_on(look_at_everything(&state));
    same_after_a_snapshot(&state);
}

fn entries(text: &[u8]) {
    let mut state = cluster::state();
    let lines = text.split(|byte| *byte == b'\n');
    for line in lines {
        let Ok(envelope) = serde_json::from_slice::<Envelope>(line) else {
            continue;
        };
        state.apply(LogIndex(state.applied.0 + 1), &envelope);
    }
    cluster::decide_everything(&state);
    block_on(look_at_everything(&state));
    same_after_a_snapshot(&state);
}

fn same_after_a_snapshot(state: &ClusterState) {
    let text = serde_json::to_vec(state).expect("a state has a JSON form");
    let again: ClusterState = serde_json::from_slice(&text).expect("a snapshot can be read");
    assert!(again == *state, "a snapshot gives another state back");
}

fn seeds() -> Vec<Vec<u8>> {
    let state = cluster::state();
    let snapshot = serde_json::to_vec(&state).unwrap_or_default();
    let more = more();
    let entry = |(number, command)| {
        serde_json::to_vec(&cluster::envelope(number, command)).unwrap_or_default()
    };
    let lines: Vec<Vec<u8>> = (100..).zip(more).map(entry).collect();
    let mut seeds: Vec<Vec<u8>> = lines
        .iter()
        .map(|line| [&[1], &line[..]].concat())
        .collect();
    seeds.push([&[1], &lines.join(&b'\n')[..]].concat());
    seeds.push([&[0], &snapshot[..]].concat());
    let first = cluster::history().len() as u8;
    let commands = (first..first + 22).flat_map(|command| [command, 0]);
    seeds.push([3].into_iter().chain(commands).collect());
    seeds.push(vec![
        3,
        first,
        0,
        first + 2,
        1,
        5,
        0,
        255,
        first + 3,
        1,
        4,
        0,
        255,
    ]);
    seeds.push(vec![2, 1, 30, 0, 255]);
    seeds
}

/// Commands that can follow [`cluster::history`]: first a migration to its end, then the others.
fn more() -> Vec<cluster_model::Command> {
    use cluster_model::{Command as C, *};
    let (vm, other) = (VmId(8), VmId(9));
    let (first, second) = (NodeId(1), NodeId(2));
    let why = Why::default;
    let migration = MigrationId(12);
    let summary = json!({
        "total_us": 9_000_000, "blackout_us": 17_000, "parts": [{"name": "drain", "us": 1_000}],
        "memory_total_bytes": 64 << 20, "sent_bytes": 70 << 20, "pages": 16_384, "zero_pages": 100,
        "rounds": [{"number": 1, "pages": 16_384, "zero_pages": 100, "bytes": 64 << 20,
                    "duration_us": 500_000, "dirty_pages_after": 40}],
    });
    vec![
        C::StartMigration {
            migration,
            expects: Token(1),
            ticket: "ab".repeat(32),
        },
        C::RenewMigrationToken {
            migration,
            burnt: Token(2),
        },
        C::Cutover {
            migration,
            expects: Token(1),
            claimed: Token(3),
        },
        C::ReportMigration { migration, summary },
        C::AbortMigration {
            migration,
            reason: "asked".into(),
        },
        C::StartVm {
            vm: other,
            node: second,
            expects: Token::NONE,
            why: why(),
        },
        C::DisksMade {
            vm: other,
            token: Token(4),
        },
        C::Rekey {
            vm,
            node: second,
            expects: Token(3),
            settle: true,
            reason: "a write is in doubt".into(),
        },
        C::Release {
            vm,
            node: second,
            expects: Token(5),
            reason: ReleaseReason::Stopped,
        },
        C::StartDrain {
            node: first,
            reason: "disks".into(),
        },
        C::DrainTrouble {
            node: first,
            vm,
            reason: "no room".into(),
            stuck: true,
        },
        C::EndDrain { node: first },
        C::Uncordon {
            node: first,
            failback: true,
        },
        C::StayAway {
            node: first,
            vm,
            reason: "no room".into(),
        },
        C::EndFailback { node: first },
        C::Absent {
            node: NodeId(3),
            incarnation: Incarnation(1),
            duration_ms: 1,
        },
        C::NodeLost {
            node: first,
            incarnation: Incarnation(1),
            why: why(),
        },
        C::RemoveNode { node: NodeId(3) },
        C::SetRule {
            name: cluster::name("apart"),
            rule: Some(Rule::AntiAffinity {
                vms: [vm, other].into(),
            }),
        },
        C::SetSettings {
            settings: Settings::fast(),
        },
        C::SetDesired {
            vm,
            desired: Desired::Stopped,
            forced: false,
        },
        C::Note {
            objects: vec![Object::Vm(vm)],
            severity: Severity::Warn,
            kind: "vm.note".into(),
            detail: "something happened".into(),
            why: why(),
        },
        C::DeleteVm { vm: other },
        C::RemoveVolume {
            volume: VolumeId(7),
        },
    ]
}
