//! Which certificate counts: the announced one, with a signature of this handshake by its key.
//!
//! The fingerprint says *which* key must sign; the signature says that the peer *has* it. A certificate is
//! public, so that the first without the second would prove nothing: both are checked, always.

use super::{ExpectedSource, Fingerprint};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible,
    SignatureScheme,
};

/// The source's view of the destination.
#[derive(Debug)]
pub struct PinnedDestination {
    due: Fingerprint,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PinnedDestination {
    pub fn new(due: Fingerprint, provider: &CryptoProvider) -> PinnedDestination {
        PinnedDestination {
            due,
            algorithms: provider.signature_verification_algorithms,
        }
    }
}

impl ServerCertVerifier for PinnedDestination {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        alone(intermediates)?;
        if Fingerprint::of(end_entity) != self.due {
            return Err(another());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The destination's view of the source.
#[derive(Debug)]
pub struct PinnedSource {
    expected: ExpectedSource,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PinnedSource {
    pub fn new(expected: ExpectedSource, provider: &CryptoProvider) -> PinnedSource {
        PinnedSource {
            expected,
            algorithms: provider.signature_verification_algorithms,
        }
    }
}

impl ClientCertVerifier for PinnedSource {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        alone(intermediates)?;
        if !self.expected.admits(&Fingerprint::of(end_entity)) {
            return Err(another());
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// A pinned certificate is alone: a chain would be somebody's idea of an authority.
fn alone(intermediates: &[CertificateDer<'_>]) -> Result<(), Error> {
    if intermediates.is_empty() {
        return Ok(());
    }
    Err(another())
}

/// The peer reads the alert *access denied* (RFC 8446, section 6.2).
fn another() -> Error {
    CertificateError::ApplicationVerificationFailure.into()
}

/// Never asked: TLS 1.2 is not offered. Should it ever be, it is refused here too.
fn too_old() -> Error {
    PeerIncompatible::Tls12NotOfferedOrEnabled.into()
}
