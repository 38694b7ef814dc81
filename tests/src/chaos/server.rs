//! The storage server: the embedded one, or nfs-ganesha under root_squash.

use std::fs::{File, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use clusterctl::local::LocalCluster;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// Which server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ServerKind {
    /// `storage-broker serve-nfs`.
    Embedded,
    /// nfs-ganesha with its portmapper.
    Ganesha,
}

const NFS_PORT: u16 = 2049;
const MOUNT_PORT: u16 = 20048;
/// A server takes two seconds to get ready on a quiet machine.
const READY: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(20);

/// An nfs-ganesha, in the storage member's network and mounts of its own.
pub struct Ganesha {
    folder: PathBuf,
    enter: Vec<String>,
    address: SocketAddr,
    running: Option<Child>,
    /// The last second in which its present life may have begun.
    began_in: u64,
}

impl Drop for Ganesha {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Ganesha {
    /// Prepares one whose files are in `folder`; [`Ganesha::start`] starts it.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn prepare(
        folder: &Path,
        enter: Vec<String>,
        address: SocketAddr,
    ) -> anyhow::Result<Ganesha> {
        let export = folder.join("export");
        std::fs::create_dir_all(&export)?;
        // The server reaches the export as whoever calls.
        let open = std::fs::Permissions::from_mode(0o777);
        for path in export.ancestors().take(4) {
            std::fs::set_permissions(path, open.clone())?;
        }
        let configuration = format!(
            "NFS_CORE_PARAM {{ NFS_Port = {NFS_PORT}; MNT_Port = {MOUNT_PORT}; Protocols = 3;
                Enable_NLM = false; Enable_RQUOTA = false; mount_path_pseudo = false; }}
             NFSV4 {{ Graceless = true; }}
             EXPORT {{ Export_Id = 1; Path = {export}; Pseudo = /export; Access_Type = RW;
                Squash = Root_Squash; SecType = sys; Protocols = 3; Transports = TCP;
                FSAL {{ Name = VFS; }} }}",
            export = export.display()
        );
        std::fs::write(folder.join("ganesha.conf"), configuration)?;
        Ok(Ganesha {
            folder: folder.to_owned(),
            enter,
            address,
            running: None,
            began_in: 0,
        })
    }

    /// The volume's address.
    pub fn url(&self) -> String {
        let export = self.folder.join("export");
        format!(
            "nfs://{}{}?mountport={MOUNT_PORT}",
            self.address,
            export.display()
        )
    }

    /// Starts it and waits until it answers.
    ///
    /// Its write verifier is the second at which it started: two lives within one second share it, and no
    /// client of any kind could see such a crash.
    ///
    /// # Errors
    /// When it does not come.
    pub fn start(&mut self) -> anyhow::Result<()> {
        while second()? == self.began_in {
            std::thread::sleep(LOOK);
        }
        let folder = self.folder.display();
        // The portmapper and ganesha keep sockets, locks and state at fixed places.
        let script = format!(
            "set -e; mount --make-rprivate /; mount -t tmpfs tmpfs /run; mkdir -p /run/ganesha /var/lib/nfs; \
             mount -t tmpfs tmpfs /var/lib/nfs; mkdir -p /var/lib/nfs/ganesha; rpcbind -f -w & \
             until rpcinfo >/dev/null 2>&1; do :; done; \
             exec ganesha.nfsd -F -f {folder}/ganesha.conf -L {folder}/ganesha.log -p {folder}/ganesha.pid"
        );
        let log: File = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.join("ganesha.out"))?;
        let (first, rest) = self.enter.split_first().context("no namespace")?;
        let child = Command::new(first)
            .args(rest)
            .args([
                "setpriv",
                "--pdeathsig",
                "KILL",
                "unshare",
                "--mount",
                "sh",
                "-c",
                &script,
            ])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("cannot start nfs-ganesha")?;
        self.running = Some(child);
        for port in [NFS_PORT, MOUNT_PORT] {
            let address = SocketAddr::new(self.address.ip(), port);
            let begun = Instant::now();
            while std::net::TcpStream::connect_timeout(&address, LOOK * 50).is_err() {
                ensure!(
                    begun.elapsed() < READY,
                    "nfs-ganesha does not answer at {address}: see {folder}"
                );
                std::thread::sleep(LOOK);
            }
        }
        self.began_in = second()?;
        Ok(())
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.running.take() {
            if let Ok(pid) = i32::try_from(child.id()) {
                // It may have ended already.
                let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
            }
            let _ = child.wait();
        }
    }
}

fn second() -> anyhow::Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())
}

/// The cluster's storage server, whichever it is.
pub enum Server {
    /// Run by the local cluster.
    Embedded,
    /// Run here.
    Ganesha(Ganesha),
}

impl Server {
    /// Kills it as a crash does.
    pub fn kill(&mut self, local: &LocalCluster) {
        match self {
            Server::Embedded => {
                for pid in self.processes(local) {
                    // It may have ended already.
                    let _ = kill(pid, Signal::SIGKILL);
                    let _ = nix::sys::wait::waitpid(pid, None);
                }
            }
            Server::Ganesha(ganesha) => ganesha.kill(),
        }
    }

    /// Starts it again.
    ///
    /// # Errors
    /// When it does not come.
    pub fn start(&mut self, local: &mut LocalCluster) -> anyhow::Result<()> {
        match self {
            Server::Embedded => Ok(local.start_nfs()?),
            Server::Ganesha(ganesha) => ganesha.start(),
        }
    }

    /// Its processes.
    pub fn processes(&self, local: &LocalCluster) -> Vec<Pid> {
        clusterctl::local::processes_of(&local.nfs.folder)
            .into_iter()
            .map(Pid::from_raw)
            .collect()
    }

    /// Where clients mount: the export's path, and the ports of NFS and MOUNT.
    pub fn mount_point(&self, local: &LocalCluster) -> (String, u16, u16) {
        match self {
            Server::Embedded => ("/baton".into(), NFS_PORT, NFS_PORT),
            Server::Ganesha(_) => (local.nfs_root().display().to_string(), NFS_PORT, MOUNT_PORT),
        }
    }
}
