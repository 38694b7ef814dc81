//! What the log drives: a pure state that applies commands.

use std::fmt::Debug;

use cluster_model::{ClusterState, Envelope, LogIndex, Reply};
use serde::Serialize;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// A replicated state: the same commands in the same order give the same state on every node.
///
/// `apply` must not fail, panic, or read anything but its arguments. Nodes may apply a command more than
/// once to different copies of the state.
pub trait Machine:
    Clone + Debug + Default + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// What can be asked.
    type Command: Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static;
    /// What it answers.
    type Reply: Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static;

    /// Applies the command of the entry at `index`.
    fn apply(&mut self, index: u64, command: &Self::Command) -> Self::Reply;

    /// A hash of the whole state; equal states have equal digests on every node.
    fn digest(&self) -> u64 {
        digest_json(self)
    }
}

/// The hash of a value's JSON, without building the JSON in memory.
pub fn digest_json(value: &impl Serialize) -> u64 {
    struct Sink(Xxh3);
    impl std::io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.update(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut sink = Sink(Xxh3::new());
    match serde_json::to_writer(&mut sink, value) {
        Ok(()) => sink.0.digest(),
        // The sink takes everything, so only a value that has no JSON comes here; it has no snapshot
        // either, and the error's text is as deterministic as the value.
        Err(error) => xxh3_64(error.to_string().as_bytes()),
    }
}

impl Machine for ClusterState {
    type Command = Envelope;
    type Reply = Reply;

    fn apply(&mut self, index: u64, command: &Envelope) -> Reply {
        ClusterState::apply(self, LogIndex(index), command)
    }
}
