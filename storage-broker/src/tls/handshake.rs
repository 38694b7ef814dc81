//! From a TCP connection to one under TLS, or a reason why not: the client's side.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError, ClientConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::starttls::{self, Answer};
use super::{ClientTlsError, Stream, invalid, server_name};

/// Why a connection could not be made secure. Nothing but the question was sent in clear.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// No TLS: the server has it not turned on, or somebody in the path stripped the offer.
    #[error(
        "the server offers no TLS on this port ({answer}), and nothing is sent without; turn RPC-with-TLS on there, and if it is on, somebody in the path takes its offer away"
    )]
    NotOffered {
        /// How it said so.
        answer: String,
    },
    /// It did not answer as an RPC server does.
    #[error(
        "the server's answer to the question for TLS cannot be used: {problem}; check the port"
    )]
    NoAnswer {
        /// What it did.
        problem: String,
    },
    /// The handshake.
    #[error("the TLS handshake failed: {source}; {advice}")]
    Handshake {
        /// What happened.
        source: io::Error,
        /// What to try.
        advice: &'static str,
    },
    /// The host cannot be verified.
    #[error(transparent)]
    Host(#[from] ClientTlsError),
    /// It took too long.
    #[error(
        "the server did not finish the TLS handshake in time; is its handshake service (tlshd) running?"
    )]
    TimedOut,
}

/// Asks for TLS, then shakes hands.
pub(super) async fn connect(
    mut stream: TcpStream,
    host: &str,
    program: (u32, u32),
    config: Arc<ClientConfig>,
) -> Result<Stream, TlsError> {
    let name: ServerName<'static> = server_name(host)?;
    match ask(&mut stream, program).await? {
        Answer::StartTls => {}
        Answer::No(answer) => return Err(TlsError::NotOffered { answer }),
    }
    // Not one byte behind the answer was read: what an attacker wrote there in clear is the
    // handshake's to refuse, never a reply to a later call.
    let connecting = TlsConnector::from(config).connect(name, stream);
    let secured = connecting.await.map_err(|source| TlsError::Handshake {
        advice: advice(&source),
        source,
    })?;
    Ok(Stream::from(tokio_rustls::TlsStream::from(secured)))
}

/// Asks a server whether it offers TLS, and reads the answer and not one byte more.
pub(crate) async fn ask(stream: &mut TcpStream, program: (u32, u32)) -> Result<Answer, TlsError> {
    let xid = rand::random();
    let asked = async {
        stream.write_all(&starttls::question(xid, program)).await?;
        let mark = stream.read_u32().await?;
        let Some(length) = starttls::answer_bytes(mark) else {
            return Err(invalid(format!("a record marked {mark:#010x}")));
        };
        let mut answer = vec![0; length];
        stream.read_exact(&mut answer).await?;
        starttls::judge(xid, Bytes::from(answer)).map_err(|error| invalid(error.to_string()))
    };
    asked.await.map_err(|error| TlsError::NoAnswer {
        problem: error.to_string(),
    })
}

fn advice(error: &io::Error) -> &'static str {
    use rustls::Error as E;
    let source = error.get_ref().and_then(|inner| inner.downcast_ref::<E>());
    match source {
        Some(E::InvalidCertificate(problem)) => match problem {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "its certificate is not signed by the authority in the volume's record: if the server's authority was changed, remove the volume and add it with the new one (`--tls-ca`); if not, this is not the server"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "its certificate is for another name: use in the volume's address the name or IP address that it has as a subject alternative name"
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "renew the server's certificate, or correct this node's clock"
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "correct this node's clock, or the server's certificate"
            }
            _ => "give the server a certificate of its own (not the authority's), for serverAuth",
        },
        Some(E::AlertReceived(AlertDescription::ProtocolVersion) | E::PeerIncompatible(_)) => {
            "the server must speak TLS 1.3"
        }
        Some(E::AlertReceived(AlertDescription::NoApplicationProtocol)) => {
            "the server does not speak RPC (\"sunrpc\") under TLS on this port"
        }
        Some(E::AlertReceived(_)) => "see the server's log",
        Some(E::InvalidMessage(_) | E::InappropriateMessage { .. }) => {
            "it offered TLS and then spoke something else: somebody in the path may have answered in its place"
        }
        _ => "the connection broke: see the server's log (with the Linux kernel's server, tlshd's)",
    }
}
