//! `clusterctl why`: the reasons behind where things are.

use std::process::ExitCode;

use proto::admin::WhyRequest;

use crate::Context;
use crate::client::CliError;
use crate::commands::events;
use crate::output::{self, Format};

/// `why`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// vm/NAME, node/NAME, volume/NAME or migration/ID; of a bare name: the machine, else the node or the
    /// migration that is called so.
    object: String,
    /// Why it is not, or could not be, on this node.
    #[arg(long, default_value = "")]
    not_on: String,
}

/// Prints them.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, args: Args) -> Result<ExitCode, CliError> {
    let reply = c
        .connect()
        .await?
        .api
        .why(WhyRequest {
            object: args.object,
            not_on: args.not_on,
        })
        .await?
        .into_inner();
    if c.output == Format::Json {
        output::json(&reply)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::text(output::hanging(&reply.summary, 0))?;
    if !reply.considered.is_empty() {
        output::text("considered")?;
        for check in &reply.considered {
            output::text(format!(
                "  {:<12} {:<4} {}",
                check.name,
                if check.passed { "yes" } else { "no" },
                output::hanging(&check.detail, 20)
            ))?;
        }
    }
    if !reply.chain.is_empty() {
        output::text("how it came")?;
        for event in &reply.chain {
            output::text(format!("  {}", events::line(event, 2)))?;
            let mut inputs: Vec<_> = event.inputs.iter().collect();
            inputs.sort_by_key(|(name, _)| (*name != "chosen", *name));
            let longest = inputs.iter().map(|(name, _)| name.chars().count()).max();
            for (name, value) in inputs {
                let name = format!("{name:<width$}", width = longest.unwrap_or(0));
                let indent = 6 + name.chars().count() + 2;
                output::text(format!("      {name}  {}", output::hanging(value, indent)))?;
            }
        }
    }
    if !reply.next.is_empty() {
        output::text(format!("next  {}", reply.next))?;
    }
    Ok(ExitCode::SUCCESS)
}
