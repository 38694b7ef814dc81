//! What a node says of itself with every heartbeat, and what the leader makes of it. Soft state: it is in
//! nobody's log, and nothing that matters rests on it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cluster_model::fleet::Reported;
use cluster_model::trust::Sha256;
use cluster_model::{ClusterState, Name, NodeId, Observed, VmId};
use proto::monitor::MonitorStatus;
use serde::{Deserialize, Serialize};

use crate::member::Member;

/// Processor use is averaged over at least this long.
const CPU_WINDOW_NS: u64 = 1_000_000_000;

/// One node's report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeReport {
    /// When the leader got it, ns of the leader's boot time.
    pub received_ns: u64,
    /// How long ago that was when the leader told it on, ms: clocks of two hosts are never compared.
    pub age_ms: u64,
    /// The time that was left of the lease at its last renewal, ms.
    pub lease_slack_ms: Option<u64>,
    /// The lease's time left when the report was made, ms.
    pub lease_left_ms: u64,
    /// Processor time its machines use, thousandths of what the node offers.
    pub cpu_permille: u16,
    /// Volumes that it does not reach at the moment.
    pub volumes_down: BTreeSet<Name>,
    /// Processor time that each machine uses, thousandths of one processor.
    pub vm_cpu_milli: BTreeMap<VmId, u32>,
    /// Its monitors.
    pub monitors: Vec<MonitorStatus>,
    /// How far its trust is.
    pub trust: TrustReport,
}

/// How far a node has followed a rotation of the certificate authority.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrustReport {
    /// Of the issuing CA that made its certificate.
    pub generation: u64,
    /// The fingerprint of the newest root that it believes.
    pub newest_root: Option<Sha256>,
}

/// Every node's last report, as the leader has them.
pub type Reports = Arc<BTreeMap<NodeId, NodeReport>>;

/// The reports with their ages at `now_ns` of the leader's boot time.
pub fn aged(reports: &Reports, now_ns: u64) -> Reports {
    let mut aged = Reports::clone(reports);
    for report in Arc::make_mut(&mut aged).values_mut() {
        report.age_ms = now_ns.saturating_sub(report.received_ns) / 1_000_000;
    }
    aged
}

/// What the planners are fed with; only the leader, who has the reports, makes it.
pub fn observed(state: &ClusterState, reports: &Reports) -> Observed {
    let reported = reports.iter().map(|(node, report)| {
        let report = Reported {
            cpu_permille: report.cpu_permille,
            volumes_down: &report.volumes_down,
            vm_cpu_milli: &report.vm_cpu_milli,
        };
        (*node, report)
    });
    Observed::of(state, reported)
}

/// Makes a node's reports; remembers processor counters between them.
#[derive(Debug, Default)]
pub struct Reporter {
    counted_at_ns: u64,
    cpu_ns: BTreeMap<u64, u64>,
    milli: BTreeMap<VmId, u32>,
}

impl Reporter {
    /// The report at this moment.
    pub fn report(&mut self, member: &Member) -> NodeReport {
        let table = member.monitors.table().borrow().clone();
        let now_ns = member.clock.monotonic_ns();
        if now_ns.saturating_sub(self.counted_at_ns) >= CPU_WINDOW_NS {
            self.count(now_ns, &table);
        }
        let used: u64 = self.milli.values().map(|&milli| u64::from(milli)).sum();
        let permille = used / u64::from(member.config.cpus.max(1));
        let lease = *member.lease.borrow();
        let left_ns = lease.deadline_ns.saturating_sub(member.clock.boottime_ns());
        NodeReport {
            received_ns: 0,
            age_ms: 0,
            lease_slack_ms: lease.slack_ms,
            lease_left_ms: left_ns / 1_000_000,
            cpu_permille: u16::try_from(permille).unwrap_or(u16::MAX),
            volumes_down: member.volumes_down.borrow().clone(),
            vm_cpu_milli: self.milli.clone(),
            monitors: table
                .values()
                .map(|monitor| (*monitor.status).clone())
                .collect(),
            trust: TrustReport {
                generation: member.keeper.papers().map_or(0, |papers| papers.generation),
                newest_root: crate::trust::newest_root_believed(member),
            },
        }
    }

    fn count(&mut self, now_ns: u64, table: &crate::monitors::Table) {
        let passed_ns = now_ns.saturating_sub(self.counted_at_ns).max(1);
        let mut counters = BTreeMap::new();
        self.milli.clear();
        for (&nonce, monitor) in table.iter() {
            let Some(usage) = &monitor.status.usage else {
                continue;
            };
            counters.insert(nonce, usage.cpu_ns);
            if let Some(before) = self.cpu_ns.get(&nonce) {
                let spent = usage.cpu_ns.saturating_sub(*before);
                let milli = u128::from(spent) * 1_000 / u128::from(passed_ns);
                self.milli
                    .insert(monitor.vm(), u32::try_from(milli).unwrap_or(u32::MAX));
            }
        }
        self.cpu_ns = counters;
        self.counted_at_ns = now_ns;
    }
}
