//! Disks against a scripted server: what the guest sees, and what reaches the file.

use std::future::Future;
use std::time::Duration;

use nfs3_types::nfs3::{NFS_PROGRAM, nfsstat3};

use super::*;
use crate::nfs::scripted_server::{DISK, Mood, ScriptedServer};

const SIZE: usize = 1 << 20;
const FIRST: Token = Token(5);
const SECOND: Token = Token(6);
const SOON: Duration = Duration::from_secs(10);

async fn server() -> ScriptedServer {
    ScriptedServer::start(SIZE, FIRST.gid()).await
}

async fn disk(server: &ScriptedServer) -> Arc<dyn Disk> {
    disk_with_timeout(server, CALL_TIMEOUT).await
}

async fn disk_with_timeout(server: &ScriptedServer, call_timeout: Duration) -> Arc<dyn Disk> {
    let volume = VolumeUrl::Nfs(server.url());
    let spec = DiskSpec::new(volume, DISK.parse().unwrap(), 1000, FIRST);
    open_disk(
        &DiskSpec {
            call_timeout,
            ..spec
        },
        &Dialer::default(),
    )
    .await
    .unwrap()
}

fn block(value: u8) -> Bytes {
    Bytes::from(vec![value; 4096])
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future)
        .await
        .unwrap_or_else(|_| panic!("never came: {what}"))
}

async fn state(disk: &Arc<dyn Disk>, what: &str, wanted: impl Fn(&DiskState) -> bool) -> DiskState {
    let mut watch = disk.watch();
    let status = soon(what, watch.wait_for(|status| wanted(&status.state)))
        .await
        .unwrap();
    status.state.clone()
}

fn spawn_write(
    disk: &Arc<dyn Disk>,
    offset: u64,
    value: u8,
) -> tokio::task::JoinHandle<Result<(), DiskError>> {
    let disk = disk.clone();
    tokio::spawn(async move { disk.write(offset, block(value)).await })
}

/// Waits until a held disk has requests that pend: then a drain is told that it is held.
async fn until_pending(disk: &Arc<dyn Disk>) {
    let pending = async {
        while disk.drain(SOON).await != Err(DrainError::Held) {
            tokio::task::yield_now().await;
        }
    };
    soon("a pending request", pending).await;
}

#[tokio::test]
async fn what_is_written_is_read_back_and_a_flush_makes_it_durable() {
    let server = server().await;
    let disk = disk(&server).await;
    assert_eq!(disk.size_bytes(), SIZE as u64);
    // Larger than one READ or WRITE of this server.
    let data: Bytes = (0..200_000u32).map(|index| (index % 251) as u8).collect();
    disk.write(100, data.clone()).await.unwrap();
    assert_eq!(disk.read(100, 200_000).await.unwrap(), data);
    assert_ne!(&server.world().durable[100..200_100], &data[..]);
    disk.flush().await.unwrap();
    assert_eq!(&server.world().durable[100..200_100], &data[..]);
    let statistics = disk.statistics();
    assert_eq!(
        (statistics.read_bytes, statistics.written_bytes),
        (200_000, 200_000)
    );
    assert!(statistics.write_latency_p999 > Duration::ZERO);
}

#[tokio::test]
async fn a_request_beyond_the_end_is_refused() {
    let server = server().await;
    let disk = disk(&server).await;
    for (offset, length) in [(SIZE as u64, 1), (SIZE as u64 - 1, 2), (u64::MAX, 2)] {
        assert!(matches!(
            disk.read(offset, length).await,
            Err(DiskError::OutOfRange { .. })
        ));
    }
    let error = disk.write(SIZE as u64 - 1, block(1)).await;
    assert!(matches!(error, Err(DiskError::OutOfRange { .. })));
}

