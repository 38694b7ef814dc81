//! `clusterctl node add`: one line that lets one node in, once.

use std::process::ExitCode;

use clap::ValueEnum;
use proto::admin::{NodeAddReply, NodeAddRequest};
use proto::token::JoinToken;

use crate::Context;
use crate::client::CliError;
use crate::output::{self, Format};
use crate::span;

/// `node add`.
#[derive(Debug, clap::Args)]
pub struct AddArgs {
    /// The new node's name: what its clusterd is started with, its host's name if nothing else was said.
    name: String,
    /// Good for: 30m, 1h, 7d.
    #[arg(long, default_value = "1h", value_parser = span::life_s)]
    ttl: u64,
    /// Vote and duty.
    #[arg(long, value_enum, default_value = "voter")]
    role: Role,
}

/// What a node does.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Role {
    /// May get a vote (up to five nodes have one) and runs machines.
    Voter,
    /// Never votes; runs machines.
    Learner,
    /// Votes; runs no machines.
    Witness,
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub(super) async fn run(c: &Context, args: AddArgs) -> Result<ExitCode, CliError> {
    let role = match args.role {
        Role::Voter => "voter",
        Role::Learner => "learner",
        Role::Witness => "witness",
    };
    let request = NodeAddRequest {
        change: c.change(),
        name: args.name.clone(),
        role: role.into(),
        ttl_s: args.ttl,
    };
    let reply = c.connect().await?.api.node_add(request).await?.into_inner();
    match c.output {
        Format::Json => output::json(&reply)?,
        Format::Table => {
            let line = join_line(&reply)?;
            eprintln!("{}", talk(&reply, &args.name, role));
            output::text(line)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The token in an answer, `BJ1.…`.
///
/// # Errors
/// When the answer holds none.
pub fn token_line(reply: &NodeAddReply) -> Result<&str, CliError> {
    let last = reply.line.split_whitespace().next_back().unwrap_or("");
    let token = last.trim_start_matches('<');
    JoinToken::parse(token)
        .map(|_| token)
        .map_err(CliError::local)
}

/// What is pasted on the new node.
fn join_line(reply: &NodeAddReply) -> Result<String, CliError> {
    Ok(format!("sudo clusterd join <<<{}", token_line(reply)?))
}

fn talk(reply: &NodeAddReply, name: &str, role: &str) -> String {
    format!(
        "On {name}, where clusterd is installed and runs, paste this line. It lets in one node, which must be called {name},\n\
         once, as {role}, until {}. To take it back: clusterctl node join-tokens revoke {}",
        output::utc(reply.expires_at_ms),
        reply.id
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::token::Secret;

    fn reply(line: String) -> NodeAddReply {
        NodeAddReply {
            id: "j1".into(),
            line,
            expires_at_ms: 0,
        }
    }

    #[test]
    fn the_line_is_one_command_with_the_token_whether_or_not_the_node_wrote_the_command() {
        let token = JoinToken {
            cluster: "c".into(),
            ca_sha256: "ab".repeat(32),
            addresses: vec!["n1:7440".into()],
            id: "j1".into(),
            secret: Secret::new(&[7; 32]),
            node: "n2".into(),
            expires_at_ms: 0,
        }
        .line();
        let wanted = format!("sudo clusterd join <<<{token}");
        for said in [token.clone(), wanted.clone()] {
            assert_eq!(join_line(&reply(said)).expect("a line"), wanted);
        }
        let talk = talk(&reply(token.clone()), "n2", "voter");
        assert!(talk.contains("1970-01-01T00:00:00Z"), "{talk}");
        assert!(talk.contains("join-tokens revoke j1"), "{talk}");
        assert!(!talk.contains(&token), "{talk}");
    }

    #[test]
    fn an_answer_without_a_token_is_not_printed_as_a_command() {
        assert!(join_line(&reply("rm -rf".into())).is_err());
        assert!(join_line(&reply(String::new())).is_err());
    }
}
