//! Every connection between nodes is made and accepted here, and nowhere else.
//!
//! [`Dialer`] connects, [`serve`] accepts. What holds for all connections (source address, time limits,
//! keepalive, `TCP_NODELAY`, sizes; TLS, and who is at the other end) is therefore said once.

mod breakable;

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use proto::tls;
use rustls::ClientConfig;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint, Server, Uri};

pub use self::breakable::Breakable;
use crate::trust::{Door, Guard, Judge, Keeper, KeeperError};

/// The largest message either side takes, bytes: a batch of log entries (1 MiB and one entry), a chunk
/// of a snapshot, a node's report.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// How long a connect may take, the handshake included.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1_500);
/// A silent connection is asked for a sign of life this often...
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// ...and given up after this long without one.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long open requests may keep a stopping server.
const STOP_GRACE: Duration = Duration::from_secs(1);
/// Requests that one peer may have under way: it uses some dozens.
const STREAMS_MAX: u32 = 1_024;
/// HTTP/2 window, bytes: a whole batch of entries goes out without waiting for an update.
const WINDOW_BYTES: u32 = 4 << 20;
/// Addresses that a dialer keeps channels to; a cluster has at most 1,000 nodes.
const CHANNELS_MAX: usize = 4_096;
/// Why a connection of a cut link breaks.
const LINK_CUT: &str = "this link is cut on purpose";

/// Connects to other nodes, always from this node's own address. Clones share their channels.
#[derive(Clone, Debug)]
pub struct Dialer {
    inner: Arc<DialerInner>,
}

#[derive(Debug)]
struct DialerInner {
    local: IpAddr,
    keeper: Keeper,
    shared: Mutex<HashMap<String, Channel>>,
    links: Links,
}

impl Dialer {
    /// A dialer whose connections come from `local`, the address this node listens on: peers and packet
    /// filters then know the node by one address. They show `keeper`'s papers.
    pub fn new(local: IpAddr, keeper: Keeper) -> Dialer {
        Dialer {
            inner: Arc::new(DialerInner {
                local,
                keeper,
                shared: Mutex::default(),
                links: Links::default(),
            }),
        }
    }

    /// The channel to `address` (`host:port`) that everything short shares. It connects at first use and
    /// again after a failure; while it cannot, requests fail at once with `Unavailable`.
    ///
    /// # Errors
    /// When `address` is not `host:port`.
    pub fn channel(&self, address: &str) -> Result<Channel, AddressError> {
        if let Some(channel) = lock(&self.inner.shared).get(address) {
            return Ok(channel.clone());
        }
        let channel = self.dedicated(address)?;
        let mut shared = lock(&self.inner.shared);
        if shared.len() >= CHANNELS_MAX {
            shared.clear();
        }
        Ok(shared.entry(address.to_owned()).or_insert(channel).clone())
    }

    /// A channel to `address` with a connection of its own, for traffic that others must not delay.
    ///
    /// # Errors
    /// When `address` is not `host:port`.
    pub fn dedicated(&self, address: &str) -> Result<Channel, AddressError> {
        let keeper = self.inner.keeper.clone();
        let told = address.to_owned();
        // Asked at each connect: papers are renewed, and the log learns of other nodes.
        self.connecting(address, move || keeper.client_config(&told))
    }

    /// A channel with a connection of its own whose other end is checked by `config` alone: for a node that
    /// has no papers yet.
    ///
    /// # Errors
    /// When `address` is not `host:port`.
    pub fn with_config(
        &self,
        address: &str,
        config: Arc<ClientConfig>,
    ) -> Result<Channel, AddressError> {
        self.connecting(address, move || Ok(config.clone()))
    }

    fn connecting(
        &self,
        address: &str,
        config: impl Fn() -> Result<Arc<ClientConfig>, KeeperError> + Clone + Send + Sync + 'static,
    ) -> Result<Channel, AddressError> {
        channel_from(self.inner.local, address, self.inner.links.clone(), config)
    }

    /// Which links are cut on purpose; for fault tests.
    pub fn links(&self) -> &Links {
        &self.inner.links
    }
}

/// A channel from `local` to `address` whose other end is checked by `config` alone: for a host that is no node.
///
/// # Errors
/// When `address` is not `host:port`.
pub fn stranger(
    local: IpAddr,
    address: &str,
    config: Arc<ClientConfig>,
) -> Result<Channel, AddressError> {
    channel_from(local, address, Links::default(), move || Ok(config.clone()))
}

fn channel_from(
    local: IpAddr,
    address: &str,
    links: Links,
    config: impl Fn() -> Result<Arc<ClientConfig>, KeeperError> + Clone + Send + Sync + 'static,
) -> Result<Channel, AddressError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .ok()
        .filter(|endpoint| endpoint.uri().port_u16().is_some())
        .ok_or_else(|| AddressError {
            address: address.to_owned(),
        })?
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES);
    Ok(
        endpoint.connect_with_connector_lazy(tower::service_fn(move |uri: Uri| {
            let (links, config) = (links.clone(), config.clone());
            async move {
                let connecting = async {
                    let stream = connect(&uri, local, &links).await?;
                    tls::connect(config().map_err(io::Error::other)?, stream).await
                };
                match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
                    Ok(connected) => connected.map(TokioIo::new),
                    Err(_) => Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!(
                            "{uri} did not answer within {} ms",
                            CONNECT_TIMEOUT.as_millis()
                        ),
                    )),
                }
            }
        })),
    )
}

