//! This node's storage broker: kept running, and asked with time limits.

use std::fs::OpenOptions;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use cluster_model::{ClusterState, Token, Vm, VmId};
use proto::broker as wire;
use proto::broker::broker_client::BrokerClient;
use tonic::transport::Channel;

/// How long the broker may take to say who it is.
const DESCRIBE_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a started broker may take to answer.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// A claim that took longer burnt its token.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(5);
/// Verifying and committing flushes what the lost owner left in the server.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(30);
/// Making a disk may copy an image.
const CREATE_TIMEOUT: Duration = Duration::from_secs(600);
/// Certifying a volume floods it with writes for a while.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(120);
/// Anything else.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// This node's broker. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Broker {
    program: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    source: IpAddr,
    client: BrokerClient<Channel>,
    starting: std::sync::Arc<tokio::sync::Mutex<()>>,
}

/// Why the broker did not do it.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// It does not run and could not be started.
    #[error("the storage broker {} does not start: {why}; see {}", program.display(), log.display())]
    NotStarted {
        /// Its program.
        program: PathBuf,
        /// What happened.
        why: String,
        /// Its log.
        log: PathBuf,
    },
    /// It did not answer in time.
    #[error("the storage broker did not {what} within {} ms", within.as_millis())]
    TimedOut {
        /// What was asked.
        what: &'static str,
        /// The limit.
        within: Duration,
    },
    /// It refused or failed.
    #[error("the storage broker could not {what}: {}", status.message())]
    Refused {
        /// What was asked.
        what: &'static str,
        /// What it says.
        status: Box<tonic::Status>,
    },
    /// A claim was not acknowledged by every file: its token is burnt.
    #[error("the claim of {token} for {vm} was not acknowledged: {why}")]
    Burnt {
        /// The machine.
        vm: VmId,
        /// The burnt token.
        token: Token,
        /// What the server said.
        why: String,
    },
    /// The storage refuses the machine's disks whatever the token.
    #[error("the disks of {vm} cannot be claimed: {why}")]
    ClaimRefused {
        /// The machine.
        vm: VmId,
        /// What the server said.
        why: String,
    },
    /// The machine's record names a volume that there is not.
    #[error("{vm} has a disk on volume `{volume}`, which the cluster does not know")]
    NoVolume {
        /// The machine.
        vm: VmId,
        /// Which volume.
        volume: String,
    },
}

impl Broker {
    /// The broker on `<data_dir>/broker.sock`; connections to storage servers come from `source`.
    pub fn new(program: PathBuf, data_dir: &Path, source: IpAddr) -> Broker {
        let socket = data_dir.join("broker.sock");
        Broker {
            program,
            client: BrokerClient::new(proto::unix::channel(&socket)),
            socket,
            log: data_dir.join("broker.log"),
            source,
            starting: std::sync::Arc::default(),
        }
    }

    /// Starts the daemon if none answers on its socket.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub async fn ensure(&self) -> Result<(), BrokerError> {
        if self.answers().await {
            return Ok(());
        }
        let _one = self.starting.lock().await;
        if self.answers().await {
            return Ok(());
        }
        // Not killed when dropped: it outlives this daemon, and the runtime reaps it.
        let mut child = self.spawn().map_err(|error| self.not_started(&error))?;
        tracing::info!(pid = child.id(), "storage broker started");
        let deadline = tokio::time::Instant::now() + START_TIMEOUT;
        loop {
            if self.answers().await {
                return Ok(());
            }
            if let Ok(Some(status)) = child.try_wait() {
                return Err(self.not_started(&format_args!("it ended with {status}")));
            }
            if tokio::time::Instant::now() > deadline {
                let _ = child.start_kill();
                return Err(self.not_started(&"it does not answer"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn not_started(&self, why: &dyn std::fmt::Display) -> BrokerError {
        BrokerError::NotStarted {
            program: self.program.clone(),
            why: why.to_string(),
            log: self.log.clone(),
        }
    }

    async fn answers(&self) -> bool {
        let mut client = self.client.clone();
        let described = client.describe(wire::DescribeRequest {});
        matches!(
            tokio::time::timeout(DESCRIBE_TIMEOUT, described).await,
            Ok(Ok(_))
        )
    }

    fn spawn(&self) -> std::io::Result<tokio::process::Child> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)?;
        let mut command = tokio::process::Command::new(&self.program);
        command.arg("serve").arg("--socket").arg(&self.socket);
        if !self.source.is_unspecified() {
            command.args(["--source-address", &self.source.to_string()]);
        }
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Signals to this daemon's terminal are not for it.
            .process_group(0)
            .spawn()
    }

    async fn call<T, F>(
        &self,
        what: &'static str,
        within: Duration,
        call: impl FnOnce(BrokerClient<Channel>) -> F,
    ) -> Result<T, BrokerError>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        match tokio::time::timeout(within, call(self.client.clone())).await {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(status)) => Err(BrokerError::Refused {
                what,
                status: Box::new(status),
            }),
            Err(_) => Err(BrokerError::TimedOut { what, within }),
        }
    }

