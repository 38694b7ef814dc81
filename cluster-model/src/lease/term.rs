//! What a leader knows of leases in one term: whom it granted what, whom it is declaring lost.
//!
//! ```text
//!  heartbeat, confirmed ─► grant ─► Grant | LeaseRefusal
//!  every 100 ms         ─► look  ─► losses: each goes into the log by itself, none waits for another
//!                                     └─► loss_answered(Recorded | Refused | Unknown)
//! ```
//! A node is condemned from the look that finds it lost until the log shows that it is not up by that entry
//! any more, or it is known that the loss is not in the log. While it is condemned it is granted nothing: the
//! loss may be applied at any moment.

use std::collections::BTreeMap;

use super::table::LeaseTable;
use super::{Grant, LeaseRefusal, NS_IN_MS};
use crate::command::Command;
use crate::ids::{Incarnation, LogIndex, NodeId, RequestId};
use crate::state::{ClusterState, Liveness};

/// A leader that did not look for this long stood still itself, and everybody gets the full time again: the
/// heartbeats of meanwhile may be waiting to be answered.
pub const STOOD_STILL_NS: u64 = 1_500 * NS_IN_MS;
/// A loss whose fate is unknown, or that was refused, is asked for again after this.
pub const REASK_NS: u64 = 1_000 * NS_IN_MS;

/// A node's heartbeat as the leader answers it.
#[derive(Clone, Copy, Debug)]
pub struct Heartbeat {
    /// Whose.
    pub node: NodeId,
    /// The life of its host.
    pub incarnation: Incarnation,
    /// The last entry that it had applied when it sent.
    pub applied: LogIndex,
    /// When it came, on the leader's clock.
    pub received_ns: u64,
    /// When the leader asked the quorum that then confirmed it: not before it came. The leader's own node
    /// asks by the same rule.
    pub confirmed_ns: u64,
    /// What the quorum had committed then: the node must have applied it to use the grant.
    pub needs: LogIndex,
}

/// A node to be declared lost.
#[derive(Clone, Debug, PartialEq)]
pub struct Loss {
    /// Which.
    pub node: NodeId,
    /// The entry by which it came up: another life of it is not lost.
    pub up_since: LogIndex,
    /// One for one loss: an answer that was lost may be asked for again.
    pub request: RequestId,
    /// [`Command::NodeLost`]; to be written in the term in which it was seen, or not at all.
    pub command: Command,
}

/// What came of proposing a loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossOutcome {
    /// It is applied.
    Recorded,
    /// The log refused it, or it was not written: the node may be granted a lease again.
    Refused,
    /// It may be in the log.
    Unknown,
}

/// What a look found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Look {
    /// To be proposed, each by itself: those that are lost since the last look, and those to ask for again.
    pub losses: Vec<Loss>,
    /// This leader stood still: every node has the full time again.
    pub stood_still: bool,
}

#[derive(Clone, Debug)]
struct Condemned {
    loss: Loss,
    fate: Fate,
}

#[derive(Clone, Copy, Debug)]
enum Fate {
    Proposed,
    Unknown { again_ns: u64 },
    Refused { again_ns: u64 },
}

/// A leader's term, from when it took over. Not replicated; every new leader begins anew.
#[derive(Clone, Debug)]
pub struct Term {
    number: u64,
    pub(super) table: LeaseTable,
    looked_ns: u64,
    /// By node and the entry by which it came up.
    condemned: BTreeMap<(NodeId, LogIndex), Condemned>,
    /// Losses that were asked for: each has a number of its own.
    losses: u64,
}

impl Term {
    /// A term that begins: every node has the full time from now on, whatever the last leader knew.
    ///
    /// `now_ns` must lie after the quorum elected this leader.
    pub fn new(number: u64, now_ns: u64) -> Term {
        Term {
            number,
            table: LeaseTable::new(now_ns),
            looked_ns: now_ns,
            condemned: BTreeMap::new(),
            losses: 0,
        }
    }

