//! The node agent's decisions: what the log says, what the node sees, and what follows.
//!
//! `decide` is asked again after every applied entry, every change of a monitor and every tick. It keeps
//! nothing, so a restart of `clusterd` at any instant changes nothing but [`NodeView::session_since`].
//!
//! ```text
//!                     owner here?
//!          no ──► void: Kill        yes ──► a live monitor?
//!   (destination of an open                  no ──► fresh grant: Start; used grant: Rekey;
//!    migration: Incoming ►                          activated: Release
//!    quiet: Claim ► complete:                yes ──► by its phase
//!    Cutover; aborted: Discard)                       Ready    left over: Kill
//!                                                     Running  Activated, Send, CancelSend, StopGuest
//!                                                     Frozen   Thaw
//!                                                     Refused  Rekey, then TakeUpToken
//!                                                     Quiet    waits; aborted: Rekey, then TakeUpToken
//!                                                     Complete RunAfterCutover
//!                                                     Stopped  Release
//!                                                     Failed   Kill and Release
//! ```
//!
//! **A token belongs to one grant and is claimed once.** A claim whose answer is not known may be
//! executed by the storage server much later. If a second claim of the same token were sent, the first
//! could land after a successor's and let a dead writer in again. So a grant that this life has not begun
//! and that no earlier life can have seen (`since` lies after this life's registration) is *fresh* and may
//! be claimed; any other is used up and is answered with a re-key. A re-key with no monitor to ask settles:
//! nobody knows whether a guest ran under it.
//!
//! **An image belongs to one grant, too.** [`crate::Ownership::image`] is the token of the start or cutover
//! that began the present image of the guest's memory. A re-key keeps it, everything else moves it. A monitor
//! whose image is older is void, whatever node the machine is on now: after S → D → S the old image on S
//! would be a guest that fell back in time over a disk that went on.
//!
//! **A replica that lags knows it.** Numbers are log indices and tokens only grow, so a monitor whose
//! migration, machine or token is beyond what is applied here is news to come, not a stray: it is left alone.
//!
//! **Quiet binds.** A source that said *quiet* runs again only after the applied abort and under a token
//! above the destination's: it is re-keyed (with no settle: it has nothing outstanding and the destination
//! never ran), never thawed under the token it had.

mod act;
mod memory;
#[cfg(test)]
mod tests;
mod view;

pub use act::Act;
pub use memory::{Ended, Learnt, Memory, Sight, Work};
pub use view::{FlowKind, MonitorMigration, MonitorPhase, MonitorView, NodeView, Side};

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::RENEWALS_MAX;
use crate::command::ReleaseReason;
use crate::ids::{LogIndex, MigrationId, NodeId, Token, VmId};
use crate::safeguards::{Safeguard, Safeguards};
use crate::state::{
    ClusterState, Desired, Migration, MigrationState, Ownership, OwnershipCause, Vm,
};

/// What the node should do now, machine by machine. Empty when everything is as it should be.
pub fn decide(state: &ClusterState, view: &NodeView) -> Vec<Act> {
    decide_under(state, view, Safeguards::ALL)
}

/// [`decide`], where a safeguard may be missing.
pub(crate) fn decide_under(
    state: &ClusterState,
    view: &NodeView,
    safeguards: Safeguards,
) -> Vec<Act> {
    let mut monitors: BTreeMap<VmId, Vec<&MonitorView>> = BTreeMap::new();
    for monitor in &view.monitors {
        monitors.entry(monitor.vm).or_default().push(monitor);
    }
    let mut incoming: BTreeMap<VmId, &Migration> = BTreeMap::new();
    for migration in state.migrations.values() {
        if migration.is_active() && migration.to == view.me {
            incoming.insert(migration.vm, migration);
        }
    }
    let concerned: BTreeSet<VmId> = monitors
        .keys()
        .chain(incoming.keys())
        .copied()
        .chain(state.owned_by(view.me).map(|vm| vm.id))
        .collect();
    let mut acts = Vec::new();
    for vm in concerned {
        let monitors = monitors.get(&vm).map_or(&[][..], Vec::as_slice);
        let incoming = incoming.get(&vm).copied();
        decide_machine(state, view, vm, monitors, incoming, safeguards, &mut acts);
    }
    acts.retain(|act| view.lease_valid || !act.lets_a_guest_run());
    acts
}

