//! The server's side of RFC 9289: when it starts TLS, what it refuses then and otherwise, and client certificates.

use std::path::Path;
use std::sync::Arc;

use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::wire::{head, record, reply, send, words};
use super::*;
use crate::nfs_server::export::Export;
use crate::nfs_server::greeting::greet;
use crate::nfs_server::{Shared, TlsArgs};
use crate::tls::tests::{TestAuthority, TestCertificate};
use crate::tls::{ClientTls, ServerTls};

const ME: Credential = user(BROKER, 7);

/// A server with a certificate of its own making, and the authority that vouches for it.
async fn secure(root: &TempDir, more: impl FnOnce(&mut TlsArgs)) -> (Server, String) {
    let directory = root.path().with_extension("tls");
    let mut config = Config::new("127.0.0.1:0".parse().unwrap(), root.path());
    config.tls.tls_self_signed = Some(directory.clone());
    more(&mut config.tls);
    let server = start(config).await.unwrap();
    let authority = std::fs::read_to_string(directory.join("ca.pem")).unwrap();
    std::fs::remove_dir_all(directory).unwrap();
    (server, authority)
}

async fn connect_with(server: &Server, tls: ClientTls) -> Result<NfsClient, String> {
    let VolumeUrl::Nfs(url) = format!("{}?tls=require", server.url()).parse().unwrap() else {
        panic!("an NFS volume")
    };
    let dialer = Dialer::default().with_tls(Some(tls));
    let mounted = mount(&url, &dialer, CALL_TIMEOUT).await;
    mounted.map_err(|error| error.to_string())
}

/// A call with the credential AUTH_TLS.
fn question(xid: u32, program: u32, version: u32, procedure: u32) -> Vec<u8> {
    record(&words(&[
        xid, 0, 2, program, version, procedure, 7, 0, 0, 0,
    ]))
}

const NFS: u32 = nfs3::PROGRAM;
const MOUNT: u32 = 100_005;

/// MSG_ACCEPTED, a verifier with STARTTLS, SUCCESS.
const START: [u32; 8] = [1, 1, 0, 0, 8, 0x5354_4152, 0x5454_4c53, 0];

fn auth_error(status: u32) -> Vec<u32> {
    vec![1, 1, 1, 1, status]
}

#[tokio::test]
async fn the_question_is_answered_with_the_token_for_both_programs() {
    let root = tempfile::tempdir().unwrap();
    let (server, _) = secure(&root, |_| {}).await;
    for program in [NFS, MOUNT] {
        let mut stream = send(&server, &question(1, program, 3, 0)).await;
        assert_eq!(reply(&mut stream).await, START);
    }
    // For others there is none.
    let mut stream = send(&server, &question(1, 100_000, 2, 0)).await;
    assert_eq!(reply(&mut stream).await, [1, 1, 0, 0, 0, 1]);
    let mut stream = send(&server, &question(1, NFS, 4, 0)).await;
    assert_eq!(reply(&mut stream).await, [1, 1, 0, 0, 0, 2, 3, 3]);
}

#[tokio::test]
async fn a_server_without_tls_answers_the_question_as_a_plain_null() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let mut stream = send(&server, &question(1, NFS, 3, 0)).await;
    assert_eq!(reply(&mut stream).await, [1, 1, 0, 0, 0, 0]);
}

#[tokio::test]
async fn a_question_that_is_not_rfc_9289s_is_an_auth_error() {
    const BADCRED: u32 = 1;
    const BADVERF: u32 = 3;
    let root = tempfile::tempdir().unwrap();
    let (server, _) = secure(&root, |_| {}).await;
    for (call, status) in [
        // Another procedure; a credential with a body; a verifier with a flavor, with a body.
        (question(1, NFS, 3, 1), BADCRED),
        (
            record(&words(&[1, 0, 2, NFS, 3, 0, 7, 4, 9, 0, 0])),
            BADCRED,
        ),
        (record(&words(&[1, 0, 2, NFS, 3, 0, 7, 0, 1, 0])), BADVERF),
        (
            record(&words(&[1, 0, 2, NFS, 3, 0, 7, 0, 0, 4, 9])),
            BADVERF,
        ),
    ] {
        let mut stream = send(&server, &call).await;
        assert_eq!(reply(&mut stream).await, auth_error(status), "{call:?}");
    }
    // After a call in clear.
    let mut stream = send(&server, &record(&head(2, NFS, 3, 0))).await;
    assert_eq!(reply(&mut stream).await[0], 2);
    let asked = question(1, NFS, 3, 0);
    tokio::io::AsyncWriteExt::write_all(&mut stream, &asked)
        .await
        .unwrap();
    assert_eq!(reply(&mut stream).await, auth_error(BADCRED));
    // Inside TLS.
    let other_root = tempfile::tempdir().unwrap();
    let (server, authority) = secure(&other_root, |_| {}).await;
    let tls = ClientTls::trusting(&authority).unwrap();
    let plain = TcpStream::connect(server.addr).await.unwrap();
    let mut inside = tls.secure(plain, "127.0.0.1", (NFS, 3)).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut inside, &asked)
        .await
        .unwrap();
    tokio::io::AsyncWriteExt::flush(&mut inside).await.unwrap();
    let mut answer = [0; 24];
    inside.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer[4..], words(&auth_error(BADCRED)));
}

