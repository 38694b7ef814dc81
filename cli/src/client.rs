//! Connecting to a node, and saying what went wrong in words a person can act on.

use std::time::Duration;

use proto::admin::Change;
use proto::admin::admin_client::AdminClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// How long a connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// An answer that is not under way: how often a silent node is asked for a sign of life, and how long it
/// may take.
const SILENCE: Duration = Duration::from_secs(5);
/// How long a watcher looks for another node when the one that it asked is gone.
pub const OTHER_NODE_PATIENCE: Duration = Duration::from_secs(20);
/// How often it tries.
const OTHER_NODE_PAUSE: Duration = Duration::from_millis(200);
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
                let cause = innermost(source);
                return if cause.contains("frame with invalid size") || cause.contains("PROTOCOL") {
                    CliError::Stranger("it does not speak HTTP/2".into())
                } else {
                    CliError::Broken(cause)
                };
            }
        }
        CliError::Refused {
            code: code.unwrap_or(default_code(status.code())).to_owned(),
            message: status.message().to_owned(),
        }
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
    /// Every server that may be asked, as it was written.
    servers: String,
}

impl Client {
    /// Connects to `host:port`, or to the Unix socket at an absolute path; of several, with commas between
    /// them, to the first that answers.
    ///
    /// # Errors
    /// A malformed address; nothing answers.
    pub async fn open(servers: &str) -> Result<Client, CliError> {
        let mut first_error = None;
        for server in servers.split(',').map(str::trim) {
            match channel(server).await {
                Ok(channel) => {
                    return Ok(Client {
                        api: AdminClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX),
                        servers: servers.to_owned(),
                    });
                }
                Err(error @ CliError::Connect { .. }) => {
                    first_error.get_or_insert(error);
                }
                Err(other) => return Err(other),
            }
        }
        let several = servers.contains(',');
        Err(match first_error {
            Some(CliError::Connect { cause, .. }) if several => CliError::Connect {
                server: servers.to_owned(),
                cause,
            },
            Some(error) => error,
            None => CliError::Address(servers.to_owned()),
        })
    }

    /// After the node stopped answering: connects to the first that does, within
    /// [`OTHER_NODE_PATIENCE`].
    ///
    /// # Errors
    /// None does.
    pub async fn open_again(&mut self) -> Result<(), CliError> {
        let deadline = tokio::time::Instant::now() + OTHER_NODE_PATIENCE;
        loop {
            match Client::open(&self.servers).await {
                Ok(client) => {
                    *self = client;
                    return Ok(());
                }
                Err(error) if tokio::time::Instant::now() > deadline => return Err(error),
                Err(_) => tokio::time::sleep(OTHER_NODE_PAUSE).await,
            }
        }
    }
}

/// A channel to one server.
async fn channel(server: &str) -> Result<Channel, CliError> {
    let refused = |cause: &dyn std::error::Error| CliError::Connect {
        server: server.to_owned(),
        cause: innermost(cause),
    };
    if server.starts_with('/') {
        // A lazy channel connects at first use: ask now whether anybody is there.
        if let Err(error) = tokio::net::UnixStream::connect(server).await {
            return Err(refused(&error));
        }
        return Ok(proto::unix::channel(server));
    }
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
        .http2_keep_alive_interval(SILENCE)
        .keep_alive_timeout(SILENCE)
        .connect()
        .await
        .map_err(|error| refused(&error))
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
