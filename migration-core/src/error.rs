//! What can go wrong, on which side, and what it means for the machine.

use std::io;
use thiserror::Error;

/// What the monitor's own code failed with.
pub type HostError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// A migration that did not complete, seen from the source.
///
/// The engine has resumed nothing. `said_quiet` decides who may:
/// - `false`: the promise was not given. If `machine_stopped` the monitor may let the machine go on
///   under the permit it has; else it never stopped.
/// - `true`: the machine stays stopped until the log says *abort* (and the monitor was re-keyed).
#[derive(Debug, Error)]
#[error("could not send the machine{}: {cause}", if *said_quiet { " (after quiet)" } else { "" })]
pub struct SendFailed {
    /// Whether *Quiet* was sent, or may have been.
    pub said_quiet: bool,
    /// Whether `pause` was called.
    pub machine_stopped: bool,
    /// What happened.
    #[source]
    pub cause: SendError,
}

/// Why the source could not go on.
#[derive(Debug, Error)]
pub enum SendError {
    /// The caller's options or the machine's memory are not something that can be sent.
    #[error("cannot start: {0}")]
    Refused(String),
    /// No connection to the destination.
    #[error("could not connect channel {channel} to the destination: {source}")]
    Connect {
        /// Which channel.
        channel: u16,
        /// The system's answer.
        source: io::Error,
    },
    /// A connection broke.
    #[error("the connection of channel {channel} broke: {source}")]
    Connection {
        /// Which channel.
        channel: u16,
        /// The system's answer.
        source: io::Error,
    },
    /// Nothing was heard from the destination for the bound of silence.
    #[error("the destination has been silent for {silent_ms} ms on channel {channel}")]
    PeerSilent {
        /// Which channel.
        channel: u16,
        /// The bound that passed.
        silent_ms: u64,
    },
    /// What the destination said is not of the protocol.
    #[error("the destination's answer on channel {channel} does not verify: {source}")]
    Protocol {
        /// Which channel.
        channel: u16,
        /// What is wrong with it.
        source: FrameError,
    },
    /// The destination said why it gave up.
    #[error("the destination refused: {0}")]
    Destination(String),
    /// The monitor's own part failed.
    #[error("could not {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The monitor's answer.
        source: HostError,
    },
    /// A bound passed.
    #[error("{what} took longer than {limit_ms} ms")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// The bound.
        limit_ms: u64,
    },
    /// The policy found no way to stay within the downtime.
    #[error("does not converge: {0}")]
    GaveUp(crate::policy::GiveUp),
    /// Memory changed although the machine was stopped and drained.
    #[error("{pages} pages changed after the machine was stopped: a device still writes memory")]
    StillChanging {
        /// Pages dirty at the last look.
        pages: u64,
    },
    /// The caller cancelled before *Quiet*.
    #[error("cancelled")]
    Cancelled,
}

/// Why the destination could not go on. The machine that was arriving must be thrown away.
#[derive(Debug, Error)]
pub enum ReceiveError {
    /// No source with the right ticket came in time.
    #[error("no source with the ticket of migration {migration_id} came within {limit_ms} ms")]
    NoSource {
        /// The migration waited for.
        migration_id: u64,
        /// The bound.
        limit_ms: u64,
    },
    /// The port itself failed.
    #[error("could not accept connections: {0}")]
    Accept(#[source] io::Error),
    /// A connection broke or ended before everything had arrived.
    #[error("the connection of channel {channel} broke: {source}")]
    Connection {
        /// Which channel.
        channel: u16,
        /// The system's answer.
        source: io::Error,
    },
    /// Nothing was heard from the source for the bound of silence.
    #[error("the source has been silent for {silent_ms} ms on channel {channel}")]
    PeerSilent {
        /// Which channel.
        channel: u16,
        /// The bound that passed.
        silent_ms: u64,
    },
    /// What the source sent is not of the protocol, or does not verify.
    #[error("what arrived on channel {channel} does not verify: {source}")]
    Protocol {
        /// Which channel.
        channel: u16,
        /// What is wrong with it.
        source: FrameError,
    },
    /// The source's memory is not laid out like this machine's.
    #[error("the source's memory does not fit this machine: {0}")]
    Regions(String),
    /// The source said why it gave up.
    #[error("the source gave up: {0}")]
    Source(String),
    /// The monitor's own part failed.
    #[error("could not {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The monitor's answer.
        source: HostError,
    },
    /// A bound passed.
    #[error("{what} took longer than {limit_ms} ms")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// The bound.
        limit_ms: u64,
    },
    /// The caller cancelled.
    #[error("cancelled")]
    Cancelled,
}

/// What can be wrong with bytes that should be frames.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    /// Not this protocol at all.
    #[error("the magic number is {found:#010x}: this is no migration stream")]
    Magic {
        /// What stood there.
        found: u32,
    },
    /// A header that was changed on its way.
    #[error("the checksum of a header is wrong")]
    HeaderChecksum,
    /// A payload that was changed on its way.
    #[error("the checksum of frame {sequence} is wrong")]
    PayloadChecksum {
        /// The frame's place on its channel.
        sequence: u32,
    },
    /// A kind that this version does not know.
    #[error("frames of kind {kind} are unknown here")]
    UnknownKind {
        /// The number that stood there.
        kind: u8,
    },
    /// Longer than its kind may be.
    #[error("a {kind} frame of {length} bytes is longer than the {limit} that are allowed")]
    TooLong {
        /// Its kind.
        kind: &'static str,
        /// What the header says.
        length: u32,
        /// What is allowed.
        limit: u32,
    },
    /// A frame is missing or came twice.
    #[error("frame {found} came where {expected} was due")]
    Sequence {
        /// The number due.
        expected: u32,
        /// The number that came.
        found: u32,
    },
    /// A payload that its kind cannot have.
    #[error("a {kind} frame is malformed: {what}")]
    Malformed {
        /// Its kind.
        kind: &'static str,
        /// What is wrong.
        what: &'static str,
    },
    /// A frame that has no place here.
    #[error("a {kind} frame has no place here: {what}")]
    Unexpected {
        /// Its kind.
        kind: &'static str,
        /// Why not.
        what: &'static str,
    },
    /// Pages outside the machine's memory, or on a channel that does not carry them.
    #[error("a run of {count} pages at page {first_page} of region {region} is {what}")]
    Pages {
        /// Region index.
        region: u32,
        /// First page.
        first_page: u64,
        /// How many.
        count: u32,
        /// What is wrong with them.
        what: &'static str,
    },
    /// The two sides have no version in common.
    #[error(
        "the peer speaks versions {theirs_min} to {theirs_max}, this side {ours_min} to {ours_max}"
    )]
    Version {
        /// The peer's oldest.
        theirs_min: u16,
        /// The peer's newest.
        theirs_max: u16,
        /// Ours.
        ours_min: u16,
        /// Ours.
        ours_max: u16,
    },
    /// Everything is there and the sums differ.
    #[error("what arrived is not what was sent: {what} (sent {sent}, arrived {arrived})")]
    Digest {
        /// Which figure.
        what: &'static str,
        /// The source's.
        sent: u64,
        /// Ours.
        arrived: u64,
    },
}
