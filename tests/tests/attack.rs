//! A real cluster, looked at by somebody who wishes it ill: what is on the wire, what leaks, what may be
//! impersonated with what lies around.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use proto::admin::{NodeAddRequest, TokenCreateRequest};
use proto::peer::peer_client::PeerClient;
use proto::peer::{HeartbeatRequest, ReadIndexRequest};
use proto::tls::{self, Credentials, Expect};
use tests::cluster::{Machine, Setup, TestCluster};
use tests::wire::{self, Tap};
use tests::{all_or_skip, kvm_or_skip};

fn setup() -> Setup {
    Setup {
        relay: false,
        ..Setup::default()
    }
}

/// The project's own ports: the API and peers, memory streams, the embedded storage server.
fn ours(port: u16) -> bool {
    port == 7440 || port == 2049 || (7450..=7481).contains(&port)
}

#[test]
fn everything_between_nodes_monitors_and_people_is_tls_13() -> anyhow::Result<()> {
    if !kvm_or_skip("attack (wire)") || !all_or_skip("attack (wire)") {
        return Ok(());
    }
    // Whoever else speaks NFS on this host is none of ours. Before any other thread is started: threads and processes
    // inherit their starter's network.
    wire::enter_network_of_its_own()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(everything_is_tls_13())
}

async fn everything_is_tls_13() -> anyhow::Result<()> {
    let tap = Tap::open(ours).context("cannot listen on the wire")?;
    let cluster = TestCluster::start(Setup {
        nfs_tls: true,
        ..setup()
    })
    .await?;
    cluster.create(&Machine::small("vm-a")).await?;
    let from = cluster.vm("vm-a").await?.node;
    for to in ["n1", "n2", "n3"] {
        if to != from && cluster.vm("vm-a").await?.node != to {
            assert_eq!(cluster.migrate("vm-a", to).await?.state, "cut-over");
        }
    }
    let token = cluster.local.token()?;
    drop(cluster);
    let flows = tap.close()?;
    let (mut api, mut memory, mut storage) = (0, 0, 0);
    for ((from, to), content) in &flows {
        let rpc = from.port() == 2049 || to.port() == 2049;
        let judged = if rpc {
            wire::is_rpc_with_tls(content)
        } else {
            wire::is_tls13(content)
        };
        if let Err(why) = judged {
            panic!("{from} → {to}: {why}");
        }
        let secret = token.secret.expose().as_bytes();
        assert!(
            !content.windows(secret.len()).any(|bytes| bytes == secret),
            "{from} → {to} carries an access token in clear"
        );
        match to.port() {
            7440 => api += 1,
            7450..=7481 => memory += 1,
            2049 => storage += 1,
            _ => {}
        }
    }
    assert!(api >= 6, "only {api} connections to nodes were caught");
    assert!(memory >= 2, "only {memory} memory streams were caught");
    assert!(
        storage >= 2,
        "only {storage} storage connections were caught"
    );
    Ok(())
}

/// Every file below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .flat_map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => files(&entry.path()),
            Ok(kind) if kind.is_file() => vec![entry.path()],
            _ => Vec::new(),
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_any_log_argument_environment_or_file_but_its_own() -> anyhow::Result<()> {
    if !kvm_or_skip("attack (secrets)") {
        return Ok(());
    }
    let cluster = TestCluster::start(setup()).await?;
    let mut secrets = vec![(
        "the administrator's token",
        cluster.local.token()?.secret.expose().to_owned(),
    )];
    let recovery = cluster.local.recovery_key.as_ref();
    secrets.push((
        "the recovery key",
        recovery.context("a recovery key")?.expose().to_owned(),
    ));
    let mut api = cluster.api().await?;
    let made = api
        .api
        .token_create(TokenCreateRequest {
            change: Some(clusterctl::client::change(None, "planted")),
            user: "planted".into(),
            role: "operator".into(),
            ..TokenCreateRequest::default()
        })
        .await?
        .into_inner();
    let token = proto::token::AccessToken::parse(&made.token)?;
    secrets.push(("a person's token", token.secret.expose().to_owned()));
    let added = api
        .api
        .node_add(NodeAddRequest {
            change: Some(clusterctl::client::change(None, "planted")),
            name: "n9".into(),
            ..NodeAddRequest::default()
        })
        .await?
        .into_inner();
    let join = proto::token::JoinToken::parse(&added.line)?;
    secrets.push(("a join token", join.secret.expose().to_owned()));
    for node in &cluster.local.nodes {
        let pem = std::fs::read_to_string(node.folder.join("trust/node.key"))?;
        let body = pem.lines().nth(1).context("a key")?.to_owned();
        secrets.push(("a node's key", body));
    }
    // A whole life of a machine, and a death.
    cluster.create(&Machine::small("vm-a")).await?;
    let from = cluster.vm("vm-a").await?.node;
    let to = if from == "n1" { "n2" } else { "n1" };
    cluster.migrate("vm-a", to).await?;
    cluster.stop("vm-a").await?;

    let own = |path: &Path| path.ends_with("trust/node.key") || path.ends_with("cluster.json");
    let folder = cluster.local.plan.folder.clone();
    let mut looked_at = 0;
    for path in files(&folder).into_iter().filter(|path| !own(path)) {
        let content = std::fs::read(&path).unwrap_or_default();
        looked_at += 1;
        find(&secrets, &content, &path.display().to_string());
    }
    assert!(looked_at > 20, "only {looked_at} files");
    for pid in clusterctl::local::processes_of(&folder) {
        for file in ["cmdline", "environ"] {
            let path = format!("/proc/{pid}/{file}");
            find(&secrets, &std::fs::read(&path).unwrap_or_default(), &path);
        }
        // A core dump would hold them all.
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
        let core = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max core file size"));
        if let Some(core) = core {
            let allowed: Vec<&str> = core.split_whitespace().take(2).collect();
            assert_eq!(allowed, ["0", "0"], "process {pid}");
        }
    }
    Ok(())
}

