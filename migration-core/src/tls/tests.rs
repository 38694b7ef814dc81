use super::*;
use crate::net::{TcpAcceptor, TcpConnector};
use rustls::sign::CertifiedKey;
use tokio::net::TcpListener;

fn fingerprint(byte: u8) -> Fingerprint {
    Fingerprint([byte; 32])
}

#[test]
fn the_last_announcement_counts_until_one_has_proved_its_key() {
    let expected = ExpectedSource::default();
    let (one, other) = (fingerprint(1), fingerprint(2));
    assert!(
        !expected.admits(&one) && !expected.prove(&one),
        "nobody yet"
    );
    expected.announce(other).unwrap();
    expected.announce(one).unwrap();
    assert!(!expected.admits(&other) && !expected.prove(&other));
    assert!(expected.prove(&one));
    assert_eq!(expected.announce(one), Ok(()), "again");
    let refused = expected.announce(other).unwrap_err();
    assert_eq!((refused.present, refused.announced), (one, other));
    assert!(expected.admits(&one) && !expected.admits(&other));
}

#[test]
fn a_processor_without_aes_prefers_chacha20_and_both_know_all_three() {
    use rustls::CipherSuite::{TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256};
    let names = |fast| {
        suites(fast)
            .iter()
            .map(|suite| suite.suite())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(true)[0], TLS13_AES_128_GCM_SHA256);
    assert_eq!(names(false)[0], TLS13_CHACHA20_POLY1305_SHA256);
    assert!(names(true).iter().all(|name| names(false).contains(name)));
    assert_eq!((names(true).len(), names(false).len()), (3, 3));
}

/// One connection between these two, who were told of each other's fingerprints.
async fn connection(
    source: &Identity,
    destination: &Identity,
) -> (io::Result<BoxStream>, io::Result<BoxStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = vec![listener.local_addr().unwrap()];
    let expected = ExpectedSource::default();
    expected.announce(source.fingerprint()).unwrap();
    let acceptor = TlsAcceptor::new(TcpAcceptor { listener }, destination, expected).unwrap();
    let tcp = TcpConnector { addresses };
    let connector = TlsConnector::new(tcp, source, destination.fingerprint()).unwrap();
    let accept = async { acceptor.accept().await?.await };
    tokio::join!(connector.connect(0), accept)
}

/// Who shows somebody's certificate without having its key.
fn thief_of(victim: &Identity) -> Identity {
    let own = Identity::draw().unwrap();
    let key = CertifiedKey::new(victim.key.cert.clone(), Arc::clone(&own.key.key));
    Identity {
        key: Arc::new(key),
        fingerprint: victim.fingerprint,
    }
}

#[tokio::test]
async fn an_announced_certificate_without_its_key_is_worth_nothing() {
    let (source, destination) = (Identity::draw().unwrap(), Identity::draw().unwrap());
    let (_, accepted) = connection(&thief_of(&source), &destination).await;
    let why = accepted.err().expect("a thief came in").to_string();
    assert!(why.contains("BadSignature"), "{why}");
    let (connected, _) = connection(&source, &thief_of(&destination)).await;
    let why = connected.err().expect("a thief was believed").to_string();
    assert!(why.contains("BadSignature"), "{why}");
    let (connected, accepted) = connection(&source, &destination).await;
    assert!(connected.is_ok() && accepted.is_ok());
}

#[tokio::test]
async fn a_close_is_an_end_and_the_other_direction_goes_on() {
    let (source, destination) = (Identity::draw().unwrap(), Identity::draw().unwrap());
    let (ours, theirs) = connection(&source, &destination).await;
    let (mut ours, mut theirs) = (ours.unwrap(), theirs.unwrap());
    let frame = (0..3_000_001).map(|n| n as u8).collect::<Vec<_>>();
    let sending = async {
        ours.write_all(&frame).await.unwrap();
        ours.flush().await.unwrap();
        ours.shutdown().await.unwrap();
        let mut answer = Vec::new();
        ours.read_to_end(&mut answer).await.unwrap();
        answer
    };
    let taking = async {
        let mut taken = Vec::new();
        theirs.read_to_end(&mut taken).await.unwrap();
        theirs.write_all(b"why").await.unwrap();
        theirs.shutdown().await.unwrap();
        taken
    };
    let (answer, taken) = tokio::join!(sending, taking);
    assert!(taken == frame, "{} bytes arrived", taken.len());
    assert_eq!(answer, b"why");
}

#[tokio::test]
async fn a_cut_is_no_end() {
    let (source, destination) = (Identity::draw().unwrap(), Identity::draw().unwrap());
    let (ours, theirs) = connection(&source, &destination).await;
    let (mut ours, mut theirs) = (ours.unwrap(), theirs.unwrap());
    ours.write_all(b"half").await.unwrap();
    ours.flush().await.unwrap();
    // Closes the socket under the session, as a reset or a forged FIN would.
    drop(ours);
    let cut = theirs.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn the_two_agree_on_the_protocol_inside_and_on_the_fastest_suite_here() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (source, destination) = (Identity::draw().unwrap(), Identity::draw().unwrap());
    let expected = ExpectedSource::default();
    expected.announce(source.fingerprint()).unwrap();
    let acceptor = TlsAcceptor::new(TcpAcceptor { listener }, &destination, expected).unwrap();
    let accepting = tokio::spawn(async move { acceptor.accept().await.unwrap().await });
    let tcp = TcpConnector { addresses: vec![] };
    let connector = TlsConnector::new(tcp, &source, destination.fingerprint()).unwrap();
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("monitor").unwrap();
    let stream = connector.tls.connect(name, stream).await.unwrap();
    let session = stream.get_ref().1;
    assert_eq!(
        session.protocol_version(),
        Some(rustls::ProtocolVersion::TLSv1_3)
    );
    let suite = session.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, provider().cipher_suites[0].suite());
    assert_eq!(session.alpn_protocol(), Some(ALPN));
    assert!(accepting.await.unwrap().is_ok());
}

#[tokio::test]
async fn who_speaks_another_protocol_inside_is_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (source, destination) = (Identity::draw().unwrap(), Identity::draw().unwrap());
    let expected = ExpectedSource::default();
    expected.announce(source.fingerprint()).unwrap();
    let acceptor = TlsAcceptor::new(TcpAcceptor { listener }, &destination, expected).unwrap();
    for protocols in [vec![], vec![b"h2".to_vec()]] {
        let tcp = TcpConnector { addresses: vec![] };
        let connector = TlsConnector::new(tcp, &source, destination.fingerprint()).unwrap();
        let mut config = ClientConfig::clone(connector.tls.config());
        config.alpn_protocols = protocols;
        let connect = async {
            let stream = tokio::net::TcpStream::connect(address).await.unwrap();
            let name = ServerName::try_from("monitor").unwrap();
            let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
            connector.connect(name, stream).await
        };
        let accept = async { acceptor.accept().await?.await };
        let (_connected, accepted) = tokio::join!(connect, accept);
        assert!(accepted.is_err());
    }
}
