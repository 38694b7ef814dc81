//! Builds the small Linux guest: a kernel from Debian's source package and a one-program initramfs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};

use crate::build;

/// Debian's package with the kernel's source.
const SOURCE: &str = "/usr/src/linux-source-6.1.tar.xz";
/// What the build needs, as Debian packages.
const PACKAGES: &str = "linux-source-6.1 flex bison libelf-dev bc xz-utils cpio busybox-static";

/// Flags of `cargo xtask guest`.
#[derive(Args)]
pub struct GuestArgs {
    /// Which guest.
    name: Guest,
    /// Build it though the cache has it: into a folder of its own, which shows that the recipe still works.
    #[arg(long)]
    again: bool,
}

/// The guests that are built outside cargo.
#[derive(Clone, Copy, ValueEnum)]
enum Guest {
    /// Linux 6.1, made small, with busybox.
    Linux,
}

/// Builds one and prints where it lies.
pub fn run(args: &GuestArgs) -> anyhow::Result<()> {
    match args.name {
        Guest::Linux => {
            let cache = if args.again {
                let again = build::target_dir().join("guest-again");
                let _ = std::fs::remove_dir_all(&again);
                again
            } else {
                cache()
            };
            let folder = linux(&cache)?;
            println!("{}", folder.join("vmlinux").display());
            println!("{}", folder.join("initramfs.cpio").display());
            Ok(())
        }
    }
}

/// Where guests are kept between builds: `BATON_CACHE`, or `baton` in the user's cache folder.
fn cache() -> PathBuf {
    if let Some(path) = std::env::var_os("BATON_CACHE") {
        return PathBuf::from(path);
    }
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .unwrap_or_else(std::env::temp_dir);
    base.join("baton")
}

/// The kernel and the initramfs, built unless the cache has them from the very same recipe.
fn linux(cache: &Path) -> anyhow::Result<PathBuf> {
    let recipe = build::root().join("tests/guests/linux");
    let mut ingredients = Vec::new();
    for file in [
        "linux-6.1-tiny.config",
        "linux-6.1-software-kvm.patch",
        "build.sh",
        "init.c",
    ] {
        let path = recipe.join(file);
        ingredients.extend(
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?,
        );
    }
    let folder = cache.join(format!("linux-6.1-{:016x}", fnv1a(&ingredients)));
    if folder.join("vmlinux").exists() && folder.join("initramfs.cpio").exists() {
        return Ok(folder);
    }
    ensure!(
        Path::new(SOURCE).exists() && Path::new("/bin/busybox").exists(),
        "the Linux guest is built from Debian packages that are not installed; try: apt-get install {PACKAGES}"
    );
    let work = folder.with_extension("work");
    let _ = std::fs::remove_dir_all(&work);
    std::fs::create_dir_all(&work)?;
    let script = recipe.join("build.sh");
    eprintln!(
        "building the Linux guest in {} (some minutes, once)",
        work.display()
    );
    let status = Command::new("sh")
        .arg(&script)
        .args([SOURCE.as_ref(), work.as_os_str()])
        .current_dir(&recipe)
        .status()
        .with_context(|| format!("cannot run {}", script.display()))?;
    if !status.success() {
        bail!("building the Linux guest failed ({status}); its needs: apt-get install {PACKAGES}");
    }
    std::fs::create_dir_all(&folder)?;
    for file in ["vmlinux", "initramfs.cpio"] {
        std::fs::rename(work.join(file), folder.join(file))?;
    }
    std::fs::remove_dir_all(&work)?;
    Ok(folder)
}

/// FNV-1a, 64 bits: names the recipe's version, no more.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}