#[tokio::test]
async fn a_held_disk_sends_nothing_and_goes_on_when_released() {
    let server = server().await;
    let disk = disk(&server).await;
    disk.hold();
    let write = spawn_write(&disk, 0, 1);
    let reader = disk.clone();
    let read = tokio::spawn(async move { reader.read(8192, 512).await });
    until_pending(&disk).await;
    assert!(server.seen(NFS_PROGRAM::NFSPROC3_WRITE).is_empty());
    assert!(server.seen(NFS_PROGRAM::NFSPROC3_READ).is_empty());
    disk.release();
    soon("the write", write).await.unwrap().unwrap();
    soon("the read", read).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_refused_token_pends_the_guests_write_until_a_re_key() {
    let server = server().await;
    let disk = disk(&server).await;
    server.world().gid = SECOND.gid();
    let write = spawn_write(&disk, 0, 7);
    let state = state(&disk, "needs-rekey", |s| {
        matches!(s, DiskState::NeedsRekey { .. })
    })
    .await;
    let refused = RekeyReason::Refused {
        status: nfsstat3::NFS3ERR_ACCES,
    };
    assert_eq!(
        state,
        DiskState::NeedsRekey {
            reason: refused,
            writes_unanswered: false
        }
    );
    assert!(!write.is_finished(), "the guest sees latency, not an error");
    assert!(matches!(
        disk.drain(SOON).await,
        Err(DrainError::NeedsRekey(_))
    ));
    let same = disk.rekey(FIRST, SOON).await;
    assert!(matches!(same, Err(RekeyError::NotFresh { .. })), "{same:?}");
    disk.rekey(SECOND, SOON).await.unwrap();
    soon("the write", write).await.unwrap().unwrap();
    assert_eq!(disk.watch().borrow().token, SECOND);
    assert_eq!(server.world().volatile[..4096], block(7)[..]);
    // Asked again, because the first answer may have been lost.
    disk.rekey(SECOND, SOON).await.unwrap();
    let older = disk.rekey(FIRST, SOON).await;
    assert!(
        matches!(older, Err(RekeyError::NotFresh { .. })),
        "{older:?}"
    );
}

#[tokio::test]
async fn a_refused_re_key_says_so_and_the_next_one_loses_nothing() {
    let server = server().await;
    let disk = disk(&server).await;
    let third = Token(9);
    server.world().gid = third.gid();
    let write = spawn_write(&disk, 0, 7);
    state(&disk, "needs-rekey", |s| {
        matches!(s, DiskState::NeedsRekey { .. })
    })
    .await;
    let again = disk.rekey(SECOND, SOON).await;
    assert!(
        matches!(again, Err(RekeyError::Again { token: SECOND, .. })),
        "{again:?}"
    );
    disk.rekey(third, SOON).await.unwrap();
    soon("the write", write).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_connection_lost_with_nothing_in_doubt_is_made_again_unseen() {
    let server = server().await;
    let disk = disk(&server).await;
    disk.write(0, block(1)).await.unwrap();
    disk.flush().await.unwrap();
    server.cut();
    assert_eq!(
        soon("the read", disk.read(0, 4096)).await.unwrap(),
        block(1)
    );
    assert!(server.world().connections >= 2);
    state(&disk, "ready", |s| *s == DiskState::Ready).await;
}

#[tokio::test]
async fn a_read_lost_with_its_connection_is_asked_again() {
    let server = server().await;
    let disk = disk(&server).await;
    server.mood(Mood::Stuck);
    let reader = disk.clone();
    let read = tokio::spawn(async move { reader.read(0, 4096).await });
    server
        .until("the READ inside the server", |world| world.open == 1)
        .await;
    server.cut();
    server.mood(Mood::Normal);
    soon("the read", read).await.unwrap().unwrap();
}

#[tokio::test]
async fn writes_lost_with_their_connection_are_in_doubt_and_sent_again_only_under_a_fresh_token() {
    let server = server().await;
    let disk = disk(&server).await;
    server.mood(Mood::Stuck);
    let writes: Vec<_> = (0..4)
        .map(|n| spawn_write(&disk, n * 4096, n as u8 + 1))
        .collect();
    server
        .until("four WRITEs inside the server", |world| world.open == 4)
        .await;
    assert!(disk.writes_unanswered());
    disk.hold();
    server.cut();
    let state = state(&disk, "needs-rekey", |s| {
        matches!(s, DiskState::NeedsRekey { .. })
    })
    .await;
    assert!(
        matches!(
            state,
            DiskState::NeedsRekey {
                reason: RekeyReason::ConnectionLost { .. },
                writes_unanswered: true
            }
        ),
        "{state:?}"
    );
    // The claim: from here on what is stuck in the server carries a dead token.
    server.world().gid = SECOND.gid();
    server.mood(Mood::Normal);
    // The replay goes on although the disk is still held.
    disk.rekey(SECOND, SOON).await.unwrap();
    assert!(!disk.writes_unanswered());
    for write in writes {
        soon("the write", write).await.unwrap().unwrap();
    }
    assert!(
        server
            .seen(NFS_PROGRAM::NFSPROC3_WRITE)
            .iter()
            .all(|seen| seen.gid == SECOND.gid())
    );
    for n in 0..4usize {
        assert_eq!(server.world().volatile[n * 4096], n as u8 + 1);
    }
}

#[tokio::test]
async fn an_unanswered_write_gives_the_connection_up_after_its_timeout() {
    let server = server().await;
    let disk = disk_with_timeout(&server, Duration::from_millis(200)).await;
    server.mood(Mood::Mute);
    let write = spawn_write(&disk, 0, 1);
    let state = state(&disk, "needs-rekey", |s| {
        matches!(s, DiskState::NeedsRekey { .. })
    })
    .await;
    assert!(
        matches!(
            state,
            DiskState::NeedsRekey {
                writes_unanswered: true,
                ..
            }
        ),
        "{state:?}"
    );
    server.mood(Mood::Normal);
    server.world().gid = SECOND.gid();
    disk.rekey(SECOND, SOON).await.unwrap();
    soon("the write", write).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_server_restart_loses_no_acknowledged_write_and_keeps_their_order() {
    let server = server().await;
    server.world().scramble = true;
    let disk = disk(&server).await;
    disk.write(0, block(1)).await.unwrap();
    disk.flush().await.unwrap();
    // Acknowledged, not committed, over each other: the last must stand.
    for value in 2..8 {
        disk.write(0, block(value)).await.unwrap();
        disk.write(2048, block(value + 100)).await.unwrap();
    }
    server.restart();
    assert_eq!(server.world().volatile[0], 1, "the server forgot");
    // A read must not show the forgotten state: it waits for the re-key and the replay.
    let reader = disk.clone();
    let read = tokio::spawn(async move { reader.read(0, 8192).await });
    let state = state(&disk, "needs-rekey", |s| {
        matches!(s, DiskState::NeedsRekey { .. })
    })
    .await;
    let changed = RekeyReason::VerifierChanged;
    assert_eq!(
        state,
        DiskState::NeedsRekey {
            reason: changed,
            writes_unanswered: false
        }
    );
    server.world().gid = SECOND.gid();
    disk.rekey(SECOND, SOON).await.unwrap();
    let data = soon("the read", read).await.unwrap().unwrap();
    assert_eq!((data[0], data[2048], data[6143]), (7, 107, 107));
    disk.flush().await.unwrap();
    assert_eq!(server.world().durable[0], 7);
    assert_eq!(server.world().durable[2048], 107);
}

#[tokio::test]
async fn a_flush_across_a_restart_waits_for_the_replay_and_never_lies() {
    let server = server().await;
    let disk = disk(&server).await;
    disk.write(0, block(3)).await.unwrap();
    server.restart();
    let flusher = disk.clone();
    let flush = tokio::spawn(async move { flusher.flush().await });
    state(&disk, "needs-rekey", |s| {
        matches!(s, DiskState::NeedsRekey { .. })
    })
    .await;
    assert!(!flush.is_finished());
    server.world().gid = SECOND.gid();
    disk.rekey(SECOND, SOON).await.unwrap();
    soon("the flush", flush).await.unwrap().unwrap();
    assert_eq!(server.world().durable[..4096], block(3)[..]);
}

#[tokio::test]
async fn a_full_volume_pends_the_write_tells_it_and_goes_on_by_itself() {
    let server = server().await;
    let disk = disk(&server).await;
    server.mood(Mood::Refuse(nfsstat3::NFS3ERR_NOSPC));
    let write = spawn_write(&disk, 0, 1);
    let state = state(&disk, "stalled", |s| matches!(s, DiskState::Stalled { .. })).await;
    let DiskState::Stalled { reason } = state else {
        unreachable!("waited for it")
    };
    assert!(
        reason.contains("full") && reason.contains("free space"),
        "{reason}"
    );
    assert!(!write.is_finished());
    server.mood(Mood::Normal);
    soon("the write", write).await.unwrap().unwrap();
    self::state(&disk, "ready", |s| *s == DiskState::Ready).await;
}

#[tokio::test]
async fn a_server_that_says_later_is_asked_again_without_a_word() {
    let server = server().await;
    let disk = disk(&server).await;
    server.mood(Mood::Refuse(nfsstat3::NFS3ERR_JUKEBOX));
    let write = spawn_write(&disk, 0, 1);
    let mut watch = disk.watch();
    let told = tokio::time::timeout(Duration::from_millis(300), watch.changed()).await;
    assert!(told.is_err(), "{:?}", watch.borrow());
    server.mood(Mood::Normal);
    soon("the write", write).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_drain_waits_for_every_reply_and_commits() {
    let server = server().await;
    let disk = disk(&server).await;
    server.mood(Mood::Stuck);
    let write = spawn_write(&disk, 0, 9);
    server
        .until("the WRITE inside the server", |world| world.open == 1)
        .await;
    let late = disk.drain(Duration::from_millis(50)).await;
    assert!(matches!(late, Err(DrainError::TimedOut(_))), "{late:?}");
    server.mood(Mood::Normal);
    assert_eq!(disk.drain(SOON).await, Ok(Drained));
    assert!(write.is_finished() || soon("the write", write).await.is_ok());
    assert_eq!(server.world().durable[0], 9);
    assert!(!disk.writes_unanswered());
    disk.hold();
    assert_eq!(
        disk.drain(SOON).await,
        Ok(Drained),
        "held and nothing left: quiet"
    );
}

#[tokio::test]
async fn dropping_a_write_future_does_not_take_the_write_back() {
    let server = server().await;
    let disk = disk(&server).await;
    server.mood(Mood::Stuck);
    let write = spawn_write(&disk, 0, 4);
    server
        .until("the WRITE inside the server", |world| world.open == 1)
        .await;
    write.abort();
    server.mood(Mood::Normal);
    assert_eq!(disk.drain(SOON).await, Ok(Drained));
    assert_eq!(server.world().durable[..4096], block(4)[..]);
}

#[tokio::test]
async fn more_than_the_bound_of_uncommitted_data_commits_by_itself() {
    let server = ScriptedServer::start(8 << 20, FIRST.gid()).await;
    server.world().write_bytes_max = 1 << 20;
    let disk = disk(&server).await;
    let data = Bytes::from(vec![1; 4 << 20]);
    for round in 0..20 {
        soon("a write", disk.write((round % 2) * (4 << 20), data.clone()))
            .await
            .unwrap();
    }
    assert!(!server.seen(NFS_PROGRAM::NFSPROC3_COMMIT).is_empty());
}

#[tokio::test]
async fn a_disk_that_is_not_there_is_an_error_that_says_so() {
    let server = server().await;
    let volume = VolumeUrl::Nfs(server.url());
    let spec = DiskSpec::new(volume, "other.raw".parse().unwrap(), 1000, FIRST);
    let error = open_disk(&spec, &Dialer::default()).await.unwrap_err();
    assert!(error.to_string().contains("no disk `other.raw`"), "{error}");
}

#[tokio::test]
async fn a_disk_in_a_directory_reads_writes_holds_and_drains() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("d.raw"), vec![0; 8192]).unwrap();
    let volume = VolumeUrl::Dir(directory.path().to_owned());
    let spec = DiskSpec::new(volume, "d.raw".parse().unwrap(), 1000, FIRST);
    let disk = open_disk(&spec, &Dialer::default()).await.unwrap();
    disk.write(4096, block(3)).await.unwrap();
    disk.flush().await.unwrap();
    assert_eq!(disk.read(4096, 4096).await.unwrap(), block(3));
    assert!(matches!(
        disk.write(4097, block(1)).await,
        Err(DiskError::OutOfRange { .. })
    ));
    disk.hold();
    let write = spawn_write(&disk, 0, 5);
    until_pending(&disk).await;
    disk.release();
    soon("the write", write).await.unwrap().unwrap();
    assert_eq!(disk.drain(SOON).await, Ok(Drained));
    assert_eq!(std::fs::read(directory.path().join("d.raw")).unwrap()[0], 5);
    disk.rekey(SECOND, SOON).await.unwrap();
    assert!(matches!(
        disk.rekey(FIRST, SOON).await,
        Err(RekeyError::NotFresh { .. })
    ));
}

#[tokio::test]
async fn a_link_in_a_directory_volume_leads_nowhere_outside() {
    let directory = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/etc/hostname", directory.path().join("d.raw")).unwrap();
    let volume = VolumeUrl::Dir(directory.path().to_owned());
    let spec = DiskSpec::new(volume, "d.raw".parse().unwrap(), 1000, FIRST);
    assert!(open_disk(&spec, &Dialer::default()).await.is_err());
}
