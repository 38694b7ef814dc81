//! What views add to the log's records: the nodes' soft state, as their heartbeats told it.

use std::collections::BTreeMap;

use cluster_model::{NodeId, VmId};
use proto::monitor::MonitorStatus;

/// The soft state of every node that has spoken lately.
#[derive(Clone, Debug, Default)]
pub struct Soft {
    /// By node.
    pub nodes: BTreeMap<NodeId, SoftNode>,
    /// Why the leader's part of it is missing: then nothing is known of any other node.
    pub unknown: Option<String>,
}

/// One node's.
#[derive(Clone, Debug, Default)]
pub struct SoftNode {
    /// Its monitors as they last reported.
    pub monitors: Vec<MonitorStatus>,
    /// What is left of its lease, ms; unknown away from the leader.
    pub lease_left_ms: Option<i64>,
    /// The least time that was left at a renewal lately, ms.
    pub lease_slack_ms: Option<i64>,
    /// Processor load, 0 to 1 of what it offers.
    pub cpu_load: f64,
    /// It has missed renewals but is not counted as lost yet.
    pub isolated: bool,
}

impl Soft {
    /// The monitor of a machine on a node.
    pub fn monitor(&self, node: NodeId, vm: VmId) -> Option<&MonitorStatus> {
        self.nodes
            .get(&node)?
            .monitors
            .iter()
            .filter(|monitor| monitor.vm_id == vm.0)
            .max_by_key(|monitor| monitor.token)
    }
}
