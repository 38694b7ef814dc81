//! The broker daemon over its socket, on directory volumes, and what it says to bad input.

mod common;

use common::{CLUSTER, Daemon, file, volume};
use proto::broker as wire;
use tonic::Code;

const MIB: u64 = 1 << 20;

struct Scene {
    daemon: Daemon,
    directory: tempfile::TempDir,
    url: String,
}

async fn adopted() -> Scene {
    let mut daemon = Daemon::start().await;
    let directory = tempfile::tempdir().unwrap();
    let url = format!("dir:{}", directory.path().display());
    let reply = daemon.adopt(&url).await.unwrap();
    assert_eq!(
        (reply.fence_class.as_str(), reply.settle_ms),
        ("none", 1000),
        "{}",
        reply.report
    );
    Scene {
        daemon,
        directory,
        url,
    }
}

#[tokio::test]
async fn a_disk_lives_from_creation_to_deletion() {
    let Scene {
        mut daemon,
        directory,
        url,
    } = adopted().await;
    assert_eq!(
        daemon
            .client
            .describe(wire::DescribeRequest {})
            .await
            .unwrap()
            .into_inner()
            .pid,
        std::process::id()
    );
    daemon.create(&url, "vms/a.raw", 4 * MIB, 3).await.unwrap();
    daemon
        .create(&url, "vms/a.raw", 4 * MIB, 3)
        .await
        .expect("asked again, the same");
    let stat = daemon.stat(&url, "vms/a.raw").await;
    assert!(
        stat.found && stat.size_bytes == 4 * MIB && stat.gid == 0x4000_0003,
        "{stat:?}"
    );
    assert_eq!(
        daemon
            .create(&url, "vms/a.raw", MIB, 3)
            .await
            .unwrap_err()
            .code(),
        Code::AlreadyExists
    );
    assert_eq!(
        daemon
            .create(&url, "vms/a.raw", 4 * MIB, 4)
            .await
            .unwrap_err()
            .code(),
        Code::AlreadyExists
    );

    assert!(daemon.claim(&url, "vms/a.raw", 7).await.acknowledged);
    let stale = daemon.claim(&url, "vms/a.raw", 6).await;
    assert!(
        !stale.acknowledged && stale.error.contains("newer"),
        "{stale:?}"
    );
    assert!(daemon.verify(&url, "vms/a.raw", 7).await.ok);
    assert!(!daemon.verify(&url, "vms/a.raw", 8).await.ok);

    assert_eq!(
        daemon
            .delete(&url, "vms/a.raw", 6)
            .await
            .unwrap_err()
            .code(),
        Code::FailedPrecondition
    );
    daemon.delete(&url, "vms/a.raw", 7).await.unwrap();
    daemon
        .delete(&url, "vms/a.raw", 7)
        .await
        .expect("deleted already");
    assert!(!daemon.stat(&url, "vms/a.raw").await.found);
    assert!(!directory.path().join("vms/a.raw").exists());
}

#[tokio::test]
async fn an_image_is_copied_in_and_a_bad_one_leaves_nothing_behind() {
    let Scene {
        mut daemon,
        directory,
        url,
    } = adopted().await;
    let image = directory.path().join("image");
    let mut content = vec![0; 600_000];
    content[500_000..].fill(9);
    std::fs::write(&image, &content).unwrap();
    let request = |image: &std::path::Path, size_bytes| wire::CreateDiskRequest {
        volume: Some(volume(&url)),
        path: "d.raw".into(),
        size_bytes,
        token: 1,
        image: image.display().to_string(),
        ..Default::default()
    };
    let create = async |daemon: &mut Daemon, image: &std::path::Path, size_bytes| {
        daemon
            .client
            .create_disk(request(image, size_bytes))
            .await
            .map(drop)
    };
    let missing = create(&mut daemon, &directory.path().join("gone"), MIB)
        .await
        .unwrap_err();
    assert_eq!(missing.code(), Code::NotFound, "{missing}");
    let large = create(&mut daemon, &image, 1000).await.unwrap_err();
    assert!(large.message().contains("make the disk larger"), "{large}");
    let qcow = directory.path().join("qcow");
    std::fs::write(&qcow, b"QFI\xfb\0\0\0\x03").unwrap();
    let format = create(&mut daemon, &qcow, MIB).await.unwrap_err();
    assert!(format.message().contains("qemu-img convert"), "{format}");
    let folder = create(&mut daemon, directory.path(), MIB)
        .await
        .unwrap_err();
    assert!(folder.message().contains("not a regular file"), "{folder}");
    assert!(!daemon.stat(&url, "d.raw").await.found);

    create(&mut daemon, &image, MIB).await.unwrap();
    let disk = std::fs::read(directory.path().join("d.raw")).unwrap();
    assert_eq!(disk.len() as u64, MIB);
    assert!(disk[..600_000] == content && disk[600_000..].iter().all(|byte| *byte == 0));
}

