//! `clusterctl vm create`: what a machine is made of.

use std::collections::HashMap;
use std::process::ExitCode;

use proto::admin::VmCreateRequest;
use serde_json::{Value, json};

use super::settle;
use crate::Context;
use crate::client::CliError;
use crate::output::{self, Format};

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
    /// A tag: access tokens may be made for machines with it; as often as there are tags.
    #[arg(long)]
    tag: Vec<String>,
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

/// The machine's spec, as the cluster keeps it.
fn spec(args: &CreateArgs) -> Value {
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
    json!({
        "vcpus": args.cpu,
        "memory_mib": args.memory,
        "boot": boot,
        "disks": disks,
        "nics": nics,
        "tags": args.tag,
        "priority": args.priority,
        "failover": !args.no_failover,
        "on_isolation": if args.run_until_fenced { "run-until-fenced" } else { "freeze" },
        "downtime_max_ms": args.downtime_max_ms,
        "witness": args.witness,
    })
}

/// Does it.
///
/// # Errors
/// What the node refused.
pub(super) async fn run(c: &Context, args: &CreateArgs) -> Result<ExitCode, CliError> {
    let images: HashMap<u32, String> = (0u32..)
        .zip(&args.disk)
        .filter_map(|(number, disk)| disk.image.clone().map(|image| (number, image)))
        .collect();
    let mut connection = c.connect().await?;
    let request = VmCreateRequest {
        change: c.change(),
        name: args.name.clone(),
        spec_json: spec(args).to_string(),
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
    fn tags_go_into_the_spec() {
        use clap::Parser;
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            args: CreateArgs,
        }
        let line = ["x", "web-1", "--tag", "web", "--tag", "blue"];
        let spec = spec(&Line::try_parse_from(line).expect("a line").args);
        assert_eq!(spec["tags"], json!(["web", "blue"]));
        assert_eq!(spec["vcpus"], json!(1));
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
