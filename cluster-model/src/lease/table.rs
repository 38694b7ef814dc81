//! The leader's memory of its replies, and what follows from it: who is lost.

use std::collections::BTreeMap;

use super::{Grant, Heartbeat, LeaseRefusal, NS_IN_MS};
use crate::command::Command;
use crate::event::Why;
use crate::ids::{Incarnation, LogIndex, NodeId};
use crate::state::{Absence, ClusterState, Liveness, Node};

/// A quorum that confirms nothing for this long is away, whatever the heartbeat.
const QUORUM_SILENT_NS: u64 = 1_000 * NS_IN_MS;

/// The leader's memory of its replies. Made anew by every new leader, and not replicated.
#[derive(Clone, Debug)]
pub(super) struct LeaseTable {
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
    /// The announced absence that this leader saw last, and until when monitors may go by it.
    absence: Option<(LogIndex, u64)>,
    /// What the node must have applied to use the oldest grant that it has not shown to have used, and when
    /// that was given.
    owes: Option<(LogIndex, u64)>,
}

impl Seat {
    fn is_of(&self, node: &Node) -> bool {
        self.incarnation == node.incarnation && self.up_since == node.up_since
    }
}

/// How long monitors may go by an absence, as this clock may count it: the two clocks' rates differ by what
/// the margin between the freeze and the loss allows, over this longer time too.
fn absence_ns(state: &ClusterState, absence: &Absence) -> u64 {
    let (lost_ms, freeze_ms) = (state.settings.lost_ms, state.settings.freeze_ms.max(1));
    let scaled_ms = u64::from(absence.duration_ms) * u64::from(lost_ms) / u64::from(freeze_ms);
    scaled_ms.max(u64::from(absence.duration_ms)) * NS_IN_MS
}

impl LeaseTable {
    /// A new leader's table: every node has the full time from now on, whatever the last leader knew.
    pub(super) fn new(now_ns: u64) -> LeaseTable {
        LeaseTable {
            since_ns: now_ns,
            looked: false,
            confirmed_ns: now_ns,
            quorum_away: false,
            seats: BTreeMap::new(),
        }
    }

    /// A heartbeat came, whoever's: the quorum has confirmed this leader since.
    pub(super) fn confirmed(&mut self, heartbeat: &Heartbeat, now_ns: u64) {
        if heartbeat.confirmed_ns >= heartbeat.received_ns {
            self.confirmed_ns = self.confirmed_ns.max(now_ns);
        }
    }

