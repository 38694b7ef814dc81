//! The control service: what `clusterd` asks of this monitor, over the monitor's own Unix socket.
//!
//! Nothing here outlives a request but its effect: a client that dies takes nothing along.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use cluster_model::ids::{MigrationId, Token};
use futures::Stream;
use proto::monitor as wire;
use proto::monitor::monitor_server;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::monitor::{
    CancelError, ExpectError, Monitor, MonitorRekeyError, NotForUs, RunError, SendRefused,
    SendRequest, StopError,
};
use crate::permit::PermitRefused;

/// A watcher hears at least so often.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// The shortest time between two statuses of a watcher whose monitor changes all the time.
const WATCH_LEAST: Duration = Duration::from_millis(5);

/// Messages on their way to a slow client; then it misses the states between.
const STREAM_MAX: usize = 4;

/// Console output in one message.
const CONSOLE_CHUNK_BYTES: usize = 16 << 10;

/// The service.
#[derive(Clone, Debug)]
pub struct Control {
    monitor: Arc<Monitor>,
}

impl Control {
    /// The service of `monitor`.
    pub fn new(monitor: Arc<Monitor>) -> monitor_server::MonitorServer<Control> {
        monitor_server::MonitorServer::new(Control { monitor })
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl monitor_server::Monitor for Control {
    type WatchStream = Answers<wire::MonitorStatus>;
    type ConsoleStream = Answers<wire::ConsoleOutput>;

    async fn describe(
        &self,
        _: Request<wire::DescribeRequest>,
    ) -> Result<Response<wire::MonitorStatus>, Status> {
        Ok(Response::new(self.monitor.status()))
    }

    async fn watch(
        &self,
        _: Request<wire::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (send, answers) = mpsc::channel(STREAM_MAX);
        tokio::spawn(watch(self.monitor.clone(), send));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn run(
        &self,
        request: Request<wire::RunPermit>,
    ) -> Result<Response<wire::RunReply>, Status> {
        // In a task of its own: a client that hangs up in the middle leaves no half-done step.
        let monitor = self.monitor.clone();
        let permit = request.into_inner();
        let running_since_ns = finish(async move { monitor.run(&permit).await }).await??;
        Ok(Response::new(wire::RunReply { running_since_ns }))
    }

    async fn extend_lease(
        &self,
        request: Request<wire::ExtendLeaseRequest>,
    ) -> Result<Response<wire::ExtendLeaseReply>, Status> {
        let phase = self.monitor.extend(request.get_ref())?;
        let phase = crate::monitor::wire_phase(phase).into();
        Ok(Response::new(wire::ExtendLeaseReply { phase }))
    }

    async fn shorten_lease(
        &self,
        request: Request<wire::ShortenLeaseRequest>,
    ) -> Result<Response<wire::ShortenLeaseReply>, Status> {
        self.monitor.shorten(request.get_ref())?;
        Ok(Response::new(wire::ShortenLeaseReply {}))
    }

    async fn rekey(
        &self,
        request: Request<wire::RekeyRequest>,
    ) -> Result<Response<wire::RekeyReply>, Status> {
        let monitor = self.monitor.clone();
        let wire::RekeyRequest { token, nonce } = *request.get_ref();
        finish(async move { monitor.rekey(Token(token), nonce).await }).await??;
        Ok(Response::new(wire::RekeyReply {}))
    }

    async fn expect_source(
        &self,
        request: Request<wire::ExpectSourceRequest>,
    ) -> Result<Response<wire::ExpectSourceReply>, Status> {
        self.monitor.expect_source(request.get_ref())?;
        Ok(Response::new(wire::ExpectSourceReply {}))
    }

    async fn send_migration(
        &self,
        request: Request<wire::SendMigrationRequest>,
    ) -> Result<Response<wire::SendMigrationReply>, Status> {
        self.monitor
            .send(SendRequest::try_from(request.get_ref())?)?;
        Ok(Response::new(wire::SendMigrationReply {}))
    }

    async fn cancel_migration(
        &self,
        request: Request<wire::CancelMigrationRequest>,
    ) -> Result<Response<wire::CancelMigrationReply>, Status> {
        let wire::CancelMigrationRequest {
            migration_id,
            reason,
        } = request.into_inner();
        let monitor = self.monitor.clone();
        let said_quiet =
            finish(async move { monitor.cancel(MigrationId(migration_id), &reason).await })
                .await??;
        Ok(Response::new(wire::CancelMigrationReply { said_quiet }))
    }

    async fn stop(
        &self,
        request: Request<wire::StopRequest>,
    ) -> Result<Response<wire::StopReply>, Status> {
        let monitor = self.monitor.clone();
        let wire::StopRequest { token, force } = *request.get_ref();
        finish(async move { monitor.stop(Some(Token(token)), force).await }).await??;
        Ok(Response::new(wire::StopReply {}))
    }

    async fn quit(
        &self,
        request: Request<wire::QuitRequest>,
    ) -> Result<Response<wire::QuitReply>, Status> {
        let wire::QuitRequest { token, reason } = request.into_inner();
        self.monitor.quit(Token(token), &reason)?;
        Ok(Response::new(wire::QuitReply {}))
    }

    async fn console(
        &self,
        request: Request<Streaming<wire::ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let (send, answers) = mpsc::channel(STREAM_MAX);
        tokio::spawn(console(self.monitor.clone(), request.into_inner(), send));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

/// Runs a step to its end, whatever becomes of the client.
async fn finish<T: Send + 'static>(
    step: impl Future<Output = T> + Send + 'static,
) -> Result<T, Status> {
    tokio::spawn(step)
        .await
        .map_err(|error| Status::internal(format!("the monitor failed: {error}")))
}

async fn watch(monitor: Arc<Monitor>, send: mpsc::Sender<Result<wire::MonitorStatus, Status>>) {
    let mut changes = monitor.watch();
    loop {
        changes.borrow_and_update();
        if send.send(Ok(monitor.status())).await.is_err() {
            return;
        }
        tokio::time::sleep(WATCH_LEAST).await;
        tokio::select! {
            _ = changes.changed() => {}
            () = tokio::time::sleep(WATCH_EVERY) => {}
            () = send.closed() => return,
        }
    }
}

async fn console(
    monitor: Arc<Monitor>,
    mut input: Streaming<wire::ConsoleInput>,
    send: mpsc::Sender<Result<wire::ConsoleOutput, Status>>,
) {
    let console = monitor.console().clone();
    let mut written = console.watch_output();
    let mut position = 0;
    let mut typing = true;
    loop {
        written.borrow_and_update();
        let (data, end) = console.output_from(position);
        position = end;
        for chunk in data.chunks(CONSOLE_CHUNK_BYTES) {
            if send
                .send(Ok(wire::ConsoleOutput {
                    data: chunk.to_vec(),
                }))
                .await
                .is_err()
            {
                return;
            }
        }
        tokio::select! {
            changed = written.changed() => if changed.is_err() { return },
            typed = input.message(), if typing => match typed {
                Ok(Some(typed)) => {
                    let taken = console.type_input(&typed.data);
                    if taken < typed.data.len() {
                        tracing::debug!(dropped = typed.data.len() - taken, "the guest does not read its console");
                    }
                }
                // The client only listens from here on, or is gone, which the send notices.
                Ok(None) | Err(_) => typing = false,
            },
            () = send.closed() => return,
        }
    }
}

fn refused(error: impl std::error::Error) -> Status {
    Status::failed_precondition(error.to_string())
}

impl From<RunError> for Status {
    fn from(error: RunError) -> Status {
        match &error {
            RunError::Permit(PermitRefused::OlderToken { .. }) => {
                Status::permission_denied(error.to_string())
            }
            RunError::Permit(_)
            | RunError::NotNow(_)
            | RunError::TooLate(_)
            | RunError::Tripped(_) => refused(error),
        }
    }
}

impl From<NotForUs> for Status {
    fn from(error: NotForUs) -> Status {
        match &error {
            NotForUs::OlderToken { .. } | NotForUs::EarlierLife(_) => {
                Status::permission_denied(error.to_string())
            }
            NotForUs::OtherMonitor | NotForUs::NotRekeyed { .. } => refused(error),
        }
    }
}

impl From<MonitorRekeyError> for Status {
    fn from(error: MonitorRekeyError) -> Status {
        match error {
            MonitorRekeyError::NotForUs(error) => error.into(),
            MonitorRekeyError::NotNow(_) | MonitorRekeyError::Pause(_) => refused(error),
            MonitorRekeyError::Disk { .. } => Status::aborted(error.to_string()),
        }
    }
}

impl From<SendRefused> for Status {
    fn from(error: SendRefused) -> Status {
        match &error {
            SendRefused::Malformed(_) => Status::invalid_argument(error.to_string()),
            SendRefused::Busy(_) | SendRefused::NotRunning(_) => refused(error),
        }
    }
}

impl From<ExpectError> for Status {
    fn from(error: ExpectError) -> Status {
        match &error {
            ExpectError::Malformed(_) => Status::invalid_argument(error.to_string()),
            ExpectError::Unknown(_) => Status::not_found(error.to_string()),
            ExpectError::AlreadyProved(_) => refused(error),
        }
    }
}

impl From<CancelError> for Status {
    fn from(error: CancelError) -> Status {
        match &error {
            CancelError::Unknown(_) => Status::not_found(error.to_string()),
            CancelError::TimedOut => Status::deadline_exceeded(error.to_string()),
        }
    }
}

impl From<StopError> for Status {
    fn from(error: StopError) -> Status {
        match error {
            StopError::NotForUs(error) => error.into(),
            StopError::NotNow(_) => refused(error),
            StopError::Pause(_) | StopError::Drain(_) => Status::aborted(error.to_string()),
        }
    }
}
