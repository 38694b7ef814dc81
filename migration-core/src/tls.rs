//! TLS 1.3 over the engine's connections: each side proves the one key that the other was told of.
//!
//! A monitor runs a guest, and who breaks out of the guest has what the monitor has: so it holds no identity
//! of its node. It draws a key when it starts, keeps it in memory alone, and those who arrange a migration tell
//! each side the fingerprint of the other's certificate over connections of their own. There is no authority,
//! no name and no date to check: a certificate is the announced one, byte for byte, or it is refused.
//!
//! ```text
//!  source                                        destination
//!  Identity::draw   ── fingerprint, arranged ──►  ExpectedSource::announce
//!  TlsConnector     ◄── fingerprint, arranged ──  Identity::draw
//!  ClientHello      ─────────────────────────►    nobody announced: closed
//!                   ◄─────────────────────────    certificate, signature: the announced ones, or the source leaves
//!  certificate, signature  ──────────────────►    the announced ones, or refused; proved: none but it from now on
//!  Hello(ticket)    ─────────────────────────►    the door, which knows nothing of all this
//! ```
//!
//! No resumption and no early data: both would let in somebody who did not sign this handshake.
//!
//! The kernel could seal records itself (`CONFIG_TLS`) and spare a copy; where it is not built, and for the
//! sake of one way of doing it everywhere, records are sealed here. [`kernel_seals`] says what a host offers.

mod identity;
mod verify;

pub use identity::{DrawError, Fingerprint, Identity};

use crate::net::{Acceptor, BoxStream, Connector};
use async_trait::async_trait;
use futures::future::BoxFuture;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::ServerName;
use rustls::server::NoServerSessionStorage;
use rustls::{ClientConfig, ServerConfig, SupportedCipherSuite};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::time::timeout;
use verify::{PinnedDestination, PinnedSource};

/// What is spoken inside, so that a TLS port of something else is never taken for this one.
pub const ALPN: &[u8] = b"baton-memory/1";

/// Sealed bytes that wait for the network at most: a whole frame, so that it leaves in few system calls.
const SEALED_BYTES_MAX: usize = 1 << 20;

/// Bytes taken from the network at once: the record layer alone would ask for 4 KiB at a time.
const READ_AHEAD_BYTES: usize = 128 << 10;

/// How long who failed the handshake may take to read the alert.
const ALERT_MAX: Duration = Duration::from_millis(300);

/// What who failed the handshake may still send before the connection is dropped.
const ALERT_WASTE_BYTES: u64 = 64 << 10;

/// The stack refuses to be set up as it must be; a fault of the build, not of the peer.
#[derive(Debug, thiserror::Error)]
#[error("TLS 1.3 cannot be set up: {0}")]
pub struct SetupError(#[from] rustls::Error);

/// The algorithms, the fastest here first; the destination takes the source's order.
///
/// With AES instructions AES-128-GCM seals two to three times as fast as ChaCha20-Poly1305, without them it is
/// the other way round. All three are beyond breaking, so speed decides.
pub fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: suites(aes_is_fast()),
        ..ring::default_provider()
    }
}

fn suites(aes_is_fast: bool) -> Vec<SupportedCipherSuite> {
    use ring::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    let mut suites = vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384];
    let chacha_at = if aes_is_fast { suites.len() } else { 0 };
    suites.insert(chacha_at, TLS13_CHACHA20_POLY1305_SHA256);
    suites
}

/// Whether the processor has instructions for AES and for GCM's multiplication.
fn aes_is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::arch::is_x86_feature_detected!("aes")
            && std::arch::is_x86_feature_detected!("pclmulqdq")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Whether this host's kernel offers to seal TLS records (kTLS). Nothing here depends on it.
pub fn kernel_seals() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_ulp")
        .is_ok_and(|names| names.split_whitespace().any(|name| name == "tls"))
}

/// Makes a source's connections and seals them; talks to the announced destination only.
pub struct TlsConnector<C> {
    inner: C,
    tls: tokio_rustls::TlsConnector,
}

impl<C> TlsConnector<C> {
    /// Over `inner`'s connections, as `identity`, to the monitor whose certificate is `destination`.
    ///
    /// # Errors
    /// See [`SetupError`].
    pub fn new(
        inner: C,
        identity: &Identity,
        destination: Fingerprint,
    ) -> Result<TlsConnector<C>, SetupError> {
        let provider = Arc::new(provider());
        let verifier = PinnedDestination::new(destination, &provider);
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(identity.resolver());
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        config.enable_early_data = false;
        // The name below is nobody's.
        config.enable_sni = false;
        Ok(TlsConnector {
            inner,
            tls: Arc::new(config).into(),
        })
    }
}

impl<C> fmt::Debug for TlsConnector<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsConnector")
    }
}

#[async_trait]
impl<C: Connector> Connector for TlsConnector<C> {
    async fn connect(&self, channel: u16) -> io::Result<BoxStream> {
        let stream = self.inner.connect(channel).await?;
        let stream = BufReader::with_capacity(READ_AHEAD_BYTES, stream);
        let name = ServerName::try_from("monitor").map_err(io::Error::other)?;
        let tls = self
            .tls
            .connect_with(name, stream, |session| {
                session.set_buffer_limit(Some(SEALED_BYTES_MAX));
            })
            .await
            .map_err(|error| unproved("the destination", error))?;
        speaks_ours(tls.get_ref().1.alpn_protocol())?;
        Ok(Box::new(tls))
    }
}

/// Takes a destination's connections and seals them; lets in the announced source only.
pub struct TlsAcceptor<A> {
    inner: A,
    tls: tokio_rustls::TlsAcceptor,
    expected: ExpectedSource,
    refused: Arc<AtomicU64>,
}

