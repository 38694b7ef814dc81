//! The replicated state as JSON, and log entries: what a snapshot, a peer or an older version may have written.
//!
//! ```text
//!  first byte   0       a state as a snapshot holds it: every decision can be made about it
//!               1       entries, one a line, applied to a small cluster: never a panic, and a snapshot
//!                       of what they led to gives the same state back
//!               2       a small cluster's state with some values changed
//!               else    commands with some values changed, applied to it
//! ```

use std::sync::OnceLock;

use cluster_model::{ClusterState, Command, Envelope, LogIndex};
use serde_json::Value;

use crate::cluster;
use crate::input::Input;
use crate::json::disturb;
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
                same_after_a_snapshot(&state);
            }
        }
        Some((1, text)) => entries(text),
        Some((2, changes)) => {
            let mut state = cached(&STATE, cluster::state);
            disturb(&mut state, &mut Input(changes));
            if let Ok(state) = serde_json::from_value::<ClusterState>(state) {
                cluster::decide_everything(&state);
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
        let mut command = all[usize::from(input.u8()) % all.len()].clone();
        disturb(&mut command, &mut input);
        if let Ok(command) = serde_json::from_value::<Command>(command) {
            let index = LogIndex(state.applied.0.saturating_add(1));
            state.apply(index, &cluster::envelope(number, command));
            cluster::decide_everything(&state);
        }
    }
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
    let commands = (0..40u8).flat_map(|command| [command, 0]);
    seeds.push([3].into_iter().chain(commands).collect());
    seeds.push(vec![3, 16, 0, 9, 0, 2, 0, 13, 1, 5, 0, 255]);
    seeds.push(vec![2, 1, 30, 0, 255]);
    seeds
}

/// Commands that can follow [`cluster::history`].
fn more() -> Vec<cluster_model::Command> {
    use cluster_model::{Command as C, *};
    let (vm, other) = (VmId(8), VmId(9));
    let why = Why::default;
    let migration = MigrationId(12);
    vec![
        C::StartMigration {
            migration,
            expects: Token(1),
            ticket: "ab".repeat(32),
        },
        C::StartVm {
            vm: other,
            node: NodeId(2),
            expects: Token::NONE,
            why: why(),
        },
        C::Release {
            vm,
            node: NodeId(1),
            expects: Token(1),
            reason: ReleaseReason::Stopped,
        },
        C::StartDrain {
            node: NodeId(1),
            reason: "disks".into(),
        },
        C::DrainTrouble {
            node: NodeId(1),
            vm,
            reason: "no room".into(),
            stuck: true,
        },
        C::EndDrain { node: NodeId(1) },
        C::Uncordon { node: NodeId(1) },
        C::Absent {
            node: NodeId(3),
            incarnation: Incarnation(1),
            duration_ms: 1,
        },
        C::NodeLost {
            node: NodeId(1),
            incarnation: Incarnation(1),
            why: why(),
        },
        C::RemoveNode { node: NodeId(3) },
        C::SetDesired {
            vm,
            desired: Desired::Stopped,
            forced: false,
        },
        C::DeleteVm { vm: other },
    ]
}
