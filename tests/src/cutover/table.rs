//! The rows. In the order of DESIGN's table: who fails, when; each with the moments of the cutover at which it differs.

use super::Deed::{
    Applied, Cut, CutOneWay, Heal, Isolate, IsolateFromNodes, KillDaemon, KillHost, KillMonitor,
    Lost, Reached, Release, StartDaemon, StaysStopped, StopDaemon, WaitsStopped,
};
use super::Outcome::{Continues, ContinuesRekeyed, Moves, Restarts};
use super::Party::{Destination, Source, Third};
use super::Point::{Copying, Held, HeldThen};
use super::{Deed, Outcome, Party, Point, Row};

const fn row(
    name: &'static str,
    leader: Party,
    point: Point,
    deeds: &'static [Deed],
    outcomes: &'static [Outcome],
) -> Row {
    Row {
        name,
        leader,
        point,
        deeds,
        outcomes,
        landing: false,
    }
}

/// A row that every landing plays.
const fn landing(row: Row) -> Row {
    Row {
        landing: true,
        ..row
    }
}

const CLAIMING: Point = Held(&[(Destination, "agent.before_claim")]);
const CLAIMED: Point = Held(&[(Destination, "agent.after_claim")]);
/// In doubt: the source is quiet, the destination has everything and every claim, and the log knows nothing of it.
const IN_DOUBT: Point = Held(&[(Destination, "agent.before_cutover")]);
const COMMITTED: Point = Held(&[(Destination, "agent.after_cutover")]);
const PERMITTING: Point = Held(&[(Destination, "agent.before_permit")]);
const PERMITTED: Point = Held(&[(Destination, "agent.after_permit")]);
const REBORN: &[Deed] = &[KillDaemon(Destination), Release, StartDaemon(Destination)];

