//! The monitor processes of this node: started detached, found again, watched, ended.
//!
//! Each has a folder `<data>/vms/<name>/` with its configuration, log and control socket. The folder's
//! path is on the process's command line, by which a later life of this daemon finds it in `/proc`. A
//! monitor is gone when its process is; one that does not answer is kept as it last described itself.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cluster_model::{MigrationId, Token, VmId};
use proto::monitor as wire;
use proto::monitor::monitor_client::MonitorClient;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::confine::{self, Confiner};
use crate::machine_file::MachineFile;
use crate::process;

/// How long a started monitor may take to describe itself: it reserves its memory first.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// A monitor found at start that does not answer for this long is ended: nothing is known of it.
const FOUND_TIMEOUT: Duration = Duration::from_secs(10);
/// Ordinary calls.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// A re-key sends every held write again.
const REKEY_TIMEOUT: Duration = Duration::from_secs(30);
/// A monitor may take this long to end by itself before it is killed.
const QUIT_TIMEOUT: Duration = Duration::from_secs(2);
/// A killed process is gone within this time, unless it hangs in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Without an answer a watch is tried again after this pause.
const WATCH_PAUSE: Duration = Duration::from_millis(50);
/// A watched monitor says something every second; silence for longer is a broken connection.
const WATCH_SILENCE: Duration = Duration::from_secs(5);
/// How often the control groups of an ended monitor are tried to be removed...
const GROUP_TRIES: u32 = 20;
/// ...and how long after one another.
const GROUP_PAUSE: Duration = Duration::from_millis(100);
/// Folders of ended monitors that are kept for their logs.
const ENDED_KEPT: usize = 64;
/// What of a log's end goes into an error.
const LOG_TAIL_BYTES: u64 = 2_048;

/// A running monitor. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Monitor {
    folder: Arc<Path>,
    /// Its process.
    pub pid: u32,
    /// As it last described itself.
    pub status: Arc<wire::MonitorStatus>,
    /// The migration that it was started to receive, if it was.
    pub incoming: Option<MigrationId>,
    client: MonitorClient<Channel>,
}

/// Every monitor of this node, by nonce.
pub type Table = Arc<BTreeMap<u64, Monitor>>;

/// Why a monitor did not do something.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// It could not be started.
    #[error("cannot start a monitor in {}: {why}", folder.display())]
    NotStarted {
        /// Its folder.
        folder: PathBuf,
        /// What happened, with the end of its log.
        why: String,
    },
    /// It is not there any more.
    #[error("the monitor with nonce {nonce:016x} is gone")]
    Gone {
        /// Which.
        nonce: u64,
    },
    /// It did not answer in time.
    #[error("the monitor of {vm} (pid {pid}) did not {what} within {} ms", within.as_millis())]
    TimedOut {
        /// Its machine.
        vm: VmId,
        /// Its process.
        pid: u32,
        /// What was asked.
        what: &'static str,
        /// The limit.
        within: Duration,
    },
    /// It refused.
    #[error("the monitor of {vm} (pid {pid}) did not {what}: {}", status.message())]
    Refused {
        /// Its machine.
        vm: VmId,
        /// Its process.
        pid: u32,
        /// What was asked.
        what: &'static str,
        /// What it says.
        status: Box<tonic::Status>,
    },
    /// Its process is still there after SIGKILL.
    #[error("process {pid} of {vm} does not end; it hangs in the kernel, perhaps on its storage")]
    Immortal {
        /// Its machine.
        vm: VmId,
        /// Its process.
        pid: u32,
    },
}

impl Monitor {
    /// Its machine.
    pub fn vm(&self) -> VmId {
        VmId(self.status.vm_id)
    }

    /// The token that its disks are under.
    pub fn token(&self) -> Token {
        Token(self.status.token)
    }

    /// Drawn when it started.
    pub fn nonce(&self) -> u64 {
        self.status.nonce
    }

