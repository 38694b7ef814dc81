//! The source's driver: measures, asks the policy, and carries out what it says.
//!
//! ```text
//!  set_up ──► copy_rounds ──(verdict: stop)──► stop_machine ──► hand_over ──► Sent
//!    │            │ give up, error, cancel        │                 │
//!    └────────────┴──────────► Failed             └─ Failed         └─ Failed
//!                              not quiet             not quiet,        said quiet: stays stopped
//!                              never stopped         stopped           until the log says abort
//! ```

mod attend;
mod channel;
mod copy;
mod meter;
mod scan;

use crate::clock::monotonic_ns;
use crate::error::{HostError, SendError, SendFailed};
use crate::frame::{
    DEVICE_STATE_BYTES_MAX, DEVICE_STATE_CHUNK_BYTES, DeviceStateChunk, Final, Frame, Kind,
    REGIONS_MAX, RoundMark, Setup, encode_error,
};
use crate::machine::MigrationSource;
use crate::net::Connector;
use crate::options::{CHANNELS_MAX, Credentials, SendOptions};
use crate::pace::Pace;
use crate::pages::{PAGE_SIZE, Region, count_set, total_pages};
use crate::policy::{Progress, StopReason, Verdict, judge, predict};
use crate::stats::{RoundStats, SendStage, SendStatus, Sent};
use channel::{Channel, Common, Counters, EVENTS_MAX, Heard, Outgoing};
use meter::Meter;
use std::convert::Infallible;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use xxhash_rust::xxh3::xxh3_64;

/// Looks at a stopped machine's dirty bitmap at most; one that needs more is not stopped.
const FINAL_PASSES_MAX: u32 = 4;

/// How long the goodbye of a failed attempt may take: the guest is slow until dirty logging is off.
const GOODBYE_MAX: Duration = Duration::from_millis(50);

/// How long reading threads may take to notice that the attempt is over.
const SCANS_MAX: Duration = Duration::from_secs(1);

/// Sends a machine to a destination that waits in [`receive`](crate::receive).
///
/// It stops the machine when the policy says so, and resumes it on no path. Until *Quiet* `cancel`
/// ends it; after, `cancel` has no effect. Dropping the future ends the attempt at any moment, but then only
/// [`MachineSource::mark_quiet`](crate::MachineSource::mark_quiet) and `status` know
/// what was said, and dirty logging is left to the source's own `Drop`: cancel instead where that is possible.
pub async fn send<S: MigrationSource + ?Sized>(
    connector: Arc<dyn Connector>,
    credentials: Credentials,
    source: Arc<S>,
    options: SendOptions,
    status: watch::Sender<SendStatus>,
    cancel: CancellationToken,
) -> Result<Sent, SendFailed> {
    let mut driver = Driver::new(source, options, status, cancel);
    let result = driver.run(connector, credentials).await;
    driver.close(result).await
}

struct Driver<S: ?Sized> {
    source: Arc<S>,
    options: SendOptions,
    status: watch::Sender<SendStatus>,
    cancel: CancellationToken,
    regions: Arc<[Region]>,
    common: Common,
    heard: mpsc::Receiver<Result<Heard, SendError>>,
    channels: Vec<Channel>,
    tasks: JoinSet<()>,
    /// Held by every reading thread; `ended` ends with the last of them.
    alive: Option<mpsc::Sender<Infallible>>,
    ended: mpsc::Receiver<Infallible>,
    ready: bool,
    complete: bool,
    /// Per channel, the last round acknowledged.
    acknowledged: Vec<u32>,
    logging: bool,
    said_quiet: bool,
    machine_stopped: bool,
    rounds: Vec<RoundStats>,
    harvest_us: u64,
    meter: Meter,
    device_state_bytes: u64,
}

impl<S: ?Sized> Drop for Driver<S> {
    /// A future that was dropped in the middle leaves threads behind that must notice.
    fn drop(&mut self) {
        self.common.stop.store(true, Ordering::Relaxed);
    }
}

