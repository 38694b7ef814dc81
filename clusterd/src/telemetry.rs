//! Logs, and one trace for each migration.

use cluster_model::MigrationId;

use crate::agent::MigrationSummary;

/// What is logged unless `RUST_LOG` says otherwise: openraft warns at every message that a dead peer does not
/// take.
const DEFAULT_FILTER: &str = "info,openraft=error";

/// Sets up logging to stderr: for people, or as JSON with `BATON_LOG_FORMAT=json`; what is logged is said
/// by `RUST_LOG`.
pub fn init() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr);
    let json = std::env::var("BATON_LOG_FORMAT").is_ok_and(|format| format == "json");
    // A second subscriber of one process (tests) is refused; the first one stays.
    let _ = if json {
        builder.json().try_init()
    } else {
        builder.try_init()
    };
}

/// The trace that a migration belongs to, for the monitors; empty while tracing is off.
pub fn traceparent(_migration: MigrationId) -> String {
    String::new()
}

/// A migration is through: its figures go to metrics and its trace.
pub fn migration_ended(migration: MigrationId, summary: &MigrationSummary) {
    tracing::info!(
        %migration,
        total_ms = summary.total_us / 1_000,
        blackout_us = summary.blackout_us,
        parts = ?summary.parts,
        "migrated"
    );
    metrics::counter!("clusterd_migration_completed_total").increment(1);
    if summary.blackout_us > 0 {
        metrics::histogram!("clusterd_migration_duration_seconds")
            .record(summary.total_us as f64 / 1e6);
        let blackout = |part: String, us: u64| {
            metrics::histogram!("clusterd_migration_blackout_seconds", "part" => part)
                .record(us as f64 / 1e6);
        };
        blackout("all".to_owned(), summary.blackout_us);
        for part in &summary.parts {
            blackout(part.name.clone(), part.us);
        }
    }
    metrics::counter!("clusterd_migration_bytes_total").increment(summary.sent_bytes);
    metrics::histogram!("clusterd_migration_passes").record(summary.rounds.len() as f64);
}
