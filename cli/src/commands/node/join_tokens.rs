//! `clusterctl node join-tokens`: the lines that `node add` printed.

use std::process::ExitCode;

use clap::Subcommand;
use proto::admin::{JoinTokenListRequest, JoinTokenRevokeRequest, JoinTokenView};

use crate::Context;
use crate::client::CliError;
use crate::output::{self, Format};

/// What can be done with them.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Every line, without its secret.
    List,
    /// Make one worthless.
    Revoke {
        /// Its id.
        id: String,
    },
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub(super) async fn run(c: &Context, command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::List => {
            let tokens = c
                .connect()
                .await?
                .api
                .join_token_list(JoinTokenListRequest {})
                .await?
                .into_inner()
                .tokens;
            match c.output {
                Format::Json => output::json(&tokens)?,
                Format::Table => output::table(
                    &["ID", "NODE", "ROLE", "STATE", "VALID UNTIL", "MADE BY"],
                    tokens.iter().map(row).collect(),
                )?,
            }
        }
        Command::Revoke { id } => {
            if !output::confirm(c.yes, &format!("Make join token {id} worthless?"))? {
                return Ok(ExitCode::FAILURE);
            }
            let request = JoinTokenRevokeRequest {
                change: c.change(),
                id: id.clone(),
            };
            let done = c
                .connect()
                .await?
                .api
                .join_token_revoke(request)
                .await?
                .into_inner();
            match c.output {
                Format::Json => output::json(&done)?,
                Format::Table => output::text(format!("✔ join token {id} lets nobody in"))?,
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn row(token: &JoinTokenView) -> Vec<String> {
    vec![
        token.id.clone(),
        token.node.clone(),
        token.role.clone(),
        token.state.clone(),
        output::utc(token.expires_at_ms),
        token.made_by.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_shown_with_whom_it_lets_in_and_until_when() {
        let token = JoinTokenView {
            id: "j1".into(),
            node: "n2".into(),
            role: "voter".into(),
            state: "waiting".into(),
            ..JoinTokenView::default()
        };
        assert_eq!(
            row(&token)[..5],
            ["j1", "n2", "voter", "waiting", "1970-01-01T00:00:00Z"]
        );
    }
}
