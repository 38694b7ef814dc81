//! The replicated state as JSON, and log entries: what a snapshot, a peer or an older version may have written.
//!
//! ```text
//!  first byte   0       a state as a snapshot holds it: every decision can be made about it
//!               else    entries, one a line, applied to a small cluster: never a panic, and a snapshot
//!                       of what they led to gives the same state back
//! ```

use cluster_model::{ClusterState, Envelope, LogIndex};

use crate::cluster;
use crate::target::{MemoryBound, Target};

/// The target.
pub const TARGET: Target = Target {
    name: "snapshot",
    run,
    seeds,
    input_bytes_max: 16 << 10,
    // A state, its copy, and their text: a few hundred bytes for each short record.
    memory: MemoryBound {
        base: 2 << 20,
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
        Some((_, text)) => entries(text),
    }
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
    seeds.push(
        [
            &[0],
            &serde_json::to_vec(&ClusterState::default()).unwrap_or_default()[..],
        ]
        .concat(),
    );
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