/// How a monitor stands to the log.
enum Standing<'s> {
    /// Its image is the machine's; `image` is the token that it stands under.
    Live { image: Token },
    /// It receives for a migration under way.
    Incoming,
    /// It received for a migration that was aborted.
    Discard(MigrationId),
    /// It may never run again.
    Void(&'s str),
    /// This replica has not applied what it belongs to.
    Ahead,
}

fn standing(
    state: &ClusterState,
    me: NodeId,
    monitor: &MonitorView,
    incoming: Option<&Migration>,
) -> Standing<'static> {
    let applied = state.applied.0;
    let Some(vm) = state.vms.get(&monitor.vm) else {
        return if monitor.vm.0 > applied {
            Standing::Ahead
        } else {
            Standing::Void("its machine was deleted")
        };
    };
    let mut image = monitor.token;
    if let Some(part) = &monitor.migration
        && part.side == Side::Destination
    {
        match state.migrations.get(&part.id).map(|known| &known.state) {
            Some(MigrationState::Active { .. }) => return Standing::Incoming,
            Some(MigrationState::Aborted { .. }) => return Standing::Discard(part.id),
            Some(MigrationState::CutOver { token, .. }) => image = image.max(*token),
            Some(MigrationState::Queued) => return Standing::Ahead,
            None if part.id.0 > applied => return Standing::Ahead,
            // Ended so long ago that it is forgotten: the token says whether it still counts.
            None => {}
        }
    }
    let ownership = &vm.ownership;
    if image > state.token_last {
        Standing::Ahead
    } else if image > ownership.token {
        // Granted to nobody, so reserved for a migration; it waits for its source, or came too late.
        match incoming {
            Some(_) => Standing::Incoming,
            None => Standing::Void("its token was reserved for a migration that ended"),
        }
    } else if ownership.owner != Some(me) {
        Standing::Void("the machine is not this node's under that token")
    } else if image < ownership.image {
        Standing::Void("the machine began anew since; its image is void for ever")
    } else {
        Standing::Live { image }
    }
}

fn decide_machine(
    state: &ClusterState,
    view: &NodeView,
    id: VmId,
    monitors: &[&MonitorView],
    incoming: Option<&Migration>,
    safeguards: Safeguards,
    acts: &mut Vec<Act>,
) {
    let mut live: Option<(Token, &MonitorView)> = None;
    let mut receiving: Option<&MonitorView> = None;
    let mut strays = false;
    let mut ahead = false;
    for &monitor in monitors {
        match standing(state, view.me, monitor, incoming) {
            Standing::Live { image } => {
                // Two live ones are a flow's accident; the one that got further is the machine.
                let rank = |image: Token, monitor: &MonitorView| {
                    (monitor.phase != MonitorPhase::Ready, image, monitor.nonce)
                };
                let second = match live {
                    Some((known, best)) if rank(known, best) >= rank(image, monitor) => {
                        Some(monitor)
                    }
                    Some((_, best)) => {
                        live = Some((image, monitor));
                        Some(best)
                    }
                    None => {
                        live = Some((image, monitor));
                        None
                    }
                };
                if let Some(second) = second {
                    strays = true;
                    acts.push(kill(second, "a second monitor of the same machine"));
                }
            }
            Standing::Incoming => receiving = Some(monitor),
            Standing::Discard(migration) => {
                strays = true;
                acts.push(Act::DiscardIncoming {
                    vm: id,
                    migration,
                    nonce: monitor.nonce,
                });
            }
            Standing::Void(_) if !safeguards.hold(Safeguard::VoidMonitorsEnd) => {}
            Standing::Void(why) => {
                strays = true;
                acts.push(kill(monitor, why));
            }
            Standing::Ahead => ahead = true,
        }
    }
    let registered = state
        .nodes
        .get(&view.me)
        .is_some_and(|node| node.incarnation == view.incarnation);
    let Some(session_since) = view.session_since.filter(|_| registered) else {
        return;
    };
    // One flow at a time; and nothing is begun beside a monitor that must go first, or that this
    // replica knows nothing of yet.
    if view.flows.contains_key(&id) || strays || ahead {
        return;
    }
    let Some(vm) = state.vms.get(&id) else {
        return;
    };
    if let Some(migration) = incoming {
        acts.extend(receive(view, session_since, migration, receiving));
    } else if vm.ownership.owner == Some(view.me) {
        let owned = Owned {
            state,
            view,
            vm,
            session_since,
            safeguards,
        };
        match live {
            None => acts.extend(owned.without_monitor()),
            Some((image, monitor)) => acts.extend(owned.with_monitor(image, monitor)),
        }
    }
}

