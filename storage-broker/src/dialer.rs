//! The one place where connections to storage servers are made.
//!
//! Every connection of a node binds to the node's own address, so that whoever watches or cuts
//! links (a firewall rule, a test's relay) can tell whose connection it is. Where a volume's record
//! has an authority for its server, what comes out of here is under TLS, or nothing does.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use nfs3_types::{mount as mount3, nfs3};
use tokio::net::{TcpSocket, TcpStream};

use crate::tls::starttls::Answer;
use crate::tls::{ClientTls, Stream, TlsError, handshake};

/// How long resolving and connecting may take together, unless told otherwise.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Ports below 1024 that servers with the `secure` option ask for; the lowest are left to services.
const PRIVILEGED_PORTS: std::ops::Range<u16> = 600..1023;

/// How many privileged ports are tried before giving up.
const PRIVILEGED_TRIES: usize = 64;

/// From where, and how, connections to storage servers are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dialer {
    /// The address to bind to; `None` leaves it to the kernel.
    pub source: Option<IpAddr>,
    /// Whether to connect from a port below 1024 (needs the privilege to bind one).
    pub privileged_port: bool,
    /// The bound on resolving and connecting, and again on the TLS handshake.
    pub connect_timeout: Duration,
    /// What the server must prove before a call is sent; `None` is plain TCP.
    pub tls: Option<ClientTls>,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// To ask for a port. Never under TLS: its answer gives away nothing, and a false one leads to a
    /// port where the server must prove itself.
    Portmapper,
    /// To ask for an export's root.
    Mount,
    /// Everything else.
    Nfs,
}

impl Service {
    /// The program and version whose NULL call asks for TLS (RFC 9289, section 4.1: that of the calls
    /// that follow); `None` where it is not asked for.
    fn program(self) -> Option<(u32, u32)> {
        match self {
            Service::Portmapper => None,
            Service::Mount => Some((mount3::PROGRAM, mount3::VERSION)),
            Service::Nfs => Some((nfs3::PROGRAM, nfs3::VERSION)),
        }
    }
}

impl Default for Dialer {
    fn default() -> Self {
        Dialer {
            source: None,
            privileged_port: false,
            connect_timeout: CONNECT_TIMEOUT,
            tls: None,
        }
    }
}

/// Why no connection came about.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nobody answers there.
    #[error("cannot connect to {host} port {port}: {source}; {advice}")]
    Connect {
        /// The server as named in the volume's address.
        host: String,
        /// The port tried.
        port: u16,
        /// What the network said.
        source: io::Error,
        /// What to try.
        advice: &'static str,
    },
    /// Somebody does, and cannot be trusted.
    #[error("no secure connection to {host} port {port}: {source}")]
    Tls {
        /// The server as named in the volume's address.
        host: String,
        /// The port tried.
        port: u16,
        /// What went wrong.
        source: TlsError,
    },
}

impl Dialer {
    /// A dialer that binds every connection to `source`.
    pub fn from_source(source: IpAddr) -> Dialer {
        Dialer {
            source: Some(source),
            ..Dialer::default()
        }
    }

    /// The same for a volume with that record.
    pub fn with_tls(&self, tls: Option<ClientTls>) -> Dialer {
        Dialer {
            tls,
            ..self.clone()
        }
    }

    /// Connects to `host`, with TCP_NODELAY set, and under TLS where that is asked for.
    ///
    /// # Errors
    /// When the name does not resolve, nothing answers in time, the source address cannot be bound, or the
    /// server does not prove who it is.
    pub async fn connect(
        &self,
        host: &str,
        port: u16,
        service: Service,
    ) -> Result<Stream, DialError> {
        let stream = self.connect_plain(host, port).await?;
        let (Some(tls), Some(program)) = (&self.tls, service.program()) else {
            return Ok(Stream::Plain(stream));
        };
        let securing = tls.secure(stream, host, program);
        let secured = tokio::time::timeout(self.connect_timeout, securing).await;
        secured
            .unwrap_or(Err(TlsError::TimedOut))
            .map_err(|source| DialError::Tls {
                host: host.to_owned(),
                port,
                source,
            })
    }

