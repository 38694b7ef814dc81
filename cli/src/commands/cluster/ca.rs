//! `clusterctl cluster ca`: the authority that certifies this cluster's nodes.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use proto::admin::{CaRotateReply, CaRotateRequest, CaShowReply, CaShowRequest};
use proto::token::Secret;

use crate::Context;
use crate::client::CliError;
use crate::output::{self, Format};
use crate::{private_file, prompt};

/// The variable that may hold the recovery key.
const RECOVERY_KEY: &str = "BATON_RECOVERY_KEY";
/// The largest file read for it, bytes.
const FILE_BYTES_MAX: u64 = 4_096;

/// What can be done with it.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Its roots, its issuing key's age, and nodes whose certificates are of an older one.
    Show,
    /// Make a new issuing key, under a new root with --root; nodes go on, both are trusted in between.
    Rotate {
        /// A new root too: everybody's tokens name the old one and have to be made again.
        #[arg(long)]
        root: bool,
        /// A file (mode 0600) with the recovery key; else BATON_RECOVERY_KEY, else it is asked for.
        #[arg(long, value_name = "FILE")]
        recovery_key_file: Option<PathBuf>,
    },
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Show => {
            let reply = c
                .connect()
                .await?
                .api
                .ca_show(CaShowRequest {})
                .await?
                .into_inner();
            match c.output {
                Format::Json => output::json(&reply)?,
                Format::Table => output::text(screen(&reply))?,
            }
        }
        Command::Rotate {
            root,
            recovery_key_file,
        } => {
            let question = if root {
                "Make a new root? Every access token names the old one and has to be made again, the recovery key is a new one."
            } else {
                "Make a new issuing key? Every node gets a new certificate."
            };
            if !output::confirm(c.yes, question)? {
                return Ok(ExitCode::FAILURE);
            }
            let mut connection = c.connect().await?;
            let request = CaRotateRequest {
                change: c.change(),
                recovery_key: recovery_key(recovery_key_file)?.expose().to_owned(),
                root,
            };
            let reply = connection.api.ca_rotate(request).await?.into_inner();
            match c.output {
                Format::Json => output::json(&reply)?,
                Format::Table => output::text(rotated(&reply))?,
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// From the file, the environment, or the person; never from an argument, which others on the host can read.
fn recovery_key(file: Option<PathBuf>) -> Result<Secret, CliError> {
    let text = match file {
        Some(path) => private_file::read(&path, FILE_BYTES_MAX)
            .map_err(CliError::local)?
            .ok_or_else(|| CliError::Local(format!("there is no file {}", path.display())))?,
        None => match std::env::var(RECOVERY_KEY) {
            Ok(text) => text,
            Err(_) => prompt::secret(
                "recovery key (not shown)",
                "--recovery-key-file FILE, or BATON_RECOVERY_KEY in the environment",
            )?,
        },
    };
    match text.trim() {
        "" => Err(CliError::Local("the recovery key is empty".into())),
        key => Ok(Secret::from_text(key)),
    }
}

fn screen(reply: &CaShowReply) -> String {
    let mut lines: Vec<String> = reply
        .roots
        .iter()
        .map(|root| format!("root         {}", root.sha256))
        .collect();
    lines.push(format!(
        "issuing key  generation {}, made by {}, until {}",
        reply.generation,
        reply.issuing_made_by,
        output::utc(reply.issuing_ends_at_ms)
    ));
    lines.push(format!(
        "this node    certificate of generation {}, until {}",
        reply.certificate_generation,
        output::utc(reply.certificate_ends_at_ms)
    ));
    lines.push(if reply.behind.is_empty() {
        "nodes        every certificate is of this generation".into()
    } else {
        format!(
            "nodes        with an older certificate, or none known: {}",
            reply.behind.join(", ")
        )
    });
    lines.join("\n")
}

fn rotated(reply: &CaRotateReply) -> String {
    let watch = "watch: clusterctl cluster ca show";
    if reply.recovery_key.is_empty() {
        return format!(
            "✔ issuing key of generation {} made; nodes take new certificates, {watch}\n  root  {}",
            reply.generation, reply.ca_sha256
        );
    }
    format!(
        "✔ new root made; every node learns of it, then takes a certificate under it, {watch}\n  root  {}\n\n  NEW RECOVERY KEY — shown now and NEVER AGAIN; the old one opens nothing any more:\n\n      {}\n\n  every token names the old root: make new ones while both are trusted: clusterctl token create USER --role ROLE",
        reply.ca_sha256, reply.recovery_key
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::admin::RootView;

    #[test]
    fn both_roots_and_the_nodes_behind_are_told() {
        let root = |sha256: &str| RootView {
            sha256: sha256.into(),
            certificate_pem: String::new(),
        };
        let reply = CaShowReply {
            roots: vec![root("aa"), root("bb")],
            behind: vec!["n2".into(), "n3".into()],
            ..CaShowReply::default()
        };
        let text = screen(&reply);
        assert!(text.contains("aa") && text.contains("bb"));
        assert!(text.contains("n2, n3"));
        let level = CaShowReply {
            behind: Vec::new(),
            ..reply
        };
        assert!(screen(&level).contains("every certificate"));
    }

    #[test]
    fn a_new_recovery_key_is_shown_only_with_a_new_root() {
        let reply = CaRotateReply {
            generation: 3,
            recovery_key: String::new(),
            ca_sha256: "aa".into(),
        };
        assert!(!rotated(&reply).contains("RECOVERY KEY"));
        let with_root = CaRotateReply {
            recovery_key: "RECOVER-ME".into(),
            ..reply
        };
        assert!(rotated(&with_root).contains("NEVER AGAIN"));
        assert_eq!(rotated(&with_root).matches("RECOVER-ME").count(), 1);
    }

    #[test]
    fn a_recovery_key_is_read_from_a_file_of_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        private_file::write(&path, b"RECOVER-ME\n").expect("written");
        let key = recovery_key(Some(path.clone())).expect("read");
        assert_eq!(key.expose(), "RECOVER-ME");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("a mode");
        assert!(recovery_key(Some(path)).is_err());
        assert!(recovery_key(Some(folder.path().join("none"))).is_err());
    }
}
