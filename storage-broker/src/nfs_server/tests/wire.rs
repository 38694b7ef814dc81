//! What arrives on the port and is not as it should be: it costs its connection or its call, no more.

use super::*;
use crate::nfs_server::start_bounded;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

pub(super) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

pub(super) fn record(content: &[u8]) -> Vec<u8> {
    [&(content.len() as u32 | 1 << 31).to_be_bytes(), content].concat()
}

/// The head of a call with the credential of user 7.
pub(super) fn head(xid: u32, program: u32, version: u32, procedure: u32) -> Vec<u8> {
    words(&[
        xid, 0, 2, program, version, procedure, 1, 20, 0, 0, 7, 7, 0, 0, 0,
    ])
}

pub(super) async fn send(server: &Server, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    // It may be closed while we are still sending.
    let _ = stream.write_all(bytes).await;
    stream
}

/// The words of the next reply; empty when the connection is closed.
pub(super) async fn reply(stream: &mut TcpStream) -> Vec<u32> {
    let read = async {
        let mark = stream.read_u32().await.ok()?;
        let mut content = vec![0; (mark & !(1 << 31)) as usize];
        stream.read_exact(&mut content).await.ok()?;
        Some(
            content
                .chunks(4)
                .map(|c| u32::from_be_bytes(c.try_into().unwrap()))
                .collect(),
        )
    };
    timeout(CALL_TIMEOUT, read)
        .await
        .expect("an answer or an end")
        .unwrap_or_default()
}

#[tokio::test]
async fn garbage_closes_its_connection_and_no_other() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    for garbage in [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        vec![0xff; 4096],
        record(&[]),
        record(&words(&[1, 1, 0, 0, 0, 0])),
        record(&words(&[1, 0, 2])),
        [0; 4].repeat(1000),
    ] {
        let mut stream = send(&server, &garbage).await;
        assert_eq!(
            reply(&mut stream).await,
            [0; 0],
            "{:?}",
            &garbage[..8.min(garbage.len())]
        );
    }
    client.null().await.unwrap();
}

#[tokio::test]
async fn a_call_that_is_not_served_is_answered_with_the_reason() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let no_credential = words(&[9, 0, 2, 100_003, 3, 1, 0, 0, 0, 0]);
    let bad_credential = words(&[9, 0, 2, 100_003, 3, 1, 1, 4, 0, 0, 0]);
    let (accepted, denied) = (vec![9, 1, 0, 0, 0], vec![9, 1, 1]);
    for (call, head, tail) in [
        (head(9, 100_000, 2, 0), &accepted, vec![1]),
        (head(9, 100_003, 4, 0), &accepted, vec![2, 3, 3]),
        (head(9, 100_005, 1, 0), &accepted, vec![2, 3, 3]),
        (head(9, 100_003, 3, 22), &accepted, vec![3]),
        (head(9, 100_005, 3, 9), &accepted, vec![3]),
        (head(9, 100_003, 3, 1), &accepted, vec![4]),
        (words(&[9, 0, 3]), &denied, vec![0, 2, 2]),
        (no_credential, &denied, vec![1, 5]),
        (bad_credential, &denied, vec![1, 1]),
        (head(9, 100_003, 3, 0), &accepted, vec![0]),
    ] {
        let mut stream = send(&server, &record(&call)).await;
        assert_eq!(
            reply(&mut stream).await,
            [head.clone(), tail].concat(),
            "{call:?}"
        );
    }
}

