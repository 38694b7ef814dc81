//! A migration as the monitor sees it: what it was asked, how it stands, and how it ends.

mod channels;
mod sink;
mod source;
#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cluster_model::ids::MigrationId;
use migration_core::tls::{ExpectedSource, Fingerprint, SetupError};
use migration_core::{
    Credentials, ReceiveOptions, ReceiveStage, ReceiveStatus, SendOptions, SendStage, SendStatus,
    Ticket,
};
use proto::failpoint;
use proto::monitor as wire;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::Monitor;
use crate::phase::{Event, Phase};
use crate::spec::TICKET_BYTES;
pub use channels::ExpectError;

/// How long a cancelled attempt may take to end; its goodbye is bounded well below.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a destination waits for its source: as long as a source waits for a busy leader.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(60);

/// Addresses of a destination that are tried.
const ADDRESSES_MAX: usize = 16;

/// What the source is asked to do.
#[derive(Clone, Debug)]
pub struct SendRequest {
    id: MigrationId,
    addresses: Vec<SocketAddr>,
    ticket: Ticket,
    destination: Fingerprint,
    options: SendOptions,
    /// W3C; empty while tracing is off.
    traceparent: String,
}

/// Why nothing is sent.
#[derive(Debug, thiserror::Error)]
pub enum SendRefused {
    /// The request itself.
    #[error("cannot send the machine: {0}")]
    Malformed(String),
    /// Another migration is under way.
    #[error("cannot send the machine: migration {0} is under way")]
    Busy(MigrationId),
    /// It does not run.
    #[error("cannot send the machine while it is {0}")]
    NotRunning(Phase),
}

/// Why a cancel was refused.
#[derive(Debug, thiserror::Error)]
pub enum CancelError {
    /// There is no such migration here.
    #[error("this monitor does not send migration {0}")]
    Unknown(MigrationId),
    /// The attempt does not end.
    #[error("the attempt did not end within {CANCEL_TIMEOUT:?}; ask again")]
    TimedOut,
}

/// Why a destination cannot wait for its source.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// An address cannot be listened on.
    #[error("cannot accept a memory stream on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Its channels cannot be sealed.
    #[error("cannot accept a memory stream: {0}")]
    Setup(#[from] SetupError),
}

/// The migration under way in this monitor, or the last one.
#[derive(Debug)]
pub(super) struct Migration {
    pub(super) id: MigrationId,
    side: Side,
    permit_ns: u64,
    running_ns: u64,
}

#[derive(Debug)]
enum Side {
    Sending {
        status: watch::Receiver<SendStatus>,
        /// Ends the attempt before quiet.
        cancel: CancellationToken,
        /// Ends the attempt after quiet, on the log's word.
        abandon: CancellationToken,
        /// Cancelled when the attempt is over and the monitor has drawn its consequences.
        over: CancellationToken,
        failure: watch::Sender<String>,
    },
    Receiving {
        status: watch::Receiver<ReceiveStatus>,
        expected: ExpectedSource,
    },
}

impl TryFrom<&wire::SendMigrationRequest> for SendRequest {
    type Error = SendRefused;

    fn try_from(request: &wire::SendMigrationRequest) -> Result<SendRequest, SendRefused> {
        let malformed = |what: String| SendRefused::Malformed(what);
        if request.addresses.is_empty() || request.addresses.len() > ADDRESSES_MAX {
            return Err(malformed(format!(
                "give 1 to {ADDRESSES_MAX} addresses of the destination"
            )));
        }
        let address = |text: &String| {
            text.parse()
                .map_err(|_| malformed(format!("`{text}` is not ip:port")))
        };
        let addresses = request
            .addresses
            .iter()
            .map(address)
            .collect::<Result<_, _>>()?;
        let ticket = Ticket::try_from(request.ticket.as_slice())
            .map_err(|_| malformed(format!("a ticket has {TICKET_BYTES} bytes")))?;
        let destination = request.destination_fingerprint.as_slice();
        let destination = Fingerprint::try_from(destination).map_err(|_| {
            malformed(format!(
                "the fingerprint of the destination's certificate has {} bytes",
                channels::FINGERPRINT_BYTES
            ))
        })?;
        let asked = request.options.unwrap_or_default();
        let mut options = SendOptions {
            channels: u16::try_from(asked.channels.max(1))
                .map_err(|_| malformed(format!("{} channels are too many", asked.channels)))?,
            bandwidth_max_bytes_s: asked.bandwidth_max_bytes_s,
            ..SendOptions::default()
        };
        if asked.downtime_max_ms != 0 {
            options.policy.downtime_max_ms = asked.downtime_max_ms;
        }
        if asked.rounds_max != 0 {
            options.policy.rounds_max = asked.rounds_max;
        }
        Ok(SendRequest {
            id: MigrationId(request.migration_id),
            addresses,
            ticket,
            destination,
            options,
            traceparent: request.traceparent.clone(),
        })
    }
}

