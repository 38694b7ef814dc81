//! What happened, as a stream; and why things are as they are.

use std::collections::BTreeSet;
use std::time::Duration;

use cluster_model::{
    ClusterState, Event, Failback, Name, Object, Severity, counted, failback, failover,
};
use proto::admin::{Check, EventView, EventsRequest, MigrationView, WhyReply, WhyRequest};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::asker::Asker;
use super::error::invalid;
use super::service::{AdminService, Answers, node_named};
use super::views;

/// Events that wait for a slow reader at most.
const QUEUE: usize = 256;
/// Events that `why` shows at most.
const CHAIN_MAX: usize = 20;
/// A reader that takes nothing for this long is let go.
const READER_PATIENCE: Duration = Duration::from_secs(60);

/// What a reader wants to see.
struct Filter {
    since_ms: u64,
    object: Option<Object>,
    severity: Severity,
    kind_prefix: String,
    /// Only what is about machines with one of these tags.
    tags: Option<BTreeSet<Name>>,
}

impl Filter {
    fn lets_through(&self, state: &ClusterState, event: &Event) -> bool {
        let theirs = self.tags.as_ref().is_none_or(|tags| {
            event.objects.iter().any(|object| match object {
                Object::Vm(vm) => state
                    .vms
                    .get(vm)
                    .is_some_and(|vm| !vm.spec.tags.is_disjoint(tags)),
                _ => false,
            })
        });
        theirs
            && event.at_ms >= self.since_ms
            && event.severity >= self.severity
            && event.kind.starts_with(&self.kind_prefix)
            && self
                .object
                .is_none_or(|object| event.objects.contains(&object))
    }
}