#[tokio::test]
async fn another_clusters_volume_is_left_alone() {
    let Scene {
        mut daemon,
        directory,
        url,
    } = adopted().await;
    let theirs = wire::Volume {
        cluster_id: "cluster-two".into(),
        ..volume(&url)
    };
    let request = wire::AdoptVolumeRequest {
        volume: Some(theirs.clone()),
        volume_uuid: "x".into(),
    };
    let error = daemon.client.adopt_volume(request).await.unwrap_err();
    assert!(
        error.message().contains(CLUSTER) && error.code() == Code::FailedPrecondition,
        "{error}"
    );
    let request = wire::CreateDiskRequest {
        volume: Some(theirs),
        path: "d".into(),
        size_bytes: MIB,
        token: 1,
        image: String::new(),
        ..Default::default()
    };
    assert_eq!(
        daemon.client.create_disk(request).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    assert!(!directory.path().join("d").exists());
    let again = daemon.adopt(&url).await.unwrap();
    assert_eq!(
        again.volume_uuid, "11111111-2222",
        "adopting one's own again changes nothing"
    );
    let probe = daemon.probe(&url).await;
    assert_eq!(
        (probe.owner_cluster_id.as_str(), probe.reachable),
        (CLUSTER, true)
    );
    assert!(probe.free_bytes > 0 && probe.size_bytes >= probe.free_bytes);
}

#[tokio::test]
async fn malformed_requests_are_refused_with_a_reason() {
    let Scene {
        mut daemon, url, ..
    } = adopted().await;
    for (path, size_bytes, token, code) in [
        ("../etc/passwd", MIB, 1, Code::InvalidArgument),
        ("/etc/passwd", MIB, 1, Code::InvalidArgument),
        (".baton-volume.json", MIB, 1, Code::InvalidArgument),
        ("d", 0, 1, Code::InvalidArgument),
        ("d", u64::MAX, 1, Code::InvalidArgument),
        ("d", MIB, 0, Code::InvalidArgument),
        ("d", MIB, 1 << 30, Code::InvalidArgument),
    ] {
        let error = daemon
            .create(&url, path, size_bytes, token)
            .await
            .unwrap_err();
        assert_eq!(error.code(), code, "{path} {size_bytes} {token}: {error}");
    }
    for bad in ["", "nfs://", "ftp://x/y", "dir:relative"] {
        assert_eq!(
            daemon.adopt(bad).await.unwrap_err().code(),
            Code::InvalidArgument,
            "{bad}"
        );
    }
    let unnamed = wire::CreateDiskRequest {
        volume: None,
        ..Default::default()
    };
    let error = daemon.client.create_disk(unnamed).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    let many = wire::StatDisksRequest {
        files: vec![file(&url, "d"); 1000],
    };
    let error = daemon.client.stat_disks(many).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    let root = wire::Volume {
        broker_uid: 0,
        ..volume("nfs://127.0.0.1:1/x")
    };
    let request = wire::AdoptVolumeRequest {
        volume: Some(root),
        volume_uuid: "u".into(),
    };
    let error = daemon.client.adopt_volume(request).await.unwrap_err();
    assert!(error.message().contains("ordinary uid"), "{error}");
}

#[tokio::test]
async fn volumes_that_cannot_be_reached_say_what_to_try() {
    let mut daemon = Daemon::start().await;
    let nowhere = "nfs://127.0.0.1:9/export";
    let probe = daemon.probe(nowhere).await;
    assert!(
        !probe.reachable && probe.error.contains("is the server running"),
        "{}",
        probe.error
    );
    let error = daemon.adopt(nowhere).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    let gone = daemon.probe("dir:/nonexistent/baton").await;
    assert!(
        !gone.reachable && gone.error.contains("does the directory exist"),
        "{}",
        gone.error
    );
    let claim = daemon.claim(nowhere, "d.raw", 5).await;
    assert!(!claim.acknowledged && !claim.error.is_empty());
    let empty = tempfile::tempdir().unwrap();
    let url = format!("dir:{}", empty.path().display());
    let error = daemon.create(&url, "d", MIB, 1).await.unwrap_err();
    assert!(error.message().contains("volume add"), "{error}");
}

#[tokio::test]
async fn a_restarted_daemon_has_lost_nothing_and_a_second_one_is_refused() {
    let Scene {
        mut daemon,
        directory: _directory,
        url,
    } = adopted().await;
    daemon.create(&url, "d.raw", MIB, 4).await.unwrap();
    let second = storage_broker::daemon::serve(daemon.args(), std::future::pending()).await;
    let error = second.unwrap_err().to_string();
    assert!(error.contains("already"), "{error}");
    let mut daemon = daemon.restart().await;
    assert_eq!(daemon.stat(&url, "d.raw").await.gid, 0x4000_0004);
    assert!(daemon.claim(&url, "d.raw", 5).await.acknowledged);
}