impl Monitor {
    /// Begins to send the machine. Asking again for the same migration changes nothing.
    ///
    /// # Errors
    /// See [`SendRefused`].
    pub fn send(self: &Arc<Self>, request: SendRequest) -> Result<(), SendRefused> {
        let (status, watch_status) = watch::channel(SendStatus::default());
        let (cancel, abandon, over) = (
            CancellationToken::new(),
            CancellationToken::new(),
            CancellationToken::new(),
        );
        let failure = watch::Sender::new(String::new());
        {
            let mut state = self.lock();
            if let Some(Migration {
                id,
                side: Side::Sending { over, .. },
                ..
            }) = &state.migration
            {
                if *id == request.id {
                    return Ok(());
                }
                if !over.is_cancelled() {
                    return Err(SendRefused::Busy(*id));
                }
            }
            if state.phase != Phase::Running {
                return Err(SendRefused::NotRunning(state.phase));
            }
            let side = Side::Sending {
                status: watch_status.clone(),
                cancel: cancel.clone(),
                abandon: abandon.clone(),
                over: over.clone(),
                failure: failure.clone(),
            };
            state.migration = Some(Migration {
                id: request.id,
                side,
                permit_ns: 0,
                running_ns: 0,
            });
        }
        tracing::info!(migration = %request.id, to = ?request.addresses, "sending the machine");
        let span = tracing::info_span!("send the machine", migration = %request.id);
        crate::telemetry::lies_under(&span, &request.traceparent);
        let monitor = self.clone();
        tokio::spawn(relay(
            Arc::downgrade(self),
            watch_status.clone(),
            over.clone(),
        ));
        tokio::spawn(final_sent(watch_status, over.clone()));
        let sending = async move {
            let attempt = monitor.attempt(request, status, cancel);
            let ended = tokio::select! {
                ended = attempt => ended,
                () = abandon.cancelled() => Err("the log says abort".into()),
            };
            if let Err(reason) = ended {
                tracing::warn!(reason, "the machine was not sent");
                failure.send_replace(reason);
                monitor.give_up_cutover().await;
            }
            over.cancel();
            monitor.tell();
        };
        tokio::spawn(sending.instrument(span));
        Ok(())
    }

    async fn attempt(
        self: &Arc<Self>,
        request: SendRequest,
        status: watch::Sender<SendStatus>,
        cancel: CancellationToken,
    ) -> Result<(), String> {
        failpoint::reach("source.setup")
            .await
            .map_err(|error| error.to_string())?;
        let credentials = Credentials {
            migration_id: request.id.0,
            ticket: request.ticket,
        };
        let connector = self
            .connector(request.addresses, request.destination)
            .map_err(|error| error.to_string())?;
        let source = Arc::new(source::Source::new(self.clone()));
        let sent = migration_core::send(
            connector,
            credentials,
            source,
            request.options,
            status,
            cancel,
        )
        .await;
        match sent {
            Ok(sent) => {
                tracing::info!(status = ?sent.status.timings, "the destination has the whole machine");
                Ok(())
            }
            Err(failed) => Err(failed.to_string()),
        }
    }

    /// Ends the sending of `id`; answers whether *quiet* was said. Where it was not, the guest goes
    /// on by the permit it had; where it was, it stays stopped until a re-key and a permit. Called
    /// once the log has said abort.
    ///
    /// # Errors
    /// See [`CancelError`].
    pub async fn cancel(&self, id: MigrationId, reason: &str) -> Result<bool, CancelError> {
        if !self.is_migration(id) || !self.end_send_inner(reason, true).await? {
            return Err(CancelError::Unknown(id));
        }
        Ok(self.lock().said_quiet)
    }

    /// Ends an attempt that has not said quiet; one that has stays as it is.
    pub(super) async fn end_send(&self, reason: &str) {
        if let Err(error) = self.end_send_inner(reason, false).await {
            tracing::warn!(%error, "a migration goes on");
        }
    }

    /// Answers whether this monitor sends.
    async fn end_send_inner(&self, reason: &str, also_quiet: bool) -> Result<bool, CancelError> {
        let (cancel, abandon, over) = match &self.lock().migration {
            Some(Migration {
                side:
                    Side::Sending {
                        cancel,
                        abandon,
                        over,
                        ..
                    },
                ..
            }) => (cancel.clone(), abandon.clone(), over.clone()),
            _ => return Ok(false),
        };
        if over.is_cancelled() {
            return Ok(true);
        }
        tracing::info!(reason, "ending the migration");
        cancel.cancel();
        let ended = async {
            // The promise may be given at any moment until the attempt has ended.
            let mut changes = self.watch();
            loop {
                if self.lock().said_quiet {
                    if !also_quiet {
                        return;
                    }
                    abandon.cancel();
                }
                tokio::select! {
                    () = over.cancelled() => return,
                    _ = changes.changed() => {}
                }
            }
        };
        tokio::time::timeout(CANCEL_TIMEOUT, ended)
            .await
            .map_err(|_| CancelError::TimedOut)?;
        Ok(true)
    }

