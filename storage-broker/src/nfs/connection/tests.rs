//! The connection against a scripted server and against raw sockets.

use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::dialer::Dialer;
use crate::nfs::scripted_server::{Mood, ScriptedServer};
use crate::nfs::{Stable, mount};

const ME: Credential = Credential { uid: 1000, gid: 7 };

async fn raw_pair(timeout: Duration) -> (Connection, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let (server, _) = listener.accept().await.unwrap();
    (Connection::new(client, timeout), server)
}

const NULL: Procedure = Procedure {
    program: 100_003,
    version: 3,
    number: 0,
};

async fn null_call(connection: &Connection) -> Result<Bytes, CallError> {
    connection
        .call(NULL, ME, &nfs3_types::xdr_codec::Void)
        .await
}

/// Reads one whole call and gives its xid.
async fn read_call(server: &mut TcpStream) -> [u8; 4] {
    let length = server.read_u32().await.unwrap() & !(1 << 31);
    let mut call = vec![0; length as usize];
    server.read_exact(&mut call).await.unwrap();
    call[..4].try_into().unwrap()
}

fn reply(xid: [u8; 4], body: &[u32]) -> Vec<u8> {
    let mut message = xid.to_vec();
    body.iter()
        .for_each(|word| message.extend_from_slice(&word.to_be_bytes()));
    let header = (message.len() as u32 | 1 << 31).to_be_bytes();
    [&header[..], &message].concat()
}

#[tokio::test]
async fn replies_find_their_callers_in_any_order() {
    let (connection, mut server) = raw_pair(Duration::from_secs(5)).await;
    let calls: Vec<_> = (0..3)
        .map(|_| {
            let connection = connection.clone();
            tokio::spawn(async move { null_call(&connection).await })
        })
        .collect();
    let mut xids = Vec::new();
    for _ in 0..3 {
        xids.push(read_call(&mut server).await);
    }
    for xid in xids.into_iter().rev() {
        server
            .write_all(&reply(xid, &[1, 0, 0, 0, 0]))
            .await
            .unwrap();
    }
    for call in calls {
        assert!(call.await.unwrap().unwrap().is_empty());
    }
}

#[tokio::test]
async fn an_unanswered_call_closes_the_connection_and_all_others_become_unknown() {
    let (connection, mut server) = raw_pair(Duration::from_millis(100)).await;
    let (one, two) = tokio::join!(null_call(&connection), null_call(&connection));
    assert!(matches!(one, Err(CallError::Unknown { .. })), "{one:?}");
    assert!(matches!(two, Err(CallError::Unknown { .. })), "{two:?}");
    assert!(connection.is_closed());
    assert!(matches!(
        null_call(&connection).await,
        Err(CallError::NotSent { .. })
    ));
    // The socket is closed too, not only forgotten.
    let mut rest = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(5), server.read_to_end(&mut rest));
    read.await.expect("the socket stays open").unwrap();
}

#[tokio::test]
async fn garbage_from_the_server_ends_the_connection_and_nothing_else() {
    for garbage in [
        vec![0xff; 64],
        reply(*b"nope", &[1, 0, 0, 0, 0]),
        reply(*b"nope", &[]),
        vec![0x80, 0, 0, 2, 1, 2],
    ] {
        let (connection, mut server) = raw_pair(Duration::from_secs(5)).await;
        let serve = async {
            read_call(&mut server).await;
            server.write_all(&garbage).await.unwrap();
            server
        };
        let (result, _server) = tokio::join!(null_call(&connection), serve);
        assert!(
            matches!(result, Err(CallError::Unknown { .. })),
            "{garbage:?}: {result:?}"
        );
    }
}

#[tokio::test]
async fn a_refusal_of_the_rpc_layer_is_told_apart_from_silence() {
    let (connection, mut server) = raw_pair(Duration::from_secs(5)).await;
    let serve = async {
        let xid = read_call(&mut server).await;
        server.write_all(&reply(xid, &[1, 1, 1, 5])).await.unwrap();
        let xid = read_call(&mut server).await;
        server
            .write_all(&reply(xid, &[1, 0, 0, 0, 1]))
            .await
            .unwrap();
    };
    let calls = async { (null_call(&connection).await, null_call(&connection).await) };
    let ((denied, unavailable), ()) = tokio::join!(calls, serve);
    assert!(
        matches!(denied, Err(CallError::Denied { .. })),
        "{denied:?}"
    );
    assert!(
        matches!(unavailable, Err(CallError::Denied { .. })),
        "{unavailable:?}"
    );
    assert!(!connection.is_closed());
}