/// Every row.
pub const TABLE: &[Row] = &[
    // The destination, or the link, before the cutover commits: abort, the source continues.
    landing(row(
        "the destination's monitor dies while memory arrives",
        Third,
        Copying,
        &[KillMonitor(Destination)],
        &[Continues],
    )),
    row(
        "the destination's monitor dies as it begins",
        Third,
        Held(&[(Destination, "sink.setup")]),
        &[KillMonitor(Destination), Release],
        &[Continues],
    ),
    row(
        "the destination's monitor dies when a round has arrived",
        Third,
        Held(&[(Destination, "sink.round")]),
        &[KillMonitor(Destination), Release],
        &[Continues],
    ),
    landing(row(
        "the destination's monitor dies when all but everything arrived",
        Third,
        Held(&[(Destination, "sink.before_complete")]),
        &[KillMonitor(Destination), Release],
        &[ContinuesRekeyed],
    )),
    row(
        "the destination dies while memory is copied",
        Third,
        Copying,
        &[KillHost(Destination)],
        &[Continues],
    ),
    row(
        "the destination dies before the source sends",
        Third,
        Held(&[(Source, "agent.before_send")]),
        &[KillHost(Destination), Release],
        &[Continues],
    ),
    row(
        "the destination dies before it claims",
        Third,
        CLAIMING,
        &[KillHost(Destination)],
        &[ContinuesRekeyed],
    ),
    row(
        "the destination dies when it has claimed",
        Third,
        CLAIMED,
        &[KillHost(Destination)],
        &[ContinuesRekeyed],
    ),
    landing(row(
        "the destination dies in doubt",
        Third,
        IN_DOUBT,
        &[KillHost(Destination)],
        &[ContinuesRekeyed],
    )),
    row(
        "the link is cut while memory is copied",
        Third,
        Copying,
        &[Cut(Source, Destination)],
        &[Continues],
    ),
    row(
        "the link is cut in doubt, and the log decides without it",
        Third,
        IN_DOUBT,
        &[Cut(Source, Destination), Release],
        &[Moves, ContinuesRekeyed],
    ),
    row(
        "nobody proposes the abort for a while and the source waits for it",
        Third,
        HeldThen(
            (Destination, "sink.before_complete"),
            &[
                (Destination, "agent.before_abort"),
                (Source, "agent.before_abort"),
            ],
        ),
        &[
            KillMonitor(Destination),
            Reached(Source, "agent.before_abort"),
            WaitsStopped(Source),
            Release,
        ],
        &[ContinuesRekeyed],
    ),
    row(
        "the source's daemon dies before it proposes the abort and comes back",
        Third,
        HeldThen(
            (Destination, "sink.before_complete"),
            &[
                (Destination, "agent.before_abort"),
                (Source, "agent.before_abort"),
            ],
        ),
        &[
            KillMonitor(Destination),
            Reached(Source, "agent.before_abort"),
            KillDaemon(Source),
            Release,
            StartDaemon(Source),
        ],
        &[ContinuesRekeyed],
    ),
    row(
        "the source's daemon dies after its abort and comes back",
        Third,
        HeldThen(
            (Destination, "sink.before_complete"),
            &[
                (Destination, "agent.before_abort"),
                (Source, "agent.after_abort"),
            ],
        ),
        &[
            KillMonitor(Destination),
            Reached(Source, "agent.after_abort"),
            KillDaemon(Source),
            Release,
            StartDaemon(Source),
        ],
        &[ContinuesRekeyed],
    ),
    // Its daemon alone dies and comes back: the image is there, and the log decides.
    row(
        "the destination's daemon dies before it claims and comes back",
        Third,
        CLAIMING,
        REBORN,
        &[Moves, ContinuesRekeyed],
    ),
    row(
        "the destination's daemon dies when it has claimed and comes back",
        Third,
        CLAIMED,
        REBORN,
        &[Moves, ContinuesRekeyed],
    ),
    row(
        "the destination's daemon dies in doubt and comes back",
        Third,
        IN_DOUBT,
        REBORN,
        &[Moves, ContinuesRekeyed],
    ),
    // The source before the cutover commits, the destination complete: the cutover stands.
    landing(row(
        "the source dies in doubt and the machine survives it",
        Third,
        IN_DOUBT,
        &[KillHost(Source), Release],
        &[Moves],
    )),
    row(
        "the source's monitor dies in doubt and the machine survives it",
        Third,
        IN_DOUBT,
        &[KillMonitor(Source), Release],
        &[Moves, Restarts],
    ),
    row(
        "the source's monitor dies when the destination has everything and the machine survives it",
        Third,
        HeldThen(
            (Source, "source.after_final"),
            &[(Destination, "agent.before_cutover")],
        ),
        &[
            Reached(Destination, "agent.before_cutover"),
            KillHost(Source),
            Release,
        ],
        &[Moves],
    ),
    row(
        "a cutover that comes after the loss of its source is refused",
        Third,
        IN_DOUBT,
        &[KillHost(Source), Lost(Source), Release],
        &[Restarts],
    ),
    // The source before the cutover commits, the destination incomplete: failover.
    row(
        "the source dies while memory is copied",
        Third,
        Copying,
        &[KillHost(Source)],
        &[Restarts],
    ),
    row(
        "the source dies before it sends",
        Third,
        Held(&[(Source, "agent.before_send")]),
        &[KillHost(Source), Release],
        &[Restarts],
    ),
    row(
        "the source's monitor dies as it begins to send",
        Third,
        Held(&[(Source, "source.setup")]),
        &[KillMonitor(Source), Release],
        &[Restarts],
    ),
    row(
        "the source's monitor dies between two rounds",
        Third,
        Held(&[(Source, "source.round")]),
        &[KillMonitor(Source), Release],
        &[Restarts],
    ),
    row(
        "the source's monitor dies before quiet",
        Third,
        Held(&[(Source, "source.before_quiet")]),
        &[KillMonitor(Source), Release],
        &[Restarts],
    ),
    landing(row(
        "the source's monitor dies after quiet, before its state is sent",
        Third,
        Held(&[(Source, "source.after_quiet")]),
        &[KillMonitor(Source), Release],
        &[Restarts],
    )),
    row(
        "the source dies before it proposes the abort",
        Third,
        HeldThen(
            (Destination, "sink.before_complete"),
            &[
                (Destination, "agent.before_abort"),
                (Source, "agent.before_abort"),
            ],
        ),
        &[
            KillMonitor(Destination),
            Reached(Source, "agent.before_abort"),
            KillHost(Source),
            Release,
        ],
        &[Restarts],
    ),
    // The leader, any time: the new one has the log; proposals are made again.
    row(
        "the leader dies while memory is copied",
        Third,
        Copying,
        &[KillHost(Third)],
        &[Moves],
    ),
    row(
        "the leader dies in doubt",
        Third,
        IN_DOUBT,
        &[KillHost(Third), Release],
        &[Moves],
    ),
    row(
        "the leader dies with the cutover in its hands, before it is written",
        Third,
        IN_DOUBT,
        &[
            StopDaemon(Third),
            Release,
            WaitsStopped(Source),
            KillHost(Third),
        ],
        &[Moves],
    ),
    landing(row(
        "the leader dies after the cutover is written, before its answer is heard",
        Third,
        IN_DOUBT,
        &[
            CutOneWay(Third, Destination),
            Release,
            Applied(Source),
            KillHost(Third),
            Heal,
        ],
        &[Moves],
    )),
    landing(row(
        "the leader dies in doubt and was the source",
        Source,
        IN_DOUBT,
        &[KillHost(Source), Release],
        &[Moves],
    )),
    row(
        "the leader dies in doubt and was the destination",
        Destination,
        IN_DOUBT,
        &[KillHost(Destination)],
        &[ContinuesRekeyed],
    ),
    row(
        "the leader dies after the cutover and was the destination",
        Destination,
        COMMITTED,
        &[KillHost(Destination)],
        &[Restarts],
    ),
    row(
        "the leader dies while memory is copied and was the source",
        Source,
        Copying,
        &[KillHost(Source)],
        &[Restarts],
    ),
    row(
        "the leader dies while memory is copied and was the destination",
        Destination,
        Copying,
        &[KillHost(Destination)],
        &[Continues],
    ),
    // The destination after the cutover commits: it was lost as the owner.
    row(
        "the destination dies after the cutover",
        Third,
        COMMITTED,
        &[KillHost(Destination)],
        &[Restarts],
    ),
    landing(row(
        "the destination dies before its permit",
        Third,
        PERMITTING,
        &[KillHost(Destination)],
        &[Restarts],
    )),
    row(
        "the destination dies after its permit",
        Third,
        PERMITTED,
        &[KillHost(Destination)],
        &[Restarts],
    ),
    row(
        "the destination's monitor dies when it is to run",
        Third,
        Held(&[(Destination, "run.before")]),
        &[KillMonitor(Destination), Release],
        &[Restarts],
    ),
    row(
        "the destination's monitor dies when it has begun to run",
        Third,
        Held(&[(Destination, "run.after")]),
        &[KillMonitor(Destination), Release],
        &[Restarts],
    ),
    row(
        "the destination's monitor dies as the last of it is complete",
        Third,
        Held(&[(Destination, "sink.after_complete")]),
        &[KillMonitor(Destination), Release],
        &[ContinuesRekeyed, Restarts],
    ),
    row(
        "the destination's daemon dies after the cutover and comes back",
        Third,
        COMMITTED,
        REBORN,
        &[Moves],
    ),
    row(
        "the destination's daemon dies before its permit and comes back",
        Third,
        PERMITTING,
        REBORN,
        &[Moves],
    ),
    row(
        "the destination's daemon dies after its permit and comes back",
        Third,
        PERMITTED,
        REBORN,
        &[Moves],
    ),
    // Either side cut off from the quorum: it stays stopped, the other side's command decides.
    landing(row(
        "a source cut off in doubt stays stopped while the destination cuts over",
        Third,
        IN_DOUBT,
        &[Isolate(Source), Release, StaysStopped(Source), Heal],
        &[Moves],
    )),
    landing(row(
        "a destination cut off in doubt stays stopped while the abort is decided",
        Third,
        IN_DOUBT,
        &[
            IsolateFromNodes(Destination),
            Release,
            StaysStopped(Destination),
            Heal,
        ],
        &[ContinuesRekeyed],
    )),
    row(
        "a source cut off in doubt stays stopped until it is lost and the machine restarts",
        Third,
        IN_DOUBT,
        &[Isolate(Source), StaysStopped(Source), Release, Heal],
        &[Restarts],
    ),
    row(
        "a source cut off while memory is copied freezes and the machine restarts",
        Third,
        Copying,
        &[Isolate(Source), Lost(Source), WaitsStopped(Source), Heal],
        &[Restarts],
    ),
    row(
        "a destination cut off while memory is copied",
        Third,
        Copying,
        &[
            IsolateFromNodes(Destination),
            StaysStopped(Destination),
            Heal,
        ],
        &[Continues],
    ),
    row(
        "a destination cut off after the cutover is lost and the machine restarts",
        Third,
        COMMITTED,
        &[
            Isolate(Destination),
            Lost(Destination),
            Release,
            WaitsStopped(Destination),
            Heal,
        ],
        &[Restarts],
    ),
];