    /// Which.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Grants a lease in answer to a heartbeat, and counts the lost-time from now.
    ///
    /// Call it just before the reply is handed to the network: whatever delays the reply after that only makes
    /// the node's lease shorter than the leader believes.
    ///
    /// # Errors
    /// Why it gets none. Not to grant is always safe: the node's time goes on from the last reply.
    pub fn grant(
        &mut self,
        state: &ClusterState,
        heartbeat: &Heartbeat,
        now_ns: u64,
    ) -> Result<Grant, LeaseRefusal> {
        let node = heartbeat.node;
        self.table.confirmed(heartbeat, now_ns);
        let up_since = state.nodes.get(&node).map(|known| known.up_since);
        if up_since.is_some_and(|since| self.is_condemned(node, since)) {
            return Err(LeaseRefusal::Condemned { node });
        }
        let grant = self.table.grant(state, heartbeat, now_ns)?;
        // A loss that was refused is over when the node has its lease again.
        if let Some(up_since) = up_since {
            self.condemned.remove(&(node, up_since));
        }
        Ok(grant)
    }

    /// Whether a node's loss may be in the log or on its way there.
    fn is_condemned(&self, node: NodeId, up_since: LogIndex) -> bool {
        self.condemned
            .get(&(node, up_since))
            .is_some_and(|condemned| !matches!(condemned.fate, Fate::Refused { .. }))
    }

    /// Looks for lost nodes; to be called regularly while this node leads. Nothing that was found before has
    /// to be answered first.
    pub fn look(&mut self, state: &ClusterState, now_ns: u64) -> Look {
        let stood_still = now_ns.saturating_sub(self.looked_ns) > STOOD_STILL_NS;
        self.looked_ns = now_ns;
        if stood_still {
            self.table = LeaseTable::new(now_ns);
        }
        // The log has decided: the node is not up by that entry any more.
        self.condemned.retain(|(node, up_since), _| {
            state
                .nodes
                .get(node)
                .is_some_and(|known| known.up_since == *up_since && known.liveness == Liveness::Up)
        });
        let mut losses = Vec::new();
        if !self.table.quorum_is_away(state, now_ns) {
            for (node, command) in self.table.lost(state, now_ns) {
                losses.extend(self.condemn(state, node, command, now_ns));
            }
            losses.extend(self.unknown_again(now_ns));
        }
        Look {
            losses,
            stood_still,
        }
    }

    /// A node is lost: a loss to propose, unless that is done or was refused a moment ago.
    fn condemn(
        &mut self,
        state: &ClusterState,
        node: NodeId,
        command: Command,
        now_ns: u64,
    ) -> Option<Loss> {
        let known = state.nodes.get(&node)?;
        let key = (node, known.up_since);
        let due = self.condemned.get(&key).is_none_or(
            |condemned| matches!(condemned.fate, Fate::Refused { again_ns } if again_ns <= now_ns),
        );
        if !due {
            return None;
        }
        self.losses += 1;
        let (term, number) = (self.number, self.losses);
        let request = format!("lost/{node}/{}/term-{term}/{number}", known.incarnation);
        let loss = Loss {
            node,
            up_since: known.up_since,
            request: RequestId(request),
            command,
        };
        let condemned = Condemned {
            loss: loss.clone(),
            fate: Fate::Proposed,
        };
        self.condemned.insert(key, condemned);
        Some(loss)
    }

    /// The losses that may be in the log and are to be asked for again, under the same ids.
    fn unknown_again(&mut self, now_ns: u64) -> Vec<Loss> {
        let due = self.condemned.values_mut().filter_map(|condemned| {
            if !matches!(condemned.fate, Fate::Unknown { again_ns } if again_ns <= now_ns) {
                return None;
            }
            condemned.fate = Fate::Proposed;
            Some(condemned.loss.clone())
        });
        due.collect()
    }

    /// A loss was answered, or its answer was given up.
    pub fn loss_answered(&mut self, loss: &Loss, outcome: LossOutcome, now_ns: u64) {
        let Some(condemned) = self.condemned.get_mut(&(loss.node, loss.up_since)) else {
            return;
        };
        if condemned.loss.request != loss.request {
            return;
        }
        let again_ns = now_ns.saturating_add(REASK_NS);
        condemned.fate = match outcome {
            // The next look sees it in the log.
            LossOutcome::Recorded => Fate::Proposed,
            LossOutcome::Unknown => Fate::Unknown { again_ns },
            LossOutcome::Refused => Fate::Refused { again_ns },
        };
    }

    /// When a node is to be declared lost, as things stand.
    pub fn lost_at_ns(&self, state: &ClusterState, node: NodeId) -> Option<u64> {
        let known = state.nodes.get(&node)?;
        Some(self.table.lost_at_ns(state, known))
    }
}
