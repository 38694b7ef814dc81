//! Disks as monitors use them, over takeovers and crashes of the server.

use std::sync::Arc;
use std::time::Duration;

use cluster_model::ids::Token;
use storage_broker::dialer::Dialer;
use storage_broker::disk::{Disk, DiskSpec, DiskState, Drained, RekeyReason, open_disk};
use storage_broker::nfs::Status;

use super::common::Daemon;
use super::server::{Ganesha, with_ganesha};
use super::{NODE, block};

const MIB: u64 = 1 << 20;
const OTHER_NODE: u32 = NODE + 1;
const SOON: Duration = Duration::from_secs(60);

async fn scene(ganesha: &Ganesha) -> Daemon {
    let mut daemon = Daemon::start().await;
    let url = ganesha.url();
    daemon.adopt(&url).await.unwrap();
    daemon.create(&url, "vms/d.raw", 4 * MIB, 1).await.unwrap();
    daemon
}

async fn open(ganesha: &Ganesha, uid: u32, token: u32) -> Arc<dyn Disk> {
    let (volume, path) = (ganesha.url().parse().unwrap(), "vms/d.raw".parse().unwrap());
    let spec = DiskSpec::new(volume, path, uid, Token(token));
    open_disk(&spec, &Dialer::default()).await.unwrap()
}

async fn wants_rekey(disk: &Arc<dyn Disk>) -> RekeyReason {
    let mut watch = disk.watch();
    let wanted = watch.wait_for(|status| matches!(status.state, DiskState::NeedsRekey { .. }));
    let status = soon("a wish for a re-key", wanted).await.unwrap();
    match &status.state {
        DiskState::NeedsRekey { reason, .. } => reason.clone(),
        other => panic!("{other:?}"),
    }
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future)
        .await
        .unwrap_or_else(|_| panic!("never came: {what}"))
}

#[test]
fn a_disk_passes_from_node_to_node_and_back() {
    with_ganesha(
        "a_disk_passes_from_node_to_node_and_back",
        async |ganesha| {
            let mut daemon = scene(ganesha).await;
            let url = ganesha.url();
            let old = open(ganesha, NODE, 1).await;
            assert_eq!(old.size_bytes(), 4 * MIB);
            old.write(0, block(1, 4096)).await.unwrap();
            let new = open(ganesha, OTHER_NODE, 2).await;
            assert_eq!(old.drain(SOON).await, Ok(Drained));
            old.hold();
            let claim = daemon.claim(&url, "vms/d.raw", 2).await;
            assert!(claim.acknowledged, "{claim:?}");
            assert_eq!(new.read(0, 4096).await.unwrap(), block(1, 4096));
            new.write(0, block(2, 4096)).await.unwrap();
            new.flush().await.unwrap();

            // A source that goes on without asking is refused and keeps what it could not write.
            old.release();
            let writer = old.clone();
            let write = tokio::spawn(async move { writer.write(0, block(3, 4096)).await });
            let refused = RekeyReason::Refused {
                status: Status::NFS3ERR_ACCES,
            };
            assert_eq!(wants_rekey(&old).await, refused);
            assert!(!write.is_finished());
            assert_eq!(new.read(0, 4096).await.unwrap(), block(2, 4096));
            assert!(daemon.claim(&url, "vms/d.raw", 3).await.acknowledged);
            assert!(daemon.verify(&url, "vms/d.raw", 3).await.ok);
            old.rekey(Token(3), SOON).await.unwrap();
            soon("the write", write).await.unwrap().unwrap();
            assert_eq!(old.read(0, 4096).await.unwrap(), block(3, 4096));
        },
    );
}

#[test]
fn a_crash_of_the_server_loses_nothing_that_was_written_or_flushed() {
    with_ganesha(
        "a_crash_of_the_server_loses_nothing_that_was_written_or_flushed",
        async |ganesha| {
            let mut daemon = scene(ganesha).await;
            let url = ganesha.url();
            let disk = open(ganesha, NODE, 1).await;
            disk.write(MIB, block(9, 4096)).await.unwrap();
            disk.flush().await.unwrap();
            for value in 1..=20 {
                disk.write(0, block(value, 4096)).await.unwrap();
                disk.write(2048, block(100 + value, 4096)).await.unwrap();
            }
            ganesha.crash_and_restart();
            // As a host's crash would have it: what was not committed is gone.
            let path = ganesha.export().join("vms/d.raw");
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &[0; 8192], 0).unwrap();

            let flusher = disk.clone();
            let flush = tokio::spawn(async move { flusher.flush().await });
            assert_eq!(wants_rekey(&disk).await, RekeyReason::VerifierChanged);
            assert!(!flush.is_finished());
            let stat = daemon.stat(&url, "vms/d.raw").await;
            assert_eq!(stat.gid, Token(1).gid(), "the token outlives the crash");
            assert!(daemon.claim(&url, "vms/d.raw", 2).await.acknowledged);
            disk.rekey(Token(2), SOON).await.unwrap();
            soon("the flush", flush).await.unwrap().unwrap();

            let data = disk.read(0, 8192).await.unwrap();
            let bytes = (data[0], data[2047], data[2048], data[6143]);
            assert_eq!(bytes, (20, 20, 120, 120));
            assert_eq!(disk.read(MIB, 4096).await.unwrap(), block(9, 4096));
        },
    );
}
