//! NFS-Ganesha with its portmapper, in network and mount namespaces that die with the test.
//!
//! A thread of the test enters fresh namespaces and starts both servers from there; the runtime of
//! the test runs on that thread too, so that its connections begin inside. The servers are killed
//! by the kernel when the thread ends, however it ends, and the namespaces end with them.

use std::fs::File;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sched::{CloneFlags, unshare};

/// A server takes two seconds to get ready on a quiet machine.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Between two looks at whether it is ready.
const POLL: Duration = Duration::from_millis(20);

const NFS_PORT: u16 = 2049;
/// Where its MOUNT service listens.
pub const MOUNT_PORT: u16 = 20048;

/// A running Ganesha.
pub struct Ganesha {
    directory: tempfile::TempDir,
    server: Child,
    /// The last second in which this life of the server may have begun.
    started_in: u64,
    _portmapper: Reaped,
}

/// A child that is killed and waited for when dropped.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        kill(&mut self.0);
    }
}

impl Drop for Ganesha {
    fn drop(&mut self) {
        kill(&mut self.server);
    }
}

fn kill(child: &mut Child) {
    // An error means that it has ended already.
    let _ = child.kill();
    let _ = child.wait();
}

/// Runs a test beside a Ganesha of its own, or says why it cannot.
pub fn with_ganesha(name: &'static str, test: impl AsyncFnOnce(&mut Ganesha) + Send + 'static) {
    if let Some(why) = missing() {
        proto::skip!(name, "{why}");
        return;
    }
    let thread = std::thread::spawn(move || {
        enter_namespaces();
        let mut ganesha = Ganesha::start();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test(&mut ganesha));
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// What this machine lacks.
fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("it needs root, for namespaces and the server".into());
    }
    let programs = ["ganesha.nfsd", "rpcbind", "ip", "mount", "setpriv"];
    let places = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
    let installed = |program: &str| places.iter().any(|p| Path::new(p).join(program).exists());
    let absent = programs.into_iter().find(|program| !installed(program))?;
    Some(format!("`{absent}` is not installed"))
}

fn enter_namespaces() {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
    run("ip", &["link", "set", "lo", "up"]);
    // The portmapper and Ganesha keep sockets, locks and state at fixed places.
    run("mount", &["--make-rprivate", "/"]);
    for place in ["/run", "/var/lib/nfs"] {
        std::fs::create_dir_all(place).unwrap();
        run("mount", &["-t", "tmpfs", "tmpfs", place]);
    }
    std::fs::create_dir_all("/run/ganesha").unwrap();
    std::fs::create_dir_all("/var/lib/nfs/ganesha").unwrap();
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

/// Starts a program that the kernel kills when this thread ends.
fn start(log: &Path, program: &str, arguments: &[&str]) -> Child {
    let log = File::create(log).unwrap();
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", program])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

impl Ganesha {
    fn start() -> Ganesha {
        let directory = tempfile::tempdir().unwrap();
        let export = directory.path().join("export");
        std::fs::create_dir(&export).unwrap();
        for path in [directory.path(), &export] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
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
        std::fs::write(directory.path().join("ganesha.conf"), configuration).unwrap();
        let log = directory.path().join("rpcbind.log");
        let portmapper = start(&log, "rpcbind", &["-f", "-w"]);
        let portmapper = Reaped(portmapper);
        await_port(111, &log);
        let server = start_server(directory.path());
        Ganesha {
            directory,
            server,
            started_in: second(),
            _portmapper: portmapper,
        }
    }

    /// The volume's address.
    pub fn url(&self) -> String {
        let export = self.export();
        format!(
            "nfs://127.0.0.1:{NFS_PORT}{}?mountport={MOUNT_PORT}",
            export.display()
        )
    }

    /// The exported directory on this host.
    pub fn export(&self) -> PathBuf {
        self.directory.path().join("export")
    }

    /// Kills the server as a crash would and starts it again.
    ///
    /// Ganesha's write verifier is the second at which it started: two lives within one second
    /// share it, and no client of any kind could see such a crash.
    pub fn crash_and_restart(&mut self) {
        kill(&mut self.server);
        while second() == self.started_in {
            std::thread::sleep(POLL);
        }
        self.server = start_server(self.directory.path());
        self.started_in = second();
    }
}

/// The wall clock in whole seconds, as Ganesha reads it.
fn second() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs()
}

fn start_server(directory: &Path) -> Child {
    let at = |name: &str| directory.join(name).display().to_string();
    let log = directory.join("ganesha.log");
    let (configuration, pid) = (at("ganesha.conf"), at("ganesha.pid"));
    let child = start(
        &directory.join("ganesha.out"),
        "ganesha.nfsd",
        &[
            "-F",
            "-f",
            &configuration,
            "-L",
            &log.display().to_string(),
            "-p",
            &pid,
        ],
    );
    await_port(NFS_PORT, &log);
    await_port(MOUNT_PORT, &log);
    child
}

fn await_port(port: u16, log: &Path) {
    let begun = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(
            begun.elapsed() < READY_TIMEOUT,
            "nothing listens on port {port}:\n{}",
            std::fs::read_to_string(log).unwrap_or_default()
        );
        std::thread::sleep(POLL);
    }
}
