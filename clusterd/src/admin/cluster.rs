//! The cluster as a whole: make it, look at it, set it, its rules and its balance.

use std::collections::BTreeSet;

use cluster_model::{
    ClusterState, Command, Desired, Liveness, MigrationState, NodeRole, Rule, Settings, counted,
};
use proto::admin::{
    ClusterInitReply, ClusterInitRequest, ClusterStatusReply, ClusterStatusRequest, Done,
    RuleListReply, RuleListRequest, RuleSetRequest, SettingsGetRequest, SettingsReply,
    SettingsSetRequest, VersionReply, VersionRequest,
};
use serde_json::Value;
use tonic::Status;

use super::asker::Asker;
use super::error::invalid;
use super::service::{AdminService, asked, name, node_named, vm_named};

/// Alerts shown on the status screen at most.
const ALERTS_MAX: usize = 10;
/// The largest rule or settings patch accepted, bytes of JSON.
const JSON_BYTES_MAX: usize = 32 * 1024;

impl AdminService {
    pub(super) async fn version(
        &self,
        _: &Asker,
        _: VersionRequest,
    ) -> Result<VersionReply, Status> {
        Ok(VersionReply {
            version: env!("CARGO_PKG_VERSION").into(),
        })
    }

    pub(super) async fn cluster_init(
        &self,
        asker: &Asker,
        request: ClusterInitRequest,
    ) -> Result<ClusterInitReply, Status> {
        let change = asked(asker, request.change)?;
        let cluster_name = name(&request.name)?;
        let founded = self
            .backend
            .init_cluster(cluster_name, request.fast, &change.actor)
            .await?;
        Ok(ClusterInitReply {
            cluster_id: founded.cluster.id,
            node: self.backend.name(),
            recovery_key: founded.recovery_key.reveal(),
            access_token: founded.access_token.line(),
            ca_sha256: founded.access_token.ca_sha256,
        })
    }

    pub(super) async fn cluster_status(
        &self,
        _: &Asker,
        _: ClusterStatusRequest,
    ) -> Result<ClusterStatusReply, Status> {
        self.cluster_state()?;
        let quorum = self.backend.confirm().await.is_ok();
        let state = self.cluster_state()?;
        let raft = self.backend.raft().ok_or(super::BackendError::NoCluster)?;
        let cluster = state
            .cluster
            .clone()
            .ok_or(super::BackendError::NoCluster)?;
        let members = |voter: bool| -> Vec<String> {
            raft.members
                .iter()
                .filter(|(_, member)| member.voter == voter)
                .map(|(&id, member)| {
                    state
                        .nodes
                        .get(&id)
                        .map_or_else(|| member.name.clone(), |node| node.name.to_string())
                })
                .collect()
        };
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let working: Vec<_> = state
            .nodes
            .values()
            .filter(|node| node.role != NodeRole::Witness)
            .collect();
        let owned = || state.vms.values().filter(|vm| vm.ownership.owner.is_some());
        let migrations = |active: bool| {
            count(
                state
                    .migrations
                    .values()
                    .filter(|migration| {
                        if active {
                            migration.is_active()
                        } else {
                            migration.state == MigrationState::Queued
                        }
                    })
                    .count(),
            )
        };
        let tolerates = votes_tolerate_one_loss(&members(true), &state)
            .and_then(|()| cluster_model::admission::tolerates_one_loss(&state));
        let mut alerts: Vec<String> = Vec::new();
        for node in state
            .nodes
            .values()
            .filter(|node| matches!(node.liveness, Liveness::Lost | Liveness::Quarantined))
        {
            alerts.push(format!(
                "node {} is {}",
                node.name,
                super::views::node_state(node, false)
            ));
        }
        for vm in state.vms.values() {
            if let Some(reason) = &vm.held {
                alerts.push(format!("machine {} is held: {reason}", vm.name));
            } else if vm.desired == Desired::Running && vm.ownership.owner.is_none() {
                alerts.push(format!(
                    "machine {} waits for a node that can take it: clusterctl why vm/{}",
                    vm.name, vm.name
                ));
            }
        }
        if let Some(why) = self.backend.soft().await.unknown {
            // First: what is shown of nodes and machines is only the log's half.
            alerts.insert(0, format!("what nodes report is not known: {why}"));
        }
        alerts.truncate(ALERTS_MAX);
        Ok(ClusterStatusReply {
            cluster_id: cluster.id,
            name: cluster.name.to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
            node: self.backend.name(),
            quorum,
            leader: raft
                .leadership
                .leader
                .map(|leader| state.node_label(leader))
                .unwrap_or_default(),
            term: raft.leadership.term,
            applied_index: raft.applied.unwrap_or(0),
            commit_index: raft.committed.unwrap_or(0),
            voters: members(true),
            learners: members(false),
            nodes_up: count(
                state
                    .nodes
                    .values()
                    .filter(|node| node.liveness == Liveness::Up)
                    .count(),
            ),
            nodes_all: count(state.nodes.len()),
            vms_running: count(owned().filter(|vm| vm.ownership.activated).count()),
            vms_all: count(state.vms.len()),
            volumes: count(state.volumes.len()),
            leases_held: count(owned().map(|vm| vm.spec.disks.len()).sum()),
            migrations_active: migrations(true),
            migrations_queued: migrations(false),
            memory_mib: working.iter().map(|node| node.facts.memory_mib).sum(),
            memory_committed_mib: working
                .iter()
                .map(|node| state.memory_committed_mib(node.id))
                .sum(),
            cpus: working.iter().map(|node| node.facts.cpus).sum(),
            vcpus_committed: owned().map(|vm| vm.spec.vcpus).sum(),
            token_last: state.token_last.0,
            alerts,
            tolerates_one_loss: tolerates.is_ok(),
            tolerates_why_not: tolerates.err().unwrap_or_default(),
        })
    }

