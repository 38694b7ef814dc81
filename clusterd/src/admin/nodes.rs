//! Nodes: who is there, letting them in and out, emptying them.

use std::collections::BTreeSet;

use cluster_model::fleet::{Count, Fleet, Observed};
use cluster_model::{
    ClusterState, Command, Duty, MigrationCause, MigrationState, NodeId, Vm, Why, failback,
    placement,
};
use proto::admin::{
    DrainMove, DrainStatus, NodeCheckReply, NodeCheckRequest, NodeDrainStatusRequest,
    NodeListReply, NodeListRequest, NodeRemoveRequest, NodeUncordonReply, NodeUncordonRequest,
};
use tonic::Status;

use super::asker::Asker;
use super::plans::planned;
use super::predict::Basis;
use super::service::{AdminService, asked, node_named};
use super::views;

impl AdminService {
    pub(super) async fn node_list(
        &self,
        _: &Asker,
        _: NodeListRequest,
    ) -> Result<NodeListReply, Status> {
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
        asker: &Asker,
        request: NodeCheckRequest,
    ) -> Result<NodeCheckReply, Status> {
        let state = self.cluster_state()?;
        let named = if request.node.is_empty() {
            self.backend.name()
        } else {
            request.node
        };
        let node = node_named(&state, &named)?.id;
        let mut reply = self.backend.node_check(asker, node).await?;
        reply.monitors.retain(|monitor| {
            let vm = state.vms.values().find(|vm| vm.name.as_str() == monitor.vm);
            asker.sees_what_is_of(vm)
        });
        Ok(reply)
    }

    pub(super) async fn node_remove(
        &self,
        asker: &Asker,
        request: NodeRemoveRequest,
    ) -> Result<proto::admin::Done, Status> {
        let change = asked(asker, request.change)?;
        let node = node_named(&*self.cluster_state()?, &request.node)?.id;
        let (index, _) = self.propose(&change, Command::RemoveNode { node }).await?;
        Ok(proto::admin::Done { log_index: index.0 })
    }

    pub(super) async fn node_drain_status(
        &self,
        _: &Asker,
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
        asker: &Asker,
        request: NodeUncordonRequest,
    ) -> Result<NodeUncordonReply, Status> {
        let change = asked(asker, request.change)?;
        let state = self.cluster_state()?;
        let node = node_named(&state, &request.node)?.clone();
        // Known before anything is changed: what is shown below is what the leader is going to do.
        let observed = match request.failback {
            true => self.backend.observed().await?,
            false => Observed::default(),
        };
        let command = Command::Uncordon {
            node: node.id,
            failback: request.failback,
        };
        self.propose(&change, command).await?;
        let state = self.state();
        let rate = Basis::of(&state, None).bytes_s();
        let failback = failback::plan(&state, node.id, &observed, rate)
            .iter()
            .filter_map(|machine| planned(&state, machine.vm, &machine.step))
            .collect();
        Ok(NodeUncordonReply { failback })
    }
}

/// The best node for a machine to move to, and why; or every node's refusal in words.
pub(super) fn choose(
    state: &ClusterState,
    vm: &Vm,
    from: NodeId,
    observed: &Observed,
) -> Result<(NodeId, Why), String> {
    let fleet = Fleet::new(state, observed, Count::Open);
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
