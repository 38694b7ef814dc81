//! What can be seen from outside: figures for Prometheus that move with a migration, one trace of it from
//! both nodes where a collector is configured and nothing sent where none is, logs that programs read.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use proto::admin::MigrationView;
use tests::cluster::{Machine, Setup, TestCluster};
use tests::scrape::{Figures, at, figures};
use tokio::net::TcpListener;
use tonic::{Request, Response, Status};

/// Where OpenTelemetry sends to when it is not told where.
const USUAL_COLLECTOR: &str = "127.0.0.1:4317";
/// Says where a collector is.
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

async fn of_all(cluster: &TestCluster) -> anyhow::Result<BTreeMap<String, Figures>> {
    let mut all = BTreeMap::new();
    for node in &cluster.local.nodes {
        all.insert(node.name.clone(), figures(cluster, &node.name).await?);
    }
    Ok(all)
}

fn sum(all: &BTreeMap<String, Figures>, series: &str) -> f64 {
    all.values().map(|figures| at(figures, series)).sum()
}

/// Another node than that.
fn other(cluster: &TestCluster, node: &str) -> String {
    cluster
        .local
        .nodes
        .iter()
        .map(|member| member.name.clone())
        .find(|name| name != node)
        .unwrap_or_default()
}

async fn migrated(cluster: &TestCluster, vm: &str, to: &str) -> anyhow::Result<MigrationView> {
    let end = cluster.migrate(vm, to).await?;
    ensure!(end.state == "cut-over", "{}", end.reason);
    cluster.wait_progress(vm).await?;
    Ok(end)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_figures_of_raft_leases_and_migrations_are_served_and_move() -> anyhow::Result<()> {
    if !tests::kvm_or_skip("observability") {
        return Ok(());
    }
    let cluster = TestCluster::start(Setup::default()).await?;
    let vm = cluster.create(&Machine::small("vm-a")).await?;
    let to = other(&cluster, &vm.node);
    // A lease's slack is what was left of it when it was renewed: the first renewal has none to tell.
    let before = cluster
        .wait("every node to have renewed its lease", async || {
            let all = of_all(&cluster).await?;
            let renewed = |figures: &Figures| figures.contains_key("clusterd_lease_slack_seconds");
            Ok(all.values().all(renewed).then_some(all))
        })
        .await?;
    for (node, figures) in &before {
        for series in [
            "clusterd_raft_term",
            "clusterd_raft_is_leader",
            "clusterd_raft_leader_changes_total",
            "clusterd_raft_last_log_index",
            "clusterd_raft_commit_index",
            "clusterd_raft_applied_index",
            "clusterd_raft_snapshot_index",
            "clusterd_lease_held",
            "clusterd_lease_epoch",
            "clusterd_lease_left_seconds",
            "clusterd_lease_renew_duration_seconds_count",
            "clusterd_migrations{phase=\"queued\"}",
            "clusterd_migrations{phase=\"active\"}",
            &format!("clusterd_node_up{{node=\"{node}\"}}"),
        ] {
            ensure!(figures.contains_key(series), "{node} serves no {series}");
        }
        ensure!(at(figures, "clusterd_raft_commit_index") > 0.0);
        let left = at(figures, "clusterd_lease_left_seconds");
        ensure!(
            left > 0.0 && left <= 2.0,
            "{node}: {left} s of a lease of 2 s"
        );
        ensure!(
            figures
                .keys()
                .any(|series| series.starts_with("clusterd_build_info{version="))
        );
    }
    ensure!(sum(&before, "clusterd_raft_is_leader").to_bits() == 1f64.to_bits());
    let leader = cluster.leader().await?;
    ensure!(
        at(
            &before[&leader],
            "clusterd_raft_commit_duration_seconds_count"
        ) > 0.0
    );
    let lags = before[&leader]
        .keys()
        .filter(|series| series.starts_with("clusterd_raft_follower_lag_entries{peer="))
        .count();
    ensure!(lags >= 2, "the leader tells the lag of {lags} followers");
    ensure!(at(&before[&vm.node], "clusterd_lease_held") > 0.5);
    ensure!(at(&before[&to], "clusterd_lease_held") < 0.5);

    let end = migrated(&cluster, "vm-a", &to).await?;
    let after = of_all(&cluster).await?;
    let moved = |node: &str, series: &str| at(&after[node], series) - at(&before[node], series);
    ensure!(sum(&after, "clusterd_migration_started_total") > 0.5);
    ensure!(moved(&to, "clusterd_migration_completed_total") > 0.5);
    let sent = moved(&to, "clusterd_migration_bytes_total");
    ensure!(
        (sent - end.sent_bytes as f64).abs() < 1.0,
        "{sent} bytes counted, {} sent",
        end.sent_bytes
    );
    ensure!(moved(&to, "clusterd_migration_passes_count") > 0.5);
    ensure!(moved(&to, "clusterd_migration_duration_seconds_sum") > 0.0);
    let blackout = |part: &str| {
        moved(
            &to,
            &format!("clusterd_migration_blackout_seconds_sum{{part=\"{part}\"}}"),
        )
    };
    let told = end.blackout_us as f64 / 1e6;
    ensure!(
        (blackout("all") - told).abs() < 1e-6,
        "{} s measured, {told} s reported",
        blackout("all")
    );
    let parts: f64 = end.parts.iter().map(|part| blackout(&part.name)).sum();
    ensure!(
        (parts - told).abs() < 1e-5,
        "the parts add up to {parts} s of {told} s"
    );
    for node in [&vm.node, &to] {
        ensure!(moved(node, "clusterd_lease_epoch") > 0.5);
        ensure!(moved(node, "clusterd_raft_commit_index") > 0.5);
        ensure!(moved(node, "clusterd_raft_applied_index") > 0.5);
    }
    ensure!(moved(&to, "clusterd_lease_held") > 0.5);
    ensure!(moved(&vm.node, "clusterd_lease_held") < -0.5);
    // Each machine is told of by the node that runs it, in one phase, and by nobody else.
    cluster
        .wait("the machine's series to follow it", async || {
            let all = of_all(&cluster).await?;
            let told = |node: &str| -> f64 {
                all[node]
                    .iter()
                    .filter(|(series, _)| series.starts_with("clusterd_vm_info{"))
                    .map(|(_, value)| value)
                    .sum()
            };
            let gone = told(&vm.node) < 0.5;
            Ok((gone && (told(&to) - 1.0).abs() < 0.5).then_some(()))
        })
        .await
}

/// Takes spans over OTLP.
#[derive(Clone, Default)]
struct Collector {
    spans: Arc<Mutex<Vec<(String, Span)>>>,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        for resource in request.into_inner().resource_spans {
            let service = resource
                .resource
                .as_ref()
                .and_then(|resource| text(&resource.attributes, "service.name"))
                .unwrap_or_default();
            for scope in resource.scope_spans {
                spans.extend(scope.spans.into_iter().map(|span| (service.clone(), span)));
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn listen() -> anyhow::Result<(Collector, SocketAddr)> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let collector = Collector::default();
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(collector.clone()))
            .serve_with_incoming(tonic::transport::server::TcpIncoming::from(listener));
        tokio::spawn(server);
        Ok((collector, address))
    }

    fn spans(&self, of: &str) -> Vec<Span> {
        let spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        spans
            .iter()
            .filter(|(service, _)| service == of)
            .map(|(_, span)| span.clone())
            .collect()
    }

    /// The trace whose root is that migration's, root first; `None` until the root has come.
    fn trace_of(&self, migration: &str) -> Option<(Span, Vec<Span>)> {
        let spans = self.spans("clusterd");
        let root = spans.iter().find(|span| {
            span.name == "migration"
                && text(&span.attributes, "migration").as_deref() == Some(migration)
        })?;
        let rest = spans
            .iter()
            .filter(|span| span.trace_id == root.trace_id && span.span_id != root.span_id)
            .cloned()
            .collect();
        Some((root.clone(), rest))
    }
}

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    let found = attributes.iter().find(|attribute| attribute.key == key)?;
    match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text.clone()),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_is_one_trace_with_spans_of_both_nodes() -> anyhow::Result<()> {
    if !tests::kvm_or_skip("observability") {
        return Ok(());
    }
    let (collector, address) = Collector::listen().await?;
    let environment = [
        (ENDPOINT, format!("http://{address}")),
        ("OTEL_BSP_SCHEDULE_DELAY", "200".to_owned()),
    ];
    let cluster = TestCluster::start(Setup {
        environment: environment
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        ..Setup::default()
    })
    .await?;
    let vm = cluster.create(&Machine::small("vm-a")).await?;
    let to = other(&cluster, &vm.node);
    let mut traces = BTreeSet::new();
    for (from, to) in [(&vm.node, &to), (&to, &vm.node)] {
        let end = migrated(&cluster, "vm-a", to).await?;
        let (root, rest) = cluster
            .wait("the whole trace", async || {
                let trace = collector.trace_of(&end.id);
                let whole = |rest: &Vec<Span>| {
                    [from, to].iter().all(|node| {
                        rest.iter()
                            .any(|span| text(&span.attributes, "node").as_ref() == Some(*node))
                    })
                };
                Ok(trace.filter(|(_, rest)| whole(rest)))
            })
            .await?;
        ensure!(
            root.trace_id.len() == 16 && root.parent_span_id.is_empty(),
            "{root:?}"
        );
        ensure!(
            traces.insert(root.trace_id.clone()),
            "two migrations share a trace"
        );
        cluster
            .wait("the source's monitor's part of the trace", async || {
                let sent = collector.spans("vmm").into_iter().any(|span| {
                    span.trace_id == root.trace_id
                        && span.parent_span_id == root.span_id
                        && span.name == "send the machine"
                });
                Ok(sent.then_some(()))
            })
            .await?;
        let mut blackout_ns = 0;
        for span in &rest {
            ensure!(
                span.parent_span_id == root.span_id,
                "{} lies not under the root",
                span.name
            );
            ensure!(
                span.end_time_unix_nano >= span.start_time_unix_nano
                    && span.end_time_unix_nano <= root.end_time_unix_nano + 1_000_000,
                "{} lies not within the migration",
                span.name
            );
            if span.name.starts_with("blackout: ") {
                blackout_ns += span.end_time_unix_nano - span.start_time_unix_nano;
                ensure!(text(&span.attributes, "node").as_ref() == Some(to));
            }
        }
        let names: BTreeSet<&str> = rest.iter().map(|span| span.name.as_str()).collect();
        for name in [
            "setup: the destination is ready",
            "blackout: drain",
            "blackout: last copy",
            "blackout: claim",
            "blackout: commit",
            "blackout: resume",
        ] {
            ensure!(names.contains(name), "no span `{name}` in {names:?}");
        }
        ensure!(
            blackout_ns.abs_diff(end.blackout_us * 1_000) < 10_000,
            "the spans' blackout is {blackout_ns} ns, the migration's {} µs",
            end.blackout_us
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_sent_where_no_collector_is_configured_and_logs_are_json() -> anyhow::Result<()>
{
    if !tests::kvm_or_skip("observability") {
        return Ok(());
    }
    ensure!(
        std::env::var_os(ENDPOINT).is_none(),
        "{ENDPOINT} is set for this test: unset it"
    );
    let usual = TcpListener::bind(USUAL_COLLECTOR).await;
    let cluster = TestCluster::start(Setup {
        environment: BTreeMap::from([("BATON_LOG_FORMAT".to_owned(), "json".to_owned())]),
        ..Setup::default()
    })
    .await?;
    let vm = cluster.create(&Machine::small("vm-a")).await?;
    let to = other(&cluster, &vm.node);
    let end = migrated(&cluster, "vm-a", &to).await?;
    match usual {
        // A batch would have gone out with the migration's end: its spans are sent when a process stops, too.
        Ok(listener) => {
            for node in &cluster.local.nodes {
                let pid = nix::unistd::Pid::from_raw(node.pid);
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
                cluster
                    .wait("a daemon's end", async || {
                        let flags = Some(nix::sys::wait::WaitPidFlag::WNOHANG);
                        let status = nix::sys::wait::waitpid(pid, flags);
                        let lives = matches!(status, Ok(nix::sys::wait::WaitStatus::StillAlive));
                        Ok((!lives).then_some(()))
                    })
                    .await?;
            }
            let came = tokio::time::timeout(Duration::from_millis(1), listener.accept()).await;
            ensure!(
                came.is_err(),
                "somebody connected to the usual collector: {came:?}"
            );
        }
        Err(error) => {
            proto::skip!(
                "observability",
                "{USUAL_COLLECTOR} cannot be used here ({error})"
            );
        }
    }
    let mut migrated_lines = 0;
    for node in &cluster.local.nodes {
        for log in logs(&node.folder)? {
            let written = std::fs::read_to_string(&log)?;
            for line in written.lines().filter(|line| !line.is_empty()) {
                let entry: serde_json::Value = serde_json::from_str(line)
                    .with_context(|| format!("{}: {line}", log.display()))?;
                for field in ["timestamp", "level", "fields"] {
                    ensure!(entry.get(field).is_some(), "no {field} in {line}");
                }
                let fields = &entry["fields"];
                if fields["message"] == "migrated" && fields["migration"] == end.id.as_str() {
                    ensure!(fields["blackout_us"] == end.blackout_us, "{line}");
                    migrated_lines += 1;
                }
            }
        }
    }
    ensure!(
        migrated_lines == 1,
        "{migrated_lines} lines tell of the migration"
    );
    Ok(())
}

/// The logs of a node's daemons and monitors.
fn logs(folder: &std::path::Path) -> anyhow::Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "log")
                || path.file_name().is_some_and(|name| name == "log")
            {
                found.push(path);
            }
        }
    }
    ensure!(!found.is_empty());
    Ok(found)
}
