//! The broker daemon: the gRPC service through which `clusterd` has volumes and disks worked on.
//!
//! It keeps nothing that matters: every answer comes from the volume itself, so it may be killed
//! and started again at any moment, and a request whose answer was lost may be asked again.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cluster_model::ids::Token;
use cluster_model::settle::SETTLE_MS_MAX;
use proto::broker as wire;
use proto::broker::broker_server::{Broker, BrokerServer};
use tonic::{Code, Request, Response, Status};

use crate::dialer::Dialer;
use crate::store::{ImageError, NewDisk, Store, VolumeError, VolumeRef};
use crate::volume::DiskPath;

/// Files of one claim at most: a machine has a handful.
const FILES_MAX: usize = 256;

/// Requests under way may go on for so long when the daemon is asked to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// How the daemon is started.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    /// The Unix socket to serve on, for its owner only.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// The address of this host from which connections to storage servers are made.
    #[arg(long, value_name = "IP")]
    pub source_address: Option<IpAddr>,
    /// Connect from ports below 1024, which exports with `secure` ask for (needs the privilege).
    #[arg(long)]
    pub privileged_port: bool,
    /// This host's hardware watchdog is armed and resets it when its lease is lost, so that
    /// directory volumes may have the fence class `time`.
    #[arg(long)]
    pub watchdog_armed: bool,
}

/// Serves until `stop` resolves.
///
/// # Errors
/// When the socket cannot be taken: another daemon serves it, or the file system refuses.
pub async fn serve(args: ServeArgs, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
    let listen = |source| ServeError::Listen {
        socket: args.socket.clone(),
        source,
    };
    let incoming = proto::unix::listen(&args.socket).await.map_err(listen)?;
    let dialer = Dialer {
        source: args.source_address,
        privileged_port: args.privileged_port,
        ..Dialer::default()
    };
    let service = BrokerService {
        store: Store::new(dialer, args.watchdog_armed),
    };
    tracing::info!(socket = %args.socket.display(), "the storage broker serves");
    let stopping = tokio_util::sync::CancellationToken::new();
    let server = tonic::transport::Server::builder()
        .add_service(BrokerServer::new(service))
        .serve_with_incoming_shutdown(incoming, stopping.clone().cancelled_owned());
    let deadline = async {
        stop.await;
        stopping.cancel();
        tokio::time::sleep(STOP_TIMEOUT).await;
    };
    tokio::select! {
        result = server => result.map_err(ServeError::Serve),
        // Clients that keep their connection open do not keep the daemon.
        () = deadline => Ok(()),
    }
}

/// Why the daemon does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket cannot be taken.
    #[error("cannot serve on {}: {source}; is a storage broker running there already?", socket.display())]
    Listen {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The gRPC server ended.
    #[error("the broker's server ended: {0}")]
    Serve(tonic::transport::Error),
}

struct BrokerService {
    store: Store,
}

pub(crate) fn volume(wire: Option<wire::Volume>) -> Result<VolumeRef, Status> {
    let wire = wire.ok_or_else(|| Status::invalid_argument("the request names no volume"))?;
    VolumeRef::parse(&wire.url, &wire.tls_ca, &wire.cluster_id, wire.broker_uid).map_err(to_status)
}

/// How long to wait for late writes: what is asked for, or a refusal, never less.
fn settle(ms: u32) -> Result<Duration, Status> {
    if ms > SETTLE_MS_MAX {
        return Err(Status::invalid_argument(format!(
            "a settle time of {ms} ms is over the {SETTLE_MS_MAX} ms that any takeover waits"
        )));
    }
    Ok(Duration::from_millis(u64::from(ms)))
}

pub(crate) fn path(text: &str) -> Result<DiskPath, Status> {
    text.parse()
        .map_err(|error| to_status(VolumeError::Path(error)))
}

pub(crate) fn token(value: u32) -> Result<Token, Status> {
    if value == 0 || value >= Token::LIMIT {
        return Err(to_status(VolumeError::Token { token: value }));
    }
    Ok(Token(value))
}

pub(crate) fn files(wire: Vec<wire::File>) -> Result<Vec<(VolumeRef, DiskPath)>, Status> {
    if wire.len() > FILES_MAX {
        return Err(Status::invalid_argument(format!(
            "more than {FILES_MAX} files"
        )));
    }
    wire.into_iter()
        .map(|file| Ok((volume(file.volume)?, path(&file.path)?)))
        .collect()
}

