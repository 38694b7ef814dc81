//! Figures for Prometheus, served as text on an address of their own.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Mutex, OnceLock, PoisonError};

use axum::Router;
use axum::routing::get;
use cluster_model::{ClusterState, Liveness, MigrationState, NodeId};
use metrics::gauge;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::member::Member;
use crate::node::NodeHandle;

/// Bounds of every duration, seconds: from a commit to a migration.
const SECONDS: [f64; 18] = [
    0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1.0, 5.0,
    20.0, 60.0, 300.0,
];

/// Bounds of how long a lease's renewal takes, seconds: fine enough to see a p99 double.
const RENEWAL_SECONDS: [f64; 24] = [
    0.000_5, 0.000_75, 0.001, 0.001_5, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.010, 0.012,
    0.015, 0.020, 0.025, 0.030, 0.040, 0.060, 0.100, 0.200, 0.500, 1.0, 2.0, 5.0,
];

/// A machine and the phase of its monitor.
type Shown = (String, &'static str);

/// Why metrics are not served.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The address cannot be used.
    #[error("cannot serve metrics on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The recorder cannot be set up.
    #[error("metrics cannot be recorded: {why}")]
    Recorder {
        /// Why.
        why: String,
    },
}

/// The process's one recorder.
fn recorder() -> Result<&'static PrometheusHandle, MetricsError> {
    static RECORDER: OnceLock<Result<PrometheusHandle, String>> = OnceLock::new();
    RECORDER
        .get_or_init(|| {
            PrometheusBuilder::new()
                .set_buckets(&SECONDS)
                .and_then(|builder| {
                    let renewals = Matcher::Full(crate::heartbeat::RENEWALS.into());
                    builder.set_buckets_for_metric(renewals, &RENEWAL_SECONDS)
                })
                .and_then(PrometheusBuilder::install_recorder)
                .map_err(|error| error.to_string())
        })
        .as_ref()
        .map_err(|why| MetricsError::Recorder { why: why.clone() })
}

/// Listens on `address`; the future serves until it is dropped.
///
/// # Errors
/// See [`MetricsError`].
pub async fn serve(
    address: SocketAddr,
    node: NodeHandle,
) -> Result<impl Future<Output = ()> + Send + 'static, MetricsError> {
    let recorder = recorder()?;
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .map_err(|source| MetricsError::Listen { address, source })?;
    let page = move || {
        let node = node.clone();
        async move {
            if let Some(member) = node.member() {
                measure(&member);
            }
            recorder.run_upkeep();
            recorder.render()
        }
    };
    let app = Router::new().route("/metrics", get(page));
    Ok(async move {
        if let Err(error) = axum::serve(listener, app).await {
            tracing::error!(%error, "metrics are no longer served");
        }
    })
}

/// Sets every gauge to what it is now.
fn measure(member: &Member) {
    let state = member.state();
    let me = member.config.name.to_string();
    gauge!("clusterd_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    gauge!("clusterd_node_up", "node" => me).set(1.0);
    raft(member);
    leases(member, &state);
    nodes(&state);
    migrations(&state);
}

fn raft(member: &Member) {
    let status = member.raft.metrics();
    let index = |index: Option<u64>| index.unwrap_or(0) as f64;
    gauge!("clusterd_raft_term").set(status.leadership.term as f64);
    gauge!("clusterd_raft_is_leader").set(f64::from(u8::from(status.leadership.is_me)));
    gauge!("clusterd_raft_leader_changes_total").set(status.leadership.changes as f64);
    gauge!("clusterd_raft_last_log_index").set(index(status.last_log));
    gauge!("clusterd_raft_commit_index").set(index(status.committed));
    gauge!("clusterd_raft_applied_index").set(index(status.applied));
    gauge!("clusterd_raft_snapshot_index").set(index(status.snapshot));
    for peer in status.members.values() {
        if let Some(lag) = peer.lag {
            gauge!("clusterd_raft_follower_lag_entries", "peer" => peer.name.clone())
                .set(lag as f64);
        }
    }
}

fn leases(member: &Member, state: &ClusterState) {
    let held = state.owned_by(member.node).count();
    gauge!("clusterd_lease_held").set(held as f64);
    gauge!("clusterd_lease_epoch").set(f64::from(state.token_last.0));
    let left_ns = member
        .lease
        .borrow()
        .deadline_ns
        .saturating_sub(member.clock.boottime_ns());
    gauge!("clusterd_lease_left_seconds").set(left_ns as f64 / 1e9);
    machines(member, state);
}

/// The machines whose monitors run here. A machine that has gone, or is in another phase now, is shown as
/// 0 and not as it last was.
fn machines(member: &Member, state: &ClusterState) {
    static SHOWN: Mutex<BTreeSet<Shown>> = Mutex::new(BTreeSet::new());
    let mut now = BTreeSet::new();
    for monitor in member.monitors.table().borrow().values() {
        let vm = state.vm_label(monitor.vm());
        now.insert((vm.clone(), monitor.status.phase().as_str_name()));
        if let Some(usage) = &monitor.status.usage {
            gauge!("clusterd_vm_cpu_seconds_total", "vm" => vm.clone())
                .set(usage.cpu_ns as f64 / 1e9);
            gauge!("clusterd_vm_memory_bytes", "vm" => vm.clone())
                .set(usage.memory_resident_bytes as f64);
        }
        if let Some(progress) = &monitor.status.migration {
            gauge!("clusterd_migration_remaining_bytes", "vm" => vm.clone())
                .set(progress.remaining_bytes as f64);
            gauge!("clusterd_migration_sent_bytes", "vm" => vm.clone())
                .set(progress.sent_bytes as f64);
            gauge!("clusterd_migration_dirty_bytes_per_second", "vm" => vm)
                .set(progress.dirty_bytes_s as f64);
        }
    }
    let mut shown = SHOWN.lock().unwrap_or_else(PoisonError::into_inner);
    for (vm, phase) in shown.difference(&now) {
        gauge!("clusterd_vm_info", "vm" => vm.clone(), "phase" => *phase).set(0.0);
        if !now.iter().any(|(present, _)| present == vm) {
            gauge!("clusterd_vm_memory_bytes", "vm" => vm.clone()).set(0.0);
        }
    }
    for (vm, phase) in &now {
        gauge!("clusterd_vm_info", "vm" => vm.clone(), "phase" => *phase).set(1.0);
    }
    *shown = now;
}

fn nodes(state: &ClusterState) {
    for node in state.nodes.values() {
        let name = node.name.to_string();
        let up = node.liveness == Liveness::Up;
        gauge!("clusterd_node_state", "node" => name.clone(), "state" => "up")
            .set(f64::from(u8::from(up)));
        gauge!("clusterd_node_memory_capacity_bytes", "node" => name.clone())
            .set(node.facts.memory_mib as f64 * 1_048_576.0);
        gauge!("clusterd_node_memory_reserved_bytes", "node" => name)
            .set(committed(state, node.id) as f64 * 1_048_576.0);
    }
}

fn committed(state: &ClusterState, node: NodeId) -> u64 {
    state.memory_committed_mib(node)
}

fn migrations(state: &ClusterState) {
    let count = |is: fn(&MigrationState) -> bool| {
        state
            .migrations
            .values()
            .filter(|migration| is(&migration.state))
            .count() as f64
    };
    gauge!("clusterd_migrations", "phase" => "queued")
        .set(count(|is| matches!(is, MigrationState::Queued)));
    gauge!("clusterd_migrations", "phase" => "active")
        .set(count(|is| matches!(is, MigrationState::Active { .. })));
}
