//! What a volume's address and certificate authority make of its connections, and what to tell the person who adds it.

use storage_broker::tls::{ClientTls, ClientTlsError};
use storage_broker::volume::{NfsTls, VolumeUrl};

/// How a volume is to be recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Security {
    /// The address; it says `tls=require` where TLS is required.
    pub(super) url: String,
    /// The authority (PEM) that vouches for the server, where TLS is required.
    pub(super) authority: Option<String>,
    /// The address says that TLS is not wanted.
    off: bool,
    is_nfs: bool,
}

impl Security {
    /// Settles what was asked for. An authority makes TLS required. An address that cannot be understood is
    /// left to the broker to refuse.
    ///
    /// # Errors
    /// When address and authority contradict each other, or the authority is no such thing.
    pub(super) fn settle(url: String, authority: &str) -> Result<Security, ClientTlsError> {
        let Ok(mut parsed) = url.parse::<VolumeUrl>() else {
            return Ok(Security {
                url,
                authority: None,
                off: false,
                is_nfs: false,
            });
        };
        let tls = ClientTls::of_volume(&parsed, authority)?;
        let (mut off, mut is_nfs) = (false, false);
        if let VolumeUrl::Nfs(nfs) = &mut parsed {
            is_nfs = true;
            off = nfs.tls == Some(NfsTls::Off);
            if tls.is_some() {
                nfs.tls = Some(NfsTls::Require);
            }
        }
        Ok(Security {
            // As it was written, unless the record must say more.
            url: tls.as_ref().map_or(url, |_| parsed.to_string()),
            authority: tls.map(|_| authority.to_owned()),
            off,
            is_nfs,
        })
    }

    /// Whether the server is to be asked if it offers TLS: where its answer changes what is said.
    pub(super) fn asks(&self) -> bool {
        self.is_nfs && self.authority.is_none()
    }

    /// What the person who adds it should know, a line each.
    pub(super) fn notices(&self, offers_tls: bool) -> Vec<&'static str> {
        if !self.is_nfs {
            return Vec::new();
        }
        if self.authority.is_some() {
            return vec![
                "TLS 1.3 is required: the server proved its name, and a connection without TLS is never used",
            ];
        }
        let mut notices = vec![
            "WARNING: AUTH_SYS over plain TCP stops stale nodes, not hostile ones: whoever reaches the server can claim to be any node, and whoever is on the path can read and change the disks",
            "         keep the storage network apart and restrict the export to the nodes (docs/nfs-security.md)",
        ];
        match (self.off, offers_tls) {
            (true, true) => notices.push(
                "WARNING: the server offers TLS and the volume's address forbids it (tls=off): everything travels in clear",
            ),
            (true, false) => notices.push(
                "WARNING: the volume's address forbids TLS (tls=off): everything travels in clear, also once the server offers it",
            ),
            (false, true) => notices.extend([
                "WARNING: the server offers TLS and this volume does not use it, since nobody vouches for the server",
                "         to use it: clusterctl volume remove, then volume add with --tls-ca FILE, the authority that signed the server's certificate (PEM)",
            ]),
            (false, false) => {}
        }
        notices
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A certificate authority of nobody, good until 4096.
    const AUTHORITY: &str = include_str!("volume_security/authority.pem");

    #[test]
    fn an_authority_makes_tls_required_and_the_address_says_so() {
        for url in ["nfs://10.0.0.9/e", "nfs://10.0.0.9/e?tls=require"] {
            let settled = Security::settle(url.into(), AUTHORITY).unwrap();
            assert_eq!(settled.url, "nfs://10.0.0.9/e?tls=require");
            assert_eq!(settled.authority.as_deref(), Some(AUTHORITY));
            assert!(!settled.asks());
            assert!(!settled.notices(false).concat().contains("WARNING"));
        }
    }

    #[test]
    fn without_an_authority_nothing_is_required_and_the_danger_is_said() {
        let settled = Security::settle("nfs://10.0.0.9/e".into(), "").unwrap();
        assert_eq!(
            (settled.url.as_str(), settled.asks()),
            ("nfs://10.0.0.9/e", true)
        );
        assert_eq!(settled.authority, None);
        assert!(settled.notices(false).concat().contains("not hostile ones"));
        assert!(settled.notices(true).concat().contains("--tls-ca FILE"));
        let off = Security::settle("nfs://10.0.0.9/e?tls=off".into(), "").unwrap();
        for offers in [false, true] {
            assert!(off.notices(offers).concat().contains("tls=off"));
        }
        let directory = Security::settle("dir:/srv".into(), "").unwrap();
        assert!(!directory.asks() && directory.notices(false).is_empty());
    }

    #[test]
    fn contradictions_are_refused_at_the_door() {
        for (url, authority, says) in [
            ("nfs://10.0.0.9/e?tls=require", "", "--tls-ca FILE"),
            ("nfs://10.0.0.9/e?tls=off", AUTHORITY, "tls=off"),
            ("dir:/srv", AUTHORITY, "a directory"),
            ("nfs://10.0.0.9/e", "nonsense", "in PEM"),
            ("nfs://no..name/e", AUTHORITY, "neither an IP address"),
        ] {
            let error = Security::settle(url.into(), authority)
                .unwrap_err()
                .to_string();
            assert!(error.contains(says), "{url}: {error}");
        }
        let long = format!("{AUTHORITY}{}", "#".repeat(16 << 10));
        let error = Security::settle("nfs://10.0.0.9/e".into(), &long).unwrap_err();
        assert!(matches!(error, ClientTlsError::TooLong { .. }), "{error}");
    }
}
