//! What a controller's decision is called in the log, so that the same one is done once.

use crate::command::Command;
use crate::ids::RequestId;
use crate::state::ClusterState;

/// FNV-1a with 128 bits.
const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;

/// The id of what `controller` decided in `state`: `drain/vm/web-1/3f…/@118`.
///
/// It is made of the controller, all of the command, and the entry that the state was applied up to: two nodes
/// that both take themselves for the leader and decide the same ask for it once, and two decisions that differ in
/// anything are two. What a leader draws at random is no part of what it decided. The digest keeps ids short
/// (they are in every snapshot) and guards against chance, not against malice: whoever proposes could take any id.
pub fn request_id(controller: &str, command: &Command, state: &ClusterState) -> RequestId {
    let content = content(command);
    let digest = content.bytes().fold(OFFSET, |digest, byte| {
        (digest ^ u128::from(byte)).wrapping_mul(PRIME)
    });
    let object = command.object(state);
    RequestId(format!(
        "{controller}/{object}/{digest:032x}/@{}",
        state.applied.0
    ))
}

/// All of a command that was decided, as the log writes it.
fn content(command: &Command) -> String {
    let decided = match command {
        Command::StartMigration {
            migration,
            expects,
            ticket: _,
        } => &Command::StartMigration {
            migration: *migration,
            expects: *expects,
            ticket: String::new(),
        },
        other => other,
    };
    serde_json::to_string(decided).unwrap_or_else(|_| format!("{decided:?}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::event::{Object, Severity, Why};
    use crate::ids::{LogIndex, MigrationId, NodeId, Token, VmId};
    use crate::testing::World;

    /// Commands of every kind that controllers propose, each pair alike but for one thing.
    fn decisions() -> Vec<Command> {
        let (one, other) = (VmId(1), VmId(2));
        let start = |vm, node, expects, rule: &str| Command::StartVm {
            vm,
            node: NodeId(node),
            expects: Token(expects),
            why: Why::rule(rule),
        };
        let note = |kind: &str, detail: &str| Command::Note {
            objects: vec![Object::Vm(one)],
            severity: Severity::Info,
            kind: kind.into(),
            detail: detail.into(),
            why: Why::rule("r"),
        };
        let trouble = |vm, reason: &str, stuck| Command::DrainTrouble {
            node: NodeId(1),
            vm,
            reason: reason.into(),
            stuck,
        };
        let away = |vm, reason: &str| Command::StayAway {
            node: NodeId(1),
            vm,
            reason: reason.into(),
        };
        vec![
            start(one, 1, 1, "r"),
            start(other, 1, 1, "r"),
            start(one, 2, 1, "r"),
            start(one, 1, 2, "r"),
            start(one, 1, 1, "another"),
            note("a", "x"),
            note("a", "y"),
            note("b", "x"),
            trouble(one, "x", false),
            trouble(one, "x", true),
            trouble(one, "y", false),
            trouble(other, "x", false),
            away(one, "x"),
            away(one, "y"),
            away(other, "x"),
            Command::EndDrain { node: NodeId(1) },
            Command::EndDrain { node: NodeId(2) },
            Command::EndFailback { node: NodeId(1) },
            Command::EndFailback { node: NodeId(2) },
            // No controller of today asks for these: they must not fall together when one does.
            Command::DeleteVm { vm: one },
            Command::DeleteVm { vm: other },
            Command::RemoveNode { node: NodeId(1) },
            Command::RemoveNode { node: NodeId(2) },
            Command::AbortMigration {
                migration: MigrationId(1),
                reason: "x".into(),
            },
            Command::AbortMigration {
                migration: MigrationId(1),
                reason: "y".into(),
            },
        ]
    }

    #[test]
    fn two_decisions_at_one_entry_never_share_an_id() {
        let world = World::new(2, 1_024);
        let decisions = decisions();
        let ids: BTreeSet<RequestId> = decisions
            .iter()
            .map(|command| request_id("c", command, &world.state))
            .collect();
        assert_eq!(ids.len(), decisions.len());
        // The same at another entry, or of another controller, is another decision.
        let mut later = world.state.clone();
        later.applied = LogIndex(later.applied.0 + 1);
        for command in &decisions {
            let id = request_id("c", command, &world.state);
            assert_ne!(id, request_id("c", command, &later));
            assert_ne!(id, request_id("d", command, &world.state));
            assert!(id.0.len() < 160, "{}", id.0);
        }
    }

    #[test]
    fn two_leaders_that_decide_the_same_ask_for_it_once() {
        let world = World::new(2, 1_024);
        for command in decisions() {
            let again = command.clone();
            assert_eq!(
                request_id("c", &command, &world.state),
                request_id("c", &again, &world.state.clone())
            );
        }
        let start = |ticket: &str| Command::StartMigration {
            migration: MigrationId(7),
            expects: Token(3),
            ticket: ticket.into(),
        };
        assert_eq!(
            request_id("migrations", &start("drawn here"), &world.state),
            request_id("migrations", &start("drawn there"), &world.state)
        );
    }
}
