//! The lease that a node holds: heartbeats sent, until when its guests may run, and the way back from a
//! planned absence.

use std::collections::{BTreeSet, VecDeque};

use super::{Grant, NS_IN_MS};
use crate::command::Command;
use crate::state::Node;

/// Heartbeats that a node may have under way: older ones are forgotten, and their late replies are refused.
pub const UNDER_WAY_MAX: usize = 64;

/// What one life of `clusterd` knows of its node's lease; the one owner of the deadline.
#[derive(Clone, Debug, Default)]
pub struct HeldLease {
    under_way: VecDeque<(u64, u64)>,
    sequence: u64,
    deadline_ns: u64,
    /// Monitors that have acknowledged to this life that no deadline of theirs lies beyond this lease.
    shortened: BTreeSet<u64>,
}

impl HeldLease {
    /// A heartbeat is about to be sent; gives it its number.
    pub fn sending(&mut self, now_ns: u64) -> u64 {
        self.sequence += 1;
        self.under_way.push_back((self.sequence, now_ns));
        if self.under_way.len() > UNDER_WAY_MAX {
            self.under_way.pop_front();
        }
        self.sequence
    }

    /// A grant came in answer to a heartbeat, and what it needs is applied here. Gives the deadline if it
    /// moved.
    ///
    /// It counts from when that heartbeat was sent, however late the reply; a reply to a heartbeat that is
    /// forgotten, or answered already, grants nothing.
    pub fn granted(&mut self, sequence: u64, grant: Grant) -> Option<u64> {
        let at = self
            .under_way
            .iter()
            .position(|(sent, _)| *sent == sequence)?;
        let (_, sent_ns) = self.under_way.remove(at)?;
        let deadline_ns = sent_ns.saturating_add(u64::from(grant.lease_ms) * NS_IN_MS);
        (deadline_ns > self.deadline_ns).then(|| {
            self.deadline_ns = deadline_ns;
            deadline_ns
        })
    }

    /// [`Command::Absent`] is committed: the leader waits that much longer, and so may the monitors.
    /// Gives the new deadline, or `None` if the lease has run out by now: a guest that froze stays frozen.
    pub fn absence_committed(&mut self, now_ns: u64, duration_ms: u32) -> Option<u64> {
        if !self.valid(now_ns) {
            return None;
        }
        self.shortened.clear();
        self.deadline_ns = self
            .deadline_ns
            .saturating_add(u64::from(duration_ms) * NS_IN_MS);
        Some(self.deadline_ns)
    }

    /// The deadline to which every monitor of this host must come back, those of machines that were taken
    /// from it too, since the log still counts an absence of `me`. `None` when there is none, or nothing to go
    /// by: without a lease of its own this life would freeze what may run on.
    pub fn shorten_to(&self, me: &Node, now_ns: u64) -> Option<u64> {
        (me.absence.is_some() && self.valid(now_ns)).then_some(self.deadline_ns)
    }

    /// A monitor has acknowledged that its deadline is no later than [`HeldLease::shorten_to`] was, and that it
    /// listens to no earlier life of `clusterd` any more.
    pub fn shortened(&mut self, nonce: u64) {
        self.shortened.insert(nonce);
    }

    /// Whether that monitor has yet to come back from the absence.
    pub fn is_to_shorten(&self, nonce: u64) -> bool {
        !self.shortened.contains(&nonce)
    }

    /// What ends the absence in the log, once every monitor of this host has come back from it.
    ///
    /// `monitors`: the nonces of all that there are, those that do not answer too. The lease is valid, so the
    /// leader counts from a reply to this life, or gives everybody the full time.
    pub fn returned(
        &self,
        me: &Node,
        mut monitors: impl Iterator<Item = u64>,
        now_ns: u64,
    ) -> Option<Command> {
        let absence = me.absence?;
        let all = monitors.all(|nonce| !self.is_to_shorten(nonce));
        (all && self.valid(now_ns)).then_some(Command::Returned {
            node: me.id,
            incarnation: me.incarnation,
            absence: absence.since,
        })
    }

    /// Keeps no more of the monitors than there are.
    pub fn retain(&mut self, mut is_there: impl FnMut(u64) -> bool) {
        self.shortened.retain(|nonce| is_there(*nonce));
    }

    /// Until when guests may run; 0 before the first grant.
    pub fn deadline_ns(&self) -> u64 {
        self.deadline_ns
    }

    /// Whether guests may run now.
    pub fn valid(&self, now_ns: u64) -> bool {
        now_ns < self.deadline_ns
    }

    #[cfg(test)]
    pub(super) fn under_way(&self) -> usize {
        self.under_way.len()
    }
}
