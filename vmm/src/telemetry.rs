//! What the monitor says of itself: a log on stderr, and traces where a collector is configured.

use std::collections::HashMap;
use std::time::Duration;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::spec::MachineFile;

/// Set to a collector's address, it turns traces on (OpenTelemetry's own variable).
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// `json` makes the log one JSON object a line.
const LOG_FORMAT: &str = "BATON_LOG_FORMAT";

/// How long the end of the process waits for others: a dead collector would hold it for seconds.
pub const GOODBYE_MAX: Duration = Duration::from_millis(300);

/// What is logged where neither the machine file nor the environment says.
const LOG_DEFAULT: &str = "info";

/// Keeps traces going until stopped.
#[derive(Debug)]
pub struct Telemetry {
    traces: Option<SdkTracerProvider>,
}

/// Whether traces go to a collector.
pub fn exports() -> bool {
    std::env::var_os(ENDPOINT).is_some()
}

/// Starts to log, and to trace if a collector is configured. Called once.
pub fn start(file: &MachineFile) -> Telemetry {
    let level = file.log.as_deref().unwrap_or(LOG_DEFAULT);
    let filter = EnvFilter::try_from_default_env().or_else(|_| EnvFilter::try_new(level));
    let filter = filter.unwrap_or_else(|_| EnvFilter::new(LOG_DEFAULT));
    let log = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_target(false);
    let log = if std::env::var(LOG_FORMAT).is_ok_and(|format| format == "json") {
        log.json().boxed()
    } else {
        log.boxed()
    };
    let traces = std::env::var_os(ENDPOINT).and_then(|_| exporter(file));
    let spans = traces.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("vmm"))
            .with_filter(EnvFilter::new(LOG_DEFAULT))
    });
    tracing_subscriber::registry()
        .with(log.with_filter(filter))
        .with(spans)
        .init();
    Telemetry { traces }
}

/// Puts a span under the one that a W3C `traceparent` names (W3C Trace Context, section 3.2). One that is
/// empty or malformed changes nothing.
pub fn lies_under(span: &tracing::Span, traceparent: &str) {
    if traceparent.is_empty() {
        return;
    }
    let carrier = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
    let parent = TraceContextPropagator::new().extract(&carrier);
    if let Err(error) = span.set_parent(parent) {
        tracing::debug!(%error, "a span of its own");
    }
}

fn exporter(file: &MachineFile) -> Option<SdkTracerProvider> {
    let exporter = match opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .build()
    {
        Ok(exporter) => exporter,
        Err(error) => {
            // Logging has not begun, and stderr is where it goes.
            eprintln!("vmm: no traces: {error}");
            return None;
        }
    };
    let resource = Resource::builder()
        .with_service_name("vmm")
        .with_attribute(opentelemetry::KeyValue::new(
            "vm.name",
            file.vm_name.clone(),
        ))
        .with_attribute(opentelemetry::KeyValue::new(
            "node.id",
            file.node_id.0.to_string(),
        ))
        .build();
    Some(
        SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource)
            .build(),
    )
}

impl Telemetry {
    /// Sends what is left, for a moment at most.
    pub fn stop(self) {
        let Some(traces) = self.traces else {
            return;
        };
        if let Err(error) = traces.shutdown_with_timeout(GOODBYE_MAX) {
            tracing::debug!(%error, "the last traces are lost");
        }
    }
}
