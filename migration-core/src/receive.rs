//! The destination's driver: lets the source in, takes what it sends, and says when it is whole.
//!
//! ```text
//!  Waiting ──ticket──► Setup ──regions──► Incoming ──Quiet──► QuietReceived ──Final, verified, loaded──► Complete
//!     └──────────────────┴───────────────────┴───────────────────┴──── any error, cancel ──► Failed
//! ```
//!
//! *Complete* needs nothing more of the source: from the moment that *Final* has verified, its death
//! changes nothing here.

mod channel;
mod door;
mod intake;

use crate::clock::monotonic_ns;
use crate::error::ReceiveError;
use crate::frame::{ChannelTotals, Final, Frame, Kind, encode_error};
use crate::machine::MigrationSink;
use crate::net::Acceptor;
use crate::options::{Credentials, ReceiveOptions};
use crate::pages::{PAGE_SIZE, total_pages};
use crate::stats::{ReceiveStage, ReceiveStatus, Received};
use channel::{Channel, Report};
use door::Admitted;
use intake::Arrived;
pub(crate) use intake::{Intake, Shared};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

/// How often the status is published while nothing else happens.
const PUBLISH_EVERY: Duration = Duration::from_millis(100);

/// Reports that wait for the driver at most; then the thread that writes memory waits.
const REPORTS_MAX: usize = 64;

/// How long a broken connection is given to yield the source's own reason.
const REASON_WAIT: Duration = Duration::from_millis(200);

/// How long the source may take to read why it was refused, or that all is complete.
const GOODBYE_MAX: Duration = Duration::from_millis(300);

/// Takes a machine from the source that shows `credentials`.
///
/// Returns when everything has arrived, was verified and is loaded, the machine not running; or with the
/// reason why not, and then what arrived must be thrown away. One call takes one migration: the ticket is spent
/// whatever comes of it.
pub async fn receive<S: MigrationSink + ?Sized>(
    acceptor: Arc<dyn Acceptor>,
    credentials: Credentials,
    sink: Arc<S>,
    options: ReceiveOptions,
    status: watch::Sender<ReceiveStatus>,
    cancel: CancellationToken,
) -> Result<Received, ReceiveError> {
    let mut tasks = JoinSet::new();
    let (admitted, visitors) = mpsc::channel(1);
    tasks.spawn(door::keep(acceptor, credentials, options.clone(), admitted));
    let (sender, reports) = mpsc::channel(REPORTS_MAX);
    let regions = sink.regions();
    status.send_modify(|status| {
        *status = ReceiveStatus::default();
        status.memory_total_bytes = total_pages(&regions).saturating_mul(PAGE_SIZE as u64);
    });
    let mut driver = Driver {
        shared: Arc::new(Shared::new(regions)),
        sink,
        deadline: Deadline::new("waiting for the source", options.source_timeout),
        credentials,
        options,
        status,
        visitors,
        sender,
        reports,
        channels: BTreeMap::new(),
        announced: 0,
        set_up: false,
        ended: BTreeMap::new(),
        last: None,
        tasks,
    };
    // A cancel wins over whatever the driver waits for; what it waits for is never half done.
    let result = tokio::select! {
        biased;
        () = cancel.cancelled() => Err(ReceiveError::Cancelled),
        result = driver.run() => result,
    };
    driver.close(result).await
}

/// The bound of the phase under way.
struct Deadline {
    what: &'static str,
    limit: Duration,
    at: Instant,
}

impl Deadline {
    fn new(what: &'static str, limit: Duration) -> Deadline {
        Deadline {
            what,
            limit,
            at: Instant::now() + limit,
        }
    }
}

struct Driver<S: ?Sized> {
    sink: Arc<S>,
    shared: Arc<Shared>,
    credentials: Credentials,
    options: ReceiveOptions,
    status: watch::Sender<ReceiveStatus>,
    deadline: Deadline,
    visitors: mpsc::Receiver<Result<Admitted, ReceiveError>>,
    sender: mpsc::Sender<Report>,
    reports: mpsc::Receiver<Report>,
    channels: BTreeMap<u16, Channel>,
    /// Channels the source will open.
    announced: u16,
    set_up: bool,
    /// Per channel that has sent its last page, what it carried.
    ended: BTreeMap<u16, ChannelTotals>,
    last: Option<(Final, Vec<u8>)>,
    tasks: JoinSet<()>,
}

