//! Node leases: the leader's table and the node's own deadline. Time is an argument, in nanoseconds of a
//! clock that never stops (`CLOCK_BOOTTIME`), each host its own.
//!
//! ```text
//!  node    ──sent──────────────────────► deadline = sent + freeze: its monitors freeze
//!             \
//!  leader      received ─ quorum confirms ─ replied ─────────────► replied + lost: the node is lost
//! ```
//!
//! The node counts from when it sent, the leader from when it replied, which is later, and `lost` is longer
//! than `freeze`: so the node has frozen before anybody is told that it is lost, as long as the two clocks
//! differ in rate by less than the margin. The disk's safety rests on none of this.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::command::Command;
use crate::event::Why;
use crate::ids::{Incarnation, LogIndex, NodeId};
use crate::state::{ClusterState, Liveness, Node};

/// Heartbeats that a node may have under way: older ones are forgotten, and their late replies are refused.
pub const UNDER_WAY_MAX: usize = 64;

const NS_IN_MS: u64 = 1_000_000;
/// A quorum that confirms nothing for this long is away, whatever the heartbeat.
const QUORUM_SILENT_NS: u64 = 1_000 * NS_IN_MS;

/// What the leader grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Counted by the node from when it sent the heartbeat, ms.
    pub lease_ms: u32,
}

/// Why a node gets no lease.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseRefusal {
    /// It does not belong to the cluster.
    #[error("{node} does not belong to this cluster")]
    Unknown {
        /// Which.
        node: NodeId,
    },
    /// The log knows another life of its host.
    #[error("{node} has not registered this life of its host yet")]
    OtherIncarnation {
        /// Which.
        node: NodeId,
    },
    /// It was lost, or has not registered.
    #[error("{node} is {is}; it must register first")]
    NotUp {
        /// Which.
        node: NodeId,
        /// How it stands.
        is: String,
    },
    /// The quorum was asked before the heartbeat came: the leader may have been deposed in between.
    #[error("the quorum has not confirmed the leader since the heartbeat of {node} came")]
    Unconfirmed {
        /// Which.
        node: NodeId,
    },
}

/// The leader's memory of its replies. Made anew by every new leader, and not replicated.
#[derive(Clone, Debug)]
pub struct LeaseTable {
    /// When this leader took over.
    since_ns: u64,
    /// Whether it has looked at the nodes since.
    looked: bool,
    /// When the quorum last confirmed this leader.
    confirmed_ns: u64,
    /// The quorum has been silent: no time counts against anybody.
    quorum_away: bool,
    seats: BTreeMap<NodeId, Seat>,
}

#[derive(Clone, Copy, Debug)]
struct Seat {
    incarnation: Incarnation,
    /// The entry by which the node came up: an older seat says nothing of it.
    up_since: LogIndex,
    /// When the last reply was sent; before the first, when the leader first saw the node up.
    replied_ns: u64,
    /// `lost_ms` at that reply: a setting made since must not cut a lease that runs.
    lost_ms: u32,
}

impl Seat {
    fn is_of(&self, node: &Node) -> bool {
        self.incarnation == node.incarnation && self.up_since == node.up_since
    }
}

impl LeaseTable {
    /// A new leader's table: every node has the full time from now on, whatever the last leader knew.
    ///
    /// `now_ns` must lie after the quorum elected this leader.
    pub fn new(now_ns: u64) -> LeaseTable {
        LeaseTable {
            since_ns: now_ns,
            looked: false,
            confirmed_ns: now_ns,
            quorum_away: false,
            seats: BTreeMap::new(),
        }
    }

    /// Grants a lease in answer to a heartbeat, and counts the lost-time from now.
    ///
    /// `confirmed_ns`: when the leader asked the quorum that then confirmed it; it must lie after
    /// `received_ns`, when the heartbeat came. The leader's own node asks by the same rule. Call it just before
    /// the reply is handed to the network: whatever delays the reply after that only makes the node's
    /// lease shorter than the leader believes.
    ///
    /// # Errors
    /// Why it gets none.
    pub fn grant(
        &mut self,
        state: &ClusterState,
        node: NodeId,
        incarnation: Incarnation,
        received_ns: u64,
        confirmed_ns: u64,
        now_ns: u64,
    ) -> Result<Grant, LeaseRefusal> {
        if confirmed_ns >= received_ns {
            self.confirmed_ns = self.confirmed_ns.max(now_ns);
        }
        let known = state
            .nodes
            .get(&node)
            .ok_or(LeaseRefusal::Unknown { node })?;
        if known.incarnation != incarnation {
            return Err(LeaseRefusal::OtherIncarnation { node });
        }
        let is = match known.liveness {
            Liveness::Up => None,
            Liveness::Joining => Some("joining"),
            Liveness::Lost => Some("lost"),
            Liveness::Quarantined => Some("quarantined"),
        };
        if let Some(is) = is {
            return Err(LeaseRefusal::NotUp {
                node,
                is: is.into(),
            });
        }
        if confirmed_ns < received_ns {
            return Err(LeaseRefusal::Unconfirmed { node });
        }
        self.seats.insert(
            node,
            Seat {
                incarnation,
                up_since: known.up_since,
                replied_ns: now_ns,
                lost_ms: state.settings.lost_ms,
            },
        );
        Ok(Grant {
            lease_ms: state.settings.freeze_ms,
        })
    }

