//! A broker daemon in this process, on a socket of its own, and its client.

// Not every suite uses all of it.
#![allow(dead_code)]

use std::path::PathBuf;
use std::sync::OnceLock;

use proto::broker::broker_client::BrokerClient;
use proto::broker::{self as wire};
use storage_broker::daemon::{ServeArgs, ServeError, serve};
use storage_broker::nfs_server::TlsArgs;
use storage_broker::tls::{ClientTls, ServerTls};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Channel;

/// The cluster that the tests play.
pub const CLUSTER: &str = "cluster-one";

/// Who owns its disks.
pub const BROKER_UID: u32 = 50_000;

/// A running daemon; stops when dropped.
pub struct Daemon {
    /// Speaks to it.
    pub client: BrokerClient<Channel>,
    stop: DropGuard,
    serving: tokio::task::JoinHandle<Result<(), ServeError>>,
    directory: tempfile::TempDir,
}

impl Daemon {
    /// Starts one.
    pub async fn start() -> Daemon {
        Daemon::start_in(tempfile::tempdir().unwrap()).await
    }

    /// Stops it and starts another on its socket.
    pub async fn restart(self) -> Daemon {
        drop(self.stop);
        self.serving.await.unwrap().unwrap();
        Daemon::start_in(self.directory).await
    }

    /// The arguments of a daemon on its socket.
    pub fn args(&self) -> ServeArgs {
        args(self.directory.path().join("broker.sock"))
    }

    async fn start_in(directory: tempfile::TempDir) -> Daemon {
        let socket: PathBuf = directory.path().join("broker.sock");
        let stop = CancellationToken::new();
        let serving = tokio::spawn(serve(args(socket.clone()), stop.clone().cancelled_owned()));
        let started = async {
            while tokio::net::UnixStream::connect(&socket).await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(10), started)
            .await
            .unwrap();
        Daemon {
            client: BrokerClient::new(proto::unix::channel(socket)),
            stop: stop.drop_guard(),
            serving,
            directory,
        }
    }

    /// Adopts a volume for the cluster.
    pub async fn adopt(&mut self, url: &str) -> Result<wire::AdoptVolumeReply, tonic::Status> {
        let request = wire::AdoptVolumeRequest {
            volume: Some(volume(url)),
            volume_uuid: "11111111-2222".into(),
        };
        self.client
            .adopt_volume(request)
            .await
            .map(tonic::Response::into_inner)
    }

    /// Creates an empty disk.
    pub async fn create(
        &mut self,
        url: &str,
        path: &str,
        size_bytes: u64,
        token: u32,
    ) -> Result<(), tonic::Status> {
        let request = wire::CreateDiskRequest {
            volume: Some(volume(url)),
            path: path.into(),
            size_bytes,
            token,
            image: String::new(),
            ..Default::default()
        };
        self.client.create_disk(request).await.map(drop)
    }

    /// Claims one file.
    pub async fn claim(&mut self, url: &str, path: &str, token: u32) -> wire::ClaimReply {
        let request = wire::ClaimRequest {
            files: vec![file(url, path)],
            token,
        };
        self.client.claim(request).await.unwrap().into_inner()
    }

    /// Looks at one file.
    pub async fn stat(&mut self, url: &str, path: &str) -> wire::DiskStat {
        let request = wire::StatDisksRequest {
            files: vec![file(url, path)],
        };
        self.client
            .stat_disks(request)
            .await
            .unwrap()
            .into_inner()
            .stats
            .remove(0)
    }

    /// Verifies one file.
    pub async fn verify(
        &mut self,
        url: &str,
        path: &str,
        token: u32,
    ) -> wire::VerifyAndCommitReply {
        let request = wire::VerifyAndCommitRequest {
            files: vec![file(url, path)],
            token,
        };
        self.client
            .verify_and_commit(request)
            .await
            .unwrap()
            .into_inner()
    }

    /// Deletes one file.
    pub async fn delete(&mut self, url: &str, path: &str, token: u32) -> Result<(), tonic::Status> {
        let request = wire::DeleteDiskRequest {
            volume: Some(volume(url)),
            path: path.into(),
            token,
            since: 0,
        };
        self.client.delete_disk(request).await.map(drop)
    }

    /// Probes a volume.
    pub async fn probe(&mut self, url: &str) -> wire::VolumeProbe {
        let request = wire::ProbeVolumeRequest {
            url: url.into(),
            cluster_id: CLUSTER.into(),
            broker_uid: BROKER_UID,
            tls_ca: authority_of(url),
            ..Default::default()
        };
        self.client
            .probe_volume(request)
            .await
            .unwrap()
            .into_inner()
    }
}

fn args(socket: PathBuf) -> ServeArgs {
    ServeArgs {
        socket,
        source_address: None,
        privileged_port: false,
        watchdog_armed: false,
    }
}

/// A volume of the cluster.
pub fn volume(url: &str) -> wire::Volume {
    wire::Volume {
        url: url.into(),
        cluster_id: CLUSTER.into(),
        broker_uid: BROKER_UID,
        tls_ca: authority_of(url),
        ..Default::default()
    }
}

/// Where this process's servers keep the certificate that they share.
fn certificates() -> &'static tempfile::TempDir {
    static CERTIFICATES: OnceLock<tempfile::TempDir> = OnceLock::new();
    CERTIFICATES.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let args = TlsArgs {
            tls_self_signed: Some(directory.path().into()),
            ..TlsArgs::default()
        };
        // Made here, once, so that no two servers make it at the same time.
        ServerTls::load(&args, [127, 0, 0, 1].into()).unwrap();
        directory
    })
}

/// The TLS of a server that refuses everything without.
pub fn server_tls() -> TlsArgs {
    TlsArgs {
        tls_self_signed: Some(certificates().path().into()),
        tls_only: true,
        ..TlsArgs::default()
    }
}

/// Who vouches for the server of a volume, PEM; empty where its address does not require TLS.
fn authority_of(url: &str) -> String {
    if !url.ends_with("?tls=require") {
        return String::new();
    }
    std::fs::read_to_string(certificates().path().join("ca.pem")).unwrap()
}

/// What a client of the volume demands.
pub fn client_tls(url: &str) -> Option<ClientTls> {
    ClientTls::of_volume(&url.parse().unwrap(), &authority_of(url)).unwrap()
}

/// A file on it.
pub fn file(url: &str, path: &str) -> wire::File {
    wire::File {
        volume: Some(volume(url)),
        path: path.into(),
    }
}
