//! `clusterctl vm`: machines.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Subcommand;
use proto::admin::{
    VmConsoleInput, VmCreateRequest, VmDeleteRequest, VmListRequest, VmMigrateRequest,
    VmStartRequest, VmStopRequest, VmView,
};
use serde_json::json;

use crate::Context;
use crate::client::{CliError, Connection};
use crate::commands::migration;
use crate::output::{self, Format};

/// How often a machine is looked at while it starts or stops.
const LOOK: Duration = Duration::from_millis(50);
/// Typed characters that wait for the console at most.
const CONSOLE_QUEUE: usize = 256;
/// Ctrl-] leaves the console, as in telnet and virsh.
const CONSOLE_ESCAPE: u8 = 0x1d;

/// What can be done with machines.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a machine, and its disks.
    Create(Box<CreateArgs>),
    /// Every machine.
    List,
    /// One machine, whole.
    Show {
        /// Its name.
        name: String,
    },
    /// Run it, on the best node.
    Start {
        /// Its name.
        name: String,
    },
    /// Stop it.
    Stop {
        /// Its name.
        name: String,
        /// At once, without asking the guest.
        #[arg(long)]
        force: bool,
    },
    /// Forget it and delete its disks.
    Delete {
        /// Its name.
        name: String,
        /// Leave the disk files on their volumes.
        #[arg(long)]
        keep_disks: bool,
    },
    /// Its serial console; Ctrl-] leaves.
    Console {
        /// Its name.
        name: String,
    },
    /// Move it to another node while it runs.
    Migrate(MigrateArgs),
}

/// `vm create`.
#[derive(Debug, clap::Args)]
pub struct CreateArgs {
    /// a-z, 0-9 and '-'.
    name: String,
    /// Virtual processors.
    #[arg(long, default_value_t = 1)]
    cpu: u32,
    /// Memory: 512MiB, 4GiB; a bare number is MiB.
    #[arg(long, default_value = "256MiB", value_parser = parse_mib)]
    memory: u64,
    /// A disk, `VOLUME:SIZE` (for example vol-a:40GiB), or `VOLUME:SIZE:IMAGE` to fill it from a raw
    /// image file on the node that starts it first. As often as there are disks.
    #[arg(long, value_parser = parse_disk)]
    disk: Vec<Disk>,
    /// A network interface, `BRIDGE` or `BRIDGE,MAC`.
    #[arg(long)]
    nic: Vec<String>,
    /// A Linux kernel (ELF vmlinux or bzImage) at this path on every node; without it the machine runs
    /// Baton's self-checking guest.
    #[arg(long)]
    kernel: Option<String>,
    /// Its initramfs.
    #[arg(long, requires = "kernel")]
    initrd: Option<String>,
    /// Its command line.
    #[arg(long, requires = "kernel", default_value = "console=ttyS0")]
    cmdline: String,
    /// Self-checking guest: memory that it dirties and checks, MiB.
    #[arg(long, default_value_t = 64, conflicts_with = "kernel")]
    working_set: u32,
    /// Self-checking guest: how fast it dirties it, MiB/s.
    #[arg(long, default_value_t = 20, conflicts_with = "kernel")]
    dirty_rate: u32,
    /// Higher is started, moved and kept first; 0 to 1000.
    #[arg(long, default_value_t = 500)]
    priority: u16,
    /// Do not restart it elsewhere when its node is lost.
    #[arg(long)]
    no_failover: bool,
    /// Keep running without a lease until the storage server refuses it.
    #[arg(long)]
    run_until_fenced: bool,
    /// Ceiling of the blackout of its migrations, ms.
    #[arg(long)]
    downtime_max_ms: Option<u32>,
    /// A file on the node to which the self-checking guest's flushed numbers are appended (tests).
    #[arg(long)]
    witness: Option<String>,
    /// Only record it.
    #[arg(long)]
    no_start: bool,
}

/// `--disk`.
#[derive(Clone, Debug)]
struct Disk {
    volume: String,
    size_bytes: u64,
    image: Option<String>,
}