    /// The migration it has, or last had, a part in.
    pub fn migration(&self) -> Option<MigrationId> {
        let progress = self.status.migration.as_ref();
        progress
            .map(|progress| MigrationId(progress.migration_id))
            .or(self.incoming)
    }

    /// The name of its folder.
    pub fn name(&self) -> &str {
        let name = self.folder.file_name();
        name.and_then(std::ffi::OsStr::to_str).unwrap_or_default()
    }

    async fn call<T, F>(
        &self,
        what: &'static str,
        within: Duration,
        call: impl FnOnce(MonitorClient<Channel>) -> F,
    ) -> Result<T, MonitorError>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let (vm, pid) = (self.vm(), self.pid);
        match tokio::time::timeout(within, call(self.client.clone())).await {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(status)) => Err(MonitorError::Refused {
                vm,
                pid,
                what,
                status: Box::new(status),
            }),
            Err(_) => Err(MonitorError::TimedOut {
                vm,
                pid,
                what,
                within,
            }),
        }
    }

    /// Lets the guest run. Only [`crate::permit::RunPermit::send`] calls it.
    pub(crate) async fn run(
        &self,
        permit: wire::RunPermit,
    ) -> Result<wire::RunReply, MonitorError> {
        self.call("run", CALL_TIMEOUT, |mut client| async move {
            client.run(permit).await
        })
        .await
    }

    /// Moves the lease deadline, for the life of `clusterd` that registered by entry `session`.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub async fn extend_lease(
        &self,
        lease_deadline_ns: u64,
        session: u64,
    ) -> Result<(), MonitorError> {
        let request = wire::ExtendLeaseRequest {
            token: self.status.token,
            lease_deadline_ns,
            nonce: self.nonce(),
            session,
        };
        self.call("extend its lease", CALL_TIMEOUT, |mut client| async move {
            client.extend_lease(request).await
        })
        .await
        .map(drop)
    }

    /// Moves the lease deadline back, if it is later; from then on it obeys no earlier life of `clusterd`.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub async fn shorten_lease(
        &self,
        lease_deadline_ns: u64,
        session: u64,
    ) -> Result<(), MonitorError> {
        let request = wire::ShortenLeaseRequest {
            nonce: self.nonce(),
            lease_deadline_ns,
            session,
        };
        self.call(
            "move its deadline back",
            CALL_TIMEOUT,
            |mut client| async move { client.shorten_lease(request).await },
        )
        .await
        .map(drop)
    }

    /// Gives it a newer token, already claimed and confirmed.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub async fn rekey(&self, token: Token) -> Result<(), MonitorError> {
        let request = wire::RekeyRequest {
            token: token.0,
            nonce: self.nonce(),
        };
        self.call(
            "take up its token",
            REKEY_TIMEOUT,
            |mut client| async move { client.rekey(request).await },
        )
        .await
        .map(drop)
    }

    /// Tells an incoming one which monitor will send; it lets in nobody else.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub async fn expect_source(
        &self,
        migration: MigrationId,
        fingerprint: Vec<u8>,
    ) -> Result<(), MonitorError> {
        let request = wire::ExpectSourceRequest {
            migration_id: migration.0,
            fingerprint,
        };
        self.call("expect its source", CALL_TIMEOUT, |mut client| async move {
            client.expect_source(request).await
        })
        .await
        .map(drop)
    }

    /// Begins to send the machine.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub async fn send_migration(
        &self,
        request: wire::SendMigrationRequest,
    ) -> Result<(), MonitorError> {
        self.call("send its machine", CALL_TIMEOUT, |mut client| async move {
            client.send_migration(request).await
        })
        .await
        .map(drop)
    }

    /// Ends the sending; `true` when it had said quiet.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub async fn cancel_migration(
        &self,
        migration: MigrationId,
        reason: &str,
    ) -> Result<bool, MonitorError> {
        let request = wire::CancelMigrationRequest {
            migration_id: migration.0,
            reason: reason.to_owned(),
        };
        self.call("end its sending", CALL_TIMEOUT, |mut client| async move {
            client.cancel_migration(request).await
        })
        .await
        .map(|reply| reply.said_quiet)
    }

    /// Asks the guest to stop; the monitor says STOPPED when its disks are flushed.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub async fn stop(&self, token: Token, force: bool) -> Result<(), MonitorError> {
        let request = wire::StopRequest {
            token: token.0,
            force,
        };
        self.call("stop", CALL_TIMEOUT, |mut client| async move {
            client.stop(request).await
        })
        .await
        .map(drop)
    }

    /// The serial console.
    ///
    /// # Errors
    /// What the monitor says.
    pub async fn console(
        &self,
        input: impl futures::Stream<Item = wire::ConsoleInput> + Send + 'static,
    ) -> Result<tonic::Streaming<wire::ConsoleOutput>, tonic::Status> {
        let mut client = self.client.clone();
        client.console(input).await.map(tonic::Response::into_inner)
    }

    /// How it stands now.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub async fn describe(&self) -> Result<wire::MonitorStatus, MonitorError> {
        self.call("describe itself", CALL_TIMEOUT, |mut client| async move {
            client.describe(wire::DescribeRequest {}).await
        })
        .await
    }

    fn is_gone(&self) -> bool {
        process::is_gone(self.pid, &self.folder)
    }
}

