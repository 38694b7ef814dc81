//! Connections to real servers: the right cluster, another one, none at all.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use proto::admin::VersionRequest;
use proto::tls::{Anchors, Credentials};
use proto::token::Secret;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tonic::codegen::{Service, http};
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};

use super::*;

/// A cluster of one node, as far as TLS sees it.
struct Authority {
    root: rcgen::Certificate,
    node: Credentials,
}

fn authority(cluster: &str) -> Authority {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, format!("root of {cluster}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&key).expect("a root");
    let issuer = Issuer::new(params, key);

    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    let name = format!("baton://{cluster}/node/1/voter");
    params.subject_alt_names = vec![SanType::URI(name.try_into().expect("a name"))];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let leaf = params.signed_by(&key, &issuer).expect("a certificate");
    let chain = format!("{}{}", leaf.pem(), root.pem());
    Authority {
        node: Credentials::from_pem(&chain, &key.serialize_pem()).expect("credentials"),
        root,
    }
}

impl Authority {
    fn token(&self) -> AccessToken {
        let hash = proto::tls::fingerprint(self.root.der());
        AccessToken {
            ca_sha256: hash.iter().map(|byte| format!("{byte:02x}")).collect(),
            id: "t1".into(),
            secret: Secret::new(&[7; 32]),
        }
    }
}

/// Answers every call with a refusal, and notes the token that was shown.
#[derive(Clone)]
struct Doorman {
    answer: (Code, Option<&'static str>),
    shown: Arc<Mutex<Vec<String>>>,
}

impl Service<http::Request<tonic::body::Body>> for Doorman {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let shown = request
            .headers()
            .get("authorization")
            .map_or("nothing", |value| value.to_str().unwrap_or("?"));
        self.shown.lock().expect("the list").push(shown.to_owned());
        let mut metadata = MetadataMap::new();
        if let Some(code) = self.answer.1 {
            metadata.insert("baton-code", code.parse().expect("a code"));
        }
        ready(Ok(Status::with_metadata(
            self.answer.0,
            "not for you",
            metadata,
        )
        .into_http()))
    }
}

impl tonic::server::NamedService for Doorman {
    const NAME: &'static str = "baton.admin.v1.Admin";
}

/// A node that refuses everybody, over TLS on loopback, until the test ends.
struct Node {
    address: String,
    shown: Arc<Mutex<Vec<String>>>,
}

async fn node(authority: &Authority, answer: (Code, Option<&'static str>)) -> Node {
    let roots = proto::tls::root_store([authority.root.pem().as_str()]).expect("roots");
    let anchors = Anchors {
        cluster: "unused".into(),
        roots: Arc::new(roots),
        foreign: Vec::new(),
    };
    let config = proto::tls::server(anchors, &authority.node).expect("a configuration");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let (taken, guests) = tokio::sync::mpsc::channel(4);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // Whoever does not like the certificate hangs up.
            if let Ok(guest) = proto::tls::accept(config.clone(), stream).await
                && taken.send(Ok::<_, std::io::Error>(guest)).await.is_err()
            {
                return;
            }
        }
    });
    let shown = Arc::<Mutex<Vec<String>>>::default();
    let doorman = Doorman {
        answer,
        shown: shown.clone(),
    };
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(doorman)
            .serve_with_incoming(tokio_stream::wrappers::ReceiverStream::new(guests)),
    );
    Node { address, shown }
}

fn endpoint(servers: &str, token: Option<AccessToken>) -> Endpoint {
    Endpoint {
        servers: servers.to_owned(),
        token,
    }
}

async fn open(servers: &str, token: Option<AccessToken>) -> Result<Client, CliError> {
    Client::open(&endpoint(servers, token)).await
}

async fn refusal(servers: &str, token: Option<AccessToken>) -> String {
    match open(servers, token).await {
        Ok(_) => panic!("it was let in"),
        Err(error) => error.to_string(),
    }
}

#[tokio::test]
async fn the_token_is_shown_to_the_right_cluster_with_every_call_and_its_refusals_say_what_to_try()
{
    let ours = authority("c1");
    for (answer, code) in [
        ((Code::Unauthenticated, Some("E-TOKEN")), "E-TOKEN"),
        ((Code::Unauthenticated, None), "E-TOKEN"),
        ((Code::PermissionDenied, Some("E-DENIED")), "E-DENIED"),
        ((Code::PermissionDenied, None), "E-DENIED"),
    ] {
        let node = node(&ours, answer).await;
        let token = ours.token();
        let mut client = open(&node.address, Some(token.clone())).await.expect("in");
        for _ in 0..2 {
            let status = client.api.version(VersionRequest {}).await.expect_err("no");
            let error = CliError::from(status).to_string();
            assert!(
                error.starts_with(&format!("error {code}: not for you")),
                "{error}"
            );
            assert!(
                error.contains("try:") && error.contains("token create"),
                "{error}"
            );
            assert!(!error.contains(token.secret.expose()), "{error}");
        }
        let shown = node.shown.lock().expect("the list").clone();
        assert_eq!(shown, [token.bearer(), token.bearer()]);
        assert!(!format!("{:?}", client.api).contains(token.secret.expose()));
    }
}

