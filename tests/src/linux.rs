//! The Linux guest in a test: where its kernel lies, a machine that boots it, and its console.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clusterctl::client::change;
use proto::admin::{VmConsoleInput, VmConsoleOutput, VmCreateRequest};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::cluster::TestCluster;

/// How long the guest may take to boot, or to answer at its prompt: where kernel mode is emulated a
/// boot takes 7 s, and 75 s on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// What the guest's shell prints when it waits for a command.
pub const PROMPT: &str = "guest# ";

/// The kernel's command line; the monitor appends the devices. The processor features that are taken
/// away, and the rest, are what a software KVM cannot emulate; ordinary KVM does without them as well.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 noxsave clearcpuid=smap,smep,cx16,popcnt \
     tsc=reliable no_timer_check lpj=10000000 rodata=off mem=64M";

/// The guest's worker writes a ring of 1 MiB.
const DISK_BYTES: u64 = 16 << 20;

/// The files to boot.
#[derive(Clone, Debug)]
pub struct LinuxGuest {
    kernel: PathBuf,
    initrd: PathBuf,
}

/// A network interface for the guest.
#[derive(Clone, Copy, Debug)]
pub struct Nic<'a> {
    /// The bridge, as the nodes know it.
    pub bridge: &'a str,
    /// The guest's MAC address.
    pub mac: &'a str,
    /// Its IPv4 address, with 24 bits of network.
    pub ip: &'a str,
}

impl LinuxGuest {
    /// The guest in the folder `BATON_LINUX_GUEST`, or the one that `cargo xtask guest linux` builds or has built.
    ///
    /// # Errors
    /// When it cannot be built; the message says what it needs.
    pub fn find() -> anyhow::Result<LinuxGuest> {
        let folder = match std::env::var_os("BATON_LINUX_GUEST") {
            Some(folder) => PathBuf::from(folder),
            None => built()?,
        };
        let guest = LinuxGuest {
            kernel: folder.join("vmlinux"),
            initrd: folder.join("initramfs.cpio"),
        };
        for path in [&guest.kernel, &guest.initrd] {
            ensure!(
                path.is_file(),
                "there is no {}: cargo xtask guest linux",
                path.display()
            );
        }
        Ok(guest)
    }

    /// Creates a machine that boots it and waits until it runs; its Linux is then still booting.
    ///
    /// # Errors
    /// When it does not come to run.
    pub async fn create(
        &self,
        cluster: &TestCluster,
        name: &str,
        nic: Option<Nic<'_>>,
    ) -> anyhow::Result<()> {
        let address = nic.map_or(String::new(), |nic| format!(" baton.ip={}", nic.ip));
        let nics: Vec<_> = nic
            .iter()
            .map(|nic| json!({ "bridge": nic.bridge, "mac": nic.mac }))
            .collect();
        let spec = json!({
            "vcpus": 1,
            "memory_mib": 80,
            "boot": { "linux": {
                "kernel": self.kernel, "initrd": self.initrd, "cmdline": format!("{COMMAND_LINE}{address}"),
            } },
            "disks": [{ "volume": "vol-a", "path": format!("{name}.raw"), "size_bytes": DISK_BYTES }],
            "nics": nics,
            "priority": 500,
        });
        let request = VmCreateRequest {
            change: Some(change(None, "test")),
            name: name.into(),
            spec_json: spec.to_string(),
            images: Default::default(),
            start: true,
        };
        cluster.api().await?.api.vm_create(request).await?;
        cluster.wait_running(name).await?;
        Ok(())
    }
}

/// Lets `cargo xtask guest linux` say where the guest lies.
fn built() -> anyhow::Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["xtask", "guest", "linux"])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo xtask guest linux")?;
    ensure!(output.status.success(), "cargo xtask guest linux failed");
    let text = String::from_utf8(output.stdout)?;
    let kernel = text
        .lines()
        .find(|line| line.ends_with("/vmlinux"))
        .context("cargo xtask guest linux names no kernel")?;
    Path::new(kernel)
        .parent()
        .map(Path::to_path_buf)
        .context("the kernel lies nowhere")
}

/// A machine's serial console, with all that was read from it.
pub struct Terminal {
    typed: mpsc::Sender<VmConsoleInput>,
    output: tonic::Streaming<VmConsoleOutput>,
    text: String,
    seen: usize,
}

