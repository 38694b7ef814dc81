//! `clusterctl audit`: who changed what, from where, why.

use std::process::ExitCode;

use proto::admin::{AuditListRequest, AuditView};

use crate::Context;
use crate::client::CliError;
use crate::output::{self, Format};
use crate::span;

/// `audit`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only what was asked since: 30s, 10m, 2h, 7d.
    #[arg(long, value_parser = span::millis)]
    since: Option<u64>,
    /// Only what this user or node asked for.
    #[arg(long, default_value = "")]
    actor: String,
    /// Only what was asked about this: vm/NAME, node/NAME, volume/NAME.
    #[arg(long, default_value = "")]
    object: String,
    /// The last so many.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
}

/// Prints it.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, args: Args) -> Result<ExitCode, CliError> {
    let request = AuditListRequest {
        since_ms: args
            .since
            .map_or(0, |ago| span::now_ms().saturating_sub(ago)),
        actor: args.actor,
        object: args.object,
        limit: args.limit,
    };
    let records = c
        .connect()
        .await?
        .api
        .audit_list(request)
        .await?
        .into_inner()
        .records;
    match c.output {
        Format::Json => output::json(&records)?,
        Format::Table => output::table(
            &[
                "TIME", "ENTRY", "ACTOR", "FROM", "WHAT", "OBJECT", "RESULT", "REASON",
            ],
            records.iter().map(row).collect(),
        )?,
    }
    Ok(ExitCode::SUCCESS)
}

fn row(record: &AuditView) -> Vec<String> {
    vec![
        output::utc(record.at_ms),
        record.index.to_string(),
        record.actor.clone(),
        record.from.clone(),
        record.method.clone(),
        record.object.clone(),
        if record.refused.is_empty() {
            "done".into()
        } else {
            format!("refused: {}", record.refused)
        },
        record.reason.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_says_whether_it_was_done() {
        let done = AuditView {
            actor: "ada".into(),
            method: "VmCreate".into(),
            ..AuditView::default()
        };
        assert_eq!(row(&done)[6], "done");
        let refused = AuditView {
            refused: "E-DENIED".into(),
            ..done
        };
        assert_eq!(row(&refused)[6], "refused: E-DENIED");
    }
}
