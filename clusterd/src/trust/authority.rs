//! The certificate authority: makes roots and issuing CAs, and certifies nodes.
//!
//! Names and lives of certificates follow from what is certified, so that an issuer can be put together again
//! from its key alone: no certificate is ever parsed here.

use std::time::Duration;

use cluster_model::trust::{Issuing, Root, Sha256};
use cluster_model::{NodeId, NodeRole};
use proto::tls::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
    SignatureAlgorithm,
};

use super::sealed::{self, NoRandomness, RecoveryKey, SealError, hex, unhex};

/// A root's life.
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * DAY);
/// An issuing CA's life.
const ISSUING_LIFE: Duration = Duration::from_secs(90 * DAY);
/// A node certificate's life; it is renewed at two thirds.
pub const NODE_LIFE: Duration = Duration::from_secs(7 * DAY);
/// Certificates are good from this long before they were made: hosts' wall clocks differ.
pub const BACKDATED: Duration = Duration::from_secs(DAY);
const DAY: u64 = 24 * 3_600;
/// An uncompressed point of P-256 (SEC 1, section 2.3.3), bytes.
const PUBLIC_KEY_BYTES: usize = 65;
/// What binds a sealed root key to its use.
const ROOT_CONTEXT: &str = "baton root key";

/// Why nothing was certified.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The library refuses.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// No random numbers.
    #[error(transparent)]
    Random(#[from] NoRandomness),
    /// The recovery key is another cluster's, or mistyped in a way that its check does not tell.
    #[error("the recovery key does not open this cluster's root key: {0}")]
    Recovery(#[from] SealError),
    /// The key is none.
    #[error("the public key is not an uncompressed point of P-256")]
    BadKey,
    /// The root's certificate cannot be read back.
    #[error(transparent)]
    Tls(#[from] proto::tls::TlsError),
}

/// A node's public key, as it is sent: an uncompressed point of P-256.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey([u8; PUBLIC_KEY_BYTES]);

impl PublicKey {
    /// Reads it; whether the point is on the curve its first use tells.
    ///
    /// # Errors
    /// When it has another form.
    pub fn parse(bytes: &[u8]) -> Result<PublicKey, AuthorityError> {
        match <[u8; PUBLIC_KEY_BYTES]>::try_from(bytes) {
            Ok(point) if point[0] == 4 => Ok(PublicKey(point)),
            _ => Err(AuthorityError::BadKey),
        }
    }

    /// Of a key pair.
    ///
    /// # Errors
    /// When the pair is of another kind.
    pub fn of(key: &KeyPair) -> Result<PublicKey, AuthorityError> {
        PublicKey::parse(key.public_key_raw())
    }

    /// As it is sent.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Its hash: what the log keeps of it.
    pub fn hash(&self) -> Sha256 {
        Sha256(proto::tls::sha256(&self.0))
    }
}

impl PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

/// A new key pair.
///
/// # Errors
/// When the library cannot.
pub fn new_key() -> Result<KeyPair, AuthorityError> {
    Ok(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?)
}

fn params(
    common_name: String,
    life: Duration,
    now_ms: u64,
) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "Baton");
    name.push(DnType::CommonName, common_name);
    params.distinguished_name = name;
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let now = Duration::from_millis(now_ms);
    params.not_before = epoch + now.saturating_sub(BACKDATED);
    params.not_after = epoch + (now + life);
    // Positive and of 16 bytes (RFC 5280 section 4.1.2.2).
    let mut serial: [u8; 16] = sealed::random()?;
    serial[0] &= 0x7f;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// What a CA's key is called: a part of its hash, so that two of one cluster are told apart.
fn key_name(key: &KeyPair) -> String {
    hex(&proto::tls::sha256(key.public_key_raw())[..8])
}

fn ca_params(
    kind: &str,
    key: &KeyPair,
    below: u8,
    life: Duration,
    now_ms: u64,
) -> Result<CertificateParams, AuthorityError> {
    let mut params = params(format!("{kind} {}", key_name(key)), life, now_ms)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// A root CA with its key, just made or just opened.
pub struct RootKey {
    key: KeyPair,
    /// Its certificate, its sealed key.
    pub root: Root,
}

impl RootKey {
    /// Makes a root, its key sealed under `recovery`.
    ///
    /// # Errors
    /// See [`AuthorityError`].
    pub fn make(recovery: &RecoveryKey, now_ms: u64) -> Result<RootKey, AuthorityError> {
        let key = new_key()?;
        let certificate = ca_params("root", &key, 1, ROOT_LIFE, now_ms)?.self_signed(&key)?;
        let sealed = recovery
            .sealing()
            .seal(ROOT_CONTEXT, &key.serialize_der())?;
        let root = Root {
            certificate_pem: certificate.pem(),
            fingerprint: Sha256(proto::tls::fingerprint(certificate.der())),
            sealed_key: hex(&sealed),
        };
        Ok(RootKey { key, root })
    }

    /// Opens a root's key.
    ///
    /// # Errors
    /// When the recovery key is another one.
    pub fn open(root: &Root, recovery: &RecoveryKey) -> Result<RootKey, AuthorityError> {
        let sealed = unhex(&root.sealed_key).ok_or(SealError)?;
        let der = recovery.sealing().open(ROOT_CONTEXT, &sealed)?;
        Ok(RootKey {
            key: key_from_der(der)?,
            root: root.clone(),
        })
    }

    /// Makes an issuing CA under it.
    ///
    /// # Errors
    /// See [`AuthorityError`].
    pub fn issue(
        &self,
        generation: u64,
        made_by: NodeId,
        now_ms: u64,
    ) -> Result<IssuingKey, AuthorityError> {
        let key = new_key()?;
        let params = ca_params("issuing", &key, 0, ISSUING_LIFE, now_ms)?;
        let above = Issuer::new(
            ca_params("root", &self.key, 1, ROOT_LIFE, now_ms)?,
            &self.key,
        );
        let certificate = params.signed_by(&key, &above)?;
        let life_ms = u64::try_from(ISSUING_LIFE.as_millis()).unwrap_or(u64::MAX);
        Ok(IssuingKey {
            issuing: Issuing {
                generation,
                certificate_pem: certificate.pem(),
                ends_at_ms: now_ms.saturating_add(life_ms),
                made_by,
            },
            root_pem: self.root.certificate_pem.clone(),
            key,
        })
    }
}

fn key_from_der(der: Vec<u8>) -> Result<KeyPair, AuthorityError> {
    let der = rustls::pki_types::PrivatePkcs8KeyDer::from(der);
    Ok(KeyPair::from_pkcs8_der_and_sign_algo(
        &der,
        &PKCS_ECDSA_P256_SHA256,
    )?)
}

/// The issuing CA with its key: what a voter signs with.
pub struct IssuingKey {
    key: KeyPair,
    /// What the log says of it.
    pub issuing: Issuing,
    /// The root that it leads to.
    pub root_pem: String,
}

impl std::fmt::Debug for IssuingKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IssuingKey")
            .field("generation", &self.issuing.generation)
            .field("key", &"(secret)")
            .finish()
    }
}

