//! The table of calls by role, what a token narrowed to tags may touch, and what a refusal gives away.

use super::*;
use crate::command::Command;
use crate::ids::VmId;
use crate::testing::{World, hash, name, spec};

fn bearer(role: Role, tags: &[&str]) -> Who {
    Who::Bearer(Bearer {
        token: "t".into(),
        user: name("ann"),
        role,
        tags: tags.iter().map(|tag| name(tag)).collect(),
    })
}

/// A world with a machine that carries these tags.
fn tagged(tags: &[&str]) -> (World, VmId) {
    let mut world = World::new(1, 1_024);
    let mut spec = spec("a", 64);
    spec.tags = tags.iter().map(|tag| name(tag)).collect();
    let vm = world.create_with("a", spec);
    (world, vm)
}

/// What each role may do that the one below may not, in the API's own words.
const VIEWER: &[&str] = &[
    "Version",
    "ClusterStatus",
    "SettingsGet",
    "NodeList",
    "NodeCheck",
    "NodeDrainStatus",
    "VmList",
    "VolumeList",
    "LeaseList",
    "MigrationList",
    "MigrationWatch",
    "Events",
    "Why",
    "BalanceStatus",
    "RuleList",
    "CaShow",
    "TrustList",
];
const OPERATOR: &[&str] = &[
    "NodeDrain",
    "NodeUncordon",
    "VmCreate",
    "VmStart",
    "VmStop",
    "VmDelete",
    "VmMigrate",
    "VmConsole",
    "MigrationCancel",
    "BalanceRun",
    "RuleSet",
];
const ADMIN: &[&str] = &[
    "ClusterInit",
    "SettingsSet",
    "NodeAdd",
    "NodeJoin",
    "NodeRemove",
    "VolumeAdd",
    "VolumeRemove",
    "JoinTokenList",
    "JoinTokenRevoke",
    "TokenCreate",
    "TokenList",
    "TokenRevoke",
    "AuditList",
    "CaRotate",
    "TrustAdd",
    "TrustRemove",
];
/// Calls that leave nothing in the log although they take more than a viewer.
const READS: &[&str] = &["VmConsole", "JoinTokenList", "TokenList", "AuditList"];

#[test]
fn every_call_takes_the_role_of_its_table_and_no_other() {
    let tables = [
        (Role::Viewer, VIEWER),
        (Role::Operator, OPERATOR),
        (Role::Admin, ADMIN),
    ];
    let mut named = 0;
    for (least, calls) in tables {
        for text in calls {
            named += 1;
            let call = Call::parse(text).expect("a call");
            for role in [Role::Viewer, Role::Operator, Role::Admin] {
                let may = authorise(&bearer(role, &[]), call, None);
                assert_eq!(may.is_ok(), role >= least, "{call} by {role:?}");
                if let Err(denied) = may {
                    assert_eq!(denied.needs, Needs::Role(least));
                }
            }
            let changes = least > Role::Viewer && !READS.contains(text);
            assert_eq!(call.changes(), changes, "{call}");
        }
    }
    assert_eq!(named, Call::ALL.len());
}

#[test]
fn a_call_has_one_name_alone_or_at_the_end_of_its_path() {
    for &call in Call::ALL {
        assert_eq!(Call::parse(call.as_str()), Some(call));
        let path = format!("/baton.admin.v1.Admin/{call}");
        assert_eq!(Call::parse(&path), Some(call));
    }
    for wrong in ["", "/", "vmcreate", "VmCreate ", "VmCreate/", "VmDestroy"] {
        assert_eq!(Call::parse(wrong), None, "{wrong}");
    }
}

#[test]
fn the_local_socket_may_all_a_node_looks_and_a_stranger_may_nothing() {
    let local = Who::Local { uid: 0 };
    let node = Who::Node(NodeId(2));
    let foreign = Who::Foreign(name("b"));
    for &call in Call::ALL {
        assert!(authorise(&local, call, None).is_ok(), "{call}");
        let looks = authorise(&node, call, None).is_ok();
        assert_eq!(looks, call.role() == Role::Viewer, "{call}");
        assert!(authorise(&foreign, call, None).is_err(), "{call}");
        assert!(authorise(&Who::Nobody, call, None).is_err(), "{call}");
    }
}

