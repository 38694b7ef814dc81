//! The server over its own wire: what all of its tests share, and data, limits and restarts.

mod fence;
mod names;
mod tls;
mod wire;

use std::time::Duration;

use bytes::Bytes;
use nfs3_types::nfs3::{self, NFS_PROGRAM};
use nfs3_types::xdr_codec::{Opaque, Pack};
use tempfile::TempDir;

use super::{Config, ExportError, Server, StartError, start};
use crate::dialer::Dialer;
use crate::nfs::client::SetAttributes;
use crate::nfs::connection::Procedure;
use crate::nfs::xdr::Decoder;
use crate::nfs::{Credential, FileHandle, NfsClient, Stable, Status, mount};
use crate::volume::VolumeUrl;

/// No call takes so long, on however loaded a machine.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

const BROKER: u32 = 50_000;
const NODE: u32 = 50_001;

/// A user with the group of that number.
const fn user(uid: u32, gid: u32) -> Credential {
    Credential { uid, gid }
}

async fn serve(root: &TempDir) -> Server {
    start(Config::new("127.0.0.1:0".parse().unwrap(), root.path()))
        .await
        .unwrap()
}

async fn connect(server: &Server) -> NfsClient {
    let VolumeUrl::Nfs(url) = server.url().parse().unwrap() else {
        panic!("an NFS volume")
    };
    mount(&url, &Dialer::default(), CALL_TIMEOUT).await.unwrap()
}

/// A call that the client has no method for: the status, and what follows it.
async fn call(
    client: &NfsClient,
    credential: Credential,
    procedure: NFS_PROGRAM,
    arguments: &impl Pack,
) -> (Status, Decoder) {
    let procedure = Procedure {
        program: nfs3::PROGRAM,
        version: nfs3::VERSION,
        number: procedure as u32,
    };
    let reply = client
        .connection()
        .call(procedure, credential, arguments)
        .await
        .unwrap();
    let mut decoder = Decoder(reply);
    (decoder.fixed().unwrap(), decoder)
}

fn wire_handle(handle: &FileHandle) -> nfs3::nfs_fh3 {
    nfs3::nfs_fh3 {
        data: Opaque::owned(handle.0.to_vec()),
    }
}

fn entry<'a>(directory: &FileHandle, name: &'a str) -> nfs3::diropargs3<'a> {
    nfs3::diropargs3 {
        dir: wire_handle(directory),
        name: name.as_bytes().into(),
    }
}

fn mode(mode: u32) -> SetAttributes {
    SetAttributes {
        mode: Some(mode),
        ..SetAttributes::default()
    }
}

fn group(gid: u32) -> SetAttributes {
    SetAttributes {
        gid: Some(gid),
        ..SetAttributes::default()
    }
}

#[tokio::test]
async fn what_is_written_is_read_again_in_pieces_and_past_the_end() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    let me = user(7, 7);
    let file = client
        .create(me, client.root(), "disk", mode(0o600))
        .await
        .unwrap();
    let data = Bytes::from((0..=255).cycle().take(1 << 20).collect::<Vec<u8>>());
    let reply = client
        .write(me, &file, 4096, &data, Stable::UNSTABLE)
        .await
        .unwrap();
    assert_eq!((reply.count, reply.committed), (1 << 20, false));
    let read = client.read(me, &file, 4096, 1 << 20).await.unwrap();
    assert!(read.eof && read.data == data);
    let hole = client.read(me, &file, 0, 4096).await.unwrap();
    assert!(!hole.eof && hole.data == vec![0; 4096]);
    let past = client.read(me, &file, 1 << 30, 10).await.unwrap();
    assert!(past.eof && past.data.is_empty());
    let attributes = client.getattr(me, &file).await.unwrap();
    assert_eq!(
        (attributes.size_bytes, attributes.uid, attributes.mode),
        ((1 << 20) + 4096, 7, 0o600)
    );
    let on_disk = std::fs::read(root.path().join("disk")).unwrap();
    assert_eq!(&on_disk[4096..], &data[..]);
    server.shutdown().await;
}

#[tokio::test]
async fn an_offset_beyond_what_a_file_can_have_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    let me = user(7, 7);
    let file = client
        .create(me, client.root(), "disk", mode(0o600))
        .await
        .unwrap();
    let data = Bytes::from_static(b"x");
    for offset in [u64::MAX, i64::MAX as u64] {
        let refused = client
            .write(me, &file, offset, &data, Stable::UNSTABLE)
            .await
            .unwrap_err();
        assert_eq!(refused.status(), Some(Status::NFS3ERR_FBIG));
    }
    let size = SetAttributes {
        size_bytes: Some(u64::MAX),
        ..SetAttributes::default()
    };
    let refused = client.setattr(me, &file, size).await.unwrap_err();
    assert_eq!(refused.status(), Some(Status::NFS3ERR_FBIG));
    let past = client.read(me, &file, u64::MAX, 4096).await.unwrap();
    assert!(past.eof && past.data.is_empty());
}

