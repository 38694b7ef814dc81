//! `clusterctl rule`: which machines belong together, apart, or on certain nodes.

use std::process::ExitCode;

use clap::{Subcommand, ValueEnum};
use proto::admin::{RuleListRequest, RuleSetRequest};
use serde_json::json;

use crate::Context;
use crate::client::CliError;
use crate::output::{self, Format};

/// What can be done with rules.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Add or replace a rule.
    Set {
        /// What to call it.
        name: String,
        /// What it asks for.
        #[arg(value_enum)]
        kind: Kind,
        /// The machines (one for the owners rules).
        #[arg(long, value_delimiter = ',', required = true)]
        vm: Vec<String>,
        /// The nodes, for the owners rules.
        #[arg(long, value_delimiter = ',')]
        node: Vec<String>,
    },
    /// Take a rule away.
    Remove {
        /// Its name.
        name: String,
    },
    /// Every rule.
    List,
}

/// Kinds of rules.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Kind {
    /// On one node.
    Affinity,
    /// Never two on one node.
    AntiAffinity,
    /// Only on these nodes.
    PossibleOwners,
    /// On these nodes where it can be.
    PreferredOwners,
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, command: Command) -> Result<ExitCode, CliError> {
    let mut connection = c.connect().await?;
    match command {
        Command::Set {
            name,
            kind,
            vm,
            node,
        } => {
            let one = vm.first().cloned().unwrap_or_default();
            let rule = match kind {
                Kind::Affinity => json!({ "kind": "affinity", "vms": vm }),
                Kind::AntiAffinity => json!({ "kind": "anti-affinity", "vms": vm }),
                Kind::PossibleOwners => {
                    json!({ "kind": "possible-owners", "vm": one, "nodes": node })
                }
                Kind::PreferredOwners => {
                    json!({ "kind": "preferred-owners", "vm": one, "nodes": node })
                }
            };
            let request = RuleSetRequest {
                change: c.change(),
                name: name.clone(),
                rule_json: rule.to_string(),
            };
            let done = connection.api.rule_set(request).await?.into_inner();
            match c.output {
                Format::Json => output::json(&done)?,
                Format::Table => {
                    output::text(format!("✔ rule {name} holds for every move from now on"))?
                }
            }
        }
        Command::Remove { name } => {
            let request = RuleSetRequest {
                change: c.change(),
                name: name.clone(),
                rule_json: String::new(),
            };
            let done = connection.api.rule_set(request).await?.into_inner();
            match c.output {
                Format::Json => output::json(&done)?,
                Format::Table => output::text(format!("✔ rule {name} is gone"))?,
            }
        }
        Command::List => {
            let rules = connection
                .api
                .rule_list(RuleListRequest {})
                .await?
                .into_inner()
                .rules;
            match c.output {
                Format::Json => output::json(&rules)?,
                Format::Table => {
                    let mut rows: Vec<Vec<String>> = rules
                        .into_iter()
                        .map(|(name, rule)| vec![name, rule])
                        .collect();
                    rows.sort();
                    output::table(&["NAME", "RULE"], rows)?;
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