#[tokio::test]
async fn another_cluster_is_told_from_ours_before_it_sees_the_token() {
    let (ours, other) = (authority("c1"), authority("c2"));
    let node = node(&other, (Code::NotFound, None)).await;
    let error = refusal(&node.address, Some(ours.token())).await;
    assert!(
        error.contains("E-TRUST") && error.contains("in between"),
        "{error}"
    );
    assert!(error.contains(&node.address), "{error}");
    assert!(node.shown.lock().expect("the list").is_empty());
}

#[tokio::test]
async fn what_does_not_speak_tls_is_no_node() {
    let ours = authority("c1");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut asked = [0; 64];
            let _ = stream.read(&mut asked).await;
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let error = refusal(&address, Some(ours.token())).await;
    assert!(error.contains("E-CONNECT"), "{error}");
    assert!(error.contains("it does not speak TLS"), "{error}");
}

#[tokio::test]
async fn who_hangs_up_in_the_handshake_is_told_as_such() {
    let ours = authority("c1");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            // Read first: unread bytes would make it a reset.
            let mut asked = [0; 4_096];
            let _ = stream.read(&mut asked).await;
        }
    });
    let error = refusal(&address, Some(ours.token())).await;
    assert!(
        error.contains("E-CONNECT") && error.contains("hung up"),
        "{error}"
    );
}

#[tokio::test]
async fn without_a_token_no_server_on_the_network_is_asked() {
    let error = refusal("127.0.0.1:1", None).await;
    for words in [
        "E-TOKEN",
        "clusterctl context add NAME 127.0.0.1:1 --token",
        "-s /var/lib/baton/clusterd.sock",
    ] {
        assert!(error.contains(words), "{words}: {error}");
    }
}

#[tokio::test]
async fn of_several_servers_the_first_that_answers_is_asked() {
    let ours = authority("c1");
    let node = node(&ours, (Code::NotFound, None)).await;
    // Bound and not listening any more: refused at once.
    let dead = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let dead_address = dead.local_addr().expect("an address");
    drop(dead);
    let servers = format!("{dead_address}, {}", node.address);
    let mut client = open(&servers, Some(ours.token()))
        .await
        .expect("the second");
    client.open_again().await.expect("again");
    let error = refusal(
        &format!("{dead_address},{dead_address}"),
        Some(ours.token()),
    )
    .await;
    assert!(error.contains("E-CONNECT"), "{error}");
}

#[tokio::test]
async fn a_socket_wants_no_token_and_says_who_may_open_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("clusterd.sock");
    let path = path.display().to_string();
    let error = refusal(&path, None).await;
    assert!(
        error.contains("E-CONNECT") && error.contains("context add"),
        "{error}"
    );
    let incoming = proto::unix::listen(std::path::Path::new(&path))
        .await
        .expect("a socket");
    let shown = Arc::<Mutex<Vec<String>>>::default();
    let doorman = Doorman {
        answer: (Code::NotFound, None),
        shown: shown.clone(),
    };
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(doorman)
            .serve_with_incoming(incoming),
    );
    let token = authority("c1").token();
    for given in [None, Some(token.clone())] {
        let mut client = open(&path, given).await.expect("in");
        client.api.version(VersionRequest {}).await.expect_err("no");
    }
    let shown = shown.lock().expect("the list").clone();
    assert_eq!(shown, ["nothing".to_owned(), token.bearer()]);
}

#[test]
fn a_denied_socket_says_sudo() {
    let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
    let error = CliError::socket("/x/clusterd.sock", &denied).to_string();
    assert!(error.contains("sudo"), "{error}");
}

#[test]
fn addresses_are_host_and_port_or_a_path() {
    for good in ["n1:7440", "10.0.0.1:7440", "[::1]:7440"] {
        assert_eq!(
            Server::parse(good).expect("an address"),
            Server::Network(good.into())
        );
    }
    let socket = Server::parse("/run/x.sock").expect("a path");
    assert_eq!(socket, Server::Socket("/run/x.sock".into()));
    for bad in [
        "",
        "nowhere",
        ":7440",
        "n1:",
        "n1:99999",
        "http://n1:7440",
        "a b:1",
    ] {
        let error = Server::parse(bad).expect_err("none").to_string();
        assert!(error.contains("E-ADDRESS"), "{bad}: {error}");
    }
    assert_eq!(Server::parse_all("a:1, b:2").expect("two").len(), 2);
}

#[test]
fn a_token_that_is_none_is_not_repeated() {
    for text in ["BT1.hidden!", "hidden", ""] {
        let error = token(text).expect_err("none").to_string();
        assert!(
            error.contains("E-TOKEN") && !error.contains("hidden"),
            "{error}"
        );
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("token");
    let good = authority("c1").token();
    std::fs::write(&path, format!("{}\n", good.line())).expect("written");
    assert_eq!(token_file(&path).expect("a token"), good);
    let error = token_file(&folder.path().join("none")).expect_err("no file");
    assert!(error.to_string().contains("E-TOKEN"));
}
