//! `clusterctl dev`: a cluster on this machine, to try things and to break them.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;

use crate::Context;
use crate::client::CliError;
use crate::local::{LocalCluster, Plan};
use crate::output::{self, Format};

/// What can be done with the local cluster.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start it: nodes n1, n2, …, an NFS server, volume vol-a.
    Up {
        /// How many nodes.
        #[arg(long, default_value_t = 3)]
        nodes: u8,
        /// Memory that each node offers, MiB.
        #[arg(long, default_value_t = 4096)]
        memory_mib: u64,
        /// CPUs that each node offers.
        #[arg(long, default_value_t = 4)]
        cpus: u32,
        /// Count a node as lost after 2.8 s and not 6.5 s.
        #[arg(long)]
        fast: bool,
        /// Where it lives.
        #[arg(long, default_value_os_t = default_folder())]
        folder: PathBuf,
    },
    /// Stop and forget it, with all its machines.
    Down {
        /// Where it lives.
        #[arg(long, default_value_os_t = default_folder())]
        folder: PathBuf,
    },
    /// Kill a node as a power cut does: clusterd, broker and monitors with SIGKILL.
    Kill {
        /// n1, n2, …
        node: String,
        /// Only its clusterd; its machines run on.
        #[arg(long)]
        clusterd: bool,
        /// Where it lives.
        #[arg(long, default_value_os_t = default_folder())]
        folder: PathBuf,
    },
    /// Start a killed node again.
    Start {
        /// n1, n2, …
        node: String,
        /// Where it lives.
        #[arg(long, default_value_os_t = default_folder())]
        folder: PathBuf,
    },
}

fn default_folder() -> PathBuf {
    std::env::temp_dir().join(format!("baton-dev-{}", nix::unistd::getuid()))
}

/// Does it.
///
/// # Errors
/// When a program is missing or a step is refused.
pub async fn run(c: &Context, command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Up {
            nodes,
            memory_mib,
            cpus,
            fast,
            folder,
        } => {
            let plan = Plan {
                folder,
                subnet: [127, 42, 0],
                memory_mib,
                cpus,
                fast,
                ..Plan::default()
            };
            let cluster = LocalCluster::up(plan, nodes, |step| eprintln!("  {step}")).await?;
            match c.output {
                Format::Json => output::json(&cluster)?,
                Format::Table => output::text(format!(
                    "✔ {nodes} nodes are up\n  export CLUSTERCTL_SERVER={}\n  clusterctl vm create web-1 --disk vol-a:64MiB\n  clusterctl migrate web-1\n  clusterctl dev kill n2      (then: clusterctl events -f)\n  clusterctl dev down",
                    cluster.nodes[0].address
                ))?,
            }
        }
        Command::Down { folder } => {
            LocalCluster::load(&folder)?.down()?;
            if c.output == Format::Table {
                output::text("✔ stopped and removed")?;
            }
        }
        Command::Kill {
            node,
            clusterd,
            folder,
        } => {
            let mut cluster = LocalCluster::load(&folder)?;
            let at = cluster.index_of(&node)?;
            if clusterd {
                cluster.kill_clusterd(at);
            } else {
                cluster.kill_node(at);
            }
            cluster.save()?;
            if c.output == Format::Table {
                output::text(format!(
                    "✔ {node} is dead; watch: clusterctl events -f; bring it back: clusterctl dev start {node}"
                ))?;
            }
        }
        Command::Start { node, folder } => {
            let mut cluster = LocalCluster::load(&folder)?;
            let at = cluster.index_of(&node)?;
            cluster.start_node(at)?;
            cluster.connect(at).await?;
            cluster.save()?;
            if c.output == Format::Table {
                output::text(format!("✔ {node} is started"))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
