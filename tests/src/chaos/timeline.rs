//! What was done when: one JSON object a line, in the cluster's folder, for whoever looks for a cause.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

/// The run's timeline; counts what it writes by kind.
pub struct Timeline {
    inner: Mutex<Inner>,
}

struct Inner {
    file: File,
    counts: BTreeMap<String, u64>,
}

impl Timeline {
    /// Begins one in `folder`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(folder: &Path) -> std::io::Result<Timeline> {
        let file = File::create(folder.join("timeline.jsonl"))?;
        Ok(Timeline {
            inner: Mutex::new(Inner {
                file,
                counts: BTreeMap::new(),
            }),
        })
    }

    /// Notes something.
    pub fn note(&self, kind: &str, detail: impl std::fmt::Display) {
        let at_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis() as u64);
        let line = json!({ "at_ms": at_ms, "kind": kind, "detail": detail.to_string() });
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        *inner.counts.entry(kind.to_owned()).or_default() += 1;
        if let Err(error) = writeln!(inner.file, "{line}") {
            eprintln!("the timeline cannot be written: {error}");
        }
    }

    /// How often each kind was noted.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.counts.clone()
    }
}
