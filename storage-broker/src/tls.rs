//! RPC-with-TLS (RFC 9289): connections to storage servers that nobody on the path can read or change.
//!
//! ```text
//!  client                                         server
//!    │  NULL, credential AUTH_TLS ───────────────►  │
//!    │  ◄─────────── success, verifier "STARTTLS"   │   from here on not one byte in clear
//!    │  ClientHello (TLS 1.3, ALPN "sunrpc") ────►  │
//!    │  ◄──────────────────────── its certificate   │   chain to the volume's authority; name = host of the address
//!    │  ordinary calls, AUTH_SYS, under TLS  ────►  │
//! ```
//!
//! What the server's answer to the first call says is not to be trusted: who stands in the path can
//! strip it. So whether TLS is used never follows from the answer, only from the volume's record:
//! with an authority in it every connection is under TLS or there is none.
//!
//! The server's name is verified, AUTH_SYS goes on inside. A client certificate is presented only by
//! who was given one ([`ClientTls::with_certificate`]); nodes have none for this yet.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::io;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;

use crate::volume::{NfsTls, VolumeUrl};

pub(crate) mod handshake;
pub(crate) mod self_signed;
pub(crate) mod server;
pub(crate) mod starttls;
mod stream;
#[cfg(test)]
pub(crate) mod tests;

pub use handshake::TlsError;
pub use self_signed::SelfSignedError;
pub use server::{ServerTls, ServerTlsError};
pub use stream::Stream;
pub(crate) use stream::{ReadHalf, WriteHalf};

/// The protocol's name in the handshake (RFC 9289, section 5; registered as "sunrpc").
pub(crate) const ALPN: &[u8] = b"sunrpc";

/// The largest PEM text of an authority: some certificates. It is part of the volume's record, which is in
/// the log and in every machine file.
pub const CA_BYTES_MAX: usize = 16 << 10;

/// The most certificates in it.
const CA_CERTIFICATES_MAX: usize = 16;

/// What connections to one server must prove: it holds the authorities that may vouch for the server.
#[derive(Clone)]
pub struct ClientTls {
    /// The PEM texts: what makes two of them equal.
    authority: Arc<str>,
    certificate: Option<Arc<str>>,
    config: Arc<ClientConfig>,
}

/// Why the parts of a client's TLS do not make one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientTlsError {
    /// Too long.
    #[error(
        "the certificate authority has {bytes} bytes; at most {CA_BYTES_MAX} are taken: give only the certificates that sign the storage server's"
    )]
    TooLong {
        /// As given.
        bytes: usize,
    },
    /// Not PEM, not certificates.
    #[error(
        "the certificate authority cannot be used: {problem}; give certificates in PEM (`-----BEGIN CERTIFICATE-----`)"
    )]
    Authority {
        /// What is wrong.
        problem: String,
    },
    /// The client's own certificate.
    #[error("the client's certificate cannot be used: {problem}")]
    Certificate {
        /// What is wrong.
        problem: String,
    },
    /// TLS is required and nobody vouches for the server.
    #[error(
        "the volume requires TLS (`tls=require`) and no certificate authority is given that vouches for its server: `clusterctl volume add … --tls-ca FILE`"
    )]
    NoAuthority,
    /// An authority where it would say nothing.
    #[error(
        "a certificate authority is given for a volume {why}: leave it out, or change the address"
    )]
    Pointless {
        /// Why it says nothing.
        why: &'static str,
    },
    /// The host's name cannot be in a certificate.
    #[error("`{host}` is neither an IP address nor a name that a certificate can have")]
    Host {
        /// As in the address.
        host: String,
    },
}

impl ClientTls {
    /// Trusts servers whose certificate chains to one of these PEM certificates.
    ///
    /// # Errors
    /// See [`ClientTlsError`].
    pub fn trusting(authority: &str) -> Result<ClientTls, ClientTlsError> {
        let config = base(authority)?.with_no_client_auth();
        Ok(ClientTls::finish(authority, None, config))
    }

