//! Monitors whose storage server stops answering at a bad moment.

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use cluster_model::ids::Token;
use common::kvm;
use common::process::{LEASE, Process, incoming, machine_file};
use proto::monitor::{MonitorStatus, Phase};
use serde_json::json;
use storage_broker::dialer::Dialer;
use storage_broker::nfs_server::{Config, Server, start};
use storage_broker::store::{NewDisk, Store, VolumeRef};
use storage_broker::volume::DiskPath;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const DISK: &str = "disk.raw";
const DISK_BYTES: u64 = 8 << 20;
const BROKER_UID: u32 = 60_000;
const CLUSTER: &str = "test";
/// NFSv3's procedure number (RFC 1813, 3.3.7).
const WRITE: u32 = 7;

/// How the way between monitors and their storage server is.
#[derive(Clone, Copy, Default)]
struct Way {
    /// From the next WRITE on calls reach the server and no answer comes back.
    mute: bool,
    /// How often the connections of the moment were closed.
    cuts: u32,
}

/// A storage server, and the way to it that monitors take.
struct Storage {
    _server: Server,
    _root: tempfile::TempDir,
    volume: VolumeRef,
    address: SocketAddr,
    way: watch::Sender<Way>,
}

impl Storage {
    async fn start() -> Storage {
        let root = tempfile::tempdir().unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let server = start(Config::new(any, root.path())).await.unwrap();
        let listener = TcpListener::bind(any).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (way, changes) = watch::channel(Way::default());
        let behind = server.addr;
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(forward(client, behind, changes.clone()));
            }
        });
        let volume = VolumeRef::parse(&server.url(), "", CLUSTER, BROKER_UID).unwrap();
        let disk = NewDisk {
            path: path(),
            size_bytes: DISK_BYTES,
            token: Token(5),
            since: Token(5),
            settle: Duration::ZERO,
            image: None,
        };
        let store = Store::new(Dialer::default(), false);
        store.adopt(&volume, "1111").await.unwrap();
        store.create_disk(&volume, &disk).await.unwrap();
        Storage {
            _server: server,
            _root: root,
            volume,
            address,
            way,
        }
    }

    async fn claim(&self, token: Token) {
        let store = Store::new(Dialer::default(), false);
        let files = [(self.volume.clone(), path())];
        store.claim(&files, token).await.unwrap();
    }
}

fn path() -> DiskPath {
    DISK.parse().unwrap()
}

/// One connection, until it ends or is cut.
async fn forward(mut client: TcpStream, server: SocketAddr, mut way: watch::Receiver<Way>) {
    let cuts = way.borrow().cuts;
    let Ok(mut server) = TcpStream::connect(server).await else {
        return;
    };
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let (silence, mut silent) = watch::channel(false);
    let moods = way.clone();
    let calls = async {
        // Each call is one record: its length, and then, from byte 20 on, its procedure.
        while let Ok(mark) = from_client.read_u32().await {
            let mut call = vec![0; (mark & 0x7fff_ffff) as usize];
            if from_client.read_exact(&mut call).await.is_err() {
                return;
            }
            if moods.borrow().mute && call.get(20..24) == Some(&WRITE.to_be_bytes()) {
                silence.send_replace(true);
            }
            let sent = [&mark.to_be_bytes(), call.as_slice()].concat();
            if to_server.write_all(&sent).await.is_err() {
                return;
            }
        }
    };
    let muted = async { silent.wait_for(|silent| *silent).await.is_ok() };
    let answers = async {
        tokio::select! {
            biased;
            // For good: what was on its way is lost, and only a cut ends it.
            _ = muted => std::future::pending().await,
            _ = copy(&mut from_server, &mut to_client) => {}
        }
    };
    let cut = async { way.wait_for(|way| way.cuts > cuts).await.is_ok() };
    tokio::select! {
        _ = cut => {}
        () = calls => {}
        () = answers => {}
    }
}

fn working(status: &MonitorStatus, flushed: u64) -> bool {
    status
        .guest
        .as_ref()
        .is_some_and(|guest| guest.flushed > flushed)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_re_keyed_while_it_stops_for_its_cutover_goes_on_and_promises_nothing() {
    if !kvm("a_machine_re_keyed_while_it_stops_for_its_cutover_goes_on_and_promises_nothing") {
        return;
    }
    let storage = Storage::start().await;
    let directory = tempfile::tempdir().unwrap();
    let mut file = machine_file(directory.path(), 64, 20, 0);
    file["disks"] = json!([{
        "volume": format!("nfs://{}/", storage.address), "path": DISK, "cluster_id": CLUSTER,
        "broker_uid": BROKER_UID, "fence_class": "gid-token", "size_bytes": DISK_BYTES,
    }]);
    let mut source = Process::start(directory.path(), "s", &file, "").await;
    let mut destination = Process::start(directory.path(), "d", &incoming(&file, 1, 6), "").await;
    source.run(5, LEASE).await.unwrap();
    source.wait("working", |status| working(status, 10)).await;

    // The source stops with a write that nobody answers, so its disk cannot drain.
    storage.way.send_modify(|way| way.mute = true);
    source
        .wait("in doubt", |status| status.writes_unanswered)
        .await;
    source.send_to(1, &mut destination).await.unwrap();
    let stopped = |status: &MonitorStatus| {
        let timings = status.migration.as_ref().and_then(|m| m.timings.as_ref());
        timings.is_some_and(|timings| timings.vcpus_stopped_ns != 0)
    };
    source.wait("stopping", stopped).await;
    storage.way.send_replace(Way {
        mute: false,
        cuts: 1,
    });
    source.wait_phase(Phase::Refused).await;

    // As its node does then, whatever the migration is about.
    storage.claim(Token(7)).await;
    source.rekey(7).await.unwrap();
    source.run(7, LEASE).await.unwrap();
    let flushed = source.status().await.guest.unwrap().flushed;
    let status = source
        .wait("working on", |status| working(status, flushed + 10))
        .await;
    assert_eq!(status.guest.unwrap().error, "");
    assert_eq!(
        (status.phase, status.said_quiet),
        (Phase::Running.into(), false)
    );
    let failed = |status: &MonitorStatus| {
        let migration = status.migration.as_ref();
        migration.is_some_and(|migration| !migration.failure.is_empty())
    };
    let status = source.wait("failing", failed).await;
    assert!(!status.said_quiet && status.phase() == Phase::Running);
    let status = destination.wait_phase(Phase::Failed).await;
    let migration = status.migration.unwrap();
    assert_eq!(migration.timings.unwrap().quiet_received_ns, 0);
}
