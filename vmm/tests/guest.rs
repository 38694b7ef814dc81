//! The self-checking guest on real KVM: it works, and it notices each thing that it is there to notice.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster_model::ids::{MigrationId, NodeId, Token, VmId};
use cluster_model::limits;
use cluster_model::state::{Boot, OnIsolation};
use common::{kvm, permit};
use tokio::sync::mpsc;
use vm_memory::{Bytes, GuestAddress};
use vmm::devices::MachineEvent;
use vmm::devices::selfcheck::{GuestReport, SelfCheck, witness};
use vmm::guest::abi::{
    BlockContents, ErrorCode, PAGE_BYTES, PAGE_WORDS, Report, WORKING_SET_START, block_slot,
    make_block, part_of, read_block,
};
use vmm::guest::{DISK_BLOCKS, record_bytes};
use vmm::handles::Handles;
use vmm::platform::{self, Platform};
use vmm::spec::{Incoming, MachineDisk, MachineFile, ValidatedSpec};

const LONG: Duration = Duration::from_secs(120);
const MEMORY_MIB: u64 = 16;
const WORKING_SET_MIB: u32 = 8;
const WORKING_SET_PAGES: u64 = WORKING_SET_MIB as u64 * 256;
const DISK_BYTES: u64 = DISK_BLOCKS * PAGE_BYTES;
const DISK: &str = "vm-1-0.raw";
/// Of a machine with several: more than the test's host has processors for.
const VCPUS: u32 = 4;

/// A host folder with a disk and a witness file, and how many vCPUs its machine has.
struct Host {
    folder: tempfile::TempDir,
    vcpus: u32,
}

impl Host {
    fn new() -> Host {
        Host::with_vcpus(1)
    }

    fn with_vcpus(vcpus: u32) -> Host {
        let folder = tempfile::tempdir().unwrap();
        let host = Host { folder, vcpus };
        fs::File::create(host.disk())
            .unwrap()
            .set_len(DISK_BYTES)
            .unwrap();
        host
    }

    fn disk(&self) -> PathBuf {
        self.folder.path().join(DISK)
    }

    fn witness(&self) -> PathBuf {
        self.folder.path().join("witness")
    }

    fn losses(&self) -> Vec<witness::Loss> {
        witness::losses(&witness::read(&self.witness()).unwrap())
    }

    async fn machine(&self, dirty_mib_s: u32, incoming: bool) -> Guest {
        let file = MachineFile {
            vm_id: VmId(1),
            vm_name: "checked".into(),
            node_id: NodeId(1),
            node_uid: 1000,
            node_address: None,
            token: Token(5),
            memory_mib: MEMORY_MIB,
            vcpus: self.vcpus,
            boot: Boot::SelfCheck {
                working_set_mib: WORKING_SET_MIB,
                dirty_mib_s,
            },
            disks: vec![MachineDisk {
                volume: format!("dir:{}", self.folder.path().display()),
                path: DISK.into(),
                cluster_id: "test".into(),
                broker_uid: 2000,
                fence_class: "none".into(),
                size_bytes: DISK_BYTES,
                tls_ca: String::new(),
            }],
            nics: Vec::new(),
            witness: Some(self.witness()),
            on_isolation: OnIsolation::Freeze,
            incoming: incoming.then(|| Incoming {
                migration_id: MigrationId(1),
                ticket: "ab".repeat(32),
                listen: vec!["127.0.0.1:0".parse().unwrap()],
            }),
            log: None,
            confinement: Default::default(),
        };
        let spec = ValidatedSpec::new(file).unwrap();
        let (sender, events) = mpsc::channel(16);
        // Nobody listens: it names files that a test asks for, and this one asks for none.
        let handles = Handles::open(&spec, Path::new("ctl")).unwrap();
        let platform = platform::build(&spec, handles, sender, |_| {})
            .await
            .unwrap();
        let port = platform.selfcheck.clone().unwrap();
        Guest {
            platform,
            port,
            events,
        }
    }

