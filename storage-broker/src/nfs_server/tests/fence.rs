//! The fence: who reads, writes and changes a disk, and that nothing lands late.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::nfs::NfsError;
use nfs3_types::nfs3::Nfs3Option;

const OLD: u32 = 0x4000_0001;
const NEW: u32 = 0x4000_0002;

/// A disk under the token OLD.
async fn disk(client: &NfsClient) -> FileHandle {
    let attributes = SetAttributes {
        mode: Some(0o060),
        gid: Some(OLD),
        size_bytes: Some(1 << 20),
    };
    client
        .create(user(BROKER, OLD), client.root(), "disk", attributes)
        .await
        .unwrap()
}

async fn write(client: &NfsClient, as_whom: Credential, file: &FileHandle) -> Option<Status> {
    let data = Bytes::from_static(b"data");
    let result = client
        .write(as_whom, file, 0, &data, Stable::UNSTABLE)
        .await;
    result.err().map(|error| error.status().expect("an answer"))
}

#[tokio::test]
async fn a_disk_obeys_its_token_as_on_servers_that_are_not_ours() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    let file = disk(&client).await;
    let refused = |result: Result<_, NfsError>| result.err().and_then(|error| error.status());
    let (acces, perm) = (Some(Status::NFS3ERR_ACCES), Some(Status::NFS3ERR_PERM));
    assert_eq!(write(&client, user(NODE, OLD), &file).await, None);
    assert_eq!(write(&client, user(NODE, NEW), &file).await, acces);
    assert_eq!(write(&client, user(BROKER, OLD), &file).await, acces);

    let unasserted = client.setattr(user(BROKER, OLD), &file, group(NEW)).await;
    assert_eq!(refused(unasserted), perm);
    client
        .setattr(user(BROKER, NEW), &file, group(NEW))
        .await
        .unwrap();
    assert_eq!(write(&client, user(NODE, OLD), &file).await, acces);
    assert_eq!(write(&client, user(NODE, NEW), &file).await, None);
    assert_eq!(
        refused(client.commit(user(NODE, OLD), &file).await.map(|_| ())),
        acces
    );
    assert_eq!(
        refused(client.read(user(NODE, OLD), &file, 0, 9).await.map(|_| ())),
        acces
    );
    client.getattr(user(NODE, OLD), &file).await.unwrap();

    for whom in [user(NODE, NEW), user(NODE, OLD), user(0, 0), user(0, NEW)] {
        assert_eq!(refused(client.setattr(whom, &file, group(OLD)).await), perm);
        assert_eq!(
            refused(client.setattr(whom, &file, mode(0o666)).await),
            perm
        );
    }
    assert_eq!(write(&client, user(0, 0), &file).await, acces);
    let granted = client.access(user(NODE, NEW), &file, 0x3f).await.unwrap();
    assert_eq!(
        granted,
        nfs3::ACCESS3_READ | nfs3::ACCESS3_MODIFY | nfs3::ACCESS3_EXTEND
    );
    assert_eq!(
        client.access(user(NODE, OLD), &file, 0x3f).await.unwrap(),
        0
    );
}

#[tokio::test]
async fn root_is_root_only_when_it_is_not_squashed() {
    let root = tempfile::tempdir().unwrap();
    let mut config = Config::new("127.0.0.1:0".parse().unwrap(), root.path());
    config.no_root_squash = true;
    let server = start(config).await.unwrap();
    let client = connect(&server).await;
    let file = disk(&client).await;
    assert_eq!(write(&client, user(0, 0), &file).await, None);
    client.setattr(user(0, 0), &file, group(NEW)).await.unwrap();
    assert_eq!(client.getattr(user(0, 0), &file).await.unwrap().gid, NEW);
}

