//! An NFSv3 server over a directory of this host, for clusters that have no storage server of their own.
//!
//! ```text
//!  greeting     TLS or not (RFC 9289), before the first call
//!  connection   records in and out, many calls at once, bounds
//!  rpc          the head of a call: program, procedure, who it is from (AUTH_SYS)
//!  mount        MOUNT v3, on the same port (there is no portmapper)
//!  procedures   NFSv3, arguments and results; listing: READDIR and READDIRPLUS
//!  permission   who may do what: the fence
//!  files        READ, WRITE, COMMIT, SETATTR; the gate between WRITE and SETATTR
//!  export       handles, names, what lies under the root
//!  journal      owner, group and mode of every file, durable
//!  convert      times and errors of the file system, as NFS has them
//! ```
//!
//! It is a service of our own on the XDR of `nfs3_types`, and not one of the server crates, because
//! the fence needs the credential of every call at the place of the check, and check and write in
//! one gate. 4 KiB FILE_SYNC writes on a virtual disk: 0.5–2.8 thousand a second one by one,
//! 6–10 by 8 in flight, 10–22 by 32; a SETATTR costs one `fdatasync`.
//!
//! # What it promises
//!
//! - **The fence is exact.** Each call is checked against owner, group and mode with the user and
//!   groups that it carries, by POSIX rules without any right from mere ownership. When a SETATTR
//!   has been answered, no WRITE that it forbids lands any more: a WRITE is checked and written
//!   inside a gate of the file that a SETATTR enters alone. No settle time is needed.
//! - **A SETATTR is durable before it is answered**, whatever kills the server. Owners, groups and
//!   modes are kept in `<root>/.baton-nfs/attributes`; if that record is damaged the server does
//!   not start, since a lost record might be a lost fence.
//! - **WRITE with FILE_SYNC or DATA_SYNC, and COMMIT, are answered after `fdatasync`.** Data written
//!   UNSTABLE survives a crash of the server but not of the host. The write verifier is another one
//!   after every start and after every failed sync.
//! - **CREATE is atomic** (GUARDED and EXCLUSIVE too), and nobody finds a file whose owner is not
//!   yet decided. Names made, moved and removed are durable when the call is answered.
//! - **Handles outlive restarts**; those of files that are gone are STALE, even if the inode is used anew.
//! - It needs no privileges. Everything on the disk belongs to its own user. In the root, which
//!   starts with mode 1777, anybody may make entries and only owners remove theirs.
//! - **A killed server leaves nothing behind**: the directory's lock is free only when the last of its
//!   threads has ended, so no WRITE of a former server lands beside its successor.
//!
//! # What it does not
//!
//! - AUTH_SYS is not authentication: whoever reaches the port may claim to be anybody. It stops
//!   stale hosts, not hostile ones; bind it to a storage network. With TLS (`--tls-cert`,
//!   `--tls-self-signed`) nobody on the path reads or changes what is said, and clients know whom they
//!   talk to; only `--tls-client-ca` keeps strangers out.
//! - It is one process on one host: not replicated, and away while its host is. Durability is that of
//!   the file system under it; after a power loss the times of files may be older than their data.
//! - No symbolic or hard links, no devices, no locks (NLM), no portmapper, no duplicate-request
//!   cache: a client that sends a CREATE or REMOVE twice must expect EXIST or NOENT.
//! - The directory is the server's. A file put there by other means is shown, as belonging to whom the
//!   disk says, once it is looked up; changes behind the server's back are not ordered with its calls.
//! - Files are known by inode and birth: a copy of the directory, or one restored from a backup, holds
//!   new files, which belong to the server's own user; create the disks anew and copy them in.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

mod connection;
mod convert;
mod export;
mod files;
mod greeting;
pub(crate) mod journal;
mod listing;
mod mount;
mod permission;
mod procedures;
mod rpc;

pub use export::ExportError;
pub use journal::JournalError;

pub use crate::tls::server::TlsArgs;
use crate::tls::{ServerTls, ServerTlsError};

/// Connections served at once; more are closed at once. A monitor keeps one for each disk.
pub const CONNECTIONS_MAX: usize = 512;

/// After how long a silent client is asked whether it is still there.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// How long to wait after a failed accept (no descriptors left), so as not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What to serve, and where.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
    /// The directory to serve; it belongs to the server alone
    #[arg(long, value_name = "DIRECTORY")]
    pub root: PathBuf,
    /// The path that clients mount
    #[arg(long, value_name = "PATH", default_value = "/")]
    pub export: String,
    /// Let user 0 do anything, instead of making it nobody
    #[arg(long)]
    pub no_root_squash: bool,
    /// Refuse every change
    #[arg(long)]
    pub read_only: bool,
    /// How TLS is offered, if it is.
    #[command(flatten)]
    pub tls: TlsArgs,
}

impl Config {
    /// Serves `root` as `/`, under root_squash.
    pub fn new(listen: SocketAddr, root: impl Into<PathBuf>) -> Config {
        Config {
            listen,
            root: root.into(),
            export: "/".into(),
            no_root_squash: false,
            read_only: false,
            tls: TlsArgs::default(),
        }
    }
}

