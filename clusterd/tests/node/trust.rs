//! Who is let in, who is heard, who may do what: from outside, from a stranger's cluster, from a learner that
//! somebody has taken over, from people with tokens.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use cluster_model::trust::{Role, Sha256};
use cluster_model::{Command, Envelope, Name, NodeId, NodeRole, RequestId, Settings};
use clusterd::net::Dialer;
use clusterd::trust::authority::{PublicKey, identity, new_key};
use clusterd::trust::ephemeral::Authority;
use proto::admin::admin_client::AdminClient;
use proto::admin::{Change, NodeAddRequest, NodeListRequest, SettingsSetRequest, TokenListRequest};
use proto::peer::peer_client::PeerClient;
use proto::peer::raft_client::RaftClient;
use proto::peer::{
    HeartbeatRequest, IssuingKeyRequest, JoinRequest, ProposeRequest, RaftMessage, ReadIndexRequest,
};
use proto::tls::{self, Credentials, Expect};
use proto::token::Secret;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::rig::{Rig, eventually};

/// Strangers whose handshakes a node waits for at a time.
const STRANGERS_MAX: usize = 256;
/// No answer of these tests takes longer.
const PATIENCE: Duration = Duration::from_secs(20);

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what)
        .await
        .expect("an answer in time")
}

impl Rig {
    /// The fingerprint of the cluster's root.
    fn root(&self) -> [u8; 32] {
        let state = self.handle(1).state();
        state.trust.authority.as_ref().unwrap().roots[0]
            .fingerprint
            .0
    }

    /// A channel to node `number` of somebody who shows `credentials`, or nothing.
    fn stranger(&self, number: usize, credentials: Option<&Credentials>) -> Channel {
        let config = tls::client(Expect::Root(self.root()), credentials).unwrap();
        let keeper = Authority::new()
            .unwrap()
            .keeper(NodeId(77), NodeRole::Voter)
            .unwrap();
        Dialer::new([127, 0, 0, 1].into(), keeper)
            .with_config(&self.address(number).to_string(), config)
            .unwrap()
    }

    /// What a holder of the cluster's issuing key could make: a certificate of any node, for any time.
    fn forged(&self, node: NodeId, role: NodeRole, made_at_ms: u64, cluster: &str) -> Credentials {
        let issuing = self.handle(1).member().unwrap().keeper.issuing().unwrap();
        let key = new_key().unwrap();
        let certified = issuing
            .certify(
                &identity(cluster, node, role),
                &PublicKey::of(&key).unwrap(),
                made_at_ms,
            )
            .unwrap();
        Credentials::from_pem(&certified.chain_pem, &key.serialize_pem()).unwrap()
    }

    fn cluster_id(&self) -> String {
        self.handle(1).state().cluster.as_ref().unwrap().id.clone()
    }

    /// An access token, as a header.
    async fn access(&self, id: &str, role: Role, tags: &[&str], expires_at_ms: u64) -> String {
        let secret = Secret::new(&clusterd::trust::random().unwrap());
        let command = Command::CreateAccessToken {
            id: id.into(),
            user: Name::new(format!("user-{id}")).unwrap(),
            role,
            tags: tags.iter().map(|tag| Name::new(*tag).unwrap()).collect(),
            secret_hash: Sha256(secret.hash()),
            expires_at_ms,
        };
        let request = RequestId(format!("access-{id}"));
        let first = self.handle(1);
        first.propose("test", request, command).await.unwrap();
        format!("Bearer {id}.{}", secret.expose())
    }
}

fn heartbeat(node: NodeId) -> HeartbeatRequest {
    HeartbeatRequest {
        node_id: node.0,
        incarnation: 1,
        sequence: 1,
        report: b"{}".to_vec(),
        applied: 0,
    }
}

fn envelope(actor: &str, command: Command) -> Vec<u8> {
    serde_json::to_vec(&Envelope {
        request: RequestId(format!("forged-{actor}-{}", std::process::id())),
        actor: actor.into(),
        at_ms: 1,
        asked: None,
        command,
    })
    .unwrap()
}

