//! gRPC over a Unix socket: how a daemon serves one and how its neighbour connects.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
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
    if UnixStream::connect(path).await.is_ok() {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("another process serves {}", path.display()),
        ));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(UnixListenerStream::new(listener))
}
