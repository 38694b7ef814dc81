//! What went wrong, in words a person can act on.

use tonic::{Code, Status};

use super::LOCAL_SOCKET;
use super::tls::{DoorError, door};

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Nobody answers.
    #[error(
        "error E-CONNECT: nothing answers at {server}: {cause}\n  try: {}",
        advice(server, cause)
    )]
    Connect {
        /// Where.
        server: String,
        /// What the network said.
        cause: String,
    },
    /// A server on the network, and nothing to show it.
    #[error(
        "error E-TOKEN: {0} lets nobody in without an access token, and none was given\n  try: clusterctl context add NAME {0} --token-file FILE   (or --token BT1.…; without either it asks)\n       CLUSTERCTL_TOKEN=BT1.… in the environment; on the node itself: sudo clusterctl -s {LOCAL_SOCKET} …"
    )]
    NoToken(String),
    /// What should be a token is none; says nothing of what it holds.
    #[error("error E-TOKEN: {0}")]
    BadToken(String),
    /// Someone answers who is not of the cluster.
    #[error(
        "error E-TRUST: what answers at {server} is not the cluster that the token is of: {why}\n  the token was not sent; somebody may be in between, or the address is another cluster's\n  try: compare the fingerprint: clusterctl context show (here) and clusterctl cluster ca show (on a node);\n       after `cluster ca rotate --root` ask an administrator for a new token"
    )]
    Trust {
        /// Where.
        server: String,
        /// What is wrong with what it shows.
        why: String,
    },
    /// It answered, then no more.
    #[error(
        "error E-CONNECT: the node stopped answering: {0}\n  whether a change was made is not known; look: clusterctl status\n  try: another node with --server HOST:PORT, or several: --server HOST:PORT,HOST:PORT"
    )]
    Broken(String),
    /// What listens there is something else.
    #[error(
        "error E-CONNECT: what answers there is not the API of a clusterd ({0}); its port is 7440 unless it was told otherwise"
    )]
    Stranger(String),
    /// The address cannot be one.
    #[error(
        "error E-ADDRESS: `{0}` is neither host:port nor the path of a socket; write 10.0.0.11:7440, or several: 10.0.0.11:7440,10.0.0.12:7440"
    )]
    Address(String),
    /// The node refused, or failed.
    #[error("error {code}: {message}")]
    Refused {
        /// A stable code, such as E-CPU.
        code: String,
        /// What, why, and what to try.
        message: String,
    },
    /// Something on this side.
    #[error("error: {0}")]
    Local(String),
    /// Ctrl-C while something was being waited for; says what goes on without us.
    #[error("interrupted: {0}")]
    Interrupted(String),
    /// Whoever read our output has read enough.
    #[error("standard output is closed")]
    OutputClosed,
}

impl CliError {
    /// An error of this side's own.
    pub fn local(error: impl std::fmt::Display) -> CliError {
        CliError::Local(error.to_string())
    }

    /// Nobody behind a Unix socket, or nobody who may be asked.
    pub(super) fn socket(path: &str, error: &std::io::Error) -> CliError {
        CliError::Connect {
            server: path.to_owned(),
            cause: error.to_string(),
        }
    }

    /// Whether another node may still answer.
    pub fn is_about_the_connection(&self) -> bool {
        matches!(self, CliError::Connect { .. } | CliError::Broken(_))
    }
}

impl From<Status> for CliError {
    fn from(status: Status) -> CliError {
        let code = status
            .metadata()
            .get("baton-code")
            .and_then(|code| code.to_str().ok());
        if code.is_none() {
            // No clusterd wrote this: it is the transport's.
            if status.message().contains("grpc-status header missing") {
                return CliError::Stranger("it speaks HTTP without gRPC".into());
            }
            if let Some(source) = std::error::Error::source(&status) {
                return of_the_transport(source);
            }
        }
        let code = code.unwrap_or(default_code(status.code())).to_owned();
        let mut message = status.message().to_owned();
        // A node that names a command has said what to try.
        if let Some(advice) = advice_on(&code).filter(|_| !message.contains("clusterctl")) {
            message.push_str("\n  try: ");
            message.push_str(advice);
        }
        CliError::Refused { code, message }
    }
}

/// The connection broke, or was made again with somebody else.
fn of_the_transport(source: &(dyn std::error::Error + 'static)) -> CliError {
    match door(source) {
        Some(DoorError::Untrusted(why)) => CliError::Trust {
            server: "the node's address".into(),
            why: why.clone(),
        },
        Some(DoorError::Stranger(why)) => CliError::Stranger((*why).to_owned()),
        Some(DoorError::Network(error)) => CliError::Broken(error.to_string()),
        None => {
            let cause = innermost(source);
            if cause.contains("frame with invalid size") || cause.contains("PROTOCOL") {
                CliError::Stranger("it does not speak HTTP/2".into())
            } else {
                CliError::Broken(cause)
            }
        }
    }
}

/// The last cause of an error.
pub(super) fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

/// What to try where nothing answers.
fn advice(server: &str, cause: &str) -> &'static str {
    if !server.starts_with('/') {
        return "another node with --server HOST:PORT (or CLUSTERCTL_SERVER); on the node: systemctl status clusterd\n       to try Baton on this machine: clusterctl dev up";
    }
    if cause.contains("ermission denied") {
        return "sudo: only root and clusterd's own user may open a node's socket\n       with an access token from anywhere: clusterctl context add NAME HOST:PORT";
    }
    "on a node: systemctl status clusterd; from elsewhere: clusterctl context add NAME HOST:PORT (or --server)\n       to try Baton on this machine: clusterctl dev up"
}

/// What to try after a refusal that says nothing of it itself.
fn advice_on(code: &str) -> Option<&'static str> {
    match code {
        "E-TOKEN" => Some(
            "ask an administrator for a new token (clusterctl token create USER --role ROLE), then: clusterctl context add NAME HOST:PORT",
        ),
        "E-DENIED" => Some(
            "ask an administrator for a token that allows it: clusterctl token create USER --role ROLE",
        ),
        _ => None,
    }
}

impl From<std::io::Error> for CliError {
    fn from(error: std::io::Error) -> CliError {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            return CliError::OutputClosed;
        }
        CliError::local(error)
    }
}

impl From<serde_json::Error> for CliError {
    fn from(error: serde_json::Error) -> CliError {
        if error.io_error_kind() == Some(std::io::ErrorKind::BrokenPipe) {
            return CliError::OutputClosed;
        }
        CliError::local(error)
    }
}

fn default_code(code: Code) -> &'static str {
    match code {
        Code::NotFound => "E-NOTFOUND",
        Code::InvalidArgument => "E-INVALID",
        Code::AlreadyExists => "E-EXISTS",
        Code::FailedPrecondition => "E-REFUSED",
        Code::Unavailable => "E-NOQUORUM",
        Code::DeadlineExceeded => "E-TIMEOUT",
        Code::Unauthenticated => "E-TOKEN",
        Code::PermissionDenied => "E-DENIED",
        Code::Unimplemented => "E-VERSION",
        _ => "E-INTERNAL",
    }
}
