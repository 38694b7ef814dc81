//! `clusterctl context`: which clusters this person knows, and which one is meant.

use std::process::ExitCode;

use clap::Subcommand;
use proto::admin::{NodeListRequest, VersionRequest};
use proto::token::AccessToken;
use serde::Serialize;

use crate::Context;
use crate::client::{CliError, Connection, Endpoint, Server, token};
use crate::contexts::{self, Contexts, Entry};
use crate::output::{self, Format};
use crate::prompt;

/// What can be done with contexts.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Keep a cluster under a name; the token comes from --token-file, CLUSTERCTL_TOKEN, --token, or is asked for.
    Add {
        /// What to call it.
        name: String,
        /// Where it answers: `HOST:PORT`, several with commas between them, or a socket's path.
        servers: String,
        /// Do not try the connection first.
        #[arg(long)]
        no_check: bool,
    },
    /// Every context.
    List,
    /// Mean this one where none is named.
    Use {
        /// Its name.
        name: String,
    },
    /// One context, without its token's secret.
    Show {
        /// Its name; the current one when left out.
        name: Option<String>,
    },
    /// Forget a context and its token.
    Remove {
        /// Its name.
        name: String,
    },
}

/// A context as it is shown: all but the secret.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct View {
    name: String,
    servers: String,
    token_id: String,
    ca_sha256: String,
    current: bool,
}

fn view(contexts: &Contexts, name: &str, entry: &Entry) -> View {
    // A token that cannot be read is shown as none; using it says what is wrong.
    let token = entry.access().ok().flatten();
    let of = |part: fn(&AccessToken) -> &String| token.as_ref().map(part).cloned();
    View {
        name: name.to_owned(),
        servers: entry.servers.clone(),
        token_id: of(|token| &token.id).unwrap_or_default(),
        ca_sha256: of(|token| &token.ca_sha256).unwrap_or_default(),
        current: contexts.current.as_deref() == Some(name),
    }
}