    /// The same, and presents a certificate (PEM, its own first) to servers that ask for one.
    ///
    /// # Errors
    /// See [`ClientTlsError`].
    pub fn with_certificate(
        authority: &str,
        certificate: &str,
        key: &str,
    ) -> Result<ClientTls, ClientTlsError> {
        let bad = |problem: String| ClientTlsError::Certificate { problem };
        let chain = certificates(certificate).map_err(bad)?;
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
            .map_err(|error| bad(format!("its key: {error}")))?;
        let config = base(authority)?
            .with_client_auth_cert(chain, key)
            .map_err(|error| bad(error.to_string()))?;
        Ok(ClientTls::finish(authority, Some(certificate), config))
    }

    fn finish(authority: &str, certificate: Option<&str>, mut config: ClientConfig) -> ClientTls {
        config.alpn_protocols = vec![ALPN.to_vec()];
        // A resumed session would carry on a certificate that has expired or been replaced since;
        // connections live long, so the full handshake costs nothing.
        config.resumption = Resumption::disabled();
        ClientTls {
            authority: authority.into(),
            certificate: certificate.map(Into::into),
            config: Arc::new(config),
        }
    }

    /// What an NFS volume's address and the authority in its record (PEM, may be empty) ask for
    /// together. `None` is plain TCP; an address that requires TLS never comes out so.
    ///
    /// # Errors
    /// When they contradict each other, or the authority is no such thing.
    pub fn of_volume(
        url: &VolumeUrl,
        authority: &str,
    ) -> Result<Option<ClientTls>, ClientTlsError> {
        let why = match url {
            VolumeUrl::Nfs(url) => match (url.tls, authority.is_empty()) {
                (Some(NfsTls::Require), true) => return Err(ClientTlsError::NoAuthority),
                (Some(NfsTls::Off) | None, true) => return Ok(None),
                (Some(NfsTls::Require) | None, false) => {
                    server_name(&url.host)?;
                    return ClientTls::trusting(authority).map(Some);
                }
                (Some(NfsTls::Off), false) => "whose address says `tls=off`",
            },
            VolumeUrl::Dir(_) if authority.is_empty() => return Ok(None),
            VolumeUrl::Dir(_) => "that is a directory",
        };
        Err(ClientTlsError::Pointless { why })
    }

    /// Asks a server that has just been connected for TLS, and makes the connection secure.
    ///
    /// # Errors
    /// See [`TlsError`]; nothing but the question was sent in clear.
    pub(crate) async fn secure(
        &self,
        stream: TcpStream,
        host: &str,
        program: (u32, u32),
    ) -> Result<Stream, TlsError> {
        handshake::connect(stream, host, program, self.config.clone()).await
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls")
            .field("authority_bytes", &self.authority.len())
            .field("certificate", &self.certificate.is_some())
            .finish_non_exhaustive()
    }
}

impl PartialEq for ClientTls {
    fn eq(&self, other: &Self) -> bool {
        (&self.authority, &self.certificate) == (&other.authority, &other.certificate)
    }
}

impl Eq for ClientTls {}

impl Hash for ClientTls {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.authority.hash(state);
        self.certificate.hash(state);
    }
}

/// The one provider of the tree, named here so that no global default decides.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

type NeedsIdentity = rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>;

fn base(authority: &str) -> Result<NeedsIdentity, ClientTlsError> {
    if authority.len() > CA_BYTES_MAX {
        return Err(ClientTlsError::TooLong {
            bytes: authority.len(),
        });
    }
    let bad = |problem: String| ClientTlsError::Authority { problem };
    let roots = roots(authority).map_err(bad)?;
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| bad(error.to_string()))?;
    Ok(builder.with_root_certificates(roots))
}

/// The certificates of a PEM text, in their order; at least one.
fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .take(CA_CERTIFICATES_MAX + 1)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("{error}"))?;
    match certificates.len() {
        0 => Err("it holds no certificate".into()),
        1..=CA_CERTIFICATES_MAX => Ok(certificates),
        _ => Err(format!(
            "it holds more than {CA_CERTIFICATES_MAX} certificates"
        )),
    }
}

fn roots(pem: &str) -> Result<Arc<rustls::RootCertStore>, String> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    Ok(Arc::new(roots))
}

/// The host of an address as a certificate names it: an IP address or a DNS name.
fn server_name(host: &str) -> Result<ServerName<'static>, ClientTlsError> {
    ServerName::try_from(host.to_owned()).map_err(|_| ClientTlsError::Host {
        host: host.to_owned(),
    })
}

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}
