//! `clusterd join`: checks this host, and hands a join token to the daemon that runs on it.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::admin::admin_client::AdminClient;
use proto::admin::{Change, NodeJoinRequest};
use proto::token::JoinToken;

use crate::check::{self, Finding};
use crate::config::Config;

/// How long a join may take: the entry, the certificate, the log's way here.
const JOIN_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest input read, bytes: a token is a line.
const INPUT_BYTES_MAX: u64 = 8 * 1024;

/// Why this host's daemon did not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The token cannot be read.
    #[error("cannot read the join token{}: {source}", path.as_ref().map(|path| format!(" from {}", path.display())).unwrap_or_default())]
    Read {
        /// From where, if not standard input.
        path: Option<PathBuf>,
        /// Why.
        source: std::io::Error,
    },
    /// It is not one.
    #[error(
        "{0}\n  try: clusterctl node add NAME   (on the cluster; it prints the line to paste here)"
    )]
    Token(#[from] proto::token::TokenError),
    /// The check found that it would not work.
    #[error(
        "{}\nthis host is not fit to join: nothing was changed, and the token is still good\n  try: what stands under what failed, then clusterd join again; --skip-check joins all the same",
        check::table(findings)
    )]
    Unfit {
        /// All that was found.
        findings: Vec<Finding>,
    },
    /// No daemon runs here.
    #[error(
        "no clusterd answers at {}: {why}\n  try: systemctl start clusterd, then join again; with another --data-dir give it here too", socket.display()
    )]
    NoDaemon {
        /// Its socket.
        socket: PathBuf,
        /// What the system said.
        why: std::io::Error,
    },
    /// It, or the cluster, refused.
    #[error("{0}")]
    Refused(String),
}

fn token(file: Option<&Path>) -> Result<String, JoinError> {
    let failed = |source| JoinError::Read {
        path: file.map(Path::to_owned),
        source,
    };
    let mut text = String::new();
    match file {
        Some(path) => std::fs::File::open(path)
            .map_err(failed)?
            .take(INPUT_BYTES_MAX)
            .read_to_string(&mut text),
        None => std::io::stdin()
            .take(INPUT_BYTES_MAX)
            .read_to_string(&mut text),
    }
    .map_err(failed)?;
    Ok(text)
}

/// Only checks this host, with the token that comes on standard input or in the file, or without one.
///
/// # Errors
/// See [`JoinError`]; what is found is no error.
pub async fn check(config: &Config, token_file: Option<&Path>) -> Result<Vec<Finding>, JoinError> {
    let line = if token_file.is_none() && std::io::stdin().is_terminal() {
        String::new()
    } else {
        token(token_file)?
    };
    let parsed = if line.trim().is_empty() {
        None
    } else {
        Some(JoinToken::parse(&line)?)
    };
    Ok(check::join::check(config, parsed.as_ref()).await)
}

/// Joins, and says what came of it.
///
/// # Errors
/// See [`JoinError`].
pub async fn run(
    config: &Config,
    token_file: Option<&Path>,
    skip_check: bool,
) -> Result<String, JoinError> {
    let line = token(token_file)?;
    // Read here first: a mistyped line is told before anything is asked.
    let parsed = JoinToken::parse(&line)?;
    if !skip_check {
        let findings = check::join::check(config, Some(&parsed)).await;
        if check::any_failed(&findings) {
            return Err(JoinError::Unfit { findings });
        }
    }
    let socket = config.admin_socket();
    if let Err(why) = tokio::net::UnixStream::connect(&socket).await {
        return Err(JoinError::NoDaemon { socket, why });
    }
    let request = NodeJoinRequest {
        change: Some(Change {
            request_id: uuid::Uuid::new_v4().to_string(),
            reason: "clusterd join".into(),
            actor: String::new(),
        }),
        token: line,
    };
    let mut client = AdminClient::new(proto::unix::channel(socket));
    let refused = |why: String| JoinError::Refused(why);
    let reply = tokio::time::timeout(JOIN_TIMEOUT, client.node_join(request))
        .await
        .map_err(|_| {
            refused(format!(
                "the join did not end within {} s; look: clusterctl node list",
                JOIN_TIMEOUT.as_secs()
            ))
        })?
        .map_err(|status| refused(status.message().to_owned()))?
        .into_inner();
    Ok(format!(
        "this node belongs to the cluster {} now, as {}",
        reply.cluster_name, config.name
    ))
}
