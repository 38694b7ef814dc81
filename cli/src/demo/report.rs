//! What the demo found, as one JSON object and as a screen.

use proto::admin::{MigrationView, VmView};
use serde::Serialize;

use crate::output;

/// Everything.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub migrations: Vec<Migration>,
    pub drain: Option<Drain>,
    pub failover: Option<Failover>,
    pub tenures: Vec<Tenure>,
    pub ok: bool,
}

/// One live migration.
#[derive(Debug, Serialize)]
pub struct Migration {
    pub id: String,
    pub vm: String,
    pub from: String,
    pub to: String,
    pub total_ms: f64,
    pub blackout_ms: f64,
    /// In their order; a JSON object.
    #[serde(serialize_with = "as_object")]
    pub parts: Vec<(String, f64)>,
    pub cutover_index: u64,
    pub token_before: u32,
    pub token_after: u32,
    pub sent_bytes: u64,
    pub verified: bool,
}

/// Writes pairs as an object, in their order.
fn as_object<S: serde::Serializer>(
    parts: &[(String, f64)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(parts.iter().map(|(name, ms)| (name, ms)))
}

/// The drain.
#[derive(Debug, Serialize)]
pub struct Drain {
    pub node: String,
    pub state: String,
    pub moved: u32,
    pub total_ms: u64,
    pub longest_blackout_ms: f64,
}

/// The failover.
#[derive(Debug, Serialize)]
pub struct Failover {
    pub node: String,
    pub detected_ms: u64,
    pub running_ms: u64,
    pub machines: Vec<Restarted>,
}

/// A machine that was restarted.
#[derive(Debug, Serialize)]
pub struct Restarted {
    pub vm: String,
    pub to: String,
    /// The highest block number that its guest had flushed.
    pub promised: u64,
    /// What it found when it booted again.
    pub found: u64,
    pub verified: bool,
}

/// Who wrote a disk, under which token.
#[derive(Debug, Serialize)]
pub struct Tenure {
    pub vm: String,
    pub disks: Vec<String>,
    pub token: u32,
    pub node: String,
    pub how: String,
}

impl Migration {
    pub fn of(view: &MigrationView, verified: bool) -> Migration {
        Migration {
            id: view.id.clone(),
            vm: view.vm.clone(),
            from: view.from.clone(),
            to: view.to.clone(),
            total_ms: view.total_us as f64 / 1e3,
            blackout_ms: view.blackout_us as f64 / 1e3,
            parts: view
                .parts
                .iter()
                .map(|part| (part.name.clone(), part.us as f64 / 1e3))
                .collect(),
            cutover_index: view.cutover_index,
            token_before: view.token_before,
            token_after: view.token_after,
            sent_bytes: view.sent_bytes,
            verified,
        }
    }
}

impl Tenure {
    pub fn of(vm: &VmView, how: &str) -> Tenure {
        Tenure {
            vm: vm.name.clone(),
            disks: vm
                .disks
                .iter()
                .map(|disk| format!("{}:{}", disk.volume, disk.path))
                .collect(),
            token: vm.token,
            node: vm.node.clone(),
            how: how.to_owned(),
        }
    }
}

impl Report {
    /// Decides whether all went well: every migration and restart verified by its guest, the drain whole.
    pub fn conclude(&mut self) {
        let migrated = !self.migrations.is_empty()
            && self.migrations.iter().all(|migration| migration.verified);
        let drained = self
            .drain
            .as_ref()
            .is_some_and(|drain| drain.state == "drained");
        let restarted = self.failover.as_ref().is_some_and(|failover| {
            !failover.machines.is_empty()
                && failover.machines.iter().all(|machine| machine.verified)
        });
        self.ok = migrated && drained && restarted;
    }

    /// The summary for people.
    pub fn screen(&self) -> String {
        let mut lines = vec![String::new(), "Summary".to_owned()];
        let rows = self
            .migrations
            .iter()
            .map(|m| {
                let parts: Vec<String> = m
                    .parts
                    .iter()
                    .map(|(name, ms)| format!("{name} {ms:.1}"))
                    .collect();
                vec![
                    m.vm.clone(),
                    format!("{} → {}", m.from, m.to),
                    format!("{:.0} ms", m.total_ms),
                    format!("{:.1} ms", m.blackout_ms),
                    parts.join(" + "),
                    format!("#{}", m.cutover_index),
                    format!("t{} → t{}", m.token_before, m.token_after),
                    if m.verified {
                        "✔".into()
                    } else {
                        "✘".into()
                    },
                ]
            })
            .collect();
        lines.push(output::table_string(
            &[
                "MIGRATION",
                "MOVE",
                "TOTAL",
                "BLACKOUT",
                "= PARTS (ms)",
                "CUTOVER",
                "TOKEN",
                "GUEST",
            ],
            rows,
        ));
        lines.push(String::new());
        let rows = self
            .tenures
            .iter()
            .map(|t| {
                vec![
                    t.vm.clone(),
                    format!("t{}", t.token),
                    t.node.clone(),
                    t.disks.join(" "),
                    t.how.clone(),
                ]
            })
            .collect();
        lines.push(output::table_string(
            &["VM", "TOKEN", "NODE", "WROTE", "SINCE"],
            rows,
        ));
        lines.push(String::new());
        if let Some(drain) = &self.drain {
            lines.push(format!(
                "drain     {} {}: {} in {}, longest blackout {:.1} ms",
                drain.node,
                drain.state,
                output::counted(drain.moved as u64, "machine"),
                output::millis(drain.total_ms),
                drain.longest_blackout_ms
            ));
        }
        if let Some(failover) = &self.failover {
            lines.push(format!(
                "failover  {} lost: detected after {}, {} running elsewhere after {}",
                failover.node,
                output::millis(failover.detected_ms),
                output::counted(failover.machines.len() as u64, "machine"),
                output::millis(failover.running_ms)
            ));
        }
        lines.push(if self.ok {
            "✔ every guest's own checks passed: no byte of memory or disk was lost".to_owned()
        } else {
            "✘ something was lost or did not finish; see above".to_owned()
        });
        lines.join("\n")
    }
}
