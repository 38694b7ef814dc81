//! The block device on a disk in memory: what it serves, what it refuses, how it stops and goes on.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cluster_model::ids::Token;
use storage_broker::disk::{
    DiskState, DiskStatistics, DiskStatus, DrainError, Drained, RekeyError,
};
use tokio::sync::watch;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::devices::testing::{Bench, load, until};
use crate::devices::virtio::driver::{BUFFERS, Driver, set};
use crate::devices::virtio::mmio::register;

const DISK_BYTES: usize = 1 << 20;
const STATUS_AT: u64 = BUFFERS + 0x8_0000;
const DATA_AT: u64 = BUFFERS + 0x1000;

/// A disk in memory that can be held.
#[derive(Debug)]
struct MemoryDisk {
    data: Mutex<Vec<u8>>,
    held: watch::Sender<bool>,
    status: watch::Sender<DiskStatus>,
    begun: AtomicU64,
    flushes: AtomicU64,
}

impl MemoryDisk {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            data: Mutex::new(vec![0; DISK_BYTES]),
            held: watch::Sender::new(false),
            status: watch::Sender::new(DiskStatus {
                state: DiskState::Ready,
                token: Token(1),
            }),
            begun: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
        })
    }

    async fn go(&self) {
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.held.subscribe().wait_for(|held| !held).await.unwrap();
    }

    fn range(offset: u64, length: usize) -> Result<std::ops::Range<usize>, DiskError> {
        let start = offset as usize;
        let range = start..start + length;
        let beyond = DiskError::OutOfRange {
            offset,
            length: length as u64,
            size_bytes: DISK_BYTES as u64,
        };
        if range.end <= DISK_BYTES {
            Ok(range)
        } else {
            Err(beyond)
        }
    }
}

#[async_trait]
impl Disk for MemoryDisk {
    fn size_bytes(&self) -> u64 {
        DISK_BYTES as u64
    }
    async fn read(&self, offset: u64, length: u32) -> Result<Bytes, DiskError> {
        self.go().await;
        let range = Self::range(offset, length as usize)?;
        Ok(Bytes::copy_from_slice(&self.data.lock().unwrap()[range]))
    }
    async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
        self.go().await;
        let range = Self::range(offset, data.len())?;
        self.data.lock().unwrap()[range].copy_from_slice(&data);
        Ok(())
    }
    async fn flush(&self) -> Result<(), DiskError> {
        self.go().await;
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn hold(&self) {
        self.held.send_replace(true);
    }
    fn release(&self) {
        self.held.send_replace(false);
    }
    fn is_held(&self) -> bool {
        *self.held.borrow()
    }
    fn watch(&self) -> watch::Receiver<DiskStatus> {
        self.status.subscribe()
    }
    fn writes_unanswered(&self) -> bool {
        false
    }
    async fn rekey(&self, _: Token, _: Duration) -> Result<(), RekeyError> {
        Ok(())
    }
    async fn drain(&self, _: Duration) -> Result<Drained, DrainError> {
        Ok(Drained)
    }
    fn statistics(&self) -> DiskStatistics {
        DiskStatistics::default()
    }
}

fn device(bench: &Bench, disk: &Arc<MemoryDisk>, read_only: bool) -> Arc<Block> {
    let config = BlockConfig {
        index: 0,
        address: 0xd000_0000,
        irq: 5,
        serial: "vm7-disk0".into(),
        read_only,
    };
    let block = Block::new(&bench.context, &config, disk.clone()).unwrap();
    block.resume();
    block
}

/// Offers one request with its own header and status place; `pieces` are the data.
fn offer(
    block: &Block,
    driver: &mut Driver<'_>,
    head: u16,
    kind: u32,
    sector: u64,
    pieces: &[(u64, u32, bool)],
) {
    let memory = block.transport().memory();
    let header = BUFFERS + 16 * u64::from(head);
    memory.write_obj([kind, 0], GuestAddress(header)).unwrap();
    memory.write_obj(sector, GuestAddress(header + 8)).unwrap();
    let status = STATUS_AT + u64::from(head);
    memory.write_obj(0xeeu8, GuestAddress(status)).unwrap();
    let mut chain = vec![(header, 16, false)];
    chain.extend(pieces);
    chain.push((status, 1, true));
    driver.chain(head, &chain);
    driver.offer(head);
    driver.notify();
}

fn status_of(block: &Block, head: u16) -> u8 {
    block
        .transport()
        .memory()
        .read_obj(GuestAddress(STATUS_AT + u64::from(head)))
        .unwrap()
}

/// Does one request and answers its status and the length that the device reported.
async fn ask(
    block: &Block,
    driver: &mut Driver<'_>,
    kind: u32,
    sector: u64,
    pieces: &[(u64, u32, bool)],
) -> (u8, u32) {
    offer(block, driver, 0, kind, sector, pieces);
    let (head, length) = driver.wait_used().await;
    assert_eq!(head, 0);
    (status_of(block, 0), length)
}

