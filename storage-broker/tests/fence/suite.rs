//! The broker, the disks and the fence against the embedded NFS server, in clear or under TLS as `crate::TLS` says.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::common::{BROKER_UID, CLUSTER, Daemon, client_tls, file, server_tls, volume};
use bytes::Bytes;
use cluster_model::ids::Token;
use proto::broker as wire;
use storage_broker::dialer::Dialer;
use storage_broker::disk::{
    Disk, DiskSpec, DiskState, DrainError, Drained, RekeyReason, open_disk,
};
use storage_broker::fence::{DISK_MODE, UNFINISHED_MODE, claimant, data_credential};
use storage_broker::nfs::client::SetAttributes;
use storage_broker::nfs::{FileHandle, NfsClient, Stable, Status, mount};
use storage_broker::nfs_server::{Config, Server, TlsArgs, start};
use storage_broker::volume::{IDENTITY_FILE, VolumeUrl};
use tokio::sync::Semaphore;
use tonic::Code;

const MIB: u64 = 1 << 20;
const NODE_ONE: u32 = 60_001;
const NODE_TWO: u32 = 60_002;
const SOON: Duration = Duration::from_secs(20);
/// Writers of an old owner that all write when it loses its disk, each to a block of its own.
const WRITERS: u64 = 32;

/// A server that refuses everything in clear, where the suite runs under TLS.
fn config(listen: SocketAddr, root: &Path) -> Config {
    Config {
        tls: if crate::TLS {
            server_tls()
        } else {
            TlsArgs::default()
        },
        ..Config::new(listen, root)
    }
}

/// How the server's volume is written.
fn url(server: &Server) -> String {
    format!("{}{QUERY}", server.url())
}

const QUERY: &str = if crate::TLS { "?tls=require" } else { "" };

struct Storage {
    server: Option<Server>,
    address: SocketAddr,
    root: tempfile::TempDir,
    url: String,
}

impl Storage {
    async fn start() -> Storage {
        let root = tempfile::tempdir().unwrap();
        let any = "127.0.0.1:0".parse().unwrap();
        let server = start(config(any, root.path())).await.unwrap();
        Storage {
            address: server.addr,
            url: url(&server),
            server: Some(server),
            root,
        }
    }

    /// Loses its connections; comes back on the same port with another verifier.
    async fn restart(&mut self) {
        if let Some(server) = self.server.take() {
            server.shutdown().await;
        }
        let config = config(self.address, self.root.path());
        self.server = Some(start(config).await.unwrap());
    }
}

async fn scene() -> (Storage, Daemon) {
    let storage = Storage::start().await;
    let mut daemon = Daemon::start().await;
    let adopted = daemon.adopt(&storage.url).await.unwrap();
    assert_eq!(adopted.fence_class, "gid-token", "{}", adopted.report);
    assert!(adopted.settle_ms >= 1000);
    (storage, daemon)
}

async fn open(storage: &Storage, path: &str, uid: u32, token: u32) -> Arc<dyn Disk> {
    let volume: VolumeUrl = storage.url.parse().unwrap();
    let spec = DiskSpec {
        tls: client_tls(&storage.url),
        ..DiskSpec::new(volume, path.parse().unwrap(), uid, Token(token))
    };
    open_disk(&spec, &Dialer::default()).await.unwrap()
}

fn block(value: u8) -> Bytes {
    Bytes::from(vec![value; 4096])
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future)
        .await
        .unwrap_or_else(|_| panic!("never came: {what}"))
}

