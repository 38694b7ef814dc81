//! Plans made on request: emptying a node, evening out load.

use cluster_model::drain::{self, Step};
use cluster_model::{
    BalanceLevel, ClusterState, Command, MigrationOptions, Vm, VmId, balance, counted,
};
use proto::admin::{
    BalanceMove, BalancePlan, BalanceRunRequest, BalanceStatusRequest, DrainMove, DrainPlan,
    NodeDrainRequest,
};
use tonic::Status;

use super::asker::Asker;
use super::error::rejected;
use super::predict::Basis;
use super::service::{AdminService, asked, node_named};

/// Machines named in a plan's left-alone list at most.
const LEFT_ALONE_MAX: usize = 10;

impl AdminService {
    pub(super) async fn node_drain(
        &self,
        asker: &Asker,
        request: NodeDrainRequest,
    ) -> Result<DrainPlan, Status> {
        let change = asked(asker, request.change)?;
        let observed = self.backend.observed().await?;
        let state = self.cluster_state()?;
        let node = node_named(&state, &request.node)?.clone();
        let basis = Basis::of(&state, None);
        let plan = drain::plan(&state, node.id, &observed, basis.bytes_s())
            .map_err(|rejection| rejected(&state, &rejection))?;
        let moves: Vec<DrainMove> = plan
            .machines
            .iter()
            .filter_map(|machine| planned(&state, machine.vm, &machine.step))
            .collect();
        let cannot_move = moves.iter().filter(|planned| planned.how == "none").count();
        let mut view = DrainPlan {
            node: node.name.to_string(),
            cannot_move: u32::try_from(cannot_move).unwrap_or(u32::MAX),
            moves,
            predicted_ms: plan.predicted_ms,
            started: false,
            predicted_from: basis.words(),
        };
        if !request.dry_run {
            self.propose(
                &change,
                Command::StartDrain {
                    node: node.id,
                    reason: change.reason.clone(),
                },
            )
            .await?;
            view.started = true;
        }
        Ok(view)
    }

    pub(super) async fn balance_status(
        &self,
        _: &Asker,
        _: BalanceStatusRequest,
    ) -> Result<BalancePlan, Status> {
        let observed = self.backend.observed().await?;
        let state = self.cluster_state()?;
        Ok(balance_view(
            &state,
            &balance::plan(&state, &observed, self.backend.wall_ms()),
        ))
    }

    pub(super) async fn balance_run(
        &self,
        asker: &Asker,
        request: BalanceRunRequest,
    ) -> Result<BalancePlan, Status> {
        let change = asked(asker, request.change)?;
        let observed = self.backend.observed().await?;
        let state = self.cluster_state()?;
        let plan = balance::plan(&state, &observed, self.backend.wall_ms());
        let mut view = balance_view(&state, &plan);
        if !request.dry_run {
            for planned in &plan.moves {
                self.propose_part(
                    &change,
                    &format!("balance/{}", planned.vm),
                    planned.command(),
                )
                .await?;
            }
            view.started = !plan.moves.is_empty();
        }
        Ok(view)
    }
}

/// A step of a plan, as it is shown; none for a machine that is gone.
pub(super) fn planned(state: &ClusterState, vm: VmId, step: &Step) -> Option<DrainMove> {
    let vm: &Vm = state.vms.get(&vm)?;
    let options = MigrationOptions::default().in_force(vm, &state.settings);
    let blackout = u64::from(options.downtime_max_ms);
    let base = DrainMove {
        vm: vm.name.to_string(),
        ..DrainMove::default()
    };
    Some(match step {
        Step::Move {
            to,
            predicted_ms,
            why,
            ..
        } => DrainMove {
            how: "live".into(),
            to: state.node_label(*to),
            predicted_ms: *predicted_ms,
            predicted_blackout_ms: blackout,
            why: in_words(why),
            ..base
        },
        Step::Moving { to } => DrainMove {
            how: "live".into(),
            to: state.node_label(*to),
            predicted_ms: Basis::of(state, None).predicted_ms(vm.spec.memory_mib),
            predicted_blackout_ms: blackout,
            why: "on its way already".into(),
            ..base
        },
        Step::Later { reason } => DrainMove {
            how: "later".into(),
            why: reason.clone(),
            ..base
        },
        Step::Stays { reason } => DrainMove {
            how: "none".into(),
            why: reason.clone(),
            ..base
        },
    })
}

fn in_words(why: &cluster_model::Why) -> String {
    let inputs: Vec<String> = why
        .inputs
        .iter()
        .filter(|(name, _)| *name != "chosen")
        .map(|(name, value)| format!("{name}: {value}"))
        .collect();
    if inputs.is_empty() {
        why.rule.clone()
    } else {
        format!("{} ({})", why.rule, inputs.join("; "))
    }
}

fn balance_view(state: &ClusterState, plan: &balance::BalancePlan) -> BalancePlan {
    let worst =
        |pick: fn(u16, u16) -> u16, fills: &mut dyn Iterator<Item = u16>| fills.reduce(pick);
    let fills: Vec<u16> = plan.nodes.values().map(|fill| fill.worst()).collect();
    let spread = match (
        worst(u16::max, &mut fills.iter().copied()),
        worst(u16::min, &mut fills.iter().copied()),
    ) {
        (Some(most), Some(least)) => f64::from(most - least) / 1_000.0,
        _ => 0.0,
    };
    let gained: f64 = plan
        .moves
        .iter()
        .map(|planned| f64::from(planned.gain_permille) / 1_000.0)
        .sum();
    BalancePlan {
        automatic: state.settings.balance_auto,
        level: match state.settings.balance_level {
            BalanceLevel::Low => "low",
            BalanceLevel::Medium => "medium",
            BalanceLevel::High => "high",
        }
        .into(),
        imbalance_before: spread,
        imbalance_after: (spread - gained).max(0.0),
        moves: plan
            .moves
            .iter()
            .map(|planned| BalanceMove {
                vm: state.vm_label(planned.vm),
                from: state.node_label(planned.from),
                to: state.node_label(planned.to),
                gain: f64::from(planned.gain_permille) / 1_000.0,
                cost_ms: Basis::of(state, None).predicted_ms(planned.cost_mib),
                why: in_words(&planned.why),
            })
            .collect(),
        left_alone: plan
            .left_alone
            .iter()
            .take(LEFT_ALONE_MAX)
            .map(|left| BalanceMove {
                vm: state.vm_label(left.vm),
                from: state.node_label(left.node),
                why: left.reason.clone(),
                ..BalanceMove::default()
            })
            .collect(),
        verdict: verdict(state, plan),
        started: false,
    }
}

/// What a plan comes to, in words.
fn verdict(state: &ClusterState, plan: &balance::BalancePlan) -> String {
    if !plan.moves.is_empty() {
        return counted(plan.moves.len(), "move");
    }
    let threshold = plan.threshold_permille;
    let over: Vec<String> = plan
        .nodes
        .iter()
        .filter(|(_, fill)| fill.worst() > threshold)
        .map(|(node, _)| state.node_label(*node))
        .collect();
    match over.as_slice() {
        [] => format!("no node is over {} %", threshold / 10),
        [one] => format!("{one} is over {} %, and no move would help", threshold / 10),
        many => format!(
            "{} are over {} %, and no move would help",
            many.join(", "),
            threshold / 10
        ),
    }
}
