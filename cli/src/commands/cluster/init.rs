//! `clusterctl cluster init`: a cluster of the node on this host, and its first secrets, shown once.

use std::process::ExitCode;

use proto::admin::{ClusterInitReply, ClusterInitRequest, NodeListRequest};

use crate::Context;
use crate::client::{CliError, Connection};
use crate::output::{self, Format};

/// `cluster init`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to call it: a-z, 0-9 and '-'.
    #[arg(default_value = "baton")]
    name: String,
    /// Count a node as lost after 2.8 s and not 6.5 s: for networks without stalls.
    #[arg(long)]
    fast: bool,
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, args: Args) -> Result<ExitCode, CliError> {
    let mut connection = Connection::open(&c.given.socket()?).await?;
    let request = ClusterInitRequest {
        change: c.change(),
        name: args.name.clone(),
        fast: args.fast,
    };
    let reply = connection.api.cluster_init(request).await?.into_inner();
    match c.output {
        Format::Json => output::json(&reply)?,
        Format::Table => {
            // The secrets are shown whatever becomes of this question: they cannot be asked for again.
            let address = match connection.api.node_list(NodeListRequest {}).await {
                Ok(list) => list.into_inner().nodes.into_iter().next(),
                Err(_) => None,
            };
            let address = address.map_or_else(|| "HOST:7440".to_owned(), |node| node.address);
            output::text(screen(&args.name, &reply, &address))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What stands around the recovery key, so that nobody overlooks it.
const RULE: &str =
    "════════════════════════════════════════════════════════════════════════════════";

fn screen(name: &str, reply: &ClusterInitReply, address: &str) -> String {
    format!(
        "✔ cluster {name} ({id}) has its first node, {node}\n\n\
         {RULE}\n\
         \x20 RECOVERY KEY — shown now and NEVER AGAIN. Write it down and keep it away from the nodes.\n\n\
         \x20     {recovery}\n\n\
         \x20 It opens the key of this cluster's root: without it the root can never be changed\n\
         \x20 (clusterctl cluster ca rotate). Whoever has it and a node's files can make themselves a member.\n\
         {RULE}\n\n\
         The first administrator's access token, shown once too:\n\n\
         {token}\n\n\
         On your own machine (it asks for the token):\n\
         \x20 clusterctl context add {name} {address}\n\
         Next (on this node with sudo; three nodes survive the loss of one):\n\
         \x20 clusterctl node add n2\n\
         \x20 clusterctl volume add NAME nfs://server/export",
        id = reply.cluster_id,
        node = reply.node,
        recovery = reply.recovery_key,
        token = reply.access_token,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_screen_has_both_secrets_once_and_the_next_steps() {
        let reply = ClusterInitReply {
            cluster_id: "0b5a".into(),
            node: "n1".into(),
            recovery_key: "RECOVER-ME".into(),
            access_token: "BT1.first".into(),
            ca_sha256: "ab".repeat(32),
        };
        let text = screen("lab", &reply, "10.0.0.11:7440");
        assert_eq!(text.matches("RECOVER-ME").count(), 1);
        assert_eq!(text.matches("BT1.first").count(), 1);
        for words in [
            "NEVER AGAIN",
            "clusterctl context add lab 10.0.0.11:7440",
            "clusterctl node add n2",
        ] {
            assert!(text.contains(words), "{words}");
        }
        // A line of its own: it is copied whole.
        assert!(text.lines().any(|line| line == "BT1.first"));
    }
}
