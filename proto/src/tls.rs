//! Who is at the other end of a connection: certificates that name a member of a cluster, and TLS 1.3 with them.
//!
//! ```text
//!  root (pinned, or in the log) ──► issuing CA ──► certificate of a node
//!                                                  SAN URI  baton://<cluster>/node/<number>/<role>
//! ```
//! A certificate says who a node is, not where: names and addresses are not compared, members are. What a
//! connection shows is checked in full on every connection: no session is resumed, no early data is taken.

mod identity;
mod verify;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector};

pub use identity::{Identity, IdentityError};
pub use tokio_rustls::{client::TlsStream as ClientStream, server::TlsStream as ServerStream};
pub use verify::{Anchors, Expect, Member, Usage};

/// How long a handshake may take, both sides.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// HTTP/2 and nothing else is spoken inside (RFC 9113 section 3.2).
const ALPN: &[u8] = b"h2";
/// Certificates in a chain at most: leaf, issuing CA, root, and one to spare.
pub const CHAIN_MAX: usize = 4;

/// What a node shows: its certificate with those above it, and its key.
pub struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("certificates", &self.chain.len())
            .field("key", &"(secret)")
            .finish()
    }
}

impl Clone for Credentials {
    fn clone(&self) -> Credentials {
        Credentials {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
        }
    }
}

/// Why certificates or keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The text is not PEM, or holds something else.
    #[error("the {what} is not PEM as it should be: {why}")]
    Pem {
        /// Certificate or key.
        what: &'static str,
        /// What is wrong.
        why: String,
    },
    /// They do not fit together, or the library refuses them.
    #[error("certificate and key cannot be used: {0}")]
    Unusable(#[from] rustls::Error),
    /// The certificate names no member.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Reads every certificate of a PEM text, at most [`CHAIN_MAX`].
///
/// # Errors
/// When there is none, too many, or the text is something else.
pub fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bad = |why: String| TlsError::Pem {
        what: "certificate",
        why,
    };
    let chain = CertificateDer::pem_slice_iter(pem.as_bytes())
        .take(CHAIN_MAX + 1)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| bad(error.to_string()))?;
    match chain.len() {
        0 => Err(bad("it holds no certificate".into())),
        count if count > CHAIN_MAX => Err(bad(format!("over {CHAIN_MAX} certificates"))),
        _ => Ok(chain),
    }
}

/// The SHA-256 hash of a certificate's DER form: what tokens pin.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> [u8; 32] {
    sha256(certificate)
}

/// SHA-256.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref());
    hash
}

impl Credentials {
    /// From PEM: the chain from the leaf upwards, and the leaf's key (PKCS #8).
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn from_pem(chain: &str, key: &str) -> Result<Credentials, TlsError> {
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|_| TlsError::Pem {
            // What a key's parser has to say may quote the key.
            what: "key",
            why: "no private key in it".into(),
        })?;
        Ok(Credentials {
            chain: certificates(chain)?,
            key,
        })
    }

    /// Whom the leaf names.
    ///
    /// # Errors
    /// When it names nobody.
    pub fn identity(&self) -> Result<Identity, IdentityError> {
        let leaf = self.chain.first().ok_or(IdentityError::NoName)?;
        Identity::of(leaf)
    }
}

/// The host's wall clock, as everything else here reads it.
#[derive(Debug)]
struct Clock;

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(now())
    }
}

fn now() -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_nanos(crate::clock::realtime_ns()))
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    // TLS 1.3 alone: the others are not built.
    provider
        .cipher_suites
        .retain(|suite| suite.version() == &rustls::version::TLS13);
    // The quickest of them where the processor has AES, as every host of machines has.
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// How to connect to a member: it must be whom `expect` allows; `credentials` are shown when it asks.
///
/// # Errors
/// When the credentials cannot be used.
pub fn client(
    expect: Expect,
    credentials: Option<&Credentials>,
) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = provider();
    let verifier = Arc::new(verify::Servers::new(expect, &provider));
    let config = ClientConfig::builder_with_details(provider, Arc::new(Clock))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match credentials {
        Some(own) => config.with_client_auth_cert(own.chain.clone(), own.key.clone_key())?,
        None => config.with_no_client_auth(),
    };
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols = vec![ALPN.to_vec()];
    // The certificate names a member, not a host.
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// How to accept: members show their certificates, others (people with tokens, nodes that join) show none. What
/// is shown must be good.
///
/// # Errors
/// When the credentials cannot be used.
pub fn server(anchors: Anchors, credentials: &Credentials) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = provider();
    let verifier = Arc::new(verify::Clients::new(anchors, &provider));
    let mut config = ServerConfig::builder_with_details(provider, Arc::new(Clock))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(credentials.chain.clone(), credentials.key.clone_key())?;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// Shakes hands as the connecting side, within [`HANDSHAKE_TIMEOUT`].
///
/// # Errors
/// What the network or the other side says; the other side is not who it should be.
pub async fn connect<S>(config: Arc<ClientConfig>, stream: S) -> io::Result<ClientStream<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // Not sent: SNI is off.
    let name = ServerName::try_from("node.baton.invalid")
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    bounded(TlsConnector::from(config).connect(name, stream)).await
}

/// Shakes hands as the accepting side, within [`HANDSHAKE_TIMEOUT`].
///
/// # Errors
/// What the network or the other side says; what it shows is not good.
pub async fn accept<S>(config: Arc<ServerConfig>, stream: S) -> io::Result<ServerStream<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    bounded(TlsAcceptor::from(config).accept(stream)).await
}

async fn bounded<T>(handshake: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake)
        .await
        .unwrap_or_else(|_| {
            Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no TLS handshake within {} s", HANDSHAKE_TIMEOUT.as_secs()),
            ))
        })
}

/// Roots from PEM texts.
///
/// # Errors
/// When one of them is not a certificate that can be a root.
pub fn root_store<'p>(pems: impl IntoIterator<Item = &'p str>) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for pem in pems {
        for certificate in certificates(pem)? {
            store.add(certificate)?;
        }
    }
    Ok(store)
}