#[tokio::test]
async fn links_and_devices_are_not_supported_and_say_so() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    let arguments = nfs3::SYMLINK3args {
        where_: entry(client.root(), "link"),
        symlink: nfs3::symlinkdata3 {
            symlink_attributes: nfs3::sattr3::default(),
            symlink_data: b"/etc/passwd"[..].into(),
        },
    };
    let status = call(
        &client,
        user(7, 7),
        NFS_PROGRAM::NFSPROC3_SYMLINK,
        &arguments,
    )
    .await
    .0;
    assert_eq!(status, Status::NFS3ERR_NOTSUPP);
    let file = client
        .create(user(7, 7), client.root(), "a", mode(0o600))
        .await
        .unwrap();
    let arguments = nfs3::LINK3args {
        file: wire_handle(&file),
        link: entry(client.root(), "b"),
    };
    let (status, rest) = call(&client, user(7, 7), NFS_PROGRAM::NFSPROC3_LINK, &arguments).await;
    assert_eq!((status, rest.0.len()), (Status::NFS3ERR_NOTSUPP, 12));
    let arguments = nfs3::READLINK3args {
        symlink: wire_handle(&file),
    };
    let status = call(
        &client,
        user(7, 7),
        NFS_PROGRAM::NFSPROC3_READLINK,
        &arguments,
    )
    .await
    .0;
    assert_eq!(status, Status::NFS3ERR_INVAL);
}

#[tokio::test]
async fn a_call_in_many_fragments_is_one_call() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let call = head(9, 100_003, 3, 0);
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    for (n, part) in call.chunks(7).enumerate() {
        let last = (n + 1) * 7 >= call.len();
        let mark = part.len() as u32 | u32::from(last) << 31;
        stream.write_all(&mark.to_be_bytes()).await.unwrap();
        stream.write_all(part).await.unwrap();
    }
    assert_eq!(reply(&mut stream).await, [9, 1, 0, 0, 0, 0]);
}

#[tokio::test]
async fn connections_beyond_the_bound_are_closed_and_places_come_free() {
    let root = tempfile::tempdir().unwrap();
    let config = Config::new("127.0.0.1:0".parse().unwrap(), root.path());
    let server = start_bounded(config, 3).await.unwrap();
    let null = record(&head(9, 100_003, 3, 0));
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut stream = send(&server, &null).await;
        assert_eq!(reply(&mut stream).await.len(), 6);
        open.push(stream);
    }
    let mut refused = send(&server, &null).await;
    assert_eq!(reply(&mut refused).await, [0; 0]);
    drop(open);
    let freed = async {
        while reply(&mut send(&server, &null).await).await.is_empty() {
            tokio::task::yield_now().await;
        }
    };
    timeout(CALL_TIMEOUT, freed)
        .await
        .expect("a place comes free");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Any bytes as the arguments of any procedure are answered, and the server goes on.
    #[test]
    fn no_arguments_make_the_server_fall(
        procedure in 0_u32..24,
        program in prop_oneof![Just(100_003_u32), Just(100_005)],
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        with_handle in any::<bool>(),
    ) {
        let (server, handle) = shared_server();
        let mut arguments = Vec::new();
        if with_handle {
            arguments.extend(words(&[handle.len() as u32]));
            arguments.extend(handle);
        }
        arguments.extend(&bytes);
        let call = [head(9, program, 3, procedure), arguments].concat();
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(server).unwrap();
        stream.set_read_timeout(Some(CALL_TIMEOUT)).unwrap();
        stream.write_all(&record(&call)).unwrap();
        let mut reply = [0; 12];
        stream.read_exact(&mut reply).unwrap();
        prop_assert_eq!(&reply[4..8], &9_u32.to_be_bytes());
    }
}

/// A server for all cases of a property, and the handle of its root.
fn shared_server() -> &'static (std::net::SocketAddr, Vec<u8>) {
    static SERVER: std::sync::OnceLock<(std::net::SocketAddr, Vec<u8>)> =
        std::sync::OnceLock::new();
    SERVER.get_or_init(|| {
        let (ready, started) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async {
                let root = tempfile::tempdir().unwrap();
                let server = serve(&root).await;
                let client = connect(&server).await;
                ready.send((server.addr, client.root().0.to_vec())).unwrap();
                std::future::pending::<()>().await;
            });
        });
        started.recv().unwrap()
    })
}