/// What the guest's worker says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// How often it has checked and rewritten its memory.
    pub rounds: u64,
    /// What it found wrong.
    pub errors: u64,
    /// The last block that it wrote and flushed.
    pub block: u64,
    /// The longest time between two of its turns, µs.
    pub gap_us: u64,
}

impl Terminal {
    /// Opens a machine's console.
    ///
    /// # Errors
    /// When the machine does not run.
    pub async fn open(cluster: &TestCluster, vm: &str) -> anyhow::Result<Terminal> {
        let (typed, input) = mpsc::channel(4);
        typed
            .send(VmConsoleInput {
                name: vm.into(),
                data: Vec::new(),
            })
            .await?;
        let mut api = cluster.api().await?;
        let output = api
            .api
            .vm_console(ReceiverStream::new(input))
            .await?
            .into_inner();
        Ok(Terminal {
            typed,
            output,
            text: String::new(),
            seen: 0,
        })
    }

    /// Types a line.
    ///
    /// # Errors
    /// When the console is closed.
    pub async fn type_line(&self, line: &str) -> anyhow::Result<()> {
        let data = format!("{line}\n").into_bytes();
        let input = VmConsoleInput {
            name: String::new(),
            data,
        };
        Ok(self.typed.send(input).await?)
    }

    /// Reads until the console has said `wanted`, behind what earlier waits found; answers what came before it.
    ///
    /// # Errors
    /// When it does not within [`PATIENCE`], or the console closes.
    pub async fn wait_for(&mut self, wanted: &str) -> anyhow::Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.text[self.seen..].find(wanted) {
                let before = self.text[self.seen..self.seen + at].to_owned();
                self.seen += at + wanted.len();
                return Ok(before);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match tokio::time::timeout(left, self.output.message()).await {
                Ok(Ok(Some(output))) => self.text.push_str(&String::from_utf8_lossy(&output.data)),
                Ok(end) => bail!(
                    "the console ended ({end:?}) without `{wanted}`:\n{}",
                    self.text
                ),
                Err(_) => bail!("no `{wanted}` within {PATIENCE:?}:\n{}", self.text),
            }
        }
    }

    /// Runs a command in the guest's shell; answers what it printed.
    ///
    /// # Errors
    /// When the prompt does not come back.
    pub async fn run(&mut self, command: &str) -> anyhow::Result<String> {
        self.type_line(command).await?;
        // The line itself comes back first.
        self.wait_for("\n").await?;
        self.wait_for(PROMPT).await
    }

    /// Asks for the worker's status.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub async fn status(&mut self) -> anyhow::Result<Status> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = self.run("cat /tmp/status").await?;
            // The file is not there at first, and empty for a moment whenever the worker writes it anew.
            match Status::parse(&text) {
                Some(status) => return Ok(status),
                None => ensure!(Instant::now() < deadline, "no status: `{text}`"),
            }
        }
    }

    /// Waits until the worker has checked its memory and written blocks beyond `before`.
    ///
    /// # Errors
    /// When it finds something wrong, or does not get on.
    pub async fn wait_progress(&mut self, before: Status) -> anyhow::Result<Status> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status().await?;
            ensure!(status.errors == 0, "the guest's worker found: {status:?}");
            if status.rounds > before.rounds && status.block > before.block {
                return Ok(status);
            }
            ensure!(
                Instant::now() < deadline,
                "the worker does not get on: {before:?}, {status:?}"
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

impl Status {
    /// Reads `rounds=R errors=E block=B gap_us=G`.
    pub fn parse(text: &str) -> Option<Status> {
        let field = |name: &str| -> Option<u64> {
            let value = text
                .split_whitespace()
                .find_map(|word| word.strip_prefix(name))?;
            value.parse().ok()
        };
        Some(Status {
            rounds: field("rounds=")?,
            errors: field("errors=")?,
            block: field("block=")?,
            gap_us: field("gap_us=")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Status;

    #[test]
    fn a_status_is_read_whole_or_not_at_all() {
        let status = Status::parse("x\r\nrounds=3 errors=0 block=41 gap_us=900\r\n");
        let wanted = Status {
            rounds: 3,
            errors: 0,
            block: 41,
            gap_us: 900,
        };
        assert_eq!(status, Some(wanted));
        assert_eq!(Status::parse("rounds=3 errors=0 block="), None);
    }
}