    async fn start(&self, dirty_mib_s: u32) -> Guest {
        let guest = self.machine(dirty_mib_s, false).await;
        guest.run();
        guest
    }
}

/// A machine with the guest.
struct Guest {
    platform: Platform,
    port: Arc<SelfCheck>,
    events: mpsc::Receiver<MachineEvent>,
}

impl Guest {
    fn run(&self) -> u64 {
        self.platform.machine.gate().run(permit(LONG)).unwrap()
    }

    fn stop(&self) -> u64 {
        self.platform.machine.gate().stop_vcpus().unwrap().1
    }

    /// Waits until a report is as it should be.
    async fn wait(&self, what: &str, holds: impl Fn(&Report) -> bool) -> Report {
        let mut reports = self.port.watch();
        let wanted = |report: &GuestReport| report.last.as_ref().is_some_and(&holds);
        let waited = tokio::time::timeout(LONG, reports.wait_for(wanted)).await;
        match waited {
            Ok(Ok(report)) => report.last.unwrap(),
            _ => panic!("in vain waited until {what}: {:?}", self.port.report()),
        }
    }

    /// Waits until the guest does all it does, and has found nothing wrong.
    async fn wait_until_at_work(&self) -> Report {
        let report = self
            .wait("the guest is at work", |report| {
                report.steps > 20 && report.flushed > 20 && report.disk_checks > 20
            })
            .await;
        self.assert_sound();
        report
    }

    fn assert_sound(&self) {
        let report = self.port.report();
        assert_eq!((report.errors(), report.error()), (0, None));
    }

    async fn wait_for_error(&self) -> (ErrorCode, Report) {
        let report = self
            .wait("the guest reports an error", |report| report.errors > 0)
            .await;
        (ErrorCode::from_number(report.error_code).unwrap(), report)
    }

    /// A page of the working set.
    fn page(&self, page: u64) -> Vec<u8> {
        self.page_at(WORKING_SET_START + page * PAGE_BYTES)
    }

    fn set_page(&self, page: u64, contents: &[u8]) {
        self.set_page_at(WORKING_SET_START + page * PAGE_BYTES, contents);
    }

    fn page_at(&self, address: u64) -> Vec<u8> {
        let mut contents = vec![0; PAGE_BYTES as usize];
        self.platform
            .machine
            .memory()
            .read_slice(&mut contents, GuestAddress(address))
            .unwrap();
        contents
    }