impl<S: MigrationSource + ?Sized> Driver<S> {
    fn new(
        source: Arc<S>,
        mut options: SendOptions,
        status: watch::Sender<SendStatus>,
        cancel: CancellationToken,
    ) -> Driver<S> {
        options.channels = options.channels.max(1);
        let (sender, heard) = mpsc::channel(EVENTS_MAX);
        let (alive, ended) = mpsc::channel(1);
        let now_ns = monotonic_ns();
        let pace = Pace::new(options.bandwidth_max_bytes_s, now_ns);
        let regions: Arc<[Region]> = source.regions().into();
        status.send_modify(|status| {
            *status = SendStatus::default();
            status.timings.started_ns = now_ns;
            status.memory_total_bytes = total_pages(&regions).saturating_mul(PAGE_SIZE as u64);
        });
        Driver {
            common: Common {
                pace: Arc::new(Mutex::new(pace)),
                counters: Arc::new(Counters::default()),
                heard: sender,
                heartbeat: options.heartbeat,
                stop: Arc::new(AtomicBool::new(false)),
            },
            source,
            options,
            status,
            cancel,
            regions,
            heard,
            channels: Vec::new(),
            tasks: JoinSet::new(),
            alive: Some(alive),
            ended,
            ready: false,
            complete: false,
            acknowledged: Vec::new(),
            logging: false,
            said_quiet: false,
            machine_stopped: false,
            rounds: Vec::new(),
            harvest_us: 0,
            meter: Meter::new(Instant::now()),
            device_state_bytes: 0,
        }
    }

    async fn run(
        &mut self,
        connector: Arc<dyn Connector>,
        credentials: Credentials,
    ) -> Result<(), SendError> {
        self.check()?;
        let bound = self.options.setup_timeout;
        within("setting up", bound, self.set_up(connector, credentials)).await?;
        let reason = self.copy_rounds().await?;
        self.status
            .send_modify(|status| status.why_stopped_copying = reason.to_string());
        self.stop_machine().await?;
        self.hand_over().await
    }

    /// Refuses what cannot be sent before anyone is bothered.
    fn check(&self) -> Result<(), SendError> {
        let refused = |what: String| Err(SendError::Refused(what));
        if self.options.channels > CHANNELS_MAX {
            return refused(format!(
                "{} channels; at most {CHANNELS_MAX}",
                self.options.channels
            ));
        }
        if self.regions.is_empty() || self.regions.len() > REGIONS_MAX {
            return refused(format!(
                "{} memory regions; 1 to {REGIONS_MAX}",
                self.regions.len()
            ));
        }
        if self.regions.iter().any(|region| region.pages == 0) {
            return refused("an empty memory region".into());
        }
        Ok(())
    }

    async fn set_up(
        &mut self,
        connector: Arc<dyn Connector>,
        credentials: Credentials,
    ) -> Result<(), SendError> {
        for number in 0..self.options.channels {
            let options = self.options.clone();
            let connector = Arc::clone(&connector);
            let opening =
                async move { channel::open(&*connector, number, credentials, &options).await };
            let halves = self.attend(opening).await??;
            let opened = channel::start(number, halves, &self.common, &mut self.tasks);
            self.channels.push(opened);
        }
        self.acknowledged = vec![0; self.channels.len()];
        self.say(
            0,
            Setup {
                regions: self.regions.to_vec(),
            }
            .encode(),
        )
        .await?;
        self.wait_until(|driver| driver.ready).await
    }

    /// Rounds until the policy says stop.
    async fn copy_rounds(&mut self) -> Result<StopReason, SendError> {
        self.set_stage(SendStage::MemoryCopy);
        self.logging = true;
        let source = Arc::clone(&self.source);
        self.host("start the dirty log", move || source.start_dirty_log())
            .await?;
        let began = Instant::now();
        let mut bitmaps = self
            .regions
            .iter()
            .map(Region::full_bitmap)
            .collect::<Vec<_>>();
        loop {
            let number = self.rounds.len() as u32 + 1;
            let mut round = self.begin_round(number, &bitmaps);
            let round_began = Instant::now();
            self.copy(bitmaps).await?;
            self.mark_round(RoundMark {
                round: number,
                last: false,
            })
            .await?;
            self.wait_until(|driver| driver.acknowledged.iter().all(|&acked| acked >= number))
                .await?;
            round.duration_us = micros(round_began.elapsed());
            bitmaps = self.harvest().await?;
            round.dirty_pages_after = bitmaps.iter().map(|bits| count_set(bits)).sum();
            self.end_round(round);

            let progress = Progress {
                rounds: &self.rounds,
                elapsed_us: micros(began.elapsed()),
                harvest_us: self.harvest_us,
                costs: self.options.costs,
                bandwidth_max_bytes_s: self.options.bandwidth_max_bytes_s,
            };
            let prediction = predict(&progress);
            let verdict = judge(&self.options.policy, &progress);
            tracing::debug!(?round, ?prediction, ?verdict, "a round of copying is done");
            self.status.send_modify(|status| {
                status.remaining_bytes = prediction.remaining_bytes;
                status.dirty_bytes_s = prediction.dirty_bytes_s;
                status.predicted_blackout_us = prediction.blackout_us;
            });
            match verdict {
                Verdict::AnotherRound => self.set_stage(SendStage::ModifiedPages),
                Verdict::Stop(reason) => return Ok(reason),
                Verdict::GiveUp(why) => return Err(SendError::GaveUp(why)),
            }
        }
    }

