//! The name in a certificate: a member of a cluster, as a URI among the subject's alternative names.

use std::fmt;

use cluster_model::{NodeId, NodeRole};
use rustls::pki_types::CertificateDer;

/// The URI's scheme.
const SCHEME: &str = "baton://";
/// The longest URI read, bytes.
const URI_BYTES_MAX: usize = 256;

/// A node of a cluster, as a certificate names it: `baton://<cluster>/node/<number>/<role>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster's id.
    pub cluster: String,
    /// The node's number there.
    pub node: NodeId,
    /// What it was when the certificate was made. What it may do now the log says.
    pub role: NodeRole,
}

/// Why a certificate names no member.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// It has no such URI.
    #[error("the certificate names no member of a cluster")]
    NoName,
    /// It cannot be read.
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    /// The URI is another thing.
    #[error("`{0}` does not name a node as baton://<cluster>/node/<number>/<role>")]
    BadUri(String),
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = self.role.as_str();
        write!(f, "{SCHEME}{}/node/{}/{role}", self.cluster, self.node.0)
    }
}

impl Identity {
    /// Reads the URI.
    ///
    /// # Errors
    /// When it is anything but the very form of [`Identity`]'s `Display`.
    pub fn parse(uri: &str) -> Result<Identity, IdentityError> {
        let bad = || IdentityError::BadUri(uri.chars().take(URI_BYTES_MAX).collect());
        if uri.len() > URI_BYTES_MAX {
            return Err(bad());
        }
        let mut parts = uri.strip_prefix(SCHEME).ok_or_else(bad)?.split('/');
        let mut next = || parts.next().ok_or_else(bad);
        let (cluster, kind, number, role) = (next()?, next()?, next()?, next()?);
        let role = NodeRole::parse(role).ok_or_else(bad)?;
        let identity = Identity {
            cluster: cluster.to_owned(),
            node: NodeId(number.parse().map_err(|_| bad())?),
            role,
        };
        // Whatever has another spelling (a sign, leading zeroes, a fifth part) is another name.
        let exact = kind == "node" && !cluster.is_empty() && identity.to_string() == uri;
        if exact { Ok(identity) } else { Err(bad()) }
    }

    /// Whom a certificate names. It is not checked here.
    ///
    /// # Errors
    /// When it names nobody, or more than one.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Identity, IdentityError> {
        let parsed = webpki::EndEntityCert::try_from(certificate)
            .map_err(|error| IdentityError::Unreadable(error.to_string()))?;
        let mut names = parsed.valid_uri_names();
        match (names.next(), names.next()) {
            (Some(uri), None) => Identity::parse(uri),
            _ => Err(IdentityError::NoName),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_reads_back_as_it_was_written_and_no_other_spelling_is_taken() {
        for role in [NodeRole::Voter, NodeRole::Learner, NodeRole::Witness] {
            let identity = Identity {
                cluster: "0b5a7e5c".into(),
                node: NodeId(17),
                role,
            };
            assert_eq!(Identity::parse(&identity.to_string()), Ok(identity));
        }
        for bad in [
            "",
            "baton://",
            "baton://c/node/1",
            "baton://c/node/1/king",
            "baton://c/node/01/voter",
            "baton://c/node/+1/voter",
            "baton://c/node/1/voter/x",
            "baton://c/user/1/voter",
            "baton:///node/1/voter",
            "spiffe://c/node/1/voter",
            "baton://c/node/99999999999999999999/voter",
        ] {
            assert!(Identity::parse(bad).is_err(), "{bad}");
        }
        assert!(Identity::parse(&format!("baton://{}/node/1/voter", "c".repeat(300))).is_err());
    }
}
