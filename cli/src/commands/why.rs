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
    /// vm/NAME, node/NAME or migration/ID; a bare name is a machine's.
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
    let object = if args.object.contains('/') {
        args.object
    } else {
        format!("vm/{}", args.object)
    };
    let reply = c
        .connect()
        .await?
        .api
        .why(WhyRequest {
            object,
            not_on: args.not_on,
        })
        .await?
        .into_inner();
    if c.output == Format::Json {
        output::json(&reply)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::text(&reply.summary)?;
    if !reply.considered.is_empty() {
        output::text("considered")?;
        for check in &reply.considered {
            output::text(format!(
                "  {:<12} {:<4} {}",
                check.name,
                if check.passed { "yes" } else { "no" },
                check.detail
            ))?;
        }
    }
    if !reply.chain.is_empty() {
        output::text("how it came")?;
        for event in &reply.chain {
            output::text(format!("  {}", events::line(event)))?;
            for (name, value) in &event.inputs {
                output::text(format!("      {name} = {value}"))?;
            }
        }
    }
    if !reply.next.is_empty() {
        output::text(format!("next  {}", reply.next))?;
    }
    Ok(ExitCode::SUCCESS)
}