    /// Stops the vCPUs and drains the disks; the last moment to cancel is at its end.
    async fn stop_machine(&mut self) -> Result<(), SendError> {
        self.set_stage(SendStage::Stopping);
        let bound = self.options.stop_timeout;
        self.machine_stopped = true;
        // Neither is given up half way for a cancel or a broken link: whoever lets the machine go on
        // must not do so while it is still being stopped.
        let source = Arc::clone(&self.source);
        let pause = tokio::spawn(async move { source.pause().await });
        let stopped_ns = finished("stop the vCPUs", bound, pause).await?;
        self.status
            .send_modify(|status| status.timings.vcpus_stopped_ns = stopped_ns);
        let source = Arc::clone(&self.source);
        let drain = tokio::spawn(async move { source.drain_disks().await });
        finished("drain the disks", bound, drain).await
    }

    /// From *Quiet* to *Complete*.
    async fn hand_over(&mut self) -> Result<(), SendError> {
        if self.cancel.is_cancelled() {
            return Err(SendError::Cancelled);
        }
        let marked = self.source.mark_quiet();
        marked.map_err(|source| SendError::Host {
            what: "say quiet",
            source,
        })?;
        // The promise counts as given, whatever becomes of the bytes.
        self.said_quiet = true;
        let quiet_ns = monotonic_ns();
        self.status.send_modify(|status| {
            status.said_quiet = true;
            status.stage = SendStage::Quiet;
            status.timings.quiet_ns = quiet_ns;
        });
        self.say(0, Frame::new(Kind::Quiet, &[])).await?;

        let source = Arc::clone(&self.source);
        let saving = tokio::spawn(async move { source.save_device_state().await });
        let number = self.rounds.len() as u32 + 1;
        let bitmaps = self.harvest().await?;
        let mut round = self.begin_round(number, &bitmaps);
        let round_began = Instant::now();
        self.copy(bitmaps).await?;
        let saved = self.attend(saving).await?;
        let state = flatten("save the device state", saved)?;
        if state.len() > DEVICE_STATE_BYTES_MAX {
            let source: HostError = format!("it is {} bytes long", state.len()).into();
            return Err(SendError::Host {
                what: "save the device state",
                source,
            });
        }
        self.device_state_bytes = state.len() as u64;
        // Draining and saving touch memory, so look again until nothing is dirty.
        for pass in 1.. {
            let bitmaps = self.harvest().await?;
            let pages = bitmaps.iter().map(|bits| count_set(bits)).sum();
            if pages == 0 {
                break;
            }
            if pass == FINAL_PASSES_MAX {
                return Err(SendError::StillChanging { pages });
            }
            self.meter.more_pages(pages);
            round.pages += pages;
            self.copy(bitmaps).await?;
        }
        for (index, bytes) in state.chunks(DEVICE_STATE_CHUNK_BYTES).enumerate() {
            let offset = (index * DEVICE_STATE_CHUNK_BYTES) as u64;
            let chunk = DeviceStateChunk {
                total: state.len() as u64,
                offset,
                bytes,
            };
            self.say(0, chunk.encode()).await?;
        }
        self.mark_round(RoundMark {
            round: number,
            last: true,
        })
        .await?;
        let channels = self.flush().await?;
        round.duration_us = micros(round_began.elapsed());
        self.end_round(round);
        let final_sent_ns = monotonic_ns();
        let mut timings = self.status.borrow().timings;
        timings.final_sent_ns = final_sent_ns;
        let done = Final {
            round: number,
            channels,
            device_state_bytes: state.len() as u64,
            device_state_sum: xxh3_64(&state),
            timings,
        };
        self.say(0, done.encode()).await?;
        self.status.send_modify(|status| {
            status.timings.final_sent_ns = final_sent_ns;
            status.stage = SendStage::FinalSent;
            status.remaining_bytes = 0;
        });
        // Until here a standstill was the bound: what remains may be much, and the link slow.
        let bound = self.options.final_timeout;
        let complete = self.wait_until(|driver| driver.complete);
        within("the destination's verifying and loading", bound, complete).await
    }