impl AdminService {
    pub(super) async fn events(
        &self,
        asker: &Asker,
        request: EventsRequest,
    ) -> Result<Answers<EventView>, Status> {
        let mut states = self.backend.state();
        let state = self.cluster_state()?;
        let filter = Filter {
            since_ms: request.since_ms,
            object: match request.object.as_str() {
                "" => None,
                text => Some(views::parse_object(&state, text)?),
            },
            severity: match request.severity.as_str() {
                "" | "info" => Severity::Info,
                "warn" => Severity::Warn,
                "error" => Severity::Error,
                other => {
                    return Err(invalid(format!(
                        "severity `{other}`: use info, warn or error"
                    )));
                }
            },
            kind_prefix: request.kind_prefix,
            tags: asker.narrowed_to().cloned(),
        };
        let (sender, receiver) = mpsc::channel(QUEUE);
        let mut seen = (request.after_index, request.after_sequence);
        let mut everything = request.after_index == 0;
        tokio::spawn(async move {
            loop {
                let state = states.borrow_and_update().clone();
                for event in &state.events {
                    let place = (event.index.0, event.sequence);
                    if !everything && place <= seen {
                        continue;
                    }
                    everything = false;
                    seen = place;
                    if filter.lets_through(&state, event) {
                        let view = views::event(&state, event);
                        if sender
                            .send_timeout(Ok(view), READER_PATIENCE)
                            .await
                            .is_err()
                        {
                            return;
                        }
                    }
                }
                if !request.follow {
                    return;
                }
                tokio::select! {
                    changed = states.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }

    pub(super) async fn why(&self, asker: &Asker, request: WhyRequest) -> Result<WhyReply, Status> {
        let state = self.cluster_state()?;
        let object = views::parse_object(&state, &request.object)?;
        if asker.narrowed_to().is_some() {
            asker.may_touch(match object {
                Object::Vm(vm) => state.vms.get(&vm),
                Object::Migration(id) => state
                    .migrations
                    .get(&id)
                    .and_then(|migration| state.vms.get(&migration.vm)),
                Object::Node(_) | Object::Volume(_) | Object::Cluster => None,
            })?;
        }
        let mut reply = WhyReply {
            object: views::object_label(&state, object),
            ..WhyReply::default()
        };
        let mut chain: Vec<EventView> = state
            .events
            .iter()
            .rev()
            .filter(|event| event.objects.contains(&object))
            .take(CHAIN_MAX)
            .map(|event| views::event(&state, event))
            .collect();
        chain.reverse();
        reply.chain = chain;
        match object {
            Object::Vm(id) => {
                let vm = state
                    .vms
                    .get(&id)
                    .ok_or_else(|| invalid("the machine is gone"))?;
                reply.summary = vm_summary(&state, vm);
                let nodes: Vec<_> = match request.not_on.as_str() {
                    "" => state.nodes.values().collect(),
                    text => vec![node_named(&state, text)?],
                };
                for node in nodes {
                    let verdict = match vm.ownership.owner {
                        Some(owner) if owner == node.id => Ok(()),
                        Some(owner) => state.may_migrate(vm.id, owner, node.id),
                        None => cluster_model::placement::may_run(&state, vm, node),
                    };
                    let here = vm.ownership.owner == Some(node.id);
                    reply.considered.push(Check {
                        name: node.name.to_string(),
                        passed: verdict.is_ok(),
                        detail: match verdict {
                            Ok(()) if here => "it is here".into(),
                            Ok(()) => "it could be here".into(),
                            Err(rejection) => rejection.in_words(&state),
                        },
                    });
                }
                reply.next = next_of(&state, vm);
            }
            Object::Node(id) => {
                let node = state
                    .nodes
                    .get(&id)
                    .ok_or_else(|| invalid("the node is gone"))?;
                reply.summary = format!(
                    "{} is {} with {}",
                    node.name,
                    views::node_state(node, false),
                    counted(state.owned_by(id).count(), "machine")
                );
                if let Some(drain) = state.drains.get(&id) {
                    let reason = if drain.reason.is_empty() {
                        String::new()
                    } else {
                        format!(" ({})", drain.reason)
                    };
                    reply.next = format!(
                        "{} by {}{reason}; take it back: clusterctl uncordon {}",
                        if drain.ended_at_ms == 0 {
                            "being drained"
                        } else {
                            "drained"
                        },
                        drain.actor,
                        node.name
                    );
                }
                if let Some(record) = state.failbacks.get(&id) {
                    reply.next = returns(&state, record);
                }
            }
            Object::Migration(id) => {
                let soft = self.backend.soft().await;
                if let Some(migration) = state.migrations.get(&id) {
                    let view = views::migration(&state, &soft, migration);
                    reply.summary = migration_summary(&view);
                }
            }
            Object::Volume(_) | Object::Cluster => {
                reply.summary = views::object_label(&state, object);
            }
        }
        Ok(reply)
    }
}

/// How a fail-back stands.
fn returns(state: &ClusterState, failback: &Failback) -> String {
    let left = failback::away(state, failback);
    let names: Vec<&str> = left
        .iter()
        .take(CHAIN_MAX)
        .map(|vm| vm.name.as_str())
        .collect();
    format!(
        "{} to come back to it, as {} asked: {}",
        counted(left.len(), "machine"),
        failback.actor,
        names.join(", ")
    )
}

fn migration_summary(view: &MigrationView) -> String {
    let what = format!("{} {} → {}", view.vm, view.from, view.to);
    let asked = format!("asked by {} ({})", view.actor, view.cause);
    match view.state.as_str() {
        "cut-over" if view.total_us > 0 => format!(
            "{what} went through in {:.1} s with a blackout of {:.1} ms, {asked}",
            view.total_us as f64 / 1e6,
            view.blackout_us as f64 / 1e3
        ),
        "cut-over" => format!("{what} went through, {asked}"),
        "aborted" => format!("{what} was aborted: {}; {asked}", view.reason),
        "active" => format!("{what} is under way ({}), {asked}", view.stage),
        _ => format!("{what} waits in the queue, {asked}"),
    }
}

fn vm_summary(state: &ClusterState, vm: &cluster_model::Vm) -> String {
    let ownership = &vm.ownership;
    match ownership.owner {
        Some(owner) => format!(
            "{} is on {} under {} since entry {} ({}){}",
            vm.name,
            state.node_label(owner),
            ownership.token,
            ownership.since,
            views::ownership_cause(ownership.cause),
            if ownership.activated {
                ""
            } else {
                "; it is being started"
            }
        ),
        None => format!(
            "{} has no owner (token {}): {}",
            vm.name,
            ownership.token,
            failover::why_not_running(state, vm).unwrap_or_default()
        ),
    }
}

fn next_of(state: &ClusterState, vm: &cluster_model::Vm) -> String {
    if let Some(migration) = state.open_migration(vm.id) {
        return format!(
            "it moves to {} ({})",
            state.node_label(migration.to),
            migration.id
        );
    }
    if vm.held.is_some() {
        return format!(
            "nothing until somebody says: clusterctl vm start {}",
            vm.name
        );
    }
    match vm.ownership.owner {
        Some(owner)
            if state
                .drains
                .get(&owner)
                .is_some_and(|drain| drain.ended_at_ms == 0) =>
        {
            "its node is being drained: it will be moved".into()
        }
        _ => String::new(),
    }
}