    pub(super) async fn settings_get(
        &self,
        _: &Asker,
        _: SettingsGetRequest,
    ) -> Result<SettingsReply, Status> {
        settings_reply(&self.cluster_state()?.settings)
    }

    pub(super) async fn settings_set(
        &self,
        asker: &Asker,
        request: SettingsSetRequest,
    ) -> Result<SettingsReply, Status> {
        let change = asked(asker, request.change)?;
        if request.patch_json.len() > JSON_BYTES_MAX {
            return Err(invalid(format!(
                "the settings are over {JSON_BYTES_MAX} bytes"
            )));
        }
        let patch: Value = serde_json::from_str(&request.patch_json)
            .map_err(|error| invalid(format!("the settings are malformed: {error}")))?;
        let patch = patch
            .as_object()
            .ok_or_else(|| invalid("settings are a JSON object"))?;
        let state = self.cluster_state()?;
        let mut all = serde_json::to_value(&state.settings)
            .map_err(|error| Status::internal(error.to_string()))?;
        for (setting, value) in patch {
            let Some(place) = all.get_mut(setting) else {
                let known: Vec<&str> = all
                    .as_object()
                    .into_iter()
                    .flatten()
                    .map(|(name, _)| name.as_str())
                    .collect();
                return Err(invalid(format!(
                    "there is no setting `{setting}`; there are: {}",
                    known.join(", ")
                )));
            };
            *place = value.clone();
        }
        let settings: Settings = serde_json::from_value(all)
            .map_err(|error| invalid(format!("a setting has the wrong kind of value: {error}")))?;
        self.propose(&change, Command::SetSettings { settings })
            .await?;
        settings_reply(&self.cluster_state()?.settings)
    }

    pub(super) async fn rule_set(
        &self,
        asker: &Asker,
        request: RuleSetRequest,
    ) -> Result<Done, Status> {
        let change = asked(asker, request.change)?;
        let rule_name = name(&request.name)?;
        if request.rule_json.len() > JSON_BYTES_MAX {
            return Err(invalid(format!("the rule is over {JSON_BYTES_MAX} bytes")));
        }
        let rule = match request.rule_json.as_str() {
            "" => None,
            text => Some(self.parse_rule(asker, text)?),
        };
        let (index, _) = self
            .propose(
                &change,
                Command::SetRule {
                    name: rule_name,
                    rule,
                },
            )
            .await?;
        Ok(Done { log_index: index.0 })
    }

