//! gRPC over a Unix socket: how a daemon serves one and how its neighbour connects.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::{Channel, Endpoint, Uri};

/// How long a connect to a Unix socket may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A channel to the server on `path`; connects at first use and again after the server restarted.
pub fn channel(path: impl Into<PathBuf>) -> Channel {
    let path = path.into();
    // The address is not used: the connector knows the path.
    Endpoint::from_static("http://unix.invalid")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
}

/// Listens on `path` for its owner only (mode 0600), in place of a dead server's socket file.
///
/// # Errors
/// When a living server answers on `path`, or the file system refuses.
pub async fn listen(path: &Path) -> io::Result<UnixListenerStream> {
    accept_on(bind(path)?)
}

/// The same, without a runtime: for [`accept_on`].
///
/// # Errors
/// See [`listen`].
pub fn bind(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    // A living server has room for a connection, or is told apart by `WouldBlock`; neither waits.
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("another process serves {}", path.display()),
        ));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Takes connections of a socket that [`bind`] made. Called on a tokio runtime.
///
/// # Errors
/// When the runtime does not take it.
pub fn accept_on(listener: std::os::unix::net::UnixListener) -> io::Result<UnixListenerStream> {
    Ok(UnixListenerStream::new(UnixListener::from_std(listener)?))
}

/// The connections of those users alone, by the kernel's word; others are turned away. The socket's mode says the
/// same, this does not rest on it.
pub fn only_from(
    connections: UnixListenerStream,
    users: Vec<u32>,
) -> impl Stream<Item = io::Result<UnixStream>> {
    connections.filter_map(move |accepted| {
        let Ok(stream) = &accepted else {
            return Some(accepted);
        };
        match stream.peer_cred() {
            Ok(peer) if users.contains(&peer.uid()) => Some(accepted),
            Ok(peer) => {
                tracing::warn!(uid = peer.uid(), "turned away at the control socket");
                None
            }
            Err(error) => {
                tracing::debug!(%error, "it is not known who came to the control socket");
                None
            }
        }
    })
}
