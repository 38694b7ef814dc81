//! `clusterctl drain` and `uncordon`: emptying a node, and giving it work again.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use proto::admin::{
    DrainMove, DrainPlan, DrainStatus, NodeDrainRequest, NodeDrainStatusRequest,
    NodeUncordonRequest,
};

use crate::Context;
use crate::client::{CliError, Connection};
use crate::output::{self, Format};

/// How often a running drain is looked at.
const DRAIN_LOOK: Duration = Duration::from_millis(250);
/// Done in part: some machines could not move.
const EXIT_INCOMPLETE: u8 = 5;

/// `drain`.
#[derive(Debug, clap::Args)]
pub struct DrainArgs {
    /// The node to empty.
    node: String,
    /// Show the plan and do nothing.
    #[arg(long)]
    dry_run: bool,
}

/// `uncordon`.
#[derive(Debug, clap::Args)]
pub struct UncordonArgs {
    /// The node.
    node: String,
    /// Also bring back the machines that its last drain moved away.
    #[arg(long)]
    failback: bool,
}

/// `clusterctl drain`.
///
/// # Errors
/// What the node refused.
pub async fn drain(c: &Context, args: DrainArgs) -> Result<ExitCode, CliError> {
    let mut connection = c.connect().await?;
    let ask = |dry_run| NodeDrainRequest {
        change: c.change(),
        node: args.node.clone(),
        dry_run,
    };
    let plan = connection.api.node_drain(ask(true)).await?.into_inner();
    if args.dry_run {
        match c.output {
            Format::Json => output::json(&plan)?,
            Format::Table => output::text(plan_text(&plan))?,
        }
        return Ok(if plan.cannot_move > 0 {
            ExitCode::from(EXIT_INCOMPLETE)
        } else {
            ExitCode::SUCCESS
        });
    }
    if c.output == Format::Table {
        eprintln!("{}", plan_text(&plan));
    }
    if plan.cannot_move > 0
        && !output::confirm(
            c.yes,
            &format!(
                "{} of its machines cannot move. Drain {} all the same?",
                plan.cannot_move, args.node
            ),
        )?
    {
        return Ok(ExitCode::FAILURE);
    }
    let plan = connection.api.node_drain(ask(false)).await?.into_inner();
    if c.no_wait {
        if c.output == Format::Json {
            output::json(&plan)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let status = watch_drain(&mut connection, &args.node, c.timeout).await?;
    match c.output {
        Format::Json => output::json(&status)?,
        Format::Table => output::text(drain_line(&status))?,
    }
    Ok(match status.state.as_str() {
        "drained" => ExitCode::SUCCESS,
        "incomplete" => ExitCode::from(EXIT_INCOMPLETE),
        _ => ExitCode::FAILURE,
    })
}

/// Follows a drain to its end, with a bar on a terminal and a line for each machine elsewhere. When the node
/// that was asked dies, another is.
///
/// # Errors
/// When no node can be asked any more, Ctrl-C was typed, or the time is over (the drain goes on).
pub async fn watch_drain(
    connection: &mut Connection,
    node: &str,
    timeout: Duration,
) -> Result<DrainStatus, CliError> {
    let interactive = output::interactive();
    let bar = if interactive {
        ProgressBar::new(1)
    } else {
        ProgressBar::hidden()
    };
    bar.set_style(
        ProgressStyle::with_template(
            "{prefix} draining  {bar:20}  {pos} of {len} gone  {elapsed}  {wide_msg}",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    bar.set_prefix(node.to_owned());
    let mut told = BTreeSet::new();
    let watching = async {
        loop {
            let asked = connection
                .api
                .node_drain_status(NodeDrainStatusRequest {
                    node: node.to_owned(),
                })
                .await;
            let status = match asked.map_err(CliError::from) {
                Ok(status) => status.into_inner(),
                Err(error) if error.is_about_the_connection() => {
                    connection.open_again().await?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            bar.set_length(u64::from(status.machines));
            bar.set_position(u64::from(status.gone));
            bar.set_message(moving_words(&status));
            for migration in status.moving.iter().filter(|_| !interactive) {
                if told.insert(migration.id.clone()) {
                    eprintln!(
                        "{node} draining: {} of {} gone, {} → {}",
                        status.gone, status.machines, migration.vm, migration.to
                    );
                }
            }
            if status.state != "draining" {
                return Ok(status);
            }
            tokio::time::sleep(DRAIN_LOOK).await;
        }
    };
    let watching = output::unless_interrupted(watching, || {
        format!(
            "the drain goes on; look: clusterctl node show {node}; end it: clusterctl uncordon {node}"
        )
    });
    let outcome = tokio::time::timeout(timeout, watching).await;
    bar.finish_and_clear();
    outcome.unwrap_or_else(|_| {
        Err(CliError::Local(format!(
            "{node} is still being drained after {} s; look: clusterctl node show {node}",
            timeout.as_secs()
        )))
    })
}

fn moving_words(status: &DrainStatus) -> String {
    let mut words: Vec<String> = status
        .moving
        .iter()
        .map(|migration| {
            let percent = match migration.memory_total_bytes {
                0 => 0,
                all => 100 - 100 * migration.remaining_bytes.min(all) / all,
            };
            format!("{} → {} {percent}%", migration.vm, migration.to)
        })
        .collect();
    if !status.waiting.is_empty() {
        words.push(format!("{} waiting", status.waiting.len()));
    }
    words.join(", ")
}

/// The plan as a table.
pub fn plan_text(plan: &DrainPlan) -> String {
    let moves = plan.moves.len() - plan.cannot_move as usize;
    if plan.moves.is_empty() {
        return format!("Plan for {}: no machine is on it", plan.node);
    }
    let leave = output::counted(moves as u64, "machine");
    let mut text = format!(
        "Plan for {}: {leave} to leave, {} cannot · predicted {} ({})",
        plan.node,
        plan.cannot_move,
        output::millis(plan.predicted_ms),
        plan.predicted_from,
    );
    text.push('\n');
    text.push_str(&moves_table(&plan.moves));
    text
}

fn moves_table(moves: &[DrainMove]) -> String {
    let rows = moves
        .iter()
        .map(|m| {
            let cannot = m.how == "none";
            vec![
                m.vm.clone(),
                if cannot {
                    "cannot move".into()
                } else {
                    m.how.clone()
                },
                m.to.clone(),
                if cannot {
                    String::new()
                } else {
                    output::millis(m.predicted_ms)
                },
                if cannot {
                    String::new()
                } else {
                    format!("{} ms", m.predicted_blackout_ms)
                },
                m.why.clone(),
            ]
        })
        .collect();
    output::table_string(
        &["VM", "HOW", "TO", "PREDICTED", "BLACKOUT MAX", "WHY"],
        rows,
    )
}

pub(super) fn drain_line(status: &DrainStatus) -> String {
    let node = &status.node;
    match status.state.as_str() {
        "drained" => format!(
            "✔ {node} is drained and safe to power off · {} left it{}\n  to bring it back: clusterctl uncordon {node} --failback",
            output::counted(status.gone, "machine"),
            match status.gone {
                0 => String::new(),
                _ => format!(
                    " in {} · longest blackout {}",
                    output::millis(status.elapsed_ms),
                    output::micros(status.longest_blackout_us)
                ),
            }
        ),
        "incomplete" => format!(
            "✘ {node} keeps {}; it takes no others until: clusterctl uncordon {node}\n{}",
            output::counted(status.stuck.len() as u64, "machine"),
            moves_table(&status.stuck)
        ),
        "draining" => format!(
            "drain        {} of {} gone, {}",
            status.gone,
            status.machines,
            moving_words(status)
        ),
        other => format!("{node}: {other}"),
    }
}

/// `clusterctl uncordon`.
///
/// # Errors
/// What the node refused.
pub async fn uncordon(c: &Context, args: UncordonArgs) -> Result<ExitCode, CliError> {
    let request = NodeUncordonRequest {
        change: c.change(),
        node: args.node.clone(),
        failback: args.failback,
    };
    let reply = c
        .connect()
        .await?
        .api
        .node_uncordon(request)
        .await?
        .into_inner();
    match c.output {
        Format::Json => output::json(&reply)?,
        Format::Table => {
            output::text(format!("✔ {} takes machines again", args.node))?;
            if !reply.failback.is_empty() {
                output::text(moves_table(&reply.failback))?;
                output::text(format!(
                    "they return a few at a time, those of high priority first; watch: clusterctl why node/{}",
                    args.node
                ))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
