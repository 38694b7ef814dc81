//! `clusterctl dev`: a cluster on this machine, to try things and to break them.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use proto::token::AccessToken;

use crate::Context;
use crate::client::CliError;
use crate::contexts::{self, Contexts, Entry};
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

/// What the local cluster is called among the contexts.
const CONTEXT: &str = "dev";

fn default_folder() -> PathBuf {
    std::env::temp_dir().join(format!("baton-dev-{}", nix::unistd::getuid()))
}

/// Keeps the cluster as a context; says how it is meant on a command line.
fn remember(cluster: &LocalCluster) -> Result<&'static str, CliError> {
    let path = contexts::path()?;
    let mut contexts = Contexts::load(&path)?;
    if let Some(entry) = contexts
        .contexts
        .get(CONTEXT)
        .filter(|entry| !is_local(entry))
    {
        return Err(CliError::Local(format!(
            "there is a context {CONTEXT} already, and it is of another cluster ({})",
            entry.servers
        )));
    }
    contexts.put(CONTEXT, Entry::of(&cluster.endpoint_of_all()?));
    contexts.save(&path)?;
    Ok(if contexts.current.as_deref() == Some(CONTEXT) {
        ""
    } else {
        " -C dev"
    })
}

/// Whether a context is of a cluster on this machine, such as one that was not taken down.
fn is_local(entry: &Entry) -> bool {
    entry
        .servers
        .split(',')
        .all(|server| server.trim().starts_with("127."))
}

/// Forgets the context, if it is this cluster's.
fn forget(token: Option<&AccessToken>) -> Result<(), CliError> {
    let path = contexts::path()?;
    let mut contexts = Contexts::load(&path)?;
    let kept = contexts.contexts.get(CONTEXT).map(Entry::access);
    if let Some(Ok(Some(kept))) = kept
        && Some(&kept) == token
    {
        contexts.remove(CONTEXT);
        contexts.save(&path)?;
    }
    Ok(())
}

/// The cluster without its secrets.
fn shown(cluster: &LocalCluster, kept: bool) -> serde_json::Value {
    serde_json::json!({
        "plan": cluster.plan,
        "nodes": cluster.nodes,
        "nfs": cluster.nfs,
        "context": kept.then_some(CONTEXT),
    })
}

fn screen(nodes: u8, cluster: &LocalCluster, ask: Result<&str, CliError>) -> String {
    let (how, with) = match ask {
        Ok("") => (
            "it is the current context, dev: clusterctl status".to_owned(),
            "",
        ),
        Ok(with) => (format!("the context is dev: clusterctl{with} status"), with),
        Err(error) => (
            format!(
                "no context could be kept ({error})\n  export CLUSTERCTL_SERVER={}",
                cluster.nodes[0].folder.join("clusterd.sock").display()
            ),
            "",
        ),
    };
    format!(
        "✔ {nodes} nodes are up; every connection between them, and yours to them, is TLS 1.3\n  {how}\n  clusterctl{with} vm create web-1 --disk vol-a:64MiB\n  clusterctl{with} migrate web-1\n  clusterctl dev kill n2      (then: clusterctl{with} events -f)\n  clusterctl dev down"
    )
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
                nfs_tls: true,
                ..Plan::default()
            };
            let cluster = LocalCluster::up(plan, nodes, |step| eprintln!("  {step}")).await?;
            let ask = remember(&cluster);
            match c.output {
                Format::Json => output::json(&shown(&cluster, ask.is_ok()))?,
                Format::Table => output::text(screen(nodes, &cluster, ask))?,
            }
        }
        Command::Down { folder } => {
            let cluster = LocalCluster::load(&folder)?;
            let token = cluster.token().ok();
            cluster.down()?;
            if let Err(error) = forget(token.as_ref()) {
                eprintln!("note: the context {CONTEXT} is still there: {error}");
            }
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
                    "✔ {node} is dead; watch: clusterctl -C dev events -f; bring it back: clusterctl dev start {node}"
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

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use proto::token::Secret;

    use super::*;
    use crate::client::Endpoint;
    use crate::local::{API_PORT, Member};

    fn cluster() -> LocalCluster {
        let member = |name: &str| Member {
            name: name.into(),
            address: SocketAddr::from(([127, 42, 0, 11], API_PORT)),
            folder: PathBuf::from("/x").join(name),
            pid: 0,
        };
        LocalCluster {
            plan: Plan::default(),
            nodes: vec![member("n1")],
            nfs: member("nfs"),
            access_token: Some(Secret::from_text("BT1.hidden")),
            recovery_key: Some(Secret::from_text("RECOVER-ME")),
        }
    }

    #[test]
    fn what_is_printed_of_a_local_cluster_has_no_secret() {
        let json = shown(&cluster(), true).to_string();
        assert!(json.contains("127.42.0.11:7440"), "{json}");
        for text in [json, screen(1, &cluster(), Ok(" -C dev"))] {
            assert!(
                !text.contains("hidden") && !text.contains("RECOVER"),
                "{text}"
            );
        }
    }

    #[test]
    fn the_next_steps_name_the_context_only_where_they_must() {
        assert!(screen(1, &cluster(), Ok("")).contains("clusterctl vm create"));
        assert!(screen(1, &cluster(), Ok(" -C dev")).contains("clusterctl -C dev vm create"));
        let unkept = screen(1, &cluster(), Err(CliError::Local("no home".into())));
        assert!(
            unkept.contains("CLUSTERCTL_SERVER=/x/n1/clusterd.sock"),
            "{unkept}"
        );
    }

    #[test]
    fn a_context_of_another_cluster_is_not_taken_for_a_local_one() {
        let entry = |servers: &str| {
            Entry::of(&Endpoint {
                servers: servers.into(),
                token: None,
            })
        };
        assert!(is_local(&entry("127.42.0.11:7440, 127.42.0.12:7440")));
        assert!(!is_local(&entry("127.42.0.11:7440,10.0.0.1:7440")));
        assert!(!is_local(&entry("dev.example.org:7440")));
    }
}