fn to_status(error: VolumeError) -> Status {
    let code = match &error {
        VolumeError::Url(_)
        | VolumeError::Tls(_)
        | VolumeError::Path(_)
        | VolumeError::NoClusterId
        | VolumeError::BrokerUid { .. }
        | VolumeError::Token { .. }
        | VolumeError::Size { .. } => Code::InvalidArgument,
        VolumeError::Image(ImageError::Read { source, .. })
            if source.kind() == std::io::ErrorKind::NotFound =>
        {
            Code::NotFound
        }
        VolumeError::Image(_) => Code::InvalidArgument,
        VolumeError::Mount(_) => Code::Unavailable,
        VolumeError::NotFound { .. } => Code::NotFound,
        VolumeError::Exists { .. } => Code::AlreadyExists,
        VolumeError::Full { .. } => Code::ResourceExhausted,
        VolumeError::Permission { .. } => Code::PermissionDenied,
        VolumeError::Busy { .. } | VolumeError::Restarted { .. } => Code::Aborted,
        VolumeError::NotAdopted { .. }
        | VolumeError::OtherCluster { .. }
        | VolumeError::BadIdentity { .. }
        | VolumeError::ReadOnly { .. }
        | VolumeError::NewerToken { .. }
        | VolumeError::Claim(_)
        | VolumeError::Verify(_) => Code::FailedPrecondition,
        VolumeError::Nfs { .. } | VolumeError::Io { .. } => Code::Unavailable,
    };
    Status::new(code, error.to_string())
}

#[tonic::async_trait]
impl Broker for BrokerService {
    async fn describe(
        &self,
        _request: Request<wire::DescribeRequest>,
    ) -> Result<Response<wire::DescribeReply>, Status> {
        Ok(Response::new(wire::DescribeReply {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
        }))
    }

    async fn probe_volume(
        &self,
        request: Request<wire::ProbeVolumeRequest>,
    ) -> Result<Response<wire::VolumeProbe>, Status> {
        let request = request.into_inner();
        let volume = VolumeRef::parse(
            &request.url,
            &request.tls_ca,
            &request.cluster_id,
            request.broker_uid,
        )
        .map_err(to_status)?;
        let offers_tls = request.ask_tls && self.store.offers_tls(&volume).await;
        let looked = async {
            let volume = if request.root_in_clear {
                self.store.pin_root(&volume).await?
            } else {
                volume
            };
            Ok::<_, VolumeError>((self.store.probe(&volume).await?, volume.url.to_string()))
        };
        // What a probe finds out is its answer, also when it is bad.
        let probe = match looked.await {
            Ok((probe, url)) => {
                let identity = probe.identity.unwrap_or_else(|| crate::volume::Identity {
                    cluster_id: String::new(),
                    volume_uuid: String::new(),
                });
                wire::VolumeProbe {
                    reachable: true,
                    error: String::new(),
                    owner_cluster_id: identity.cluster_id,
                    volume_uuid: identity.volume_uuid,
                    size_bytes: probe.size_bytes,
                    free_bytes: probe.free_bytes,
                    writable: probe.writable,
                    offers_tls,
                    url,
                }
            }
            Err(error) => wire::VolumeProbe {
                reachable: !matches!(error, VolumeError::Mount(_) | VolumeError::Io { .. }),
                error: error.to_string(),
                offers_tls,
                ..Default::default()
            },
        };
        Ok(Response::new(probe))
    }

