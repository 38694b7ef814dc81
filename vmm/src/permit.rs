//! The run permit: without one no function of this program lets the guest run, and each is used once.
//!
//! A [`RunPermit`] has private fields and one constructor, which compares what came over the control
//! socket with what this monitor knows. It is not `Clone`; [`crate::gate::Gate::run`] takes it by value.

use cluster_model::ids::{LogIndex, Token, VmId};
use proto::monitor as wire;

/// What a permit must agree with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// This monitor's machine.
    pub vm: VmId,
    /// Drawn when this monitor started.
    pub nonce: u64,
    /// The highest token that any call has shown this monitor.
    pub highest_token: Token,
    /// The token that this machine's disks are under.
    pub disk_token: Token,
}

/// The right to let the guest run, once, under one token and until one deadline.
#[derive(Debug, PartialEq, Eq)]
pub struct RunPermit {
    token: Token,
    log_index: LogIndex,
    deadline_ns: u64,
    /// It let the guest run before, and came back when the guest was stopped.
    kept: bool,
}

/// Why a permit was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PermitRefused {
    /// It is for another machine.
    #[error("the permit is for {permit}, and this monitor runs {here}")]
    OtherMachine {
        /// Whose it is.
        permit: VmId,
        /// This monitor's.
        here: VmId,
    },
    /// It is for another life of this machine's monitor.
    #[error(
        "the permit carries the nonce of another monitor: ask this one for its own with Describe"
    )]
    OtherMonitor,
    /// A newer token has been seen.
    #[error(
        "the permit is for {permit}, and this monitor has seen {highest}: the machine has moved on"
    )]
    OlderToken {
        /// The permit's token.
        permit: Token,
        /// The highest seen.
        highest: Token,
    },
    /// The disks are not under its token yet.
    #[error("the permit is for {permit}, and the disks are under {disks}: re-key first")]
    NotRekeyed {
        /// The permit's token.
        permit: Token,
        /// The disks' token.
        disks: Token,
    },
    /// Its lease has run out already.
    #[error("the permit's lease ended {late_ns} ns ago: renew it first")]
    DeadlinePassed {
        /// By how much.
        late_ns: u64,
    },
}

impl RunPermit {
    /// Makes a permit of the wire's form, which must have come from the control socket, at
    /// CLOCK_BOOTTIME `now_ns`.
    ///
    /// # Errors
    /// See [`PermitRefused`].
    pub fn new(
        permit: &wire::RunPermit,
        expected: &Expected,
        now_ns: u64,
    ) -> Result<RunPermit, PermitRefused> {
        let token = Token(permit.token);
        if VmId(permit.vm_id) != expected.vm {
            return Err(PermitRefused::OtherMachine {
                permit: VmId(permit.vm_id),
                here: expected.vm,
            });
        }
        if permit.nonce != expected.nonce {
            return Err(PermitRefused::OtherMonitor);
        }
        if token < expected.highest_token {
            return Err(PermitRefused::OlderToken {
                permit: token,
                highest: expected.highest_token,
            });
        }
        if token != expected.disk_token {
            return Err(PermitRefused::NotRekeyed {
                permit: token,
                disks: expected.disk_token,
            });
        }
        if now_ns >= permit.lease_deadline_ns {
            return Err(PermitRefused::DeadlinePassed {
                late_ns: now_ns - permit.lease_deadline_ns,
            });
        }
        Ok(RunPermit {
            token,
            log_index: LogIndex(permit.log_index),
            deadline_ns: permit.lease_deadline_ns,
            kept: false,
        })
    }

    /// Under which token.
    pub fn token(&self) -> Token {
        self.token
    }

    /// The log entry it rests on.
    pub fn log_index(&self) -> LogIndex {
        self.log_index
    }

    /// The same right, to be used again: until the gate's deadline, which may be moved meanwhile.
    pub(crate) fn kept(self, deadline_ns: u64) -> RunPermit {
        RunPermit {
            deadline_ns: self.deadline_ns.max(deadline_ns),
            kept: true,
            ..self
        }
    }

    /// Whether it was used before.
    pub(crate) fn is_kept(&self) -> bool {
        self.kept
    }

    /// Until when, CLOCK_BOOTTIME nanoseconds.
    pub fn deadline_ns(&self) -> u64 {
        self.deadline_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPECTED: Expected = Expected {
        vm: VmId(7),
        nonce: 99,
        highest_token: Token(12),
        disk_token: Token(12),
    };

    fn permit() -> wire::RunPermit {
        wire::RunPermit {
            vm_id: 7,
            token: 12,
            log_index: 40,
            lease_deadline_ns: 1_000,
            nonce: 99,
        }
    }

    #[test]
    fn a_permit_that_agrees_is_accepted() {
        let accepted = RunPermit::new(&permit(), &EXPECTED, 999).unwrap();
        assert_eq!(
            (accepted.token(), accepted.deadline_ns()),
            (Token(12), 1_000)
        );
    }

    #[test]
    fn a_permit_for_another_machine_is_refused() {
        let wrong = wire::RunPermit {
            vm_id: 8,
            ..permit()
        };
        let refused = PermitRefused::OtherMachine {
            permit: VmId(8),
            here: VmId(7),
        };
        assert_eq!(RunPermit::new(&wrong, &EXPECTED, 0), Err(refused));
    }

    #[test]
    fn a_permit_for_another_monitor_is_refused() {
        let wrong = wire::RunPermit {
            nonce: 98,
            ..permit()
        };
        assert_eq!(
            RunPermit::new(&wrong, &EXPECTED, 0),
            Err(PermitRefused::OtherMonitor)
        );
    }

    #[test]
    fn a_permit_with_an_older_token_is_refused() {
        let wrong = wire::RunPermit {
            token: 11,
            ..permit()
        };
        let refused = PermitRefused::OlderToken {
            permit: Token(11),
            highest: Token(12),
        };
        assert_eq!(RunPermit::new(&wrong, &EXPECTED, 0), Err(refused));
    }

    #[test]
    fn a_permit_for_the_disks_token_is_refused_once_a_newer_token_was_seen() {
        let expected = Expected {
            highest_token: Token(13),
            ..EXPECTED
        };
        let refused = PermitRefused::OlderToken {
            permit: Token(12),
            highest: Token(13),
        };
        assert_eq!(RunPermit::new(&permit(), &expected, 0), Err(refused));
    }

    #[test]
    fn a_permit_whose_token_the_disks_do_not_bear_is_refused() {
        let wrong = wire::RunPermit {
            token: 13,
            ..permit()
        };
        let refused = PermitRefused::NotRekeyed {
            permit: Token(13),
            disks: Token(12),
        };
        assert_eq!(RunPermit::new(&wrong, &EXPECTED, 0), Err(refused));
    }

    #[test]
    fn a_permit_past_its_deadline_is_refused() {
        for (now, late_ns) in [(1_000, 0), (1_500, 500)] {
            assert_eq!(
                RunPermit::new(&permit(), &EXPECTED, now),
                Err(PermitRefused::DeadlinePassed { late_ns })
            );
        }
    }
}
