//! A certificate authority and a server certificate of the embedded server's own making.
//!
//! ```text
//!  DIRECTORY/ca.pem       for clients: `clusterctl volume add --tls-ca`; written last, so it says that all are there
//!            server.pem   the server's certificate
//!            server.key   its private key, for the server's user only
//! ```
//!
//! The authority's key is not kept: it signs one certificate, and nobody can sign another. Whoever wants other
//! names, or the next ten years, moves the directory away and gives the new `ca.pem` to the volume.

use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::client::verify_server_name;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::ParsedCertificate;

use super::server_name;

/// For how many years the certificates are made.
const YEARS: i32 = 10;

const AUTHORITY: &str = "ca.pem";
const CERTIFICATE: &str = "server.pem";
const KEY: &str = "server.key";

/// Why there is no certificate of the server's own making.
#[derive(Debug, thiserror::Error)]
pub enum SelfSignedError {
    /// A certificate without names serves nobody.
    #[error(
        "the server listens on every address ({listen}): say with --tls-name under which names and addresses clients know it"
    )]
    NoName {
        /// As given.
        listen: IpAddr,
    },
    /// A name that no certificate can have.
    #[error("`{name}` is neither an IP address nor a host name")]
    BadName {
        /// As given.
        name: String,
    },
    /// The certificate there is has other names.
    #[error(
        "the certificate in {} does not name `{name}`: move the directory away to have a new one made, and give its ca.pem to the volumes",
        directory.display()
    )]
    OtherName {
        /// Where.
        directory: PathBuf,
        /// What it should name.
        name: String,
    },
    /// What is there is no certificate.
    #[error("{} holds no usable certificate: {problem}; move it away", path.display())]
    Unusable {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// It could not be made.
    #[error("cannot make a certificate: {problem}")]
    Make {
        /// Why.
        problem: String,
    },
    /// The file system.
    #[error("cannot keep the certificate in {}: {source}", directory.display())]
    Io {
        /// Where.
        directory: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// The names that the certificate is to have: the listen address, if it is one, and those given.
pub(super) fn names(listen: IpAddr, given: &[String]) -> Result<Vec<String>, SelfSignedError> {
    let mut names: Vec<String> = given.to_vec();
    if !listen.is_unspecified() {
        names.push(listen.to_string());
    }
    if names.is_empty() {
        return Err(SelfSignedError::NoName { listen });
    }
    for name in &names {
        server_name(name).map_err(|_| SelfSignedError::BadName { name: name.clone() })?;
    }
    Ok(names)
}

/// The certificate and key files of `directory`, made if there are none.
pub(crate) fn ensure(
    directory: &Path,
    names: &[String],
) -> Result<(PathBuf, PathBuf), SelfSignedError> {
    let failed = |source| SelfSignedError::Io {
        directory: directory.into(),
        source,
    };
    let path = directory.join(CERTIFICATE);
    match directory.join(AUTHORITY).try_exists() {
        Ok(true) => check(directory, &path, names)?,
        Ok(false) => {
            let made = make(names)?;
            std::fs::create_dir_all(directory).map_err(failed)?;
            for (name, text, mode) in [
                (KEY, &made.key, 0o600),
                (CERTIFICATE, &made.certificate, 0o644),
                (AUTHORITY, &made.authority, 0o644),
            ] {
                write(directory, name, text, mode).map_err(failed)?;
            }
            tracing::info!(authority = %directory.join(AUTHORITY).display(), ?names, "made a certificate");
        }
        Err(error) => return Err(failed(error)),
    }
    Ok((path, directory.join(KEY)))
}

fn check(directory: &Path, path: &Path, names: &[String]) -> Result<(), SelfSignedError> {
    let unusable = |problem: String| SelfSignedError::Unusable {
        path: path.into(),
        problem,
    };
    let certificate =
        CertificateDer::from_pem_file(path).map_err(|error| unusable(error.to_string()))?;
    let parsed =
        ParsedCertificate::try_from(&certificate).map_err(|error| unusable(error.to_string()))?;
    for name in names {
        let known = server_name(name).is_ok_and(|name| verify_server_name(&parsed, &name).is_ok());
        if !known {
            return Err(SelfSignedError::OtherName {
                directory: directory.into(),
                name: name.clone(),
            });
        }
    }
    Ok(())
}

/// Complete or not there at all.
fn write(directory: &Path, name: &str, text: &str, mode: u32) -> io::Result<()> {
    let part = directory.join(format!("{name}.part"));
    // A leftover may have another mode, which opening it would keep.
    match std::fs::remove_file(&part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&part)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&part, directory.join(name))?;
    std::fs::File::open(directory)?.sync_all()
}

/// PEM texts.
struct Made {
    authority: String,
    certificate: String,
    key: String,
}

fn make(names: &[String]) -> Result<Made, SelfSignedError> {
    let failed = |error: rcgen::Error| SelfSignedError::Make {
        problem: error.to_string(),
    };
    let mut authority = CertificateParams::new(Vec::new()).map_err(failed)?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let name = "Baton embedded NFS server's authority";
    authority.distinguished_name.push(DnType::CommonName, name);
    valid(&mut authority);
    let authority_key = KeyPair::generate().map_err(failed)?;
    let authority_certificate = authority.self_signed(&authority_key).map_err(failed)?;

    let mut server = CertificateParams::new(names.to_vec()).map_err(failed)?;
    server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let name = "Baton embedded NFS server";
    server.distinguished_name.push(DnType::CommonName, name);
    valid(&mut server);
    let key = KeyPair::generate().map_err(failed)?;
    let issuer = Issuer::new(authority, authority_key);
    let certificate = server.signed_by(&key, &issuer).map_err(failed)?;
    Ok(Made {
        authority: authority_certificate.pem(),
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    })
}

/// From the beginning of last year, so that no node's clock is behind it.
fn valid(params: &mut CertificateParams) {
    const YEAR_SECONDS: u64 = 31_556_952;
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let years = since.map_or(0, |since| since.as_secs() / YEAR_SECONDS);
    // A clock beyond the year 9000 has other troubles.
    let year = 1970 + i32::try_from(years.min(7000)).unwrap_or(0);
    params.not_before = rcgen::date_time_ymd(year - 1, 1, 1);
    params.not_after = rcgen::date_time_ymd(year + YEARS, 1, 1);
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn it_is_made_once_and_its_key_is_for_its_user_only() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("tls");
        let names = ["127.0.0.1".to_owned(), "nas.example".to_owned()];
        let (certificate, key) = ensure(&directory, &names).unwrap();
        assert_eq!((mode(&certificate), mode(&key)), (0o644, 0o600));
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        let first = (read(&certificate), read(&key));
        for public in [AUTHORITY, CERTIFICATE] {
            assert!(
                !read(&directory.join(public)).contains("PRIVATE"),
                "{public}"
            );
        }
        // A second start, also under fewer names, takes what is there.
        ensure(&directory, &names[..1]).unwrap();
        assert_eq!((read(&certificate), read(&key)), first);
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 3);
        let error = ensure(&directory, &["10.0.0.1".to_owned()]).unwrap_err();
        assert!(
            matches!(error, SelfSignedError::OtherName { .. }),
            "{error}"
        );
    }

    #[test]
    fn a_death_while_it_was_made_leaves_nothing_that_is_taken_for_whole() {
        let directory = tempfile::tempdir().unwrap();
        let names = ["127.0.0.1".to_owned()];
        // The authority is written last: without it the rest is made anew, whatever its mode was.
        std::fs::write(directory.path().join(KEY), "half").unwrap();
        std::fs::write(directory.path().join("server.key.part"), "half").unwrap();
        let (_, key) = ensure(directory.path(), &names).unwrap();
        assert!(
            std::fs::read_to_string(&key)
                .unwrap()
                .contains("PRIVATE KEY")
        );
        assert_eq!(mode(&key), 0o600);
    }

    #[test]
    fn a_certificate_needs_a_name() {
        let any = IpAddr::from([0, 0, 0, 0]);
        let error = names(any, &[]).unwrap_err();
        assert!(error.to_string().contains("--tls-name"), "{error}");
        assert_eq!(names(any, &["nas".to_owned()]).unwrap(), ["nas"]);
        assert!(names(any, &["a b".to_owned()]).is_err());
        let local = IpAddr::from([10, 0, 0, 1]);
        assert_eq!(names(local, &[]).unwrap(), ["10.0.0.1"]);
    }
}
