//! Volumes that cannot be used are refused with what to try; a full one loses nothing; a file that is somebody
//! else's is left alone.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use proto::admin::VolumeAddRequest;
use tests::bad_input::{change, refused, unhurt};
use tests::cluster::{Machine, Setup, TestCluster};
use tokio::net::TcpStream;

/// An NFS server of its own on a small file system of its own, in namespaces of its own (no root needed).
struct SmallServer {
    child: Child,
    url: String,
    root: PathBuf,
    _folder: tempfile::TempDir,
}

impl SmallServer {
    /// Of that many MiB; `None` where this host gives ordinary users no namespaces.
    async fn start(
        address: IpAddr,
        mib: u32,
        read_only: bool,
    ) -> anyhow::Result<Option<SmallServer>> {
        let folder = tempfile::tempdir()?;
        let root = folder.path().join("root");
        std::fs::create_dir(&root)?;
        let address = SocketAddr::new(address, 2049);
        let access = if read_only { "--read-only" } else { "" };
        let script = format!(
            "mount -t tmpfs -o size={mib}m tmpfs \"$0\" && exec \"$1\" serve-nfs --listen {address} --root \"$0\" --export /baton {access}"
        );
        let log = std::fs::File::create(folder.path().join("log"))?;
        let child = Command::new("unshare")
            .args(["--map-root-user", "--mount", "sh", "-c", &script])
            .arg(&root)
            .arg(clusterctl::local::program("storage-broker")?)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        let pid = child.id();
        let mut server = SmallServer {
            root: PathBuf::from(format!("/proc/{pid}/root{}", root.display())),
            url: format!("nfs://{address}/baton"),
            child,
            _folder: folder,
        };
        for _ in 0..400 {
            if TcpStream::connect(address).await.is_ok() {
                return Ok(Some(server));
            }
            if server.child.try_wait()?.is_some() {
                let said = std::fs::read_to_string(server._folder.path().join("log"))?;
                proto::skip!("bad_volumes (small volumes)", "{}", said.trim());
                return Ok(None);
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        anyhow::bail!("the small NFS server does not listen")
    }

    /// Leaves no room on it.
    fn fill(&self) -> anyhow::Result<()> {
        let mut file = std::fs::File::create(self.root.join("filler"))?;
        let chunk = vec![1; 64 << 10];
        loop {
            match std::io::Write::write(&mut file, &chunk) {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn make_room(&self) -> anyhow::Result<()> {
        Ok(std::fs::remove_file(self.root.join("filler"))?)
    }
}

impl Drop for SmallServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_that_cannot_be_used_are_refused_and_a_full_one_loses_nothing() -> anyhow::Result<()>
{
    if !tests::kvm_or_skip("bad_volumes") {
        return Ok(());
    }
    let cluster = TestCluster::start(Setup::default()).await?;
    let vm = cluster.create(&Machine::small("vm-a")).await?;
    let foreign = tempfile::tempdir()?;
    let identity = std::fs::read_to_string(cluster.local.nfs_root().join(".baton-volume.json"))?;
    let mut identity: serde_json::Value = serde_json::from_str(&identity)?;
    identity["cluster_id"] = "11111111-2222-3333-4444-555555555555".into();
    let identity_text = identity.to_string();
    std::fs::write(foreign.path().join(".baton-volume.json"), &identity_text)?;
    let foreign_url = format!("dir:{}", foreign.path().display());
    let garbled = tempfile::tempdir()?;
    std::fs::write(garbled.path().join(".baton-volume.json"), b"\0\xff{")?;
    let garbled_url = format!("dir:{}", garbled.path().display());
    let nobody = format!("nfs://{}:9/baton", cluster.ip("n1"));
    let no_nfs = format!("nfs://{}:7441/baton", cluster.ip("n1"));
    let no_export = format!("nfs://{}:2049/other", cluster.ip("nfs"));
    let cases: [(&str, &str, &[&str]); 9] = [
        ("vol-a", "dir:/tmp", &["E-EXISTS", "vol-a", "another name"]),
        ("Vol", "dir:/tmp", &["E-NAME", "a-z"]),
        ("v", "ftp://host/x", &["ftp://host/x", "nfs://"]),
        (
            "v",
            "dir:relative",
            &["dir:relative", "must begin with `/`"],
        ),
        ("v", "dir:/nowhere/at/all", &["/nowhere/at/all", "exist"]),
        ("v", &nobody, &["E-VOLUME", &nobody, "reach"]),
        ("v", &no_nfs, &["E-VOLUME", &no_nfs]),
        ("v", &no_export, &["E-VOLUME", "/other", "export"]),
        (
            "v",
            &foreign_url,
            &["another cluster", "11111111-2222", ".baton-volume.json"],
        ),
    ];
    for (name, url, words) in cases {
        let said = cluster.ctl(&["volume", "add", name, url]).await?;
        refused(&format!("volume add {name} {url}"), &said, words)?;
    }
    let said = cluster.ctl(&["volume", "add", "v", &garbled_url]).await?;
    refused("a garbled identity", &said, &[".baton-volume.json"])?;
    let kept = std::fs::read_to_string(foreign.path().join(".baton-volume.json"))?;
    ensure!(
        kept == identity_text,
        "the other cluster's volume was changed"
    );

    // A machine whose disks were never made leaves alone what has their names, and is deleted all the same.
    let somebodys = cluster.local.nfs_root().join("taken-0.raw");
    std::fs::write(&somebodys, b"mine")?;
    let create = [
        "vm",
        "create",
        "taken",
        "--no-start",
        "--memory",
        "64",
        "--working-set",
        "8",
        "--disk",
        "vol-a:4MiB",
    ];
    let said = cluster.ctl(&create).await?;
    ensure!(said.code == 0, "{}", said.err);
    let said = cluster.ctl(&["vm", "delete", "taken", "--yes"]).await?;
    ensure!(said.code == 0, "{}", said.err);
    ensure!(
        std::fs::read(&somebodys)? == b"mine",
        "somebody's file was changed"
    );

    let [a, b, _] = cluster.local.plan.subnet;
    let ip = |last: u8| IpAddr::from([a, b, cluster.local.plan.subnet[2], last]);
    if let Some(server) = SmallServer::start(ip(201), 8, true).await? {
        let said = cluster.ctl(&["volume", "add", "v", &server.url]).await?;
        refused("a read-only volume", &said, &["read-only", "read-write"])?;
    }
    if let Some(server) = SmallServer::start(ip(202), 12, false).await? {
        server.fill()?;
        let said = cluster.ctl(&["volume", "add", "v", &server.url]).await?;
        refused("a full volume", &said, &["full", "free space"])?;
        server.make_room()?;
        full_while_running(&cluster, &server).await?;
    }
    let volumes = cluster.ctl(&["-o", "json", "volume", "list"]).await?;
    let volumes: Vec<serde_json::Value> = serde_json::from_str(&volumes.out)?;
    ensure!(
        volumes.iter().all(|volume| volume["name"] != "v"),
        "{volumes:?}"
    );
    unhurt(&cluster, &vm).await
}

/// A guest whose volume fills up waits, and goes on by itself when there is room again.
async fn full_while_running(cluster: &TestCluster, server: &SmallServer) -> anyhow::Result<()> {
    let request = VolumeAddRequest {
        change: change(),
        name: "small".into(),
        url: server.url.clone(),
        ..Default::default()
    };
    cluster.api().await?.api.volume_add(request).await?;
    let image = tempfile::NamedTempFile::new()?;
    std::fs::write(image.path(), vec![7; 16 << 20])?;
    let disk = format!("small:16MiB:{}", image.path().display());
    let said = cluster
        .ctl(&[
            "vm",
            "create",
            "large",
            "--memory",
            "64",
            "--working-set",
            "8",
            "--disk",
            &disk,
        ])
        .await?;
    refused(
        "an image larger than the volume",
        &said,
        &["full", "free space"],
    )?;
    let said = cluster.ctl(&["vm", "stop", "large"]).await?;
    ensure!(said.code == 0, "{}", said.err);
    let said = cluster.ctl(&["vm", "delete", "large", "--yes"]).await?;
    ensure!(said.code == 0, "{}", said.err);

    let said = cluster
        .ctl(&[
            "vm",
            "create",
            "writer",
            "--memory",
            "64",
            "--working-set",
            "8",
            "--disk",
            "small:64MiB",
        ])
        .await?;
    ensure!(said.code == 0, "{}", said.err);
    cluster.wait_progress("writer").await?;
    server.fill()?;
    // Its disk is sparse and it writes ever new blocks: with no room it comes to wait.
    let stalled = cluster
        .wait("the guest to wait for room", async || {
            let flushed = async || -> anyhow::Result<u64> {
                Ok(cluster
                    .vm("writer")
                    .await?
                    .guest
                    .context("no guest")?
                    .flushed)
            };
            let first = flushed().await?;
            tokio::time::sleep(Duration::from_millis(1_500)).await;
            let second = flushed().await?;
            Ok((first == second).then_some(second))
        })
        .await?;
    let told = cluster.vm("writer").await?.guest.context("no guest")?;
    ensure!(told.errors == 0, "the guest saw an error: {}", told.error);
    server.make_room()?;
    let guest = cluster.wait_progress("writer").await?;
    ensure!(
        guest.flushed > stalled && guest.found_at_boot == 0,
        "{guest:?}"
    );
    // Full again: its disk can still be passed to another token, and nothing that was flushed is lost.
    server.fill()?;
    let said = cluster.ctl(&["vm", "stop", "writer", "--force"]).await?;
    ensure!(said.code == 0, "{}", said.err);
    let said = cluster.ctl(&["vm", "start", "writer"]).await?;
    ensure!(
        said.code == 0,
        "a machine of a full volume does not start: {}",
        said.err
    );
    server.make_room()?;
    let after = cluster.wait_progress("writer").await?;
    ensure!(
        after.found_at_boot >= guest.flushed && after.errors == 0,
        "{guest:?} became {after:?}"
    );
    let said = cluster.ctl(&["vm", "stop", "writer"]).await?;
    ensure!(said.code == 0, "{}", said.err);
    Ok(())
}