    /// Ends the attempt: goodbye, threads, dirty log, status.
    async fn close(mut self, result: Result<(), SendError>) -> Result<Sent, SendFailed> {
        if let Err(cause) = &result {
            self.common.stop.store(true, Ordering::Relaxed);
            self.goodbye(cause).await;
        }
        // Writers first, so that a thread that waits for room in a queue wakes up.
        self.channels.clear();
        self.tasks.shutdown().await;
        self.alive = None;
        if timeout(SCANS_MAX, self.ended.recv()).await.is_err() {
            tracing::warn!("a thread still reads guest memory: the monitor is slow to answer it");
        }
        if self.logging {
            let source = Arc::clone(&self.source);
            let stopped = tokio::task::spawn_blocking(move || source.stop_dirty_log()).await;
            if let Err(error) = flatten("stop the dirty log", stopped) {
                tracing::warn!(%error, "dirty logging may still be on: the guest would be slow");
            }
        }
        self.publish();
        if let Err(cause) = &result {
            self.status.send_modify(|status| {
                status.stage = SendStage::Failed;
                status.failure = cause.to_string();
            });
        }
        let status = self.status.borrow().clone();
        match result {
            Ok(()) => Ok(Sent {
                status,
                device_state_bytes: self.device_state_bytes,
            }),
            Err(cause) => Err(SendFailed {
                said_quiet: self.said_quiet,
                machine_stopped: self.machine_stopped,
                cause,
            }),
        }
    }

    /// Tells the destination why, if it can still be told.
    async fn goodbye(&mut self, cause: &SendError) {
        let Some(control) = self.channels.first() else {
            return;
        };
        let frame = encode_error(&cause.to_string());
        let outgoing = control.outgoing.clone();
        let said = async {
            let (done, flushed) = oneshot::channel();
            if outgoing.send(frame.into()).await.is_ok()
                && outgoing.send(Outgoing::Flush(done)).await.is_ok()
            {
                let _ = flushed.await;
            }
        };
        let _ = timeout(GOODBYE_MAX, said).await;
    }

    fn begin_round(&mut self, number: u32, bitmaps: &[Vec<u64>]) -> RoundStats {
        let pages = bitmaps.iter().map(|bits| count_set(bits)).sum();
        let counters = &self.common.counters;
        self.meter
            .begin_round(pages, counters.pages.load(Ordering::Relaxed));
        self.status.send_modify(|status| {
            status.round = number;
            status.remaining_bytes = pages * PAGE_SIZE as u64;
        });
        // The totals so far are taken off in `end_round`.
        RoundStats {
            number,
            pages,
            zero_pages: counters.zero_pages.load(Ordering::Relaxed),
            bytes: counters.bytes.load(Ordering::Relaxed),
            duration_us: 0,
            dirty_pages_after: 0,
        }
    }

    fn end_round(&mut self, mut round: RoundStats) {
        let counters = &self.common.counters;
        round.zero_pages = counters.zero_pages.load(Ordering::Relaxed) - round.zero_pages;
        round.bytes = counters.bytes.load(Ordering::Relaxed) - round.bytes;
        self.rounds.push(round);
        self.publish();
        self.status.send_modify(|status| status.rounds.push(round));
    }

    fn set_stage(&self, stage: SendStage) {
        self.status.send_modify(|status| status.stage = stage);
    }
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros() as u64
}

/// A result of the monitor's own code, which may also have panicked.
fn flatten<T>(
    what: &'static str,
    done: Result<Result<T, HostError>, tokio::task::JoinError>,
) -> Result<T, SendError> {
    done.unwrap_or_else(|panic| Err(panic.into()))
        .map_err(|source| SendError::Host { what, source })
}

/// Waits for a part of the monitor that runs in a task of its own and is never dropped half done.
async fn finished<T>(
    what: &'static str,
    limit: Duration,
    work: JoinHandle<Result<T, HostError>>,
) -> Result<T, SendError> {
    let limit_ms = limit.as_millis() as u64;
    match timeout(limit, work).await {
        Ok(done) => flatten(what, done),
        Err(_) => Err(SendError::TimedOut { what, limit_ms }),
    }
}

async fn within<T>(
    what: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, SendError>>,
) -> Result<T, SendError> {
    timeout(limit, work)
        .await
        .unwrap_or(Err(SendError::TimedOut {
            what,
            limit_ms: limit.as_millis() as u64,
        }))
}
