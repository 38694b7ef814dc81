//! What the world is like at one moment.

use crate::log::{Command, Log};

/// A node: the source, the destination, and one that only takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NodeId {
    /// Where the machine runs at the beginning.
    S,
    /// Where it migrates to.
    D,
    /// The third.
    T,
}

impl NodeId {
    /// All of them.
    pub const ALL: [NodeId; 3] = [NodeId::S, NodeId::D, NodeId::T];
}

/// A fencing token.
pub type Token = u8;

/// What a node's monitor of the machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// There is none.
    Idle,
    /// It runs the guest.
    Running(Token),
    /// Its lease ran out while it ran.
    Frozen(Token),
    /// A source that has said *quiet*: it runs again only by an applied abort.
    Quiet(Token),
    /// Its I/O is held: it has asked for a fresh token in place of this one.
    Rekeying {
        /// The token it had.
        old: Token,
        /// A WRITE of the old token is unanswered: settle before running.
        settle: bool,
    },
    /// A SETATTR of this token is out.
    Claiming {
        /// The token.
        token: Token,
        /// The server has executed it.
        executed: bool,
        /// It must settle before it runs.
        settle: bool,
    },
    /// The claim was acknowledged.
    Claimed {
        /// The token.
        token: Token,
        /// It must still settle.
        settle: bool,
    },
    /// A read that began after the acknowledgement showed the token current (or, in a destination, the cutover
    /// applied): it may run.
    Confirmed(Token),
}

/// A node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    /// Its monitor.
    pub phase: Phase,
    /// It is there at all.
    pub alive: bool,
    /// It holds its lease.
    pub lease: bool,
    /// Declared lost, and not registered since.
    pub lost: bool,
    /// Counts its registrations.
    pub session: u8,
    /// The newest token that it has begun to claim in this life.
    pub begun: Token,
    /// Its monitor has the guest's memory of before the migration, or a copy of it.
    pub image: bool,
}

/// Where a WRITE is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WriteAt {
    /// On its way to the server.
    Sent,
    /// The server has let it through; it lands later.
    Checked,
}

/// A WRITE that has not landed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Write {
    /// Whose.
    pub node: NodeId,
    /// The token under which its guest ran.
    pub token: Token,
    /// Where it is.
    pub at: WriteAt,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// The log.
    pub log: Log,
    /// Commands that were proposed and not yet committed, in order (their order does not matter).
    pub proposals: Vec<Command>,
    /// The nodes, S, D, T.
    pub nodes: [Node; 3],
    /// The disk file's group.
    pub group: u8,
    /// SETATTRs on their way, by the group they set.
    pub setattrs: Vec<u8>,
    /// WRITEs on their way.
    pub writes: Vec<Write>,
    /// The newest token under which a guest has run.
    pub activated: Token,
    /// A WRITE of an older activation landed after a newer one had begun.
    pub landed_late: bool,
    /// What has been used of the bounds.
    pub used: Used,
}

/// What has been used of the bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Used {
    /// WRITEs sent.
    pub writes: u8,
    /// Tokens asked for without need, or because a claim was burnt.
    pub rekeys: u8,
    /// Nodes declared lost.
    pub losses: u8,
    /// Crashes.
    pub crashes: u8,
    /// Aborts proposed.
    pub aborts: u8,
    /// Leases run out.
    pub lapses: u8,
}

impl State {
    /// That node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    /// That node.
    pub(crate) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id as usize]
    }

    /// Who runs the guest.
    pub fn running(&self) -> impl Iterator<Item = (NodeId, Token)> + '_ {
        NodeId::ALL
            .into_iter()
            .filter_map(|id| match self.node(id).phase {
                Phase::Running(token) => Some((id, token)),
                _ => None,
            })
    }

    /// Whether a node has WRITEs without an answer.
    pub(crate) fn unanswered(&self, id: NodeId) -> bool {
        self.writes.iter().any(|write| write.node == id)
    }

    /// Proposes a command, unless the same one is on its way.
    pub(crate) fn propose(&mut self, command: Command) {
        if let Err(at) = self.proposals.binary_search(&command) {
            self.proposals.insert(at, command);
        }
    }
}
