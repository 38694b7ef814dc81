//! Connecting to a node, and saying what went wrong in words a person can act on.

use std::time::Duration;

use proto::admin::Change;
use proto::admin::admin_client::AdminClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// How long a connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// The largest answer read: a list of 100,000 machines fits.
const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Nobody answers.
    #[error(
        "error E-CONNECT: nothing answers at {server}: {cause}\n  try: another node with --server HOST:PORT (or CLUSTERCTL_SERVER); on the node: systemctl status clusterd\n       to try Baton on this machine: clusterctl dev up"
    )]
    Connect {
        /// Where.
        server: String,
        /// What the network said.
        cause: String,
    },
    /// The address cannot be one.
    #[error("error E-ADDRESS: `{0}` is neither host:port nor the path of a socket")]
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
}

impl CliError {
    /// An error of this side's own.
    pub fn local(error: impl std::fmt::Display) -> CliError {
        CliError::Local(error.to_string())
    }
}

impl From<Status> for CliError {
    fn from(status: Status) -> CliError {
        let code = status
            .metadata()
            .get("baton-code")
            .and_then(|code| code.to_str().ok())
            .map_or_else(|| default_code(status.code()).to_owned(), str::to_owned);
        CliError::Refused {
            code,
            message: status.message().to_owned(),
        }
    }
}

impl From<std::io::Error> for CliError {
    fn from(error: std::io::Error) -> CliError {
        CliError::local(error)
    }
}

impl From<serde_json::Error> for CliError {
    fn from(error: serde_json::Error) -> CliError {
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
        Code::PermissionDenied | Code::Unauthenticated => "E-DENIED",
        Code::Unimplemented => "E-VERSION",
        _ => "E-INTERNAL",
    }
}

/// A connection to one node, which answers for the whole cluster.
pub type Connection = Client;

/// The admin client of one node.
#[derive(Clone)]
pub struct Client {
    /// The generated client; its methods are the API.
    pub api: AdminClient<Channel>,
}

impl Client {
    /// Connects to `host:port`, or to the Unix socket at an absolute path.
    ///
    /// # Errors
    /// A malformed address; nothing answers.
    pub async fn open(server: &str) -> Result<Client, CliError> {
        let refused = |cause: &dyn std::error::Error| CliError::Connect {
            server: server.to_owned(),
            cause: innermost(cause),
        };
        let channel = if server.starts_with('/') {
            let channel = proto::unix::channel(server);
            // A lazy channel connects at first use: ask now whether anybody is there.
            if let Err(error) = tokio::net::UnixStream::connect(server).await {
                return Err(refused(&error));
            }
            channel
        } else {
            let host_and_port = server
                .rsplit_once(':')
                .filter(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
            if host_and_port.is_none() {
                return Err(CliError::Address(server.to_owned()));
            }
            Endpoint::from_shared(format!("http://{server}"))
                .map_err(|_| CliError::Address(server.to_owned()))?
                .connect_timeout(CONNECT_TIMEOUT)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(Duration::from_secs(10))
                .connect()
                .await
                .map_err(|error| refused(&error))?
        };
        Ok(Client {
            api: AdminClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX),
        })
    }
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

/// What a changing request carries: an id of its own, the asker's words, the asker.
pub fn change(request_id: Option<String>, reason: &str) -> Change {
    let user = std::env::var("USER")
        .or_else(|_| std::env::var("LOGNAME"))
        .unwrap_or_else(|_| "admin".into());
    Change {
        request_id: request_id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
        reason: reason.to_owned(),
        actor: user,
    }
}