async fn wants_rekey(disk: &Arc<dyn Disk>) -> (RekeyReason, bool) {
    let mut watch = disk.watch();
    let wanted = watch.wait_for(|status| matches!(status.state, DiskState::NeedsRekey { .. }));
    match soon("a wish for a re-key", wanted)
        .await
        .unwrap()
        .state
        .clone()
    {
        DiskState::NeedsRekey {
            reason,
            writes_unanswered,
        } => (reason, writes_unanswered),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_embedded_server_is_certified_and_every_trial_is_reported() {
    let (storage, mut daemon) = scene().await;
    let again = daemon.adopt(&storage.url).await.unwrap();
    assert!(
        again.report.lines().count() > 10 && !again.report.contains("FAIL"),
        "{}",
        again.report
    );
    assert_eq!(again.volume_uuid, "11111111-2222");
    let left: Vec<_> = std::fs::read_dir(storage.root.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("certify"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let probe = daemon.probe(&storage.url).await;
    assert!(
        probe.reachable && probe.writable && probe.free_bytes > 0,
        "{probe:?}"
    );
    assert_eq!(probe.owner_cluster_id, CLUSTER);
}

#[tokio::test]
async fn a_server_that_lets_root_through_is_not_certified() {
    let root = tempfile::tempdir().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let config = Config {
        no_root_squash: true,
        ..config(any, root.path())
    };
    let server = start(config).await.unwrap();
    let mut daemon = Daemon::start().await;
    let adopted = daemon.adopt(&url(&server)).await.unwrap();
    assert_eq!(adopted.fence_class, "none");
    assert!(
        adopted
            .report
            .contains("FAIL root (export with root_squash)"),
        "{}",
        adopted.report
    );
}

#[tokio::test]
async fn a_disk_lives_from_creation_to_deletion() {
    let (storage, mut daemon) = scene().await;
    let url = &storage.url;
    daemon.create(url, "vms/a.raw", 4 * MIB, 3).await.unwrap();
    daemon
        .create(url, "vms/a.raw", 4 * MIB, 3)
        .await
        .expect("asked again, the same");
    let stat = daemon.stat(url, "vms/a.raw").await;
    let facts = (stat.size_bytes, stat.uid, stat.gid, stat.mode);
    assert_eq!(facts, (4 * MIB, BROKER_UID, Token(3).gid(), DISK_MODE));
    for (size, token) in [(MIB, 3), (4 * MIB, 4)] {
        let error = daemon
            .create(url, "vms/a.raw", size, token)
            .await
            .unwrap_err();
        assert_eq!(error.code(), Code::AlreadyExists, "{error}");
    }
    let claim = daemon.claim(url, "vms/a.raw", 7).await;
    assert!(claim.acknowledged, "{claim:?}");
    let stale = daemon.claim(url, "vms/a.raw", 6).await;
    assert!(
        !stale.acknowledged && stale.error.contains("newer"),
        "{stale:?}"
    );
    assert!(daemon.verify(url, "vms/a.raw", 7).await.ok);
    assert!(!daemon.verify(url, "vms/a.raw", 6).await.ok);
    let error = daemon.delete(url, "vms/a.raw", 6).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    daemon.delete(url, "vms/a.raw", 7).await.unwrap();
    daemon
        .delete(url, "vms/a.raw", 7)
        .await
        .expect("deleted already");
    assert!(!daemon.stat(url, "vms/a.raw").await.found);
    let missing = daemon.claim(url, "vms/a.raw", 8).await;
    assert!(
        !missing.acknowledged && missing.error.contains("no disk"),
        "{missing:?}"
    );
}

#[tokio::test]
async fn an_image_is_copied_in_sparsely_and_an_interrupted_copy_begins_anew() {
    let (storage, mut daemon) = scene().await;
    let image = tempfile::NamedTempFile::new().unwrap();
    let mut content = vec![0; 3_000_000];
    for (index, byte) in content.iter_mut().enumerate().skip(2_000_000) {
        *byte = (index % 251) as u8;
    }
    std::fs::write(image.path(), &content).unwrap();
    let _interrupted = unfinished(&storage, Token(1)).await;

    let request = wire::CreateDiskRequest {
        volume: Some(volume(&storage.url)),
        path: "d.raw".into(),
        size_bytes: 4 * MIB,
        token: 1,
        image: image.path().display().to_string(),
        ..Default::default()
    };
    daemon.client.create_disk(request.clone()).await.unwrap();
    daemon.client.create_disk(request).await.unwrap();
    let disk = open(&storage, "d.raw", NODE_ONE, 1).await;
    assert_eq!(disk.size_bytes(), 4 * MIB);
    let read = disk.read(0, 4 * MIB as u32).await.unwrap();
    assert!(read[..content.len()] == content);
    assert!(read[content.len()..].iter().all(|byte| *byte == 0));
}

/// What an interrupted request leaves: its own file `d.raw`, marked unfinished, with a part of it.
async fn unfinished(storage: &Storage, token: Token) -> (NfsClient, FileHandle) {
    let VolumeUrl::Nfs(url) = storage.url.parse().unwrap() else {
        panic!("not NFS")
    };
    let dialer = Dialer::default().with_tls(client_tls(&storage.url));
    let client = mount(&url, &dialer, SOON).await.unwrap();
    let attributes = SetAttributes {
        mode: Some(UNFINISHED_MODE),
        gid: Some(token.gid()),
        size_bytes: None,
    };
    let owner = claimant(BROKER_UID, token);
    let partial = client
        .create(owner, client.root(), "d.raw", attributes)
        .await
        .unwrap();
    let data = data_credential(BROKER_UID, token);
    client
        .write(data, &partial, 0, &block(0xee), Stable::UNSTABLE)
        .await
        .unwrap();
    (client, partial)
}

#[tokio::test]
async fn an_unfinished_disk_is_taken_over_by_its_machines_next_token_and_by_nobody_elses() {
    let (storage, mut daemon) = scene().await;
    let (client, partial) = unfinished(&storage, Token(3)).await;
    let asked = |since: u32| wire::CreateDiskRequest {
        volume: Some(volume(&storage.url)),
        path: "d.raw".into(),
        size_bytes: MIB,
        token: 5,
        since,
        settle_ms: 1,
        ..Default::default()
    };
    // A machine that was made after the file.
    let error = daemon.client.create_disk(asked(4)).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "{error}");
    let delete = wire::DeleteDiskRequest {
        volume: Some(volume(&storage.url)),
        path: "d.raw".into(),
        token: 5,
        since: 4,
    };
    daemon.client.delete_disk(delete).await.unwrap();
    assert!(daemon.stat(&storage.url, "d.raw").await.found);

    // Its own machine, tried again elsewhere: nothing of the first try shows or can still arrive.
    daemon.client.create_disk(asked(3)).await.unwrap();
    let late = data_credential(BROKER_UID, Token(3));
    let late = client
        .write(late, &partial, 0, &block(0xee), Stable::UNSTABLE)
        .await;
    assert!(late.is_err(), "{late:?}");
    assert!(daemon.claim(&storage.url, "d.raw", 5).await.acknowledged);
    let disk = open(&storage, "d.raw", NODE_ONE, 5).await;
    let read = disk.read(0, MIB as u32).await.unwrap();
    assert!(read.iter().all(|byte| *byte == 0));
}

#[tokio::test]
async fn a_disk_that_was_made_unreadable_behind_our_back_is_refused_for_good() {
    let (storage, mut daemon) = scene().await;
    let _unfinished = unfinished(&storage, Token(3)).await;
    assert!(daemon.claim(&storage.url, "d.raw", 4).await.acknowledged);
    let verified = daemon.verify(&storage.url, "d.raw", 4).await;
    assert!(!verified.ok && verified.refused, "{verified:?}");
    let gone = daemon.claim(&storage.url, "e.raw", 4).await;
    assert!(!gone.acknowledged && gone.refused, "{gone:?}");
    let older = daemon.claim(&storage.url, "d.raw", 2).await;
    assert!(!older.acknowledged && !older.refused, "{older:?}");
}

#[tokio::test]
async fn another_clusters_volume_and_a_wrong_export_are_refused_with_a_reason() {
    let (storage, mut daemon) = scene().await;
    let theirs = wire::Volume {
        cluster_id: "cluster-two".into(),
        ..volume(&storage.url)
    };
    let request = wire::AdoptVolumeRequest {
        volume: Some(theirs.clone()),
        volume_uuid: "x".into(),
    };
    let error = daemon.client.adopt_volume(request).await.unwrap_err();
    assert!(error.message().contains(CLUSTER), "{error}");
    let claim = wire::ClaimRequest {
        files: vec![wire::File {
            volume: Some(theirs),
            path: "d.raw".into(),
        }],
        token: 5,
    };
    let reply = daemon.client.claim(claim).await.unwrap().into_inner();
    assert!(
        !reply.acknowledged && reply.error.contains("belongs to cluster"),
        "{reply:?}"
    );

    let wrong = format!("nfs://{}/no/such/export{QUERY}", storage.address);
    let probe = daemon.probe(&wrong).await;
    assert!(
        !probe.reachable && probe.error.contains("check the"),
        "{}",
        probe.error
    );
    let not_adopted = Storage::start().await;
    let error = daemon
        .create(&not_adopted.url, "d", MIB, 1)
        .await
        .unwrap_err();
    assert!(error.message().contains("volume add"), "{error}");
    assert!(!not_adopted.root.path().join(IDENTITY_FILE).exists());
    let traversal = daemon
        .create(&storage.url, "../d", MIB, 1)
        .await
        .unwrap_err();
    assert_eq!(traversal.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn after_the_claim_the_old_owner_is_refused_and_the_new_one_reads_what_it_left() {
    let (storage, mut daemon) = scene().await;
    daemon.create(&storage.url, "d.raw", MIB, 1).await.unwrap();
    let old = open(&storage, "d.raw", NODE_ONE, 1).await;
    old.write(0, block(1)).await.unwrap();
    // The destination opens before the disk is its own, and changes nothing by it.
    let new = open(&storage, "d.raw", NODE_TWO, 2).await;
    old.write(4096, block(1)).await.unwrap();
    assert_eq!(old.drain(SOON).await, Ok(Drained));
    old.hold();
    assert!(daemon.claim(&storage.url, "d.raw", 2).await.acknowledged);
    assert_eq!(new.read(0, 4096).await.unwrap(), block(1));
    new.write(0, block(2)).await.unwrap();
    // A source that goes on without asking is refused by the server and says so.
    old.release();
    let writer = old.clone();
    let write = tokio::spawn(async move { writer.write(0, block(3)).await });
    let (reason, in_doubt) = wants_rekey(&old).await;
    assert_eq!(
        reason,
        RekeyReason::Refused {
            status: Status::NFS3ERR_ACCES
        }
    );
    assert!(!in_doubt && !write.is_finished());
    new.flush().await.unwrap();
    assert_eq!(new.read(0, 4096).await.unwrap(), block(2));
    // The machine comes back: under a token of its own it goes on where it stood.
    assert!(daemon.claim(&storage.url, "d.raw", 3).await.acknowledged);
    old.rekey(Token(3), SOON).await.unwrap();
    soon("the write", write).await.unwrap().unwrap();
    assert_eq!(old.read(0, 4096).await.unwrap(), block(3));
}

#[tokio::test]
async fn a_re_key_replays_in_order_over_a_restart_of_the_server() {
    let (mut storage, mut daemon) = scene().await;
    daemon.create(&storage.url, "d.raw", MIB, 1).await.unwrap();
    let disk = open(&storage, "d.raw", NODE_ONE, 1).await;
    for value in 1..=20 {
        disk.write(0, block(value)).await.unwrap();
        disk.write(2048, block(100 + value)).await.unwrap();
    }
    storage.restart().await;
    // What is on the server's disk of the uncommitted data is not what the guest wrote last.
    let flusher = disk.clone();
    let flush = tokio::spawn(async move { flusher.flush().await });
    let (reason, in_doubt) = wants_rekey(&disk).await;
    assert_eq!((reason, in_doubt), (RekeyReason::VerifierChanged, false));
    assert!(!flush.is_finished());
    assert!(matches!(
        disk.drain(SOON).await,
        Err(DrainError::NeedsRekey(_))
    ));
    assert_eq!(daemon.stat(&storage.url, "d.raw").await.gid, Token(1).gid());
    assert!(daemon.claim(&storage.url, "d.raw", 2).await.acknowledged);
    disk.rekey(Token(2), SOON).await.unwrap();
    soon("the flush", flush).await.unwrap().unwrap();
    let data = disk.read(0, 8192).await.unwrap();
    assert_eq!(
        (data[0], data[2047], data[2048], data[6143]),
        (20, 20, 120, 120)
    );
}

#[tokio::test]
async fn a_restart_with_everything_committed_goes_unnoticed() {
    let (mut storage, mut daemon) = scene().await;
    daemon.create(&storage.url, "d.raw", MIB, 1).await.unwrap();
    let disk = open(&storage, "d.raw", NODE_ONE, 1).await;
    disk.write(0, block(1)).await.unwrap();
    disk.flush().await.unwrap();
    storage.restart().await;
    assert_eq!(
        soon("the read", disk.read(0, 4096)).await.unwrap(),
        block(1)
    );
    soon("the write", disk.write(0, block(2))).await.unwrap();
    disk.flush().await.unwrap();
    // The broker's connection died with the server too; the claim finds that out by itself.
    assert!(daemon.claim(&storage.url, "d.raw", 2).await.acknowledged);
}

#[tokio::test]
async fn claims_of_many_files_are_all_or_refused_and_quick() {
    let (storage, mut daemon) = scene().await;
    let paths: Vec<String> = (0..16).map(|n| format!("m/d{n}.raw")).collect();
    for path in &paths {
        daemon.create(&storage.url, path, MIB, 1).await.unwrap();
    }
    let claim = |paths: &[String], token| wire::ClaimRequest {
        files: paths.iter().map(|path| file(&storage.url, path)).collect(),
        token,
    };
    let reply = daemon
        .client
        .claim(claim(&paths, 2))
        .await
        .unwrap()
        .into_inner();
    assert!(reply.acknowledged, "{reply:?}");
    println!(
        "a claim of {} files took {} µs",
        paths.len(),
        reply.duration_us
    );
    for path in &paths {
        assert_eq!(daemon.stat(&storage.url, path).await.gid, Token(2).gid());
    }
    // One file under a newer token: nothing is sent for the others either.
    assert!(daemon.claim(&storage.url, &paths[3], 9).await.acknowledged);
    let reply = daemon
        .client
        .claim(claim(&paths, 5))
        .await
        .unwrap()
        .into_inner();
    assert!(!reply.acknowledged, "{reply:?}");
    assert_eq!(
        daemon.stat(&storage.url, &paths[0]).await.gid,
        Token(2).gid()
    );
}

#[tokio::test]
async fn two_writers_under_two_tokens_never_both_write() {
    let (storage, mut daemon) = scene().await;
    daemon
        .create(&storage.url, "d.raw", 4 * MIB, 1)
        .await
        .unwrap();
    for round in 0..20u32 {
        let (old_token, new_token) = (1 + round, 2 + round);
        let old = open(&storage, "d.raw", NODE_ONE, old_token).await;
        let written = Arc::new(Semaphore::new(0));
        let writers: Vec<_> = (0..WRITERS)
            .map(|n| {
                let (old, written) = (old.clone(), written.clone());
                tokio::spawn(async move {
                    let mut first = true;
                    while old.write(n * 4096, block(0xaa)).await.is_ok() {
                        if std::mem::take(&mut first) {
                            written.add_permits(1);
                        }
                    }
                })
            })
            .collect();
        let mut dirty = old.clone().watch();
        // Each writer has been answered once and goes on.
        let turn = soon("a full turn", written.acquire_many(WRITERS as u32));
        drop(turn.await.unwrap());
        assert!(writers.iter().all(|writer| !writer.is_finished()));
        assert!(
            daemon
                .claim(&storage.url, "d.raw", new_token)
                .await
                .acknowledged
        );
        let new = open(&storage, "d.raw", NODE_TWO, new_token).await;
        for n in 0..WRITERS {
            new.write(n * 4096, block(round as u8)).await.unwrap();
        }
        let refused = dirty.wait_for(|status| matches!(status.state, DiskState::NeedsRekey { .. }));
        drop(soon("the old owner's refusal", refused).await);
        new.flush().await.unwrap();
        let data = new.read(0, WRITERS as u32 * 4096).await.unwrap();
        assert!(
            data.iter().all(|byte| *byte == round as u8),
            "round {round}: old data over new"
        );
        writers.into_iter().for_each(|writer| writer.abort());
    }
}