    /// Grants a lease in answer to a heartbeat, and counts the lost-time from now.
    pub(super) fn grant(
        &mut self,
        state: &ClusterState,
        heartbeat: &Heartbeat,
        now_ns: u64,
    ) -> Result<Grant, LeaseRefusal> {
        let node = heartbeat.node;
        let known = state
            .nodes
            .get(&node)
            .ok_or(LeaseRefusal::Unknown { node })?;
        if known.incarnation != heartbeat.incarnation {
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
        if heartbeat.confirmed_ns < heartbeat.received_ns {
            return Err(LeaseRefusal::Unconfirmed { node });
        }
        self.note_absence(state, known);
        let seat = self.seats.get_mut(&node).filter(|seat| seat.is_of(known));
        let owes = match seat {
            Some(seat) => {
                seat.owes = seat.owes.filter(|(owed, _)| heartbeat.applied < *owed);
                seat.owes
            }
            None => None,
        };
        let patience_ns = u64::from(state.settings.freeze_ms) * NS_IN_MS;
        if let Some((owed, since_ns)) = owes
            && now_ns.saturating_sub(since_ns) > patience_ns
        {
            return Err(LeaseRefusal::Behind {
                node,
                applied: heartbeat.applied,
                owed,
            });
        }
        let absence = self.seats.get(&node).and_then(|seat| seat.absence);
        self.seats.insert(
            node,
            Seat {
                incarnation: known.incarnation,
                up_since: known.up_since,
                replied_ns: now_ns,
                lost_ms: state.settings.lost_ms,
                absence,
                owes: owes.or(Some((heartbeat.needs, now_ns))),
            },
        );
        Ok(Grant {
            lease_ms: state.settings.freeze_ms,
        })
    }

    /// From when the node's time counts, and how much of it there is, ms.
    fn counted(&self, state: &ClusterState, node: &Node) -> (u64, u32) {
        let (since_ns, lost_ms) = match self.seats.get(&node.id) {
            Some(seat) if seat.is_of(node) => (seat.replied_ns, seat.lost_ms),
            // The last leader may have granted under a longer setting.
            _ => (self.since_ns, state.lost_ms_longest),
        };
        (since_ns, lost_ms.max(state.settings.lost_ms))
    }

    /// When a node is to be declared lost: the last reply (or the leader's beginning) and the lost-time, and
    /// not before an announced absence has passed.
    pub(super) fn lost_at_ns(&self, state: &ClusterState, node: &Node) -> u64 {
        let (since_ns, lost_ms) = self.counted(state, node);
        let lost_at_ns = since_ns.saturating_add(u64::from(lost_ms) * NS_IN_MS);
        let Some(absence) = &node.absence else {
            return lost_at_ns;
        };
        let seen = self.seats.get(&node.id).filter(|seat| seat.is_of(node));
        let until_ns = match seen.and_then(|seat| seat.absence) {
            Some((since, until_ns)) if since == absence.since => until_ns,
            _ => lost_at_ns.saturating_add(absence_ns(state, absence)),
        };
        lost_at_ns.max(until_ns)
    }

    /// Counts an absence from the last reply before this leader saw it: what was replied since, to the life
    /// that came back, gives its monitors no more of it.
    fn note_absence(&mut self, state: &ClusterState, node: &Node) {
        let Some(absence) = &node.absence else {
            return;
        };
        let (since_ns, lost_ms) = self.counted(state, node);
        let lost_ns = u64::from(lost_ms) * NS_IN_MS;
        let until_ns = since_ns
            .saturating_add(lost_ns)
            .saturating_add(absence_ns(state, absence));
        if let Some(seat) = self.seats.get_mut(&node.id)
            && seat.is_of(node)
            && seat.absence.is_none_or(|(since, _)| since != absence.since)
        {
            seat.absence = Some((absence.since, until_ns));
        }
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
                    absence: None,
                    owes: None,
                };
                self.seats.insert(node.id, seat);
            }
            self.note_absence(state, node);
        }
    }

    /// Whether the quorum has been silent for longer than its confirms are apart: the leader's own node asks
    /// for its lease every heartbeat. When it is back everybody gets the full time again, since nobody could
    /// have been granted anything meanwhile.
    pub(super) fn quorum_is_away(&mut self, state: &ClusterState, now_ns: u64) -> bool {
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
    pub(super) fn lost(&mut self, state: &ClusterState, now_ns: u64) -> Vec<(NodeId, Command)> {
        self.seat_newcomers(state, now_ns);
        state
            .nodes
            .values()
            .filter(|node| node.liveness == Liveness::Up)
            .filter(|node| now_ns >= self.lost_at_ns(state, node))
            .map(|node| (node.id, self.loss(state, node, now_ns)))
            .collect()
    }

    fn loss(&self, state: &ClusterState, node: &Node, now_ns: u64) -> Command {
        let (since_ns, _) = self.counted(state, node);
        let absence_ms = node.absence.map_or(0, |absence| absence.duration_ms);
        Command::NodeLost {
            node: node.id,
            incarnation: node.incarnation,
            why: Why::rule("no heartbeat was answered for the lost-time")
                .with(
                    "last reply, ms ago",
                    now_ns.saturating_sub(since_ns) / NS_IN_MS,
                )
                .with("lost_ms", state.settings.lost_ms)
                .with("announced absence, ms", absence_ms),
        }
    }
}
