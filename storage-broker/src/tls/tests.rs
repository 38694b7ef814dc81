//! A client that requires TLS, against servers and people in the path who do everything but that.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::starttls::{QUESTION_BYTES, STARTTLS};
use super::*;
use crate::dialer::Dialer;
use crate::nfs::{MountError, mount};
use crate::nfs_server::{Config, Server, TlsArgs, start};

const SOON: Duration = Duration::from_secs(10);

/// A certificate authority of a test.
pub(crate) struct TestAuthority {
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, PEM.
pub(crate) struct TestCertificate {
    pub(crate) chain: String,
    pub(crate) key: String,
}

impl TestAuthority {
    pub(crate) fn new() -> TestAuthority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        TestAuthority {
            pem: params.self_signed(&key).unwrap().pem(),
            issuer: Issuer::new(params, key),
        }
    }

    pub(crate) fn certify(&self, name: &str) -> TestCertificate {
        self.certify_from_to(name, 2000, 4000)
    }

    fn certify_from_to(&self, name: &str, first_year: i32, last_year: i32) -> TestCertificate {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(first_year, 1, 1);
        params.not_after = rcgen::date_time_ymd(last_year, 1, 1);
        let key = KeyPair::generate().unwrap();
        TestCertificate {
            chain: params.signed_by(&key, &self.issuer).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }

    fn client(&self) -> Dialer {
        Dialer::default().with_tls(Some(ClientTls::trusting(&self.pem).unwrap()))
    }
}

fn acceptor(
    certificate: &TestCertificate,
    version: &'static SupportedProtocolVersion,
) -> TlsAcceptor {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[version])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            certificates(&certificate.chain).unwrap(),
            PrivateKeyDer::from_pem_slice(certificate.key.as_bytes()).unwrap(),
        )
        .unwrap();
    config.alpn_protocols = vec![ALPN.to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

/// What a scripted server does with a connection, when it has read the question.
enum Then {
    /// Answers with these words behind the xid, and reads on.
    Say(Vec<u32>),
    /// Answers STARTTLS, then says this in clear.
    StartAndSay(Vec<u8>),
    /// Answers STARTTLS and closes.
    StartAndClose,
    /// Answers STARTTLS and shakes hands.
    StartAnd(TlsAcceptor),
}

/// A server that serves one connection; gives what it received in clear besides the question.
async fn scripted(then: Then) -> (SocketAddr, tokio::task::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut asked = [0; QUESTION_BYTES];
        stream.read_exact(&mut asked).await.unwrap();
        let xid = u32::from_be_bytes(asked[4..8].try_into().unwrap());
        let start = [1, 0, 0, 8, 0x5354_4152, 0x5454_4c53, 0];
        let mut clear = Vec::new();
        match then {
            Then::Say(words) => {
                stream.write_all(&record(xid, &words)).await.unwrap();
                let _ = stream.read_to_end(&mut clear).await;
            }
            Then::StartAndSay(bytes) => {
                let said = [record(xid, &start), bytes].concat();
                stream.write_all(&said).await.unwrap();
                // A ClientHello goes by in clear, as it must: what follows it counts.
                let _ = stream.read_to_end(&mut clear).await;
                clear = after_handshake_records(&clear);
            }
            Then::StartAndClose => stream.write_all(&record(xid, &start)).await.unwrap(),
            Then::StartAnd(acceptor) => {
                stream.write_all(&record(xid, &start)).await.unwrap();
                if let Ok(mut secured) = acceptor.accept(stream).await {
                    // A client that trusts us would now call.
                    let _ = secured.read_to_end(&mut clear).await;
                }
            }
        }
        clear
    });
    (address, serving)
}

/// What is left of a byte stream behind its TLS records (types 20 to 22: no application data).
fn after_handshake_records(mut bytes: &[u8]) -> Vec<u8> {
    while let [20..=22, 3, _, high, low, rest @ ..] = bytes {
        let length = usize::from(*high) << 8 | usize::from(*low);
        bytes = rest.get(length..).unwrap_or_default();
    }
    bytes.to_vec()
}

fn record(xid: u32, words: &[u32]) -> Vec<u8> {
    let length = 4 + 4 * words.len() as u32;
    [1 << 31 | length, xid]
        .iter()
        .chain(words)
        .flat_map(|word| word.to_be_bytes())
        .collect()
}

fn url(address: SocketAddr) -> crate::volume::NfsUrl {
    let VolumeUrl::Nfs(url) = format!("nfs://{address}/?tls=require").parse().unwrap() else {
        panic!("no NFS address")
    };
    url
}

