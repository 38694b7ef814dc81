//! Connecting to a node: TLS and an access token over the network, nothing of the kind on a node's own socket.

mod credentials;
mod error;
mod tls;

use std::time::Duration;

use proto::admin::Change;
use proto::admin::admin_client::AdminClient;
use proto::token::AccessToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

pub use credentials::{Bearer, TOKEN_BYTES_MAX, token, token_file};
pub use error::CliError;

/// The socket of the node on this host, as its package sets it up.
pub const LOCAL_SOCKET: &str = "/var/lib/baton/clusterd.sock";
/// How long a watcher looks for another node when the one that it asked is gone.
pub const OTHER_NODE_PATIENCE: Duration = Duration::from_secs(20);
/// How often it tries.
const OTHER_NODE_PAUSE: Duration = Duration::from_millis(200);
/// The largest answer read: a list of 100,000 machines fits.
const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// The generated client over a connection that shows the token with every call.
pub type Api = AdminClient<InterceptedService<Channel, Bearer>>;

/// Where a cluster answers, and what is shown there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// `host:port`, or the absolute path of a Unix socket; several with commas between them.
    pub servers: String,
    /// Who asks. A Unix socket needs none: whoever may open it is the local administrator.
    pub token: Option<AccessToken>,
}

impl Endpoint {
    /// The Unix socket at an absolute path, without a token.
    pub fn socket(path: impl Into<String>) -> Endpoint {
        Endpoint {
            servers: path.into(),
            token: None,
        }
    }
}

/// Where one server answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    /// A Unix socket.
    Socket(String),
    /// `host:port`.
    Network(String),
}

impl Server {
    /// Reads one.
    ///
    /// # Errors
    /// When it is neither `host:port` nor an absolute path.
    pub fn parse(text: &str) -> Result<Server, CliError> {
        if text.starts_with('/') {
            return Ok(Server::Socket(text.to_owned()));
        }
        text.rsplit_once(':')
            .filter(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
            .filter(|_| !text.contains(['/', '@', ' ']))
            .map(|_| Server::Network(text.to_owned()))
            .ok_or_else(|| CliError::Address(text.to_owned()))
    }

    /// Reads several, with commas between them.
    ///
    /// # Errors
    /// When one of them is none.
    pub fn parse_all(text: &str) -> Result<Vec<Server>, CliError> {
        text.split(',').map(str::trim).map(Server::parse).collect()
    }
}

/// A connection to one node, which answers for the whole cluster.
pub type Connection = Client;

/// The admin client of one node.
#[derive(Clone)]
pub struct Client {
    /// The generated client; its methods are the API.
    pub api: Api,
    /// Every server that may be asked, and the token.
    endpoint: Endpoint,
}

impl Client {
    /// Connects to the endpoint's server; of several to the first that answers.
    ///
    /// # Errors
    /// A malformed address; no token for a server on the network; nothing answers; what answers is not the
    /// cluster that the token is of.
    pub async fn open(endpoint: &Endpoint) -> Result<Client, CliError> {
        let bearer = Bearer::of(endpoint.token.as_ref())?;
        let servers = Server::parse_all(&endpoint.servers)?;
        let several = servers.len() > 1;
        let mut first_error = None;
        for server in servers {
            match channel(&server, endpoint.token.as_ref()).await {
                Ok(channel) => {
                    return Ok(Client {
                        api: AdminClient::with_interceptor(channel, bearer)
                            .max_decoding_message_size(MESSAGE_BYTES_MAX),
                        endpoint: endpoint.clone(),
                    });
                }
                Err(error @ CliError::Connect { .. }) => {
                    first_error.get_or_insert(error);
                }
                Err(other) => return Err(other),
            }
        }
        Err(match first_error {
            Some(CliError::Connect { cause, .. }) if several => CliError::Connect {
                server: endpoint.servers.clone(),
                cause,
            },
            Some(error) => error,
            None => CliError::Address(endpoint.servers.clone()),
        })
    }

    /// After the node stopped answering: connects to the first that does, within
    /// [`OTHER_NODE_PATIENCE`].
    ///
    /// # Errors
    /// Nothing answers in that time, or what answers is not the cluster.
    pub async fn open_again(&mut self) -> Result<(), CliError> {
        let deadline = tokio::time::Instant::now() + OTHER_NODE_PATIENCE;
        loop {
            match Client::open(&self.endpoint).await {
                Ok(client) => {
                    *self = client;
                    return Ok(());
                }
                Err(error)
                    if !error.is_about_the_connection()
                        || tokio::time::Instant::now() > deadline =>
                {
                    return Err(error);
                }
                Err(_) => tokio::time::sleep(OTHER_NODE_PAUSE).await,
            }
        }
    }
}

/// A channel to one server.
async fn channel(server: &Server, token: Option<&AccessToken>) -> Result<Channel, CliError> {
    match server {
        Server::Socket(path) => {
            // A lazy channel connects at first use: ask now whether anybody is there.
            tokio::net::UnixStream::connect(path)
                .await
                .map_err(|error| CliError::socket(path, &error))?;
            Ok(proto::unix::channel(path))
        }
        Server::Network(address) => {
            let token = token.ok_or_else(|| CliError::NoToken(address.clone()))?;
            tls::channel(address, token).await
        }
    }
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

#[cfg(test)]
mod tests;