#[tokio::test]
async fn what_is_sent_in_clear_behind_the_question_is_never_executed() {
    let root = tempfile::tempdir().unwrap();
    let (server, _) = secure(&root, |_| {}).await;
    // A NULL as user 7, in the same segment: it has no answer, and the connection ends.
    let call = record(&head(2, NFS, 3, 0));
    let mut stream = send(&server, &[question(1, NFS, 3, 0), call.clone()].concat()).await;
    assert!(reply(&mut stream).await.is_empty());
    // In a segment of its own, behind the token: the handshake refuses it.
    let mut stream = send(&server, &question(1, NFS, 3, 0)).await;
    assert_eq!(reply(&mut stream).await, START);
    tokio::io::AsyncWriteExt::write_all(&mut stream, &call)
        .await
        .unwrap();
    let mut rest = Vec::new();
    // Closed, with an alert before it or a reset.
    let _ = timeout(CALL_TIMEOUT, stream.read_to_end(&mut rest))
        .await
        .expect("an end");
    assert!(rest.is_empty() || rest[0] == 21, "{rest:?}");
    // Plain clients are served as before.
    connect(&server).await.null().await.unwrap();
}

#[tokio::test]
async fn a_client_that_falls_silent_in_the_handshake_is_closed() {
    let root = tempfile::tempdir().unwrap();
    let args = TlsArgs {
        tls_self_signed: Some(root.path().join("tls")),
        ..TlsArgs::default()
    };
    let mut tls = ServerTls::load(&args, [127, 0, 0, 1].into())
        .unwrap()
        .unwrap();
    tls.handshake_timeout = Duration::from_millis(50);
    std::fs::create_dir(root.path().join("export")).unwrap();
    let shared = Arc::new(Shared {
        export: Arc::new(Export::open(&root.path().join("export"), false).unwrap()),
        name: "/".into(),
        root_squash: true,
        tls: Some(tls),
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    let asked = question(1, NFS, 3, 0);
    tokio::io::AsyncWriteExt::write_all(&mut client, &asked)
        .await
        .unwrap();
    let greeted = timeout(CALL_TIMEOUT, greet(stream, &shared)).await.unwrap();
    assert!(greeted.is_err());
    assert_eq!(reply(&mut client).await, START);
    assert!(reply(&mut client).await.is_empty(), "closed");
}

#[tokio::test]
async fn where_tls_is_demanded_calls_in_clear_are_too_weak_and_null_is_answered() {
    const TOOWEAK: u32 = 5;
    let root = tempfile::tempdir().unwrap();
    let (server, authority) = secure(&root, |args| args.tls_only = true).await;
    for program in [NFS, MOUNT] {
        let mut stream = send(&server, &record(&head(1, program, 3, 1))).await;
        assert_eq!(reply(&mut stream).await, auth_error(TOOWEAK));
        let mut stream = send(&server, &record(&head(1, program, 3, 0))).await;
        assert_eq!(reply(&mut stream).await, [1, 1, 0, 0, 0, 0]);
    }
    let client = connect_with(&server, ClientTls::trusting(&authority).unwrap());
    let client = client.await.unwrap();
    client.getattr(ME, client.root()).await.unwrap();
}

#[tokio::test]
async fn large_and_many_calls_go_through_tls_in_flight_together() {
    const PIECE: usize = 1 << 20;
    let root = tempfile::tempdir().unwrap();
    let (server, authority) = secure(&root, |_| {}).await;
    let client = connect_with(&server, ClientTls::trusting(&authority).unwrap());
    let client = client.await.unwrap();
    let attributes = SetAttributes {
        mode: Some(0o600),
        ..SetAttributes::default()
    };
    let file = client
        .create(ME, client.root(), "f", attributes)
        .await
        .unwrap();
    let piece = |number: usize| -> Bytes {
        (0..PIECE)
            .map(|at| (at * 7 + number * 13) as u8)
            .collect::<Vec<_>>()
            .into()
    };
    let mut writes = Vec::new();
    for number in 0..8 {
        let slot = client.connection().slot().await.unwrap();
        let (offset, data) = ((number * PIECE) as u64, piece(number));
        writes.push(client.start_write(slot, ME, &file, offset, &data, Stable::FILE_SYNC));
    }
    for write in writes {
        assert_eq!(write.await.unwrap().count as usize, PIECE);
    }
    let mut reads = Vec::new();
    for number in 0..8 {
        let slot = client.connection().slot().await.unwrap();
        let offset = (number * PIECE) as u64;
        reads.push(client.start_read(slot, ME, &file, offset, PIECE as u32));
    }
    for (number, read) in reads.into_iter().enumerate() {
        assert!(read.await.unwrap().data == piece(number), "piece {number}");
    }
}

fn written(directory: &Path, name: &str, text: &str) -> std::path::PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

#[tokio::test]
async fn a_server_with_a_client_authority_serves_only_those_whom_it_signed() {
    let (root, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (servers, clients, foreign) = (
        TestAuthority::new(),
        TestAuthority::new(),
        TestAuthority::new(),
    );
    let TestCertificate { chain, key } = servers.certify("127.0.0.1");
    let config = Config {
        tls: TlsArgs {
            tls_cert: Some(written(files.path(), "server.pem", &chain)),
            tls_key: Some(written(files.path(), "server.key", &key)),
            tls_client_ca: Some(written(files.path(), "clients.pem", &clients.pem)),
            ..TlsArgs::default()
        },
        ..Config::new("127.0.0.1:0".parse().unwrap(), root.path())
    };
    let server = start(config).await.unwrap();
    let anonymous = ClientTls::trusting(&servers.pem).unwrap();
    let error = connect_with(&server, anonymous).await.unwrap_err();
    // An alert, or the reset that overtook it.
    assert!(error.contains("MOUNT service"), "{error}");
    let with = |certificate: TestCertificate| {
        ClientTls::with_certificate(&servers.pem, &certificate.chain, &certificate.key).unwrap()
    };
    let stranger = with(foreign.certify("node-1"));
    let error = connect_with(&server, stranger).await.unwrap_err();
    assert!(error.contains("MOUNT service"), "{error}");
    let known = with(clients.certify("node-1"));
    let client = connect_with(&server, known).await.unwrap();
    client.getattr(ME, client.root()).await.unwrap();
    let mut stream = send(&server, &record(&head(1, NFS, 3, 1))).await;
    assert_eq!(reply(&mut stream).await, auth_error(5));
}

#[tokio::test]
async fn half_of_a_certificate_and_files_that_are_none_say_what_is_missing() {
    let (root, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let TestCertificate { chain, key } = TestAuthority::new().certify("127.0.0.1");
    let other = TestAuthority::new().certify("127.0.0.1").key;
    let file = |name: &str, text: &str| Some(written(files.path(), name, text));
    for (args, says) in [
        (
            TlsArgs {
                tls_only: true,
                ..TlsArgs::default()
            },
            "--tls-only needs a certificate",
        ),
        (
            TlsArgs {
                tls_cert: file("a.pem", &chain),
                tls_key: file("a.key", "nothing"),
                ..TlsArgs::default()
            },
            "a.key cannot be used",
        ),
        (
            TlsArgs {
                tls_cert: file("b.pem", &key),
                tls_key: file("b.key", &key),
                ..TlsArgs::default()
            },
            "b.pem cannot be used",
        ),
        (
            TlsArgs {
                tls_cert: file("c.pem", &chain),
                tls_key: file("c.key", &other),
                ..TlsArgs::default()
            },
            "c.pem cannot be used",
        ),
        (
            TlsArgs {
                tls_cert: Some(files.path().join("missing")),
                tls_key: file("d.key", &key),
                ..TlsArgs::default()
            },
            "cannot read",
        ),
    ] {
        let config = Config {
            tls: args,
            ..Config::new("127.0.0.1:0".parse().unwrap(), root.path())
        };
        let error = start(config).await.unwrap_err().to_string();
        assert!(error.contains(says), "{says}: {error}");
        assert!(!error.contains(key.lines().nth(1).unwrap()), "{error}");
    }
}
