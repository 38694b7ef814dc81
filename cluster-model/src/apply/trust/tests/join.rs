//! The way in: each refusal, and one token under every interleaving of knocks.

use proptest::prelude::*;

use super::{last_event, refusal, too_large};
use crate::command::{Command, Outcome, Rejection, Reply};
use crate::ids::{Incarnation, NodeId};
use crate::state::NodeRole;
use crate::testing::{World, hash, join, join_token, name};
use crate::trust::{JOIN_TOKENS_MAX, Sha256, TrustRefusal};

/// `join("n2")` with one thing changed.
fn join_with(change: impl FnOnce(&mut String, &mut Sha256, &mut String, &mut Sha256)) -> Command {
    match join("n2") {
        Command::JoinNode {
            mut token,
            mut secret_hash,
            name,
            mut address,
            mut key,
        } => {
            change(&mut token, &mut secret_hash, &mut address, &mut key);
            Command::JoinNode {
                token,
                secret_hash,
                name,
                address,
                key,
            }
        }
        other => panic!("{other:?}"),
    }
}

fn expiring(label: &str, at_ms: u64) -> Command {
    match join_token(label, NodeRole::Voter) {
        Command::CreateJoinToken {
            id,
            node,
            role,
            secret_hash,
            ..
        } => Command::CreateJoinToken {
            id,
            node,
            role,
            secret_hash,
            expires_at_ms: at_ms,
        },
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_node_comes_in_by_its_token_with_the_tokens_role_and_its_own_key() {
    let mut world = World::new(1, 64);
    world.done(join_token("n2", NodeRole::Learner));
    assert_eq!(last_event(&world), "join-token.made");
    let index = world.state.applied.0 + 1;
    assert_eq!(world.done(join("n2")), Outcome::Node(NodeId(index)));
    let node = &world.state.nodes[&NodeId(index)];
    assert_eq!(node.role, NodeRole::Learner);
    assert_eq!(node.key, Some(hash("key-n2")));
    assert_eq!(last_event(&world), "node.added");
    // Its answer was lost: it is who it is.
    assert_eq!(world.done(join("n2")), Outcome::Node(NodeId(index)));
    // Once it has spoken nobody is let in by that token, itself neither.
    world.register(NodeId(index), Incarnation(1), 64);
    let used = TrustRefusal::JoinTokenUsed { node: name("n2") };
    assert_eq!(refusal(&mut world, join("n2")), used);
}

#[test]
fn asking_what_would_be_joined_is_judged_as_the_join_is_and_spends_nothing() {
    let mut world = World::new(1, 64);
    let end = world.now_ms + 1_000;
    world.done(expiring("n2", end));
    let Command::JoinNode {
        token, secret_hash, ..
    } = join("n2")
    else {
        panic!("not a join");
    };
    let (n2, n3) = (name("n2"), name("n3"));
    let ask = |world: &World, secret: &Sha256, name, at_ms| {
        world.state.would_join(&token, secret, name, at_ms)
    };
    let before = world.state.clone();
    assert_eq!(ask(&world, &secret_hash, &n2, end - 1), Ok(NodeRole::Voter));
    let wrong = TrustRefusal::JoinTokenWrong;
    let other = TrustRefusal::JoinTokenForOther {
        node: n2.clone(),
        name: n3.clone(),
    };
    let expired = TrustRefusal::JoinTokenExpired { node: n2.clone() };
    for (secret, name, at_ms, refusal) in [
        (hash("guess"), &n2, end - 1, wrong),
        (secret_hash, &n3, end - 1, other),
        (secret_hash, &n2, end, expired),
    ] {
        let refused = ask(&world, &secret, name, at_ms);
        assert_eq!(refused, Err(Rejection::Trust(refusal)));
    }
    assert_eq!(world.state, before);
    world.done(join("n2"));
    let used = TrustRefusal::JoinTokenUsed { node: n2.clone() };
    let refused = ask(&world, &secret_hash, &n2, end - 1);
    assert_eq!(refused, Err(Rejection::Trust(used)));
}

#[test]
fn whoever_guesses_learns_nothing_and_whoever_knows_the_secret_is_told_what_is_wrong() {
    let mut world = World::new(1, 64);
    let end = world.now_ms + 1_000;
    world.done(expiring("n2", end));
    let unknown = join_with(|token, _, _, _| *token = "none".into());
    let wrong = join_with(|_, secret, _, _| *secret = hash("guess"));
    for guess in [unknown.clone(), wrong.clone()] {
        assert_eq!(refusal(&mut world, guess), TrustRefusal::JoinTokenWrong);
    }
    let Command::JoinNode {
        token,
        secret_hash,
        address,
        key,
        ..
    } = join("n2")
    else {
        panic!("not a join");
    };
    let other_name = Command::JoinNode {
        token,
        secret_hash,
        name: name("n3"),
        address,
        key,
    };
    assert_eq!(
        refusal(&mut world, other_name),
        TrustRefusal::JoinTokenForOther {
            node: name("n2"),
            name: name("n3"),
        }
    );
    world.done(join("n2"));
    let used = TrustRefusal::JoinTokenUsed { node: name("n2") };
    let other_key = join_with(|_, _, _, key| *key = hash("key-n9"));
    let other_address = join_with(|_, _, address, _| *address = "elsewhere:1".into());
    for other in [other_key, other_address] {
        assert_eq!(refusal(&mut world, other), used);
    }
    world.now_ms = end;
    assert_eq!(
        refusal(&mut world, join("n2")),
        TrustRefusal::JoinTokenExpired { node: name("n2") }
    );
    // That it is spent is no news for whoever guesses.
    assert_eq!(refusal(&mut world, wrong), TrustRefusal::JoinTokenWrong);
    assert_eq!(world.state.nodes.len(), 2);
}

#[test]
fn a_token_lets_in_until_the_last_millisecond_before_its_end_by_the_entrys_own_time() {
    for (late_ms, lets_in) in [(1, true), (0, false)] {
        let mut world = World::new(1, 64);
        let end = world.now_ms + 1_000;
        world.done(expiring("n2", end));
        // The next entry is ten milliseconds on.
        world.now_ms = end - 10 - late_ms;
        let reply = world.ask(join("n2"));
        assert_eq!(matches!(reply, Reply::Done { .. }), lets_in, "{reply:?}");
    }
}

#[test]
fn every_refusal_of_a_join_token_leaves_none_behind() {
    let mut world = World::new(2, 64);
    let now_ms = world.now_ms;
    let standing = world.state.trust.join_tokens.clone();
    assert_eq!(
        refusal(&mut world, expiring("n3", now_ms)),
        TrustRefusal::ExpiredAtOnce
    );
    assert!(matches!(
        world.refused(Command::CreateJoinToken {
            id: "again".into(),
            node: name("n2"),
            role: NodeRole::Voter,
            secret_hash: hash("s"),
            expires_at_ms: u64::MAX,
        }),
        Rejection::NameTaken { .. }
    ));
    for id in ["", "a/b", "ä", &"x".repeat(65)] {
        let token = Command::CreateJoinToken {
            id: id.into(),
            node: name("n3"),
            role: NodeRole::Voter,
            secret_hash: hash("s"),
            expires_at_ms: u64::MAX,
        };
        let refused = refusal(&mut world, token);
        assert!(matches!(refused, TrustRefusal::BadTokenId { .. }), "{id}");
    }
    assert_eq!(world.state.trust.join_tokens, standing);
}

#[test]
fn one_token_for_a_name_stands_at_a_time() {
    let mut world = World::new(1, 64);
    let end = world.now_ms + 1_000;
    world.done(expiring("n2", end));
    world.done(expiring("n2", end));
    let second = |id: &str| Command::CreateJoinToken {
        id: id.into(),
        node: name("n2"),
        role: NodeRole::Voter,
        secret_hash: hash("another"),
        expires_at_ms: u64::MAX,
    };
    assert_eq!(
        refusal(&mut world, second("second")),
        TrustRefusal::JoinTokenStands {
            node: name("n2"),
            id: "join-n2".into(),
        }
    );
    assert_eq!(
        refusal(&mut world, second("join-n2")),
        TrustRefusal::TokenIdTaken {
            id: "join-n2".into(),
        }
    );
    let revoke = Command::RevokeJoinToken {
        id: "join-n2".into(),
    };
    world.done(revoke.clone());
    assert_eq!(last_event(&world), "join-token.revoked");
    assert_eq!(
        refusal(&mut world, revoke),
        TrustRefusal::UnknownJoinToken {
            id: "join-n2".into(),
        }
    );
    assert_eq!(
        refusal(&mut world, join("n2")),
        TrustRefusal::JoinTokenWrong
    );
    world.done(second("second"));
    // An expired one does not stand in the way.
    let mut world = World::new(1, 64);
    let end = world.now_ms + 1_000;
    world.done(expiring("n2", end));
    world.now_ms = end;
    world.done(second("second"));
}

#[test]
fn a_removed_node_leaves_no_token_to_come_back_by() {
    let mut world = World::new(3, 64);
    world.done(Command::RemoveNode { node: NodeId(2) });
    assert!(!world.state.trust.join_tokens.contains_key("join-n2"));
    assert!(world.state.trust.join_tokens.contains_key("join-n3"));
    assert_eq!(
        refusal(&mut world, join("n2")),
        TrustRefusal::JoinTokenWrong
    );
    // A new token, and it comes in anew, even with the key it had.
    assert!(world.let_in("n2", NodeRole::Voter) > NodeId(3));
}

#[test]
fn two_nodes_do_not_share_a_key_nor_a_name() {
    let mut world = World::new(2, 64);
    world.done(join_token("n3", NodeRole::Voter));
    let Command::JoinNode {
        token,
        secret_hash,
        name: node,
        address,
        ..
    } = join("n3")
    else {
        panic!("not a join");
    };
    let copied = Command::JoinNode {
        token,
        secret_hash,
        name: node,
        address,
        key: hash("key-n2"),
    };
    assert_eq!(
        refusal(&mut world, copied),
        TrustRefusal::KeyTaken { node: name("n2") }
    );
    world.done(join("n3"));
    // A proposer whose clock lags finds an expired token still good: the name is taken all the same.
    let mut world = World::new(1, 64);
    let early = world.now_ms;
    world.done(expiring("n2", early + 1_000));
    world.now_ms = early + 1_000;
    world.done(Command::CreateJoinToken {
        id: "second".into(),
        node: name("n2"),
        role: NodeRole::Voter,
        secret_hash: hash("another"),
        expires_at_ms: u64::MAX,
    });
    world.done(join_with(|token, secret, _, _| {
        *token = "second".into();
        *secret = hash("another");
    }));
    world.now_ms = early;
    assert!(matches!(
        world.refused(join_with(|_, _, _, key| *key = hash("key-n9"))),
        Rejection::NameTaken { .. }
    ));
}

#[test]
fn spent_join_tokens_make_room_and_standing_ones_do_not() {
    let mut world = World::new(2, 64);
    // `join-n2` is used and its node has spoken. This one is used and its node has not.
    world.let_in("silent", NodeRole::Voter);
    let end = world.now_ms + 1_000_000;
    for number in 2..JOIN_TOKENS_MAX {
        world.done(expiring(&format!("m{number}"), end));
    }
    assert_eq!(world.state.trust.join_tokens.len(), JOIN_TOKENS_MAX);
    world.done(join_token("first", NodeRole::Voter));
    assert!(!world.state.trust.join_tokens.contains_key("join-n2"));
    assert!(world.state.trust.join_tokens.contains_key("join-silent"));
    assert!(too_large(
        &world.refused(join_token("second", NodeRole::Voter))
    ));
    world.now_ms = end;
    world.done(join_token("second", NodeRole::Voter));
    let left: Vec<&str> = world
        .state
        .trust
        .join_tokens
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(left, ["join-first", "join-second", "join-silent"]);
}

/// One attempt to come in: which key, address, secret and name, and how much time passes before.
type Attempt = (u8, u8, bool, bool, u16);

fn attempts() -> impl Strategy<Value = Vec<Attempt>> {
    prop::collection::vec(
        (0..3_u8, 0..2_u8, any::<bool>(), any::<bool>(), 0..60_u16),
        1..40,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_join_token_lets_exactly_one_node_in_whatever_order_they_knock_in(
        attempts in attempts(), spoken_after in 0..40_usize,
    ) {
        let mut world = World::new(1, 64);
        let end = world.now_ms + 1_000;
        world.done(expiring("n2", end));
        let mut came_in: Option<(u8, u8, NodeId)> = None;
        let mut has_spoken = false;
        for (number, (key, address, knows, named, passes)) in attempts.into_iter().enumerate() {
            world.now_ms += u64::from(passes);
            let attempt = Command::JoinNode {
                token: "join-n2".into(),
                secret_hash: if knows { hash("secret-n2") } else { hash("guess") },
                name: if named { name("n2") } else { name("n3") },
                address: format!("host-{address}:1"),
                key: hash(&format!("key-{key}")),
            };
            let reply = world.ask(attempt);
            let in_time = world.now_ms < end;
            // The oracle: the first that knows the secret, says the name and is in time, and then only
            // itself until it has spoken.
            let expected = knows && named && in_time && match came_in {
                None => true,
                Some((winner, from, _)) => winner == key && from == address && !has_spoken,
            };
            match reply {
                Reply::Done { outcome: Outcome::Node(node), .. } => {
                    prop_assert!(expected, "{key} at {address} was let in");
                    let first = *came_in.get_or_insert((key, address, node));
                    prop_assert_eq!(first, (key, address, node));
                }
                Reply::Done { outcome, .. } => prop_assert!(false, "{:?}", outcome),
                Reply::Rejected(rejection) => prop_assert!(!expected, "{}", rejection),
            }
            prop_assert_eq!(world.state.nodes.len(), 1 + usize::from(came_in.is_some()));
            if number == spoken_after && let Some((_, _, node)) = came_in {
                world.register(node, Incarnation(1), 64);
                has_spoken = true;
            }
        }
        if let Some((key, _, node)) = came_in {
            prop_assert_eq!(world.state.nodes[&node].key, Some(hash(&format!("key-{key}"))));
        }
    }
}