#[tokio::test]
async fn owners_groups_modes_and_handles_outlive_a_restart_and_the_verifier_does_not() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    let (broker, holder) = (user(BROKER, 5), user(NODE, 5));
    let directory = client
        .mkdir(broker, client.root(), "vms", 0o711)
        .await
        .unwrap();
    let file = client
        .create(broker, &directory, "disk", mode(0o060))
        .await
        .unwrap();
    let data = Bytes::from_static(b"before");
    let before = client
        .write(holder, &file, 0, &data, Stable::UNSTABLE)
        .await
        .unwrap();
    assert_eq!(
        client.commit(holder, &file).await.unwrap().verifier,
        before.verifier
    );
    server.shutdown().await;

    let server = serve(&root).await;
    let client = connect(&server).await;
    assert_eq!(
        client.lookup(broker, &directory, "disk").await.unwrap(),
        file
    );
    let attributes = client.getattr(broker, &file).await.unwrap();
    assert_eq!(
        (attributes.uid, attributes.gid, attributes.mode),
        (BROKER, 5, 0o060)
    );
    assert_eq!(
        client.getattr(broker, &directory).await.unwrap().mode,
        0o711
    );
    assert_eq!(client.read(holder, &file, 0, 6).await.unwrap().data, data);
    assert_ne!(
        client.commit(holder, &file).await.unwrap().verifier,
        before.verifier
    );
}

#[tokio::test]
async fn a_directory_is_served_by_one_server_at_a_time() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let config = Config::new("127.0.0.1:0".parse().unwrap(), root.path());
    let second = start(config.clone()).await.unwrap_err();
    assert!(
        matches!(second, StartError::Export(ExportError::InUse { .. })),
        "{second}"
    );
    server.shutdown().await;
    start(config).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_served_is_told_with_its_reason() {
    let root = tempfile::tempdir().unwrap();
    let config = Config::new("127.0.0.1:0".parse().unwrap(), root.path().join("absent"));
    let absent = start(config).await.unwrap_err();
    assert!(absent.to_string().contains("is it a directory"), "{absent}");
    let server = serve(&root).await;
    let other = tempfile::tempdir().unwrap();
    let taken = start(Config::new(server.addr, other.path()))
        .await
        .unwrap_err();
    assert!(matches!(taken, StartError::Listen { .. }), "{taken}");
    let mut config = Config::new("127.0.0.1:0".parse().unwrap(), other.path());
    config.export = "relative".into();
    assert!(matches!(
        start(config).await,
        Err(StartError::ExportPath { .. })
    ));
}

#[tokio::test]
async fn an_export_is_mounted_under_its_own_name_only() {
    let root = tempfile::tempdir().unwrap();
    let mut config = Config::new("127.0.0.1:0".parse().unwrap(), root.path());
    config.export = "/srv/vm".into();
    let server = start(config).await.unwrap();
    assert!(server.url().ends_with("/srv/vm"));
    connect(&server).await;
    for (name, mounted) in [
        ("/srv/vm/", true),
        ("/srv", false),
        ("/", false),
        ("/srv/vm/x", false),
    ] {
        let VolumeUrl::Nfs(url) = format!("nfs://{}{name}", server.addr).parse().unwrap() else {
            panic!("an NFS volume")
        };
        let result = mount(&url, &Dialer::default(), CALL_TIMEOUT).await;
        assert_eq!(result.is_ok(), mounted, "{name}");
    }
}

#[tokio::test]
async fn the_servers_limits_are_what_the_client_uses() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    let limits = client.fsinfo(user(7, 7)).await.unwrap();
    assert_eq!(
        (limits.read_bytes_max, limits.write_bytes_max),
        (1 << 20, 1 << 20)
    );
    let room = client.fsstat(user(7, 7)).await.unwrap();
    assert!(room.size_bytes >= room.free_bytes && room.free_bytes > 0);
    client.null().await.unwrap();
}

#[tokio::test]
async fn many_more_files_than_may_be_open_are_all_read_and_written() {
    let root = tempfile::tempdir().unwrap();
    let server = serve(&root).await;
    let client = connect(&server).await;
    let me = user(7, 7);
    let mut files = Vec::new();
    for number in 0..300_u32 {
        let name = number.to_string();
        let file = client
            .create(me, client.root(), &name, mode(0o600))
            .await
            .unwrap();
        let data = Bytes::from(name.into_bytes());
        client
            .write(me, &file, 0, &data, Stable::UNSTABLE)
            .await
            .unwrap();
        files.push((file, data));
    }
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(open < 600, "{open} descriptors");
    for (file, data) in files {
        assert_eq!(client.read(me, &file, 0, 100).await.unwrap().data, data);
    }
}