impl<S: MigrationSink + ?Sized> Driver<S> {
    async fn run(&mut self) -> Result<u64, ReceiveError> {
        let mut tick = interval(PUBLISH_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if let Some((last, state)) = self.take_whole() {
                return self.finish(last, state).await;
            }
            let deadline = self.deadline.at;
            // Copying itself is bounded by the source: it answers for each round, or falls silent.
            let bounded = self.status.borrow().stage != ReceiveStage::Incoming;
            tokio::select! {
                biased;
                Some(visitor) = self.visitors.recv() => self.admit(visitor?),
                Some((channel, report)) = self.reports.recv() => match report {
                    Ok(arrived) => self.note(channel, arrived),
                    Err(error) => return Err(self.weigh(error).await),
                },
                _ = tick.tick() => {
                    if self.publish() && self.status.borrow().stage == ReceiveStage::QuietReceived {
                        // What remains may be much and the link slow: only a standstill ends it.
                        self.expect_more();
                    }
                }
                () = tokio::time::sleep_until(deadline), if bounded => return Err(self.too_late()),
            }
        }
    }

    fn admit(&mut self, visitor: Admitted) {
        let Admitted {
            channel,
            channels,
            reader,
            writer,
        } = visitor;
        if channel == 0 {
            self.announced = channels;
            self.deadline = Deadline::new("setting up", self.options.setup_timeout);
            self.status
                .send_modify(|status| status.stage = ReceiveStage::Setup);
        }
        let sink = Arc::clone(&self.sink);
        let intake = Intake::new(sink, Arc::clone(&self.shared), channel, channels);
        let opened = channel::start(
            channel,
            (reader, writer),
            intake,
            self.sender.clone(),
            self.options.heartbeat,
            &mut self.tasks,
        );
        self.channels.insert(channel, opened);
        self.begin();
    }

    /// Lets the source begin, once the regions fit and every channel is open, whichever came last.
    fn begin(&mut self) {
        if self.set_up && self.channels.len() == usize::from(self.announced) {
            self.answer(0, Frame::new(Kind::Ready, &[]));
            self.status.send_modify(|status| {
                status.stage = ReceiveStage::Incoming;
                status.round = 1;
            });
        }
    }

    fn note(&mut self, channel: u16, arrived: Arrived) {
        match arrived {
            Arrived::Setup => {
                self.set_up = true;
                self.begin();
            }
            Arrived::RoundEnd(mark, totals) => {
                if mark.last {
                    self.ended.insert(channel, totals);
                } else {
                    self.answer(channel, mark.encode(Kind::RoundAck));
                    self.status
                        .send_modify(|status| status.round = status.round.max(mark.round + 1));
                }
            }
            Arrived::Quiet { at_ns } => {
                self.expect_more();
                self.status.send_modify(|status| {
                    status.stage = ReceiveStage::QuietReceived;
                    status.quiet_received_ns = at_ns;
                });
            }
            Arrived::Final(last, state) => {
                self.status
                    .send_modify(|status| status.source_timings = last.timings);
                self.last = Some((last, state));
            }
        }
    }

    /// A source that gives up closes every connection; its word for it may still be on its way on channel 0.
    async fn weigh(&mut self, error: ReceiveError) -> ReceiveError {
        if !matches!(error, ReceiveError::Connection { .. }) {
            return error;
        }
        let word = async {
            loop {
                if let Some((_, Err(better @ ReceiveError::Source(_)))) = self.reports.recv().await
                {
                    return better;
                }
            }
        };
        timeout(REASON_WAIT, word).await.unwrap_or(error)
    }

