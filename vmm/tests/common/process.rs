//! Monitors as processes of their own, killed when dropped.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use proto::monitor::monitor_client::MonitorClient;
use proto::monitor::{
    DescribeRequest, ExpectSourceRequest, ExtendLeaseRequest, MonitorStatus, Phase, RekeyRequest,
    RunPermit, SendMigrationRequest, ShortenLeaseRequest,
};
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tonic::transport::Channel;
use vmm::clock;
use vmm::run_log::{self, Spell};

/// Longer than anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A lease that no test outlives.
pub const LEASE: Duration = Duration::from_secs(600);

/// A running monitor.
pub struct Process {
    child: Child,
    pub client: MonitorClient<Channel>,
    pub nonce: u64,
    runs: PathBuf,
}

/// The machine file of a self-checking guest with `memory_mib`, and its disk in `directory` if it has any.
pub fn machine_file(directory: &Path, memory_mib: u64, dirty_mib_s: u32, disk_mib: u64) -> Value {
    let mut file = json!({
        "vm_id": 1, "vm_name": "checked", "node_id": 1, "node_uid": 60001, "token": 5,
        "memory_mib": memory_mib, "vcpus": 1,
        "boot": {"self-check": {"working_set_mib": memory_mib / 2, "dirty_mib_s": dirty_mib_s}},
        "witness": directory.join("witness"),
        "log": "debug,h2=info,tower=info,hyper_util=info",
    });
    if disk_mib > 0 {
        let path = directory.join("disk.raw");
        if !path.exists() {
            let image = std::fs::File::create(&path).expect("an image");
            image.set_len(disk_mib << 20).expect("room for an image");
        }
        file["disks"] = json!([{
            "volume": format!("dir:{}", directory.display()), "path": "disk.raw", "cluster_id": "test",
            "broker_uid": 60000, "fence_class": "none", "size_bytes": disk_mib << 20,
        }]);
    }
    file
}

impl Process {
    /// Starts a monitor and waits until it answers.
    pub async fn start(directory: &Path, name: &str, file: &Value, failpoints: &str) -> Process {
        Process::start_with(directory, name, file, &[("BATON_FAILPOINTS", failpoints)]).await
    }

