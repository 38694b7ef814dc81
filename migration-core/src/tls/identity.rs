//! Who a monitor is on its memory channels: a key and a certificate that live as long as the process.

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use std::fmt;
use std::sync::Arc;

/// SHA-256 of a certificate (DER), by which the other side knows it. No secret.
#[derive(Clone, Copy)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// That of this certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Fingerprint {
        let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
        let mut bytes = [0; 32];
        // SHA-256 has 32 bytes.
        bytes.copy_from_slice(digest.as_ref());
        Fingerprint(bytes)
    }
}

/// Compares without telling by its duration where the first difference is.
impl PartialEq for Fingerprint {
    fn eq(&self, other: &Fingerprint) -> bool {
        let difference = self
            .0
            .iter()
            .zip(other.0)
            .fold(0, |acc, (a, b)| acc | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

impl Eq for Fingerprint {}

impl TryFrom<&[u8]> for Fingerprint {
    type Error = std::array::TryFromSliceError;
    fn try_from(bytes: &[u8]) -> Result<Fingerprint, Self::Error> {
        Ok(Fingerprint(bytes.try_into()?))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// No key could be drawn.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw a key for the memory channels: {0}")]
pub struct DrawError(String);

/// A key and its self-signed certificate. Clones are the same one; the key leaves the process on no path.
#[derive(Clone)]
pub struct Identity {
    pub(super) key: Arc<CertifiedKey>,
    pub(super) fingerprint: Fingerprint,
}

impl Identity {
    /// Draws a new one: ECDSA over P-256. The certificate is a wrapping for the public key: nobody
    /// looks at its name or its dates.
    ///
    /// # Errors
    /// When the system has no random numbers.
    pub fn draw() -> Result<Identity, DrawError> {
        let failed = |error: &dyn fmt::Display| DrawError(error.to_string());
        let pair = KeyPair::generate().map_err(|error| failed(&error))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, "baton monitor");
        let certificate = params.self_signed(&pair).map_err(|error| failed(&error))?;
        let certificate = certificate.der().clone();
        let key = PrivatePkcs8KeyDer::from(pair.serialize_der()).into();
        let key = super::provider()
            .key_provider
            .load_private_key(key)
            .map_err(|error| failed(&error))?;
        Ok(Identity {
            fingerprint: Fingerprint::of(&certificate),
            key: Arc::new(CertifiedKey::new(vec![certificate], key)),
        })
    }

    /// By which the other side knows it.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Shows this certificate, and no other, in handshakes.
    pub(super) fn resolver(&self) -> Arc<SingleCertAndKey> {
        Arc::new(SingleCertAndKey::from(Arc::clone(&self.key)))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.fingerprint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_identities_differ_and_neither_shows_its_key() {
        let (one, other) = (Identity::draw().unwrap(), Identity::draw().unwrap());
        assert_ne!(one.fingerprint(), other.fingerprint());
        assert_eq!(one.clone().fingerprint(), one.fingerprint());
        let shown = format!("{one:?} {one:#?}");
        let expected = format!("Identity({})", one.fingerprint());
        assert_eq!(shown, format!("{expected} {expected}"));
    }

    #[test]
    fn a_fingerprint_is_the_sha_256_of_the_certificate() {
        // FIPS 180-2, appendix B.1: the digest of "abc".
        let known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let abc = CertificateDer::from_slice(b"abc");
        assert_eq!(Fingerprint::of(&abc).to_string(), known);
        assert!(Fingerprint::try_from(&[0_u8; 31][..]).is_err());
    }

    #[test]
    fn one_bit_makes_another_fingerprint() {
        let one = Fingerprint([7; 32]);
        for bit in 0..256 {
            let mut other = one;
            other.0[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(one, other);
        }
    }
}