    /// Claims every file of a machine for `token`, each once.
    ///
    /// # Errors
    /// [`BrokerError::Burnt`] or [`BrokerError::ClaimRefused`] for anything but an acknowledgement by every
    /// file: the token must not be claimed again.
    pub async fn claim(
        &self,
        state: &ClusterState,
        vm: &Vm,
        token: Token,
    ) -> Result<(), BrokerError> {
        let files = files(state, vm)?;
        let burnt = |why: String| BrokerError::Burnt {
            vm: vm.id,
            token,
            why,
        };
        if !files.is_empty() {
            let request = wire::ClaimRequest {
                files,
                token: token.0,
            };
            let reply = self
                .call("claim", CLAIM_TIMEOUT, |mut client| async move {
                    client.claim(request).await
                })
                .await
                .map_err(|error| burnt(error.to_string()))?;
            if reply.refused {
                return Err(BrokerError::ClaimRefused {
                    vm: vm.id,
                    why: reply.error,
                });
            }
            if !reply.acknowledged {
                return Err(burnt(reply.error));
            }
        }
        Ok(())
    }

    /// After a takeover's settle time: every file still carries `token`, and what the earlier owner
    /// left unstable in the server is on its disk.
    ///
    /// # Errors
    /// When a file carries another token, or the server did not answer.
    pub async fn verify_and_commit(
        &self,
        state: &ClusterState,
        vm: &Vm,
        token: Token,
    ) -> Result<(), BrokerError> {
        let files = files(state, vm)?;
        if files.is_empty() {
            return Ok(());
        }
        let request = wire::VerifyAndCommitRequest {
            files,
            token: token.0,
        };
        let reply = self
            .call(
                "verify the claim",
                VERIFY_TIMEOUT,
                |mut client| async move { client.verify_and_commit(request).await },
            )
            .await?;
        if reply.ok {
            Ok(())
        } else if reply.refused {
            Err(BrokerError::ClaimRefused {
                vm: vm.id,
                why: reply.error,
            })
        } else {
            Err(BrokerError::Burnt {
                vm: vm.id,
                token,
                why: reply.error,
            })
        }
    }

    /// Makes the disk files of a machine under `token`; those that an earlier try made are kept,
    /// those that it began are begun anew.
    ///
    /// # Errors
    /// When the server or an image refuses.
    pub async fn create_disks(
        &self,
        state: &ClusterState,
        vm: &Vm,
        token: Token,
    ) -> Result<(), BrokerError> {
        // Whoever began a disk before wrote without a monitor, so nothing was measured.
        let settle_ms = state.settle(vm, 0).ms;
        let patience = CREATE_TIMEOUT + Duration::from_millis(settle_ms);
        for (number, (disk, file)) in vm.spec.disks.iter().zip(files(state, vm)?).enumerate() {
            let request = wire::CreateDiskRequest {
                volume: file.volume,
                path: file.path,
                size_bytes: disk.size_bytes,
                token: token.0,
                image: vm.images.get(&number).cloned().unwrap_or_default(),
                since: vm.first_token.0,
                settle_ms: u32::try_from(settle_ms).unwrap_or(u32::MAX),
            };
            self.call("make a disk", patience, |mut client| async move {
                client.create_disk(request).await
            })
            .await?;
        }
        Ok(())
    }