/// The monitors of this node. Clones are the same.
#[derive(Clone, Debug)]
pub struct Monitors {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    program: PathBuf,
    folder: PathBuf,
    confiner: Confiner,
    table: watch::Sender<Table>,
    watches: Mutex<JoinSet<()>>,
}

impl Monitors {
    /// Looks for every monitor that an earlier life of this daemon left running. Returns when each has
    /// described itself, or was ended because it did not.
    ///
    /// # Errors
    /// When the folder cannot be made or read.
    pub async fn recover(
        program: PathBuf,
        data_dir: &Path,
        confiner: Confiner,
    ) -> std::io::Result<Monitors> {
        let folder = data_dir.join("vms");
        private_folder(&folder)?;
        let monitors = Monitors {
            inner: Arc::new(Inner {
                program,
                folder: folder.clone(),
                confiner,
                table: watch::channel(Table::default()).0,
                watches: Mutex::default(),
            }),
        };
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&folder)? {
            let folder: Arc<Path> = entry?.path().into();
            for pid in process::of_folder(&folder) {
                found.push(monitors.find_again(folder.clone(), pid));
            }
        }
        futures::future::join_all(found).await;
        monitors.forget_ended();
        // None is being started yet, so a group without a process is a leftover.
        monitors.inner.confiner.groups.sweep();
        Ok(monitors)
    }

    async fn find_again(&self, folder: Arc<Path>, pid: u32) {
        let client = client(&folder);
        let is_alive = || process::belongs(pid, &folder);
        match first_status(&client, is_alive, FOUND_TIMEOUT).await {
            Ok(status) => {
                tracing::info!(pid, vm = status.vm_id, phase = ?status.phase(), "found a monitor again");
                self.watch(folder, pid, status, client);
            }
            Err(why) => {
                tracing::warn!(pid, folder = %folder.display(), why, "ending a monitor that does not answer");
                process::kill(pid, &folder);
                process::wait_gone(pid, &folder, KILL_TIMEOUT).await;
            }
        }
    }

    /// What confines them.
    pub fn confiner(&self) -> &Confiner {
        &self.inner.confiner
    }

    /// Every monitor of this node; changes are published.
    pub fn table(&self) -> watch::Receiver<Table> {
        self.inner.table.subscribe()
    }

    /// The monitor with that nonce.
    ///
    /// # Errors
    /// [`MonitorError::Gone`].
    pub fn get(&self, nonce: u64) -> Result<Monitor, MonitorError> {
        let table = self.inner.table.borrow();
        table
            .get(&nonce)
            .cloned()
            .ok_or(MonitorError::Gone { nonce })
    }

    /// Starts a monitor in the folder `name` for the machine of `file`, confined as far as this host lets it,
    /// and waits until it has described itself.
    ///
    /// # Errors
    /// When it ends or does not answer in time; it is then ended.
    pub async fn spawn(
        &self,
        name: &str,
        file: MachineFile,
        incoming: bool,
    ) -> Result<Monitor, MonitorError> {
        let folder: Arc<Path> = self.inner.folder.join(name).into();
        let failed = |why: String| MonitorError::NotStarted {
            folder: folder.to_path_buf(),
            why,
        };
        let mut child = match self.start_process(name, &folder, file, incoming).await {
            Ok(child) => child,
            Err(error) => {
                self.remove_groups(name.to_owned());
                return Err(failed(error.to_string()));
            }
        };
        let pid = child
            .id()
            .ok_or_else(|| failed("it ended at once".to_owned()))?;
        let client = client(&folder);
        // Asked of the child itself: a process has no command line for a moment after it began.
        let is_alive = || matches!(child.try_wait(), Ok(None));
        match first_status(&client, is_alive, START_TIMEOUT).await {
            Ok(status) => {
                tracing::info!(pid, vm = status.vm_id, incoming, "monitor started");
                for measure in status.measures.iter().filter(|measure| !measure.applied) {
                    tracing::warn!(
                        vm = status.vm_id,
                        measure = measure.name,
                        why = measure.detail,
                        "a monitor is not confined in every way"
                    );
                }
                let nonce = status.nonce;
                self.watch(folder, pid, status, client);
                self.get(nonce)
            }
            Err(why) => {
                let _ = child.start_kill();
                let _ = tokio::time::timeout(KILL_TIMEOUT, child.wait()).await;
                self.remove_groups(name.to_owned());
                Err(failed(format!("{why}{}", log_tail(&folder))))
            }
        }
    }

    async fn start_process(
        &self,
        name: &str,
        folder: &Path,
        file: MachineFile,
        incoming: bool,
    ) -> std::io::Result<tokio::process::Child> {
        private_folder(folder)?;
        let confiner = &self.inner.confiner;
        let mut confinement = confiner.prepare(name, file.vm, &file.limits);
        let (groups, name) = (confiner.groups.clone(), name.to_owned());
        let config_path = folder.join("config.json");
        let log = private_file(&folder.join("log"), |options| options.append(true))?;
        let mut command = tokio::process::Command::new(&self.inner.program);
        command.arg("--config").arg(&config_path);
        command.arg("--control").arg(socket(folder));
        if incoming {
            command.arg("--incoming");
        }
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Signals to this daemon's terminal are not for it; and it is not killed when dropped.
            .process_group(0);
        confine::in_own_pid_namespace(move |measure| {
            confinement.measures.push(measure);
            let contents = file.confined(&confinement);
            private_file(&config_path, |options| options.write(true).truncate(true))?
                .write_all(&contents)?;
            let child = command.spawn()?;
            // Before it has read its machine file; what it took until then counts where this daemon does.
            if let Some(pid) = child.id()
                && let Err(error) = groups.join(&name, pid)
            {
                tracing::warn!(%error, "a monitor runs without its limits; see: clusterctl node check");
            }
            Ok(child)
        })
        .await
    }

    /// Removes the control groups of an ended monitor: soon, for what ends is still in them for a moment.
    fn remove_groups(&self, name: String) {
        let groups = self.inner.confiner.groups.clone();
        if groups.remove(&name) {
            return;
        }
        tokio::spawn(async move {
            for _ in 0..GROUP_TRIES {
                tokio::time::sleep(GROUP_PAUSE).await;
                if groups.remove(&name) {
                    return;
                }
            }
            tracing::debug!(
                name,
                "the control group of an ended monitor stays until the next start"
            );
        });
    }

    /// Enters a monitor into the table and follows it until its process is gone.
    fn watch(
        &self,
        folder: Arc<Path>,
        pid: u32,
        mut status: wire::MonitorStatus,
        client: MonitorClient<Channel>,
    ) {
        // In a PID namespace of its own it calls itself 1.
        status.pid = pid;
        let monitor = Monitor {
            incoming: incoming_of(&folder),
            folder,
            pid,
            status: Arc::new(status),
            client,
        };
        let nonce = monitor.nonce();
        self.inner.table.send_modify(|table| {
            Arc::make_mut(table).insert(nonce, monitor.clone());
        });
        let monitors = self.clone();
        let mut watches = self.watches();
        // Those that ended take no room.
        while watches.try_join_next().is_some() {}
        watches.spawn(async move {
            while !monitor.is_gone() {
                monitors.follow(&monitor).await;
                if !monitor.is_gone() {
                    tokio::time::sleep(WATCH_PAUSE).await;
                }
            }
            monitors.remove(&monitor);
        });
    }

    fn watches(&self) -> std::sync::MutexGuard<'_, JoinSet<()>> {
        self.inner
            .watches
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches no monitor any more: this life of the daemon ends, the monitors go on.
    pub fn let_go(&self) {
        self.watches().abort_all();
    }

    /// Takes in what a monitor says until its stream ends or is silent for too long.
    async fn follow(&self, monitor: &Monitor) {
        let mut client = monitor.client.clone();
        let asked = tokio::time::timeout(CALL_TIMEOUT, client.watch(wire::WatchRequest {})).await;
        let Ok(Ok(stream)) = asked else { return };
        let mut stream = stream.into_inner();
        while let Ok(Ok(Some(status))) = tokio::time::timeout(WATCH_SILENCE, stream.message()).await
        {
            if !self.take_in(status, monitor.nonce()) {
                return;
            }
        }
    }

    fn take_in(&self, mut status: wire::MonitorStatus, nonce: u64) -> bool {
        if status.nonce != nonce {
            tracing::warn!(
                vm = status.vm_id,
                "another monitor answers on this one's socket"
            );
            return false;
        }
        self.inner.table.send_if_modified(|table| {
            let known = table.get(&nonce);
            if let Some(known) = known {
                status.pid = known.pid;
            }
            let differs = known.is_some_and(|known| *known.status != status);
            if differs && let Some(monitor) = Arc::make_mut(table).get_mut(&nonce) {
                monitor.status = Arc::new(status);
            }
            differs
        });
        true
    }

    /// Asks a monitor how it stands and enters the answer, so that what is decided next sees the effect
    /// of what was just done.
    pub async fn refresh(&self, nonce: u64) {
        let Ok(monitor) = self.get(nonce) else { return };
        match monitor.describe().await {
            Ok(status) => {
                self.take_in(status, nonce);
            }
            Err(error) => tracing::debug!(%error, "a monitor was not refreshed"),
        }
    }

    fn remove(&self, monitor: &Monitor) {
        let nonce = monitor.nonce();
        let removed = self.inner.table.send_if_modified(|table| {
            table.contains_key(&nonce) && Arc::make_mut(table).remove(&nonce).is_some()
        });
        if removed {
            tracing::info!(pid = monitor.pid, vm = %monitor.vm(), "a monitor is gone");
            let _ = std::fs::remove_file(socket(&monitor.folder));
            self.remove_groups(monitor.name().to_owned());
            self.forget_ended();
        }
    }

    /// Ends a monitor: asks it to quit, kills it when it does not, and waits until it is gone.
    ///
    /// # Errors
    /// [`MonitorError::Immortal`]; a monitor that is gone already is no error.
    pub async fn end(&self, nonce: u64, reason: &str) -> Result<(), MonitorError> {
        let Ok(monitor) = self.get(nonce) else {
            return Ok(());
        };
        let request = wire::QuitRequest {
            token: monitor.status.token,
            reason: reason.to_owned(),
        };
        let quit = monitor
            .call("quit", QUIT_TIMEOUT, |mut client| async move {
                client.quit(request).await
            })
            .await;
        let asked = quit.is_ok();
        if !asked || !process::wait_gone(monitor.pid, &monitor.folder, QUIT_TIMEOUT).await {
            if let Err(error) = quit {
                tracing::debug!(%error, "killing a monitor");
            }
            process::kill(monitor.pid, &monitor.folder);
            if !process::wait_gone(monitor.pid, &monitor.folder, KILL_TIMEOUT).await {
                return Err(MonitorError::Immortal {
                    vm: monitor.vm(),
                    pid: monitor.pid,
                });
            }
        }
        self.remove(&monitor);
        Ok(())
    }

    /// The end of the log of a monitor that failed, for people.
    pub fn log_tail(&self, name: &str) -> String {
        log_tail(&self.inner.folder.join(name))
    }

    /// Removes the folders of ended monitors but the newest.
    fn forget_ended(&self) {
        let Ok(entries) = std::fs::read_dir(&self.inner.folder) else {
            return;
        };
        let table = self.inner.table.borrow().clone();
        let alive: Vec<&Path> = table.values().map(|monitor| &*monitor.folder).collect();
        let mut ended: Vec<(std::time::SystemTime, PathBuf)> = entries
            .flatten()
            .filter(|entry| !alive.contains(&entry.path().as_path()))
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .collect();
        ended.sort();
        let surplus = ended.len().saturating_sub(ENDED_KEPT);
        for (_, folder) in ended.into_iter().take(surplus) {
            if process::of_folder(&folder).is_empty() {
                let _ = std::fs::remove_dir_all(folder);
            }
        }
    }
}

