//! What happened and why, for `events` and `why`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{LogIndex, MigrationId, NodeId, VmId, VolumeId};

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Object {
    /// The cluster as a whole.
    Cluster,
    /// A node.
    Node(NodeId),
    /// A machine.
    Vm(VmId),
    /// A volume.
    Volume(VolumeId),
    /// A migration.
    Migration(MigrationId),
}

/// How much an event matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// In the ordinary course of things.
    Info,
    /// Somebody should look.
    Warn,
    /// Something was lost or is down.
    Error,
}

/// `1 machine`, `3 machines`.
pub fn counted(count: usize, noun: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {noun}{plural}")
}

/// Why an automatic act was taken: the rule, and what the rule was fed with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    /// The rule's name and meaning in a sentence.
    pub rule: String,
    /// What it saw.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inputs: BTreeMap<String, String>,
}

impl Why {
    /// A reason with no inputs.
    pub fn rule(rule: impl Into<String>) -> Why {
        Why {
            rule: rule.into(),
            inputs: BTreeMap::new(),
        }
    }

    /// Adds one thing that the rule saw.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl ToString) -> Why {
        self.inputs.insert(name.to_owned(), value.to_string());
        self
    }
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The entry that did it.
    pub index: LogIndex,
    /// Several events of one entry are told apart by this.
    pub sequence: u32,
    /// When the proposer proposed it.
    pub at_ms: u64,
    /// Who: a person, or `node/n1`, or a controller.
    pub actor: String,
    /// How much it matters.
    pub severity: Severity,
    /// What it is about, most specific first.
    pub objects: Vec<Object>,
    /// A stable kind, e.g. `migration.cut-over`.
    pub kind: String,
    /// In words.
    pub detail: String,
    /// The rule and its inputs, for automatic acts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<Why>,
}
