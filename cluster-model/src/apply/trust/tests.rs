//! Each rule of the authority, of access tokens and of other clusters, by its refusal.

mod audit;
mod join;

use std::collections::BTreeMap;

use crate::command::{Command, Rejection};
use crate::ids::NodeId;
use crate::state::Desired;
use crate::testing::{World, hash, name, spec};
use crate::trust::{
    ACCESS_TOKENS_MAX, Authority, Issuing, PEM_BYTES_MAX, Role, Root, SEALED_KEY_BYTES_MAX,
    TAGS_MAX, TRUSTED_CLUSTERS_MAX, TrustRefusal, TrustedCluster,
};

fn root(label: &str) -> Root {
    Root {
        certificate_pem: format!("certificate of {label}"),
        fingerprint: hash(label),
        sealed_key: "00ff".into(),
    }
}

fn issuing(generation: u64) -> Issuing {
    Issuing {
        generation,
        certificate_pem: format!("issuing {generation}"),
        ends_at_ms: 1,
        made_by: NodeId(1),
    }
}

fn authority() -> Authority {
    Authority {
        roots: vec![root("old")],
        issuing: issuing(1),
    }
}

fn found(authority: Authority) -> Command {
    Command::FoundTrust {
        authority,
        first_node_key: hash("key-n1"),
    }
}

fn rotate(expects: u64, roots: &[&str], issuing: Issuing) -> Command {
    Command::RotateAuthority {
        expects,
        roots: roots.iter().map(|label| root(label)).collect(),
        issuing,
    }
}

fn access_token(id: &str, tags: &[&str], expires_at_ms: u64) -> Command {
    Command::CreateAccessToken {
        id: id.into(),
        user: name("ann"),
        role: Role::Operator,
        tags: tags.iter().map(|tag| name(tag)).collect(),
        secret_hash: hash(&format!("secret-{id}")),
        expires_at_ms,
    }
}

fn trusted(label: &str) -> TrustedCluster {
    TrustedCluster {
        root_pem: format!("certificate of {label}"),
        fingerprint: hash(label),
    }
}

/// A cluster of one node that was founded.
fn founded() -> World {
    let mut world = World::new(1, 64);
    world.done(found(authority()));
    world
}

/// The refusal about trust of a command.
fn refusal(world: &mut World, command: Command) -> TrustRefusal {
    match world.refused(command) {
        Rejection::Trust(refusal) => refusal,
        other => panic!("{other}"),
    }
}

fn too_large(rejection: &Rejection) -> bool {
    matches!(rejection, Rejection::TooLarge { .. })
}

fn last_event(world: &World) -> &str {
    &world.state.events.back().expect("an event").kind
}

#[test]
fn trust_is_founded_once_and_gives_the_first_node_its_key() {
    let mut world = World::new(1, 64);
    assert_eq!(world.state.nodes[&NodeId(1)].key, None);
    world.done(found(authority()));
    assert_eq!(last_event(&world), "trust.founded");
    assert_eq!(world.state.nodes[&NodeId(1)].key, Some(hash("key-n1")));
    let events = world.state.events.len();
    world.done(found(authority()));
    assert_eq!(
        world.state.events.len(),
        events,
        "the same again is no news"
    );
    let other = Authority {
        roots: vec![root("new")],
        issuing: issuing(1),
    };
    assert_eq!(
        refusal(&mut world, found(other)),
        TrustRefusal::AlreadyFounded
    );
    assert_eq!(world.state.trust.authority, Some(authority()));
}

