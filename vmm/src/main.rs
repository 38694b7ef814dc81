//! `vmm`: runs one virtual machine, as its machine file says and as its control socket allows.

#![forbid(unsafe_code)]

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, ensure};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use vmm::confine;
use vmm::control::Control;
use vmm::handles::Handles;
use vmm::monitor::Monitor;
use vmm::spec::{Measure, ValidatedSpec};
use vmm::telemetry;

/// Runs one virtual machine on KVM.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The machine file (JSON).
    #[arg(long)]
    config: PathBuf,
    /// The Unix socket to be told things on.
    #[arg(long)]
    control: PathBuf,
    /// Wait for the machine to arrive, as the machine file's `incoming` says.
    #[arg(long)]
    incoming: bool,
}

fn main() -> ExitCode {
    vmm::confine::close_inherited();
    let arguments = Arguments::parse();
    let begun = match begin(&arguments) {
        Ok(begun) => begun,
        Err(error) => {
            eprintln!("vmm: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("vmm: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(run(begun));
    // Whatever still waits for a server or a client is of no use any more.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What there is before the first thread is started: everything opened, and every other right given up.
struct Begun {
    spec: ValidatedSpec,
    socket: UnixListener,
    handles: Handles,
    measures: Vec<Measure>,
    /// Who started it.
    user: u32,
}

fn begin(arguments: &Arguments) -> anyhow::Result<Begun> {
    let spec = ValidatedSpec::read(&arguments.config)?;
    ensure!(
        arguments.incoming == spec.incoming().is_some(),
        "--incoming goes with an `incoming` in the machine file, and only with it"
    );
    let user = nix::unistd::geteuid().as_raw();
    let control = &arguments.control;
    let socket = proto::unix::bind(control)
        .with_context(|| format!("cannot listen on {}", control.display()))?;
    let handles = Handles::open(&spec, control)?;
    let folder = control
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let measures = confine::enter(&spec, folder)?;
    Ok(Begun {
        spec,
        socket,
        handles,
        measures,
        user,
    })
}

async fn run(begun: Begun) -> anyhow::Result<()> {
    let telemetry = telemetry::start(begun.spec.file());
    for measure in begun.measures.iter().filter(|measure| !measure.applied) {
        tracing::warn!(measure = measure.name, why = measure.detail, "not confined");
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let socket = proto::unix::accept_on(begun.socket)?;
    let callers = proto::unix::only_from(socket, vec![0, begun.user]);
    let monitor = Monitor::start(begun.spec, begun.handles, begun.measures).await?;
    monitor.receive().await?;
    let server = tonic::transport::Server::builder()
        .add_service(Control::new(monitor.clone()))
        .serve_with_incoming_shutdown(callers, monitor.ended().clone().cancelled_owned());
    let mut server = tokio::spawn(server);
    tracing::info!("ready");
    loop {
        tokio::select! {
            biased;
            () = monitor.ended().cancelled() => break,
            served = &mut server => {
                served??;
                monitor.end().await;
                anyhow::bail!("the control socket has closed");
            }
            _ = hangup.recv() => tracing::info!("hangup ignored"),
            _ = interrupt.recv() => { terminated(&monitor).await; break }
            _ = terminate.recv() => { terminated(&monitor).await; break }
        }
    }
    monitor.end().await;
    // The last answers go out; a watcher that keeps its stream does not hold the process.
    let _ = tokio::time::timeout(telemetry::GOODBYE_MAX, server).await;
    telemetry.stop();
    Ok(())
}

/// SIGTERM: the machine is stopped as it would be by request.
async fn terminated(monitor: &Arc<Monitor>) {
    tracing::info!("told to terminate: stopping the machine");
    if let Err(error) = monitor.stop(None, false).await {
        tracing::warn!(%error, "the machine was not stopped in order");
    }
    monitor.ended().cancel();
}
