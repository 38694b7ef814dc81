//! The node daemon: reads its configuration, runs its node, stops as planned when asked to.

use std::process::ExitCode;

use clap::Parser;
use clusterd::admin::AdminService;
use clusterd::config::{Action, Cli, Config};
use clusterd::node::Node;
use clusterd::{check, join};
use tokio::signal::unix::{SignalKind, signal};

/// With glibc's a commit on a busy log takes about a fifth longer.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    proto::core_dump::rule_out();
    let cli = Cli::parse();
    let config = cli.load()?;
    match cli.action {
        Some(Action::Join {
            token_file,
            check: true,
            ..
        }) => {
            let findings = join::check(&config, token_file.as_deref()).await?;
            println!("{}", check::table(&findings));
            Ok(if check::any_failed(&findings) {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            })
        }
        Some(Action::Join {
            token_file,
            skip_check,
            ..
        }) => {
            println!(
                "{}",
                join::run(&config, token_file.as_deref(), skip_check).await?
            );
            Ok(ExitCode::SUCCESS)
        }
        None => run(config).await.map(|()| ExitCode::SUCCESS),
    }
}

async fn run(config: Config) -> anyhow::Result<()> {
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