    /// When a node is to be declared lost: the last reply (or the leader's beginning) and the lost-time,
    /// and an announced absence on top.
    pub fn lost_at_ns(&self, state: &ClusterState, node: &Node) -> u64 {
        let (since_ns, lost_ms) = match self.seats.get(&node.id) {
            Some(seat) if seat.is_of(node) => (seat.replied_ns, seat.lost_ms),
            // The last leader may have granted under a longer setting.
            _ => (self.since_ns, state.lost_ms_longest),
        };
        let lost_ms = lost_ms.max(state.settings.lost_ms);
        let wait_ms = u64::from(lost_ms) + u64::from(node.absent_ms.unwrap_or(0));
        since_ns.saturating_add(wait_ms * NS_IN_MS)
    }

    /// Seats every node that came up since the last look, with the full time from now on: it has yet to ask,
    /// and what was replied to it before it was lost counts no more.
    fn seat_newcomers(&mut self, state: &ClusterState, now_ns: u64) {
        let replied_ns = if self.looked { now_ns } else { self.since_ns };
        self.looked = true;
        for node in state
            .nodes
            .values()
            .filter(|node| node.liveness == Liveness::Up)
        {
            if !self
                .seats
                .get(&node.id)
                .is_some_and(|seat| seat.is_of(node))
            {
                let seat = Seat {
                    incarnation: node.incarnation,
                    up_since: node.up_since,
                    replied_ns,
                    // The last leader may have granted under a longer setting.
                    lost_ms: state.lost_ms_longest,
                };
                self.seats.insert(node.id, seat);
            }
        }
    }

    /// Whether the quorum has been silent for longer than its confirms are apart: the leader's own node asks
    /// for its lease every heartbeat. When it is back everybody gets the full time again, since nobody could
    /// have been granted anything meanwhile.
    fn quorum_is_away(&mut self, state: &ClusterState, now_ns: u64) -> bool {
        let heartbeats_ns = u64::from(state.settings.heartbeat_ms) * NS_IN_MS * 5 / 2;
        let silent_ns = now_ns.saturating_sub(self.confirmed_ns);
        let away = silent_ns > heartbeats_ns.max(QUORUM_SILENT_NS);
        if self.quorum_away && !away {
            *self = LeaseTable::new(now_ns);
        }
        self.quorum_away = away;
        away
    }

    /// The nodes to declare lost now; to be asked regularly, since a node that comes up has its time from
    /// the next look on.
    pub fn lost(&mut self, state: &ClusterState, now_ns: u64) -> Vec<Command> {
        if self.quorum_is_away(state, now_ns) {
            return Vec::new();
        }
        self.seat_newcomers(state, now_ns);
        state
            .nodes
            .values()
            .filter(|node| node.liveness == Liveness::Up)
            .filter(|node| now_ns >= self.lost_at_ns(state, node))
            .map(|node| {
                let since_ns = match self.seats.get(&node.id) {
                    Some(seat) if seat.is_of(node) => seat.replied_ns,
                    _ => self.since_ns,
                };
                Command::NodeLost {
                    node: node.id,
                    incarnation: node.incarnation,
                    why: Why::rule("no heartbeat was answered for the lost-time")
                        .with(
                            "last reply, ms ago",
                            now_ns.saturating_sub(since_ns) / NS_IN_MS,
                        )
                        .with("lost_ms", state.settings.lost_ms)
                        .with("announced absence, ms", node.absent_ms.unwrap_or(0)),
                }
            })
            .collect()
    }

    /// When the table has something to say next; for the leader's timer.
    pub fn next_ns(&self, state: &ClusterState) -> Option<u64> {
        state
            .nodes
            .values()
            .filter(|node| node.liveness == Liveness::Up)
            .map(|node| self.lost_at_ns(state, node))
            .min()
    }
}

/// The node's side: heartbeats sent, and until when its guests may run.
#[derive(Clone, Debug, Default)]
pub struct NodeLease {
    under_way: VecDeque<(u64, u64)>,
    sequence: u64,
    deadline_ns: u64,
}

impl NodeLease {
    /// A heartbeat is about to be sent; gives it its number.
    pub fn sending(&mut self, now_ns: u64) -> u64 {
        self.sequence += 1;
        self.under_way.push_back((self.sequence, now_ns));
        if self.under_way.len() > UNDER_WAY_MAX {
            self.under_way.pop_front();
        }
        self.sequence
    }

    /// A grant came in answer to a heartbeat. Gives the deadline if it moved.
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
    /// Gives the new deadline, or `None` if the lease has run out by now.
    pub fn absence_committed(&mut self, now_ns: u64, duration_ms: u32) -> Option<u64> {
        if !self.valid(now_ns) {
            return None;
        }
        self.deadline_ns = self
            .deadline_ns
            .saturating_add(u64::from(duration_ms) * NS_IN_MS);
        Some(self.deadline_ns)
    }

    /// Until when guests may run; 0 before the first grant.
    pub fn deadline_ns(&self) -> u64 {
        self.deadline_ns
    }

    /// Whether guests may run now.
    pub fn valid(&self, now_ns: u64) -> bool {
        now_ns < self.deadline_ns
    }
}