#[tokio::test]
async fn what_was_written_is_read_back_through_any_pieces() {
    let (bench, disk) = (Bench::new(), MemoryDisk::new());
    let block = device(&bench, &disk, false);
    let mut driver = Driver::start(block.transport(), FEATURE_FLUSH | FEATURE_EVENT_INDEX);
    let data: Vec<u8> = (0..1536u32).map(|byte| (byte % 251) as u8).collect();
    let memory = block.transport().memory();
    memory.write_slice(&data, GuestAddress(DATA_AT)).unwrap();
    assert_eq!(
        ask(
            &block,
            &mut driver,
            1,
            3,
            &[(DATA_AT, 100, false), (DATA_AT + 100, 1436, false)]
        )
        .await,
        (STATUS_OK, 1)
    );
    assert_eq!(disk.data.lock().unwrap()[3 * 512..3 * 512 + 1536], data);
    let back = DATA_AT + 0x2000;
    assert_eq!(
        ask(
            &block,
            &mut driver,
            0,
            3,
            &[(back, 511, true), (back + 511, 1025, true)]
        )
        .await,
        (STATUS_OK, 1537)
    );
    let mut read = vec![0; 1536];
    memory.read_slice(&mut read, GuestAddress(back)).unwrap();
    assert_eq!(read, data);
    assert_eq!(ask(&block, &mut driver, 4, 0, &[]).await, (STATUS_OK, 1));
    assert_eq!(load(&disk.flushes), 1);
    assert_eq!(
        ask(&block, &mut driver, 8, 0, &[(back, 20, true)]).await,
        (STATUS_OK, 21)
    );
    assert_eq!(
        &memory.read_obj::<[u8; 20]>(GuestAddress(back)).unwrap(),
        b"vm7-disk0\0\0\0\0\0\0\0\0\0\0\0"
    );
}

