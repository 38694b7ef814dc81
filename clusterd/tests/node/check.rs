//! Whether hosts are fit: before they join, and as nodes.

use cluster_model::{NodeRole, Settings};
use clusterd::check::{self, Finding, State};
use clusterd::node::NodeHandle;
use proto::admin::admin_client::AdminClient;
use proto::admin::{NodeCheckReply, NodeCheckRequest};
use proto::token::Secret;
use tonic::{Code, Status};

use crate::rig::Rig;

/// Asks on the Unix socket of one node about another, or about itself.
async fn ask(at: &NodeHandle, node: &str) -> Result<NodeCheckReply, Status> {
    let channel = proto::unix::channel(at.config().admin_socket());
    let request = NodeCheckRequest { node: node.into() };
    let reply = AdminClient::new(channel).node_check(request).await?;
    Ok(reply.into_inner())
}

fn named<'f>(findings: &'f [Finding], name: &str) -> &'f Finding {
    let found = findings.iter().find(|finding| finding.name == name);
    found.unwrap_or_else(|| panic!("nothing is said of {name}: {findings:#?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_check_is_made_by_the_node_that_it_is_about() {
    let mut rig = Rig::without_machines();
    rig.cluster(2, Settings::fast()).await;
    let first = rig.handle(1);
    for (node, answers) in [("", "n1"), ("n1", "n1"), ("n2", "n2"), ("node/n2", "n2")] {
        let reply = ask(&first, node).await.unwrap();
        assert_eq!(reply.node, answers, "asked about {node:?}");
        assert!(reply.monitors.is_empty());
        let said = |name: &str| {
            let found = reply.checks.iter().find(|check| check.name == name);
            found.unwrap_or_else(|| panic!("{name}: {reply:#?}"))
        };
        for name in [
            "kvm",
            "confine: uid",
            "confine: processes",
            "confine: memory-limit",
        ] {
            said(name);
        }
        // All of them live on one host: its processor, clock and interface are the same.
        for name in ["cpu", "mtu", "clock", "volumes", "monitors"] {
            assert_eq!(said(name).state, "ok", "{reply:#?}");
        }
        let other = if answers == "n1" { "n2" } else { "n1" };
        assert!(said("clock").detail.contains(other), "{reply:#?}");
        // It lies in this node's folder, not the other's.
        assert!(
            said("data directory")
                .detail
                .contains(&format!("/{answers} ")),
            "{reply:#?}"
        );
    }
    let nobody = ask(&first, "n7").await.unwrap_err();
    assert_eq!(nobody.code(), Code::NotFound);
    rig.take(2).crash().await;
    let silent = ask(&first, "n2").await.unwrap_err();
    assert!(silent.message().contains("n2 cannot be asked"), "{silent}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_check_compares_a_host_with_the_cluster_and_leaves_the_token_good() {
    let mut rig = Rig::without_machines();
    rig.cluster(1, Settings::fast()).await;
    let token = rig.token("n2", NodeRole::Learner).await;
    let config = rig.config(2);
    let found = check::join::check(&config, Some(&token)).await;
    for name in ["cluster", "clock", "cpu", "mtu", "volumes"] {
        assert_eq!(named(&found, name).state, State::Ok, "{found:#?}");
    }
    assert!(
        named(&found, "cluster").detail.contains("lab"),
        "{found:#?}"
    );
    assert!(!config.data_dir.exists(), "nothing is made by looking");

    // Who does not hold the token learns nothing.
    let mut guessed = token.clone();
    guessed.secret = Secret::from_text("guessed");
    let refused = check::join::check(&config, Some(&guessed)).await;
    assert_eq!(named(&refused, "cluster").state, State::Failed);
    assert!(
        !refused.iter().any(|finding| finding.name == "clock"),
        "{refused:#?}"
    );
    let other = check::join::check(&rig.config(3), Some(&token)).await;
    assert_eq!(named(&other, "cluster").state, State::Failed);

    // It was looked at and not used; once it is, a check says so.
    assert!(
        rig.handle(1).state().trust.join_tokens[&token.id]
            .used_by
            .is_none()
    );
    rig.start(2).await.join(&token.line()).await.unwrap();
    let used = check::join::check(&config, Some(&token)).await;
    assert_eq!(named(&used, "cluster").state, State::Warning, "{used:#?}");

    let alone = check::join::check(&config, None).await;
    assert_eq!(named(&alone, "cluster").state, State::Ok);
}
