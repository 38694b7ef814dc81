//! `storage-broker serve-nfs` as a process: killed at any moment it forgets nothing that it answered.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use cluster_model::ids::Token;
use futures::future::Either;
use storage_broker::dialer::Dialer;
use storage_broker::fence::{DISK_MODE, claimant, data_credential};
use storage_broker::nfs::client::SetAttributes;
use storage_broker::nfs::{FileHandle, NfsClient, Stable, mount};
use storage_broker::tls::ClientTls;
use storage_broker::volume::VolumeUrl;

const BROKER_UID: u32 = 50_000;
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// A server in a process of its own; killed when dropped.
struct Process {
    child: Child,
    url: String,
}

impl Process {
    fn start(root: &Path, listen: &str) -> Process {
        let mut child = Command::new(env!("CARGO_BIN_EXE_storage-broker"))
            .args(["serve-nfs", "--export", "/vm", "--listen", listen, "--root"])
            .arg(root)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut url = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut url).unwrap();
        let url = url.trim().to_owned();
        Process { child, url }
    }

    /// Kills it with SIGKILL and starts it anew on the same port.
    fn crash_and_restart(mut self, root: &Path) -> Process {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let listen = self.url.trim_start_matches("nfs://").replace("/vm", "");
        Process::start(root, &listen)
    }

    async fn connect(&self) -> NfsClient {
        let VolumeUrl::Nfs(url) = self.url.parse().unwrap() else {
            panic!("not NFS: {:?}", self.url)
        };
        mount(&url, &Dialer::default(), CALL_TIMEOUT).await.unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Errors mean that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn disk(client: &NfsClient, name: &str, size_bytes: u64) -> FileHandle {
    let owner = claimant(BROKER_UID, Token(1));
    let attributes = SetAttributes {
        mode: Some(DISK_MODE),
        gid: Some(Token(1).gid()),
        size_bytes: Some(size_bytes),
    };
    client
        .create(owner, client.root(), name, attributes)
        .await
        .unwrap()
}

async fn claim(client: &NfsClient, file: &FileHandle, token: Token) -> bool {
    let group = SetAttributes {
        gid: Some(token.gid()),
        ..SetAttributes::default()
    };
    let claim = client.setattr(claimant(BROKER_UID, token), file, group);
    claim.await.is_ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_token_is_forgotten_however_often_the_server_is_killed() {
    const DISKS: usize = 4;
    let root = tempfile::tempdir().unwrap();
    let mut server = Process::start(root.path(), "127.0.0.1:0");
    let client = server.connect().await;
    let mut files = Vec::new();
    for number in 0..DISKS {
        files.push(disk(&client, &format!("disk{number}"), 4096).await);
    }
    let mut next = Token(2);
    for round in 0..8 {
        let client = server.connect().await;
        let (claimed, mut claims) = tokio::sync::mpsc::unbounded_channel();
        let tasks: Vec<_> = files
            .iter()
            .map(|file| {
                let (client, file, claimed) = (client.clone(), file.clone(), claimed.clone());
                tokio::spawn(async move {
                    let (mut sent, mut acknowledged) = (next, Token(0));
                    while claim(&client, &file, sent).await {
                        acknowledged = sent;
                        sent = Token(sent.0 + 1);
                        // The main task has no interest any more only while the test ends.
                        let _ = claimed.send(());
                    }
                    (acknowledged, sent)
                })
            })
            .collect();
        // Killed in the middle of the claims, after another number of them each time.
        for _ in 0..20 + 7 * round {
            claims.recv().await.unwrap();
        }
        server = server.crash_and_restart(root.path());
        let client = server.connect().await;
        for (file, task) in files.iter().zip(tasks) {
            let (acknowledged, sent) = task.await.unwrap();
            let owner = claimant(BROKER_UID, next);
            let attributes = client.getattr(owner, file).await.unwrap();
            assert_eq!((attributes.uid, attributes.mode), (BROKER_UID, DISK_MODE));
            let token = Token(attributes.gid - Token(0).gid());
            // The last claim was sent and not answered: it may hold or not.
            assert!(
                acknowledged <= token && token <= sent,
                "round {round}: {acknowledged} was acknowledged, {sent} sent, {token} found"
            );
            next = next.max(Token(sent.0 + 1));
        }
    }
}

#[tokio::test]
async fn a_second_server_of_the_same_directory_says_why_it_does_not_start() {
    let root = tempfile::tempdir().unwrap();
    let _server = Process::start(root.path(), "127.0.0.1:0");
    let second = Command::new(env!("CARGO_BIN_EXE_storage-broker"))
        .args(["serve-nfs", "--listen", "127.0.0.1:0", "--root"])
        .arg(root.path())
        .output()
        .unwrap();
    assert!(!second.status.success());
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains("already served by another server"), "{said}");
}

#[tokio::test]
async fn a_certificate_of_its_own_making_is_made_once_and_nothing_secret_is_printed() {
    let folder = tempfile::tempdir().unwrap();
    let (root, directory) = (folder.path().join("root"), folder.path().join("tls"));
    std::fs::create_dir(&root).unwrap();
    let mut said = Vec::new();
    for _ in 0..2 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_storage-broker"))
            .args(["serve-nfs", "--listen", "127.0.0.1:0", "--root"])
            .arg(&root)
            .arg("--tls-self-signed")
            .arg(&directory)
            .env("RUST_LOG", "debug")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut url = String::new();
        stdout.read_line(&mut url).unwrap();
        let authority = std::fs::read_to_string(directory.join("ca.pem")).unwrap();
        let volume: VolumeUrl = format!("{}?tls=require", url.trim()).parse().unwrap();
        let tls = ClientTls::of_volume(&volume, &authority).unwrap();
        let VolumeUrl::Nfs(nfs) = volume else {
            panic!("not NFS: {url:?}")
        };
        let dialer = Dialer::default().with_tls(tls);
        mount(&nfs, &dialer, CALL_TIMEOUT).await.unwrap();
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        said.push((authority, url, output.stderr));
    }
    assert_eq!(said[0].0, said[1].0, "the second start made another one");
    let key = std::fs::read_to_string(directory.join("server.key")).unwrap();
    let secret = key.lines().nth(1).unwrap();
    for (_, url, log) in said {
        let log = String::from_utf8_lossy(&log);
        assert!(!url.contains(secret) && !log.contains(secret) && !log.contains("PRIVATE"));
    }
}

