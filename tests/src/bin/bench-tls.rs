//! `cargo xtask bench tls`: what sealing costs the memory stream, and how fast this processor could seal at best.
//!
//! The same engine moves the same memory over the same loopback sockets, in turns without TLS (which no monitor
//! can do) and with it. Both sides run here, so a host's cores share what two hosts would do apart: the processor
//! time of a GiB says more than the rate.

use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure};
use clap::Parser;
use migration_core::tls;
use ring::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce,
    UnboundKey,
};
use tests::figures::{self, percentile};
use tests::loopback::{self, Memory, Took};
use vmm::clock::process_cpu_ns;

/// Plaintext of a full TLS record (RFC 8446, section 5.1).
const RECORD_BYTES: usize = 16 << 10;
/// How long one thread seals with each algorithm.
const SEALING: Duration = Duration::from_millis(300);

#[derive(Parser)]
struct Args {
    /// Prints one JSON object on stdout.
    #[arg(long)]
    json: bool,
    /// Memory of the machine, MiB.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(2..=65_536))]
    mib: u64,
    /// Connections.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    channels: u16,
    /// Runs of each kind; the median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    runs: u32,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let kernel = if tls::kernel_seals() { "yes" } else { "no" };
    eprintln!("the kernel could seal TLS records itself (kTLS): {kernel}; records are sealed here");
    let suite = tls::provider().cipher_suites[0].suite();
    eprintln!("the monitors here agree on {suite:?}");
    let mut result = figures::Result::new("tls");
    measure(&args, &mut result).await?;
    for (name, algorithm) in [
        ("tls_seal_aes_128_gcm", &AES_128_GCM),
        ("tls_seal_aes_256_gcm", &AES_256_GCM),
        ("tls_seal_chacha20_poly1305", &CHACHA20_POLY1305),
    ] {
        result.add(name, seal(algorithm)?, "GiB/s a thread");
    }
    let available = if tls::kernel_seals() { 1.0 } else { 0.0 };
    result.add("tls_kernel_offers_ktls", available, "0 no, 1 yes");
    result.print(args.json);
    Ok(())
}

/// Runs of one kind.
#[derive(Default)]
struct Runs {
    gib_s: Vec<f64>,
    cpu_s_gib: Vec<f64>,
    stopped_ms: Vec<f64>,
}

impl Runs {
    fn add(&mut self, gib: f64, took: Took, cpu_s: f64) {
        self.gib_s.push(gib / took.whole.as_secs_f64());
        self.cpu_s_gib.push(cpu_s / gib);
        self.stopped_ms.push(took.stopped.as_secs_f64() * 1e3);
    }
}

async fn measure(args: &Args, result: &mut figures::Result) -> anyhow::Result<()> {
    let mib = usize::try_from(args.mib / 2 * 2)?;
    let gib = mib as f64 / 1024.0;
    let source = Memory::filled(mib);
    let (mut sockets, mut plain, mut sealed) = (Vec::new(), Runs::default(), Runs::default());
    for _ in 0..args.runs {
        let took = loopback::sockets(mib, args.channels).await?;
        sockets.push(gib / took.as_secs_f64());
        for (is_sealed, runs) in [(false, &mut plain), (true, &mut sealed)] {
            let sink = Memory::fresh(mib);
            let begun_ns = process_cpu_ns();
            let took = loopback::migrate(&source, &sink, args.channels, is_sealed)
                .await
                .map_err(|error| anyhow!(error))?;
            let cpu_s = Duration::from_nanos(process_cpu_ns() - begun_ns).as_secs_f64();
            ensure!(source.equals(&sink), "the copy differs");
            runs.add(gib, took, cpu_s);
        }
    }
    let median = |values: &[f64]| percentile(values, 0.5);
    let (plain_gib_s, socket_gib_s) = (median(&plain.gib_s), median(&sockets));
    result.add_beside("tls_none", plain_gib_s, "GiB/s", "sockets", socket_gib_s);
    let sealed_gib_s = median(&sealed.gib_s);
    result.add_beside("tls_1_3", sealed_gib_s, "GiB/s", "without", plain_gib_s);
    result.add_beside(
        "tls_1_3_cpu",
        median(&sealed.cpu_s_gib),
        "s/GiB",
        "without",
        median(&plain.cpu_s_gib),
    );
    result.add_beside(
        "tls_1_3_stopped_to_complete",
        median(&sealed.stopped_ms),
        "ms",
        "without",
        median(&plain.stopped_ms),
    );
    Ok(())
}

/// GiB a second that one thread seals, in records, in its cache: what no TLS here can beat.
fn seal(algorithm: &'static Algorithm) -> anyhow::Result<f64> {
    let failed = |_| anyhow!("sealing failed");
    let key = UnboundKey::new(algorithm, &vec![7; algorithm.key_len()]).map_err(failed)?;
    let key = LessSafeKey::new(key);
    let mut record = vec![1; RECORD_BYTES];
    let (mut records, began) = (0_u64, Instant::now());
    while began.elapsed() < SEALING {
        for _ in 0..64 {
            let mut nonce = [0; NONCE_LEN];
            nonce[4..].copy_from_slice(&records.to_be_bytes());
            let nonce = Nonce::assume_unique_for_key(nonce);
            // The tag goes nowhere here.
            let _ = key
                .seal_in_place_separate_tag(nonce, Aad::empty(), &mut record)
                .map_err(failed)?;
            records += 1;
        }
    }
    let gib = records as f64 * RECORD_BYTES as f64 / (1_u64 << 30) as f64;
    Ok(gib / began.elapsed().as_secs_f64())
}
