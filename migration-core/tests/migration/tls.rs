//! Migrations over TLS on real sockets, and who is kept out of them.

use crate::fake::{Fake, Guest};
use crate::rig::{Attempt, credentials};
use migration_core::tls::{ExpectedSource, Fingerprint, Identity, TlsAcceptor, TlsConnector};
use migration_core::{
    Acceptor, BoxStream, Connector, Credentials, SendError, SendOptions, TcpAcceptor, TcpConnector,
    Ticket, send,
};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// A destination that waits on a port of this host, and who may come.
struct Scene {
    address: SocketAddr,
    source: Identity,
    destination: Fingerprint,
    expected: ExpectedSource,
    port: Arc<dyn Acceptor>,
}

impl Scene {
    async fn new() -> Scene {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let destination = Identity::draw().unwrap();
        let expected = ExpectedSource::default();
        let port = TlsAcceptor::new(TcpAcceptor { listener }, &destination, expected.clone());
        Scene {
            address,
            source: Identity::draw().unwrap(),
            destination: destination.fingerprint(),
            expected,
            port: Arc::new(port.unwrap()),
        }
    }

    /// One whose destination was told of its source.
    async fn arranged() -> Scene {
        let scene = Scene::new().await;
        scene.expected.announce(scene.source.fingerprint()).unwrap();
        scene
    }

    fn caller(&self, who: &Identity, address: SocketAddr) -> Arc<dyn Connector> {
        let tcp = TcpConnector {
            addresses: vec![address],
        };
        Arc::new(TlsConnector::new(tcp, who, self.destination).unwrap())
    }

    fn attempt(&self, channels: u16) -> Attempt {
        let caller = self.caller(&self.source, self.address);
        Attempt::new(caller, Arc::clone(&self.port), channels)
    }
}

/// Someone else's attempt; it fails without touching the machine it has.
async fn fails(caller: Arc<dyn Connector>, credentials: Credentials) -> SendError {
    let machine = Fake::new();
    let (status, _) = watch::channel(Default::default());
    let options = SendOptions::default();
    let machine_sent = Arc::clone(&machine);
    let sent = send(
        caller,
        credentials,
        machine_sent,
        options,
        status,
        Default::default(),
    );
    let failed = sent.await.unwrap_err();
    assert!(!failed.said_quiet && !failed.machine_stopped && machine.is_running());
    failed.cause
}

/// All that passed one way.
type Record = Arc<Mutex<Vec<u8>>>;

/// Passes connections on to `to` and keeps what passes, both ways.
async fn eavesdropper(to: SocketAddr) -> (SocketAddr, Record, Record) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sent, heard) = (Record::default(), Record::default());
    let records = (Arc::clone(&sent), Arc::clone(&heard));
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let far = TcpStream::connect(to).await.unwrap();
            let (near_reads, near_writes) = near.into_split();
            let (far_reads, far_writes) = far.into_split();
            tokio::spawn(pass(near_reads, far_writes, Arc::clone(&records.0)));
            tokio::spawn(pass(far_reads, near_writes, Arc::clone(&records.1)));
        }
    });
    (address, sent, heard)
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    record: Record,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        record.lock().unwrap().extend_from_slice(&buffer[..read]);
        to.write_all(&buffer[..read]).await?;
    }
}

