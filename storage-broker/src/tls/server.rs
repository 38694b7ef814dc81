//! The embedded server's side: its certificate, and whether its clients need one.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::WebPkiClientVerifier;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use super::self_signed::{self, SelfSignedError};
use super::{ALPN, Stream, certificates, provider, roots};

/// The largest certificate, key or authority file read.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// The time for a client's part of the handshake: two messages. Without a bound, clients that begin one and
/// fall silent would fill the server.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How the embedded server offers TLS, as given on its command line. Without any of it there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct TlsArgs {
    /// Offer TLS with this certificate (PEM, its own first, then those that signed it)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Offer TLS with a certificate of the server's own making, kept in this directory; give its `ca.pem`
    /// to `clusterctl volume add --tls-ca`
    #[arg(long, value_name = "DIRECTORY", conflicts_with_all = ["tls_cert", "tls_key"])]
    pub tls_self_signed: Option<PathBuf>,
    /// A name or address of this host besides the listen address, for the certificate of its own making
    #[arg(long, value_name = "NAME", requires = "tls_self_signed")]
    pub tls_name: Vec<String>,
    /// Demand of every client a certificate signed by one of these (PEM), and refuse calls without TLS
    #[arg(long, value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// Refuse calls without TLS (AUTH_TOOWEAK)
    #[arg(long)]
    pub tls_only: bool,
}

/// Why the server cannot offer TLS as asked.
#[derive(Debug, thiserror::Error)]
pub enum ServerTlsError {
    /// A file.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Its contents.
    #[error("{} cannot be used: {problem}", path.display())]
    Unusable {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Half of what is needed.
    #[error(
        "{flag} needs a certificate of the server: give --tls-cert and --tls-key, or --tls-self-signed"
    )]
    NoCertificate {
        /// Which flag.
        flag: &'static str,
    },
    /// A certificate of its own making.
    #[error(transparent)]
    SelfSigned(#[from] SelfSignedError),
}

/// What the server needs to offer TLS.
#[derive(Clone)]
pub struct ServerTls {
    acceptor: TlsAcceptor,
    only: bool,
    /// How long a client may take for its part of the handshake.
    pub(crate) handshake_timeout: Duration,
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerTls")
            .field("only", &self.only)
            .finish_non_exhaustive()
    }
}

impl ServerTls {
    /// Reads what the arguments name; makes a certificate for `listen` where that is asked for and there is
    /// none. `None`: no TLS is asked for. Blocks on the file system.
    ///
    /// # Errors
    /// See [`ServerTlsError`].
    pub fn load(args: &TlsArgs, listen: IpAddr) -> Result<Option<ServerTls>, ServerTlsError> {
        let (certificate, key) = match (&args.tls_self_signed, &args.tls_cert, &args.tls_key) {
            (Some(directory), None, None) => {
                let names = self_signed::names(listen, &args.tls_name)?;
                self_signed::ensure(directory, &names)?
            }
            (None, Some(certificate), Some(key)) => (certificate.clone(), key.clone()),
            (None, None, None) if args.tls_only => {
                return Err(ServerTlsError::NoCertificate { flag: "--tls-only" });
            }
            (None, None, None) if args.tls_client_ca.is_some() => {
                let flag = "--tls-client-ca";
                return Err(ServerTlsError::NoCertificate { flag });
            }
            (None, None, None) => return Ok(None),
            _ => {
                return Err(ServerTlsError::NoCertificate {
                    flag: "half of --tls-cert and --tls-key, or all of them at once,",
                });
            }
        };
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(&certificate, error))?;
        let builder = match &args.tls_client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let authorities = roots(&read(path)?).map_err(|error| unusable(path, error))?;
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(authorities, provider()).build();
                builder.with_client_cert_verifier(verifier.map_err(|error| unusable(path, error))?)
            }
        };
        let chain =
            certificates(&read(&certificate)?).map_err(|error| unusable(&certificate, error))?;
        // The error of the parser says nothing of the key itself.
        let secret = PrivateKeyDer::from_pem_slice(read(&key)?.as_bytes())
            .map_err(|error| unusable(&key, error))?;
        let mut config = builder
            .with_single_cert(chain, secret)
            .map_err(|error| unusable(&certificate, error))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // Connections live long and clients of ours resume none: a ticket would only be one more secret.
        config.send_tls13_tickets = 0;
        Ok(Some(ServerTls {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            only: args.tls_only || args.tls_client_ca.is_some(),
            handshake_timeout: HANDSHAKE_TIMEOUT,
        }))
    }

    /// Whether calls without TLS are refused.
    pub(crate) fn is_required(&self) -> bool {
        self.only
    }

    /// The server's side of the handshake.
    pub(crate) async fn accept(&self, stream: TcpStream) -> std::io::Result<Stream> {
        let secured = self.acceptor.accept(stream).await?;
        Ok(Stream::from(tokio_rustls::TlsStream::from(secured)))
    }
}

fn unusable(path: &Path, problem: impl ToString) -> ServerTlsError {
    ServerTlsError::Unusable {
        path: path.into(),
        problem: problem.to_string(),
    }
}

fn read(path: &Path) -> Result<String, ServerTlsError> {
    use std::io::Read as _;
    let failed = |source| ServerTlsError::Read {
        path: path.into(),
        source,
    };
    let mut text = String::new();
    std::fs::File::open(path)
        .map_err(failed)?
        .take(FILE_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(unusable(
            path,
            format!("it is longer than {FILE_BYTES_MAX} bytes"),
        ));
    }
    Ok(text)
}