#[test]
fn an_authority_that_cannot_be_is_refused() {
    let mut world = World::new(1, 64);
    let cases: [fn(&mut Authority); 5] = [
        |a| a.roots.clear(),
        |a| a.roots.push(root("new")),
        |a| a.roots[0].certificate_pem = "x".repeat(PEM_BYTES_MAX + 1),
        |a| a.roots[0].sealed_key = "x".repeat(SEALED_KEY_BYTES_MAX + 1),
        |a| a.issuing.made_by = NodeId(9),
    ];
    for (number, spoil) in cases.into_iter().enumerate() {
        let mut bad = authority();
        spoil(&mut bad);
        world.refused(found(bad));
        assert_eq!(world.state.trust.authority, None, "case {number}");
        assert_eq!(world.state.nodes[&NodeId(1)].key, None, "case {number}");
    }
}

#[test]
fn access_tokens_are_made_once_and_revoked_and_expired_ones_make_room() {
    let mut world = World::new(1, 64);
    let end = world.now_ms + 1_000_000;
    world.done(access_token("t", &["web"], end));
    assert_eq!(last_event(&world), "access-token.made");
    world.done(access_token("t", &["web"], end));
    assert_eq!(
        refusal(&mut world, access_token("t", &[], end)),
        TrustRefusal::TokenIdTaken { id: "t".into() }
    );
    let now_ms = world.now_ms;
    assert_eq!(
        refusal(&mut world, access_token("late", &[], now_ms)),
        TrustRefusal::ExpiredAtOnce
    );
    let many: Vec<String> = (0..=TAGS_MAX).map(|tag| format!("tag-{tag}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert!(too_large(&world.refused(access_token("many", &many, end))));
    world.done(access_token("most", &many[1..], end));
    let revoke = Command::RevokeAccessToken { id: "most".into() };
    world.done(revoke.clone());
    assert_eq!(last_event(&world), "access-token.revoked");
    assert_eq!(
        refusal(&mut world, revoke),
        TrustRefusal::UnknownAccessToken { id: "most".into() }
    );
    for number in 1..ACCESS_TOKENS_MAX {
        world.done(access_token(&format!("t{number}"), &[], end));
    }
    assert!(too_large(&world.refused(access_token(
        "one",
        &[],
        u64::MAX
    ))));
    world.now_ms = end;
    world.done(access_token("one", &[], u64::MAX));
    assert_eq!(world.state.trust.access_tokens.len(), 1);
}

#[test]
fn the_issuing_ca_is_rotated_by_whoever_saw_the_present_generation() {
    let mut world = World::new(1, 64);
    assert_eq!(
        refusal(&mut world, rotate(1, &["old"], issuing(2))),
        TrustRefusal::NotFounded
    );
    world.done(found(authority()));
    world.done(rotate(1, &["old"], issuing(2)));
    assert_eq!(last_event(&world), "ca.rotated");
    world.done(rotate(1, &["old"], issuing(2)));
    let late = Issuing {
        certificate_pem: "another's".into(),
        ..issuing(2)
    };
    assert_eq!(
        refusal(&mut world, rotate(1, &["old"], late)),
        TrustRefusal::AuthorityMoved { expected: 1, is: 2 }
    );
    let authority = world.state.trust.authority.clone().expect("founded");
    assert_eq!(authority.issuing, issuing(2));
}

#[test]
fn a_rotation_that_would_cut_the_cluster_off_or_skips_is_refused() {
    let mut world = founded();
    let huge = Issuing {
        certificate_pem: "x".repeat(PEM_BYTES_MAX + 1),
        ..issuing(2)
    };
    let nobody = Issuing {
        made_by: NodeId(9),
        ..issuing(2)
    };
    let quietly = Issuing {
        certificate_pem: "another".into(),
        ..issuing(1)
    };
    let forged = {
        let mut roots = vec![root("old"), root("new")];
        roots[0].certificate_pem = "another".into();
        Command::RotateAuthority {
            expects: 1,
            roots,
            issuing: issuing(2),
        }
    };
    for (what, command) in [
        ("no root", rotate(1, &[], issuing(2))),
        ("only strangers", rotate(1, &["new"], issuing(2))),
        (
            "three roots",
            rotate(1, &["old", "new", "next"], issuing(2)),
        ),
        ("one root twice", rotate(1, &["old", "old"], issuing(2))),
        ("a generation skipped", rotate(1, &["old"], issuing(3))),
        ("a generation back", rotate(1, &["old"], issuing(0))),
        ("no new generation", rotate(1, &["old"], quietly.clone())),
        ("both halves at once", rotate(1, &["old", "new"], quietly)),
        ("the new root first", rotate(1, &["new", "old"], issuing(1))),
        ("another certificate for a root that stays", forged),
        ("a huge certificate", rotate(1, &["old"], huge)),
        ("made by nobody", rotate(1, &["old"], nobody)),
    ] {
        world.refused(command);
        assert_eq!(world.state.trust.authority, Some(authority()), "{what}");
    }
}

#[test]
fn a_root_is_rotated_with_both_trusted_in_between() {
    let mut world = founded();
    let retire = |label: &str| Command::RetireRoot {
        fingerprint: hash(label),
    };
    assert_eq!(refusal(&mut world, retire("old")), TrustRefusal::OnlyRoot);
    world.done(rotate(1, &["old", "new"], issuing(1)));
    assert_eq!(last_event(&world), "ca.root-added");
    world.done(rotate(1, &["old", "new"], issuing(2)));
    assert_eq!(
        refusal(&mut world, retire("next")),
        TrustRefusal::UnknownRoot {
            fingerprint: hash("next"),
        }
    );
    world.done(retire("old"));
    assert_eq!(last_event(&world), "ca.root-retired");
    let authority = world.state.trust.authority.clone().expect("founded");
    assert_eq!(authority.roots, [root("new")]);
    assert_eq!(refusal(&mut world, retire("new")), TrustRefusal::OnlyRoot);
}

#[test]
fn other_clusters_are_trusted_by_one_name_and_up_to_a_bound() {
    let mut world = World::new(1, 64);
    let trust = |label: &str, root: &str| Command::TrustCluster {
        name: name(label),
        cluster: trusted(root),
    };
    world.done(trust("b", "root-b"));
    assert_eq!(last_event(&world), "cluster.trusted");
    world.done(trust("b", "root-b"));
    assert_eq!(
        refusal(&mut world, trust("b", "root-c")),
        TrustRefusal::ClusterNameTaken { name: name("b") }
    );
    assert_eq!(
        refusal(&mut world, trust("c", "root-b")),
        TrustRefusal::RootTrustedAs { name: name("b") }
    );
    let huge = TrustedCluster {
        root_pem: "x".repeat(PEM_BYTES_MAX + 1),
        fingerprint: hash("huge"),
    };
    assert!(too_large(&world.refused(Command::TrustCluster {
        name: name("c"),
        cluster: huge,
    })));
    for number in 1..TRUSTED_CLUSTERS_MAX {
        world.done(trust(&format!("c{number}"), &format!("root-{number}")));
    }
    assert!(too_large(&world.refused(trust("c", "root-c"))));
    world.done(Command::DistrustCluster { name: name("b") });
    assert_eq!(last_event(&world), "cluster.distrusted");
    assert_eq!(
        refusal(&mut world, Command::DistrustCluster { name: name("b") }),
        TrustRefusal::UnknownCluster { name: name("b") }
    );
}

#[test]
fn a_machine_carries_a_bounded_number_of_tags() {
    let mut world = World::new(1, 64);
    let tagged = |label: &str, count: usize| {
        let mut spec = spec(label, 64);
        spec.tags = (0..count).map(|tag| name(&format!("tag-{tag}"))).collect();
        spec
    };
    world.create_with("a", tagged("a", TAGS_MAX));
    let refused = world.refused(Command::CreateVm {
        name: name("b"),
        spec: tagged("b", TAGS_MAX + 1),
        images: BTreeMap::new(),
        desired: Desired::Stopped,
    });
    assert!(matches!(refused, Rejection::BadSpec { field, .. } if field == "tags"));
}
