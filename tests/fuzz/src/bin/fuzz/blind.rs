//! Fuzzing without libFuzzer: the inputs that are kept, changed at random, through the targets of this very program.
//!
//! Nothing tells it what an input reached, so that it finds only what lies near the corpus. In turn it needs no build of
//! its own: it is what every landing can afford, and the coverage-guided search is for the long tier.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use fuzz::target::Target;
use xxhash_rust::xxh3::xxh3_64;

use crate::build::made_folder;
use crate::corpus;
use crate::run::{INPUT_SECONDS_MAX, Outcome};

/// Changes of one input at most.
const CHANGES_MAX: u64 = 4;
/// Bytes that one change puts in or takes out at most.
const PIECE_BYTES_MAX: u64 = 16;
/// Numbers at whose edges code goes wrong.
const BYTES: [u8; 8] = [0x00, 0x01, 0x7f, 0x80, 0xff, 0x20, b'"', b'9'];

/// Panics of any thread: a task's does not end the thread that waits for it.
static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Counts panics from now on, besides reporting them.
pub fn count_panics() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        report(panic);
    }));
}

/// Fuzzes a target for so many seconds; ends at its first find.
pub fn fuzz(target: &Target, seconds: u64, seed: u64) -> anyhow::Result<Outcome> {
    let crashes = made_folder().join("crashes").join(target.name);
    corpus::clear(&crashes)?;
    let mut inputs = (target.seeds)();
    let kept = corpus::kept(target);
    let mut files: Vec<PathBuf> = fs::read_dir(&kept)
        .with_context(|| format!("reading {}", kept.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<_>>()?;
    files.sort();
    for file in files {
        inputs.push(fs::read(&file)?);
    }
    ensure!(!inputs.is_empty(), "{}: nothing to begin with", target.name);
    let mut random = Random(seed ^ xxh3_64(target.name.as_bytes()));
    let watch = Watch::start(crashes.join("hang"));
    let mut outcome = Outcome {
        target: target.name.into(),
        corpus: inputs.len() as u64,
        ..Outcome::default()
    };
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(seconds) {
        let input = changed(&inputs, target.input_bytes_max, &mut random);
        watch.begins(&input);
        let before = PANICS.load(Ordering::SeqCst);
        let returned = catch_unwind(AssertUnwindSafe(|| target.check(&input))).is_ok();
        watch.ended();
        outcome.executions += 1;
        if !returned || PANICS.load(Ordering::SeqCst) != before {
            let path = crashes.join(format!("blind-{:016x}", xxh3_64(&input)));
            fs::write(&path, &input)?;
            outcome.crashes.push(path);
            break;
        }
    }
    ensure!(outcome.executions > 0, "{}: no input was run", target.name);
    outcome.executions_per_s = outcome.executions / seconds.max(1);
    Ok(outcome)
}

/// One of the inputs, changed in a few places.
fn changed(inputs: &[Vec<u8>], bytes_max: usize, random: &mut Random) -> Vec<u8> {
    let mut input = inputs[random.below(inputs.len())].clone();
    for _ in 0..=random.next() % CHANGES_MAX {
        let at = random.below(input.len() + 1);
        let length = (1 + random.next() % PIECE_BYTES_MAX) as usize;
        let end = input.len().min(at + length);
        match random.next() % 7 {
            0 if at < input.len() => input[at] ^= 1 << (random.next() % 8),
            1 if at < input.len() => input[at] = BYTES[random.below(BYTES.len())],
            2 if at < input.len() => input[at] = random.next() as u8,
            3 => drop(input.drain(at..end)),
            4 => {
                let piece: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
                input.splice(at..at, piece);
            }
            5 => {
                // The same once more: lengths and counts that no longer agree.
                let piece = input[at..end].to_vec();
                input.splice(at..at, piece);
            }
            _ => {
                // The end of another one.
                let other = &inputs[random.below(inputs.len())];
                let from = random.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
    }
    input.truncate(bytes_max);
    input
}

/// A stream of numbers from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// The input that runs, and since when.
type Running = Arc<Mutex<Option<(Instant, Vec<u8>)>>>;

/// Ends the program when an input runs for too long: a thread that hangs cannot be ended.
struct Watch(Running);

impl Watch {
    fn start(path: PathBuf) -> Watch {
        let running = Running::default();
        let weak = Arc::downgrade(&running);
        std::thread::spawn(move || {
            while let Some(running) = weak.upgrade() {
                let late = running
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone()
                    .filter(|(since, _)| since.elapsed().as_secs() > INPUT_SECONDS_MAX.into());
                if let Some((_, input)) = late {
                    let written = fs::write(&path, input);
                    eprintln!("an input runs for ever: {} ({written:?})", path.display());
                    std::process::exit(1);
                }
                drop(running);
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        Watch(running)
    }

    fn begins(&self, input: &[u8]) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((Instant::now(), input.to_vec()));
    }

    fn ended(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fuzz::target::MemoryBound;

    fn target(run: fn(&[u8])) -> Target {
        Target {
            // Whose kept inputs it begins with.
            name: "vm_spec",
            run,
            seeds: || vec![vec![7; 9]],
            input_bytes_max: 64,
            memory: MemoryBound {
                base: 64 << 20,
                each: 16,
            },
        }
    }

    fn dislikes_ff(input: &[u8]) {
        assert!(!input.contains(&0xff));
    }

    #[test]
    fn a_panic_is_found_and_its_input_is_kept() {
        count_panics();
        let outcome = fuzz(&target(dislikes_ff), 20, 1).expect("it runs");
        let [find] = &outcome.crashes[..] else {
            panic!("{outcome:?}");
        };
        assert!(fs::read(find).expect("the input").contains(&0xff));
        assert!(outcome.executions > 0);
    }

    #[test]
    fn inputs_differ_from_each_other_and_keep_to_the_bound() {
        let inputs = [vec![1; 60], vec![2; 3]];
        let mut random = Random(9);
        let made: Vec<Vec<u8>> = (0..1_000)
            .map(|_| changed(&inputs, 64, &mut random))
            .collect();
        assert!(made.iter().all(|input| input.len() <= 64));
        let different: std::collections::BTreeSet<_> = made.iter().collect();
        assert!(different.len() > 800, "{}", different.len());
    }
}
