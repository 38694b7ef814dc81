//! Connections: who makes them, who takes them. Encryption is added here, by [`crate::tls`], and nowhere else.

use async_trait::async_trait;
use futures::future::BoxFuture;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};

/// How long one address may take to answer while others are left to try.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A two-way byte stream: TCP, TLS over it, or a test's own.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Stream for T {}

/// A stream of any kind. One indirect call a system call costs nothing measurable.
pub type BoxStream = Box<dyn Stream>;

/// Makes the source's connections.
#[async_trait]
pub trait Connector: Send + Sync + 'static {
    /// Connects channel `channel` (0 first, the others after it was accepted), TLS included.
    /// The engine bounds the wait.
    async fn connect(&self, channel: u16) -> io::Result<BoxStream>;
}

/// Takes the destination's connections.
#[async_trait]
pub trait Acceptor: Send + Sync + 'static {
    /// The next connection. What may take the peer's time (a TLS handshake) belongs into the
    /// returned future: it is run apart, under the bound of a handshake, so that one slow peer holds up nobody.
    async fn accept(&self) -> io::Result<BoxFuture<'static, io::Result<BoxStream>>>;
}

/// Plain TCP to one or several addresses of the destination; channels are dealt out over them.
#[derive(Clone, Debug)]
pub struct TcpConnector {
    /// Where the destination listens; at least one.
    pub addresses: Vec<SocketAddr>,
}

#[async_trait]
impl Connector for TcpConnector {
    async fn connect(&self, channel: u16) -> io::Result<BoxStream> {
        let count = self.addresses.len();
        let mut last = io::Error::new(io::ErrorKind::InvalidInput, "no address to connect to");
        // An address that does not answer must not fail the migration while another does.
        for attempt in 0..count {
            let address = self.addresses[(usize::from(channel) + attempt) % count];
            match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => {
                    stream.set_nodelay(true)?;
                    return Ok(Box::new(stream));
                }
                Ok(Err(error)) => {
                    last = io::Error::new(error.kind(), format!("{address}: {error}"))
                }
                Err(_) => {
                    last = io::Error::new(io::ErrorKind::TimedOut, format!("{address}: no answer"))
                }
            }
        }
        Err(last)
    }
}

/// Plain TCP from one listener.
#[derive(Debug)]
pub struct TcpAcceptor {
    /// The bound listener.
    pub listener: TcpListener,
}

#[async_trait]
impl Acceptor for TcpAcceptor {
    async fn accept(&self) -> io::Result<BoxFuture<'static, io::Result<BoxStream>>> {
        let (stream, _) = self.listener.accept().await?;
        Ok(Box::pin(async move {
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as BoxStream)
        }))
    }
}