    /// Deletes the disk files of a machine that nobody owns any more.
    ///
    /// # Errors
    /// When the server refuses; a file that is not there is no error, nor is somebody else's where the
    /// machine's own was never made.
    pub async fn delete_disks(&self, state: &ClusterState, vm: &Vm) -> Result<(), BrokerError> {
        for file in files(state, vm)? {
            let request = wire::DeleteDiskRequest {
                volume: file.volume,
                path: file.path,
                token: vm.ownership.token.0,
                since: vm.first_token.0,
            };
            let deleted = self
                .call("delete a disk", CALL_TIMEOUT, |mut client| async move {
                    client.delete_disk(request).await
                })
                .await;
            match deleted {
                Err(BrokerError::Refused { status, .. })
                    if status.code() == tonic::Code::NotFound => {}
                // Never made, so what has that name is somebody else's.
                Err(BrokerError::Refused { status, .. })
                    if status.code() == tonic::Code::AlreadyExists && !vm.disks_made => {}
                other => {
                    other?;
                }
            }
        }
        Ok(())
    }

    /// What the server says of a machine's disk files.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub async fn stat_disks(
        &self,
        state: &ClusterState,
        vm: &Vm,
    ) -> Result<Vec<wire::DiskStat>, BrokerError> {
        let request = wire::StatDisksRequest {
            files: files(state, vm)?,
        };
        self.call("look at disks", CALL_TIMEOUT, |mut client| async move {
            client.stat_disks(request).await
        })
        .await
        .map(|reply| reply.stats)
    }

    /// Looks at a volume without changing it.
    ///
    /// # Errors
    /// When the broker does not answer; what is wrong with the volume is in the reply.
    pub async fn probe_volume(
        &self,
        request: wire::ProbeVolumeRequest,
    ) -> Result<wire::VolumeProbe, BrokerError> {
        self.ensure().await?;
        self.call(
            "look at the volume",
            CALL_TIMEOUT,
            |mut client| async move { client.probe_volume(request).await },
        )
        .await
    }

    /// Makes a volume this cluster's and certifies its fence.
    ///
    /// # Errors
    /// When the volume is another cluster's, read-only, full or unreachable.
    pub async fn adopt_volume(
        &self,
        request: wire::AdoptVolumeRequest,
    ) -> Result<wire::AdoptVolumeReply, BrokerError> {
        self.ensure().await?;
        self.call("adopt the volume", ADOPT_TIMEOUT, |mut client| async move {
            client.adopt_volume(request).await
        })
        .await
    }
}

/// A volume as the broker and the monitors are told of it.
pub fn volume(state: &ClusterState, volume: &cluster_model::Volume) -> wire::Volume {
    wire::Volume {
        url: volume.url.clone(),
        cluster_id: state
            .cluster
            .as_ref()
            .map_or_else(String::new, |cluster| cluster.id.clone()),
        broker_uid: state
            .cluster
            .as_ref()
            .map_or(0, |cluster| cluster.broker_uid),
        fence_class: volume.fence.as_str().to_owned(),
        tls_ca: volume.tls_ca.clone().unwrap_or_default(),
    }
}

/// The disk files of a machine, in the order of its disks.
///
/// # Errors
/// [`BrokerError::NoVolume`].
pub fn files(state: &ClusterState, vm: &Vm) -> Result<Vec<wire::File>, BrokerError> {
    vm.spec
        .disks
        .iter()
        .map(|disk| {
            let known = state
                .volume_named(&disk.volume)
                .ok_or_else(|| BrokerError::NoVolume {
                    vm: vm.id,
                    volume: disk.volume.to_string(),
                })?;
            Ok(wire::File {
                volume: Some(volume(state, known)),
                path: disk.path.clone(),
            })
        })
        .collect()
}