    async fn adopt_volume(
        &self,
        request: Request<wire::AdoptVolumeRequest>,
    ) -> Result<Response<wire::AdoptVolumeReply>, Status> {
        let request = request.into_inner();
        let volume = volume(request.volume)?;
        if request.volume_uuid.is_empty() || request.volume_uuid.len() > 100 {
            return Err(Status::invalid_argument(
                "the request gives the volume no id of its own",
            ));
        }
        if !request
            .volume_uuid
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '-')
        {
            return Err(Status::invalid_argument(
                "the volume's id may have letters, digits and `-`",
            ));
        }
        let (certificate, volume_uuid) = self
            .store
            .adopt(&volume, &request.volume_uuid)
            .await
            .map_err(to_status)?;
        tracing::info!(
            volume = %volume.url,
            class = certificate.class.as_str(),
            settle_ms = certificate.settle_ms,
            "adopted"
        );
        Ok(Response::new(wire::AdoptVolumeReply {
            fence_class: certificate.class.as_str().into(),
            settle_ms: certificate.settle_ms,
            report: certificate.report,
            volume_uuid,
        }))
    }

    async fn create_disk(
        &self,
        request: Request<wire::CreateDiskRequest>,
    ) -> Result<Response<wire::CreateDiskReply>, Status> {
        let request = request.into_inner();
        let volume = volume(request.volume)?;
        let disk = NewDisk {
            path: path(&request.path)?,
            size_bytes: request.size_bytes,
            token: token(request.token)?,
            since: if request.since == 0 {
                token(request.token)?
            } else {
                token(request.since)?
            },
            settle: settle(request.settle_ms)?,
            image: (!request.image.is_empty()).then(|| request.image.into()),
        };
        self.store
            .create_disk(&volume, &disk)
            .await
            .map_err(to_status)?;
        tracing::info!(volume = %volume.url, path = %disk.path, token = %disk.token, "created");
        Ok(Response::new(wire::CreateDiskReply {}))
    }

    async fn delete_disk(
        &self,
        request: Request<wire::DeleteDiskRequest>,
    ) -> Result<Response<wire::DeleteDiskReply>, Status> {
        let request = request.into_inner();
        let (volume, path) = (volume(request.volume)?, path(&request.path)?);
        let token = token(request.token)?;
        self.store
            .delete_disk(&volume, &path, token, Token(request.since))
            .await
            .map_err(to_status)?;
        tracing::info!(volume = %volume.url, %path, %token, "deleted");
        Ok(Response::new(wire::DeleteDiskReply {}))
    }

    async fn stat_disks(
        &self,
        request: Request<wire::StatDisksRequest>,
    ) -> Result<Response<wire::StatDisksReply>, Status> {
        let files = files(request.into_inner().files)?;
        let stats = files.iter().map(|(volume, path)| async move {
            match self.store.stat(volume, path).await {
                Ok(Some(stat)) => wire::DiskStat {
                    found: true,
                    error: String::new(),
                    size_bytes: stat.size_bytes,
                    gid: stat.gid,
                    uid: stat.uid,
                    mode: stat.mode,
                },
                Ok(None) => wire::DiskStat::default(),
                Err(error) => wire::DiskStat {
                    error: error.to_string(),
                    ..Default::default()
                },
            }
        });
        let stats = futures::future::join_all(stats).await;
        Ok(Response::new(wire::StatDisksReply { stats }))
    }

    async fn claim(
        &self,
        request: Request<wire::ClaimRequest>,
    ) -> Result<Response<wire::ClaimReply>, Status> {
        let request = request.into_inner();
        let (files, token) = (files(request.files)?, token(request.token)?);
        let began = Instant::now();
        let result = self.store.claim(&files, token).await;
        let duration_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        if let Err(error) = &result {
            tracing::warn!(%token, %error, "a claim is not acknowledged");
        }
        Ok(Response::new(wire::ClaimReply {
            acknowledged: result.is_ok(),
            refused: result.as_ref().is_err_and(VolumeError::is_for_good),
            error: result
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default(),
            duration_us,
        }))
    }

    async fn verify_and_commit(
        &self,
        request: Request<wire::VerifyAndCommitRequest>,
    ) -> Result<Response<wire::VerifyAndCommitReply>, Status> {
        let request = request.into_inner();
        let (files, token) = (files(request.files)?, token(request.token)?);
        let result = self.store.verify_and_commit(&files, token).await;
        if let Err(error) = &result {
            tracing::warn!(%token, %error, "a takeover's files could not be verified");
        }
        Ok(Response::new(wire::VerifyAndCommitReply {
            ok: result.is_ok(),
            refused: result.as_ref().is_err_and(VolumeError::is_for_good),
            error: result
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_settle_time_is_waited_in_full_or_refused() {
        assert_eq!(settle(300_000).unwrap(), Duration::from_secs(300));
        assert_eq!(settle(SETTLE_MS_MAX).unwrap(), Duration::from_secs(600));
        let refused = settle(SETTLE_MS_MAX + 1).unwrap_err();
        assert!(refused.message().contains("600001 ms"), "{refused}");
    }
}