    /// The cutover was given up. A machine that had stopped for it and not said quiet goes on by the
    /// permit that the gate gave back, if its lease still runs; else it is frozen.
    async fn give_up_cutover(&self) {
        let _operation = self.operation.lock().await;
        let permit = {
            let mut state = self.lock();
            if state.phase != Phase::Stopping {
                return;
            }
            state.cutover_permit.take()
        };
        let stepped = self.step(Event::GaveUp).and_then(|_| match permit {
            Some(permit) => match self.platform.machine.gate().run(permit) {
                Ok(_) => self.step(Event::Permitted),
                Err(error) => {
                    tracing::warn!(%error, "frozen after a cutover given up");
                    self.platform.machine.gate().hold();
                    Ok(Phase::Frozen)
                }
            },
            None => {
                self.platform.machine.gate().hold();
                Ok(Phase::Frozen)
            }
        });
        if let Err(error) = stepped {
            tracing::error!(%error, "a cutover given up in a phase that knows none");
        }
    }

    /// Waits for the source, on the machine file's addresses; for a destination, once, at start.
    ///
    /// # Errors
    /// See [`IncomingError`].
    pub async fn receive(self: &Arc<Self>) -> Result<(), IncomingError> {
        let Some((incoming, ticket)) = self.spec.incoming() else {
            return Ok(());
        };
        let listeners = sink::Listeners::bind(&incoming.listen).await?;
        let addresses = listeners.addresses().map(|address| address.to_string());
        let addresses = addresses.collect();
        let expected = ExpectedSource::default();
        let acceptor = self.acceptor(listeners, expected.clone())?;
        let id = incoming.migration_id;
        let credentials = Credentials {
            migration_id: id.0,
            ticket: Ticket(ticket),
        };
        let (status, watch_status) = watch::channel(ReceiveStatus::default());
        {
            let mut state = self.lock();
            state.incoming_addresses = addresses;
            let side = Side::Receiving {
                status: watch_status.clone(),
                expected,
            };
            state.migration = Some(Migration {
                id,
                side,
                permit_ns: 0,
                running_ns: 0,
            });
        }
        self.tell();
        tokio::spawn(relay(
            Arc::downgrade(self),
            watch_status,
            CancellationToken::new(),
        ));
        let monitor = self.clone();
        tokio::spawn(async move {
            let sink = Arc::new(sink::Sink::new(monitor.clone()));
            let options = ReceiveOptions {
                source_timeout: SOURCE_TIMEOUT,
                ..ReceiveOptions::default()
            };
            let received = async {
                failpoint::reach("sink.setup")
                    .await
                    .map_err(|error| error.to_string())?;
                let cancel = monitor.ended.child_token();
                migration_core::receive(acceptor, credentials, sink, options, status, cancel)
                    .await
                    .map_err(|error| error.to_string())
            };
            match received.await {
                Ok(received) => tracing::info!(
                    bytes = received.status.received_bytes,
                    "the machine is here"
                ),
                // Once the state is loaded, what becomes of the source's connection changes nothing.
                Err(reason) if monitor.lock().phase != Phase::Incoming => {
                    tracing::info!(reason, "the source went away after its machine was here");
                }
                Err(reason) => monitor.fail(&format!("the machine did not arrive: {reason}")),
            }
            if let Err(error) = failpoint::reach("sink.after_complete").await {
                monitor.fail(&error.to_string());
            }
        });
        Ok(())
    }
}

impl Migration {
    /// The guest was let go, out of phase `was`.
    pub(super) fn ran(&mut self, was: Phase, permit_ns: u64, running_ns: u64) {
        if was == Phase::Complete {
            (self.permit_ns, self.running_ns) = (permit_ns, running_ns);
        }
    }

    /// The wire's form.
    pub(super) fn progress(&self) -> wire::MigrationProgress {
        match &self.side {
            Side::Sending {
                status, failure, ..
            } => {
                let mut progress = sending(&status.borrow());
                progress.migration_id = self.id.0;
                if !failure.borrow().is_empty() {
                    progress.failure = failure.borrow().clone();
                    progress.set_stage(wire::MigrationStage::Failed);
                }
                progress
            }
            Side::Receiving { status, .. } => {
                let mut progress = receiving(&status.borrow());
                progress.migration_id = self.id.0;
                if let Some(timings) = &mut progress.timings {
                    timings.permit_ns = self.permit_ns;
                    timings.running_ns = self.running_ns;
                }
                if self.running_ns != 0 {
                    progress.set_stage(wire::MigrationStage::NetworkCleanup);
                }
                progress
            }
        }
    }
}

