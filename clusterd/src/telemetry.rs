//! Logs, and one trace for each migration.
//!
//! A migration's trace needs no coordination: its ids follow from the cluster's id and the migration's
//! number, so both nodes and both monitors put their spans into the same trace, whoever speaks first.
//! The destination adds the root when the migration is through. Off unless a collector is configured.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use cluster_model::{Migration, MigrationId};
use opentelemetry::trace::{
    Span, SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState, Tracer,
    TracerProvider,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, SdkTracerProvider};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::agent::MigrationSummary;

/// Set to a collector's address, it turns traces on (OpenTelemetry's own variable).
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
/// `json` makes the log one JSON object a line.
const LOG_FORMAT: &str = "BATON_LOG_FORMAT";
/// How long the end of the process waits for a collector, which may be dead.
const GOODBYE_MAX: Duration = Duration::from_millis(500);

static TRACES: OnceLock<SdkTracerProvider> = OnceLock::new();

/// The ids that the next span gets, when it is a migration's root.
static PLANNED: Mutex<Option<(TraceId, SpanId)>> = Mutex::new(None);

/// Sets up logging to stderr (`RUST_LOG` says what), and traces if a collector is configured. Needs a
/// tokio runtime.
pub fn init() {
    use tracing_subscriber::EnvFilter;
    // openraft reports every retry; what matters of it reaches us as errors.
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,openraft=error"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let json = std::env::var(LOG_FORMAT).is_ok_and(|format| format == "json");
    // A second subscriber of one process (tests) is refused; the first one stays.
    let _ = if json {
        builder.json().try_init()
    } else {
        builder.try_init()
    };
    if std::env::var_os(ENDPOINT).is_none() {
        return;
    }
    match opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .build()
    {
        Ok(exporter) => {
            let resource = Resource::builder().with_service_name("clusterd").build();
            let provider = SdkTracerProvider::builder()
                .with_id_generator(Ids::default())
                .with_batch_exporter(exporter)
                .with_resource(resource)
                .build();
            let _ = TRACES.set(provider);
        }
        Err(error) => tracing::warn!(%error, "no traces"),
    }
}

/// Sends what is left, for a moment at most.
pub fn stop() {
    if let Some(traces) = TRACES.get()
        && let Err(error) = traces.shutdown_with_timeout(GOODBYE_MAX)
    {
        tracing::debug!(%error, "the last traces are lost");
    }
}

/// Gives planned ids to a root, and random ones to everything else.
#[derive(Debug, Default)]
struct Ids {
    random: RandomIdGenerator,
}

impl IdGenerator for Ids {
    fn new_trace_id(&self) -> TraceId {
        let planned = *PLANNED.lock().unwrap_or_else(PoisonError::into_inner);
        planned.map_or_else(|| self.random.new_trace_id(), |(trace, _)| trace)
    }

    fn new_span_id(&self) -> SpanId {
        let planned = *PLANNED.lock().unwrap_or_else(PoisonError::into_inner);
        planned.map_or_else(|| self.random.new_span_id(), |(_, span)| span)
    }
}

/// The trace of a migration and the span that all others of it lie under.
fn ids(cluster: &str, migration: MigrationId) -> (TraceId, SpanId) {
    let name = format!("baton/{cluster}/{migration}");
    // Zero is no id; it comes up about never.
    let trace = xxh3_128(name.as_bytes()).max(1);
    let span = xxh3_64(name.as_bytes()).max(1);
    (
        TraceId::from_bytes(trace.to_be_bytes()),
        SpanId::from_bytes(span.to_be_bytes()),
    )
}

/// The W3C `traceparent` of a migration, for its monitors; empty while tracing is off.
pub fn traceparent(cluster: &str, migration: MigrationId) -> String {
    if TRACES.get().is_none() {
        return String::new();
    }
    let (trace, span) = ids(cluster, migration);
    format!("00-{trace}-{span}-01")
}

/// Adds a step of this node to a migration's trace: what it was, when it began and how long it took.
pub fn step(
    cluster: &str,
    migration: MigrationId,
    name: &'static str,
    node: &str,
    begun: SystemTime,
    took: Duration,
) {
    let Some(traces) = TRACES.get() else { return };
    let (trace, span) = ids(cluster, migration);
    let root = SpanContext::new(trace, span, TraceFlags::SAMPLED, true, TraceState::NONE);
    let tracer = traces.tracer("clusterd");
    let builder = tracer
        .span_builder(name)
        .with_start_time(begun)
        .with_attributes([KeyValue::new("node", node.to_owned())]);
    let mut span =
        tracer.build_with_context(builder, &Context::new().with_remote_span_context(root));
    span.end_with_timestamp(begun + took);
}

