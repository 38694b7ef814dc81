//! The node daemon: reads its configuration, runs its node, stops as planned when asked to.

use clap::Parser;
use clusterd::admin::AdminService;
use clusterd::config::Cli;
use clusterd::node::Node;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = Cli::parse().load()?;
    clusterd::telemetry::init();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let node = Node::start(config, |handle, routes| {
        routes.add_service(AdminService::of(handle.clone()))
    })
    .await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    node.stop().await;
    clusterd::telemetry::stop();
    Ok(())
}