fn change() -> Option<Change> {
    Some(Change {
        request_id: format!("trust-test-{:?}", std::time::Instant::now()),
        reason: "to try".into(),
        actor: "root".into(),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_good_certificate_of_this_cluster_is_not_heard() {
    let mut rig = Rig::without_machines();
    rig.cluster(1, Settings::fast()).await;
    let now_ms = rig.handle(1).clock().wall_ms();
    let first = rig.node_id(1);

    // No certificate: people come like that, and may not speak for nodes.
    let nobody = within(PeerClient::new(rig.stranger(1, None)).heartbeat(heartbeat(first))).await;
    assert_eq!(nobody.unwrap_err().code(), Code::Unauthenticated);
    let mut peer = PeerClient::new(rig.stranger(1, None));
    let nobody = within(peer.read_index(ReadIndexRequest {})).await;
    assert_eq!(nobody.unwrap_err().code(), Code::Unauthenticated);

    // Another cluster's, one that has ended, one of this CA for another cluster's name.
    let eight_days_ms = 8 * 24 * 3_600 * 1_000;
    let id = rig.cluster_id();
    let strangers = [
        (
            "expired",
            rig.forged(first, NodeRole::Voter, now_ms - eight_days_ms, &id),
        ),
        (
            "not valid yet",
            rig.forged(first, NodeRole::Voter, now_ms + eight_days_ms, &id),
        ),
        (
            "another cluster's name",
            rig.forged(first, NodeRole::Voter, now_ms, "another"),
        ),
        (
            "foreign",
            Authority::new().unwrap().credentials(first).unwrap(),
        ),
    ];
    for (what, credentials) in strangers {
        let channel = rig.stranger(1, Some(&credentials));
        let answer = within(PeerClient::new(channel).heartbeat(heartbeat(first))).await;
        let refused = answer.expect_err(what);
        // No service said so: the connection was not made, or ended before a word.
        let transport = std::error::Error::source(&refused).is_some();
        assert!(transport, "{what}: {refused}");
    }
    // The good one of the same making is heard: what was refused above was refused for its fault.
    let good = rig.forged(first, NodeRole::Voter, now_ms, &id);
    let channel = rig.stranger(1, Some(&good));
    within(PeerClient::new(channel).read_index(ReadIndexRequest {}))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_bytes_and_older_tls_get_no_word_of_ours() {
    let mut rig = Rig::without_machines();
    rig.cluster(1, Settings::fast()).await;
    // A ClientHello that offers TLS 1.2 at most (RFC 5246 section 7.4.1.2), with one cipher suite.
    let mut hello = vec![0x03, 0x03];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x2f, 1, 0]);
    let mut record = vec![
        22,
        3,
        1,
        0,
        (hello.len() + 4) as u8,
        1,
        0,
        0,
        hello.len() as u8,
    ];
    record.extend(hello);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let http = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec();
    for (what, bytes) in [
        ("TLS 1.2", record),
        ("HTTP/2 in clear", preface),
        ("HTTP", http),
        ("noise", vec![0xff; 4_096]),
    ] {
        let mut stream = TcpStream::connect(rig.address(1)).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let mut answer = Vec::new();
        let end = within(stream.read_to_end(&mut answer)).await;
        // At most an alert (RFC 8446 section 6): 7 bytes of type 21.
        let alert = answer.len() <= 7 && answer.first().is_none_or(|kind| *kind == 21);
        assert!(alert, "{what}: {answer:?} {end:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_token_lets_one_node_in_and_a_replay_nobody() {
    let mut rig = Rig::without_machines();
    rig.cluster(1, Settings::fast()).await;
    let token = rig.token("n2", NodeRole::Learner).await;
    let key = || PublicKey::of(&new_key().unwrap()).unwrap();
    let channel = rig.stranger(1, None);
    let ask = async |name: &str, secret: &str, key: &PublicKey| {
        let request = JoinRequest {
            name: name.into(),
            address: "127.0.0.1:7".into(),
            token_id: token.id.clone(),
            secret: secret.into(),
            public_key: key.bytes().to_vec(),
        };
        within(PeerClient::new(channel.clone()).join(request))
            .await
            .unwrap()
            .into_inner()
    };
    let secret = token.secret.expose();
    let (first, second) = (key(), key());
    for (what, reply) in [
        ("wrong secret", ask("n2", "guessed", &first).await),
        ("another name", ask("n3", secret, &first).await),
    ] {
        assert!(!reply.refused.is_empty(), "{what}");
        assert!(reply.certificate.is_none(), "{what}");
    }
    let let_in = ask("n2", secret, &first).await;
    assert_eq!(let_in.refused, "");
    let again = ask("n2", secret, &first).await;
    assert_eq!(
        again.node_id, let_in.node_id,
        "who lost the answer asks again"
    );
    let replayed = ask("n2", secret, &second).await;
    assert!(replayed.certificate.is_none(), "{replayed:?}");
    // Nothing of the secret is in what everybody can read.
    let state = serde_json::to_string(&*rig.handle(1).state()).unwrap();
    assert!(!state.contains(secret));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_removed_is_refused_within_a_second_by_all() {
    let mut rig = Rig::without_machines();
    rig.cluster(3, Settings::fast()).await;
    let node = rig.join(4, NodeRole::Learner).await;
    let dialer = node.dialer().clone();
    let removed = rig.node_id(4);
    let heard = async |number: usize| -> Result<(), Status> {
        let channel = dialer.channel(&rig.address(number).to_string()).unwrap();
        within(PeerClient::new(channel).read_index(ReadIndexRequest {}))
            .await
            .map(drop)
    };
    for number in 1..=3 {
        heard(number).await.unwrap();
    }
    let remove = Command::RemoveNode { node: removed };
    let request = RequestId("remove-n4".into());
    rig.handle(1)
        .propose("test", request, remove)
        .await
        .unwrap();
    let since = tokio::time::Instant::now();
    for number in 1..=3 {
        loop {
            match heard(number).await {
                Err(refused) if refused.code() == Code::PermissionDenied => break,
                // A connection that was broken under a call is the same word, less politely said.
                Err(refused) if refused.code() != Code::Unauthenticated => {}
                other => assert!(
                    since.elapsed() < Duration::from_secs(1),
                    "n{number} still hears it: {other:?}"
                ),
            }
            assert!(since.elapsed() < PATIENCE, "n{number} says nothing clear");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_that_was_taken_over_speaks_for_nobody_else() {
    let mut rig = Rig::without_machines();
    rig.cluster(1, Settings::fast()).await;
    let learner = rig.join(2, NodeRole::Learner).await;
    let (own, leader) = (rig.node_id(2), rig.node_id(1));
    let channel = learner
        .dialer()
        .channel(&rig.address(1).to_string())
        .unwrap();
    let mut peer = PeerClient::new(channel.clone());
    let denied = |what: &str, answer: Result<(), Status>| {
        let refused = answer.expect_err(what);
        let fitting = [Code::PermissionDenied, Code::InvalidArgument];
        assert!(fitting.contains(&refused.code()), "{what}: {refused}");
    };
    // Raft is for those who vote.
    let mut raft = RaftClient::new(channel);
    let message = || RaftMessage {
        payload: b"x".to_vec(),
    };
    denied("vote", within(raft.vote(message())).await.map(drop));
    let appended = within(raft.append(tokio_stream::once(message()))).await;
    denied("append", appended.map(drop));
    let snapshot = within(raft.snapshot(tokio_stream::once(message()))).await;
    denied("snapshot", snapshot.map(drop));
    denied(
        "lead",
        within(raft.transfer_leader(message())).await.map(drop),
    );
    // Nobody's lease but its own.
    denied(
        "another's heartbeat",
        within(peer.heartbeat(heartbeat(leader))).await.map(drop),
    );
    let propose = async |mut peer: PeerClient<Channel>, from: NodeId, command: Vec<u8>| {
        let request = ProposeRequest {
            command,
            from_node: from.0,
            credential: String::new(),
        };
        within(peer.propose(request)).await.map(drop)
    };
    let settings = || Command::SetSettings {
        settings: Settings::default(),
    };
    let as_leader = envelope("node/n1", settings());
    denied(
        "in another's name",
        propose(peer.clone(), leader, as_leader).await,
    );
    for (what, actor, command) in [
        ("settings", "node/n2", settings()),
        ("settings as a person", "admin", settings()),
        ("remove", "node/n2", Command::RemoveNode { node: leader }),
        ("a token", "node/n2", {
            Command::CreateAccessToken {
                id: "mine".into(),
                user: Name::new("me").unwrap(),
                role: Role::Admin,
                tags: Default::default(),
                secret_hash: Sha256([1; 32]),
                expires_at_ms: u64::MAX,
            }
        }),
    ] {
        let refused = propose(peer.clone(), own, envelope(actor, command)).await;
        denied(what, refused);
    }
    // The key that signs is for those who vote.
    let asked = within(peer.issuing_key(IssuingKeyRequest { generation: 1 })).await;
    let reply = asked.unwrap().into_inner();
    assert!(reply.key_der.is_empty() && !reply.refused.is_empty());
    assert!(learner.member().unwrap().keeper.issuing().is_none());
    // It is heard where it speaks for itself.
    within(peer.read_index(ReadIndexRequest {})).await.unwrap();
    assert_eq!(rig.handle(1).state().settings, Settings::fast());
}

#[tokio::test(flavor = "multi_thread")]
async fn people_may_do_what_their_tokens_say_and_it_is_written_down() {
    let mut rig = Rig::without_machines();
    rig.cluster(1, Settings::fast()).await;
    let far = rig.handle(1).clock().wall_ms() + 3_600_000;
    let viewer = rig.access("v", Role::Viewer, &[], far).await;
    let operator = rig.access("o", Role::Operator, &[], far).await;
    let admin = rig.access("a", Role::Admin, &[], far).await;
    let narrowed = rig.access("t", Role::Operator, &["web"], far).await;
    let soon = rig.handle(1).clock().wall_ms() + 300;
    let ended = rig.access("e", Role::Admin, &[], soon).await;
    let clock = rig.handle(1).clock().clone();
    eventually("the token has expired", || clock.wall_ms() > soon).await;
    let channel = rig.stranger(1, None);
    let shown = |header: &str| {
        let header: tonic::metadata::MetadataValue<_> = header.parse().unwrap();
        AdminClient::with_interceptor(channel.clone(), move |mut request: tonic::Request<()>| {
            request
                .metadata_mut()
                .insert("authorization", header.clone());
            Ok(request)
        })
    };
    let settings = || SettingsSetRequest {
        change: change(),
        patch_json: "{\"downtime_max_ms\":200}".into(),
    };
    let add = || NodeAddRequest {
        change: change(),
        name: "n7".into(),
        role: String::new(),
        ttl_s: 60,
    };
    let code = |answer: Result<(), Status>| answer.err().map(|status| status.code());
    for (who, header, looks, sets) in [
        ("viewer", &viewer, None, Some(Code::PermissionDenied)),
        ("operator", &operator, None, Some(Code::PermissionDenied)),
        ("narrowed", &narrowed, None, Some(Code::PermissionDenied)),
        ("admin", &admin, None, None),
        (
            "expired",
            &ended,
            Some(Code::Unauthenticated),
            Some(Code::Unauthenticated),
        ),
        (
            "guessed",
            &"Bearer a.guessed".to_owned(),
            Some(Code::Unauthenticated),
            Some(Code::Unauthenticated),
        ),
    ] {
        let mut api = shown(header);
        let listed = within(api.node_list(NodeListRequest {})).await.map(drop);
        assert_eq!(code(listed), looks, "{who} looks");
        let set = within(api.settings_set(settings())).await.map(drop);
        assert_eq!(code(set), sets, "{who} sets");
        let added = within(api.node_add(add())).await.map(drop);
        assert_eq!(code(added), sets, "{who} adds a node");
    }
    let mut nobody = AdminClient::new(channel.clone());
    let listed = within(nobody.node_list(NodeListRequest {})).await.map(drop);
    assert_eq!(code(listed), Some(Code::Unauthenticated));
    // Hashes and secrets are not shown, and who changed what is.
    let tokens = within(shown(&admin).token_list(TokenListRequest {})).await;
    assert_eq!(tokens.unwrap().into_inner().tokens.len(), 6);
    let state = rig.handle(1).state();
    let record = state
        .trust
        .audit
        .iter()
        .find(|record| record.asked.method == "SettingsSet")
        .expect("a record");
    assert_eq!(record.actor, "user-a", "not who the request says it is");
    assert_eq!(record.asked.reason, "to try");
    assert!(record.asked.from.starts_with("127.0.0.1:"), "{record:?}");
    assert_eq!(record.refused, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_issuing_ca_and_the_root_are_rotated_and_no_lease_runs_out() {
    let mut rig = Rig::without_machines();
    let recovery = rig.cluster_with_key(3, Settings::fast()).await;
    let expirations = || {
        (1..=3)
            .filter(|&number| !rig.handle(number).member().unwrap().lease_is_valid())
            .count()
    };
    for number in 1..=3 {
        let member = rig.handle(number).member().unwrap();
        eventually("the node holds its lease", || member.lease_is_valid()).await;
        eventually("a voter holds the issuing key", || {
            member.keeper.issuing().is_some()
        })
        .await;
    }
    let member = rig.handle(2).member().unwrap();
    let before = member.state().trust.authority.clone().unwrap();
    let rotate = async |recovery: &clusterd::trust::RecoveryKey, root: bool, id: &str| {
        let authority = member.state().trust.authority.clone().unwrap();
        let prepared =
            clusterd::trust::prepare_rotation(&member, &authority, recovery, root).unwrap();
        let command = Command::RotateAuthority {
            expects: authority.issuing.generation,
            roots: prepared.roots.clone(),
            issuing: prepared.issuing.clone(),
        };
        let request = RequestId(id.into());
        member.propose("test", request, command).await.unwrap();
        prepared.recovery_key
    };
    rotate(&recovery, false, "issuing").await;
    let generation = before.issuing.generation + 1;
    for number in 1..=3 {
        let member = rig.handle(number).member().unwrap();
        eventually("every node has a certificate of the new issuer", || {
            assert_eq!(expirations(), 0, "a lease ran out");
            member.keeper.papers().unwrap().generation == generation
        })
        .await;
    }
    let other = clusterd::trust::RecoveryKey::new().unwrap();
    let authority = member.state().trust.authority.clone().unwrap();
    assert!(
        clusterd::trust::prepare_rotation(&member, &authority, &other, true).is_err(),
        "only who holds the recovery key rotates"
    );
    rotate(&recovery, true, "root").await.expect("a new key");
    for number in 1..=3 {
        let member = rig.handle(number).member().unwrap();
        eventually("the old root is gone everywhere", || {
            assert_eq!(expirations(), 0, "a lease ran out");
            let papers = member.keeper.papers().unwrap();
            let state = member.state();
            let authority = state.trust.authority.as_ref().unwrap();
            authority.roots.len() == 1
                && authority.roots[0].fingerprint != before.roots[0].fingerprint
                && papers.roots.len() == 1
                && papers.generation == generation + 1
        })
        .await;
    }
    let lost = rig.handle(1).state();
    assert!(!lost.events.iter().any(|event| event.kind == "node.lost"));
    // Connections made now lead to the new root.
    let node = rig.join(4, NodeRole::Learner).await;
    let member = node.member().unwrap();
    eventually("a node that joins now holds a lease", || {
        member.lease_is_valid()
    })
    .await;
}

/// A connection to `to` from a loopback address of its own, so that no one source has too many.
async fn connect_from(source: Ipv4Addr, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(source.into(), 0))?;
    socket.connect(to).await
}

/// Whether the other side has neither said anything nor closed.
fn is_open(stream: &TcpStream) -> bool {
    let nothing = stream.try_read(&mut [0]);
    matches!(nothing, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

#[tokio::test(flavor = "multi_thread")]
async fn half_open_connections_and_slow_handshakes_by_the_thousand_keep_nobody_out() {
    let mut rig = Rig::without_machines();
    rig.cluster(3, Settings::fast()).await;
    let member = rig.handle(2).member().unwrap();
    eventually("the node holds its lease", || member.lease_is_valid()).await;
    let files = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, hard) = nix::sys::resource::getrlimit(files).unwrap();
    nix::sys::resource::setrlimit(files, hard, hard).unwrap();
    let mut held = Vec::new();
    for number in 0..2_000_u32 {
        let source = Ipv4Addr::new(127, 200, 0, 1 + (number / 50) as u8);
        let mut stream = connect_from(source, rig.address(1)).await.unwrap();
        // Every second one begins: a handshake record of 512 bytes (RFC 8446, 5.1), of which the first is there.
        if number % 2 == 0 {
            // It may have been turned away already.
            let _ = stream.write_all(&[22, 3, 1, 2, 0, 1]).await;
        }
        held.push(stream);
    }
    // A node's new connection is let in at once, whoever holds places at the door, and the leases go on.
    let dialer = member.dialer.clone();
    let channel = dialer.dedicated(&rig.address(1).to_string()).unwrap();
    within(PeerClient::new(channel).read_index(ReadIndexRequest {}))
        .await
        .unwrap();
    for number in 1..=3 {
        let member = rig.handle(number).member().unwrap();
        assert!(member.lease_is_valid(), "n{number}");
    }
    eventually("all but a few strangers are turned away", || {
        held.iter().filter(|stream| is_open(stream)).count() <= STRANGERS_MAX
    })
    .await;
    drop(held);
    let state = rig.handle(1).state();
    assert!(!state.events.iter().any(|event| event.kind == "node.lost"));
}
