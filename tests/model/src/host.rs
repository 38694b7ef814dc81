//! One node: its host, its lease, its monitor and what its `clusterd` is about.

use crate::log::Token;

/// The nodes, by the part that they have in the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    /// Runs the machine at first.
    Source,
    /// Receives it.
    Destination,
    /// Has no part in the migration, and may take over.
    Third,
}

impl Node {
    /// All of them.
    pub const ALL: [Node; 3] = [Node::Source, Node::Destination, Node::Third];
}

/// The machine's copy on one node: what its monitor does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Guest {
    /// There is no monitor.
    None,
    /// Destination: memory arrives. A destination that is not complete is one that does not propose the cutover.
    Receiving,
    /// The guest executes.
    Running,
    /// The lease ran out: it may thaw under the token that it has.
    Frozen,
    /// Refused by the server, or between two tokens: it runs again only under a newer one.
    Held,
    /// Source: it said *quiet*.
    Quiet,
}

/// How far the claim of one token has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flow {
    /// Nothing is under way.
    Idle,
    /// SETATTR was sent and not answered.
    Claiming,
    /// Every file acknowledged.
    Claimed,
    /// What the server had let in before the claim has landed.
    Settled,
    /// The log, read after the acknowledgement, says that the token is current.
    Confirmed,
}

/// One node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    /// Whether the host is alive.
    pub up: bool,
    /// Whether its node lease is valid, as the node itself counts.
    pub lease: bool,
    /// The copy of the machine.
    pub guest: Guest,
    /// The token that the monitor stands under; 0 without one.
    pub token: Token,
    /// The grant that began the monitor's image of memory; 0 without one.
    pub image: Token,
    /// What is under way.
    pub flow: Flow,
    /// The token that the flow claims; 0 without a flow.
    pub claim: Token,
    /// Whether the flow must settle.
    pub settle: bool,
    /// Tokens up to this one may have been claimed by this node: none of them is ever claimed again.
    pub begun: Token,
    /// The machine's token when its monitor died here: the one that a `Release` gives up; 0 without a death.
    pub died_under: Token,
}

impl Host {
    /// A node without the machine.
    pub const IDLE: Host = Host {
        up: true,
        lease: true,
        guest: Guest::None,
        token: 0,
        image: 0,
        flow: Flow::Idle,
        claim: 0,
        settle: false,
        begun: 0,
        died_under: 0,
    };

    /// Forgets what was under way. Whatever was sent stays under way in the network.
    pub fn forget_flow(&mut self) {
        self.flow = Flow::Idle;
        self.claim = 0;
        self.settle = false;
    }

    /// Ends the monitor.
    pub fn end_guest(&mut self) {
        self.guest = Guest::None;
        self.token = 0;
        self.image = 0;
    }
}