fn kill(monitor: &MonitorView, why: &str) -> Act {
    Act::Kill {
        vm: monitor.vm,
        token: monitor.token,
        nonce: monitor.nonce,
        why: why.to_owned(),
    }
}

/// The destination's side of a migration under way.
fn receive(
    view: &NodeView,
    session_since: LogIndex,
    migration: &Migration,
    monitor: Option<&MonitorView>,
) -> Option<Act> {
    let MigrationState::Active {
        expects,
        reserved,
        reserved_at,
        renewals,
        ..
    } = &migration.state
    else {
        return None;
    };
    let (vm, id, reserved) = (migration.vm, migration.id, *reserved);
    let abort = |reason: String| {
        Some(Act::ProposeAbort {
            vm,
            migration: id,
            reason,
        })
    };
    let Some(monitor) = monitor else {
        return if view.prepared.contains(&id) {
            abort("the destination's monitor is gone, or could not be made".into())
        } else {
            Some(Act::PrepareIncoming {
                vm,
                migration: id,
                reserved,
            })
        };
    };
    let part = monitor.migration.as_ref();
    if let Some(failed) = part.and_then(|part| part.failed.as_ref()) {
        return abort(format!("the destination failed: {failed}"));
    }
    let complete = match monitor.phase {
        MonitorPhase::Incoming => false,
        MonitorPhase::Complete => true,
        MonitorPhase::Failed => {
            let how = monitor.failure.as_deref().unwrap_or("no reason given");
            return abort(format!("the destination's monitor failed: {how}"));
        }
        // Built; its source has not called yet.
        MonitorPhase::Ready => return None,
        MonitorPhase::Running
        | MonitorPhase::Frozen
        | MonitorPhase::Refused
        | MonitorPhase::Quiet
        | MonitorPhase::Stopped => {
            return abort(format!(
                "the destination's monitor is {:?}, which no incoming one can be",
                monitor.phase
            ));
        }
    };
    if !complete && !part.is_some_and(|part| part.quiet_received) {
        return None;
    }
    if view.claimed.contains(&(vm, reserved)) {
        return complete.then_some(Act::ProposeCutover {
            vm,
            migration: id,
            expects: *expects,
            claimed: reserved,
        });
    }
    let burnt = view.begun.contains(&(vm, reserved)) || *reserved_at <= session_since;
    if !burnt {
        Some(Act::ClaimForCutover {
            vm,
            migration: id,
            reserved,
        })
    } else if *renewals < RENEWALS_MAX {
        Some(Act::RenewToken {
            vm,
            migration: id,
            burnt: reserved,
        })
    } else {
        abort("the destination's storage did not acknowledge its claims".into())
    }
}

/// A machine that this node owns and has no flow for.
struct Owned<'a> {
    state: &'a ClusterState,
    view: &'a NodeView,
    vm: &'a Vm,
    session_since: LogIndex,
    safeguards: Safeguards,
}

