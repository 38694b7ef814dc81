//! Keys at rest: sealed under another key with AES-256-GCM (NIST SP 800-38D).

use std::fmt;
use std::str::FromStr;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::{SecureRandom, SystemRandom};

/// Why something sealed does not open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it does not open with this key, or it was changed")]
pub struct SealError;

/// The host gives no random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the kernel gives no random numbers")]
pub struct NoRandomness;

/// A key of 32 bytes that seals others.
#[derive(Clone)]
pub struct SealingKey([u8; 32]);

impl fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealingKey(secret)")
    }
}

/// Random bytes.
///
/// # Errors
/// When the kernel gives none.
pub fn random<const N: usize>() -> Result<[u8; N], NoRandomness> {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| NoRandomness)?;
    Ok(bytes)
}

impl SealingKey {
    /// Drawn from another secret for one use (HKDF, RFC 5869).
    pub fn derived(secret: &[u8], purpose: &[u8]) -> SealingKey {
        let mut key = [0; 32];
        let pseudorandom = Salt::new(HKDF_SHA256, b"baton").extract(secret);
        // A hash's length of output is never too long.
        if let Ok(output) = pseudorandom.expand(&[purpose], HKDF_SHA256) {
            let _ = output.fill(&mut key);
        }
        SealingKey(key)
    }

    fn cipher(&self) -> Result<LessSafeKey, SealError> {
        UnboundKey::new(&AES_256_GCM, &self.0)
            .map(LessSafeKey::new)
            .map_err(|_| SealError)
    }

    /// Seals; `context` must be the same when it is opened.
    ///
    /// # Errors
    /// When the kernel gives no random numbers.
    pub fn seal(&self, context: &str, plain: &[u8]) -> Result<Vec<u8>, NoRandomness> {
        let nonce: [u8; NONCE_LEN] = random()?;
        let mut sealed = plain.to_vec();
        self.cipher()
            .map_err(|_| NoRandomness)?
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(context.as_bytes()),
                &mut sealed,
            )
            .map_err(|_| NoRandomness)?;
        Ok([nonce.as_slice(), &sealed].concat())
    }

    /// Opens what [`SealingKey::seal`] made.
    ///
    /// # Errors
    /// When the key or the context is another, or it was changed.
    pub fn open(&self, context: &str, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
        let (nonce, body) = sealed.split_at_checked(NONCE_LEN).ok_or(SealError)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| SealError)?;
        let mut plain = body.to_vec();
        let length = self
            .cipher()?
            .open_in_place(nonce, Aad::from(context.as_bytes()), &mut plain)
            .map_err(|_| SealError)?
            .len();
        plain.truncate(length);
        Ok(plain)
    }
}

/// The key that opens the root CA's: shown once, when it is made, and kept by nobody but the operator.
#[derive(Clone)]
pub struct RecoveryKey([u8; 32]);

impl fmt::Debug for RecoveryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecoveryKey(secret)")
    }
}

/// Why a text is not a recovery key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this is not a recovery key: it is BRK1- and 72 hexadecimal digits, with dashes as it was shown; a digit may be mistyped"
)]
pub struct RecoveryKeyError;

/// Digits between two dashes.
const GROUP: usize = 8;
/// Bytes that tell a mistyped key.
const CHECK_BYTES: usize = 4;

impl RecoveryKey {
    /// A new one.
    ///
    /// # Errors
    /// When the kernel gives no random numbers.
    pub fn new() -> Result<RecoveryKey, NoRandomness> {
        random().map(RecoveryKey)
    }

    /// What seals the root's key.
    pub fn sealing(&self) -> SealingKey {
        SealingKey::derived(&self.0, b"root key")
    }

    /// The text to write down.
    pub fn reveal(&self) -> String {
        let check = proto::tls::sha256(&self.0);
        let digits: String = self
            .0
            .iter()
            .chain(&check[..CHECK_BYTES])
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let groups: Vec<&str> = (0..digits.len())
            .step_by(GROUP)
            .map(|at| &digits[at..at + GROUP])
            .collect();
        format!("BRK1-{}", groups.join("-"))
    }
}

impl FromStr for RecoveryKey {
    type Err = RecoveryKeyError;
    fn from_str(text: &str) -> Result<RecoveryKey, RecoveryKeyError> {
        let body = text.trim().strip_prefix("BRK1-").ok_or(RecoveryKeyError)?;
        let digits: Vec<u8> = body
            .chars()
            .filter(|digit| *digit != '-')
            .map(|digit| digit.to_digit(16).map(|digit| digit as u8))
            .collect::<Option<_>>()
            .ok_or(RecoveryKeyError)?;
        let bytes: Vec<u8> = digits
            .chunks_exact(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect();
        let key: [u8; 32] = bytes
            .get(..32)
            .and_then(|key| key.try_into().ok())
            .ok_or(RecoveryKeyError)?;
        let check = proto::tls::sha256(&key);
        if digits.len() == 2 * (32 + CHECK_BYTES) && bytes[32..] == check[..CHECK_BYTES] {
            Ok(RecoveryKey(key))
        } else {
            Err(RecoveryKeyError)
        }
    }
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes from hexadecimal digits.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .chars()
        .map(|digit| digit.to_digit(16).map(|digit| digit as u8))
        .collect::<Option<_>>()?;
    digits.len().is_multiple_of(2).then(|| {
        digits
            .chunks_exact(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sealed_opens_with_the_same_key_and_context_only() {
        let key = SealingKey::derived(b"a", b"x");
        let sealed = key.seal("here", b"secret").unwrap();
        assert_eq!(key.open("here", &sealed).unwrap(), b"secret");
        assert!(key.open("there", &sealed).is_err());
        for other in [(b"a", b"y"), (b"b", b"x")] {
            let other = SealingKey::derived(other.0, other.1);
            assert!(other.open("here", &sealed).is_err());
        }
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(key.open("here", &changed).is_err(), "byte {at}");
            assert!(key.open("here", &sealed[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_recovery_key_reads_back_and_a_mistyped_one_is_told() {
        let key = RecoveryKey::new().unwrap();
        let text = key.reveal();
        let read: RecoveryKey = format!(" {text}\n").parse().unwrap();
        assert_eq!(read.0, key.0);
        assert!(!format!("{key:?}").contains(&text[5..13]));
        let last = text.pop_digit();
        assert!(last.parse::<RecoveryKey>().is_err());
        for bad in ["", "BRK1-", "BRK1-zz", &text[5..], &format!("{text}0")] {
            assert!(bad.parse::<RecoveryKey>().is_err(), "{bad}");
        }
    }

    trait PopDigit {
        fn pop_digit(&self) -> String;
    }

    impl PopDigit for String {
        /// The same with its last digit another one.
        fn pop_digit(&self) -> String {
            let mut other = self.clone();
            let last = other.pop();
            other.push(if last == Some('0') { '1' } else { '0' });
            other
        }
    }
}
