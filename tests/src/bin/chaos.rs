//! Faults on real processes; see `tests::chaos`.

use clap::Parser;
use tests::chaos::{self, Options, network, server::ServerKind};

/// Puts faults into a cluster of real processes in network namespaces, and checks that nothing is lost.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    options: Options,
    /// Print one JSON object on stdout at the end.
    #[arg(long)]
    json: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some(why) = network::missing() {
        anyhow::bail!("chaos cannot run here: {why}");
    }
    if args.options.server == ServerKind::Ganesha {
        for program in ["ganesha.nfsd", "rpcbind"] {
            anyhow::ensure!(
                clusterctl::local::program(program).is_ok(),
                "`{program}` is not installed: apt-get install nfs-ganesha nfs-ganesha-vfs rpcbind"
            );
        }
    }
    network::enter()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let report = runtime.block_on(chaos::run(&args.options, |line| eprintln!("{line}")))?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        for (kind, count) in &report.faults {
            println!("{count:6} {kind}");
        }
        println!("{}", report.summary());
    }
    Ok(())
}
