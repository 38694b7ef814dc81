//! What storage servers answer to the NFS client, the portmapper and MOUNT among them.
//!
//! ```text
//!  first byte   0, 1    the portmapper's, MOUNT's answer: one stream
//!               else    pairs of a call that is made and the answer that it gets
//! ```

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use storage_broker::fuzzing::{ask_mount, ask_portmapper, client, file_handle};
use storage_broker::nfs::client::SetAttributes;
use storage_broker::nfs::{Credential, NfsClient, NfsError, Stable};
use storage_broker::volume::NfsUrl;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use crate::input::{Input, field};
use crate::runtime::block_on_alone;
use crate::socket::{pair, read_record, write_record};
use crate::target::{MemoryBound, Target};

/// The target.
pub const TARGET: Target = Target {
    name: "nfs_reply",
    run,
    seeds,
    input_bytes_max: 4096,
    // The client makes room for a whole reply (1 MiB and a header) as soon as one that long is announced, and
    // grows its buffer by doubling.
    memory: MemoryBound {
        base: 6 << 20,
        each: 64,
    },
};

/// Longer than an input takes: every call is answered, or its connection closed.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
const CALLS_MAX: usize = 16;
const CALLER: Credential = Credential {
    uid: 60_001,
    gid: 7,
};

fn run(data: &[u8]) {
    let mut input = Input(data);
    match input.u8() {
        0 => service(input, true),
        1 => service(input, false),
        _ => calls(input),
    }
}

/// One call to a service, answered by its xid and whatever stands in the input.
fn service(input: Input<'_>, portmapper: bool) {
    block_on_alone(async {
        let Ok((stream, mut server)) = pair() else {
            return;
        };
        let url = NfsUrl {
            host: "server".into(),
            port: None,
            mount_port: None,
            export: "/export".into(),
            tls: None,
            root: None,
        };
        let answer = async move {
            let xid = xid(&mut server).await?;
            write_record(&mut server, &[&xid[..], input.0].concat(), 1)
                .await
                .ok()
        };
        let ask = async {
            if portmapper {
                ask_portmapper(stream, &url, CALL_TIMEOUT).await.is_ok()
            } else {
                ask_mount(stream, &url, CALL_TIMEOUT).await.is_ok()
            }
        };
        let _ = tokio::join!(answer, ask);
    });
}

async fn xid(server: &mut UnixStream) -> Option<[u8; 4]> {
    let call = read_record(server).await.ok()?;
    call.first_chunk().copied()
}

/// How one call is answered.
struct Answer<'a> {
    shape: u8,
    bytes: &'a [u8],
}

fn calls(mut input: Input<'_>) {
    let (mut calls, mut answers) = (Vec::new(), VecDeque::new());
    while !input.is_empty() && calls.len() < CALLS_MAX {
        calls.push(input.u8());
        let shape = input.u8();
        let bytes = input.field();
        answers.push_back(Answer { shape, bytes });
    }
    block_on_alone(async {
        let Ok((stream, server)) = pair() else {
            return;
        };
        let client = client(stream, CALL_TIMEOUT, file_handle(b"root"));
        let ask = async {
            for procedure in calls {
                let answered = call(&client, procedure).await;
                if client.connection().is_closed() {
                    break;
                }
                drop(answered);
            }
            client.connection().close("the input has ended");
        };
        tokio::join!(ask, serve(server, answers));
    });
}

/// Answers in the answers' order, then closes.
async fn serve(mut server: UnixStream, mut answers: VecDeque<Answer<'_>>) {
    while let Some(xid) = xid(&mut server).await {
        let Some(Answer { shape, bytes }) = answers.pop_front() else {
            return;
        };
        // Accepted and successful; without more for a shape of 0.
        let accepted = [0, 0, 0, 1].into_iter().chain([0; 16]).collect::<Vec<u8>>();
        let record = match shape & 3 {
            0 => [&xid[..], &accepted, &[0; 4], bytes].concat(),
            1 => [&xid[..], &accepted, bytes].concat(),
            2 => [&xid[..], bytes].concat(),
            _ => {
                let _ = server.write_all(bytes).await;
                return;
            }
        };
        let fragments = usize::from(shape >> 2) + 1;
        if write_record(&mut server, &record, fragments).await.is_err() {
            return;
        }
    }
}