/// Why the server does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The directory.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The certificate and its key.
    #[error(transparent)]
    Tls(#[from] ServerTlsError),
    /// The path that clients are to mount.
    #[error(
        "`{export}` cannot be the path of an export; it must begin with `/` and hold no `..` and no control character"
    )]
    ExportPath {
        /// As given.
        export: String,
    },
    /// The address.
    #[error("cannot listen on {address}: {source}; is another server running there?")]
    Listen {
        /// As given.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What every connection needs.
#[derive(Debug)]
struct Shared {
    export: Arc<export::Export>,
    name: String,
    root_squash: bool,
    tls: Option<ServerTls>,
}

impl Shared {
    /// Whether calls without TLS are refused.
    fn needs_tls(&self) -> bool {
        self.tls.as_ref().is_some_and(ServerTls::is_required)
    }
}

/// A running server. Dropping it stops it, without waiting.
#[derive(Debug)]
pub struct Server {
    /// The address it listens on.
    pub addr: SocketAddr,
    export: String,
    tasks: TaskTracker,
    stop: DropGuard,
}

impl Server {
    /// The volume's address, as `storage_broker::volume` understands it.
    pub fn url(&self) -> String {
        format!("nfs://{}{}", self.addr, self.export)
    }

    /// Closes every connection and waits until the calls under way have been executed and the
    /// directory may be served by another server. Their replies may be lost.
    pub async fn shutdown(self) {
        let Server { tasks, stop, .. } = self;
        drop(stop);
        tasks.wait().await;
    }
}

/// Starts serving, within this runtime.
///
/// # Errors
/// See [`StartError`].
pub async fn start(config: Config) -> Result<Server, StartError> {
    start_bounded(config, CONNECTIONS_MAX).await
}

async fn start_bounded(config: Config, connections_max: usize) -> Result<Server, StartError> {
    let Config {
        listen,
        root,
        export: name,
        no_root_squash,
        read_only,
        tls,
    } = config;
    let bad_name = !name.starts_with('/')
        || name.chars().any(char::is_control)
        || name.split('/').any(|part| part == "..");
    if bad_name {
        return Err(StartError::ExportPath { export: name });
    }
    let at_address = |source| StartError::Listen {
        address: listen,
        source,
    };
    let listener = bind(listen).map_err(at_address)?;
    let addr = listener.local_addr().map_err(at_address)?;
    let opened = tokio::task::spawn_blocking(move || {
        let tls = ServerTls::load(&tls, addr.ip())?;
        Ok::<_, StartError>((export::Export::open(&root, read_only)?, tls))
    });
    let (export, tls) = opened
        .await
        .map_err(|error| at_address(io::Error::other(error)))??;
    tracing::info!(
        %addr,
        root = %export.root_path().display(),
        export = name,
        tls = match &tls {
            None => "no",
            Some(tls) if tls.is_required() => "only",
            Some(_) => "offered",
        },
        "serving NFS"
    );
    let shared = Arc::new(Shared {
        export: Arc::new(export),
        name: name.clone(),
        root_squash: !no_root_squash,
        tls,
    });
    let tasks = TaskTracker::new();
    let stop = CancellationToken::new();
    tasks.spawn(accept(
        listener,
        shared,
        connections_max,
        tasks.clone(),
        stop.clone(),
    ));
    tasks.close();
    Ok(Server {
        addr,
        export: name,
        tasks,
        stop: stop.drop_guard(),
    })
}

/// Serves one connection to its end, as a server of `root` would that has no other.
pub(crate) async fn serve_one(stream: TcpStream, root: &std::path::Path) -> Result<(), StartError> {
    let shared = Arc::new(Shared {
        export: Arc::new(export::Export::open(root, false)?),
        name: "/".into(),
        root_squash: true,
        tls: None,
    });
    let calls = TaskTracker::new();
    connection::serve(stream, shared, calls.clone(), CancellationToken::new()).await;
    calls.close();
    calls.wait().await;
    Ok(())
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    const BACKLOG: i32 = 1024;
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::STREAM,
        Some(socket2::Protocol::TCP),
    )?;
    // A restart must not wait for the connections of the server before it.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

async fn accept(
    listener: TcpListener,
    shared: Arc<Shared>,
    connections_max: usize,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    let connections = Arc::new(Semaphore::new(connections_max));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = connections.clone().try_acquire_owned() else {
            tracing::warn!(%peer, "closing a connection: {connections_max} are open already");
            continue;
        };
        if let Err(error) = tune(&stream) {
            tracing::debug!(%peer, %error, "a connection broke");
            continue;
        }
        let serving = connection::serve(stream, shared.clone(), tasks.clone(), stop.child_token());
        tasks.spawn(async move {
            serving.await;
            drop(place);
        });
    }
}

fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE / 3);
    socket2::SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

/// The command `storage-broker serve-nfs`: serves until SIGTERM or SIGINT. Prints the volume's
/// address once it can be used.
///
/// # Errors
/// When it cannot start, or stdout is closed.
pub async fn run(config: Config) -> anyhow::Result<()> {
    use std::io::Write as _;
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let server = start(config).await?;
    writeln!(io::stdout(), "{}", server.url())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    server.shutdown().await;
    Ok(())
}

#[cfg(test)]
mod tests;