/// Does it.
///
/// # Errors
/// When the file cannot be used, or a connection that is tried is refused.
pub async fn run(c: &Context, command: Command) -> Result<ExitCode, CliError> {
    let path = contexts::path()?;
    match command {
        Command::Add {
            name,
            servers,
            no_check,
        } => add(c, &name, servers, no_check).await,
        Command::List => {
            let contexts = Contexts::load(&path)?;
            let views: Vec<View> = contexts
                .contexts
                .iter()
                .map(|(name, entry)| view(&contexts, name, entry))
                .collect();
            match c.output {
                Format::Json => output::json(&views)?,
                Format::Table => output::table(
                    &["CURRENT", "NAME", "SERVERS", "TOKEN"],
                    views.into_iter().map(row).collect(),
                )?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Use { name } => {
            let mut contexts = Contexts::load(&path)?;
            contexts.get(&name)?;
            contexts.current = Some(name.clone());
            contexts.save(&path)?;
            say(
                c,
                &contexts,
                &name,
                &format!("✔ {name} is meant from now on"),
            )
        }
        Command::Show { name } => {
            let contexts = Contexts::load(&path)?;
            let name = name
                .or_else(|| c.given.context.clone())
                .or_else(|| contexts.current.clone())
                .ok_or_else(|| {
                    CliError::Local(
                        "no context is current; try: clusterctl context list, clusterctl context use NAME"
                            .into(),
                    )
                })?;
            let shown = view(&contexts, &name, contexts.get(&name)?);
            let text = format!(
                "{}{}\nservers  {}\ntoken    {}\nroot     {}",
                shown.name,
                if shown.current { "  (current)" } else { "" },
                shown.servers,
                shown_or_dash(&shown.token_id),
                shown_or_dash(&shown.ca_sha256),
            );
            say(c, &contexts, &name, &text)
        }
        Command::Remove { name } => {
            let mut contexts = Contexts::load(&path)?;
            contexts.get(&name)?;
            if !output::confirm(c.yes, &format!("Forget context {name} and its token?"))? {
                return Ok(ExitCode::FAILURE);
            }
            contexts.remove(&name);
            contexts.save(&path)?;
            match c.output {
                Format::Json => output::json(&serde_json::json!({ "removed": name }))?,
                Format::Table => output::text(format!(
                    "✔ {name} is forgotten; its token is good until it expires: clusterctl token revoke ID"
                ))?,
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn shown_or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

fn row(view: View) -> Vec<String> {
    vec![
        if view.current { "*" } else { "" }.to_owned(),
        view.name,
        view.servers,
        view.token_id,
    ]
}

fn say(c: &Context, contexts: &Contexts, name: &str, text: &str) -> Result<ExitCode, CliError> {
    match c.output {
        Format::Json => output::json(&view(contexts, name, contexts.get(name)?))?,
        Format::Table => output::text(text)?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn add(
    c: &Context,
    name: &str,
    servers: String,
    no_check: bool,
) -> Result<ExitCode, CliError> {
    contexts::check_name(name)?;
    let path = contexts::path()?;
    // Before anything is asked: an unusable file would cost the answer.
    let known = Contexts::load(&path)?;
    let on_the_network = Server::parse_all(&servers)?
        .iter()
        .any(|server| matches!(server, Server::Network(_)));
    if known.contexts.contains_key(name)
        && !output::confirm(c.yes, &format!("There is a context {name}. Replace it?"))?
    {
        return Ok(ExitCode::FAILURE);
    }
    let token = match &c.given.token {
        Some(token) => Some(token.clone()),
        None if on_the_network => Some(token(&prompt::secret(
            "access token (BT1.…, not shown)",
            "--token-file FILE, or CLUSTERCTL_TOKEN in the environment",
        )?)?),
        None => None,
    };
    let endpoint = Endpoint { servers, token };
    let found = if no_check {
        "not tried".to_owned()
    } else {
        look(&endpoint).await?
    };
    // Read again: the person may have taken their time.
    let mut contexts = Contexts::load(&path)?;
    contexts.put(name, Entry::of(&endpoint));
    contexts.save(&path)?;
    let usage = if contexts.current.as_deref() == Some(name) {
        "it is the current one; try: clusterctl status".to_owned()
    } else {
        format!("try: clusterctl -C {name} status; mean it always: clusterctl context use {name}")
    };
    let text = format!("✔ context {name} is kept ({found})\n  {usage}");
    say(c, &contexts, name, &text)
}

/// Whether the cluster answers and lets this token in, in words.
async fn look(endpoint: &Endpoint) -> Result<String, CliError> {
    let mut connection = Connection::open(endpoint).await?;
    let version = connection
        .api
        .version(VersionRequest {})
        .await?
        .into_inner()
        .version;
    let nodes = connection
        .api
        .node_list(NodeListRequest {})
        .await?
        .into_inner()
        .nodes;
    let nodes = output::counted(nodes.len() as u64, "node");
    Ok(format!("clusterd {version}, {nodes}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::token::Secret;

    #[test]
    fn a_context_is_shown_without_its_secret() {
        let token = AccessToken {
            ca_sha256: "ab".repeat(32),
            id: "t1".into(),
            secret: Secret::new(&[7; 32]),
        };
        let mut contexts = Contexts::default();
        let endpoint = Endpoint {
            servers: "n1:7440".into(),
            token: Some(token.clone()),
        };
        contexts.put("prod", Entry::of(&endpoint));
        let entry = contexts.get("prod").expect("it is there");
        let shown = view(&contexts, "prod", entry);
        assert_eq!((shown.token_id.as_str(), shown.current), ("t1", true));
        let json = serde_json::to_string(&shown).expect("json");
        assert!(!json.contains(token.secret.expose()), "{json}");
        assert_eq!(row(shown), ["*", "prod", "n1:7440", "t1"]);
    }
}