/// A node's certificate.
#[derive(Clone, Debug)]
pub struct Certified {
    /// Leaf, issuing CA, root, in PEM.
    pub chain_pem: String,
    /// When the leaf ends, ms since the Unix epoch.
    pub ends_at_ms: u64,
    /// Of the issuing CA.
    pub generation: u64,
}

impl IssuingKey {
    /// From its key as it lies on a disk or came from another voter.
    ///
    /// # Errors
    /// When the key cannot be read.
    pub fn from_parts(
        issuing: Issuing,
        root_pem: String,
        key_der: Vec<u8>,
    ) -> Result<IssuingKey, AuthorityError> {
        Ok(IssuingKey {
            key: key_from_der(key_der)?,
            issuing,
            root_pem,
        })
    }

    /// Its key, PKCS #8: to be sealed, or given to another voter.
    pub fn key_der(&self) -> Vec<u8> {
        self.key.serialize_der()
    }

    /// Certifies that a node has a key.
    ///
    /// # Errors
    /// See [`AuthorityError`].
    pub fn certify(
        &self,
        identity: &Identity,
        key: &PublicKey,
        now_ms: u64,
    ) -> Result<Certified, AuthorityError> {
        self.certify_for(identity, key, now_ms, NODE_LIFE)
    }

    /// The same for another life; a certificate never outlives its issuer.
    ///
    /// # Errors
    /// See [`AuthorityError`].
    pub fn certify_for(
        &self,
        identity: &Identity,
        key: &PublicKey,
        now_ms: u64,
        life: Duration,
    ) -> Result<Certified, AuthorityError> {
        let left_ms = self.issuing.ends_at_ms.saturating_sub(now_ms);
        let life = life.min(Duration::from_millis(left_ms));
        let mut params = params(
            format!("node {} of {}", identity.node.0, identity.cluster),
            life,
            now_ms,
        )?;
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let above = Issuer::new(
            ca_params("issuing", &self.key, 0, ISSUING_LIFE, now_ms)?,
            &self.key,
        );
        let leaf = params.signed_by(key, &above)?;
        let life_ms = u64::try_from(life.as_millis()).unwrap_or(u64::MAX);
        Ok(Certified {
            chain_pem: [
                leaf.pem().as_str(),
                &self.issuing.certificate_pem,
                &self.root_pem,
            ]
            .concat(),
            ends_at_ms: now_ms.saturating_add(life_ms),
            generation: self.issuing.generation,
        })
    }
}

