//! A channel through TLS 1.3 to a node of the cluster whose root the access token names.
//!
//! The other side proves that it belongs to that cluster before a byte of the token leaves this host.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use proto::tls::{ClientStream, Expect};
use proto::token::AccessToken;
use rustls::{CertificateError, ClientConfig};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint, Uri};

use super::CliError;

/// How long a connect may take; the handshake after it has a bound of its own.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// An answer that is not under way: how often a silent node is asked for a sign of life, and how long it
/// may take.
const SILENCE: Duration = Duration::from_secs(5);

/// Why no connection through TLS came about.
#[derive(Debug, thiserror::Error)]
pub(super) enum DoorError {
    /// The network's word.
    #[error(transparent)]
    Network(io::Error),
    /// The certificate shown is not good.
    #[error("{0}")]
    Untrusted(String),
    /// Another protocol is spoken there.
    #[error("{0}")]
    Stranger(&'static str),
}

/// A channel to `host:port`; connects now, and again after the connection broke.
pub(super) async fn channel(address: &str, token: &AccessToken) -> Result<Channel, CliError> {
    let root = token
        .root()
        .map_err(|error| CliError::BadToken(error.to_string()))?;
    let config = proto::tls::client(Expect::Root(root), None).map_err(CliError::local)?;
    let uri = |scheme: &str| {
        format!("{scheme}://{address}")
            .parse::<Uri>()
            .map_err(|_| CliError::Address(address.to_owned()))
    };
    let host_and_port = address.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let (address, config) = (host_and_port.clone(), config.clone());
        async move { shake_hands(&address, config).await.map(TokioIo::new) }
    });
    // The connector does TLS itself, so tonic must not see `https`; the requests say it.
    Endpoint::from(uri("http")?)
        .origin(uri("https")?)
        .http2_keep_alive_interval(SILENCE)
        .keep_alive_timeout(SILENCE)
        .connect_with_connector(connector)
        .await
        .map_err(|error| refused(address, &error))
}

async fn shake_hands(
    address: &str,
    config: Arc<ClientConfig>,
) -> Result<ClientStream<TcpStream>, DoorError> {
    let late = |_| {
        let words = format!("no connection within {} s", CONNECT_TIMEOUT.as_secs());
        DoorError::Network(io::Error::new(io::ErrorKind::TimedOut, words))
    };
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address))
        .await
        .map_err(late)?
        .map_err(DoorError::Network)?;
    stream.set_nodelay(true).map_err(DoorError::Network)?;
    let stream = proto::tls::connect(config, stream).await.map_err(judged)?;
    match stream.get_ref().1.alpn_protocol() {
        Some(b"h2") => Ok(stream),
        _ => Err(DoorError::Stranger("it does not speak HTTP/2 inside TLS")),
    }
}

/// What a failed handshake says about the other side.
fn judged(error: io::Error) -> DoorError {
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidCertificate(why)) => DoorError::Untrusted(match why {
            CertificateError::Expired => {
                "its certificate has expired; is its clock right, and this one?".into()
            }
            CertificateError::NotValidYet => {
                "its certificate is not valid yet; is its clock right, and this one?".into()
            }
            CertificateError::Other(other) => other.0.to_string(),
            _ => "its certificate was not made by that cluster".into(),
        }),
        Some(rustls::Error::InvalidMessage(_)) => DoorError::Stranger("it does not speak TLS"),
        Some(_) => DoorError::Stranger("it does not speak TLS 1.3 as a node does"),
        None if error.kind() == io::ErrorKind::UnexpectedEof => DoorError::Network(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "it hung up before the TLS handshake was over; it is no clusterd, or has too many connections",
        )),
        None => DoorError::Network(error),
    }
}

/// The door's own word among the causes of an error.
pub(super) fn door<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a DoorError> {
    let mut cause = Some(error);
    while let Some(this) = cause {
        if let Some(door) = this.downcast_ref() {
            return Some(door);
        }
        cause = this.source();
    }
    None
}

fn refused(address: &str, error: &(dyn Error + 'static)) -> CliError {
    match door(error) {
        Some(DoorError::Untrusted(why)) => CliError::Trust {
            server: address.to_owned(),
            why: why.clone(),
        },
        Some(DoorError::Stranger(why)) => CliError::Stranger((*why).to_owned()),
        Some(DoorError::Network(network)) => CliError::Connect {
            server: address.to_owned(),
            cause: network.to_string(),
        },
        None => CliError::Connect {
            server: address.to_owned(),
            cause: super::error::innermost(error),
        },
    }
}
