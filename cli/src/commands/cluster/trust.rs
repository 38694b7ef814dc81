//! `clusterctl cluster trust`: other clusters whose nodes may hand machines over to this one.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use proto::admin::{TrustAddRequest, TrustListRequest, TrustRemoveRequest, TrustView};

use crate::Context;
use crate::client::CliError;
use crate::output::{self, Format};

/// The largest certificate file read, bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// What can be done with them.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Trust a cluster by its root's certificate (there: clusterctl -o json cluster ca show).
    Add {
        /// What to call it here.
        name: String,
        /// A PEM file with its root's certificate.
        #[arg(long, value_name = "FILE")]
        ca: PathBuf,
    },
    /// Every cluster that is trusted.
    List,
    /// Trust it no more.
    Remove {
        /// Its name here.
        name: String,
    },
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Add { name, ca } => {
            let (root_pem, sha256) = root(&ca)?;
            let question = format!(
                "Trust cluster {name} with the root {sha256}? Compare it with what its administrator sees."
            );
            if !output::confirm(c.yes, &question)? {
                return Ok(ExitCode::FAILURE);
            }
            let request = TrustAddRequest {
                change: c.change(),
                name: name.clone(),
                root_pem,
            };
            let done = c
                .connect()
                .await?
                .api
                .trust_add(request)
                .await?
                .into_inner();
            match c.output {
                Format::Json => output::json(&done)?,
                Format::Table => output::text(format!("✔ cluster {name} is trusted ({sha256})"))?,
            }
        }
        Command::List => {
            let clusters = c
                .connect()
                .await?
                .api
                .trust_list(TrustListRequest {})
                .await?
                .into_inner()
                .clusters;
            match c.output {
                Format::Json => output::json(&clusters)?,
                Format::Table => {
                    output::table(&["NAME", "ROOT"], clusters.iter().map(row).collect())?;
                }
            }
        }
        Command::Remove { name } => {
            if !output::confirm(c.yes, &format!("Trust cluster {name} no more?"))? {
                return Ok(ExitCode::FAILURE);
            }
            let request = TrustRemoveRequest {
                change: c.change(),
                name: name.clone(),
            };
            let done = c
                .connect()
                .await?
                .api
                .trust_remove(request)
                .await?
                .into_inner();
            match c.output {
                Format::Json => output::json(&done)?,
                Format::Table => output::text(format!("✔ cluster {name} is trusted no more"))?,
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn row(cluster: &TrustView) -> Vec<String> {
    vec![cluster.name.clone(), cluster.sha256.clone()]
}

/// The one certificate in a file, and its fingerprint.
fn root(path: &PathBuf) -> Result<(String, String), CliError> {
    use std::io::Read;
    let bad = |why: String| CliError::Local(format!("{}: {why}", path.display()));
    let mut pem = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut pem))
        .map_err(|error| bad(error.to_string()))?;
    if pem.contains("PRIVATE KEY") {
        return Err(bad(
            "there is a private key in it; give the certificate alone".into(),
        ));
    }
    let certificates = proto::tls::certificates(&pem).map_err(|error| bad(error.to_string()))?;
    let [certificate] = certificates.as_slice() else {
        return Err(bad(format!(
            "{} certificates are in it; give the root's alone",
            certificates.len()
        )));
    };
    let hash = proto::tls::fingerprint(certificate);
    let sha256 = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((pem, sha256))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate() -> (String, String) {
        let key = rcgen::KeyPair::generate().expect("a key");
        let certificate = rcgen::CertificateParams::default()
            .self_signed(&key)
            .expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }

    #[test]
    fn a_file_with_one_certificate_is_taken_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = |text: &str| {
            let path = folder.path().join("ca.pem");
            std::fs::write(&path, text).expect("written");
            root(&path)
        };
        let (one, key) = certificate();
        let (pem, sha256) = file(&one).expect("a root");
        assert_eq!((pem.as_str(), sha256.len()), (one.as_str(), 64));
        let two = format!("{one}{}", certificate().0);
        for (bad, word) in [
            (two.as_str(), "2 certificates"),
            ("nothing", "no certificate"),
            (&format!("{one}{key}"), "private key"),
        ] {
            let error = file(bad).expect_err("bad").to_string();
            assert!(error.contains(word), "{error}");
            assert!(!error.contains("BEGIN"), "{error}");
        }
        assert!(root(&folder.path().join("none")).is_err());
    }
}
