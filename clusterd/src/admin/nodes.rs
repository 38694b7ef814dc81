//! Nodes: who is there, letting them in and out, emptying them.

use std::collections::BTreeSet;

use cluster_model::fleet::{Count, Fleet, NodeLoad, Observed};
use cluster_model::placement;
use cluster_model::{
    ClusterState, Command, Duty, MigrationCause, MigrationOptions, MigrationState, NodeId, Vm, Why,
};
use proto::admin::{
    DrainMove, DrainStatus, NodeCheckReply, NodeCheckRequest, NodeDrainStatusRequest,
    NodeListReply, NodeListRequest, NodeRemoveRequest, NodeUncordonReply, NodeUncordonRequest,
};
use tonic::Status;

use super::asker::{is_narrowed, sees};
use super::predict::Basis;
use super::service::{AdminService, asked, node_named};
use super::views;

impl AdminService {
    /// What the planners want to know besides the log.
    pub(super) async fn loads(&self) -> Observed {
        let soft = self.backend.soft().await;
        let nodes = soft
            .nodes
            .iter()
            .map(|(&node, known)| {
                let load = NodeLoad {
                    // A share of 1000; a load beyond what is offered is still only full.
                    cpu_permille: (known.cpu_load.clamp(0.0, 1.0) * 1_000.0) as u16,
                    ..NodeLoad::default()
                };
                (node, load)
            })
            .collect();
        Observed {
            nodes,
            ..Observed::default()
        }
    }

    pub(super) async fn node_list(&self, _: NodeListRequest) -> Result<NodeListReply, Status> {
        let state = self.cluster_state()?;
        let soft = self.backend.soft().await;
        let leader = self.backend.raft().and_then(|raft| raft.leadership.leader);
        let nodes = state
            .nodes
            .values()
            .map(|node| views::node(&state, &soft, leader, node))
            .collect();
        Ok(NodeListReply { nodes })
    }

    pub(super) async fn node_check(
        &self,
        request: NodeCheckRequest,
    ) -> Result<NodeCheckReply, Status> {
        let state = self.cluster_state()?;
        let named = if request.node.is_empty() {
            self.backend.name()
        } else {
            request.node
        };
        let node = node_named(&state, &named)?.id;
        let mut reply = self.backend.node_check(node).await?;
        if is_narrowed() {
            reply.monitors.retain(|monitor| {
                let vm = state.vms.values().find(|vm| vm.name.as_str() == monitor.vm);
                vm.is_some_and(sees)
            });
        }
        Ok(reply)
    }

    pub(super) async fn node_remove(
        &self,
        request: NodeRemoveRequest,
    ) -> Result<proto::admin::Done, Status> {
        let change = asked(request.change)?;
        let node = node_named(&*self.cluster_state()?, &request.node)?.id;
        let (index, _) = self.propose(&change, Command::RemoveNode { node }).await?;
        Ok(proto::admin::Done { log_index: index.0 })
    }

