//! How a monitor stands, and what may happen to it next: a pure table.
//!
//! ```text
//!            permit              lease lapsed
//!   READY ────────────► RUNNING ─────────────► FROZEN ── permit ──► RUNNING
//!                       ▲  │  │  disk refused
//!   INCOMING            │  │  └──────────────► REFUSED ── re-key, permit ──► RUNNING
//!     │ arrived         │  │ stopping for the cutover
//!     ▼                 │  ▼
//!   COMPLETE ── permit ─┤ STOPPING ── said quiet ──► QUIET ── re-key, permit ──► RUNNING
//!                       └──┘ given up: FROZEN, or RUNNING by the permit it had
//!   any ── shut down ──► STOPPED      any ── failed ──► FAILED
//! ```
//!
//! A lapse while STOPPING leads to FROZEN: disks that drain are still written to. QUIET is a promise: a lapse, an
//! extension or a bare permit leads nowhere from it. What the guest itself asked for just before it was stopped, a
//! shutdown or a reset, is kept in both ([`GuestEnd`]).
//!
//! The monitors of `vmm` and of the simulation take their steps from this one table.

use crate::agent::MonitorPhase;

/// How the monitor stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Built, waiting for its first permit.
    Ready,
    /// The guest runs.
    Running,
    /// The lease ran out: vCPUs stopped, I/O held.
    Frozen,
    /// A disk wants a fresh token.
    Refused {
        /// The disks have it; a permit may follow.
        rekeyed: bool,
    },
    /// Source of a migration: vCPUs stopped, disks draining; nothing is promised yet.
    Stopping,
    /// Source of a migration, stopped for the cutover by its own promise.
    Quiet {
        /// The log has said abort and the disks have a fresh token; a permit may follow.
        rekeyed: bool,
    },
    /// Destination of a migration: memory is arriving.
    Incoming,
    /// Destination: all arrived and verified.
    Complete,
    /// The machine was stopped or shut itself down; disks are flushed.
    Stopped,
    /// The guest or the monitor failed.
    Failed,
}

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A valid permit.
    Permitted,
    /// The deadline passed.
    LeaseLapsed,
    /// A disk says it needs a re-key.
    DiskRefused,
    /// All disks have taken up a fresh token.
    Rekeyed,
    /// The vCPUs are being stopped for the cutover.
    StopForCutover,
    /// The promise is given: *quiet* is about to be sent.
    SaidQuiet,
    /// The cutover was given up before *quiet*.
    GaveUp,
    /// The memory and the devices' state are here and verified.
    Arrived,
    /// The guest ended, or was stopped.
    ShutDown,
    /// The guest or the monitor cannot go on.
    Failed,
}

/// When it takes effect that the guest has shut down, asked for a reset, or failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// The machine ends here.
    Now,
    /// Where the guest is let go next: here after a cutover that was given up, at the destination after one that was
    /// not. Until it is known which of them, neither may end the machine.
    WhereItRunsNext,
    /// The machine has ended.
    Over,
}

/// What is not allowed, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{event} is not possible while the machine is {phase}")]
pub struct NotNow {
    /// How it stands.
    pub phase: Phase,
    /// What was tried.
    pub event: Event,
}