/// A migration is through: its figures go to the metrics, and the root and the parts of its blackout to
/// its trace. Called by the destination `node`.
pub fn migration_ended(
    cluster: &str,
    node: &str,
    migration: &Migration,
    summary: &MigrationSummary,
    running_at: SystemTime,
) {
    tracing::info!(
        migration = %migration.id,
        total_ms = summary.total_us / 1_000,
        blackout_us = summary.blackout_us,
        parts = ?summary.parts,
        "migrated"
    );
    measure(summary);
    if TRACES.get().is_none() {
        return;
    }
    let mut at = running_at - Duration::from_micros(summary.blackout_us);
    for part in &summary.parts {
        let took = Duration::from_micros(part.us);
        step(cluster, migration.id, part_name(&part.name), node, at, took);
        at += took;
    }
    root(cluster, migration, summary, running_at);
}

/// Span names are of the program, not of the data.
fn part_name(name: &str) -> &'static str {
    match name {
        "drain" => "blackout: drain",
        "last copy" => "blackout: last copy",
        "claim" => "blackout: claim",
        "commit" => "blackout: commit",
        "resume" => "blackout: resume",
        _ => "blackout: other",
    }
}

fn root(cluster: &str, migration: &Migration, summary: &MigrationSummary, ended_at: SystemTime) {
    let Some(traces) = TRACES.get() else { return };
    let started_at = SystemTime::UNIX_EPOCH + Duration::from_millis(migration.started_at_ms);
    let tracer = traces.tracer("clusterd");
    let attributes = [
        KeyValue::new("migration", migration.id.to_string()),
        KeyValue::new("vm", migration.vm.to_string()),
        KeyValue::new("from", migration.from.to_string()),
        KeyValue::new("to", migration.to.to_string()),
        KeyValue::new("sent_bytes", summary.sent_bytes.cast_signed()),
        KeyValue::new("blackout_us", summary.blackout_us.cast_signed()),
    ];
    let builder = tracer
        .span_builder("migration")
        .with_start_time(started_at.min(ended_at))
        .with_attributes(attributes);
    let plan = |ids| *PLANNED.lock().unwrap_or_else(PoisonError::into_inner) = ids;
    // A step that another thread adds meanwhile would get the root's id: its span would be lost, no more.
    plan(Some(ids(cluster, migration.id)));
    let mut span = tracer.build_with_context(builder, &Context::new());
    plan(None);
    span.end_with_timestamp(ended_at);
}

fn measure(summary: &MigrationSummary) {
    metrics::counter!("clusterd_migration_completed_total").increment(1);
    metrics::counter!("clusterd_migration_bytes_total").increment(summary.sent_bytes);
    metrics::histogram!("clusterd_migration_passes").record(summary.rounds.len() as f64);
    if summary.blackout_us == 0 {
        return;
    }
    let seconds = |us: u64| us as f64 / 1e6;
    metrics::histogram!("clusterd_migration_duration_seconds").record(seconds(summary.total_us));
    let blackout = |part: String, us: u64| {
        metrics::histogram!("clusterd_migration_blackout_seconds", "part" => part)
            .record(seconds(us));
    };
    blackout("all".to_owned(), summary.blackout_us);
    for part in &summary.parts {
        blackout(part.name.clone(), part.us);
    }
    if summary.predicted_blackout_us > 0 {
        let predicted = summary.predicted_blackout_us as f64;
        let error = (summary.blackout_us as f64 - predicted).abs() / predicted;
        metrics::histogram!("clusterd_migration_prediction_error_ratio").record(error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_nodes_derive_the_same_trace_and_another_migration_another_one() {
        let (trace, span) = ids("c1", MigrationId(7));
        assert_eq!(ids("c1", MigrationId(7)), (trace, span));
        assert_ne!(ids("c1", MigrationId(8)).0, trace);
        assert_ne!(ids("c2", MigrationId(7)).0, trace);
        assert_ne!(trace, TraceId::INVALID);
        assert_ne!(span, SpanId::INVALID);
    }
}