#[tokio::test]
async fn futures_dropped_in_the_middle_of_their_calls_corrupt_nothing() {
    let server = ScriptedServer::start(1 << 20, ME.gid).await;
    let client = mount(&server.url(), &Dialer::default(), Duration::from_secs(10))
        .await
        .unwrap();
    let file = client.lookup(ME, client.root(), "disk.raw").await.unwrap();
    let block = |value: u8| Bytes::from(vec![value; 16 << 10]);
    for round in 0..200u32 {
        let (client, file, data) = (client.clone(), file.clone(), block(round as u8));
        let offset = u64::from(round % 64) * (16 << 10);
        let write = async move {
            client
                .write(ME, &file, offset, &data, Stable::UNSTABLE)
                .await
        };
        // Dropped at a different point of its life each time.
        tokio::select! {
            biased;
            _ = write => {}
            () = async { for _ in 0..round % 7 { tokio::task::yield_now().await } } => {}
        }
    }
    // The stream is still in step: every later call gets its own answer.
    for index in 0..64u64 {
        let data = block(index as u8 ^ 0x5a);
        let offset = index * (16 << 10);
        client
            .write(ME, &file, offset, &data, Stable::UNSTABLE)
            .await
            .unwrap();
    }
    let mut writes_open = 1;
    while writes_open > 0 {
        tokio::task::yield_now().await;
        writes_open = server.world().open;
    }
    for index in 0..64u64 {
        let offset = index * (16 << 10);
        let data = client.read(ME, &file, offset, 16 << 10).await.unwrap().data;
        assert!(
            data.iter().all(|byte| *byte == index as u8 ^ 0x5a),
            "block {index}"
        );
    }
}

#[tokio::test]
async fn sixty_four_calls_are_in_flight_and_no_more() {
    let server = ScriptedServer::start(1 << 20, ME.gid).await;
    let client = mount(&server.url(), &Dialer::default(), Duration::from_secs(10))
        .await
        .unwrap();
    let file = client.lookup(ME, client.root(), "disk.raw").await.unwrap();
    server.mood(Mood::Stuck);
    let calls: Vec<_> = (0..100u64)
        .map(|index| {
            let (client, file) = (client.clone(), file.clone());
            tokio::spawn(async move {
                let data = Bytes::from(vec![index as u8 + 1; 512]);
                client
                    .write(ME, &file, index * 512, &data, Stable::UNSTABLE)
                    .await
            })
        })
        .collect();
    server
        .until("64 WRITEs inside the server", |world| {
            world.open == IN_FLIGHT_MAX
        })
        .await;
    assert!(client.connection().try_slot().is_none());
    server.mood(Mood::Normal);
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap().count, 512);
    }
    let world = server.world();
    assert_eq!(world.open_max, IN_FLIGHT_MAX);
    assert!((0..100).all(|index| world.volatile[index * 512] == index as u8 + 1));
}

#[tokio::test]
async fn a_dropped_callers_slot_stays_taken_until_the_server_has_answered() {
    let server = ScriptedServer::start(1 << 20, ME.gid).await;
    let client = mount(&server.url(), &Dialer::default(), Duration::from_secs(10))
        .await
        .unwrap();
    let file = client.lookup(ME, client.root(), "disk.raw").await.unwrap();
    server.mood(Mood::Stuck);
    for _ in 0..IN_FLIGHT_MAX {
        let slot = client.connection().try_slot().unwrap();
        drop(client.start_read(slot, ME, &file, 0, 512));
    }
    assert!(client.connection().try_slot().is_none());
    server.mood(Mood::Normal);
    tokio::time::timeout(Duration::from_secs(5), client.connection().slot())
        .await
        .unwrap()
        .unwrap();
}