    pub(super) async fn node_drain_status(
        &self,
        request: NodeDrainStatusRequest,
    ) -> Result<DrainStatus, Status> {
        let state = self.cluster_state()?;
        let node = node_named(&state, &request.node)?;
        let mut status = DrainStatus {
            node: node.name.to_string(),
            ..DrainStatus::default()
        };
        let Some(drain) = state.drains.get(&node.id) else {
            status.state = "not-draining".into();
            return Ok(status);
        };
        let soft = self.backend.soft().await;
        let left: Vec<&Vm> = state.owned_by(node.id).collect();
        status.state = match (node.duty, drain.ended_at_ms) {
            (Duty::Drained, _) => "drained",
            (_, 0) => "draining",
            _ => "incomplete",
        }
        .into();
        status.machines = u32::try_from(drain.machines.len()).unwrap_or(u32::MAX);
        let gone = drain
            .machines
            .iter()
            .filter(|vm| !left.iter().any(|left| left.id == **vm))
            .count();
        status.gone = u32::try_from(gone).unwrap_or(u32::MAX);
        let now_ms = if drain.ended_at_ms == 0 {
            self.backend.wall_ms()
        } else {
            drain.ended_at_ms
        };
        status.elapsed_ms = now_ms.saturating_sub(drain.started_at_ms);
        for vm in left {
            match state.open_migration(vm.id) {
                Some(migration) if migration.is_active() => {
                    status
                        .moving
                        .push(views::migration(&state, &soft, migration));
                }
                _ if drain.stuck.contains_key(&vm.id) => status.stuck.push(DrainMove {
                    vm: vm.name.to_string(),
                    how: "none".into(),
                    why: drain.stuck[&vm.id].clone(),
                    ..DrainMove::default()
                }),
                _ => status.waiting.push(vm.name.to_string()),
            }
        }
        status.longest_blackout_us = state
            .migrations
            .values()
            .filter(|migration| {
                migration.cause == MigrationCause::Drain(node.id)
                    && migration.queued_at_ms >= drain.started_at_ms
                    && matches!(migration.state, MigrationState::CutOver { .. })
            })
            .map(|migration| views::migration(&state, &soft, migration).blackout_us)
            .max()
            .unwrap_or(0);
        Ok(status)
    }

    pub(super) async fn node_uncordon(
        &self,
        request: NodeUncordonRequest,
    ) -> Result<NodeUncordonReply, Status> {
        let change = asked(request.change)?;
        let state = self.cluster_state()?;
        let node = node_named(&state, &request.node)?.clone();
        // Read before the entry that forgets the drain.
        let machines = state
            .drains
            .get(&node.id)
            .map(|drain| drain.machines.clone())
            .unwrap_or_default();
        self.propose(&change, Command::Uncordon { node: node.id })
            .await?;
        let mut failback = Vec::new();
        if request.failback {
            let state = self.state();
            let away = machines
                .iter()
                .filter_map(|vm| state.vms.get(vm))
                .filter(|vm| {
                    vm.ownership.owner.is_some_and(|owner| owner != node.id)
                        && vm.desired == cluster_model::Desired::Running
                });
            for vm in away {
                let command = Command::QueueMigration {
                    vm: vm.id,
                    to: node.id,
                    options: MigrationOptions::default(),
                    cause: MigrationCause::Failback(node.id),
                    why: Why::rule("it was here before the drain"),
                };
                let asked_for = self
                    .propose_part(&change, &format!("failback/{}", vm.id), command)
                    .await;
                failback.push(DrainMove {
                    vm: vm.name.to_string(),
                    how: if asked_for.is_ok() { "live" } else { "none" }.into(),
                    to: node.name.to_string(),
                    predicted_ms: Basis::of(&state, Some(vm.id)).predicted_ms(vm.spec.memory_mib),
                    predicted_blackout_ms: views::downtime_max_ms(&state, vm),
                    why: match asked_for {
                        Ok(_) => "it was here before the drain".into(),
                        Err(status) => status.message().to_owned(),
                    },
                });
            }
        }
        Ok(NodeUncordonReply { failback })
    }
}

/// The best node for a machine to move to, and why; or every node's refusal in words.
pub(super) fn choose(
    state: &ClusterState,
    vm: &Vm,
    from: NodeId,
    loads: &Observed,
) -> Result<(NodeId, Why), String> {
    let fleet = Fleet::new(state, loads, Count::Open);
    match placement::best_node_in(&fleet, vm, &BTreeSet::from([from])) {
        Ok(choice) => Ok((
            choice.node,
            choice.why("the best other node with room", &fleet),
        )),
        Err(nowhere) if nowhere.considered.is_empty() => {
            Err("there is no other node; add one: clusterctl node add NAME".into())
        }
        Err(nowhere) => Err(nowhere
            .considered
            .iter()
            .map(|(_, rejection)| rejection.in_words(state))
            .collect::<Vec<_>>()
            .join("; ")),
    }
}