    /// *Final* and the device state, once every channel has ended too.
    fn take_whole(&mut self) -> Option<(Final, Vec<u8>)> {
        if self.announced == 0 || self.ended.len() < usize::from(self.announced) {
            return None;
        }
        self.last.take()
    }

    /// Everything is there: compare, load, and say so. Returns the device state's length.
    async fn finish(&mut self, last: Final, state: Vec<u8>) -> Result<u64, ReceiveError> {
        for (&channel, arrived) in &self.ended {
            // One for each channel: the control channel compared the number.
            let sent = last
                .channels
                .get(usize::from(channel))
                .copied()
                .unwrap_or_default();
            let bad = |source| ReceiveError::Protocol { channel, source };
            sent.compare(arrived).map_err(bad)?;
        }
        let bytes = state.len() as u64;
        self.expect_more();
        let sink = Arc::clone(&self.sink);
        // A task of its own, so that a cancel never leaves it half done.
        let loading = tokio::spawn(async move { sink.load_device_state(state).await });
        let loaded = tokio::time::timeout_at(self.deadline.at, loading)
            .await
            .map_err(|_| self.too_late())?;
        loaded
            .unwrap_or_else(|panic| Err(panic.into()))
            .map_err(|source| ReceiveError::Host {
                what: "load the device state",
                source,
            })?;
        self.publish();
        self.status.send_modify(|status| {
            status.stage = ReceiveStage::Complete;
            status.complete_ns = monotonic_ns();
        });
        Ok(bytes)
    }

    async fn close(mut self, result: Result<u64, ReceiveError>) -> Result<Received, ReceiveError> {
        if let Err(error) = &result {
            self.publish();
            self.status.send_modify(|status| {
                status.stage = ReceiveStage::Failed;
                status.failure = error.to_string();
            });
        }
        let goodbye = match &result {
            Ok(_) => Frame::new(Kind::Complete, &[]),
            Err(error) => encode_error(&error.to_string()),
        };
        self.answer(0, goodbye);
        // No more visitors, no more reports: readers throw away what still comes, so that the goodbye
        // is not lost to a reset, until the source closes or the bound has passed.
        self.visitors.close();
        self.reports.close();
        drop(self.sender);
        self.channels.clear();
        let tasks = &mut self.tasks;
        let _ = timeout(GOODBYE_MAX, async {
            while tasks.join_next().await.is_some() {}
        })
        .await;
        // A thread that is stuck in the monitor's memory cannot be ended from here; it is left behind.
        if timeout(GOODBYE_MAX, self.tasks.shutdown()).await.is_err() {
            tracing::warn!("a thread still writes guest memory: the monitor is slow to answer it");
            self.tasks.detach_all();
        }
        let status = self.status.borrow().clone();
        result.map(|device_state_bytes| Received {
            status,
            device_state_bytes,
        })
    }

    fn answer(&self, channel: u16, frame: Frame) {
        if let Some(channel) = self.channels.get(&channel) {
            // Full only when the source does not read; its silence is noticed elsewhere.
            let _ = channel.answers.try_send(frame);
        }
    }

    fn too_late(&self) -> ReceiveError {
        let Deadline { what, limit, .. } = self.deadline;
        let limit_ms = limit.as_millis() as u64;
        if self.announced == 0 {
            let migration_id = self.credentials.migration_id;
            return ReceiveError::NoSource {
                migration_id,
                limit_ms,
            };
        }
        ReceiveError::TimedOut { what, limit_ms }
    }

    fn expect_more(&mut self) {
        self.deadline = Deadline::new("the rest of the hand-over", self.options.final_timeout);
    }

    /// Brings the live figures up to date; answers whether anything had arrived since.
    fn publish(&self) -> bool {
        let shared = &self.shared;
        let before = self.status.borrow().received_bytes;
        self.status.send_modify(|status| {
            status.pages = shared.pages.load(Ordering::Relaxed);
            status.zero_pages = shared.zero_pages.load(Ordering::Relaxed);
            status.received_bytes = shared.bytes.load(Ordering::Relaxed);
        });
        self.status.borrow().received_bytes != before
    }
}
