//! Whose certificate is good: the checks of both sides of a handshake.
//!
//! A chain is checked against the roots of one cluster at a time, and the name in it must be of that same
//! cluster: another cluster's CA, trusted for its own machines, cannot name a node of ours.

use std::fmt;
use std::sync::Arc;

use cluster_model::Name;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
};
use webpki::KeyUsage;

use super::{CHAIN_MAX, Identity, fingerprint};

/// Whose certificates lead to a node: this cluster's roots, and those of clusters that it trusts.
#[derive(Clone)]
pub struct Anchors {
    /// This cluster's id.
    pub cluster: String,
    /// Its roots: one, or two while they are changed.
    pub roots: Arc<RootCertStore>,
    /// Other clusters that are trusted.
    pub foreign: Vec<(Name, Arc<RootCertStore>)>,
}

impl fmt::Debug for Anchors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Anchors")
            .field("cluster", &self.cluster)
            .field("roots", &self.roots.len())
            .field("foreign", &self.foreign.len())
            .finish()
    }
}

/// Who showed a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Member {
    /// A node of this cluster.
    Ours(Identity),
    /// A node of a cluster that is trusted under this name.
    Foreign(Name, Identity),
}

/// Whether a node of this cluster is the one that is meant.
type Meant = dyn Fn(&Identity) -> bool + Send + Sync;

/// Whom a connecting side wants to find.
#[derive(Clone)]
pub enum Expect {
    /// A node of this cluster that the function says yes to.
    Node(Anchors, Arc<Meant>),
    /// Any node of the cluster whose root has this SHA-256 fingerprint, as a token pins it.
    Root([u8; 32]),
}

impl Anchors {
    /// Whom a chain names, if it is good now.
    ///
    /// # Errors
    /// Why it is not.
    pub fn member(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
    ) -> Result<Member, Error> {
        let ours = check(leaf, above, &self.roots, usage, now).and_then(|identity| {
            if identity.cluster == self.cluster {
                Ok(Member::Ours(identity))
            } else {
                Err(wrong("it names a node of another cluster"))
            }
        });
        let why = match ours {
            Ok(member) => return Ok(member),
            Err(why) => why,
        };
        for (name, roots) in &self.foreign {
            if let Ok(identity) = check(leaf, above, roots, usage, now)
                && identity.cluster != self.cluster
            {
                return Ok(Member::Foreign(name.clone(), identity));
            }
        }
        Err(why)
    }
}

/// For which side of a connection a certificate is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// The accepting side's.
    Server,
    /// The connecting side's.
    Client,
}

fn wrong(why: impl Into<String>) -> Error {
    let why: String = why.into();
    let cause: Arc<dyn std::error::Error + Send + Sync> =
        Arc::from(Box::<dyn std::error::Error + Send + Sync>::from(why));
    Error::InvalidCertificate(CertificateError::Other(OtherError(cause)))
}

fn check(
    leaf: &CertificateDer<'_>,
    above: &[CertificateDer<'_>],
    roots: &RootCertStore,
    usage: Usage,
    now: UnixTime,
) -> Result<Identity, Error> {
    if above.len() >= CHAIN_MAX {
        return Err(wrong("its chain is too long"));
    }
    let parsed = webpki::EndEntityCert::try_from(leaf).map_err(|error| wrong(error.to_string()))?;
    let usage = match usage {
        Usage::Server => KeyUsage::server_auth(),
        Usage::Client => KeyUsage::client_auth(),
    };
    parsed
        .verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &roots.roots,
            above,
            now,
            usage,
            None,
            None,
        )
        .map_err(|error| match error {
            webpki::Error::CertExpired { .. } => {
                Error::InvalidCertificate(CertificateError::Expired)
            }
            webpki::Error::CertNotValidYet { .. } => {
                Error::InvalidCertificate(CertificateError::NotValidYet)
            }
            webpki::Error::UnknownIssuer => {
                Error::InvalidCertificate(CertificateError::UnknownIssuer)
            }
            other => wrong(other.to_string()),
        })?;
    Identity::of(leaf).map_err(|error| wrong(error.to_string()))
}

impl Expect {
    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        match self {
            Expect::Node(anchors, meant) => {
                match anchors.member(leaf, above, Usage::Server, now)? {
                    Member::Ours(identity) if meant(&identity) => Ok(()),
                    Member::Ours(identity) => Err(wrong(format!(
                        "{} answers where another node should",
                        identity.node
                    ))),
                    Member::Foreign(name, _) => {
                        Err(wrong(format!("a node of the cluster {name} answers")))
                    }
                }
            }
            Expect::Root(pinned) => {
                let root = above
                    .iter()
                    .find(|certificate| fingerprint(certificate) == *pinned)
                    .ok_or_else(|| {
                        wrong("its certificate does not lead to the root that the token names")
                    })?;
                let mut roots = RootCertStore::empty();
                roots.add(root.clone().into_owned())?;
                check(leaf, above, &roots, Usage::Server, now).map(drop)
            }
        }
    }
}

/// The connecting side's check of whom it found.
pub(super) struct Servers {
    expect: Expect,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Servers {
    pub(super) fn new(expect: Expect, provider: &CryptoProvider) -> Servers {
        Servers {
            expect,
            algorithms: provider.signature_verification_algorithms,
        }
    }
}

impl fmt::Debug for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Servers")
    }
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.expect.check(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The accepting side's check of who comes.
pub(super) struct Clients {
    anchors: Anchors,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Clients {
    pub(super) fn new(anchors: Anchors, provider: &CryptoProvider) -> Clients {
        Clients {
            anchors,
            algorithms: provider.signature_verification_algorithms,
        }
    }
}

impl fmt::Debug for Clients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clients")
    }
}

impl ClientCertVerifier for Clients {
    fn client_auth_mandatory(&self) -> bool {
        // Who shows nothing is nobody, and may do what nobody may.
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.anchors
            .member(end_entity, intermediates, Usage::Client, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