/// The content types of the TLS records in a direction (RFC 8446, section 5.1).
fn record_types(bytes: &[u8]) -> Vec<u8> {
    let mut types = Vec::new();
    let mut at = 0;
    while at + 5 <= bytes.len() {
        types.push(bytes[at]);
        at += 5 + usize::from(u16::from_be_bytes([bytes[at + 3], bytes[at + 4]]));
    }
    assert_eq!(at, bytes.len(), "whole records, and nothing else");
    types
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_equal_after_a_move_over_tls() {
    for channels in [1, 3] {
        let scene = Scene::arranged().await;
        let (source, sink) = (Fake::filled(40 + u64::from(channels)), Fake::new());
        let _guest = Guest::start(&source, 50, Duration::from_millis(1));
        let outcome = scene.attempt(channels).run(&source, &sink).await;
        assert!(outcome.source.is_ok(), "{:?}", outcome.source.err());
        assert!(outcome.destination.is_ok());
        assert_eq!(source.difference(&sink), None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_listens_on_the_wire_sees_one_hello_each_way_and_sealed_records() {
    let scene = Scene::arranged().await;
    let (address, sent, heard) = eavesdropper(scene.address).await;
    let (source, sink) = (Fake::filled(50), Fake::new());
    let mut attempt = scene.attempt(1);
    attempt.caller = scene.caller(&scene.source, address);
    let outcome = attempt.run(&source, &sink).await;
    assert!(outcome.source.is_ok(), "{:?}", outcome.source.err());
    assert_eq!(source.difference(&sink), None);
    for record in [sent, heard] {
        let bytes = record.lock().unwrap().clone();
        // In TLS 1.2 certificates would pass as handshake records in clear.
        const HANDSHAKE: u8 = 22;
        const CHANGE_CIPHER_SPEC: u8 = 20;
        const APPLICATION_DATA: u8 = 23;
        let types = record_types(&bytes);
        assert_eq!(types.iter().filter(|&&kind| kind == HANDSHAKE).count(), 1);
        assert!(
            types
                .iter()
                .all(|kind| { [HANDSHAKE, CHANGE_CIPHER_SPEC, APPLICATION_DATA].contains(kind) })
        );
        let holds = |what: &[u8]| bytes.windows(what.len()).any(|part| part == what);
        assert!(!holds(b"BTNM"), "a frame in clear");
        assert!(!holds(&credentials().ticket.0), "the ticket in clear");
        assert!(!holds(b"baton monitor"), "a certificate in clear");
    }
}

/// A ClientHello that offers TLS 1.2 at most (RFC 5246, section 7.4.1.2), in a record.
fn tls_1_2_hello() -> Vec<u8> {
    let extensions: &[&[u8]] = &[
        // supported_groups: x25519, secp256r1
        &[0, 10, 0, 6, 0, 4, 0, 29, 0, 23],
        // signature_algorithms: ecdsa_secp256r1_sha256
        &[0, 13, 0, 4, 0, 2, 4, 3],
    ];
    let extensions = extensions.concat();
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    // No session; ECDHE-ECDSA with AES-128-GCM; no compression.
    body.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let mut message = vec![1, 0];
    message.extend((body.len() as u16).to_be_bytes());
    message.extend(body);
    let mut record = vec![22, 3, 1];
    record.extend((message.len() as u16).to_be_bytes());
    record.extend(message);
    record
}

/// Says this and gives what comes back until the end.
async fn say(address: SocketAddr, words: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(words).await.unwrap();
    let mut answer = Vec::new();
    // A reset is an end as well.
    let _ = stream.read_to_end(&mut answer).await;
    answer
}

/// A TLS 1.3 client that believes any destination and has no certificate.
async fn without_a_certificate(address: SocketAddr) -> io::Result<usize> {
    let tls = anonymous::connector();
    let stream = TcpStream::connect(address).await?;
    let name = rustls::pki_types::ServerName::try_from("monitor").map_err(io::Error::other)?;
    let mut stream = tls.connect(name, stream).await?;
    // A client is done before the destination has looked at it.
    stream.read(&mut [0; 16]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_else_is_refused_and_the_right_source_does_not_notice() {
    let scene = Arc::new(Scene::arranged().await);
    let (source, sink) = (Fake::filled(60), Fake::new());
    let _guest = Guest::start(&source, 100, Duration::from_micros(500));
    let mut attempt = scene.attempt(2);
    attempt.send_options.bandwidth_max_bytes_s = 16 << 20;
    let mut status = attempt.source_status.subscribe();
    let asked = Arc::clone(&scene);
    let strangers = tokio::spawn(async move {
        let scene = asked;
        // Before, at the beginning, and in the middle of the copy.
        let mut half_open = Vec::new();
        for pages in [0, 1, 1000] {
            status
                .wait_for(|status| status.pages >= pages)
                .await
                .unwrap();
            half_open.push(TcpStream::connect(scene.address).await.unwrap());
            let mut half_said = TcpStream::connect(scene.address).await.unwrap();
            half_said.write_all(&tls_1_2_hello()[..20]).await.unwrap();
            half_open.push(half_said);

            let refused = without_a_certificate(scene.address).await.unwrap_err();
            assert!(
                refused.to_string().contains("CertificateRequired"),
                "no certificate: {refused}"
            );
            let another = scene.caller(&Identity::draw().unwrap(), scene.address);
            let failed = fails(another, credentials()).await;
            assert!(
                failed.to_string().contains("AccessDenied"),
                "another certificate: {failed}"
            );
            let wrong = Credentials {
                ticket: Ticket([1; 32]),
                ..credentials()
            };
            let failed = fails(scene.caller(&scene.source, scene.address), wrong).await;
            assert!(
                matches!(&failed, SendError::Destination(why) if why.contains("ticket")),
                "a wrong ticket: {failed}"
            );
            if pages > 0 {
                let again = scene.caller(&scene.source, scene.address);
                let failed = fails(again, credentials()).await;
                assert!(
                    matches!(&failed, SendError::Destination(why) if why.contains("channels")
                        || why.contains("used")),
                    "the ticket again: {failed}"
                );
            }
            let answer = say(scene.address, &tls_1_2_hello()).await;
            // A fatal alert, protocol_version (RFC 8446, section 6).
            assert_eq!(answer, [21, 3, 3, 0, 2, 2, 70], "TLS 1.2");
            let answer = say(scene.address, b"BTNM and more that is no TLS").await;
            assert!(answer.is_empty() || answer[0] == 21, "plain: {answer:?}");
        }
        half_open
    });
    let outcome = attempt.run(&source, &sink).await;
    drop(strangers.await.unwrap());
    assert!(outcome.source.is_ok(), "{:?}", outcome.source.err());
    assert!(outcome.destination.is_ok());
    assert_eq!(source.difference(&sink), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_comes_in_before_a_source_was_announced() {
    let scene = Scene::new().await;
    let (source, sink) = (Fake::filled(70), Fake::new());
    let mut attempt = scene.attempt(1);
    let early = scene.caller(&scene.source, scene.address);
    let (announce, expected) = (scene.source.fingerprint(), scene.expected.clone());
    attempt.caller = Arc::new(Later {
        early,
        announce,
        expected,
    });
    let outcome = attempt.run(&source, &sink).await;
    assert!(outcome.source.is_ok(), "{:?}", outcome.source.err());
    assert_eq!(source.difference(&sink), None);
    let another = Identity::draw().unwrap().fingerprint();
    assert!(
        scene.expected.announce(another).is_err(),
        "after one has come"
    );
    assert!(scene.expected.announce(scene.source.fingerprint()).is_ok());
}

/// Tries in vain, has itself announced, and then connects.
struct Later {
    early: Arc<dyn Connector>,
    announce: Fingerprint,
    expected: ExpectedSource,
}

#[async_trait::async_trait]
impl Connector for Later {
    async fn connect(&self, channel: u16) -> io::Result<BoxStream> {
        let refused = self.early.connect(channel).await;
        assert!(refused.is_err(), "nobody had been announced");
        self.expected.announce(self.announce).unwrap();
        self.early.connect(channel).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_says_nothing_to_a_destination_with_another_certificate() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (scene, impostor) = (Scene::new().await, Identity::draw().unwrap());
    // It would take anybody's word for being the source.
    let expected = ExpectedSource::default();
    expected.announce(scene.source.fingerprint()).unwrap();
    let port = TlsAcceptor::new(TcpAcceptor { listener }, &impostor, expected).unwrap();
    let lured = tokio::spawn(async move { port.accept().await.unwrap().await.err() });
    let failed = fails(scene.caller(&scene.source, address), credentials()).await;
    assert!(
        matches!(&failed, SendError::Connect { channel: 0, source }
            if source.to_string().contains("the destination did not prove")),
        "{failed}"
    );
    assert!(lured.await.unwrap().is_some(), "it even heard a frame");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_silent_connections_do_not_keep_the_source_out() {
    let scene = Scene::arranged().await;
    // More than the door's handshakes, fewer than a listener's backlog: nobody accepts yet.
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(scene.address).await.unwrap());
    }
    let (source, sink) = (Fake::filled(80), Fake::new());
    let mut attempt = scene.attempt(2);
    // Longer than the whole migration may take: only being first out helps.
    attempt.receive_options.handshake_timeout = Duration::from_secs(60);
    let outcome = attempt.run(&source, &sink).await;
    assert!(outcome.source.is_ok(), "{:?}", outcome.source.err());
    assert_eq!(source.difference(&sink), None);
}

/// A client that checks nothing: an attacker's, not ours.
mod anonymous {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
    use std::sync::Arc;

    #[derive(Debug)]
    struct Anybody;

    impl ServerCertVerifier for Anybody {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ECDSA_NISTP256_SHA256]
        }
    }

    pub fn connector() -> tokio_rustls::TlsConnector {
        let mut config =
            ClientConfig::builder_with_provider(Arc::new(migration_core::tls::provider()))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Anybody))
                .with_no_client_auth();
        config.alpn_protocols = vec![migration_core::tls::ALPN.to_vec()];
        Arc::new(config).into()
    }
}
