//! A machine without a hypervisor: memory of atomics, a dirty log with KVM's semantics, a guest thread.

use async_trait::async_trait;
use migration_core::{
    HostError, MachineSink, MachineSource, MemorySink, MemorySource, PAGE_SIZE, Region,
    monotonic_ns,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

const WORDS: u64 = (PAGE_SIZE / 8) as u64;

/// Both ends of a migration.
pub struct Fake {
    regions: Vec<Region>,
    memory: Vec<Vec<AtomicU64>>,
    /// As KVM's: set by vCPU writes, read without being cleared.
    log: Vec<Vec<AtomicU64>>,
    /// As the monitor's own: set by device writes, cleared when read.
    device_log: Vec<Vec<AtomicU64>>,
    pub logging: AtomicBool,
    running: Mutex<bool>,
    run_again: Condvar,
    pub quiet: AtomicBool,
    pub loaded: Mutex<Option<Vec<u8>>>,
    pub refuse_to_load: AtomicBool,
    /// It runs again by the time it should say quiet.
    pub goes_on: AtomicBool,
    /// A device that never stops writing.
    pub never_still: AtomicBool,
    pub zeroed_pages: AtomicU64,
    state_bytes: usize,
}

/// Two regions of unlike size, neither a whole number of chunks.
pub fn regions() -> Vec<Region> {
    vec![
        Region {
            guest_address: 0,
            pages: 1300,
        },
        Region {
            guest_address: 1 << 32,
            pages: 2999,
        },
    ]
}

impl Fake {
    pub fn with(regions: Vec<Region>) -> Arc<Fake> {
        let atomics = |count: u64| (0..count).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
        let bitmaps = || {
            regions
                .iter()
                .map(|r| atomics(r.pages.div_ceil(64)))
                .collect::<Vec<_>>()
        };
        Arc::new(Fake {
            memory: regions.iter().map(|r| atomics(r.pages * WORDS)).collect(),
            log: bitmaps(),
            device_log: bitmaps(),
            regions,
            logging: AtomicBool::new(false),
            running: Mutex::new(true),
            run_again: Condvar::new(),
            quiet: AtomicBool::new(false),
            loaded: Mutex::new(None),
            refuse_to_load: AtomicBool::new(false),
            goes_on: AtomicBool::new(false),
            never_still: AtomicBool::new(false),
            zeroed_pages: AtomicU64::new(0),
            state_bytes: 300_000,
        })
    }

    pub fn new() -> Arc<Fake> {
        Fake::with(regions())
    }

    /// A machine with contents: a third of the pages zero, in patches.
    pub fn filled(seed: u64) -> Arc<Fake> {
        let fake = Fake::new();
        let mut random = StdRng::seed_from_u64(seed);
        for memory in &fake.memory {
            for page in memory.chunks(WORDS as usize) {
                match random.random_range(0..3) {
                    0 => {}
                    // One word at the very end is enough to make a page one that must be sent.
                    1 => page[page.len() - 1].store(random.random(), SeqCst),
                    _ => page
                        .iter()
                        .for_each(|word| word.store(random.random(), SeqCst)),
                }
            }
        }
        fake
    }

    fn mark(log: &[Vec<AtomicU64>], region: usize, page: u64) {
        log[region][(page / 64) as usize].fetch_or(1 << (page % 64), SeqCst);
    }

    /// A store by a vCPU: data first, then the log, so that a copy in between is sent again.
    pub fn guest_write(&self, region: usize, page: u64, word: u64, value: u64) {
        self.memory[region][(page * WORDS + word) as usize].store(value, SeqCst);
        if self.logging.load(SeqCst) {
            Fake::mark(&self.log, region, page);
        }
    }

    pub fn device_write(&self, region: usize, page: u64, value: u64) {
        self.memory[region][(page * WORDS) as usize].store(value, SeqCst);
        if self.logging.load(SeqCst) {
            Fake::mark(&self.device_log, region, page);
        }
    }

    /// Zeroes a page as a guest would.
    pub fn guest_zero(&self, region: usize, page: u64) {
        for word in 0..WORDS {
            self.guest_write(region, page, word, 0);
        }
    }

    pub fn is_running(&self) -> bool {
        *self.running.lock().unwrap()
    }

    /// The monitor lets the machine go on: never the engine.
    pub fn resume(&self) {
        *self.running.lock().unwrap() = true;
        self.run_again.notify_all();
    }

    /// The first place where two machines' memory differs.
    pub fn difference(&self, other: &Fake) -> Option<String> {
        for (region, (ours, theirs)) in self.memory.iter().zip(&other.memory).enumerate() {
            for (at, (a, b)) in ours.iter().zip(theirs).enumerate() {
                let (a, b) = (a.load(SeqCst), b.load(SeqCst));
                if a != b {
                    let page = at as u64 / WORDS;
                    return Some(format!("region {region} page {page}: {a:#x} and {b:#x}"));
                }
            }
        }
        None
    }
}

/// A vCPU that dirties memory until it is dropped.
pub struct Guest {
    over: Arc<AtomicBool>,
    pub writes: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
    machine: Arc<Fake>,
}

impl Guest {
    /// Writes to `hot_pages` pages at random: bursts of 32 writes, `pause` between them.
    pub fn start(machine: &Arc<Fake>, hot_pages: u64, pause: Duration) -> Guest {
        let over = Arc::new(AtomicBool::new(false));
        let writes = Arc::new(AtomicU64::new(0));
        let (ended, count, fake) = (Arc::clone(&over), Arc::clone(&writes), Arc::clone(machine));
        let thread = std::thread::spawn(move || {
            let mut random = StdRng::seed_from_u64(1);
            while !ended.load(SeqCst) {
                {
                    let running = fake.running.lock().unwrap();
                    let wait = Duration::from_millis(50);
                    let (running, _) = fake
                        .run_again
                        .wait_timeout_while(running, wait, |r| !*r)
                        .unwrap();
                    if !*running {
                        continue;
                    }
                    for _ in 0..32 {
                        let region = random.random_range(0..fake.regions.len());
                        let page =
                            random.random_range(0..hot_pages.min(fake.regions[region].pages));
                        let number = count.fetch_add(1, SeqCst);
                        if number % 64 == 63 {
                            fake.guest_zero(region, page);
                        } else {
                            fake.guest_write(region, page, random.random_range(0..WORDS), number);
                        }
                    }
                }
                std::thread::sleep(pause);
            }
        });
        Guest {
            over,
            writes,
            thread: Some(thread),
            machine: Arc::clone(machine),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.over.store(true, SeqCst);
        self.machine.run_again.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl MemorySource for Fake {
    fn regions(&self) -> Vec<Region> {
        self.regions.clone()
    }

    fn start_dirty_log(&self) -> Result<(), HostError> {
        assert!(
            !self.logging.swap(true, SeqCst),
            "the log was left on by an earlier attempt"
        );
        // Initially set, as KVM does where it can.
        for (log, region) in self.log.iter().zip(&self.regions) {
            for (index, word) in log.iter().enumerate() {
                let pages = (region.pages - index as u64 * 64).min(64);
                word.store(
                    if pages == 64 {
                        u64::MAX
                    } else {
                        (1 << pages) - 1
                    },
                    SeqCst,
                );
            }
        }
        Ok(())
    }

    fn harvest_dirty(&self, region: usize) -> Result<Vec<u64>, HostError> {
        if self.never_still.load(SeqCst) {
            self.device_write(0, 7, monotonic_ns());
        }
        let log = self.log[region].iter().zip(&self.device_log[region]);
        Ok(log
            .map(|(vcpu, device)| vcpu.load(SeqCst) | device.swap(0, SeqCst))
            .collect())
    }

    fn clear_dirty(&self, region: usize, first_page: u64, bits: &[u64]) -> Result<(), HostError> {
        assert_eq!(first_page % 64, 0);
        for (index, word) in bits.iter().enumerate() {
            self.log[region][first_page as usize / 64 + index].fetch_and(!word, SeqCst);
        }
        Ok(())
    }

    fn read_pages(&self, region: usize, page: u64, buffer: &mut [u8]) -> Result<(), HostError> {
        let first = (page * WORDS) as usize;
        for (word, out) in self.memory[region][first..]
            .iter()
            .zip(buffer.chunks_exact_mut(8))
        {
            out.copy_from_slice(&word.load(SeqCst).to_le_bytes());
        }
        Ok(())
    }

    fn stop_dirty_log(&self) -> Result<(), HostError> {
        self.logging.store(false, SeqCst);
        Ok(())
    }
}

#[async_trait]
impl MachineSource for Fake {
    async fn pause(&self) -> Result<u64, HostError> {
        *self.running.lock().unwrap() = false;
        Ok(monotonic_ns())
    }

    async fn drain_disks(&self) -> Result<(), HostError> {
        // A read that was in flight lands now.
        self.device_write(0, 3, 0xd15c);
        Ok(())
    }

    fn mark_quiet(&self) -> Result<(), HostError> {
        if self.goes_on.load(SeqCst) {
            self.resume();
            return Err("the machine goes on".into());
        }
        assert!(!self.is_running(), "quiet is said of a stopped machine");
        self.quiet.store(true, SeqCst);
        Ok(())
    }

    async fn save_device_state(&self) -> Result<Vec<u8>, HostError> {
        assert!(self.quiet.load(SeqCst));
        // As a clock page that is written when the vCPU's state is saved.
        self.device_write(1, 2998, 0xc10c);
        Ok((0..self.state_bytes).map(|n| n as u8).collect())
    }
}

impl MemorySink for Fake {
    fn regions(&self) -> Vec<Region> {
        self.regions.clone()
    }

    fn write_pages(&self, region: usize, page: u64, data: &[u8]) -> Result<(), HostError> {
        let first = (page * WORDS) as usize;
        for (word, bytes) in self.memory[region][first..]
            .iter()
            .zip(data.chunks_exact(8))
        {
            word.store(u64::from_le_bytes(bytes.try_into()?), SeqCst);
        }
        Ok(())
    }

    fn zero_pages(&self, region: usize, page: u64, count: u64) -> Result<(), HostError> {
        self.zeroed_pages.fetch_add(count, SeqCst);
        let words = (page * WORDS) as usize..((page + count) * WORDS) as usize;
        self.memory[region][words]
            .iter()
            .for_each(|word| word.store(0, SeqCst));
        Ok(())
    }
}

#[async_trait]
impl MachineSink for Fake {
    async fn load_device_state(&self, state: Vec<u8>) -> Result<(), HostError> {
        if self.refuse_to_load.load(SeqCst) {
            return Err("an interrupt controller of another version".into());
        }
        *self.loaded.lock().unwrap() = Some(state);
        Ok(())
    }
}