impl Owned<'_> {
    fn record(&self) -> &Ownership {
        &self.vm.ownership
    }

    /// Whether the record's token may still be claimed: nobody has begun to.
    fn fresh(&self) -> bool {
        let record = self.record();
        record.since > self.session_since
            && !self.view.begun.contains(&(self.vm.id, record.token))
            && match record.cause {
                OwnershipCause::Start | OwnershipCause::Rekey => true,
                // Claimed before it was granted.
                OwnershipCause::Cutover => false,
                OwnershipCause::Created
                | OwnershipCause::Release
                | OwnershipCause::NodeLost
                | OwnershipCause::NodeRebooted => false,
            }
    }

    fn rekey(&self, settle: bool, reason: &str) -> Option<Act> {
        // Without the lease the fresh token could not be used either.
        self.view.lease_valid.then(|| Act::Rekey {
            vm: self.vm.id,
            expects: self.record().token,
            settle: settle && self.safeguards.hold(Safeguard::RekeySettles),
            reason: reason.to_owned(),
        })
    }

    fn release(&self, reason: ReleaseReason) -> Act {
        Act::Release {
            vm: self.vm.id,
            expects: self.record().token,
            reason,
        }
    }

    fn thaw(&self, monitor: &MonitorView) -> Act {
        Act::Thaw {
            vm: self.vm.id,
            token: self.record().token,
            nonce: monitor.nonce,
        }
    }

    fn without_monitor(&self) -> Option<Act> {
        let record = self.record();
        let vm = self.vm.id;
        let migration = self.state.active_migration(vm);
        if migration.is_some_and(|migration| self.view.quiet_lost.contains(&migration.id)) {
            return None;
        }
        if let Some(migration) = migration
            && !record.activated
        {
            // Re-keyed on the way, and gone before it ran again. It may have said quiet, and then the destination
            // may cut over: nothing starts here before that is decided.
            return Some(Act::ProposeAbort {
                vm,
                migration: migration.id,
                reason: "the source's monitor is gone".to_owned(),
            });
        }
        if record.activated {
            return Some(self.release(ReleaseReason::MonitorEnded(
                "its monitor is gone".to_owned(),
            )));
        }
        if let Some(why) = self.view.start_failures.get(&(vm, record.token)) {
            return Some(self.release(ReleaseReason::StartFailed(why.clone())));
        }
        match (self.vm.desired, self.fresh()) {
            (Desired::Running, true) => Some(Act::Start {
                vm,
                token: record.token,
                settle: record.settle,
            }),
            (Desired::Running, false) => self.rekey(
                true,
                "its token may have been claimed already and no monitor stands under it",
            ),
            (Desired::Stopped, true) => Some(self.release(ReleaseReason::Stopped)),
            (Desired::Stopped, false) => Some(self.release(ReleaseReason::MonitorEnded(
                "it was asked to stop while it started".to_owned(),
            ))),
        }
    }

    fn with_monitor(&self, image: Token, monitor: &MonitorView) -> Vec<Act> {
        let record = self.record();
        let vm = self.vm.id;
        let current = image == record.token;
        match monitor.phase {
            MonitorPhase::Ready => vec![kill(
                monitor,
                "left over from a start that ended before its permit",
            )],
            MonitorPhase::Failed => vec![
                kill(monitor, "it failed"),
                self.release(ReleaseReason::MonitorEnded(
                    monitor
                        .failure
                        .clone()
                        .unwrap_or_else(|| "it gave no reason".to_owned()),
                )),
            ],
            // The record settles after a forced stop; any other that left something behind is as good as a crash.
            MonitorPhase::Stopped if monitor.undrained && !self.vm.stop_forced => {
                vec![self.release(ReleaseReason::MonitorEnded(
                    "it stopped before its disks were drained".to_owned(),
                ))]
            }
            // One that was told to stop did not do so of its own will: if it is to run again by now, it will.
            MonitorPhase::Stopped => vec![self.release(match self.vm.desired {
                Desired::Running
                    if !monitor.stop_asked
                        || !self.safeguards.hold(Safeguard::StopIsNoShutDown) =>
                {
                    ReleaseReason::GuestShutDown
                }
                Desired::Running | Desired::Stopped => ReleaseReason::Stopped,
            })],
            // Its status is behind the log by a moment, or it lies about it; both wait.
            MonitorPhase::Incoming => Vec::new(),
            MonitorPhase::Complete => match &monitor.migration {
                Some(part) if current && !record.activated => vec![Act::RunAfterCutover {
                    vm,
                    token: record.token,
                    migration: part.id,
                    nonce: monitor.nonce,
                }],
                _ if current => Vec::new(),
                _ => self.catch_up(monitor, None).into_iter().collect(),
            },
            MonitorPhase::Running | MonitorPhase::Frozen | MonitorPhase::Refused
                if monitor.said_quiet =>
            {
                self.after_quiet(current, monitor).into_iter().collect()
            }
            MonitorPhase::Quiet if !self.safeguards.hold(Safeguard::QuietBinds) => {
                vec![self.thaw(monitor)]
            }
            MonitorPhase::Quiet => self.after_quiet(current, monitor).into_iter().collect(),
            MonitorPhase::Running | MonitorPhase::Frozen | MonitorPhase::Refused if !current => {
                self.catch_up(monitor, None).into_iter().collect()
            }
            MonitorPhase::Refused => {
                let reason = "the storage server refused its token, or a write is in doubt";
                self.rekey(monitor.writes_unanswered, reason)
                    .into_iter()
                    .collect()
            }
            MonitorPhase::Frozen if !self.safeguards.hold(Safeguard::FrozenThaws) => {
                vec![kill(monitor, "frozen")]
            }
            MonitorPhase::Frozen => {
                let mut acts = vec![self.thaw(monitor)];
                acts.extend(self.source_trouble(monitor));
                acts
            }
            MonitorPhase::Running => self.running(monitor),
        }
    }

    /// A live monitor under an older token than the record's: it takes up the record's, if that was not
    /// begun before. `after`: the record must be younger than this entry.
    ///
    /// It may run meanwhile, where the re-key was decided before its status said so: then nobody knows what it
    /// has written since, and it settles whatever the record says.
    fn catch_up(&self, monitor: &MonitorView, after: Option<LogIndex>) -> Option<Act> {
        let record = self.record();
        let writes = monitor.writes_unanswered || monitor.phase == MonitorPhase::Running;
        if self.fresh() && after.is_none_or(|after| record.since > after) {
            Some(Act::TakeUpToken {
                vm: self.vm.id,
                token: record.token,
                settle: (record.settle || writes) && self.safeguards.hold(Safeguard::RekeySettles),
                nonce: monitor.nonce,
            })
        } else {
            self.rekey(writes, "its monitor could not take up the last token")
        }
    }

    /// A source that said quiet.
    fn after_quiet(&self, current: bool, monitor: &MonitorView) -> Option<Act> {
        let record = self.record();
        let part = monitor
            .migration
            .as_ref()
            .filter(|part| part.side == Side::Source);
        let known = part.and_then(|part| self.state.migrations.get(&part.id));
        let aborted_at = match known.map(|known| &known.state) {
            Some(MigrationState::Active { .. } | MigrationState::Queued) => {
                return self.source_trouble(monitor);
            }
            Some(MigrationState::Aborted { at, .. }) => Some(*at),
            // The image is this owner's still, so the cutover never was: it ended, and is forgotten.
            Some(MigrationState::CutOver { .. }) | None => None,
        };
        if part.is_some_and(|part| known.is_none() && part.id.0 > self.state.applied.0) {
            return None;
        }
        let rekeyed_since = record.cause == OwnershipCause::Rekey
            && aborted_at.is_none_or(|aborted_at| record.since > aborted_at);
        match (current, rekeyed_since) {
            // The fresh token was claimed, confirmed and taken up; only the permit is missing.
            (true, true) if aborted_at.is_some() && monitor.phase != MonitorPhase::Refused => {
                Some(self.thaw(monitor))
            }
            (false, true) => self.catch_up(monitor, aborted_at),
            _ => self.rekey(
                monitor.writes_unanswered,
                "its migration was aborted after it said quiet",
            ),
        }
    }

    fn running(&self, monitor: &MonitorView) -> Vec<Act> {
        let record = self.record();
        let vm = self.vm.id;
        if !record.activated {
            return vec![Act::Activated {
                vm,
                token: record.token,
            }];
        }
        // A stop that has begun is finished, whatever was asked since: its vCPUs may stand still already.
        if self.vm.desired == Desired::Stopped || monitor.stop_asked {
            return vec![Act::StopGuest {
                vm,
                token: record.token,
                forced: self.vm.stop_forced,
            }];
        }
        if let Some(trouble) = self.source_trouble(monitor) {
            return vec![trouble];
        }
        let part = monitor.migration.as_ref();
        if let Some(migration) = self.state.active_migration(vm)
            && let MigrationState::Active { expects, .. } = &migration.state
            && part.is_none_or(|part| part.id != migration.id)
        {
            return vec![Act::Send {
                vm,
                migration: migration.id,
                expects: *expects,
            }];
        }
        let Some(part) = part else {
            return Vec::new();
        };
        match self.state.migrations.get(&part.id) {
            Some(known)
                if part.side == Side::Source
                    && part.failed.is_none()
                    && matches!(known.state, MigrationState::Aborted { .. }) =>
            {
                vec![Act::CancelSend {
                    vm,
                    migration: part.id,
                }]
            }
            Some(known)
                if part.side == Side::Destination
                    && known.to == self.view.me
                    && known.summary.is_none()
                    && matches!(known.state, MigrationState::CutOver { .. }) =>
            {
                vec![Act::ReportMigration {
                    vm,
                    migration: part.id,
                }]
            }
            _ => Vec::new(),
        }
    }

    /// Source: its monitor says that the migration under way failed.
    fn source_trouble(&self, monitor: &MonitorView) -> Option<Act> {
        let part = monitor
            .migration
            .as_ref()
            .filter(|part| part.side == Side::Source)?;
        let failed = part.failed.as_ref()?;
        let known = self.state.migrations.get(&part.id)?;
        known.is_active().then(|| Act::ProposeAbort {
            vm: self.vm.id,
            migration: part.id,
            reason: format!("the source failed: {failed}"),
        })
    }
}