#[tokio::test]
async fn the_configuration_says_capacity_limits_and_block_size() {
    let (bench, disk) = (Bench::new(), MemoryDisk::new());
    let block = device(&bench, &disk, false);
    let mut config = [0; 32];
    for (offset, part) in config.chunks_mut(4).enumerate() {
        block
            .transport()
            .read(register::CONFIG + 4 * offset as u64, part);
    }
    assert_eq!(config[..8], (DISK_BYTES as u64 / 512).to_le_bytes());
    assert_eq!(config[8..12], SEGMENT_BYTES_MAX.to_le_bytes());
    assert_eq!(config[12..16], SEGMENTS_MAX.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(BLOCK_BYTES << config[24], 4096);
}

#[tokio::test]
async fn a_request_that_cannot_be_served_fails_and_the_disk_never_sees_it() {
    let (bench, disk) = (Bench::new(), MemoryDisk::new());
    let block = device(&bench, &disk, false);
    let mut driver = Driver::start(block.transport(), FEATURE_FLUSH);
    let sectors = DISK_BYTES as u64 / 512;
    for (kind, sector, pieces, status) in [
        (0, sectors, vec![(DATA_AT, 512, true)], STATUS_IO_ERROR),
        (0, sectors - 1, vec![(DATA_AT, 1024, true)], STATUS_IO_ERROR),
        (0, u64::MAX, vec![(DATA_AT, 512, true)], STATUS_IO_ERROR),
        (
            1,
            u64::MAX - 1,
            vec![(DATA_AT, 1024, false)],
            STATUS_IO_ERROR,
        ),
        (0, 0, vec![(DATA_AT, 500, true)], STATUS_IO_ERROR),
        (1, 0, vec![(DATA_AT, 513, false)], STATUS_IO_ERROR),
        (11, 0, vec![], STATUS_UNSUPPORTED),
        (u32::MAX, 0, vec![(DATA_AT, 512, true)], STATUS_UNSUPPORTED),
    ] {
        assert_eq!(
            ask(&block, &mut driver, kind, sector, &pieces).await.0,
            status,
            "{kind} {sector}"
        );
    }
    // Empty requests succeed without the disk.
    assert_eq!(ask(&block, &mut driver, 0, 0, &[]).await.0, STATUS_OK);
    assert_eq!(ask(&block, &mut driver, 1, 0, &[]).await.0, STATUS_OK);
    assert_eq!(load(&disk.begun), 0);
}

#[tokio::test]
async fn a_request_without_header_or_status_is_given_back() {
    let (bench, disk) = (Bench::new(), MemoryDisk::new());
    let block = device(&bench, &disk, false);
    let mut driver = Driver::start(block.transport(), 0);
    for pieces in [
        vec![(BUFFERS, 16, false)],
        vec![(BUFFERS, 15, false), (STATUS_AT, 1, true)],
        vec![(STATUS_AT, 1, true)],
        vec![(BUFFERS, 0, false)],
    ] {
        driver.chain(4, &pieces);
        driver.offer(4);
        driver.notify();
        assert_eq!(driver.wait_used().await.0, 4);
    }
    assert_eq!(load(&disk.begun), 0);
}

#[tokio::test]
async fn a_disk_under_a_shared_lease_is_not_written() {
    let (bench, disk) = (Bench::new(), MemoryDisk::new());
    let block = device(&bench, &disk, true);
    let mut driver = Driver::start(block.transport(), FEATURE_READ_ONLY);
    assert_eq!(
        ask(&block, &mut driver, 1, 0, &[(DATA_AT, 512, false)])
            .await
            .0,
        STATUS_IO_ERROR
    );
    assert_eq!(
        ask(&block, &mut driver, 0, 0, &[(DATA_AT, 512, true)])
            .await
            .0,
        STATUS_OK
    );
    assert_eq!(load(&disk.begun), 1);
}

#[tokio::test]
async fn a_held_disk_pends_and_quiesce_waits_for_it() {
    let (bench, disk) = (Bench::new(), MemoryDisk::new());
    let block = device(&bench, &disk, false);
    let mut driver = Driver::start(block.transport(), FEATURE_FLUSH);
    disk.hold();
    offer(&block, &mut driver, 0, 1, 0, &[(DATA_AT, 512, false)]);
    until("the request is on the disk", || load(&disk.begun) == 1).await;
    let quiet = tokio::spawn({
        let block = block.clone();
        async move { block.quiesce().await }
    });
    // Taken by nobody: the device is quiescing as soon as a save is refused for no other reason.
    tokio::task::yield_now().await;
    assert!(!quiet.is_finished());
    assert!(block.save().is_err());
    offer(&block, &mut driver, 4, 4, 0, &[]);
    disk.release();
    tokio::time::timeout(Duration::from_secs(10), quiet)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(driver.used(), Some((0, 1)));
    assert_eq!(driver.used(), None);
    assert_eq!(load(&disk.begun), 1);

    // The flush was left in the queue: the next machine takes it, without being told.
    let saved = block.save().unwrap();
    let other_disk = MemoryDisk::new();
    let other = Bench::new();
    let config = BlockConfig {
        index: 0,
        address: 0xd000_0000,
        irq: 5,
        serial: String::new(),
        read_only: false,
    };
    let there = Block::new(&other.context, &config, other_disk.clone()).unwrap();
    let mut memory = vec![0; 4 << 20];
    block
        .transport()
        .memory()
        .read_slice(&mut memory, GuestAddress(0))
        .unwrap();
    there
        .transport()
        .memory()
        .write_slice(&memory, GuestAddress(0))
        .unwrap();
    there.restore(there.version(), &saved).unwrap();
    there.resume();
    let mut driver = driver.moved_to(there.transport());
    assert_eq!(driver.wait_used().await, (4, 1));
    assert_eq!(load(&other_disk.flushes), 1);
}

#[tokio::test]
async fn no_more_than_the_bound_is_on_the_disk_at_once() {
    let (bench, disk) = (Bench::new(), MemoryDisk::new());
    let block = device(&bench, &disk, false);
    let mut driver = Driver::start(block.transport(), FEATURE_FLUSH);
    disk.hold();
    // The driver's queue has 16 places; the same five chains are offered as often as they fit in.
    for round in 0..16u16 {
        offer(&block, &mut driver, 2 * (round % 5), 4, 0, &[]);
    }
    until("all are on the disk", || load(&disk.begun) == 16).await;
    disk.release();
    for _ in 0..16 {
        driver.wait_used().await;
    }
    const { assert!(IN_FLIGHT_MAX < QUEUE_SIZE_MAX as usize) };
}

#[tokio::test]
async fn a_reset_while_the_disk_works_leaves_the_new_driver_alone() {
    let (bench, disk) = (Bench::new(), MemoryDisk::new());
    let block = device(&bench, &disk, false);
    let mut driver = Driver::start(block.transport(), FEATURE_FLUSH);
    disk.hold();
    offer(&block, &mut driver, 0, 0, 0, &[(DATA_AT, 512, true)]);
    until("the request is on the disk", || load(&disk.begun) == 1).await;
    let mut driver = Driver::start(block.transport(), FEATURE_FLUSH);
    disk.release();
    offer(&block, &mut driver, 8, 4, 0, &[]);
    assert_eq!(driver.wait_used().await, (8, 1));
    assert_eq!(driver.used(), None);
    assert_eq!(status_of(&block, 0), 0xee);
    set(block.transport(), register::STATUS, 0);
}

#[tokio::test]
async fn a_state_of_another_version_or_kind_is_refused() {
    let (bench, disk) = (Bench::new(), MemoryDisk::new());
    let block = device(&bench, &disk, false);
    block.quiesce().await;
    let saved = block.save().unwrap();
    assert!(matches!(
        block.restore(2, &saved),
        Err(StateError::Version {
            found: 2,
            known: 1,
            ..
        })
    ));
    assert!(matches!(
        block.restore(1, b"{}"),
        Err(StateError::Invalid { .. })
    ));
    assert!(matches!(
        block.restore(1, &saved[1..]),
        Err(StateError::Invalid { .. })
    ));
    block.restore(1, &saved).unwrap();
}