    /// Starts a monitor with these variables and waits until it answers; it writes down when its guest executes.
    pub async fn start_with(
        directory: &Path,
        name: &str,
        file: &Value,
        environment: &[(&str, &str)],
    ) -> Process {
        let config = directory.join(format!("{name}.json"));
        std::fs::write(&config, file.to_string()).expect("a machine file");
        let socket: PathBuf = directory.join(format!("{name}.sock"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
        command
            .arg("--config")
            .arg(&config)
            .arg("--control")
            .arg(&socket);
        if file.get("incoming").is_some() {
            command.arg("--incoming");
        }
        let log = std::fs::File::create(directory.join(format!("{name}.log"))).expect("a log");
        let child = command
            .envs(environment.iter().copied())
            .env(run_log::VARIABLE, "1")
            .env_remove("RUST_LOG")
            .stderr(Stdio::from(log))
            .kill_on_drop(true)
            .spawn()
            .expect("a monitor");
        let mut process = Process {
            child,
            client: MonitorClient::new(proto::unix::channel(&socket)),
            nonce: 0,
            runs: socket.with_extension(run_log::EXTENSION),
        };
        let begun = std::time::Instant::now();
        loop {
            if let Ok(status) = process.client.describe(DescribeRequest {}).await {
                process.nonce = status.into_inner().nonce;
                return process;
            }
            if let Ok(Some(status)) = process.child.try_wait() {
                let log = std::fs::read_to_string(directory.join(format!("{name}.log")));
                panic!("monitor {name} ended with {status}: {log:?}");
            }
            assert!(begun.elapsed() < PATIENCE, "monitor {name} does not answer");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// How it stands.
    pub async fn status(&mut self) -> MonitorStatus {
        self.client
            .describe(DescribeRequest {})
            .await
            .expect("a status")
            .into_inner()
    }

    /// Waits until its status is as wanted.
    pub async fn wait(
        &mut self,
        what: &str,
        wanted: impl Fn(&MonitorStatus) -> bool,
    ) -> MonitorStatus {
        let begun = std::time::Instant::now();
        loop {
            let status = self.status().await;
            if wanted(&status) {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "not {what}: {status:#?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits for a phase.
    pub async fn wait_phase(&mut self, phase: Phase) -> MonitorStatus {
        self.wait(phase.as_str_name(), |status| status.phase() == phase)
            .await
    }

    /// A permit for it.
    pub fn permit(&self, token: u32, lease: Duration) -> RunPermit {
        let lease_deadline_ns = clock::boottime_ns() + lease.as_nanos() as u64;
        RunPermit {
            vm_id: 1,
            token,
            log_index: 1,
            lease_deadline_ns,
            nonce: self.nonce,
        }
    }

    /// Lets it run.
    pub async fn run(&mut self, token: u32, lease: Duration) -> Result<u64, tonic::Status> {
        let permit = self.permit(token, lease);
        Ok(self.client.run(permit).await?.into_inner().running_since_ns)
    }

    /// Moves its deadline.
    pub async fn extend(&mut self, token: u32, lease: Duration) -> Result<Phase, tonic::Status> {
        let lease_deadline_ns = clock::boottime_ns() + lease.as_nanos() as u64;
        let request = ExtendLeaseRequest {
            token,
            lease_deadline_ns,
            nonce: self.nonce,
            session: 0,
        };
        Ok(self
            .client
            .extend_lease(request)
            .await?
            .into_inner()
            .phase())
    }

    /// Moves its deadline back, as the life of `clusterd` that registered by entry `session`.
    pub async fn shorten(&mut self, session: u64, lease: Duration) -> Result<(), tonic::Status> {
        let request = ShortenLeaseRequest {
            nonce: self.nonce,
            lease_deadline_ns: clock::boottime_ns() + lease.as_nanos() as u64,
            session,
        };
        self.client.shorten_lease(request).await?;
        Ok(())
    }

    /// Gives it a newer token.
    pub async fn rekey(&mut self, token: u32) -> Result<(), tonic::Status> {
        let request = RekeyRequest {
            token,
            nonce: self.nonce,
        };
        self.client.rekey(request).await?;
        Ok(())
    }

    /// Sends its machine to `destination`.
    pub async fn send_to(
        &mut self,
        id: u64,
        destination: &mut Process,
    ) -> Result<(), tonic::Status> {
        let source_fingerprint = self.status().await.channel_fingerprint;
        destination.expect(id, source_fingerprint).await?;
        let there = destination.status().await;
        self.send_to_monitor(id, &there).await
    }

    /// Has it let in the source with that certificate.
    pub async fn expect(&mut self, id: u64, fingerprint: Vec<u8>) -> Result<(), tonic::Status> {
        let request = ExpectSourceRequest {
            migration_id: id,
            fingerprint,
        };
        self.client.expect_source(request).await?;
        Ok(())
    }

    /// Sends its machine to the monitor that described itself so.
    pub async fn send_to_monitor(
        &mut self,
        id: u64,
        there: &MonitorStatus,
    ) -> Result<(), tonic::Status> {
        let request = SendMigrationRequest {
            migration_id: id,
            addresses: there.incoming_addresses.clone(),
            ticket: ticket(id).to_vec(),
            destination_fingerprint: there.channel_fingerprint.clone(),
            ..Default::default()
        };
        self.client.send_migration(request).await?;
        Ok(())
    }

    /// The executions of its guest so far.
    pub fn spells(&self) -> Vec<Spell> {
        let runs = run_log::read(&self.runs).expect("a log of runs");
        runs.vcpus.into_iter().flatten().collect()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = self.child.id().expect("it lives");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal).expect("a signal");
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> std::process::ExitStatus {
        tokio::time::timeout(PATIENCE, self.child.wait())
            .await
            .expect("an end")
            .expect("a status")
    }
}

/// The ticket of migration `id`.
pub fn ticket(id: u64) -> [u8; 32] {
    [id as u8; 32]
}

/// `file` as a destination of migration `id` under `token`.
pub fn incoming(file: &Value, id: u64, token: u32) -> Value {
    let mut file = file.clone();
    let digits: String = ticket(id)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    file["incoming"] = json!({"migration_id": id, "ticket": digits, "listen": ["127.0.0.1:0"]});
    file["token"] = json!(token);
    file
}