fn find(secrets: &[(&str, String)], content: &[u8], place: &str) {
    for (what, secret) in secrets {
        let there = content
            .windows(secret.len())
            .any(|bytes| bytes == secret.as_bytes());
        assert!(!there, "{what} stands in {place}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_stolen_disk_holds_is_worth_nothing_once_its_node_is_removed() -> anyhow::Result<()>
{
    if !kvm_or_skip("attack (stolen disk)") {
        return Ok(());
    }
    let mut cluster = TestCluster::start(setup()).await?;
    let at = cluster.local.index_of("n3")?;
    let folder = cluster.local.nodes[at].folder.join("trust");
    let key = std::fs::read_to_string(folder.join("node.key"))?;
    let papers: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("papers.json"))?)?;
    let chain = papers["chain_pem"].as_str().context("a chain")?;
    let credentials = Credentials::from_pem(chain, &key)?;
    let thief = credentials.identity()?.node;
    let root = cluster.local.token()?.root()?;
    let config = tls::client(Expect::Root(root), Some(&credentials))?;
    let address = cluster.address_of("n1").context("n1")?.to_string();
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{address}"))?
        .connect_with_connector_lazy(tower_connector(address.clone(), config));
    let mut peer = PeerClient::new(channel);
    // While its node belongs to the cluster it is that node, and no other.
    peer.read_index(ReadIndexRequest {}).await?;
    let other = HeartbeatRequest {
        node_id: 1,
        incarnation: 1,
        sequence: 1,
        report: b"{}".to_vec(),
        applied: 0,
    };
    let refused = peer.heartbeat(other).await.expect_err("another's lease");
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
    assert_ne!(thief.0, 1);
    cluster.local.kill_node(at);
    cluster
        .wait("n3 is lost", async || {
            let nodes = cluster.nodes().await?;
            Ok(nodes
                .iter()
                .any(|node| node.name == "n3" && node.state == "lost")
                .then_some(()))
        })
        .await?;
    let removed = cluster.ctl(&["node", "remove", "n3", "--yes"]).await?;
    assert_eq!(removed.code, 0, "{removed:?}");
    let gone = tokio::time::timeout(Duration::from_secs(1), async {
        while peer.read_index(ReadIndexRequest {}).await.is_ok() {}
    });
    gone.await.context("a removed node is still heard")?;
    Ok(())
}

/// Connects to `address` through TLS.
fn tower_connector(
    address: String,
    config: std::sync::Arc<rustls::ClientConfig>,
) -> impl tower::Service<
    tonic::transport::Uri,
    Response = hyper_util::rt::TokioIo<tls::ClientStream<tokio::net::TcpStream>>,
    Error = std::io::Error,
    Future = impl Future<
        Output = std::io::Result<hyper_util::rt::TokioIo<tls::ClientStream<tokio::net::TcpStream>>>,
    > + Send,
> + Send {
    tower::service_fn(move |_: tonic::transport::Uri| {
        let (address, config) = (address.clone(), config.clone());
        async move {
            let stream = tokio::net::TcpStream::connect(address).await?;
            tls::connect(config, stream)
                .await
                .map(hyper_util::rt::TokioIo::new)
        }
    })
}
