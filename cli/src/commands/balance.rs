//! `clusterctl balance`: evening out load.

use std::process::ExitCode;

use clap::Subcommand;
use proto::admin::{BalanceMove, BalancePlan, BalanceRunRequest, BalanceStatusRequest};

use crate::Context;
use crate::client::CliError;
use crate::output::{self, Format};

/// What can be done with the balancer.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a plan now and carry it out.
    Run {
        /// Show the plan and do nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// How even the cluster is, and whether the balancer moves machines by itself.
    Status,
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, command: Command) -> Result<ExitCode, CliError> {
    let mut connection = c.connect().await?;
    let plan = match command {
        Command::Run { dry_run } => connection
            .api
            .balance_run(BalanceRunRequest {
                change: c.change(),
                dry_run,
            })
            .await?
            .into_inner(),
        Command::Status => connection
            .api
            .balance_status(BalanceStatusRequest {})
            .await?
            .into_inner(),
    };
    match c.output {
        Format::Json => output::json(&plan)?,
        Format::Table => output::text(text(&plan))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn text(plan: &BalancePlan) -> String {
    let mode = if plan.automatic {
        "moves by itself"
    } else {
        "moves when asked (clusterctl cluster set balance_auto=true)"
    };
    let mut lines = vec![
        format!("Balancer  {mode} · level {}", plan.level),
        format!(
            "Imbalance {:.3} now, {:.3} after this plan · {}",
            plan.imbalance_before, plan.imbalance_after, plan.verdict
        ),
    ];
    let moves = |moves: &[BalanceMove]| {
        let rows = moves
            .iter()
            .map(|m| {
                let way = if m.to.is_empty() {
                    m.from.clone()
                } else {
                    format!("{} → {}", m.from, m.to)
                };
                vec![
                    m.vm.clone(),
                    way,
                    format!("{:.3}", m.gain),
                    output::millis(m.cost_ms),
                    m.why.clone(),
                ]
            })
            .collect();
        output::table_string(&["VM", "MOVE", "GAIN", "COST", "WHY"], rows)
    };
    if !plan.moves.is_empty() {
        lines.push(moves(&plan.moves));
    }
    if !plan.left_alone.is_empty() {
        lines.push("Left alone:".into());
        lines.push(moves(&plan.left_alone));
    }
    if plan.started {
        lines.push("✔ queued; watch: clusterctl migration list".into());
    }
    lines.join("\n")
}
