//! Putting a local cluster together, as an administrator does it: `cluster init`, then one line for each node.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use proto::token::Secret;

use super::{API_PORT, LocalCluster, Member, NFS_PORT, NODES_MAX, Plan, START_TIMEOUT};
use crate::client::{CliError, Connection};
use crate::commands::node::token_line;

/// A node that is not in by then will not come, seconds.
const JOIN_TOKEN_LIFE_S: u64 = 600;

impl LocalCluster {
    /// Starts the NFS server and the nodes, makes the cluster, lets every node in and adds the volume
    /// `vol-a`. `tell` is told each step.
    ///
    /// # Errors
    /// When a program is missing, an address is taken, or a step is refused; what was started is stopped.
    pub async fn up(
        plan: Plan,
        nodes: u8,
        mut tell: impl FnMut(&str),
    ) -> Result<LocalCluster, CliError> {
        if !(1..=NODES_MAX).contains(&nodes) {
            return Err(CliError::Local(format!(
                "{nodes} nodes: use 1 to {NODES_MAX}"
            )));
        }
        if plan.folder.join("cluster.json").exists() {
            return Err(CliError::Local(format!(
                "there is a local cluster in {} already; stop it first: clusterctl dev down",
                plan.folder.display()
            )));
        }
        fs::create_dir_all(&plan.folder)?;
        // Its usual place is open to everybody: whoever made the folder first could change what runs in it.
        if fs::metadata(&plan.folder)?.uid() != nix::unistd::geteuid().as_raw() {
            return Err(CliError::Local(format!(
                "{} is another user's; use --folder",
                plan.folder.display()
            )));
        }
        let member = |name: String, number: u8, port: u16| Member {
            folder: plan.folder.join(&name),
            name,
            address: SocketAddr::new(IpAddr::V4(plan.ip(number)), port),
            pid: 0,
        };
        let mut cluster = LocalCluster {
            nodes: (1..=nodes)
                .map(|number| member(format!("n{number}"), number, API_PORT))
                .collect(),
            nfs: member("nfs".into(), 0, NFS_PORT),
            plan,
            access_token: None,
            recovery_key: None,
        };
        let here = |member: &&Member| !cluster.plan.enter.contains_key(&member.name);
        for member in cluster.nodes.iter().chain([&cluster.nfs]).filter(here) {
            if let Err(error) = TcpListener::bind(member.address) {
                return Err(CliError::Local(format!(
                    "{} cannot be used: {error}; is another local cluster running? see: clusterctl dev --help",
                    member.address
                )));
            }
        }
        match cluster.assemble(&mut tell).await {
            Ok(()) => Ok(cluster),
            Err(error) => {
                let logs = cluster.plan.folder.clone();
                cluster.kill_everything();
                Err(CliError::Local(format!(
                    "{error}\n  logs: {}",
                    logs.display()
                )))
            }
        }
    }

    async fn assemble(&mut self, tell: &mut impl FnMut(&str)) -> Result<(), CliError> {
        if self.plan.volume.is_none() {
            tell(&format!(
                "NFS server on {} (embedded; keeps owner, group and mode itself)",
                self.nfs.address
            ));
            self.start_nfs()?;
        }
        for at in 0..self.nodes.len() {
            self.start_node(at)?;
        }
        self.save()?;
        let change = || Some(crate::client::change(None, "local cluster"));
        let mut first = self.connect_socket(0).await?;
        let made = first
            .api
            .cluster_init(proto::admin::ClusterInitRequest {
                change: change(),
                name: "local".into(),
                fast: self.plan.fast,
            })
            .await?
            .into_inner();
        self.access_token = Some(Secret::from_text(&made.access_token));
        self.recovery_key = Some(Secret::from_text(&made.recovery_key));
        // The secrets cannot be asked for again.
        self.save()?;
        tell(&format!(
            "cluster `local` made on n1 ({}), with a certificate authority of its own",
            self.nodes[0].address
        ));
        for at in 1..self.nodes.len() {
            let request = proto::admin::NodeAddRequest {
                change: change(),
                name: self.nodes[at].name.clone(),
                role: "voter".into(),
                ttl_s: JOIN_TOKEN_LIFE_S,
            };
            let line = first.api.node_add(request).await?.into_inner();
            let request = proto::admin::NodeJoinRequest {
                change: change(),
                token: token_line(&line)?.to_owned(),
            };
            self.connect_socket(at)
                .await?
                .api
                .node_join(request)
                .await?;
            tell(&format!(
                "{} joined ({}) with a line that is good once",
                self.nodes[at].name, self.nodes[at].address
            ));
        }
        // From here on as from anywhere: TLS, and the administrator's token.
        let mut connection = self.connect(0).await?;
        self.wait_until_up(&mut connection).await?;
        wait_tcp(self.nfs.address).await?;
        let url = self.volume_url();
        let tls_ca = if self.plan.nfs_tls && self.plan.volume.is_none() {
            std::fs::read_to_string(self.nfs_tls_folder().join("ca.pem"))?
        } else {
            String::new()
        };
        let request = proto::admin::VolumeAddRequest {
            change: change(),
            name: "vol-a".into(),
            url: url.clone(),
            tls_ca,
            ..Default::default()
        };
        let volume = connection.api.volume_add(request).await?.into_inner();
        tell(&format!(
            "volume vol-a at {url}, fence class {}",
            volume.fence_class
        ));
        Ok(())
    }

    /// Waits until every node is up and up to five have a vote.
    async fn wait_until_up(&self, connection: &mut Connection) -> Result<(), CliError> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let status = connection
                .api
                .cluster_status(proto::admin::ClusterStatusRequest {})
                .await?
                .into_inner();
            let voters = self.nodes.len().min(5);
            if status.nodes_up as usize == self.nodes.len() && status.voters.len() >= voters {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(CliError::Local(format!(
                    "after {} s only {} of {} nodes are up ({} voters)",
                    START_TIMEOUT.as_secs(),
                    status.nodes_up,
                    self.nodes.len(),
                    status.voters.len()
                )));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Waits until somebody listens at an address.
async fn wait_tcp(address: SocketAddr) -> Result<(), CliError> {
    let deadline = Instant::now() + START_TIMEOUT;
    while tokio::net::TcpStream::connect(address).await.is_err() {
        if Instant::now() > deadline {
            return Err(CliError::Local(format!(
                "nothing listens at {address} after {} s",
                START_TIMEOUT.as_secs()
            )));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}
