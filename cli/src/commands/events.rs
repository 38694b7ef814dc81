//! `clusterctl events`: what happened, and what happens now.

use std::process::ExitCode;

use proto::admin::{EventView, EventsRequest};

use crate::Context;
use crate::client::{CliError, Connection};
use crate::output::{self, Format};
use crate::span;

/// `events`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Stay, and print what comes.
    #[arg(long, short = 'f')]
    follow: bool,
    /// Only what happened since: 30s, 10m, 2h, 7d.
    #[arg(long, value_parser = span::millis)]
    since: Option<u64>,
    /// Only about this: vm/NAME, node/NAME, volume/NAME, migration/ID.
    #[arg(long, default_value = "")]
    object: String,
    /// info, warn or error: this and worse.
    #[arg(long, default_value = "info", value_parser = ["info", "warn", "error"])]
    severity: String,
    /// Only kinds that begin so: migration., node.
    #[arg(long = "type", default_value = "")]
    kind: String,
}

/// Prints them.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, args: Args) -> Result<ExitCode, CliError> {
    let mut request = EventsRequest {
        follow: args.follow,
        since_ms: args
            .since
            .map_or(0, |ago| span::now_ms().saturating_sub(ago)),
        object: args.object,
        severity: args.severity,
        kind_prefix: args.kind,
        after_index: 0,
        after_sequence: 0,
    };
    let mut connection = c.connect().await?;
    loop {
        match print(c, &mut connection, &mut request).await {
            // The node that was asked is gone: another goes on where it stopped.
            Err(error) if args.follow && error.is_about_the_connection() => {
                eprintln!("-- the node stopped answering; asking another --");
                connection.open_again().await?;
            }
            // Streams end when a node stops in good order, too.
            Ok(()) if args.follow => connection.open_again().await?,
            outcome => return outcome.map(|()| ExitCode::SUCCESS),
        }
    }
}

/// Prints events as they come; `request` then asks for those after the last one.
async fn print(
    c: &Context,
    connection: &mut Connection,
    request: &mut EventsRequest,
) -> Result<(), CliError> {
    let mut events = connection.api.events(request.clone()).await?.into_inner();
    while let Some(event) = events.message().await? {
        match c.output {
            Format::Json => output::json_line(&event)?,
            Format::Table => output::text(line(&event, 0))?,
        }
        (request.after_index, request.after_sequence) = (event.index, event.sequence);
    }
    Ok(())
}

/// One event: on a terminal with a short time and folded, elsewhere on one line with the whole time.
/// `indent` characters stand before it already.
pub fn line(event: &EventView, indent: usize) -> String {
    let object = event.objects.first().map_or("-", String::as_str);
    let time = output::utc(event.at_ms);
    let time = if output::on_a_terminal() {
        // 2026-11-22T14:03:52Z
        time[5..19].replace('T', " ")
    } else {
        time
    };
    let head = format!(
        "{time}  {:>5}  {:<5}  {object:<15}  {:<18}  ",
        event.index, event.severity, event.kind
    );
    let mut detail = event.detail.clone();
    if !event.rule.is_empty() {
        detail.push_str("  [");
        detail.push_str(&event.rule);
        detail.push(']');
    }
    // Where there is no room beside them, details go under the rest.
    let indent = indent + head.chars().count();
    format!("{head}{}", output::hanging(&detail, indent))
}