    /// A rule as people write it, with names, into the log's, with numbers.
    fn parse_rule(&self, asker: &Asker, text: &str) -> Result<Rule, Status> {
        let state = self.cluster_state()?;
        let rule: Value = serde_json::from_str(text)
            .map_err(|error| invalid(format!("the rule is malformed: {error}")))?;
        let names = |field: &str| -> Vec<String> {
            rule.get(field)
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .filter_map(|name| name.as_str().map(str::to_owned))
                .collect()
        };
        let mut vms = BTreeSet::new();
        for vm in names("vms")
            .into_iter()
            .chain(rule.get("vm").and_then(Value::as_str).map(str::to_owned))
        {
            vms.insert(vm_named(asker, &state, &vm)?.id);
        }
        let mut nodes = BTreeSet::new();
        for node in names("nodes") {
            nodes.insert(node_named(&state, &node)?.id);
        }
        let one = || {
            vms.first()
                .copied()
                .ok_or_else(|| invalid("the rule names no machine: --vm NAME"))
        };
        let some_nodes = || {
            if nodes.is_empty() {
                Err(invalid("the rule names no node: --node NAME"))
            } else {
                Ok(nodes.clone())
            }
        };
        match rule.get("kind").and_then(Value::as_str) {
            Some(kind @ ("affinity" | "anti-affinity")) => {
                if vms.len() < 2 {
                    return Err(invalid(
                        "an affinity rule is about two machines or more: --vm a,b",
                    ));
                }
                Ok(if kind == "affinity" {
                    Rule::Affinity { vms }
                } else {
                    Rule::AntiAffinity { vms }
                })
            }
            Some("possible-owners") => Ok(Rule::PossibleOwners {
                vm: one()?,
                nodes: some_nodes()?,
            }),
            Some("preferred-owners") => Ok(Rule::PreferredOwners {
                vm: one()?,
                nodes: some_nodes()?,
            }),
            _ => Err(invalid(
                "kind: affinity, anti-affinity, possible-owners or preferred-owners",
            )),
        }
    }

    pub(super) async fn rule_list(
        &self,
        _: &Asker,
        _: RuleListRequest,
    ) -> Result<RuleListReply, Status> {
        let state = self.cluster_state()?;
        let vm_names = |vms: &BTreeSet<_>| {
            vms.iter()
                .map(|&vm| state.vm_label(vm))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let node_names = |nodes: &BTreeSet<_>| {
            nodes
                .iter()
                .map(|&node| state.node_label(node))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let rules = state
            .rules
            .iter()
            .map(|(name, rule)| {
                let words = match rule {
                    Rule::Affinity { vms } => format!("{} on one node", vm_names(vms)),
                    Rule::AntiAffinity { vms } => {
                        format!("no two of {} on one node", vm_names(vms))
                    }
                    Rule::PossibleOwners { vm, nodes } => {
                        format!("{} only on {}", state.vm_label(*vm), node_names(nodes))
                    }
                    Rule::PreferredOwners { vm, nodes } => {
                        format!("{} rather on {}", state.vm_label(*vm), node_names(nodes))
                    }
                };
                (name.to_string(), words)
            })
            .collect();
        Ok(RuleListReply { rules })
    }
}

/// Whether a majority of the voters would still live after the loss of one more.
fn votes_tolerate_one_loss(voters: &[String], state: &ClusterState) -> Result<(), String> {
    let lost: Vec<&str> = voters
        .iter()
        .map(String::as_str)
        .filter(|voter| {
            state.nodes.values().any(|node| {
                node.name.as_str() == *voter
                    && matches!(node.liveness, Liveness::Lost | Liveness::Quarantined)
            })
        })
        .collect();
    let left = (voters.len() - lost.len()).saturating_sub(1);
    if left * 2 > voters.len() {
        return Ok(());
    }
    Err(if lost.is_empty() {
        format!(
            "{} cannot lose one and keep a majority; add nodes: clusterctl node add",
            counted(voters.len(), "voter")
        )
    } else {
        format!(
            "{} is lost already, and one more would leave no majority of {}",
            lost.join(", "),
            voters.join(" ")
        )
    })
}

fn settings_reply(settings: &Settings) -> Result<SettingsReply, Status> {
    let json =
        serde_json::to_string(settings).map_err(|error| Status::internal(error.to_string()))?;
    Ok(SettingsReply { json })
}