#[tokio::test]
async fn a_guarded_change_happens_only_if_nothing_changed_before_it() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    let file = disk(&client).await;
    let broker = user(BROKER, NEW);
    let changed_at = || async {
        let arguments = nfs3::GETATTR3args {
            object: wire_handle(&file),
        };
        let (_, mut reply) = call(&client, broker, NFS_PROGRAM::NFSPROC3_GETATTR, &arguments).await;
        reply.fixed::<nfs3::fattr3>().unwrap().ctime
    };
    let guarded = |guard, gid| {
        let client = &client;
        let arguments = nfs3::SETATTR3args {
            object: wire_handle(&file),
            new_attributes: nfs3::sattr3 {
                gid: Nfs3Option::Some(gid),
                ..nfs3::sattr3::default()
            },
            guard: Nfs3Option::Some(guard),
        };
        async move {
            call(
                client,
                user(BROKER, gid),
                NFS_PROGRAM::NFSPROC3_SETATTR,
                &arguments,
            )
            .await
            .0
        }
    };
    let seen = changed_at().await;
    assert_eq!(guarded(seen, NEW).await, Status::NFS3_OK);
    assert_eq!(guarded(seen, OLD).await, Status::NFS3ERR_NOT_SYNC);
    assert_ne!(changed_at().await, seen);

    let seen = changed_at().await;
    let racing = (0..16).map(|n| guarded(seen, OLD + n));
    let won = futures::future::join_all(racing).await;
    assert_eq!(
        won.iter()
            .filter(|status| **status == Status::NFS3_OK)
            .count(),
        1,
        "{won:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_write_under_an_old_token_lands_after_the_swap_is_answered() {
    swap_under_flood(tempfile::tempdir().unwrap(), 200).await;
}

/// Where syncs cost nothing a swap is so fast that writes of before are still about: without the
/// gate one round in some hundred goes wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_write_lands_late_where_a_swap_is_as_fast_as_memory() {
    match tempfile::tempdir_in("/dev/shm") {
        Ok(root) => swap_under_flood(root, 500).await,
        Err(error) => proto::skip!("the flood in memory", "no /dev/shm: {error}"),
    }
}

/// Swaps the token while its old holder writes as fast as it can; after each swap the new holder
/// writes one block, and once the flood has ended the block must still be the new one's.
async fn swap_under_flood(root: TempDir, rounds: u32) {
    const CONNECTIONS: usize = 4;
    const OUTSTANDING: usize = 8;
    const BLOCK: usize = 64 << 10;
    let server = serve(&root).await;
    let client = connect(&server).await;
    let file = disk(&client).await;
    let mut flooders = Vec::new();
    for _ in 0..CONNECTIONS {
        flooders.push(connect(&server).await);
    }
    let (mut refused_in_all, mut late) = (0, 0);
    for round in 0..rounds {
        let (old, new) = (OLD + round, OLD + round + 1);
        let stop = Arc::new(AtomicBool::new(false));
        let first = Arc::new(tokio::sync::Semaphore::new(0));
        let mut flood = Vec::new();
        for flooder in &flooders {
            for _ in 0..OUTSTANDING {
                let (flooder, file) = (flooder.clone(), file.clone());
                let (stop, first) = (stop.clone(), first.clone());
                flood.push(tokio::spawn(async move {
                    let data = Bytes::from(vec![0xaa; BLOCK]);
                    let mut refused = 0;
                    while !stop.load(Ordering::SeqCst) {
                        let holder = user(NODE, old);
                        match flooder
                            .write(holder, &file, 0, &data, Stable::UNSTABLE)
                            .await
                        {
                            Ok(_) => first.add_permits(1),
                            Err(error) => {
                                assert_eq!(error.status(), Some(Status::NFS3ERR_ACCES));
                                refused += 1;
                            }
                        }
                    }
                    refused
                }));
            }
        }
        // The swap comes at another point of the flood in each round.
        let _ = first
            .acquire_many(CONNECTIONS as u32 * OUTSTANDING as u32 + round % 7)
            .await
            .unwrap();
        client
            .setattr(user(BROKER, new), &file, group(new))
            .await
            .unwrap();
        let data = Bytes::from(vec![round as u8 % 0x80; BLOCK]);
        client
            .write(user(NODE, new), &file, 0, &data, Stable::UNSTABLE)
            .await
            .unwrap();
        stop.store(true, Ordering::SeqCst);
        for task in flood {
            refused_in_all += task.await.unwrap();
        }
        let read = client
            .read(user(NODE, new), &file, 0, BLOCK as u32)
            .await
            .unwrap();
        late += u32::from(read.data != data);
    }
    assert_eq!(late, 0, "late landings in {rounds} rounds");
    assert!(
        refused_in_all > rounds,
        "the flood went on after the swaps: {refused_in_all}"
    );
}
