//! `clusterctl token`: who may do what, until when.

use std::process::ExitCode;

use clap::{Subcommand, ValueEnum};
use proto::admin::{
    TokenCreateReply, TokenCreateRequest, TokenListRequest, TokenRevokeRequest, TokenView,
};

use crate::Context;
use crate::client::CliError;
use crate::output::{self, Format};
use crate::span;

/// What can be done with access tokens.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make one; it is printed once and can never be shown again.
    Create {
        /// Whose it is: a person or a program.
        user: String,
        /// What it is good for.
        #[arg(long, value_enum)]
        role: Role,
        /// Only for machines with one of these tags, and nothing of the cluster; as often as there are tags.
        #[arg(long)]
        tag: Vec<String>,
        /// Good for: 12h, 30d.
        #[arg(long, default_value = "30d", value_parser = span::life_s)]
        ttl: u64,
    },
    /// Every token, without its secret.
    List,
    /// Make one worthless at once.
    Revoke {
        /// Its id.
        id: String,
    },
}

/// What a token is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Looks, changes nothing.
    Viewer,
    /// Runs machines: creates, starts, stops, moves them.
    Operator,
    /// Everything, the cluster's own make-up too.
    Admin,
}

impl Role {
    fn word(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        }
    }
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Create {
            user,
            role,
            tag,
            ttl,
        } => {
            let request = TokenCreateRequest {
                change: c.change(),
                user: user.clone(),
                role: role.word().into(),
                tags: tag.clone(),
                ttl_s: ttl,
            };
            let reply = c
                .connect()
                .await?
                .api
                .token_create(request)
                .await?
                .into_inner();
            match c.output {
                Format::Json => output::json(&reply)?,
                Format::Table => {
                    output::text(&reply.token)?;
                    eprintln!("{}", made(&reply, &user, role, &tag));
                }
            }
        }
        Command::List => {
            let tokens = c
                .connect()
                .await?
                .api
                .token_list(TokenListRequest {})
                .await?
                .into_inner()
                .tokens;
            match c.output {
                Format::Json => output::json(&tokens)?,
                Format::Table => output::table(
                    &["ID", "USER", "ROLE", "TAGS", "VALID UNTIL", "MADE BY"],
                    tokens.iter().map(row).collect(),
                )?,
            }
        }
        Command::Revoke { id } => {
            let question =
                format!("Make token {id} worthless? Whoever uses it is locked out at once.");
            if !output::confirm(c.yes, &question)? {
                return Ok(ExitCode::FAILURE);
            }
            let request = TokenRevokeRequest {
                change: c.change(),
                id: id.clone(),
            };
            let done = c
                .connect()
                .await?
                .api
                .token_revoke(request)
                .await?
                .into_inner();
            match c.output {
                Format::Json => output::json(&done)?,
                Format::Table => output::text(format!("✔ token {id} is worth nothing any more"))?,
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What is said beside a new token.
fn made(reply: &TokenCreateReply, user: &str, role: Role, tags: &[String]) -> String {
    let scope = if tags.is_empty() {
        "all machines and the cluster".to_owned()
    } else {
        format!("machines with the tag {}", tags.join(" or "))
    };
    format!(
        "✔ token {} for {user}: {} of {scope}, until {}\n  it cannot be shown again; on {user}'s machine: clusterctl context add NAME HOST:PORT   (then paste it)\n  to end it: clusterctl token revoke {}",
        reply.id,
        role.word(),
        output::utc(reply.expires_at_ms),
        reply.id
    )
}

fn row(token: &TokenView) -> Vec<String> {
    let until = output::utc(token.expires_at_ms);
    vec![
        token.id.clone(),
        token.user.clone(),
        token.role.clone(),
        token.tags.join(","),
        if token.expired {
            format!("{until} (expired)")
        } else {
            until
        },
        token.made_by.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beside_a_new_token_stands_what_it_is_good_for_and_not_the_token() {
        let reply = TokenCreateReply {
            id: "t7".into(),
            token: "BT1.secret".into(),
            expires_at_ms: 0,
        };
        let text = made(&reply, "ada", Role::Operator, &["web".into(), "db".into()]);
        assert!(text.contains("operator of machines with the tag web or db"));
        assert!(text.contains("1970-01-01T00:00:00Z"));
        assert!(text.contains("token revoke t7"));
        assert!(!text.contains("secret"));
        let all = made(&reply, "ada", Role::Admin, &[]);
        assert!(all.contains("admin of all machines and the cluster"));
    }

    #[test]
    fn an_expired_token_is_marked() {
        let token = TokenView {
            id: "t7".into(),
            tags: vec!["a".into(), "b".into()],
            expired: true,
            ..TokenView::default()
        };
        let row = row(&token);
        assert_eq!(row[3], "a,b");
        assert!(row[4].ends_with("(expired)"));
    }
}