/// A voter's identity, for what is made before the log says who is who.
pub fn identity(cluster: &str, node: NodeId, role: NodeRole) -> Identity {
    Identity {
        cluster: cluster.to_owned(),
        node,
        role,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: u64 = 1_764_000_000_000;

    #[test]
    fn a_root_opens_with_its_own_recovery_key_only() {
        let recovery = RecoveryKey::new().unwrap();
        let made = RootKey::make(&recovery, NOW_MS).unwrap();
        let opened = RootKey::open(&made.root, &recovery).unwrap();
        assert_eq!(opened.key.public_key_raw(), made.key.public_key_raw());
        let other = RecoveryKey::new().unwrap();
        assert!(RootKey::open(&made.root, &other).is_err());
    }

    #[test]
    fn an_issuer_put_together_from_its_key_signs_as_the_one_that_was_made() {
        let root = RootKey::make(&RecoveryKey::new().unwrap(), NOW_MS).unwrap();
        let issuing = root.issue(1, NodeId(1), NOW_MS).unwrap();
        let again = IssuingKey::from_parts(
            issuing.issuing.clone(),
            issuing.root_pem.clone(),
            issuing.key_der(),
        )
        .unwrap();
        let key = new_key().unwrap();
        let identity = identity("c", NodeId(3), NodeRole::Learner);
        let public = PublicKey::of(&key).unwrap();
        let certified = again.certify(&identity, &public, NOW_MS).unwrap();
        let credentials =
            proto::tls::Credentials::from_pem(&certified.chain_pem, &key.serialize_pem()).unwrap();
        assert_eq!(credentials.identity().unwrap(), identity);
        assert_eq!(certified.ends_at_ms, NOW_MS + 7 * DAY * 1_000);
    }

    #[test]
    fn a_certificate_does_not_outlive_its_issuer() {
        let root = RootKey::make(&RecoveryKey::new().unwrap(), NOW_MS).unwrap();
        let issuing = root.issue(1, NodeId(1), NOW_MS).unwrap();
        let late_ms = issuing.issuing.ends_at_ms - 1_000;
        let public = PublicKey::of(&new_key().unwrap()).unwrap();
        let identity = identity("c", NodeId(3), NodeRole::Voter);
        let certified = issuing.certify(&identity, &public, late_ms).unwrap();
        assert_eq!(certified.ends_at_ms, issuing.issuing.ends_at_ms);
    }

    #[test]
    fn what_is_not_a_point_is_no_key() {
        for bad in [&[][..], &[4; 64], &[2; 65], &[4; 66]] {
            assert!(PublicKey::parse(bad).is_err());
        }
    }
}
