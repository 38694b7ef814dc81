//! `clusterctl node check`: whether nodes' hosts are as they should be, and what confines their monitors.

use std::process::ExitCode;

use proto::admin::{Finding, MonitorCheck, NodeCheckReply, NodeCheckRequest};

use crate::Context;
use crate::client::CliError;
use crate::output::{self, Format};

/// `node check`.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// The nodes to look at [the one that is asked].
    #[arg(conflicts_with = "all")]
    nodes: Vec<String>,
    /// Every node.
    #[arg(long)]
    all: bool,
}

/// Does it. The exit code is 1 when a check failed or a node could not be asked; warnings do not count.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, args: CheckArgs) -> Result<ExitCode, CliError> {
    let mut connection = c.connect().await?;
    let names = if args.all {
        let nodes = super::list(&mut connection).await?;
        nodes.into_iter().map(|node| node.name).collect()
    } else if args.nodes.is_empty() {
        vec![String::new()]
    } else {
        args.nodes
    };
    let several = names.len() > 1;
    let mut replies = Vec::new();
    for node in names {
        let request = NodeCheckRequest { node: node.clone() };
        let reply = match connection.api.node_check(request).await {
            Ok(reply) => reply.into_inner(),
            // One that is down does not hide the others.
            Err(status) if several => unreachable(node, CliError::from(status)),
            Err(status) => return Err(status.into()),
        };
        replies.push(reply);
    }
    match c.output {
        Format::Json => output::json(&replies)?,
        Format::Table => {
            let texts: Vec<String> = replies.iter().map(text).collect();
            output::text(texts.join("\n\n"))?;
        }
    }
    let failed = replies
        .iter()
        .flat_map(|reply| &reply.checks)
        .any(|finding| finding.state == FAILED);
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// A check that did not pass.
const FAILED: &str = "failed";

fn unreachable(node: String, error: CliError) -> NodeCheckReply {
    NodeCheckReply {
        node,
        checks: vec![Finding {
            name: "node".into(),
            state: FAILED.into(),
            detail: error.to_string(),
            r#try: "on that node: systemctl status clusterd".into(),
        }],
        monitors: Vec::new(),
    }
}

/// One node's answer for people.
fn text(reply: &NodeCheckReply) -> String {
    let count = |state: &str| {
        let of_it = reply.checks.iter().filter(|finding| finding.state == state);
        of_it.count() as u64
    };
    let verdict = match (count(FAILED), count("warning")) {
        (0, 0) => "everything as it should be".to_owned(),
        (0, warnings) => output::counted(warnings, "warning"),
        (failed, warnings) => format!("{failed} failed, {}", output::counted(warnings, "warning")),
    };
    let rows = reply.checks.iter().map(row).collect();
    let mut parts = vec![
        format!("{}: {verdict}", reply.node),
        output::table_string(&["STATE", "CHECK", "DETAIL"], rows),
    ];
    if !reply.monitors.is_empty() {
        let rows = reply.monitors.iter().flat_map(monitor_rows).collect();
        parts.push(output::table_string(
            &["VM", "PID", "CONFINED BY", "NOT CONFINED BY"],
            rows,
        ));
    }
    parts.join("\n")
}

fn row(finding: &Finding) -> Vec<String> {
    let sign = match finding.state.as_str() {
        "ok" => "✔ ok",
        "warning" => "! warning",
        _ => "✘ failed",
    };
    let detail = match finding.r#try.as_str() {
        "" => finding.detail.clone(),
        advice => format!("{}; try: {advice}", finding.detail),
    };
    vec![sign.into(), finding.name.clone(), detail]
}

/// A line for the monitor, and one more for each measure that is missing but the first.
fn monitor_rows(monitor: &MonitorCheck) -> Vec<Vec<String>> {
    let applied: Vec<&str> = monitor
        .measures
        .iter()
        .filter(|measure| measure.applied)
        .map(|measure| measure.name.as_str())
        .collect();
    let mut missing = monitor
        .measures
        .iter()
        .filter(|measure| !measure.applied)
        .map(|measure| format!("{}: {}", measure.name, measure.detail));
    let mut rows = vec![vec![
        monitor.vm.clone(),
        monitor.pid.to_string(),
        applied.join(" "),
        missing.next().unwrap_or_default(),
    ]];
    rows.extend(
        missing.map(|measure| vec![monitor.vm.clone(), String::new(), String::new(), measure]),
    );
    rows
}

#[cfg(test)]
mod tests {
    use proto::admin::MeasureView;

    use super::*;

    #[test]
    fn a_check_reads_as_a_verdict_and_what_it_rests_on() {
        let finding = |name: &str, state: &str, advice: &str| Finding {
            name: name.into(),
            state: state.into(),
            detail: "found".into(),
            r#try: advice.into(),
        };
        let measure = |name: &str, applied| MeasureView {
            name: name.into(),
            applied,
            detail: "because".into(),
        };
        let reply = NodeCheckReply {
            node: "n1".into(),
            checks: vec![
                finding("kvm", "ok", ""),
                finding("mtu", "warning", "set it"),
            ],
            monitors: vec![MonitorCheck {
                vm: "web-1".into(),
                pid: 7,
                measures: vec![
                    measure("uid", true),
                    measure("seccomp", false),
                    measure("mounts", false),
                ],
            }],
        };
        let text = text(&reply);
        for part in [
            "n1: 1 warning\n",
            "✔ ok       kvm    found\n",
            "! warning  mtu    found; try: set it\n",
            "web-1  7    uid          seccomp: because\n",
            "web-1  -    -            mounts: because",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        let down = unreachable("n2".into(), CliError::Local("no answer".into()));
        assert_eq!(down.checks[0].state, FAILED);
    }
}
