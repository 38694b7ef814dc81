//! The replicated log as the nodes see it: commands that compare and set, each applied whole or not at all.

use crate::protocol::Mutant;
use crate::state::{NodeId, Token};

/// A migration that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Migration {
    /// The token that the destination will own the machine under.
    pub reserved: Token,
    /// The destination's registration when it was reserved: one that came back may have claimed it before.
    pub session: u8,
    /// How often it was replaced because the destination had burnt it.
    pub renewals: u8,
}

/// The state that the log's entries add up to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Log {
    /// Who owns the machine.
    pub owner: NodeId,
    /// The owner's registration when it became that.
    pub session: u8,
    /// The owner boots the machine afresh: it became owner by a loss.
    pub boot: bool,
    /// The token.
    pub token: Token,
    /// The next token.
    pub next: Token,
    /// The migration, while it is under way.
    pub migration: Option<Migration>,
    /// Each node's registration.
    pub sessions: [u8; 3],
    /// A cutover was applied.
    pub cut: bool,
    /// An abort was applied.
    pub aborted: bool,
    /// A token was set that was not above the one before.
    pub fell: bool,
}

/// A command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Command {
    /// The destination has everything and has claimed.
    Cutover {
        /// The source's token.
        expects: Token,
        /// The token that was claimed.
        claimed: Token,
        /// The destination's registration.
        session: u8,
    },
    /// Ends the migration.
    Abort,
    /// The owner wants a fresh token.
    Rekey {
        /// Who.
        node: NodeId,
        /// Its token.
        expects: Token,
    },
    /// The destination burnt the reserved token.
    Renew {
        /// Which.
        burnt: Token,
    },
    /// A node is declared lost and its machine goes to another.
    Lost {
        /// Which registration of which node.
        node: NodeId,
        /// See `node`.
        session: u8,
        /// Where the machine goes if it was the owner.
        to: NodeId,
    },
}

/// A reserved token is replaced so often.
const RENEWALS_MAX: u8 = 2;

impl Log {
    fn take(&mut self) -> Token {
        let token = self.next;
        self.next += 1;
        token
    }

    fn set_token(&mut self, token: Token) {
        self.fell |= token <= self.token;
        self.token = token;
    }

    /// Applies a command; false if its conditions do not hold.
    pub(crate) fn apply(&mut self, command: Command, mutant: Option<Mutant>) -> bool {
        let is = |which: Mutant| mutant == Some(which);
        match command {
            Command::Cutover {
                expects,
                claimed,
                session,
            } => {
                let Some(migration) = self.migration else {
                    return false;
                };
                if self.token != expects
                    || migration.reserved != claimed
                    || self.sessions[NodeId::D as usize] != session
                {
                    return false;
                }
                self.owner = NodeId::D;
                self.session = session;
                self.boot = false;
                self.set_token(claimed);
                self.next = self.next.max(claimed + 1);
                self.migration = None;
                self.cut = true;
                true
            }
            Command::Abort => {
                if self.migration.is_none() && !(is(Mutant::LateAbortApplies) && self.cut) {
                    return false;
                }
                self.migration = None;
                self.aborted = true;
                if self.cut {
                    self.owner = NodeId::S;
                }
                true
            }
            Command::Rekey { node, expects } => {
                if self.owner != node || self.token != expects {
                    return false;
                }
                let token = self.take();
                self.set_token(token);
                if !is(Mutant::RekeyLeavesReserved) {
                    self.reserve_again();
                }
                true
            }
            Command::Renew { burnt } => {
                let renewed = self.migration.is_some_and(|migration| {
                    migration.reserved == burnt && migration.renewals < RENEWALS_MAX
                });
                if renewed {
                    self.reserve_again();
                    if let Some(migration) = &mut self.migration {
                        migration.renewals += 1;
                    }
                }
                renewed
            }
            Command::Lost { node, session, to } => {
                if self.sessions[node as usize] != session {
                    return false;
                }
                if self.migration.is_some() && node != NodeId::T {
                    self.migration = None;
                    self.aborted = true;
                }
                if self.owner == node {
                    let token = self.take();
                    self.set_token(token);
                    self.owner = to;
                    self.session = self.sessions[to as usize];
                    self.boot = true;
                }
                true
            }
        }
    }

    fn reserve_again(&mut self) {
        if self.migration.is_some() {
            let reserved = self.take();
            let session = self.sessions[NodeId::D as usize];
            if let Some(migration) = &mut self.migration {
                migration.reserved = reserved;
                migration.session = session;
            }
        }
    }
}
