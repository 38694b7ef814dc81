//! Contexts: clusters that this person knows, by name, with where they answer and the token to show there.
//!
//! They lie in `$XDG_CONFIG_HOME/clusterctl/config.toml` (else under `~/.config`), for their owner's eyes only.

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use proto::token::{AccessToken, Secret};
use serde::{Deserialize, Serialize};

use crate::client::{self, CliError, Endpoint, LOCAL_SOCKET, Server};
use crate::private_file;

/// The largest file read: over a thousand contexts.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// The longest name.
const NAME_BYTES_MAX: usize = 63;

/// A cluster and how to get in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Where it answers, with commas between several.
    pub servers: String,
    /// The access token's line. A Unix socket needs none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Secret>,
}

/// All of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contexts {
    /// The one that is meant where none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current: Option<String>,
    /// Each by its name.
    #[serde(default)]
    pub contexts: BTreeMap<String, Entry>,
}

impl Entry {
    /// Of an endpoint.
    pub fn of(endpoint: &Endpoint) -> Entry {
        Entry {
            servers: endpoint.servers.clone(),
            token: endpoint
                .token
                .as_ref()
                .map(|token| Secret::from_text(&token.line())),
        }
    }

    /// Its token, read.
    ///
    /// # Errors
    /// When what is kept is none.
    pub fn access(&self) -> Result<Option<AccessToken>, CliError> {
        self.token
            .as_ref()
            .map(|line| client::token(line.expose()))
            .transpose()
    }
}

/// Where the file lies.
///
/// # Errors
/// When this process knows of no home.
pub fn path() -> Result<PathBuf, CliError> {
    let of = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    of("XDG_CONFIG_HOME")
        .or_else(|| of("HOME").map(|home| home.join(".config")))
        .map(|folder| folder.join("clusterctl/config.toml"))
        .ok_or_else(|| {
            CliError::Local(
                "neither XDG_CONFIG_HOME nor HOME says where contexts are kept; try: --server and CLUSTERCTL_TOKEN"
                    .into(),
            )
        })
}

/// Whether a context may be called so.
///
/// # Errors
/// Says what would be right.
pub fn check_name(name: &str) -> Result<(), CliError> {
    let good = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if good {
        return Ok(());
    }
    Err(CliError::Local(format!(
        "a context cannot be called `{name}`: use letters, digits, '-', '_' and '.', at most {NAME_BYTES_MAX}"
    )))
}

impl Contexts {
    /// Reads them; no file is no contexts.
    ///
    /// # Errors
    /// When others may use the file, or it cannot be read.
    pub fn load(path: &Path) -> Result<Contexts, CliError> {
        let text = private_file::read(path, FILE_BYTES_MAX).map_err(CliError::local)?;
        text.map_or_else(|| Ok(Contexts::default()), |text| parse(path, &text))
    }

    /// Writes them, whole or not at all.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn save(&self, path: &Path) -> Result<(), CliError> {
        let text = toml::to_string_pretty(self).map_err(CliError::local)?;
        let write = || {
            if let Some(folder) = path.parent() {
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(folder)?;
            }
            private_file::write(path, text.as_bytes())
        };
        write().map_err(|error: std::io::Error| {
            CliError::Local(format!("cannot write {}: {error}", path.display()))
        })
    }

    /// The context of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, name: &str) -> Result<&Entry, CliError> {
        self.contexts.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.contexts.keys().map(String::as_str).collect();
            let known = if known.is_empty() {
                "there are none".to_owned()
            } else {
                format!("there are: {}", known.join(", "))
            };
            CliError::Refused {
                code: "E-NOTFOUND".into(),
                message: format!(
                    "there is no context {name}; {known}\n  try: clusterctl context add {name} HOST:PORT"
                ),
            }
        })
    }

    /// Adds or replaces one; it becomes the current one where there is none.
    pub fn put(&mut self, name: &str, entry: Entry) {
        self.contexts.insert(name.to_owned(), entry);
        let lives = self
            .current
            .as_ref()
            .is_some_and(|current| self.contexts.contains_key(current));
        if !lives {
            self.current = Some(name.to_owned());
        }
    }

    /// Takes one away.
    pub fn remove(&mut self, name: &str) -> Option<Entry> {
        if self.current.as_deref() == Some(name) {
            self.current = None;
        }
        self.contexts.remove(name)
    }
}

/// Reads the file's text. What its parser has to say may quote a token, so only the line is told.
fn parse(path: &Path, text: &str) -> Result<Contexts, CliError> {
    toml::from_str(text).map_err(|error| {
        let before = error.span().map_or("", |span| {
            text.get(..span.start.min(text.len())).unwrap_or("")
        });
        CliError::Local(format!(
            "{} cannot be read: line {} is not as clusterctl writes it; correct it, or remove the file and add the contexts again",
            path.display(),
            before.matches('\n').count() + 1
        ))
    })
}

/// What was given on the command line or in the environment, each `None` when it was not.
#[derive(Clone, Debug, Default)]
pub struct Given {
    /// `--server`, else `CLUSTERCTL_SERVER`.
    pub server: Option<String>,
    /// `--token` or `--token-file`, else `CLUSTERCTL_TOKEN`.
    pub token: Option<AccessToken>,
    /// `--context`, else `CLUSTERCTL_CONTEXT`.
    pub context: Option<String>,
}

impl Given {
    /// Where to connect and what to show: what is given wins over the context that is named, that over the
    /// current one, that over this host's own socket. A named context lends its token to a server that is given;
    /// the current one does not, it may be of another cluster.
    ///
    /// # Errors
    /// When the named context is not there, or its token is none; when `contexts` cannot be had but must.
    pub fn endpoint(
        &self,
        contexts: impl FnOnce() -> Result<Contexts, CliError>,
    ) -> Result<Endpoint, CliError> {
        if let (Some(servers), None) = (&self.server, &self.context) {
            return Ok(Endpoint {
                servers: servers.clone(),
                token: self.token.clone(),
            });
        }
        let contexts = contexts()?;
        let Some(name) = self.context.as_ref().or(contexts.current.as_ref()) else {
            return Ok(Endpoint {
                servers: LOCAL_SOCKET.to_owned(),
                token: self.token.clone(),
            });
        };
        let entry = contexts.get(name)?;
        let token = match &self.token {
            Some(token) => Some(token.clone()),
            None => entry.access()?,
        };
        Ok(Endpoint {
            servers: self.server.clone().unwrap_or_else(|| entry.servers.clone()),
            token,
        })
    }

    /// The socket of a node on this host: the one that is given, else the usual one. What is asked of a node
    /// alone, before it is in a cluster, is asked there.
    ///
    /// # Errors
    /// When a server on the network is given.
    pub fn socket(&self) -> Result<Endpoint, CliError> {
        let path = self.server.as_deref().unwrap_or(LOCAL_SOCKET);
        match Server::parse(path)? {
            Server::Socket(path) => Ok(Endpoint::socket(path)),
            Server::Network(address) => Err(CliError::Local(format!(
                "a node that is in no cluster answers on its own socket alone, not at {address}; on that node: sudo clusterctl cluster init   (with another data directory: --server DIR/clusterd.sock)"
            ))),
        }
    }
}

#[cfg(test)]
mod tests;
