//! The replicated log, as the sum of what was applied: who owns the machine, and how its migration stands.
//!
//! Proposals may be lost, stay pending, commit late, or be refused when they commit. Most commands compare
//! and set: what they compare is true only while their reason to be proposed stands or stood. Such a command is
//! modelled as an entry that may commit at any step at which its comparison holds, or never. That is every delay
//! (it commits later), every loss (it never does) and every refusal (its comparison failed), and more: an
//! entry may also commit that nobody would have proposed. Two proposals carry what the log cannot compare, and
//! are kept as pending ones from when they are sent: the cutover (*every file has acknowledged*) and the loss of
//! a node (*its lease has run out*).
//!
//! A pending cutover under a token that is no longer reserved can never apply, since tokens are not reserved
//! twice; it is forgotten at once, and so `expects` need not be kept.

use crate::host::Node;

/// A token; 0 is none.
pub type Token = u8;

/// How the migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// There was none.
    None,
    /// `StartMigration` is applied.
    Active,
    /// `Cutover` is applied: `reserved` became the machine's token.
    CutOver,
    /// `AbortMigration` is applied, or a party was lost.
    Aborted,
}

/// The latest migration, from the source to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Migration {
    /// How it stands.
    pub phase: Phase,
    /// The token reserved for the destination.
    pub reserved: Token,
    /// The source's promise, in the words of the protocol *quiet*: what is sent counts as said.
    pub quiet: bool,
    /// A `Rekey` was applied since the abort: what a quiet source waits for.
    pub rekeyed: bool,
    /// A `Cutover` under `reserved` was proposed.
    pub cutover_pending: bool,
    /// Its cutover took effect. Kept beside the phase so that a broken log can show both.
    pub cutover_applied: bool,
    /// Its abort took effect.
    pub abort_applied: bool,
}

/// What the log says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Log {
    /// The owner.
    pub owner: Option<Node>,
    /// The owner's token.
    pub token: Token,
    /// The grant that began the present image of the machine's memory; a re-key keeps it.
    pub image: Token,
    /// The last token taken from the counter.
    pub token_last: Token,
    /// The latest migration.
    pub migration: Migration,
    /// Nodes that are declared lost, by [`Node`].
    pub lost: [bool; 3],
    /// Nodes whose loss is proposed: the leader grants them no lease until it knows the outcome.
    pub condemned: [bool; 3],
    /// An owner got a token that was not above the last owner's.
    pub token_fell: bool,
    /// Migrations begun.
    pub migrations: u8,
    /// `Rekey` entries applied.
    pub rekeys: u8,
    /// `RenewMigrationToken` entries applied.
    pub renewals: u8,
}

impl Log {
    /// The source owns the machine under token 1.
    pub fn new() -> Log {
        Log {
            owner: Some(Node::Source),
            token: 1,
            image: 1,
            token_last: 1,
            migration: Migration {
                phase: Phase::None,
                reserved: 0,
                quiet: false,
                rekeyed: false,
                cutover_pending: false,
                cutover_applied: false,
                abort_applied: false,
            },
            lost: [false; 3],
            condemned: [false; 3],
            token_fell: false,
            migrations: 0,
            rekeys: 0,
            renewals: 0,
        }
    }

    /// Whether a migration is under way.
    pub fn migrating(&self) -> bool {
        self.migration.phase == Phase::Active
    }

    /// Takes the next token from the counter.
    pub fn take_token(&mut self) -> Token {
        self.token_last += 1;
        self.token_last
    }

    /// Writes an ownership record; `image` is kept by a re-key only.
    pub fn grant(&mut self, owner: Option<Node>, token: Token, image: Token) {
        self.token_fell |= token <= self.token;
        self.owner = owner;
        self.token = token;
        self.image = image;
    }

    /// The active migration ends by an abort; no token changes.
    pub fn abort(&mut self) {
        self.migration.phase = Phase::Aborted;
        self.migration.abort_applied = true;
    }

    /// Takes the machine from a node that is lost or began anew, and ends what it had a part in.
    pub fn take_from(&mut self, node: Node) {
        if self.owner == Some(node) {
            let token = self.take_token();
            self.grant(None, token, token);
        }
        if self.migrating() && node != Node::Third {
            self.abort();
        }
    }
}

impl Default for Log {
    fn default() -> Log {
        Log::new()
    }
}