    fn set_page_at(&self, address: u64, contents: &[u8]) {
        self.platform
            .machine
            .memory()
            .write_slice(contents, GuestAddress(address))
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guest_dirties_writes_checks_and_finds_nothing_wrong() {
    if !kvm("the_guest_dirties_writes_checks_and_finds_nothing_wrong") {
        return;
    }
    let host = Host::new();
    let mut guest = host.start(20).await;
    let first = guest.wait_until_at_work().await;
    let later = guest
        .wait(
            "every page was checked ten times and written thrice",
            |report| {
                report.memory_checks > 10 * WORKING_SET_PAGES
                    && report.pages_written > 3 * WORKING_SET_PAGES
            },
        )
        .await;
    guest.assert_sound();
    let elapsed_s = (later.clock_ns - first.clock_ns) as f64 / 1e9;
    let mib = (later.pages_written - first.pages_written) as f64 / 256.0;
    assert!(
        mib <= 20.0 * elapsed_s * 1.1 + 1.0,
        "{mib} MiB in {elapsed_s} s at a set rate of 20 MiB/s"
    );
    assert!(guest.events.try_recv().is_err());
    // What it said is flushed lies on the disk.
    let disk = fs::read(host.disk()).unwrap();
    let slot = block_slot(later.flushed, DISK_BLOCKS) as usize;
    let block = block_at(&disk, slot);
    assert!(
        matches!(read_block(&block, 1), BlockContents::Whole { number, life: 1, .. } if number == later.flushed)
    );
    assert_eq!(host.losses(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_guest_dirties_nothing_and_still_checks() {
    if !kvm("an_idle_guest_dirties_nothing_and_still_checks") {
        return;
    }
    let host = Host::new();
    let guest = host.start(0).await;
    let first = guest.wait_until_at_work().await;
    assert_eq!(first.pages_written, WORKING_SET_PAGES);
    let checks = first.memory_checks + WORKING_SET_PAGES;
    let later = guest
        .wait("every page was checked again", |report| {
            report.memory_checks > checks
        })
        .await;
    assert_eq!(later.pages_written, WORKING_SET_PAGES);
    guest.assert_sound();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_in_memory_is_reported() {
    if !kvm("a_flipped_bit_in_memory_is_reported") {
        return;
    }
    let host = Host::new();
    let guest = host.start(0).await;
    guest.wait_until_at_work().await;
    guest.stop();
    let page = 1234;
    let mut contents = guest.page(page);
    contents[4091] ^= 0x10;
    guest.set_page(page, &contents);
    guest.run();
    let (code, report) = guest.wait_for_error().await;
    assert_eq!((code, report.error_where), (ErrorCode::PageDamaged, page));
    assert_eq!((report.error_expected ^ report.error_found).count_ones(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_replaced_by_its_own_copy_of_a_round_ago_is_reported() {
    if !kvm("a_page_replaced_by_its_own_copy_of_a_round_ago_is_reported") {
        return;
    }
    let host = Host::new();
    let guest = host.start(16).await;
    let first = guest.wait_until_at_work().await;
    guest.stop();
    let page = 777;
    let old = guest.page(page);
    guest.run();
    let round = first.pages_written + 2 * WORKING_SET_PAGES;
    guest
        .wait("a round has passed", |report| report.pages_written > round)
        .await;
    guest.assert_sound();
    guest.stop();
    assert_ne!(guest.page(page), old);
    guest.set_page(page, &old);
    guest.run();
    let (code, report) = guest.wait_for_error().await;
    assert_eq!((code, report.error_where), (ErrorCode::PageStale, page));
    assert!(report.error_found < report.error_expected, "{report:?}");
    // The first error stays.
    let later = guest
        .wait("it goes on", |later| later.number > report.number + 10)
        .await;
    assert_eq!(
        (later.error_code, later.error_where),
        (report.error_code, page)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_copy_of_the_guests_own_counts_is_reported() {
    if !kvm("an_old_copy_of_the_guests_own_counts_is_reported") {
        return;
    }
    let host = Host::new();
    let guest = host.start(16).await;
    let first = guest.wait_until_at_work().await;
    guest.stop();
    // Every page of the program's data that changes; its old copy must not pass for the new one.
    let data = 0x10_4000..0x24_0000u64;
    let words = |address| {
        guest
            .platform
            .machine
            .memory()
            .read_obj::<[u64; 2]>(GuestAddress(address))
            .unwrap()
    };
    let second = data
        .clone()
        .step_by(4096)
        .find(|&address| {
            words(address)[0] >= first.pages_written && words(address)[1] == !words(address)[0]
        })
        .expect("the twin of the count");
    let old = guest.page_at(second);
    guest.run();
    guest
        .wait("pages were written", |report| {
            report.pages_written > first.pages_written + 500
        })
        .await;
    guest.assert_sound();
    guest.stop();
    guest.set_page_at(second, &old);
    guest.run();
    let (code, report) = guest.wait_for_error().await;
    assert_eq!(code, ErrorCode::CounterStale);
    assert!(report.error_found < report.error_expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_on_the_disk_is_reported() {
    if !kvm("a_flipped_bit_on_the_disk_is_reported") {
        return;
    }
    let host = Host::new();
    let guest = host.start(0).await;
    guest.wait_until_at_work().await;
    // Slot 5 was written in the first rounds and is not overwritten for a long time.
    change_block(&host, 5, |block| block[2000] ^= 1);
    let (code, report) = guest.wait_for_error().await;
    assert_eq!(
        (code, report.error_where, report.error_expected),
        (ErrorCode::BlockDamaged, 5, 6)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn another_whole_block_in_a_blocks_place_is_reported() {
    if !kvm("another_whole_block_in_a_blocks_place_is_reported") {
        return;
    }
    let host = Host::new();
    let guest = host.start(0).await;
    guest.wait_until_at_work().await;
    let disk = fs::read(host.disk()).unwrap();
    change_block(&host, 7, |block| {
        block.copy_from_slice(&disk[3 * 4096..4 * 4096])
    });
    let (code, report) = guest.wait_for_error().await;
    assert_eq!((code, report.error_where), (ErrorCode::BlockStale, 7));
    assert_eq!((report.error_expected, report.error_found), (8, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_started_again_finds_all_that_was_flushed() {
    if !kvm("a_guest_started_again_finds_all_that_was_flushed") {
        return;
    }
    let host = Host::new();
    let mut promised = 0;
    for life in 1..=3 {
        let guest = host.start(0).await;
        let report = guest
            .wait("the disk was scanned", |report| report.life != 0)
            .await;
        assert_eq!(report.life, life);
        assert!(
            report.found_at_boot >= promised,
            "{} found, {promised} flushed",
            report.found_at_boot
        );
        let beyond = promised + 20;
        promised = guest
            .wait("more was flushed", |report| report.flushed > beyond)
            .await
            .flushed;
        guest.assert_sound();
        // As when the host dies: nothing is drained.
        drop(guest);
    }
    assert_eq!(host.losses(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_cut_back_to_before_the_last_flush_is_a_loss() {
    if !kvm("a_disk_cut_back_to_before_the_last_flush_is_a_loss") {
        return;
    }
    let host = Host::new();
    let guest = host.start(0).await;
    guest.wait_until_at_work().await;
    // A copy between two flushes is as consistent as a snapshot: writes are in order, and the vCPU stands still.
    guest.stop();
    guest.platform.machine.drain(LONG).await.unwrap();
    let old = fs::read(host.disk()).unwrap();
    let before = guest.port.report().last.unwrap().flushed;
    guest.run();
    let after = guest
        .wait("more was flushed", |report| report.flushed > before + 20)
        .await
        .flushed;
    drop(guest);
    fs::write(host.disk(), old).unwrap();
    let guest = host.start(0).await;
    let report = guest
        .wait("the disk was scanned", |report| report.life != 0)
        .await;
    assert!(
        report.found_at_boot < after,
        "{} found, {after} flushed",
        report.found_at_boot
    );
    guest.assert_sound();
    let losses = host.losses();
    assert_eq!(losses.len(), 1);
    assert_eq!(losses[0].found, report.found_at_boot);
    assert!(losses[0].flushed >= after);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flushed_block_that_is_gone_at_boot_is_reported() {
    if !kvm("a_flushed_block_that_is_gone_at_boot_is_reported") {
        return;
    }
    let host = Host::new();
    let guest = host.start(0).await;
    guest.wait_until_at_work().await;
    drop(guest);
    change_block(&host, 9, |block| block.fill(0));
    let guest = host.start(0).await;
    let (code, report) = guest.wait_for_error().await;
    assert_eq!((code, report.error_where), (ErrorCode::BlockLost, 9));
    assert_eq!((report.error_expected, report.error_found), (10, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_flushed_may_be_missing_torn_or_there_out_of_order() {
    if !kvm("what_was_not_flushed_may_be_missing_torn_or_there_out_of_order") {
        return;
    }
    let host = Host::new();
    // 100 was flushed when 101 to 104 were written; of those 102 is missing and 104 is torn.
    for number in (1..=101).chain([103, 104]) {
        put_block(&host, number, (number - 1) / 4 * 4);
    }
    change_block(&host, 103, |block| block[2048..].fill(0));
    let guest = host.start(0).await;
    let report = guest
        .wait("the disk was scanned", |report| report.life != 0)
        .await;
    assert_eq!(
        (report.found_at_boot, report.highest_at_boot, report.life),
        (101, 103, 2)
    );
    // The guest goes on with 102 and finds nothing wrong with what lay there.
    guest
        .wait("the disk was checked", |report| {
            report.flushed > 200 && report.disk_checks > 200
        })
        .await;
    guest.assert_sound();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ring_that_has_gone_round_is_whole_and_a_block_of_the_round_before_is_not() {
    if !kvm("a_ring_that_has_gone_round_is_whole_and_a_block_of_the_round_before_is_not") {
        return;
    }
    let host = Host::new();
    let last = 2 * DISK_BLOCKS + 40;
    for number in last - DISK_BLOCKS + 1..=last {
        put_block(&host, number, (number - 1) / 4 * 4);
    }
    let guest = host.start(0).await;
    let report = guest
        .wait("the disk was scanned", |report| report.life != 0)
        .await;
    assert_eq!(report.found_at_boot, last);
    guest
        .wait("the disk was checked", |report| {
            report.flushed > last + 40 && report.disk_checks > 50
        })
        .await;
    guest.assert_sound();
    drop(guest);
    put_block(&host, 11, 8);
    let guest = host.start(0).await;
    let (code, report) = guest.wait_for_error().await;
    assert_eq!((code, report.error_where), (ErrorCode::BlockLost, 10));
    assert_eq!(
        (report.error_expected, report.error_found),
        (2 * DISK_BLOCKS + 11, 11)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guests_gap_agrees_with_the_monitors_pause() {
    if !kvm("the_guests_gap_agrees_with_the_monitors_pause") {
        return;
    }
    const PAUSE: Duration = Duration::from_millis(150);
    const AGREEMENT_NS: u64 = 5_000_000;
    let host = Host::new();
    let guest = host.start(0).await;
    guest.wait_until_at_work().await;
    // On a busy host other threads may delay the guest for longer than its own error: one quiet attempt proves that
    // the figures agree, and none may ever see less than the pause.
    let mut excesses = Vec::new();
    for _ in 0..10 {
        let stopped_ns = guest.stop();
        guest.port.take_longest_gap();
        let number = guest.port.report().last.unwrap().number;
        std::thread::sleep(PAUSE);
        let pause_ns = guest.run() - stopped_ns;
        guest
            .wait("the guest reported after the pause", |report| {
                report.number > number + 1
            })
            .await;
        let gap_ns = guest.port.take_longest_gap().as_nanos() as u64;
        assert!(
            gap_ns + 500_000 > pause_ns,
            "the guest saw {gap_ns} ns of a pause of {pause_ns} ns"
        );
        excesses.push(gap_ns.saturating_sub(pause_ns));
        if gap_ns < pause_ns + AGREEMENT_NS {
            guest.assert_sound();
            return;
        }
    }
    panic!("the guest saw longer gaps than the monitor made, by (ns): {excesses:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guest_goes_on_in_another_machine_and_finds_nothing_wrong() {
    if !kvm("the_guest_goes_on_in_another_machine_and_finds_nothing_wrong") {
        return;
    }
    goes_on_elsewhere(&Host::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_vcpus_go_on_in_another_machine_and_find_nothing_wrong() {
    if !kvm("all_vcpus_go_on_in_another_machine_and_find_nothing_wrong") {
        return;
    }
    goes_on_elsewhere(&Host::with_vcpus(VCPUS)).await;
}

/// A machine that is stopped: its state, its memory.
struct Saved {
    state: Vec<u8>,
    memory: Vec<u8>,
}

impl Guest {
    async fn save(self) -> Saved {
        self.stop();
        let machine = &self.platform.machine;
        machine.drain(LONG).await.unwrap();
        let mut memory = vec![0; (MEMORY_MIB << 20) as usize];
        machine
            .memory()
            .read_slice(&mut memory, GuestAddress(0))
            .unwrap();
        Saved {
            state: machine.save().unwrap().to_bytes(),
            memory,
        }
    }

    fn restore(&self, saved: &Saved) {
        let machine = &self.platform.machine;
        machine
            .memory()
            .write_slice(&saved.memory, GuestAddress(0))
            .unwrap();
        let state = vmm::state::MachineState::from_bytes(&saved.state).unwrap();
        machine.restore(&state).unwrap();
    }
}

/// Three machines, one after the other, in which one guest goes on. A step is one that every vCPU has made.
async fn goes_on_elsewhere(host: &Host) {
    let mut guest = host.start(30).await;
    guest.wait_until_at_work().await;
    for _ in 0..3 {
        let port = guest.port.clone();
        let saved = guest.save().await;
        let before = port.report().last.unwrap();
        guest = host.machine(30, true).await;
        guest.restore(&saved);
        assert_eq!(guest.port.report().last, Some(before));
        guest.run();
        let later = guest
            .wait("the guest goes on", |report| {
                report.flushed > before.flushed + 20
                    && report.steps > before.steps + 20
                    && report.memory_checks > before.memory_checks + WORKING_SET_PAGES
            })
            .await;
        assert_eq!(
            (later.life, later.found_at_boot),
            (before.life, before.found_at_boot)
        );
        guest.assert_sound();
    }
    assert_eq!(host.losses(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_vcpus_share_the_work_and_the_set_rate_and_find_nothing_wrong() {
    if !kvm("several_vcpus_share_the_work_and_the_set_rate_and_find_nothing_wrong") {
        return;
    }
    let host = Host::with_vcpus(VCPUS);
    let mut guest = host.start(20).await;
    let first = guest.wait_until_at_work().await;
    let later = guest
        .wait("every page was checked ten times and written thrice", |r| {
            r.memory_checks > 10 * WORKING_SET_PAGES && r.pages_written > 4 * WORKING_SET_PAGES
        })
        .await;
    guest.assert_sound();
    let elapsed_s = (later.clock_ns - first.clock_ns) as f64 / 1e9;
    let mib = (later.pages_written - first.pages_written) as f64 / 256.0;
    assert!(
        mib <= 20.0 * elapsed_s * 1.1 + 1.0,
        "{mib} MiB in {elapsed_s} s at a set rate of 20 MiB/s"
    );
    assert!(guest.events.try_recv().is_err());
    assert_eq!(host.losses(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_vcpus_as_a_machine_may_have_run_the_guest() {
    if !kvm("as_many_vcpus_as_a_machine_may_have_run_the_guest") {
        return;
    }
    let host = Host::with_vcpus(*limits::VCPUS.end());
    let guest = host.start(0).await;
    guest.wait_until_at_work().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_in_any_vcpus_part_is_reported() {
    if !kvm("a_flipped_bit_in_any_vcpus_part_is_reported") {
        return;
    }
    for vcpu in 0..u64::from(VCPUS) {
        let host = Host::with_vcpus(VCPUS);
        let guest = host.start(0).await;
        guest.wait_until_at_work().await;
        guest.stop();
        let (first, count) = part_of(WORKING_SET_PAGES, u64::from(VCPUS), vcpu);
        let page = first + count - 1;
        let mut contents = guest.page(page);
        contents[17] ^= 0x40;
        guest.set_page(page, &contents);
        guest.run();
        let (code, report) = guest.wait_for_error().await;
        assert_eq!((code, report.error_where), (ErrorCode::PageDamaged, page));
        assert_eq!((report.error_expected ^ report.error_found).count_ones(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_copy_of_the_page_that_all_vcpus_write_is_reported() {
    if !kvm("an_old_copy_of_the_page_that_all_vcpus_write_is_reported") {
        return;
    }
    let host = Host::with_vcpus(VCPUS);
    let guest = host.start(0).await;
    let first = guest.wait_until_at_work().await;
    guest.stop();
    // The count is a page's first word: the sum of what as many pages in a row have in their seventeenth. One of them
    // may be between the two.
    let data = 0x10_4000..0x38_0000u64;
    let word = |address| -> u64 {
        let memory = guest.platform.machine.memory();
        memory.read_obj(GuestAddress(address)).unwrap()
    };
    let sums = data.clone().step_by(4096).filter_map(|address| {
        let own = |vcpu| word(address + vcpu * 4096 + 16 * 8);
        let all = (0..u64::from(VCPUS)).map(own);
        all.clone()
            .all(|turns| turns > 20)
            .then(|| all.sum::<u64>())
    });
    let sums: Vec<u64> = sums.collect();
    let is_count = |count: u64| sums.iter().any(|sum| sum - 4 <= count && count <= *sum);
    let page = data
        .step_by(4096)
        .find(|&address| is_count(word(address)))
        .expect("the common count");
    let old = guest.page_at(page);
    guest.run();
    guest
        .wait("steps were made", |report| report.steps > first.steps + 100)
        .await;
    guest.assert_sound();
    guest.stop();
    guest.set_page_at(page, &old);
    guest.run();
    let (code, report) = guest.wait_for_error().await;
    assert_eq!(code, ErrorCode::SharedCountStale);
    assert!(report.error_found < report.error_expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vcpu_that_does_not_go_on_is_seen_in_the_steps() {
    if !kvm("a_vcpu_that_does_not_go_on_is_seen_in_the_steps") {
        return;
    }
    let host = Host::with_vcpus(VCPUS);
    let guest = host.start(0).await;
    guest.wait_until_at_work().await;
    let mut saved = guest.save().await;
    // As if it had never been started: KVM_MP_STATE_UNINITIALIZED.
    let mut state: serde_json::Value = serde_json::from_slice(&saved.state).unwrap();
    let last = &mut state["cpus"][VCPUS as usize - 1]["mp_state"];
    assert_eq!(*last, "00000000");
    *last = "01000000".into();
    saved.state = state.to_string().into_bytes();
    let guest = host.machine(0, true).await;
    guest.restore(&saved);
    let before = guest.port.report().last.unwrap();
    guest.run();
    let first = guest
        .wait("reports come", |report| report.number > before.number + 5)
        .await;
    let later = guest
        .wait("reports come", |report| report.number > first.number + 30)
        .await;
    assert_eq!(later.steps, first.steps);
    assert!(later.flushed > first.flushed);
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_that_are_damaged_end_the_machine() {
    if !kvm("parameters_that_are_damaged_end_the_machine") {
        return;
    }
    let host = Host::new();
    let mut guest = host.machine(0, false).await;
    let place = GuestAddress(vmm::guest::PARAMS_ADDRESS + 20);
    guest
        .platform
        .machine
        .memory()
        .write_obj(0xa5u8, place)
        .unwrap();
    guest.run();
    let begun = Instant::now();
    let event = tokio::time::timeout(LONG, guest.events.recv())
        .await
        .unwrap();
    assert!(
        matches!(&event, Some(MachineEvent::Failed(why)) if why.contains("gave up")),
        "{event:?}"
    );
    assert!(begun.elapsed() < LONG);
}

fn block_at(disk: &[u8], slot: usize) -> [u64; PAGE_WORDS] {
    let bytes = &disk[slot * 4096..(slot + 1) * 4096];
    let mut words = [0; PAGE_WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    words
}

/// Writes block `number` as the guest of life 1 would have.
fn put_block(host: &Host, number: u64, flushed: u64) {
    let mut words = [0; PAGE_WORDS];
    make_block(&mut words, 1, number, 1, flushed);
    change_block(host, block_slot(number, DISK_BLOCKS), |block| {
        block.copy_from_slice(&record_bytes(&words))
    });
}

/// Changes a block behind everyone's back.
fn change_block(host: &Host, slot: u64, change: impl FnOnce(&mut [u8])) {
    use std::os::unix::fs::FileExt;
    let disk = fs::File::options()
        .read(true)
        .write(true)
        .open(host.disk())
        .unwrap();
    let mut block = vec![0; 4096];
    disk.read_exact_at(&mut block, slot * 4096).unwrap();
    change(&mut block);
    disk.write_all_at(&block, slot * 4096).unwrap();
}