impl<A> TlsAcceptor<A> {
    /// Over `inner`'s connections, as `identity`, from the monitor that `expected` is told of.
    ///
    /// # Errors
    /// See [`SetupError`].
    pub fn new(
        inner: A,
        identity: &Identity,
        expected: ExpectedSource,
    ) -> Result<TlsAcceptor<A>, SetupError> {
        let provider = Arc::new(provider());
        let verifier = PinnedSource::new(expected.clone(), &provider);
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(identity.resolver());
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(TlsAcceptor {
            inner,
            tls: Arc::new(config).into(),
            expected,
            refused: Arc::default(),
        })
    }
}

impl<A> fmt::Debug for TlsAcceptor<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsAcceptor")
    }
}

#[async_trait]
impl<A: Acceptor> Acceptor for TlsAcceptor<A> {
    async fn accept(&self) -> io::Result<BoxFuture<'static, io::Result<BoxStream>>> {
        let securing = self.inner.accept().await?;
        let (tls, expected) = (self.tls.clone(), self.expected.clone());
        let refused = Arc::clone(&self.refused);
        Ok(Box::pin(async move {
            let secured = secure(securing, &tls, &expected).await;
            if let Err(error) = &secured {
                // Anybody can make this happen as often as they like: the log grows with its logarithm.
                let times = refused.fetch_add(1, Ordering::Relaxed) + 1;
                if times.is_power_of_two() {
                    tracing::warn!(%error, times, "a migration connection was refused");
                }
            }
            secured
        }))
    }
}

async fn secure(
    securing: BoxFuture<'static, io::Result<BoxStream>>,
    tls: &tokio_rustls::TlsAcceptor,
    expected: &ExpectedSource,
) -> io::Result<BoxStream> {
    let stream = securing.await?;
    if !expected.is_announced() {
        // Before any work is done for a stranger.
        return Err(refusal("no source has been announced yet"));
    }
    let stream = BufReader::with_capacity(READ_AHEAD_BYTES, stream);
    let accepting = tls.accept_with(stream, |session| {
        session.set_buffer_limit(Some(SEALED_BYTES_MAX));
    });
    let secured = match accepting.into_fallible().await {
        Ok(secured) => secured,
        Err((error, stream)) => {
            let _ = timeout(ALERT_MAX, let_read(stream)).await;
            return Err(unproved("who connected", error));
        }
    };
    let session = secured.get_ref().1;
    speaks_ours(session.alpn_protocol())?;
    let shown = session
        .peer_certificates()
        .and_then(|certificates| certificates.first())
        .map(Fingerprint::of);
    // Asked again: another source may have been announced during this handshake.
    if !shown.is_some_and(|shown| expected.prove(&shown)) {
        return Err(refusal("another source was announced meanwhile"));
    }
    Ok(Box::new(secured))
}

/// Closing with bytes unread would take the alert away from under the peer.
async fn let_read(mut stream: BufReader<BoxStream>) {
    if stream.shutdown().await.is_ok() {
        let mut rest = stream.take(ALERT_WASTE_BYTES);
        let _ = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await;
    }
}

fn refusal(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}

fn unproved(who: &str, error: io::Error) -> io::Error {
    let why = format!("{who} did not prove to be the announced monitor: {error}");
    io::Error::new(error.kind(), why)
}

fn speaks_ours(alpn: Option<&[u8]>) -> io::Result<()> {
    match alpn {
        Some(ALPN) => Ok(()),
        _ => Err(refusal(
            "the peer does not speak the memory stream's protocol",
        )),
    }
}

/// Which source a destination lets in. Clones are the same one.
///
/// The last announcement counts until a peer has proved to be the one announced. A source's node announces the
/// monitor that it will have send; should that monitor have been replaced before it connected, the node's later
/// word is the right one. Once one has proved its key the attempt is that monitor's, and a second one would mix
/// two machines' memory: from then on only a repetition is taken.
#[derive(Clone, Debug, Default)]
pub struct ExpectedSource(Arc<Mutex<Expectation>>);

#[derive(Clone, Copy, Debug, Default)]
enum Expectation {
    #[default]
    Nobody,
    Announced(Fingerprint),
    Proved(Fingerprint),
}

/// Another source has proved its key already.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a source with the certificate {present} is connected; {announced} would be a second one")]
pub struct AlreadyProved {
    /// The one that is connected, or was.
    pub present: Fingerprint,
    /// The one announced.
    pub announced: Fingerprint,
}

impl ExpectedSource {
    /// Expects the monitor whose certificate has this fingerprint. Saying it again changes nothing.
    ///
    /// # Errors
    /// When another one has connected.
    pub fn announce(&self, announced: Fingerprint) -> Result<(), AlreadyProved> {
        let mut expectation = self.lock();
        match *expectation {
            Expectation::Proved(present) if present != announced => {
                Err(AlreadyProved { present, announced })
            }
            Expectation::Proved(_) => Ok(()),
            Expectation::Nobody | Expectation::Announced(_) => {
                *expectation = Expectation::Announced(announced);
                Ok(())
            }
        }
    }

    fn is_announced(&self) -> bool {
        !matches!(*self.lock(), Expectation::Nobody)
    }

    /// Whether that is the one.
    fn admits(&self, shown: &Fingerprint) -> bool {
        match *self.lock() {
            Expectation::Nobody => false,
            Expectation::Announced(due) | Expectation::Proved(due) => due == *shown,
        }
    }

    /// Notes that a peer has proved this certificate; answers whether it is the one that is expected now.
    fn prove(&self, shown: &Fingerprint) -> bool {
        let mut expectation = self.lock();
        match *expectation {
            Expectation::Announced(due) | Expectation::Proved(due) if due == *shown => {
                *expectation = Expectation::Proved(due);
                true
            }
            _ => false,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Expectation> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