/// An address that is not `host:port`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{address}` is not an address: use host:port")]
pub struct AddressError {
    /// What was given.
    pub address: String,
}

async fn connect(uri: &Uri, local: IpAddr, links: &Links) -> io::Result<Breakable<TcpStream>> {
    let bad = || {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{uri} has no host and port"),
        )
    };
    let host = uri.host().ok_or_else(bad)?.trim_matches(['[', ']']);
    let port = uri.port_u16().ok_or_else(bad)?;
    let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
    for address in tokio::net::lookup_host((host, port)).await? {
        match connect_to(address, local, links).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn connect_to(
    address: SocketAddr,
    local: IpAddr,
    links: &Links,
) -> io::Result<Breakable<TcpStream>> {
    let cut = links.switch(address);
    if cut.load(Ordering::Relaxed) {
        return Err(io::Error::new(io::ErrorKind::ConnectionReset, LINK_CUT));
    }
    let socket = match (address, local) {
        (SocketAddr::V4(_), IpAddr::V4(_)) => TcpSocket::new_v4()?,
        (SocketAddr::V6(_), IpAddr::V6(_)) => TcpSocket::new_v6()?,
        _ => {
            return Err(io::Error::new(
                io::ErrorKind::AddrNotAvailable,
                format!("{address} cannot be reached from {local}: one is IPv4, the other IPv6"),
            ));
        }
    };
    if !local.is_unspecified() {
        socket.bind(SocketAddr::new(local, 0))?;
    }
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
    socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive())?;
    Ok(Breakable::new(stream, cut, LINK_CUT))
}

/// How a silent connection is found dead, on both sides.
pub(crate) fn keepalive() -> socket2::TcpKeepalive {
    socket2::TcpKeepalive::new()
        .with_time(KEEPALIVE_INTERVAL)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(3)
}

/// Links that were cut on purpose: nothing is sent to or taken from these addresses.
///
/// A partition is made by cutting both ways, each side in its own dialer.
#[derive(Clone, Debug, Default)]
pub struct Links {
    switches: Arc<Mutex<HashMap<SocketAddr, Arc<AtomicBool>>>>,
}

impl Links {
    /// Cuts the link to `address`; connections that stand break at their next use.
    pub fn cut(&self, address: SocketAddr) {
        self.switch(address).store(true, Ordering::Relaxed);
    }

    /// Heals it.
    pub fn heal(&self, address: SocketAddr) {
        // Connections of the time before stay broken: they hold the old switch.
        lock(&self.switches).remove(&address);
    }

    fn switch(&self, address: SocketAddr) -> Arc<AtomicBool> {
        lock(&self.switches).entry(address).or_default().clone()
    }
}

/// Why peers can no longer be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve peers on {address}")]
pub struct ServeError {
    address: SocketAddr,
    #[source]
    source: tonic::transport::Error,
}

/// Serves `routes` on `listener` to whoever comes through `door` and whom `judge` lets pass, until `stop`
/// resolves; requests under way then get one second to end.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    door: &Door,
    judge: Judge,
    routes: Routes,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let address = listener
        .local_addr()
        .unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)));
    let incoming = ReceiverStream::new(door.open(listener));
    let (stopping, mut stopped) = tokio::sync::watch::channel(false);
    let signal = async move {
        stop.await;
        stopping.send_replace(true);
    };
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_concurrent_streams(STREAMS_MAX)
        .layer(Guard::new(judge))
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, signal);
    let overdue = async move {
        if stopped.wait_for(|stopped| *stopped).await.is_err() {
            // The server ended by itself and took the signal along.
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(STOP_GRACE).await;
    };
    tokio::select! {
        served = server => served.map_err(|source| ServeError { address, source }),
        () = overdue => {
            tracing::debug!(%address, "requests of peers still under way at the end");
            Ok(())
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The maps behind these locks are whole after any panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_without_a_port_is_refused() {
        let authority = crate::trust::ephemeral::Authority::new().unwrap();
        let keeper = authority
            .keeper(cluster_model::NodeId(1), cluster_model::NodeRole::Voter)
            .unwrap();
        let dialer = Dialer::new(IpAddr::from([127, 0, 0, 1]), keeper);
        for bad in ["", "127.0.0.1", "host name:7", "a/b"] {
            assert!(dialer.channel(bad).is_err(), "{bad}");
        }
        assert!(dialer.channel("127.0.0.1:7").is_ok());
    }

    #[tokio::test]
    async fn connections_come_from_the_nodes_own_address_and_a_cut_link_breaks_them() {
        use tokio::io::AsyncWriteExt;
        let listener = TcpListener::bind("127.0.0.3:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let links = Links::default();
        let local = IpAddr::from([127, 0, 0, 2]);
        let mut stream = connect_to(address, local, &links).await.unwrap();
        let (_accepted, from) = listener.accept().await.unwrap();
        assert_eq!(from.ip(), local);
        assert!(stream.stream.nodelay().unwrap());
        stream.write_all(b"x").await.unwrap();
        links.cut(address);
        assert!(stream.write_all(b"x").await.is_err());
        assert!(connect_to(address, local, &links).await.is_err());
        links.heal(address);
        assert!(
            stream.write_all(b"x").await.is_err(),
            "a broken connection stays broken"
        );
        assert!(connect_to(address, local, &links).await.is_ok());
    }
}