    /// Whether the NFS server offers TLS; the connection that asked is closed. The answer is a hint to a
    /// person: whoever stands in the path can change it.
    ///
    /// # Errors
    /// As [`Dialer::connect`].
    pub async fn offers_tls(&self, host: &str, port: u16) -> Result<bool, DialError> {
        let mut stream = self.connect_plain(host, port).await?;
        let asking = handshake::ask(&mut stream, (nfs3::PROGRAM, nfs3::VERSION));
        let asked = tokio::time::timeout(self.connect_timeout, asking).await;
        match asked.unwrap_or(Err(TlsError::TimedOut)) {
            Ok(answer) => Ok(answer == Answer::StartTls),
            Err(source) => Err(DialError::Tls {
                host: host.to_owned(),
                port,
                source,
            }),
        }
    }

    async fn connect_plain(&self, host: &str, port: u16) -> Result<TcpStream, DialError> {
        let attempt = tokio::time::timeout(self.connect_timeout, self.attempt(host, port)).await;
        let result = attempt.unwrap_or_else(|_| {
            let text = format!("no answer within {:?}", self.connect_timeout);
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        });
        result.map_err(|source| DialError::Connect {
            host: host.to_owned(),
            port,
            advice: advice(&source),
            source,
        })
    }

    async fn attempt(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in tokio::net::lookup_host((host, port)).await? {
            match self.connect_address(address).await {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn connect_address(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let unspecified: IpAddr = match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
        };
        let source = self.source.unwrap_or(unspecified);
        if source.is_ipv4() != address.is_ipv4() {
            return Err(io::Error::new(
                io::ErrorKind::AddrNotAvailable,
                format!("{address} is of another address family than the source address {source}"),
            ));
        }
        if !self.privileged_port {
            return socket(address, SocketAddr::new(source, 0))?
                .connect(address)
                .await;
        }
        let first = rand::random_range(PRIVILEGED_PORTS);
        let ports = (first..PRIVILEGED_PORTS.end).chain(PRIVILEGED_PORTS.start..first);
        for port in ports.take(PRIVILEGED_TRIES) {
            let attempt = match socket(address, SocketAddr::new(source, port)) {
                Ok(socket) => socket.connect(address).await,
                Err(error) => Err(error),
            };
            match attempt {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable
                    ) => {}
                other => return other,
            }
        }
        Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "no free port below 1024 was found",
        ))
    }
}

fn socket(to: SocketAddr, from: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if to.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    if from.port() != 0 || !from.ip().is_unspecified() {
        socket.bind(from)?;
    }
    Ok(socket)
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            "is the server running, and is the port in the volume's address right?"
        }
        io::ErrorKind::TimedOut => {
            "check the network path and firewalls between this node and the server"
        }
        io::ErrorKind::AddrNotAvailable => {
            "check that this node's source address is configured on this host"
        }
        io::ErrorKind::PermissionDenied => {
            "ports below 1024 need the privilege; or export with `insecure`"
        }
        _ => "check the server's name and the network",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_comes_from_the_nodes_own_address() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let dialer = Dialer::from_source("127.0.0.9".parse().unwrap());
        let (stream, accepted) =
            tokio::join!(dialer.connect_plain("127.0.0.1", port), listener.accept());
        assert!(stream.unwrap().nodelay().unwrap());
        assert_eq!(
            accepted.unwrap().1.ip(),
            "127.0.0.9".parse::<IpAddr>().unwrap()
        );
    }

    #[tokio::test]
    async fn a_refused_connection_says_what_to_try() {
        let port = {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.local_addr().unwrap().port()
        };
        let error = Dialer::default()
            .connect("127.0.0.1", port, Service::Nfs)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("is the server running"), "{error}");
    }
}