#[test]
fn a_narrowed_token_touches_its_own_machines_and_only_looks_at_the_rest() {
    let (world, vm) = tagged(&["web", "eu"]);
    let vm = world.vm(vm);
    for role in [Role::Viewer, Role::Operator, Role::Admin] {
        let (mine, others) = (bearer(role, &["db", "web"]), bearer(role, &["db"]));
        assert!(mine.sees(vm) && !others.sees(vm));
        for &call in Call::ALL {
            let role_will_do = role >= call.role();
            let of_machine = OPERATOR.contains(&call.as_str())
                && (call.as_str().starts_with("Vm") || call == Call::MigrationCancel);
            let looks = VIEWER.contains(&call.as_str());
            let may = |who: &Who, on| authorise(who, call, on).is_ok();
            let touches = role_will_do && (of_machine || looks);
            assert_eq!(may(&mine, Some(vm)), touches, "{call} on its own");
            assert!(!may(&others, Some(vm)), "{call} on another's");
            assert_eq!(may(&mine, None), role_will_do && looks, "{call} on none");
        }
    }
}

#[test]
fn a_narrowed_token_creates_machines_that_carry_one_of_its_tags() {
    let who = bearer(Role::Operator, &["web", "eu"]);
    let mut new = spec("a", 64);
    assert!(authorise_new(&who, &new).is_err());
    new.tags.insert(name("db"));
    assert!(authorise_new(&who, &new).is_err());
    new.tags.insert(name("eu"));
    assert!(authorise_new(&who, &new).is_ok());
    assert!(authorise_new(&bearer(Role::Viewer, &["eu"]), &new).is_err());
    assert!(authorise_new(&bearer(Role::Operator, &[]), &spec("b", 64)).is_ok());
}

#[test]
fn a_refusal_says_what_would_do_and_not_what_exists() {
    let (world, vm) = tagged(&["hidden"]);
    let who = bearer(Role::Operator, &["web"]);
    let there = authorise(&who, Call::VmStop, Some(world.vm(vm))).expect_err("another's");
    let nowhere = authorise(&who, Call::VmStop, None).expect_err("none");
    assert_eq!(there, nowhere);
    let text = there.to_string();
    assert!(text.starts_with("ann (operator) may not call VmStop: "));
    assert!(text.contains("tagged web") && !text.contains("hidden"));
    let text = authorise(&bearer(Role::Viewer, &[]), Call::VmStop, None)
        .expect_err("a viewer")
        .to_string();
    assert!(text.contains("role operator"), "{text}");
    let text = authorise(&who, Call::NodeDrain, None)
        .expect_err("narrowed")
        .to_string();
    assert!(text.contains("without tags"), "{text}");
}

#[test]
fn an_access_token_speaks_for_its_user_until_it_expires_or_is_revoked() {
    let mut world = World::new(1, 64);
    let end = world.now_ms + 1_000;
    world.done(Command::CreateAccessToken {
        id: "t".into(),
        user: name("ann"),
        role: Role::Operator,
        tags: [name("web")].into(),
        secret_hash: hash("secret"),
        expires_at_ms: end,
    });
    let shown = |world: &World, token: &str, secret: &str, now_ms: u64| {
        world.state.bearer(token, &hash(secret), now_ms)
    };
    let ann = bearer(Role::Operator, &["web"]);
    assert_eq!(shown(&world, "t", "secret", end - 1), Ok(ann));
    let unknown = Err(TokenRefusal::Unknown);
    assert_eq!(shown(&world, "t", "guess", end - 1), unknown);
    assert_eq!(shown(&world, "u", "secret", end - 1), unknown);
    assert_eq!(
        shown(&world, "t", "secret", end),
        Err(TokenRefusal::Expired)
    );
    assert_eq!(shown(&world, "t", "guess", end), unknown);
    world.done(Command::RevokeAccessToken { id: "t".into() });
    assert_eq!(shown(&world, "t", "secret", end - 1), unknown);
}

#[test]
fn hashes_match_only_themselves_and_are_read_back() {
    let one = hash("one");
    assert!(one.matches(&one));
    for byte in 0..32 {
        for bit in 0..8 {
            let mut other = one;
            other.0[byte] ^= 1 << bit;
            assert!(!one.matches(&other));
        }
    }
    assert_eq!(Sha256::try_from(one.to_string()), Ok(one));
    let digits = one.to_string();
    for wrong in [
        "",
        &digits[1..],
        &format!("{digits}0"),
        &"g".repeat(64),
        &"ä".repeat(32),
    ] {
        assert!(Sha256::try_from(wrong.to_owned()).is_err(), "{wrong}");
    }
}
