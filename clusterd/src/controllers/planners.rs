//! Starts, queued migrations, overdue ones, drains, fail-backs and balance: one look after another.

use std::sync::Arc;
use std::time::Duration;

use cluster_model::queue::Next;
use cluster_model::supervise::Supervisor;
use cluster_model::{
    ClusterState, Command, Desired, MigrationState, Observed, balance, drain, failback, failover,
    queue,
};

use super::{leads, propose};
use crate::member::Member;
use crate::report;

/// Time alone makes some plans due.
const LOOK: Duration = Duration::from_millis(500);
/// Proposals of one plan that are under way at once.
const TOGETHER: usize = 16;

/// Plans and proposes while this node leads.
pub async fn run(member: Arc<Member>) {
    let mut state = member.raft.state();
    let mut leadership = member.raft.leadership();
    let mut led = 0;
    let mut supervisor = Supervisor::default();
    // The first balance comes an interval after this node began to lead.
    let mut balanced_at = tokio::time::Instant::now();
    loop {
        tokio::select! {
            changed = state.changed() => if changed.is_err() { return },
            changed = leadership.changed() => {
                if changed.is_err() { return }
                balanced_at = tokio::time::Instant::now();
            }
            () = tokio::time::sleep(LOOK) => {}
        }
        if !leads(&member, &mut led).await {
            state.mark_unchanged();
            leadership.mark_unchanged();
            continue;
        }
        let now = state.borrow_and_update().clone();
        let observed = report::observed(&now, &member.leader.reports().borrow());
        let mut due = plans(&now, &observed);
        let (wall_ms, steady_ms) = (
            member.clock.wall_ms(),
            member.clock.boottime_ns() / 1_000_000,
        );
        due.extend(
            supervisor
                .aborts(&now, wall_ms, steady_ms)
                .into_iter()
                .map(|command| ("supervision", command)),
        );
        let interval = Duration::from_secs(u64::from(now.settings.balance_interval_s));
        if now.settings.balance_auto && balanced_at.elapsed() >= interval {
            balanced_at = tokio::time::Instant::now();
            let plan = balance::plan(&now, &observed, member.clock.wall_ms());
            due.extend(plan.moves.iter().map(|one| ("balance", one.command())));
        }
        carry_out(&member, led, &now, due).await;
    }
}

type Due = Vec<(&'static str, Command)>;

fn plans(state: &ClusterState, observed: &Observed) -> Due {
    let mut due = Due::new();
    if state
        .vms
        .values()
        .any(|vm| vm.desired == Desired::Running && vm.ownership.owner.is_none())
    {
        let commands = failover::plan(state, observed);
        due.extend(commands.into_iter().map(|command| ("failover", command)));
    }
    due.extend(queue::next(state, observed).into_iter().map(|next| {
        let command = match next {
            Next::Start { migration, expects } => Command::StartMigration {
                migration,
                expects,
                ticket: ticket(),
            },
            Next::Abort { migration, reason } => Command::AbortMigration { migration, reason },
        };
        ("migrations", command)
    }));
    let drains = drain::next(state, observed);
    due.extend(drains.into_iter().map(|command| ("drain", command)));
    let returns = failback::next(state, observed);
    due.extend(returns.into_iter().map(|command| ("failback", command)));
    due
}

async fn carry_out(member: &Arc<Member>, term: u64, state: &ClusterState, due: Due) {
    for batch in due.chunks(TOGETHER) {
        let proposals = batch.iter().map(|(controller, command)| {
            count(state, command);
            propose(member, term, state, controller, command.clone())
        });
        futures::future::join_all(proposals).await;
    }
}

/// 32 random bytes in hex.
fn ticket() -> String {
    let bytes: [u8; 32] = rand::random();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn count(state: &ClusterState, command: &Command) {
    match command {
        Command::StartMigration { .. } => {
            metrics::counter!("clusterd_migration_started_total").increment(1);
        }
        Command::AbortMigration { migration, .. } => {
            let queued = state
                .migrations
                .get(migration)
                .is_some_and(|known| known.state == MigrationState::Queued);
            let phase = if queued { "queued" } else { "active" };
            metrics::counter!("clusterd_migration_failed_total", "phase" => phase).increment(1);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ticket_is_32_bytes_in_hex_and_another() {
        let (a, b) = (ticket(), ticket());
        assert_eq!(a.len(), 64);
        assert!(a.bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert_ne!(a, b);
    }
}
