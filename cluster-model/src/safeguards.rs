//! What stands between a guest and harm, each with a name, so that a test can leave one out and see the harm.
//!
//! A daemon has all of them: [`Safeguards::ALL`] is the only value that product code names (`tests/safeguards.rs` looks).
//! The simulation's mutants are this very code without one of them.

/// One of the node's safeguards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Safeguard {
    /// A permit needs a linearizable read begun after the claim was acknowledged.
    ConfirmAfterClaim,
    /// A permit lasts no longer than the lease that was held before the log was read.
    LeaseOfTheConfirm,
    /// A takeover waits for what is under way in the storage server.
    SettleOnTakeover,
    /// A takeover has the server write down what the last owner left in it.
    CommitOnTakeover,
    /// A guest runs only when every file has acknowledged its token.
    ClaimBeforeRun,
    /// A claim without a good answer burns its token.
    ClaimOnce,
    /// A cutover is proposed only when every file has acknowledged the token that it names.
    ClaimBeforeCutover,
    /// A source that said quiet runs again only under a token granted after the abort.
    QuietBinds,
    /// A monitor whose machine moved away is ended.
    VoidMonitorsEnd,
    /// A re-key of a machine with writes under way settles.
    RekeySettles,
    /// A machine that was told to stop did not shut itself down.
    StopIsNoShutDown,
    /// A frozen machine whose token has not moved is let run again, and not ended.
    FrozenThaws,
}

/// The safeguards that hold: all of them, but for a test's one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Safeguards {
    without: Option<Safeguard>,
}

impl Safeguards {
    /// Every safeguard.
    pub const ALL: Safeguards = Safeguards { without: None };

    /// Every safeguard but one: for tests and the simulation's mutants alone.
    pub const fn without(safeguard: Safeguard) -> Safeguards {
        Safeguards {
            without: Some(safeguard),
        }
    }

    /// Whether that safeguard holds.
    pub fn hold(self, safeguard: Safeguard) -> bool {
        self.without != Some(safeguard)
    }
}
