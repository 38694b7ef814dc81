//! `clusterctl events`: what happened, and what happens now.

use std::process::ExitCode;

use proto::admin::{EventView, EventsRequest};

use crate::Context;
use crate::client::CliError;
use crate::output::{self, Format};

/// `events`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Stay, and print what comes.
    #[arg(long, short = 'f')]
    follow: bool,
    /// Only what happened since: 30s, 10m, 2h, 7d.
    #[arg(long, value_parser = parse_ago)]
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

fn parse_ago(text: &str) -> Result<u64, String> {
    let hint = || format!("`{text}` is not a time span; write 30s, 10m, 2h or 7d");
    let unit = text.chars().last().ok_or_else(hint)?;
    let number: u64 = text[..text.len() - unit.len_utf8()]
        .parse()
        .map_err(|_| hint())?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(hint()),
    };
    number.checked_mul(seconds * 1_000).ok_or_else(hint)
}

/// Prints them.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, args: Args) -> Result<ExitCode, CliError> {
    let now_ms = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        });
    let request = EventsRequest {
        follow: args.follow,
        since_ms: args.since.map_or(0, |ago| now_ms.saturating_sub(ago)),
        object: args.object,
        severity: args.severity,
        kind_prefix: args.kind,
        after_index: 0,
        after_sequence: 0,
    };
    let mut events = c.connect().await?.api.events(request).await?.into_inner();
    while let Some(event) = events.message().await? {
        match c.output {
            Format::Json => output::json_line(&event)?,
            Format::Table => output::text(line(&event))?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// One event on one line.
pub fn line(event: &EventView) -> String {
    let object = event.objects.first().map_or("-", String::as_str);
    let mut line = format!(
        "{}  {:>6}  {:<5}  {:<18} {:<20} {}",
        output::utc(event.at_ms),
        event.index,
        event.severity,
        object,
        event.kind,
        event.detail
    );
    if !event.rule.is_empty() {
        line.push_str("  [");
        line.push_str(&event.rule);
        line.push(']');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_spans_need_a_unit() {
        assert_eq!(parse_ago("10m"), Ok(600_000));
        for bad in ["", "10", "m", "-1s", "1y", "1µ", "99999999999999999d"] {
            assert!(parse_ago(bad).is_err(), "{bad}");
        }
    }
}