/// Why a guest may not be let run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PermitRefusal {
    /// The log knows no such machine.
    #[error("{vm} may not run: the log knows no such machine")]
    Unknown {
        /// Which.
        vm: VmId,
    },
    /// Another node owns it, or nobody.
    #[error("{vm} may not run on {node}: its owner is {}", owner.map_or("nobody".to_owned(), |owner| owner.to_string()))]
    NotOwner {
        /// Which.
        vm: VmId,
        /// Who asked.
        node: NodeId,
        /// Who owns it.
        owner: Option<NodeId>,
    },
    /// The token moved.
    #[error("{vm} may not run under {asked}: its token is {token}")]
    TokenMoved {
        /// Which.
        vm: VmId,
        /// Under which token it was asked.
        asked: Token,
        /// The record's.
        token: Token,
    },
}

/// Whether the log, as applied here, lets `node` run `vm` under `token`, and by which entry.
///
/// One of the three things that a run permit is made of; the claim's acknowledgement and the confirm are
/// the caller's.
///
/// # Errors
/// What the record says instead.
pub fn permit_allowed(
    state: &ClusterState,
    vm: VmId,
    node: NodeId,
    token: Token,
) -> Result<LogIndex, PermitRefusal> {
    let record = &state
        .vms
        .get(&vm)
        .ok_or(PermitRefusal::Unknown { vm })?
        .ownership;
    if record.owner != Some(node) {
        return Err(PermitRefusal::NotOwner {
            vm,
            node,
            owner: record.owner,
        });
    }
    if record.token != token {
        return Err(PermitRefusal::TokenMoved {
            vm,
            asked: token,
            token: record.token,
        });
    }
    Ok(record.since)
}
