//! Rules for the return of machines to a node that was drained.

use std::collections::BTreeMap;

use super::{Applied, Entry, clip};
use crate::command::{Outcome, Rejection};
use crate::event::{Object, Severity, counted};
use crate::failback::away;
use crate::ids::{NodeId, VmId};
use crate::state::{ClusterState, Failback};

/// The longest reason that is kept why a machine stays away, bytes.
const REASON_BYTES_MAX: usize = 1_024;

impl ClusterState {
    pub(super) fn begin_failback(&mut self, entry: &mut Entry<'_>, node: NodeId) {
        let failback = Failback {
            node,
            actor: entry.actor.to_owned(),
            since: entry.index,
            failures: BTreeMap::new(),
            stays: BTreeMap::new(),
        };
        let count = away(self, &failback).len();
        self.failbacks.insert(node, failback);
        let detail = format!("{} to {}", returns(count), self.node_label(node));
        self.note(
            entry,
            Severity::Info,
            vec![Object::Node(node)],
            "failback.started",
            detail,
            None,
        );
    }

    /// Nothing returns to that node any more.
    pub(super) fn forget_home(&mut self, node: NodeId) {
        self.failbacks.remove(&node);
        for vm in self.vms.values_mut().filter(|vm| vm.home == Some(node)) {
            vm.home = None;
        }
    }

    /// Counts a return that failed; one that failed too often is not tried again.
    pub(super) fn failback_failed(
        &mut self,
        entry: &mut Entry<'_>,
        node: NodeId,
        vm: VmId,
        reason: &str,
    ) {
        let tries_max = self.settings.drain_tries_max;
        let Some(failback) = self.failbacks.get_mut(&node) else {
            return;
        };
        let failures = failback.failures.entry(vm).or_default();
        *failures = failures.saturating_add(1);
        if *failures >= tries_max {
            self.stays_away(entry, node, vm, reason);
        }
    }

    pub(super) fn stay_away(
        &mut self,
        entry: &mut Entry<'_>,
        node: NodeId,
        vm: VmId,
        reason: &str,
    ) -> Applied {
        let failback = self.failback(node)?;
        if !away(self, failback).iter().any(|known| known.id == vm) {
            return Err(Rejection::DrainState {
                node,
                is: format!("not waiting for {} to return", self.vm_label(vm)),
                hint: "look again: clusterctl vm show".into(),
            });
        }
        self.stays_away(entry, node, vm, reason);
        Ok(Outcome::Nothing)
    }

    fn stays_away(&mut self, entry: &mut Entry<'_>, node: NodeId, vm: VmId, reason: &str) {
        let reason = clip(reason.to_owned(), REASON_BYTES_MAX);
        let detail = format!(
            "{} does not return to {}: {reason}",
            self.vm_label(vm),
            self.node_label(node)
        );
        if let Some(failback) = self.failbacks.get_mut(&node) {
            failback.stays.insert(vm, reason);
        }
        self.note(
            entry,
            Severity::Warn,
            vec![Object::Vm(vm), Object::Node(node)],
            "failback.stays",
            detail,
            None,
        );
    }

    pub(super) fn end_failback(&mut self, entry: &mut Entry<'_>, node: NodeId) -> Applied {
        let failback = self.failback(node)?;
        if let Some(vm) = away(self, failback).first() {
            return Err(Rejection::NodeInUse {
                node,
                reason: format!("still waits for {} to return", vm.name),
            });
        }
        let stays = failback.stays.len();
        self.failbacks.remove(&node);
        // Who came back by another way than a move is at home, too.
        for vm in self.vms.values_mut() {
            if vm.home == Some(node) && vm.ownership.owner == Some(node) {
                vm.home = None;
            }
        }
        let name = self.node_label(node);
        let (severity, detail) = match stays {
            0 => (
                Severity::Info,
                format!("what a drain took from {name} is back"),
            ),
            stays => (
                Severity::Warn,
                format!(
                    "what a drain took from {name} is back, but for {}; to try again: clusterctl uncordon {name} --failback",
                    counted(stays, "machine")
                ),
            ),
        };
        self.note(
            entry,
            severity,
            vec![Object::Node(node)],
            "failback.done",
            detail,
            None,
        );
        Ok(Outcome::Nothing)
    }

    fn failback(&self, node: NodeId) -> Result<&Failback, Rejection> {
        self.failbacks
            .get(&node)
            .ok_or_else(|| Rejection::DrainState {
                node,
                is: "not having its machines back".into(),
                hint: "begin: clusterctl uncordon --failback".into(),
            })
    }
}

fn returns(count: usize) -> String {
    match count {
        0 => "no machine returns".into(),
        1 => "1 machine returns".into(),
        more => format!("{more} machines return"),
    }
}