async fn call(client: &NfsClient, procedure: u8) -> Result<(), NfsError> {
    let file = client.root().clone();
    let data = Bytes::from_static(&[7; 512]);
    match procedure % 13 {
        0 => client.null().await,
        1 => client.getattr(CALLER, &file).await.map(drop),
        2 => {
            client
                .setattr(CALLER, &file, SetAttributes::default())
                .await
        }
        3 => client.lookup(CALLER, &file, "name").await.map(drop),
        4 => client.access(CALLER, &file, 0x3f).await.map(drop),
        5 => {
            let attributes = SetAttributes::default();
            client
                .create(CALLER, &file, "name", attributes)
                .await
                .map(drop)
        }
        6 => client.mkdir(CALLER, &file, "name", 0o755).await.map(drop),
        7 => client.remove(CALLER, &file, "name").await,
        8 => client.fsstat(CALLER).await.map(drop),
        9 => client.fsinfo(CALLER).await.map(drop),
        10 => {
            let read = client.read(CALLER, &file, 0, 512).await?;
            assert!(read.data.len() <= 512, "more than was asked for");
            Ok(())
        }
        11 => {
            let written = client
                .write(CALLER, &file, 0, &data, Stable::UNSTABLE)
                .await?;
            assert!((1..=512).contains(&written.count), "more than was sent");
            Ok(())
        }
        _ => client.commit(CALLER, &file).await.map(drop),
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn seeds() -> Vec<Vec<u8>> {
    let attributes = |kind: u32| {
        [
            vec![kind, 0o644, 1, 60_000, 7, 0, 4096, 0, 4096],
            vec![0; 12],
        ]
        .concat()
    };
    let with_attributes = |rest: &[u32]| words(&[&[1][..], &attributes(1), rest].concat());
    let handle = [8, 0x0101_0101, 0x0202_0202];
    let weak = [0, 0];
    let answers: Vec<(u8, Vec<u8>)> = vec![
        (0, Vec::new()),
        (1, words(&attributes(2))),
        (2, words(&weak)),
        (3, words(&[&handle[..], &[0, 0]].concat())),
        (4, with_attributes(&[0x3f])),
        (5, words(&[&[1][..], &handle, &[0], &weak].concat())),
        (5, words(&[&[0, 0][..], &weak].concat())),
        (3, words(&[&handle[..], &[0, 0]].concat())),
        (7, words(&weak)),
        (
            8,
            words(&[&[0][..], &[0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 3]].concat()),
        ),
        (
            9,
            words(&[
                0,
                1 << 20,
                1 << 20,
                4096,
                1 << 20,
                1 << 20,
                4096,
                4096,
                1,
                0,
                0,
                1,
                0x1b,
            ]),
        ),
        (
            10,
            [with_attributes(&[5, 1, 5]), b"hello\0\0\0".to_vec()].concat(),
        ),
        (11, words(&[0, 0, 512, 2, 1, 2])),
        (12, words(&[0, 0, 1, 2])),
    ];
    let calls = |answers: &[(u8, Vec<u8>)], shape: u8| {
        let mut seed = vec![2];
        for (call, answer) in answers {
            seed.extend([*call, shape]);
            seed.extend(field(answer));
        }
        seed
    };
    let refused = [vec![2, 1, 1], field(&words(&[13]))].concat();
    let denied = [vec![2, 1, 2], field(&words(&[1, 1, 1, 5]))].concat();
    let mounted = words(&[1, 0, 0, 0, 0, 0, 8, 1, 2, 1, 1]);
    vec![
        calls(&answers, 0),
        calls(&answers[..5], 4),
        refused,
        denied,
        [vec![0], words(&[1, 0, 0, 0, 0, 2049])].concat(),
        [vec![1], mounted].concat(),
        [vec![1], words(&[1, 0, 0, 0, 0, 13])].concat(),
        [vec![2, 1, 3], field(&words(&[0x8000_0010, 1]))].concat(),
    ]
}
