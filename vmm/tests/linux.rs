//! A real Linux on this monitor: it boots to user space, and goes on in another process.

mod common;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::kvm;
use common::process::{LEASE, Process, incoming, machine_file};
use proto::monitor::{ConsoleInput, ConsoleOutput, Phase};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// The emulated kernel mode of a software KVM takes seconds to boot, a minute under load.
const BOOT_PATIENCE: Duration = Duration::from_secs(180);

/// Enough that one loses a device's write where the dirty log forgets some (it did, in every third): in a landing, and
/// in the long tier.
const MIGRATIONS: [u64; 2] = [4, 8];

/// The folder that `cargo xtask guest linux` printed, or its cache.
fn guest(test: &str) -> Option<PathBuf> {
    let named = std::env::var_os("BATON_LINUX_GUEST").map(PathBuf::from);
    let cached = || {
        let base = std::env::var_os("BATON_CACHE")
            .map(PathBuf::from)
            .or_else(|| {
                let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
                Some(
                    std::env::var_os("XDG_CACHE_HOME")
                        .map(PathBuf::from)
                        .or(home)?
                        .join("baton"),
                )
            })?;
        let mut folders: Vec<_> = std::fs::read_dir(base)
            .ok()?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        folders.sort();
        folders.into_iter().find(|folder| {
            folder.join("vmlinux").exists() && folder.join("initramfs.cpio").exists()
        })
    };
    let found = named.or_else(cached);
    if found.is_none() {
        proto::skip!(
            test,
            "there is no Linux guest; run `cargo xtask guest linux`"
        );
    }
    found
}

/// One end of a console, with all that it has said.
struct Terminal {
    type_into: mpsc::Sender<ConsoleInput>,
    output: tonic::Streaming<ConsoleOutput>,
    text: String,
}

impl Terminal {
    async fn open(process: &mut Process) -> Terminal {
        let (type_into, input) = mpsc::channel(4);
        let output = process
            .client
            .console(ReceiverStream::new(input))
            .await
            .unwrap()
            .into_inner();
        Terminal {
            type_into,
            output,
            text: String::new(),
        }
    }

    async fn type_line(&self, line: &str) {
        self.type_into
            .send(ConsoleInput {
                data: format!("{line}\n").into_bytes(),
            })
            .await
            .unwrap();
    }

    /// Waits until the console says `wanted` behind what was seen already.
    async fn wait_for(&mut self, wanted: &str, seen: usize) -> usize {
        let begun = Instant::now();
        loop {
            if let Some(at) = self.text[seen..].find(wanted) {
                return seen + at + wanted.len();
            }
            let left = BOOT_PATIENCE.saturating_sub(begun.elapsed());
            match tokio::time::timeout(left, self.output.next()).await {
                Ok(Some(Ok(output))) => self.text.push_str(&String::from_utf8_lossy(&output.data)),
                other => panic!("no `{wanted}` ({other:?}) in:\n{}", self.text),
            }
        }
    }
}

fn machine(guest: &std::path::Path, directory: &std::path::Path) -> Value {
    // Disk and witness as the self-checking guest has them.
    let mut file = machine_file(directory, 128, 0, 8);
    file["log"] = json!("debug,h2=info,tower=info,hyper_util=info");
    file["boot"] = json!({"linux": {
        "kernel": guest.join("vmlinux"), "initrd": guest.join("initramfs.cpio"),
        "cmdline": "console=ttyS0 quiet panic=-1 noxsave clearcpuid=smap,smep,cx16,popcnt tsc=reliable \
                    no_timer_check lpj=10000000 rodata=off mem=64M",
    }});
    file
}

/// What the guest's worker has seen: rounds over its memory, errors, blocks written.
async fn worker(terminal: &mut Terminal, asked: &mut u32) -> (u64, u64, u64) {
    *asked += 1;
    // The marker is made by the shell, so that the echo of the typed line is not taken for it.
    terminal
        .type_line(&format!("echo \"[$((1000+{asked})) $(cat /tmp/status)]\""))
        .await;
    let marker = format!("[{} ", 1000 + *asked);
    let start = terminal.wait_for(&marker, 0).await;
    let end = terminal.wait_for("]", start).await;
    let text = terminal.text[start..end].to_owned();
    let field = |name: &str| {
        let at = text.find(name)? + name.len();
        text[at..]
            .split(|c: char| !c.is_ascii_digit())
            .next()?
            .parse()
            .ok()
    };
    let fields = (field("rounds="), field("errors="), field("block="));
    let (Some(rounds), Some(errors), Some(block)) = fields else {
        return (0, 0, 0);
    };
    (rounds, errors, block)
}

/// Waits until the worker has written blocks beyond `beyond`, without an error.
async fn works(terminal: &mut Terminal, asked: &mut u32, beyond: u64) -> u64 {
    let begun = Instant::now();
    loop {
        let (rounds, errors, block) = worker(terminal, asked).await;
        assert_eq!(
            errors, 0,
            "after {rounds} rounds and {block} blocks:\n{}",
            terminal.text
        );
        if block > beyond {
            return block;
        }
        assert!(
            begun.elapsed() < BOOT_PATIENCE,
            "no block beyond {beyond}:\n{}",
            terminal.text
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn linux_boots_to_a_shell_and_works_on_in_another_process() {
    let test = "linux_boots_to_a_shell_and_works_on_in_another_process";
    if !kvm(test) {
        return;
    }
    let Some(guest) = guest(test) else { return };
    let directory = tempfile::tempdir().unwrap();
    let file = machine(&guest, directory.path());
    let mut source = Process::start(directory.path(), "s", &file, "").await;
    let begun = Instant::now();
    source.run(5, LEASE).await.unwrap();
    let mut terminal = Terminal::open(&mut source).await;
    let seen = terminal.wait_for("guest# ", 0).await;
    println!("a shell after {:.1} s", begun.elapsed().as_secs_f64());
    terminal.type_line("n=41; echo answer $((n+1))").await;
    terminal.wait_for("answer 42", seen).await;
    // Requests are in flight at any moment, and rings and buffers are pages that devices alone write.
    terminal
        .type_line(
            "(while :; do dd if=/dev/vda of=/dev/null bs=4k iflag=direct 2>/dev/null; done) &",
        )
        .await;
    let mut asked = 0;
    let mut blocks = 0;
    let [landing, long] = MIGRATIONS;
    for id in 1..=proto::testing::by_tier(landing, long) {
        let token = 5 + id as u32;
        let name = format!("d{id}");
        let mut destination =
            Process::start(directory.path(), &name, &incoming(&file, id, token), "").await;
        source.send_to(id, &mut destination).await.unwrap();
        destination.wait_phase(Phase::Complete).await;
        destination.run(token, LEASE).await.unwrap();
        let mut terminal = Terminal::open(&mut destination).await;
        // The shell, and the variable in it, came along.
        terminal.type_line("echo again $((n+2))").await;
        terminal.wait_for("again 43", 0).await;
        blocks = works(&mut terminal, &mut asked, blocks + 3).await;
        println!("migration {id}: {blocks} blocks");
        source = destination;
    }
}
