//! The two copies of a state stay the same, whoever holds on to an old one.

use cluster_model::{ClusterState, Command, Envelope, Name, RequestId, Sha256};

use super::super::snapshot;
use super::super::types::SnapshotMeta;
use super::*;

#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
struct Sum {
    applied: Vec<(u64, u64)>,
}

impl Machine for Sum {
    type Command = u64;
    type Reply = usize;
    fn apply(&mut self, index: u64, command: &u64) -> usize {
        self.applied.push((index, *command));
        self.applied.len()
    }
}

fn step(twin: &mut Twin<Sum>, index: u64) -> Arc<Sum> {
    let command = index * 7;
    twin.next().apply(index, &command);
    twin.swap(vec![(index, command)])
}

#[test]
fn both_copies_apply_every_command_once_also_when_readers_hold_old_states() {
    let mut twin = Twin::new(Sum::default());
    let mut held = Vec::new();
    for index in 0..100 {
        let state = step(&mut twin, index);
        let expected: Vec<_> = (0..=index).map(|index| (index, index * 7)).collect();
        assert_eq!(state.applied, expected);
        // Some readers keep a state for a while, some for ever.
        if index % 3 == 0 {
            held.push((index, state));
        }
        if index % 10 == 0 {
            held.truncate(2);
        }
    }
    for (index, state) in held {
        assert_eq!(
            state.applied.len() as u64,
            index + 1,
            "a published state never changes"
        );
    }
}

#[test]
fn without_readers_the_copies_take_turns_and_nothing_is_cloned() {
    let mut twin = Twin::new(Sum::default());
    step(&mut twin, 0);
    step(&mut twin, 1);
    let first = Arc::as_ptr(&twin.front);
    step(&mut twin, 2);
    let second = Arc::as_ptr(&twin.front);
    assert_ne!(first, second);
    step(&mut twin, 3);
    assert_eq!(Arc::as_ptr(&twin.front), first);
}

#[test]
fn the_clusters_state_goes_through_a_snapshot_unchanged() {
    let mut state = ClusterState::default();
    let name = |text: &str| Name::new(text).unwrap();
    let join = |address: &str| Command::JoinNode {
        token: "t".into(),
        secret_hash: Sha256([2; 32]),
        name: name("n2"),
        address: address.into(),
        key: Sha256([3; 32]),
    };
    let commands = [
        Command::InitCluster {
            id: "6a1f0f0e-0000-4000-8000-000000000001".into(),
            name: name("c1"),
            broker_uid: 900,
            node_name: name("n1"),
            address: "127.0.0.1:7000".into(),
        },
        Command::CreateJoinToken {
            id: "t".into(),
            node: name("n2"),
            role: cluster_model::NodeRole::Voter,
            secret_hash: Sha256([2; 32]),
            expires_at_ms: 60_000,
        },
        join("127.0.0.2:7000"),
        // Refused: the answer is part of the state, too.
        join("127.0.0.3:7000"),
    ];
    for (index, command) in commands.into_iter().enumerate() {
        let envelope = Envelope {
            request: RequestId(format!("r{index}")),
            actor: "test".into(),
            at_ms: 1_000 + index as u64,
            asked: None,
            command,
        };
        // The command crosses the log as JSON.
        let json = serde_json::to_vec(&envelope).unwrap();
        let envelope: Envelope = serde_json::from_slice(&json).unwrap();
        Machine::apply(&mut state, index as u64 + 1, &envelope);
    }
    assert_eq!(state.nodes.len(), 2);
    let data = snapshot::encode(&SnapshotMeta::default(), &state).unwrap();
    let (_, back) = snapshot::decode::<ClusterState>(&data).unwrap();
    assert_eq!(back, state);
    assert_eq!(back.digest(), state.digest());
    for at in (0..data.0.len()).step_by(7) {
        let mut damaged = data.0.to_vec();
        damaged[at] ^= 0x10;
        assert!(
            snapshot::decode::<ClusterState>(&SnapshotData(damaged.into())).is_err(),
            "byte {at}"
        );
    }
}
