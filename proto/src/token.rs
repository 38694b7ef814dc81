//! The lines that people carry from one terminal to another: join tokens and access tokens.
//!
//! Each is a prefix and the base64url form (RFC 4648 section 5, no padding) of a small JSON object. It
//! names the cluster's root by its SHA-256 fingerprint, so that whoever uses it knows that it speaks to the
//! right cluster before it shows the secret.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What a join token begins with.
const JOIN: &str = "BJ1.";
/// What an access token begins with.
const ACCESS: &str = "BT1.";
/// The longest line read, bytes.
const LINE_BYTES_MAX: usize = 4_096;
/// Bytes of a secret.
pub const SECRET_BYTES: usize = 32;
/// Addresses in a join token at most: every voter's.
pub const ADDRESSES_MAX: usize = 7;

/// Why a line is not a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is not {what}: {why}; copy the whole line, it begins with {prefix}")]
pub struct TokenError {
    what: &'static str,
    prefix: &'static str,
    why: String,
}

/// A secret that is never shown by accident.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Of random bytes.
    pub fn new(bytes: &[u8; SECRET_BYTES]) -> Secret {
        Secret(URL_SAFE_NO_PAD.encode(bytes))
    }

    /// From its text, as it came over the wire.
    pub fn from_text(text: &str) -> Secret {
        Secret(text.to_owned())
    }

    /// Its text, to be shown to the cluster it belongs to and to nobody else.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Its SHA-256 hash: what the cluster keeps. A secret has 256 bits of its own, so the hash needs no salt.
    pub fn hash(&self) -> [u8; 32] {
        crate::tls::sha256(self.0.as_bytes())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Lets one node in, once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinToken {
    /// The cluster's id.
    pub cluster: String,
    /// Of its root's certificate, in hex.
    pub ca_sha256: String,
    /// Where members answer, `host:port`.
    pub addresses: Vec<String>,
    /// Which token it is.
    pub id: String,
    /// What proves it.
    pub secret: Secret,
    /// The name of the node that it lets in.
    pub node: String,
    /// Until when, ms since the Unix epoch.
    pub expires_at_ms: u64,
}

/// Shows who a person or a program is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessToken {
    /// Of the cluster's root certificate, in hex.
    pub ca_sha256: String,
    /// Which token it is.
    pub id: String,
    /// What proves it.
    pub secret: Secret,
}

fn line(prefix: &str, value: &impl Serialize) -> String {
    // Plain data with text keys: it always has a JSON form.
    let json = serde_json::to_vec(value).unwrap_or_default();
    format!("{prefix}{}", URL_SAFE_NO_PAD.encode(json))
}

fn parse<T: DeserializeOwned>(
    what: &'static str,
    prefix: &'static str,
    line: &str,
) -> Result<T, TokenError> {
    let bad = |why: &str| TokenError {
        what,
        prefix,
        why: why.to_owned(),
    };
    let line = line.trim();
    if line.len() > LINE_BYTES_MAX {
        return Err(bad("it is too long"));
    }
    let body = line
        .strip_prefix(prefix)
        .ok_or_else(|| bad("it begins otherwise"))?;
    // What the parsers say may quote the secret.
    let json = URL_SAFE_NO_PAD
        .decode(body)
        .map_err(|_| bad("a part of it is missing or changed"))?;
    serde_json::from_slice(&json).map_err(|_| bad("a part of it is missing or changed"))
}

fn hash(what: &'static str, prefix: &'static str, hex: &str) -> Result<[u8; 32], TokenError> {
    cluster_model::trust::Sha256::try_from(hex.to_owned())
        .map(|hash| hash.0)
        .map_err(|error| TokenError {
            what,
            prefix,
            why: error.to_string(),
        })
}

impl JoinToken {
    /// The line to paste.
    pub fn line(&self) -> String {
        line(JOIN, self)
    }

    /// Reads the line.
    ///
    /// # Errors
    /// When it is not one.
    pub fn parse(text: &str) -> Result<JoinToken, TokenError> {
        let token: JoinToken = parse("a join token", JOIN, text)?;
        token.root()?;
        if token.addresses.is_empty() || token.addresses.len() > ADDRESSES_MAX {
            return Err(TokenError {
                what: "a join token",
                prefix: JOIN,
                why: "it names no member to ask".into(),
            });
        }
        Ok(token)
    }

    /// The root's fingerprint.
    ///
    /// # Errors
    /// When it is not one.
    pub fn root(&self) -> Result<[u8; 32], TokenError> {
        hash("a join token", JOIN, &self.ca_sha256)
    }
}

impl AccessToken {
    /// The line to keep.
    pub fn line(&self) -> String {
        line(ACCESS, self)
    }

    /// Reads the line.
    ///
    /// # Errors
    /// When it is not one.
    pub fn parse(text: &str) -> Result<AccessToken, TokenError> {
        let token: AccessToken = parse("an access token", ACCESS, text)?;
        token.root()?;
        Ok(token)
    }

    /// The root's fingerprint.
    ///
    /// # Errors
    /// When it is not one.
    pub fn root(&self) -> Result<[u8; 32], TokenError> {
        hash("an access token", ACCESS, &self.ca_sha256)
    }

    /// What goes into the `authorization` header of a call (RFC 6750): `Bearer <id>.<secret>`.
    pub fn bearer(&self) -> String {
        format!("Bearer {}.{}", self.id, self.secret.expose())
    }
}

/// Reads what [`AccessToken::bearer`] wrote.
pub fn parse_bearer(header: &str) -> Option<(&str, Secret)> {
    let (id, secret) = header.strip_prefix("Bearer ")?.split_once('.')?;
    let fits = |text: &str| {
        !text.is_empty()
            && text.len() <= 128
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    (fits(id) && fits(secret)).then(|| (id, Secret::from_text(secret)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            cluster: "c".into(),
            ca_sha256: "ab".repeat(32),
            addresses: vec!["10.0.0.1:7440".into()],
            id: "j1".into(),
            secret: Secret::new(&[7; SECRET_BYTES]),
            node: "n4".into(),
            expires_at_ms: 5,
        }
    }

    #[test]
    fn a_line_reads_back_and_a_damaged_one_is_refused_without_quoting_it() {
        let line = token().line();
        assert_eq!(JoinToken::parse(&format!("  {line}\n")), Ok(token()));
        let secret = token().secret.expose().to_owned();
        for cut in [0, 3, 4, 20, line.len() - 1] {
            let error = JoinToken::parse(&line[..cut]).unwrap_err().to_string();
            assert!(
                error.contains("BJ1.") && !error.contains(&secret),
                "{error}"
            );
        }
        assert!(JoinToken::parse(&"BJ1.".repeat(2_000)).is_err());
        assert!(AccessToken::parse(&line).is_err(), "another kind of token");
    }

    #[test]
    fn a_secret_is_not_shown() {
        let shown = format!("{:?}", token());
        assert!(!shown.contains(token().secret.expose()), "{shown}");
    }

    #[test]
    fn a_bearer_header_reads_back_and_nothing_strange_passes() {
        let token = AccessToken {
            ca_sha256: "ab".repeat(32),
            id: "t9".into(),
            secret: Secret::new(&[9; SECRET_BYTES]),
        };
        let header = token.bearer();
        let (id, secret) = parse_bearer(&header).unwrap();
        assert_eq!((id, secret), ("t9", token.secret.clone()));
        for bad in [
            "",
            "Bearer ",
            "Bearer x",
            "Bearer .y",
            "Basic a.b",
            "Bearer a b.c",
        ] {
            assert!(parse_bearer(bad).is_none(), "{bad}");
        }
    }
}