/// `migrate`.
#[derive(Debug, clap::Args)]
pub struct MigrateArgs {
    /// The machine.
    name: String,
    /// Where to; the best node when left out.
    #[arg(long, default_value = "")]
    to: String,
    /// TCP connections.
    #[arg(long, default_value_t = 0)]
    channels: u32,
    /// At most this many bytes a second: 100MiB.
    #[arg(long, default_value = "0", value_parser = parse_bytes)]
    bandwidth: u64,
    /// Ceiling of the blackout, ms.
    #[arg(long, default_value_t = 0)]
    downtime_max_ms: u32,
    /// Only check whether it could.
    #[arg(long)]
    dry_run: bool,
}

/// Bytes from `512`, `64KiB`, `40GiB`, `1T`.
///
/// # Errors
/// Says what would be right.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("`{text}` is not a size; write 512MiB or 40GiB"))?;
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        other => return Err(format!("`{other}` is not a unit; use KiB, MiB, GiB or TiB")),
    };
    number
        .checked_mul(factor)
        .ok_or_else(|| format!("`{text}` is more than 16 EiB"))
}

fn parse_mib(text: &str) -> Result<u64, String> {
    if let Ok(mib) = text.trim().parse() {
        return Ok(mib);
    }
    let bytes = parse_bytes(text)?;
    if bytes % (1 << 20) == 0 {
        Ok(bytes >> 20)
    } else {
        Err(format!("`{text}` is not a whole number of MiB"))
    }
}