/// Mounts through a client that must not go on; gives the error.
async fn refused(address: SocketAddr, client: &Dialer) -> String {
    let mounted = tokio::time::timeout(SOON, mount(&url(address), client, SOON)).await;
    match mounted.expect("an end") {
        Err(error @ MountError::NotSecure { .. }) => error.to_string(),
        Err(other) => panic!("refused for another reason: {other}"),
        Ok(_) => panic!("mounted without TLS"),
    }
}

async fn embedded(tls: TlsArgs) -> (Server, tempfile::TempDir) {
    let root = tempfile::tempdir().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let config = Config {
        tls,
        ..Config::new(any, root.path())
    };
    (start(config).await.unwrap(), root)
}

#[tokio::test]
async fn a_server_that_offers_no_tls_is_left_before_a_call_is_sent() {
    for words in [
        // NULL executed as if nothing had been asked: the embedded server, or an offer stripped on the way.
        vec![1, 0, 0, 0, 0],
        // AUTH_ERROR: AUTH_BADCRED, AUTH_REJECTEDCRED; PROG_UNAVAIL.
        vec![1, 1, 1, 1],
        vec![1, 1, 1, 2],
        vec![1, 0, 0, 0, 1],
    ] {
        let (address, server) = scripted(Then::Say(words.clone())).await;
        let error = refused(address, &TestAuthority::new().client()).await;
        assert!(error.contains("offers no TLS"), "{words:?}: {error}");
        assert!(server.await.unwrap().is_empty(), "{words:?}: sent in clear");
    }
    let (server, _root) = embedded(TlsArgs::default()).await;
    let error = refused(server.addr, &TestAuthority::new().client()).await;
    assert!(error.contains("offers no TLS"), "{error}");
}

#[tokio::test]
async fn an_answer_that_is_none_is_told_apart_from_no() {
    for words in [vec![0, 0, 0, 0, 0], vec![1, 7], vec![0; 200]] {
        let (address, server) = scripted(Then::Say(words.clone())).await;
        let error = refused(address, &TestAuthority::new().client()).await;
        assert!(error.contains("check the port"), "{words:?}: {error}");
        assert!(server.await.unwrap().is_empty(), "{words:?}: sent in clear");
    }
}

#[tokio::test]
async fn a_server_that_starts_tls_and_speaks_plain_is_left() {
    // A reply to a call that was never made, garbage, and the whole of an answer to MOUNT.
    for bytes in [
        record(7, &[1, 0, 0, 0, 0]),
        vec![0; 64],
        record(1, &[0; 30]),
    ] {
        let (address, server) = scripted(Then::StartAndSay(bytes.clone())).await;
        let error = refused(address, &TestAuthority::new().client()).await;
        assert!(error.contains("handshake failed"), "{bytes:?}: {error}");
        assert!(error.contains("spoke something else"), "{bytes:?}: {error}");
        assert!(server.await.unwrap().is_empty(), "{bytes:?}: sent in clear");
    }
    let (address, _server) = scripted(Then::StartAndClose).await;
    let error = refused(address, &TestAuthority::new().client()).await;
    assert!(error.contains("handshake failed"), "{error}");
}

#[tokio::test]
async fn only_the_right_authority_name_and_time_are_trusted() {
    let (ours, foreign) = (TestAuthority::new(), TestAuthority::new());
    for (certificate, says) in [
        (foreign.certify("127.0.0.1"), "not signed by the authority"),
        (ours.certify("127.0.0.2"), "for another name"),
        (ours.certify("localhost"), "for another name"),
        (ours.certify_from_to("127.0.0.1", 2000, 2001), "renew"),
        (ours.certify_from_to("127.0.0.1", 3999, 4000), "clock"),
    ] {
        let acceptor = acceptor(&certificate, &rustls::version::TLS13);
        let (address, server) = scripted(Then::StartAnd(acceptor)).await;
        let error = refused(address, &ours.client()).await;
        assert!(error.contains(says), "{says}: {error}");
        assert!(server.await.unwrap().is_empty(), "{says}: a call was sent");
    }
}

#[tokio::test]
async fn a_server_of_tls_1_2_is_refused() {
    let authority = TestAuthority::new();
    let acceptor = acceptor(&authority.certify("127.0.0.1"), &rustls::version::TLS12);
    let (address, _server) = scripted(Then::StartAnd(acceptor)).await;
    let error = refused(address, &authority.client()).await;
    assert!(error.contains("TLS 1.3"), "{error}");
}

/// Passes bytes on, and takes the offer out of the server's first answer.
async fn strip(server: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let heard = seen.clone();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut upstream = TcpStream::connect(server).await.unwrap();
            let mut asked = [0; QUESTION_BYTES];
            client.read_exact(&mut asked).await.unwrap();
            upstream.write_all(&asked).await.unwrap();
            let mut answer = [0; 4 + 32];
            upstream.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer[24..32], STARTTLS, "the server offers it");
            let xid = u32::from_be_bytes(answer[4..8].try_into().unwrap());
            let stripped = record(xid, &[1, 0, 0, 0, 0]);
            client.write_all(&stripped).await.unwrap();
            let mut rest = Vec::new();
            let _ = client.read_to_end(&mut rest).await;
            heard.lock().unwrap().extend(rest);
        }
    });
    (address, seen)
}

