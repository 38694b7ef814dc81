//! Bad input gets a clear error that says what to try, and loses nothing: flags and files, machines that
//! cannot be, moves that cannot be, garbage on every port. Volumes have a file of their own.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use proto::admin::{VmCreateRequest, VmMigrateRequest};
use proto::token::{AccessToken, Secret};
use tests::bad_input::{change, refused, unhurt};
use tests::cluster::{Machine, Setup, TestCluster};
use tests::ctl::{run, run_with};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UnixStream};
use tonic::Status;

/// The request must be refused, in these words.
fn refused_status<T>(what: &str, result: Result<T, Status>, words: &[&str]) -> anyhow::Result<()> {
    let Err(status) = result else {
        anyhow::bail!("{what} should be refused");
    };
    let message = status.message();
    ensure!(
        words.iter().all(|word| message.contains(word)),
        "{what} should be refused with {words:?}: {message}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flags_and_files_that_cannot_be_are_refused_at_once() -> anyhow::Result<()> {
    let cases: [(&[&str], &[&str]); 11] = [
        (&["--frobnicate"], &["--frobnicate", "--help"]),
        (&["migrte", "vm-a"], &["migrte", "migrate"]),
        (
            &["vm", "create", "x", "--memory", "lots"],
            &["`lots` is not a size", "512MiB"],
        ),
        (
            &["vm", "create", "x", "--memory", "4QiB"],
            &["`qib` is not a unit", "GiB"],
        ),
        (
            &["vm", "create", "x", "--disk", "vol-a"],
            &["VOLUME:SIZE", "vol-a:40GiB"],
        ),
        (&["vm", "create", "x", "--cpu", "-1"], &["--help"]),
        (&["-o", "yaml", "status"], &["yaml", "json"]),
        (&["--timeout", "0", "status"], &["--timeout", "86400"]),
        (
            &["--server", "nowhere", "status"],
            &["E-ADDRESS", "host:port"],
        ),
        (
            &["--server", "127.0.0.1:1", "status"],
            &["E-TOKEN", "context add NAME 127.0.0.1:1", "--token"],
        ),
        (
            &["--server", "/nowhere/clusterd.sock", "status"],
            &["E-CONNECT", "/nowhere/clusterd.sock", "try:"],
        ),
    ];
    for (arguments, words) in cases {
        let said = run("clusterctl", arguments).await?;
        refused(&format!("clusterctl {arguments:?}"), &said, words)?;
        ensure!(said.out.is_empty(), "errors are no data: {}", said.out);
    }
    let token = AccessToken {
        ca_sha256: "ab".repeat(32),
        id: "t1".into(),
        secret: Secret::new(&[7; 32]),
    };
    let nobody = &["--server", "127.0.0.1:1", "status"];
    for (token, words) in [
        (
            token.line(),
            ["E-CONNECT", "nothing answers at 127.0.0.1:1", "--server"].as_slice(),
        ),
        ("BT1.hidden".to_owned(), &["E-TOKEN", "BT1."]),
    ] {
        let said = run_with("clusterctl", nobody, &[("CLUSTERCTL_TOKEN", &token)]).await?;
        refused("a token and nobody there", &said, words)?;
        ensure!(!said.err.contains(&token), "a token is shown: {}", said.err);
    }

    let folder = tempfile::tempdir()?;
    let file = |name: &str, text: &[u8]| -> anyhow::Result<String> {
        let path = folder.path().join(name);
        std::fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let unknown = file("unknown.toml", b"name = \"n1\"\nmemory-mb = 5\n")?;
    let mistyped = file("mistyped.toml", b"memory-mib = \"much\"\n")?;
    let broken = file("broken.toml", b"name = \"n1\nlisten")?;
    let binary = file("binary.toml", &[0xff, 0xfe, 0, 1, 2])?;
    let long = format!("/tmp/{}", "d".repeat(70));
    let cases: [(&[&str], &[&str]); 14] = [
        (&["--frobnicate"], &["--frobnicate", "--help"]),
        (
            &["--config", &unknown],
            &["unknown.toml", "memory-mb", "memory-mib"],
        ),
        (
            &["--config", &mistyped],
            &["mistyped.toml", "memory-mib", "much"],
        ),
        (&["--config", &broken], &["broken.toml", "line 2"]),
        (&["--config", &binary], &["binary.toml"]),
        (
            &["--config", "/nowhere.toml"],
            &["/nowhere.toml", "No such file"],
        ),
        (&["--listen", "here"], &["--listen", "here"]),
        (
            &["--listen", "0.0.0.0:7440"],
            &["--advertise", "every address"],
        ),
        (&["--migration-ports", "9-3"], &["`9-3`", "7450-7481"]),
        (&["--memory-mib", "0"], &["--memory-mib", "at least 1 MiB"]),
        (&["--cpus", "0"], &["--cpus", "at least 1"]),
        (&["--data-dir", &long], &["--data-dir", "shorter path"]),
        (&["--name", "No Name"], &["--name", "a-z"]),
        (
            &["--vmm", "/nowhere/vmm"],
            &["--vmm", "no program /nowhere/vmm"],
        ),
    ];
    for (arguments, words) in cases {
        let said = run("clusterd", arguments).await?;
        refused(&format!("clusterd {arguments:?}"), &said, words)?;
    }
    let garbage = file("machine.json", b"{\"vm_id\": }")?;
    let socket = folder.path().join("s").display().to_string();
    let said = run("vmm", &["--config", &garbage, "--control", &socket]).await?;
    refused("vmm with a broken file", &said, &["machine.json"])?;
    let said = run(
        "storage-broker",
        &["serve-nfs", "--listen", "127.0.0.1:0", "--root", "/nowhere"],
    )
    .await?;
    refused("an NFS server of nothing", &said, &["/nowhere"])
}

fn spec(memory_mib: u64) -> serde_json::Value {
    serde_json::json!({
        "vcpus": 1,
        "memory_mib": memory_mib,
        "boot": { "self-check": { "working_set_mib": 8, "dirty_mib_s": 1 } },
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machines_and_moves_that_cannot_be_are_refused_and_nothing_is_lost() -> anyhow::Result<()> {
    if !tests::kvm_or_skip("bad_input") {
        return Ok(());
    }
    let cluster = TestCluster::start(Setup {
        memory_mib: 512,
        ..Setup::default()
    })
    .await?;
    let vm = cluster.create(&Machine::small("vm-a")).await?;
    machines_that_cannot_be(&cluster).await?;
    let known = cluster.ctl(&["-o", "json", "vm", "list"]).await?;
    let known: Vec<serde_json::Value> = serde_json::from_str(&known.out)?;
    ensure!(
        known.len() == 1,
        "refused machines were recorded: {known:?}"
    );
    unhurt(&cluster, &vm).await?;
    moves_that_cannot_be(&cluster, &vm).await
}

async fn machines_that_cannot_be(cluster: &TestCluster) -> anyhow::Result<()> {
    let long = "n".repeat(64);
    let cases: [(&[&str], &[&str]); 14] = [
        (
            &["x", "--memory", "0"],
            &["E-SPEC", "0 MiB; use 16 to 1048576 MiB"],
        ),
        (
            &["x", "--memory", "1000000T"],
            &["E-ROOM", "fit on no node", "offers 512 MiB"],
        ),
        (&["x", "--cpu", "0"], &["E-SPEC", "use 1 to 32"]),
        (&["x", "--cpu", "64"], &["E-SPEC", "use 1 to 32"]),
        (&["x", "--cpu", "4000000000"], &["E-SPEC", "use 1 to 32"]),
        (&["x", "--priority", "5000"], &["E-SPEC", "use 0 to 1000"]),
        (
            &["x", "--working-set", "4096"],
            &["E-SPEC", "working_set", "MiB of memory"],
        ),
        (
            &["x", "--disk", "vol-a:0"],
            &["E-SPEC", "use 64 KiB to 64 TiB"],
        ),
        (
            &["x", "--disk", "build:1GiB"],
            &["build", "clusterctl volume list"],
        ),
        (
            &["x", "--disk", "vol-a:1MiB:/nowhere/web.raw"],
            &["E-IMAGE", "/nowhere/web.raw", "raw image"],
        ),
        (&["x", "--nic", "br0,zz:zz"], &["MAC address like 52:54:00"]),
        (&["vm-a"], &["E-EXISTS", "`vm-a` already", "another name"]),
        (&["VM_A"], &["E-NAME", "a-z"]),
        (&[&long], &["E-NAME", "63"]),
    ];
    for (arguments, words) in cases {
        let said = cluster
            .ctl(&[&["vm", "create"], arguments].concat())
            .await?;
        refused(&format!("vm create {arguments:?}"), &said, words)?;
    }
    let mut strange = spec(64);
    strange["colour"] = "red".into();
    let huge = format!("{{\"vcpus\": 1, \"x\": \"{}\"}}", "y".repeat(70_000));
    let good = spec(64).to_string();
    let nobody = None;
    let cases = [
        (
            "an unknown field",
            strange.to_string(),
            change(),
            "",
            &["malformed", "colour"][..],
        ),
        ("no JSON", "{".into(), change(), "", &["malformed"]),
        ("a huge spec", huge, change(), "", &["65536 bytes"]),
        ("no change", good.clone(), nobody, "", &["`change`"]),
        (
            "an image without a disk",
            good,
            change(),
            "/etc/hostname",
            &["image"],
        ),
    ];
    for (what, spec_json, change, image, words) in cases {
        let images = match image {
            "" => HashMap::new(),
            path => HashMap::from([(3, path.to_owned())]),
        };
        let request = VmCreateRequest {
            change,
            name: "x".into(),
            spec_json,
            images,
            start: true,
        };
        let answer = cluster.api().await?.api.vm_create(request).await;
        refused_status(what, answer, words)?;
    }
    Ok(())
}

async fn moves_that_cannot_be(
    cluster: &TestCluster,
    vm: &proto::admin::VmView,
) -> anyhow::Result<()> {
    let others: Vec<String> = cluster
        .local
        .nodes
        .iter()
        .map(|node| node.name.clone())
        .filter(|name| *name != vm.node)
        .collect();
    let (full, free) = (&others[0], &others[1]);
    // One of the others is filled: a machine that only fits there once its neighbour takes nothing.
    let said = cluster.ctl(&["drain", free, "--yes"]).await?;
    ensure!(said.code == 0, "{}", said.err);
    let big = Machine {
        memory_mib: 448,
        ..Machine::small("big")
    };
    ensure!(cluster.create(&big).await?.node == *full);
    let cases: [(&[&str], &[&str]); 6] = [
        (
            &["vm-a", "--to", &vm.node],
            &["E-SAMENODE", "vm-a is on", "--to"],
        ),
        (
            &["vm-a", "--to", "n9"],
            &["E-NOTFOUND", "node n9", "did you mean n1?"],
        ),
        (
            &["vm-z", "--to", free],
            &["E-NOTFOUND", "vm-z", "did you mean vm-a?"],
        ),
        (
            &["vm-a", "--to", full],
            &["E-ROOM", full, "128", "node list"],
        ),
        (&["vm-a", "--to", free], &["E-NODE", free, "drain"]),
        (&["vm-a"], &["E-NOPLACE", "vm-a"]),
    ];
    for (arguments, words) in cases {
        let said = cluster.ctl(&[&["migrate"], arguments].concat()).await?;
        refused(&format!("migrate {arguments:?}"), &said, words)?;
    }
    let said = cluster.ctl(&["uncordon", free]).await?;
    ensure!(said.code == 0, "{}", said.err);

    // A machine whose volume the other node does not have.
    let folder = tempfile::tempdir()?;
    let url = format!("dir:{}", folder.path().display());
    let said = cluster
        .ctl(&["volume", "add", "here", &url, "--nodes", &vm.node])
        .await?;
    ensure!(said.code == 0, "{}", said.err);
    let said = cluster
        .ctl(&[
            "vm",
            "create",
            "local",
            "--memory",
            "64",
            "--working-set",
            "8",
            "--disk",
            "here:1MiB",
        ])
        .await?;
    ensure!(said.code == 0, "{}", said.err);
    let said = cluster.ctl(&["migrate", "local", "--to", free]).await?;
    refused(
        "a node without the volume",
        &said,
        &["E-VOLUME", "`here`", "volume list"],
    )?;
    let said = cluster.ctl(&["vm", "stop", "local"]).await?;
    ensure!(said.code == 0, "{}", said.err);
    let said = cluster.ctl(&["migrate", "local", "--to", free]).await?;
    refused("a stopped machine", &said, &["E-STOPPED", "vm start"])?;
    unhurt(cluster, vm).await?;

    // A second migration while one is under way; then the first goes through.
    let request = VmMigrateRequest {
        change: change(),
        name: "vm-a".into(),
        to: free.clone(),
        bandwidth_max_bytes_s: 16 << 20,
        ..VmMigrateRequest::default()
    };
    let first = cluster.api().await?.api.vm_migrate(request).await?;
    let id = first.into_inner().migration.context("no id")?.id;
    let said = cluster.ctl(&["migrate", "vm-a", "--to", free]).await?;
    refused(
        "a second migration",
        &said,
        &["E-MIGRATING", "already migrating", &id, "cancel"],
    )?;
    let end = cluster.wait_migration(&id).await?;
    ensure!(end.state == "cut-over", "{}", end.reason);
    let said = cluster.ctl(&["migration", "cancel", &id]).await?;
    refused("a cancel after the end", &said, &["E-MIGRATION", &id])?;
    let said = cluster.ctl(&["migration", "show", "m-what"]).await?;
    refused("no migration", &said, &["E-NOTFOUND", "migration list"])?;
    ensure!(cluster.wait_progress("vm-a").await?.found_at_boot == 0);
    Ok(())
}

/// What arrives at ports that are open to a network: noise, other protocols, halves, lies about lengths.
fn garbage() -> Vec<Vec<u8>> {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    // HEADERS, stream 1, in literals: POST, http, a path of the API, grpc.
    let mut headers = vec![0x83, 0x86];
    for (index, text) in [
        (vec![0x04], "/baton.admin.v1.Admin/Version"),
        (vec![0x01], "node"),
        (vec![0x0f, 0x10], "application/grpc"),
    ] {
        headers.extend(index);
        headers.push(u8::try_from(text.len()).unwrap_or(0));
        headers.extend(text.as_bytes());
    }
    let mut call = [preface.as_slice(), &settings].concat();
    call.extend([
        0,
        0,
        u8::try_from(headers.len()).unwrap_or(0),
        1,
        4,
        0,
        0,
        0,
        1,
    ]);
    call.extend(headers);
    // DATA that begins a message of 4 GiB and brings 3 bytes of it.
    call.extend([0, 0, 8, 0, 0, 0, 0, 0, 1]);
    call.extend([0, 0xff, 0xff, 0xff, 0xff, 1, 2, 3]);
    let noise: Vec<u8> = (0..64 << 10).map(|_| rand::random()).collect();
    let mut frame_header = [preface.as_slice(), &settings].concat();
    frame_header.extend([0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]);
    frame_header.extend(&noise[..4096]);
    vec![
        noise.clone(),
        vec![0; 64 << 10],
        vec![0xff; 64 << 10],
        b"GET / HTTP/1.1\r\nHost: node\r\n\r\n".to_vec(),
        [b"GET /".as_slice(), &[b'a'; 60_000], b" HTTP/1.1\r\n\r\n"].concat(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        preface[..11].to_vec(),
        [preface.as_slice(), &[0, 0, 30, 4]].concat(),
        frame_header,
        call,
        // A record of ONC RPC of 2 GiB that never comes, one of no call, one in endless pieces.
        [[0xff, 0xff, 0xff, 0xff].as_slice(), &noise[..1024]].concat(),
        [[0x80, 0, 4, 0].as_slice(), &noise[..1024]].concat(),
        [0, 0, 0, 1, 0].repeat(4096),
    ]
}

/// Sends everything to that place, some connections being left half done; gives those that still stand.
async fn pelt(address: SocketAddr) -> Vec<TcpStream> {
    let mut open = Vec::new();
    for bytes in garbage() {
        for keep in [true, false] {
            let connecting = TcpStream::connect(address);
            let Ok(Ok(mut stream)) = tokio::time::timeout(Duration::from_secs(3), connecting).await
            else {
                continue;
            };
            // The other side may hang up in the middle: that is its right.
            let _ = tokio::time::timeout(Duration::from_secs(1), stream.write_all(&bytes)).await;
            if keep {
                open.push(stream);
            }
        }
    }
    open
}

async fn pelt_socket(path: &Path) -> Vec<UnixStream> {
    let mut open = Vec::new();
    for bytes in garbage() {
        if let Ok(mut stream) = UnixStream::connect(path).await {
            let _ = tokio::time::timeout(Duration::from_secs(1), stream.write_all(&bytes)).await;
            open.push(stream);
        }
    }
    open
}

/// Memory of each process of these folders, KiB.
fn memory(folders: &[PathBuf]) -> BTreeMap<i32, u64> {
    let resident = |pid: i32| -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find(|line| line.starts_with("RssAnon:"))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    folders
        .iter()
        .flat_map(|folder| clusterctl::local::processes_of(folder))
        .filter_map(|pid| Some((pid, resident(pid)?)))
        .collect()
}

/// The Unix sockets below a folder.
fn sockets(folder: &Path) -> Vec<PathBuf> {
    use std::os::unix::fs::FileTypeExt;
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(kind) if kind.is_socket() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found
}

/// A process may hold this much more after the garbage, KiB: buffers of the connections still open.
const GROWTH_KIB_MAX: u64 = 96 << 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_every_port_harms_neither_process_nor_guest() -> anyhow::Result<()> {
    if !tests::kvm_or_skip("bad_input") {
        return Ok(());
    }
    let cluster = TestCluster::start(Setup::default()).await?;
    let vm = cluster.create(&Machine::small("vm-a")).await?;
    let mut folders: Vec<PathBuf> = cluster
        .local
        .nodes
        .iter()
        .map(|node| node.folder.clone())
        .collect();
    folders.push(cluster.local.nfs.folder.clone());
    let before = memory(&folders);
    let mut open = Vec::new();
    let mut open_sockets = Vec::new();
    for node in &cluster.local.nodes {
        for port in [clusterctl::local::API_PORT, clusterctl::local::METRICS_PORT] {
            open.extend(pelt(SocketAddr::new(node.address.ip(), port)).await);
        }
        for socket in sockets(&node.folder) {
            open_sockets.extend(pelt_socket(&socket).await);
        }
    }
    open.extend(pelt(cluster.local.nfs.address).await);
    ensure!(!open.is_empty() && !open_sockets.is_empty());
    let after = memory(&folders);
    for (pid, kib) in &before {
        let now = after
            .get(pid)
            .with_context(|| format!("process {pid} died"))?;
        ensure!(
            now.saturating_sub(*kib) < GROWTH_KIB_MAX,
            "process {pid} grew from {kib} to {now} KiB"
        );
    }
    unhurt(&cluster, &vm).await?;

    // The port of a migration under way: its ticket is not spent, its stream not disturbed.
    let to = cluster
        .local
        .nodes
        .iter()
        .find(|node| node.name != vm.node)
        .context("one node only")?;
    let request = VmMigrateRequest {
        change: change(),
        name: "vm-a".into(),
        to: to.name.clone(),
        bandwidth_max_bytes_s: 16 << 20,
        ..VmMigrateRequest::default()
    };
    let reply = cluster.api().await?.api.vm_migrate(request).await?;
    let id = reply.into_inner().migration.context("no id")?.id;
    let (first, last) = clusterctl::local::MIGRATION_PORTS;
    let ports = cluster
        .wait("a migration port", async || {
            let mut listening = Vec::new();
            for port in first..=last {
                let address = SocketAddr::new(to.address.ip(), port);
                if TcpStream::connect(address).await.is_ok() {
                    listening.push(address);
                }
            }
            Ok((!listening.is_empty()).then_some(listening))
        })
        .await?;
    for address in ports {
        open.extend(pelt(address).await);
    }
    let end = cluster.wait_migration(&id).await?;
    ensure!(end.state == "cut-over", "garbage ended it: {}", end.reason);
    ensure!(cluster.wait_progress("vm-a").await?.found_at_boot == 0);
    for node in cluster.nodes().await? {
        ensure!(node.state == "up", "{} is {}", node.name, node.state);
    }
    for node in &cluster.local.nodes {
        ensure!(before.contains_key(&node.pid) && memory(&folders).contains_key(&node.pid));
        cluster.api_of(&node.name).await?;
    }
    drop(open);
    Ok(())
}