impl Phase {
    /// The phase after `event`.
    ///
    /// # Errors
    /// When the event must not happen in this phase.
    pub fn after(self, event: Event) -> Result<Phase, NotNow> {
        use Phase::{
            Complete, Failed, Frozen, Incoming, Quiet, Ready, Refused, Running, Stopped, Stopping,
        };
        let refused = Err(NotNow { phase: self, event });
        match event {
            Event::Permitted => match self {
                Ready | Frozen | Complete | Running => Ok(Running),
                Refused { rekeyed: true } | Quiet { rekeyed: true } => Ok(Running),
                Refused { rekeyed: false } | Quiet { rekeyed: false } => refused,
                Stopping | Incoming | Stopped | Failed => refused,
            },
            Event::LeaseLapsed => match self {
                Running | Stopping => Ok(Frozen),
                Ready
                | Frozen
                | Refused { .. }
                | Quiet { .. }
                | Incoming
                | Complete
                | Stopped
                | Failed => Ok(self),
            },
            Event::DiskRefused => match self {
                Running | Frozen | Ready | Stopping | Refused { .. } => {
                    Ok(Refused { rekeyed: false })
                }
                Quiet { .. } => Ok(Quiet { rekeyed: false }),
                // A destination's disks are not its own yet: what they say counts once it runs.
                Incoming | Complete | Stopped | Failed => Ok(self),
            },
            Event::Rekeyed => match self {
                Ready | Frozen | Incoming | Complete => Ok(self),
                Refused { .. } => Ok(Refused { rekeyed: true }),
                Quiet { .. } => Ok(Quiet { rekeyed: true }),
                Running | Stopping | Stopped | Failed => refused,
            },
            Event::StopForCutover => match self {
                Running => Ok(Stopping),
                Ready
                | Frozen
                | Refused { .. }
                | Stopping
                | Quiet { .. }
                | Incoming
                | Complete
                | Stopped
                | Failed => refused,
            },
            Event::SaidQuiet => match self {
                // Whatever else happened since the stop, a re-key above all, has taken the machine out of the
                // attempt's hands: it may run by now, and a promise would be a lie.
                Stopping => Ok(Quiet { rekeyed: false }),
                Ready
                | Running
                | Frozen
                | Refused { .. }
                | Quiet { .. }
                | Incoming
                | Complete
                | Stopped
                | Failed => refused,
            },
            Event::GaveUp => match self {
                Stopping => Ok(Frozen),
                Ready
                | Running
                | Frozen
                | Refused { .. }
                | Quiet { .. }
                | Incoming
                | Complete
                | Stopped
                | Failed => Ok(self),
            },
            Event::Arrived => match self {
                Incoming => Ok(Complete),
                Ready
                | Running
                | Frozen
                | Refused { .. }
                | Stopping
                | Quiet { .. }
                | Complete
                | Stopped
                | Failed => refused,
            },
            Event::ShutDown => match self {
                Ready | Running | Frozen | Stopping | Refused { .. } | Stopped => Ok(Stopped),
                // What these hold is not theirs to flush: a source said quiet, a destination never ran.
                Quiet { .. } | Incoming | Complete | Failed => refused,
            },
            Event::Failed => match self {
                Stopped => Ok(Stopped),
                Ready
                | Running
                | Frozen
                | Refused { .. }
                | Stopping
                | Quiet { .. }
                | Incoming
                | Complete
                | Failed => Ok(Failed),
            },
        }
    }

    /// When it takes effect here that the guest has ended itself.
    pub fn guest_end(self) -> GuestEnd {
        match self {
            Phase::Stopping | Phase::Quiet { .. } => GuestEnd::WhereItRunsNext,
            Phase::Ready
            | Phase::Running
            | Phase::Frozen
            | Phase::Refused { .. }
            | Phase::Incoming
            | Phase::Complete => GuestEnd::Now,
            Phase::Stopped | Phase::Failed => GuestEnd::Over,
        }
    }

    /// Whether the guest's vCPUs are let go.
    pub fn is_running(self) -> bool {
        self == Phase::Running
    }

    /// As its node sees it.
    pub fn seen(self) -> MonitorPhase {
        match self {
            Phase::Ready => MonitorPhase::Ready,
            // Still in its own right, and back to running if the cutover is given up.
            Phase::Running | Phase::Stopping => MonitorPhase::Running,
            Phase::Frozen => MonitorPhase::Frozen,
            Phase::Refused { .. } => MonitorPhase::Refused,
            Phase::Quiet { .. } => MonitorPhase::Quiet,
            Phase::Incoming => MonitorPhase::Incoming,
            Phase::Complete => MonitorPhase::Complete,
            Phase::Stopped => MonitorPhase::Stopped,
            Phase::Failed => MonitorPhase::Failed,
        }
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Phase::Ready => "ready",
            Phase::Running => "running",
            Phase::Frozen => "frozen",
            Phase::Refused { rekeyed: false } => "refused by its storage",
            Phase::Refused { rekeyed: true } => "re-keyed",
            Phase::Stopping => "stopping for its cutover",
            Phase::Quiet { rekeyed: false } => "quiet",
            Phase::Quiet { rekeyed: true } => "quiet and re-keyed",
            Phase::Incoming => "incoming",
            Phase::Complete => "complete",
            Phase::Stopped => "stopped",
            Phase::Failed => "failed",
        })
    }
}

impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Event::Permitted => "to run",
            Event::LeaseLapsed => "a lapse",
            Event::DiskRefused => "a refusal",
            Event::Rekeyed => "a re-key",
            Event::StopForCutover => "to stop for a cutover",
            Event::SaidQuiet => "to say quiet",
            Event::GaveUp => "to give a cutover up",
            Event::Arrived => "an arrival",
            Event::ShutDown => "to stop",
            Event::Failed => "a failure",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHASES: [Phase; 12] = [
        Phase::Ready,
        Phase::Running,
        Phase::Frozen,
        Phase::Refused { rekeyed: false },
        Phase::Refused { rekeyed: true },
        Phase::Stopping,
        Phase::Quiet { rekeyed: false },
        Phase::Quiet { rekeyed: true },
        Phase::Incoming,
        Phase::Complete,
        Phase::Stopped,
        Phase::Failed,
    ];

    const EVENTS: [Event; 10] = [
        Event::Permitted,
        Event::LeaseLapsed,
        Event::DiskRefused,
        Event::Rekeyed,
        Event::StopForCutover,
        Event::SaidQuiet,
        Event::GaveUp,
        Event::Arrived,
        Event::ShutDown,
        Event::Failed,
    ];

    #[test]
    fn the_table_is_the_one_drawn() {
        use Phase::{
            Complete, Failed, Frozen, Incoming, Quiet, Ready, Refused, Running, Stopped, Stopping,
        };
        let table = [
            (Ready, Event::Permitted, Running),
            (Running, Event::LeaseLapsed, Frozen),
            (Frozen, Event::Permitted, Running),
            (Running, Event::DiskRefused, Refused { rekeyed: false }),
            (Frozen, Event::DiskRefused, Refused { rekeyed: false }),
            (
                Refused { rekeyed: false },
                Event::Rekeyed,
                Refused { rekeyed: true },
            ),
            (
                Refused { rekeyed: true },
                Event::DiskRefused,
                Refused { rekeyed: false },
            ),
            (Refused { rekeyed: true }, Event::Permitted, Running),
            (Running, Event::StopForCutover, Stopping),
            (Stopping, Event::SaidQuiet, Quiet { rekeyed: false }),
            (Stopping, Event::GaveUp, Frozen),
            (Stopping, Event::LeaseLapsed, Frozen),
            (Stopping, Event::DiskRefused, Refused { rekeyed: false }),
            (
                Quiet { rekeyed: false },
                Event::Rekeyed,
                Quiet { rekeyed: true },
            ),
            (Quiet { rekeyed: true }, Event::Permitted, Running),
            (Incoming, Event::Arrived, Complete),
            (Complete, Event::Permitted, Running),
            (Frozen, Event::ShutDown, Stopped),
            (Incoming, Event::Failed, Failed),
        ];
        for (phase, event, next) in table {
            assert_eq!(phase.after(event), Ok(next), "{phase} after {event}");
        }
    }

    #[test]
    fn only_a_permit_leads_to_running() {
        for phase in PHASES {
            for event in EVENTS {
                if phase.after(event) == Ok(Phase::Running) && phase != Phase::Running {
                    assert_eq!(event, Event::Permitted, "{phase}");
                }
            }
        }
    }

    #[test]
    fn a_machine_that_said_quiet_runs_only_after_a_re_key_and_then_a_permit() {
        // Every sequence of three events from QUIET: one that runs has a re-key before its permit.
        for first in EVENTS {
            for second in EVENTS {
                for third in EVENTS {
                    let mut phase = Phase::Quiet { rekeyed: false };
                    let mut rekeyed = false;
                    for event in [first, second, third] {
                        if let Ok(next) = phase.after(event) {
                            phase = next;
                        }
                        rekeyed |= event == Event::Rekeyed;
                        assert!(
                            phase != Phase::Running || rekeyed,
                            "{first}, {second}, {third}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn quiet_is_said_only_by_a_machine_that_has_been_stopping_ever_since() {
        for phase in PHASES {
            let quiet = phase.after(Event::SaidQuiet);
            assert_eq!(quiet.is_ok(), phase == Phase::Stopping, "{phase}");
        }
        // And one that left that phase comes back to it by running first.
        for phase in PHASES {
            for event in EVENTS {
                if phase != Phase::Stopping && phase.after(event) == Ok(Phase::Stopping) {
                    assert_eq!((phase, event), (Phase::Running, Event::StopForCutover));
                }
            }
        }
    }

    #[test]
    fn what_the_guest_asked_for_is_kept_exactly_while_a_cutover_decides_where_it_runs() {
        for phase in PHASES {
            let expected = match phase {
                Phase::Stopping | Phase::Quiet { .. } => GuestEnd::WhereItRunsNext,
                Phase::Stopped | Phase::Failed => GuestEnd::Over,
                _ => GuestEnd::Now,
            };
            assert_eq!(phase.guest_end(), expected, "{phase}");
            // Kept, it is lost on no way out: every one leads through a permit, which lets the guest go, or to an end.
            if expected == GuestEnd::WhereItRunsNext {
                for event in EVENTS {
                    let next = phase.after(event).unwrap_or(phase);
                    assert!(
                        next != Phase::Running || event == Event::Permitted,
                        "{event}"
                    );
                    assert_ne!(next, Phase::Ready, "{event}");
                }
            }
        }
    }

    #[test]
    fn what_ended_never_runs_again() {
        for phase in [Phase::Stopped, Phase::Failed] {
            for event in EVENTS {
                let next = phase.after(event).unwrap_or(phase);
                assert_eq!(next, phase, "{event}");
            }
        }
    }
}
