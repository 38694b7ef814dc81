//! The file of contexts, and which of them a command means.

use std::os::unix::fs::PermissionsExt;

use super::*;

fn token(id: &str) -> AccessToken {
    AccessToken {
        ca_sha256: "ab".repeat(32),
        id: id.into(),
        secret: Secret::new(&[7; 32]),
    }
}

fn endpoint(servers: &str, id: &str) -> Endpoint {
    Endpoint {
        servers: servers.into(),
        token: Some(token(id)),
    }
}

fn two() -> Contexts {
    let mut contexts = Contexts::default();
    contexts.put("lab", Entry::of(&endpoint("lab:7440", "t-lab")));
    contexts.put("prod", Entry::of(&endpoint("p1:7440,p2:7440", "t-prod")));
    contexts
}

fn chosen(given: &Given, contexts: Contexts) -> Endpoint {
    given.endpoint(|| Ok(contexts)).expect("an endpoint")
}

#[test]
fn what_is_written_reads_back_and_is_its_owners_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("clusterctl/config.toml");
    assert_eq!(
        Contexts::load(&path).expect("none yet"),
        Contexts::default()
    );
    two().save(&path).expect("written");
    assert_eq!(Contexts::load(&path).expect("read"), two());
    let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o7777;
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().expect("a folder")), 0o700);
}

#[test]
fn a_file_that_others_may_read_is_refused_and_not_used() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("config.toml");
    two().save(&path).expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("a mode");
    let error = Contexts::load(&path).expect_err("it is open").to_string();
    assert!(error.contains("chmod 600"), "{error}");
}

#[test]
fn a_broken_file_is_told_by_its_line_and_never_quoted() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("config.toml");
    for broken in [
        "current = \"x\"\n[contexts.x]\nservers = \"a:1\"\ntoken = [\"BT1.secret\"]\n",
        "current = \"x\"\n\ncontexts = \"BT1.secret\"\n",
        "\n[contexts.x]\ntoken = \"BT1.secret\n",
    ] {
        private_file::write(&path, broken.as_bytes()).expect("written");
        let error = Contexts::load(&path).expect_err("broken").to_string();
        assert!(
            error.contains("config.toml cannot be read: line"),
            "{error}"
        );
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn debug_output_shows_no_secret() {
    let secret = Secret::new(&[7; 32]);
    let shown = format!("{:?} {:?}", two(), endpoint("a:1", "t"));
    assert!(!shown.contains(secret.expose()), "{shown}");
    assert!(!shown.contains("BT1."), "{shown}");
}

#[test]
fn the_first_context_becomes_the_current_one_and_removal_leaves_none() {
    let mut contexts = two();
    assert_eq!(contexts.current.as_deref(), Some("lab"));
    assert!(contexts.remove("prod").is_some());
    assert_eq!(contexts.current.as_deref(), Some("lab"));
    assert!(contexts.remove("lab").is_some());
    assert_eq!(contexts, Contexts::default());
    assert!(contexts.remove("lab").is_none());
}

#[test]
fn given_wins_over_named_over_current_over_the_local_socket() {
    let nothing = Given::default();
    assert_eq!(
        chosen(&nothing, Contexts::default()),
        Endpoint::socket(LOCAL_SOCKET)
    );
    assert_eq!(chosen(&nothing, two()), endpoint("lab:7440", "t-lab"));
    let named = Given {
        context: Some("prod".into()),
        ..Given::default()
    };
    assert_eq!(chosen(&named, two()), endpoint("p1:7440,p2:7440", "t-prod"));
    let server = Given {
        server: Some("x:1".into()),
        token: Some(token("t-x")),
        ..Given::default()
    };
    let unread = server.endpoint(|| panic!("no context is needed"));
    assert_eq!(unread.expect("an endpoint"), endpoint("x:1", "t-x"));
    let all = Given {
        context: named.context.clone(),
        ..server
    };
    assert_eq!(chosen(&all, two()), endpoint("x:1", "t-x"));
}

#[test]
fn a_named_context_lends_its_token_and_the_current_one_does_not() {
    let server = Given {
        server: Some("p3:7440".into()),
        ..Given::default()
    };
    assert_eq!(chosen(&server, two()).token, None);
    let of_prod = Given {
        context: Some("prod".into()),
        ..server
    };
    assert_eq!(chosen(&of_prod, two()), endpoint("p3:7440", "t-prod"));
    let token_alone = Given {
        token: Some(token("t-new")),
        ..Given::default()
    };
    assert_eq!(chosen(&token_alone, two()), endpoint("lab:7440", "t-new"));
}

#[test]
fn an_unknown_context_is_refused_with_those_that_there_are() {
    let given = Given {
        context: Some("prd".into()),
        ..Given::default()
    };
    let error = given
        .endpoint(|| Ok(two()))
        .expect_err("unknown")
        .to_string();
    assert!(error.contains("E-NOTFOUND"), "{error}");
    assert!(error.contains("lab, prod"), "{error}");
}

#[test]
fn a_node_outside_of_clusters_is_asked_on_its_socket_alone() {
    let at = |server: &str| Given {
        server: Some(server.into()),
        ..Given::default()
    };
    let usual = Given::default().socket().expect("the usual one");
    assert_eq!(usual, Endpoint::socket(LOCAL_SOCKET));
    assert_eq!(
        at("/x/clusterd.sock").socket().expect("a path"),
        Endpoint::socket("/x/clusterd.sock")
    );
    let error = at("n1:7440").socket().expect_err("a network").to_string();
    assert!(error.contains("sudo clusterctl cluster init"), "{error}");
}

#[test]
fn names_are_plain() {
    for good in ["dev", "prod-1", "a.b_c"] {
        assert!(check_name(good).is_ok(), "{good}");
    }
    for bad in ["", "a b", "a\nb", "ä", "[x]", &"x".repeat(64)] {
        assert!(check_name(bad).is_err(), "{bad}");
    }
}