/// A server that serves one call after the other answers in the order in which it was asked, always. That those who
/// wait share a sync is looked at where syncs can be counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_on_the_same_connection_does_not_wait_for_another_calls_sync() {
    const SIZE: u64 = 16 << 20;
    /// A sync that is over before the next call arrives says nothing: it is tried so often.
    const TRIES: u32 = 20;
    let root = tempfile::tempdir().unwrap();
    let server = Process::start(root.path(), "127.0.0.1:0");
    let client = server.connect().await;
    let file = disk(&client, "disk", SIZE).await;
    let holder = data_credential(BROKER_UID, Token(1));
    let whole = Bytes::from(vec![1; 1 << 20]);
    for _ in 0..TRIES {
        for offset in (0..SIZE).step_by(1 << 20) {
            let write = client.write(holder, &file, offset, &whole, Stable::UNSTABLE);
            write.await.unwrap();
        }
        let commit = client.commit(holder, &file);
        let look = client.getattr(claimant(BROKER_UID, Token(1)), &file);
        let (commit, look) = (std::pin::pin!(commit), std::pin::pin!(look));
        // Polled in this order, so asked in this order.
        match futures::future::select(commit, look).await {
            Either::Left((committed, look)) => {
                committed.unwrap();
                look.await.unwrap();
            }
            Either::Right((looked, commit)) => {
                looked.unwrap();
                commit.await.unwrap();
                return;
            }
        }
    }
    panic!("{TRIES} times the second call was answered after the first one's sync");
}