fn sending(status: &SendStatus) -> wire::MigrationProgress {
    let stage = match status.stage {
        SendStage::Setup => wire::MigrationStage::Setup,
        SendStage::MemoryCopy => wire::MigrationStage::MemoryCopy,
        SendStage::ModifiedPages | SendStage::Stopping => wire::MigrationStage::ModifiedPages,
        SendStage::Quiet | SendStage::FinalSent | SendStage::Complete => {
            wire::MigrationStage::StorageHandover
        }
        SendStage::Failed => wire::MigrationStage::Failed,
    };
    let rounds = status.rounds.iter().map(|round| wire::Round {
        number: round.number,
        pages: round.pages,
        zero_pages: round.zero_pages,
        bytes: round.bytes,
        duration_us: round.duration_us,
        dirty_pages_after: round.dirty_pages_after,
    });
    wire::MigrationProgress {
        migration_id: 0,
        stage: stage.into(),
        failure: status.failure.clone(),
        round: status.round,
        memory_total_bytes: status.memory_total_bytes,
        remaining_bytes: status.remaining_bytes,
        sent_bytes: status.sent_bytes,
        zero_pages: status.zero_pages,
        pages: status.pages,
        rate_bytes_s: status.rate_bytes_s,
        dirty_bytes_s: status.dirty_bytes_s,
        predicted_blackout_us: status.predicted_blackout_us,
        rounds: rounds.collect(),
        timings: Some(wire::Timings {
            started_ns: status.timings.started_ns,
            vcpus_stopped_ns: status.timings.vcpus_stopped_ns,
            quiet_ns: status.timings.quiet_ns,
            final_sent_ns: status.timings.final_sent_ns,
            complete_ns: status.timings.complete_ns,
            ..Default::default()
        }),
        why_stopped_copying: status.why_stopped_copying.clone(),
    }
}

fn receiving(status: &ReceiveStatus) -> wire::MigrationProgress {
    let stage = match status.stage {
        ReceiveStage::Waiting | ReceiveStage::Setup => wire::MigrationStage::Setup,
        ReceiveStage::Incoming if status.round <= 1 => wire::MigrationStage::MemoryCopy,
        ReceiveStage::Incoming => wire::MigrationStage::ModifiedPages,
        ReceiveStage::QuietReceived => wire::MigrationStage::StorageHandover,
        ReceiveStage::Complete => wire::MigrationStage::Resume,
        ReceiveStage::Failed => wire::MigrationStage::Failed,
    };
    wire::MigrationProgress {
        stage: stage.into(),
        failure: status.failure.clone(),
        round: status.round,
        memory_total_bytes: status.memory_total_bytes,
        sent_bytes: status.received_bytes,
        zero_pages: status.zero_pages,
        pages: status.pages,
        timings: Some(wire::Timings {
            started_ns: status.source_timings.started_ns,
            vcpus_stopped_ns: status.source_timings.vcpus_stopped_ns,
            quiet_ns: status.source_timings.quiet_ns,
            final_sent_ns: status.source_timings.final_sent_ns,
            quiet_received_ns: status.quiet_received_ns,
            complete_ns: status.complete_ns,
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Turns changes of a migration's status into changes of the monitor's.
async fn relay<T: Send + Sync + 'static>(
    monitor: std::sync::Weak<Monitor>,
    mut status: watch::Receiver<T>,
    over: CancellationToken,
) {
    loop {
        tokio::select! {
            changed = status.changed() => if changed.is_err() { return },
            () = over.cancelled() => return,
        }
        let Some(monitor) = monitor.upgrade() else {
            return;
        };
        monitor.tell();
    }
}

/// Reaches the failpoint `source.after_final` as soon as the destination has said that *final* and all before
/// it arrived: until then it depends on the kernel's buffers what outlives this process.
async fn final_sent(mut status: watch::Receiver<SendStatus>, over: CancellationToken) {
    let sent = async {
        let reached = |status: &SendStatus| status.stage == SendStage::Complete;
        status.wait_for(reached).await.is_ok()
    };
    let sent = tokio::select! {
        biased;
        sent = sent => sent,
        () = over.cancelled() => false,
    };
    if sent && let Err(error) = failpoint::reach("source.after_final").await {
        tracing::warn!(%error, "nothing can fail after final");
    }
}
