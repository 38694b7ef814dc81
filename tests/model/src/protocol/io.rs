//! The guest's WRITEs, and what the server makes of them.

use super::Protocol;
use crate::host::{Guest, Node};
use crate::state::State;
use crate::step::Step;
use crate::storage::Write;

/// What may happen.
pub fn offer(protocol: &Protocol, state: &State, steps: &mut Vec<Step>) {
    let under_way = state.storage.writes().count();
    for node in Node::ALL {
        let room = under_way < usize::from(protocol.bounds.writes);
        if state.runs(node) && room && !state.unanswered(node) {
            steps.push(Step::WriteSent(node));
        }
    }
    for write in state.storage.writes() {
        steps.push(if write.checked {
            Step::WriteLands(write)
        } else {
            Step::WriteChecked(write)
        });
    }
}

/// A WRITE leaves under the guest's token.
pub fn sent(protocol: &Protocol, state: &mut State, node: Node) {
    let token = state.host(node).token;
    state.storage.send(Write {
        node,
        token,
        group: protocol.group(node, token),
        checked: false,
    });
}

/// The server looks at the file's group once, now. A guest that is refused stops and asks the log.
pub fn checked(state: &mut State, write: Write) {
    state.storage.take(write);
    if write.group == state.storage.group {
        state.storage.send(Write {
            checked: true,
            ..write
        });
        return;
    }
    let host = state.host_mut(write.node);
    if matches!(host.guest, Guest::Running | Guest::Frozen) && host.token == write.token {
        host.guest = Guest::Held;
    }
}

/// The file changes, whatever its group is by now.
pub fn lands(state: &mut State, write: Write) {
    state.storage.take(write);
    state.landed_late |= write.token < state.newest_run;
}