/// The name of the folder of a monitor that is started under `token`.
pub fn name_of_start(vm: VmId, token: Token) -> String {
    format!("{vm}-{token}")
}

/// The name of the folder of a monitor that receives a migration.
pub fn name_of_incoming(vm: VmId, migration: MigrationId) -> String {
    format!("{vm}-{migration}")
}

fn incoming_of(folder: &Path) -> Option<MigrationId> {
    let (_, number) = folder.file_name()?.to_str()?.rsplit_once("-m-")?;
    number.parse().ok().map(MigrationId)
}

/// Makes a folder that nobody else may look into, or takes it from everybody else.
fn private_folder(folder: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    // It may be there already, of an earlier version or another umask.
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))
}

/// Opens a file that nobody else may read, and makes it where there is none.
fn private_file(
    path: &Path,
    how: impl FnOnce(&mut OpenOptions) -> &mut OpenOptions,
) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    how(&mut options).create(true).mode(0o600).open(path)
}

fn socket(folder: &Path) -> PathBuf {
    folder.join("ctl")
}

fn client(folder: &Path) -> MonitorClient<Channel> {
    MonitorClient::new(proto::unix::channel(socket(folder)))
}

async fn first_status(
    client: &MonitorClient<Channel>,
    mut is_alive: impl FnMut() -> bool,
    within: Duration,
) -> Result<wire::MonitorStatus, String> {
    let deadline = tokio::time::Instant::now() + within;
    let mut pause = Duration::from_millis(2);
    loop {
        let mut client = client.clone();
        let described =
            tokio::time::timeout_at(deadline, client.describe(wire::DescribeRequest {}));
        let why = match described.await {
            Ok(Ok(status)) => return Ok(status.into_inner()),
            Ok(Err(status)) => status.message().to_owned(),
            Err(_) => "no answer".to_owned(),
        };
        if !is_alive() {
            return Err("it ended".to_owned());
        }
        if tokio::time::Instant::now() >= deadline {
            return Err(format!(
                "it does not answer within {} s: {why}",
                within.as_secs()
            ));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

fn log_tail(folder: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut log = std::fs::File::open(folder.join("log"))?;
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut tail = Vec::new();
        log.take(LOG_TAIL_BYTES).read_to_end(&mut tail)?;
        Ok(String::from_utf8_lossy(&tail).trim().to_owned())
    };
    match read() {
        Ok(tail) if !tail.is_empty() => format!("; its log ends: {tail}"),
        _ => String::new(),
    }
}