#[tokio::test]
async fn somebody_in_the_path_who_strips_the_offer_gets_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (server, _root) = embedded(self_signed_args(&directory)).await;
    let authority = std::fs::read_to_string(directory.path().join("ca.pem")).unwrap();
    let client = Dialer::default().with_tls(Some(ClientTls::trusting(&authority).unwrap()));
    // Without anybody between, the same client and server agree.
    mount(&url(server.addr), &client, SOON).await.unwrap();
    let (between, seen) = strip(server.addr).await;
    let error = refused(between, &client).await;
    assert!(error.contains("somebody in the path"), "{error}");
    assert!(
        seen.lock().unwrap().is_empty(),
        "something was sent in clear"
    );
    // And a client that says nothing of TLS still learns that the server offers it.
    let plain = Dialer::default();
    let host = server.addr.ip().to_string();
    assert!(plain.offers_tls(&host, server.addr.port()).await.unwrap());
    assert!(!plain.offers_tls(&host, between.port()).await.unwrap());
}

fn self_signed_args(directory: &tempfile::TempDir) -> TlsArgs {
    TlsArgs {
        tls_self_signed: Some(directory.path().into()),
        ..TlsArgs::default()
    }
}

#[tokio::test]
async fn an_address_that_requires_tls_is_not_mounted_without_an_authority() {
    let (server, _root) = embedded(TlsArgs::default()).await;
    let error = mount(&url(server.addr), &Dialer::default(), SOON)
        .await
        .unwrap_err();
    assert!(matches!(error, MountError::NoAuthority { .. }), "{error}");
    assert!(error.to_string().contains("--tls-ca"), "{error}");
}

#[test]
fn an_authority_is_parsed_at_the_door() {
    let authority = TestAuthority::new().pem;
    assert!(ClientTls::trusting(&authority).is_ok());
    let key = KeyPair::generate().unwrap().serialize_pem();
    for bad in ["", "nonsense", &key, &authority.replace("MII", "MXX")] {
        let error = ClientTls::trusting(bad).unwrap_err();
        assert!(matches!(error, ClientTlsError::Authority { .. }), "{error}");
        assert!(!error.to_string().contains(key.lines().nth(1).unwrap()));
    }
    let long = authority.repeat(CA_BYTES_MAX / authority.len() + 1);
    let error = ClientTls::trusting(&long).unwrap_err();
    assert!(matches!(error, ClientTlsError::TooLong { .. }), "{error}");
}

#[tokio::test]
async fn a_root_that_was_asked_for_in_clear_once_is_used_under_tls_without_mount() {
    use crate::nfs::Credential;
    use crate::store::{Store, VolumeRef};
    let directory = tempfile::tempdir().unwrap();
    let (secure, _root) = embedded(self_signed_args(&directory)).await;
    let authority = std::fs::read_to_string(directory.path().join("ca.pem")).unwrap();
    // MOUNT behind somebody who strips the offer stands for a MOUNT service without TLS.
    let (mount_port, seen) = strip(secure.addr).await;
    let text = format!(
        "nfs://{}/?mountport={}&tls=require",
        secure.addr,
        mount_port.port()
    );
    let volume = VolumeRef::parse(&text, &authority, "cluster-one", 50_000).unwrap();
    let store = Store::new(Dialer::default(), false);
    let error = store.probe(&volume).await.unwrap_err().to_string();
    assert!(error.contains("--mount-in-clear"), "{error}");
    assert!(seen.lock().unwrap().is_empty(), "sent in clear unasked");

    // Asked once through a port that answers in clear; then that port may be anything.
    let text = format!("nfs://{}/?tls=require", secure.addr);
    let volume = VolumeRef::parse(&text, &authority, "cluster-one", 50_000).unwrap();
    let pinned = store.pin_root(&volume).await.unwrap();
    let VolumeUrl::Nfs(mut url) = pinned.url.clone() else {
        panic!("no NFS address")
    };
    assert!(url.root.is_some() && pinned.url.to_string().contains("&root="));
    url.mount_port = Some(1);
    let dialer = Dialer::default().with_tls(pinned.tls.clone());
    let client = mount(&url, &dialer, SOON).await.unwrap();
    let me = Credential { uid: 7, gid: 7 };
    assert!(
        client
            .getattr(me, client.root())
            .await
            .unwrap()
            .is_directory
    );
    assert!(store.probe(&pinned).await.unwrap().writable);
}