fn parse_disk(text: &str) -> Result<Disk, String> {
    let mut parts = text.splitn(3, ':');
    let (Some(volume), Some(size)) = (parts.next(), parts.next()) else {
        return Err("write VOLUME:SIZE, for example vol-a:40GiB".into());
    };
    Ok(Disk {
        volume: volume.to_owned(),
        size_bytes: parse_bytes(size)?,
        image: parts.next().map(str::to_owned),
    })
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub async fn run(c: &Context, command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Create(args) => create(c, &args).await,
        Command::List => {
            let vms = list(&mut c.connect().await?, "").await?;
            match c.output {
                Format::Json => output::json(&vms)?,
                Format::Table => output::table(
                    &[
                        "NAME", "STATE", "NODE", "CPU", "MEMORY", "DISKS", "TOKEN", "FAILOVER",
                        "PRIORITY",
                    ],
                    vms.iter().map(row).collect(),
                )?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Show { name } => {
            let vm = find(&mut c.connect().await?, &name).await?;
            match c.output {
                Format::Json => output::json(&vm)?,
                Format::Table => output::text(describe(&vm))?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Start { name } => {
            let mut connection = c.connect().await?;
            connection
                .api
                .vm_start(VmStartRequest {
                    change: c.change(),
                    name: name.clone(),
                })
                .await?;
            settle(c, &mut connection, &name, "running").await
        }
        Command::Stop { name, force } => {
            let mut connection = c.connect().await?;
            connection
                .api
                .vm_stop(VmStopRequest {
                    change: c.change(),
                    name: name.clone(),
                    force,
                })
                .await?;
            settle(c, &mut connection, &name, "stopped").await
        }
        Command::Delete { name, keep_disks } => {
            let what = if keep_disks { "" } else { " and its disks" };
            if !output::confirm(c.yes, &format!("Delete {name}{what}?"))? {
                return Ok(ExitCode::FAILURE);
            }
            let request = VmDeleteRequest {
                change: c.change(),
                name: name.clone(),
                keep_disks,
            };
            let done = c
                .connect()
                .await?
                .api
                .vm_delete(request)
                .await?
                .into_inner();
            match c.output {
                Format::Json => output::json(&done)?,
                Format::Table => output::text(format!("✔ {name}{what} deleted"))?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Console { name } => console(c, name).await,
        Command::Migrate(args) => migrate(c, args).await,
    }
}

async fn list(connection: &mut Connection, name: &str) -> Result<Vec<VmView>, CliError> {
    Ok(connection
        .api
        .vm_list(VmListRequest {
            name: name.to_owned(),
        })
        .await?
        .into_inner()
        .vms)
}

/// The machine of that name.
///
/// # Errors
/// When there is none.
pub async fn find(connection: &mut Connection, name: &str) -> Result<VmView, CliError> {
    list(connection, name)
        .await?
        .pop()
        .ok_or_else(|| CliError::Refused {
            code: "E-NOTFOUND".into(),
            message: format!("there is no machine {name}; try: clusterctl vm list"),
        })
}

async fn create(c: &Context, args: &CreateArgs) -> Result<ExitCode, CliError> {
    let boot = match &args.kernel {
        Some(kernel) => {
            json!({ "linux": { "kernel": kernel, "initrd": args.initrd, "cmdline": args.cmdline } })
        }
        None => {
            json!({ "self-check": { "working_set_mib": args.working_set, "dirty_mib_s": args.dirty_rate } })
        }
    };
    let disks: Vec<_> = args
        .disk
        .iter()
        .enumerate()
        .map(|(number, disk)| {
            json!({ "volume": disk.volume, "path": format!("{}-{number}.raw", args.name), "size_bytes": disk.size_bytes })
        })
        .collect();
    let nics: Vec<_> = args
        .nic
        .iter()
        .map(|nic| {
            let (bridge, mac) = nic
                .split_once(',')
                .map_or((nic.as_str(), random_mac()), |(b, m)| (b, m.to_owned()));
            json!({ "bridge": bridge, "mac": mac })
        })
        .collect();
    let spec = json!({
        "vcpus": args.cpu,
        "memory_mib": args.memory,
        "boot": boot,
        "disks": disks,
        "nics": nics,
        "priority": args.priority,
        "failover": !args.no_failover,
        "on_isolation": if args.run_until_fenced { "run-until-fenced" } else { "freeze" },
        "downtime_max_ms": args.downtime_max_ms,
        "witness": args.witness,
    });
    let images: HashMap<u32, String> = (0u32..)
        .zip(&args.disk)
        .filter_map(|(number, disk)| disk.image.clone().map(|image| (number, image)))
        .collect();
    let mut connection = c.connect().await?;
    let request = VmCreateRequest {
        change: c.change(),
        name: args.name.clone(),
        spec_json: spec.to_string(),
        images,
        start: !args.no_start,
    };
    let reply = connection.api.vm_create(request).await?.into_inner();
    if args.no_start {
        if let (Format::Json, Some(vm)) = (c.output, &reply.vm) {
            output::json(vm)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    settle(c, &mut connection, &args.name, "running").await
}

/// A locally administered unicast address in the range that KVM tools use.
fn random_mac() -> String {
    let tail: [u8; 3] = rand::random();
    format!("52:54:00:{:02x}:{:02x}:{:02x}", tail[0], tail[1], tail[2])
}

/// Waits until the machine is in that state and prints it.
async fn settle(
    c: &Context,
    connection: &mut Connection,
    name: &str,
    state: &str,
) -> Result<ExitCode, CliError> {
    let vm = if c.no_wait {
        find(connection, name).await?
    } else {
        wait_for(connection, name, state, c.timeout).await?
    };
    match c.output {
        Format::Json => output::json(&vm)?,
        Format::Table if c.no_wait => {}
        Format::Table if state == "running" => {
            output::text(format!("✔ {name} runs on {} under t{}", vm.node, vm.token))?;
        }
        Format::Table => output::text(format!("✔ {name} is {state}"))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits until a machine is in a state; a machine that is held will not get there.
///
/// # Errors
/// When it is held, or the time is over.
pub async fn wait_for(
    connection: &mut Connection,
    name: &str,
    state: &str,
    timeout: Duration,
) -> Result<VmView, CliError> {
    let deadline = Instant::now() + timeout;
    loop {
        let vm = find(connection, name).await?;
        if vm.state == state {
            return Ok(vm);
        }
        if !vm.held.is_empty() && state == "running" {
            return Err(CliError::Refused {
                code: "E-HELD".into(),
                message: format!("{name} does not run: {}", vm.held),
            });
        }
        if Instant::now() > deadline {
            return Err(CliError::Refused {
                code: "E-TIMEOUT".into(),
                message: format!(
                    "{name} is {}, not {state}, after {} s; see: clusterctl why vm/{name}",
                    vm.state,
                    timeout.as_secs()
                ),
            });
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn row(vm: &VmView) -> Vec<String> {
    let disks: u64 = vm.disks.iter().map(|disk| disk.size_bytes).sum();
    vec![
        vm.name.clone(),
        vm.state.clone(),
        vm.node.clone(),
        vm.vcpus.to_string(),
        format!("{} MiB", vm.memory_mib),
        if vm.disks.is_empty() {
            String::new()
        } else {
            output::bytes(disks)
        },
        format!("t{}", vm.token),
        if vm.failover {
            "restart".into()
        } else {
            "off".into()
        },
        vm.priority.to_string(),
    ]
}

fn describe(vm: &VmView) -> String {
    let mut lines = vec![
        format!(
            "{}  {}{}",
            vm.name,
            vm.state,
            if vm.node.is_empty() {
                String::new()
            } else {
                format!(" on {}", vm.node)
            }
        ),
        format!(
            "size         {}, {} MiB",
            output::counted(vm.vcpus, "vCPU"),
            vm.memory_mib
        ),
        format!(
            "ownership    token t{} since entry {} ({}), should be {}",
            vm.token, vm.since_index, vm.cause, vm.desired
        ),
    ];
    if !vm.held.is_empty() {
        lines.push(format!("held         {}", vm.held));
    }
    for disk in &vm.disks {
        lines.push(format!(
            "disk         {}:{} {} ({})",
            disk.volume,
            disk.path,
            output::bytes(disk.size_bytes),
            disk.state
        ));
    }
    if let Some(migration) = &vm.migration {
        lines.push(format!(
            "migration    {} → {}: {} {}",
            migration.from, migration.to, migration.state, migration.stage
        ));
    }
    if let Some(guest) = &vm.guest {
        lines.push(format!(
            "guest says   {} steps, {} memory and {} disk checks, {} errors{}, flushed block {}, longest gap {}",
            guest.steps,
            guest.memory_checks,
            guest.disk_checks,
            guest.errors,
            if guest.error.is_empty() { String::new() } else { format!(" ({})", guest.error) },
            guest.flushed,
            output::micros(guest.longest_gap_us),
        ));
    }
    lines.push(format!("why here     clusterctl why vm/{}", vm.name));
    lines.join("\n")
}

/// `clusterctl migrate`.
///
/// # Errors
/// What the node refused.
pub async fn migrate(c: &Context, args: MigrateArgs) -> Result<ExitCode, CliError> {
    let mut connection = c.connect().await?;
    let request = VmMigrateRequest {
        change: c.change(),
        name: args.name,
        to: args.to,
        channels: args.channels,
        bandwidth_max_bytes_s: args.bandwidth,
        downtime_max_ms: args.downtime_max_ms,
        dry_run: args.dry_run,
    };
    let reply = connection.api.vm_migrate(request).await?.into_inner();
    if c.output == Format::Table {
        let passed = reply.checks.iter().filter(|check| check.passed).count();
        eprintln!("Checks    {passed} of {} passed", reply.checks.len());
        for check in reply.checks.iter().filter(|check| !check.passed) {
            eprintln!("  ✘ {}: {}", check.name, check.detail);
        }
        eprintln!(
            "Predicted {} · blackout ≤ {} ms",
            output::millis(reply.predicted_ms),
            reply.predicted_blackout_ms
        );
    }
    if args.dry_run {
        if c.output == Format::Json {
            output::json(&reply)?;
        }
        let good = reply.checks.iter().all(|check| check.passed);
        return Ok(if good {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let Some(view) = reply.migration else {
        return Err(CliError::Local(
            "the node accepted the migration but did not name it".into(),
        ));
    };
    if c.no_wait {
        match c.output {
            Format::Json => output::json(&view)?,
            Format::Table => output::text(format!(
                "{} is queued: clusterctl migration watch {}",
                view.id, view.id
            ))?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    let end = migration::follow(&mut connection, &view.id, c.timeout).await?;
    migration::print_end(c, &end)
}

async fn console(c: &Context, name: String) -> Result<ExitCode, CliError> {
    let mut connection = c.connect().await?;
    let (typed, queue) = tokio::sync::mpsc::channel(CONSOLE_QUEUE);
    let opening = VmConsoleInput {
        name: name.clone(),
        data: Vec::new(),
    };
    typed.send(opening).await.map_err(CliError::local)?;
    let mut printed = connection
        .api
        .vm_console(tokio_stream::wrappers::ReceiverStream::new(queue))
        .await?
        .into_inner();
    eprintln!("console of {name}; Ctrl-] leaves");
    let raw = RawTerminal::enter();
    // A blocking read of the terminal cannot be cancelled, so it has a thread of its own that ends
    // with the process.
    let (left, mut leaving) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let mut buffer = [0u8; 256];
        while let Ok(count @ 1..) = std::io::stdin().read(&mut buffer) {
            let typed_bytes = &buffer[..count];
            let end = typed_bytes.iter().position(|&byte| byte == CONSOLE_ESCAPE);
            let data = typed_bytes[..end.unwrap_or(count)].to_vec();
            if typed
                .blocking_send(VmConsoleInput {
                    name: String::new(),
                    data,
                })
                .is_err()
                || end.is_some()
            {
                break;
            }
        }
        let _ = left.send(());
    });
    let result = loop {
        tokio::select! {
            message = printed.message() => match message {
                Ok(Some(output)) => {
                    let mut out = std::io::stdout().lock();
                    out.write_all(&output.data)?;
                    out.flush()?;
                }
                Ok(None) => break Ok(()),
                Err(status) => break Err(CliError::from(status)),
            },
            _ = &mut leaving => break Ok(()),
        }
    };
    drop(raw);
    result.map(|()| ExitCode::SUCCESS)
}

/// The terminal without line editing and echo, until it is dropped.
struct RawTerminal {
    before: Option<nix::sys::termios::Termios>,
}

impl RawTerminal {
    fn enter() -> RawTerminal {
        use nix::sys::termios;
        let stdin = std::io::stdin();
        let before = termios::tcgetattr(&stdin).ok();
        if let Some(mut raw) = before.clone() {
            termios::cfmakeraw(&mut raw);
            let _ = termios::tcsetattr(&stdin, termios::SetArg::TCSANOW, &raw);
        }
        RawTerminal { before }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = nix::sys::termios::tcsetattr(
                std::io::stdin(),
                nix::sys::termios::SetArg::TCSANOW,
                before,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_binary_units() {
        assert_eq!(parse_bytes("512"), Ok(512));
        assert_eq!(parse_bytes("40GiB"), Ok(40 << 30));
        assert_eq!(parse_bytes("1t"), Ok(1 << 40));
        for bad in [
            "",
            "GiB",
            "1.5GiB",
            "-1",
            "4XB",
            "99999999999999999999",
            "999999999T",
        ] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_mib("4GiB"), Ok(4096));
        assert_eq!(parse_mib("256"), Ok(256));
        assert!(parse_mib("1KiB").is_err());
    }

    #[test]
    fn a_disk_names_its_volume_and_size() {
        let disk = parse_disk("vol-a:1GiB:/img/a.raw").expect("a disk");
        assert_eq!(
            (disk.volume.as_str(), disk.size_bytes, disk.image.as_deref()),
            ("vol-a", 1 << 30, Some("/img/a.raw"))
        );
        assert!(parse_disk("vol-a").is_err());
    }
}
